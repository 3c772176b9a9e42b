"""Loaders: shards, order, exact resumption, several processes, Grain."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decentral_jax as dj
from decentral_jax import launch
from decentral_jax.checkpoints import Checkpoints
from decentral_jax.data import Loader, prefetch
from tests.support import read_together

ROOT = Path(__file__).parent.parent.parent
N = 4


@pytest.fixture
def workers():
    return dj.Workers(N)


def take(loader, count):
    return np.stack([next(loader) for _ in range(count)])


# Shards


@pytest.mark.parametrize("seed", [None, 5])
def test_each_worker_reads_its_own_shard(workers, seed):
    """In two passes, all of its examples twice, and nobody else's."""
    loader = Loader(np.arange(24), workers, 3, seed=seed, epochs=2)
    assert loader.batches_per_epoch == 2
    batches = np.stack(list(loader))  # [4, N, 3]
    assert batches.shape == (4, N, 3)
    for worker in range(N):
        for passed in batches[:2, worker], batches[2:, worker]:
            assert sorted(passed.ravel()) == list(range(worker, 24, N))


def test_all_leaves_have_the_same_examples(workers):
    data = {"x": np.arange(48.0).reshape(24, 2), "y": jnp.arange(24)}
    batch = next(Loader(data, workers, 3))
    assert batch["x"].shape == (N, 3, 2)
    np.testing.assert_array_equal(batch["x"][..., 0], 2 * batch["y"])


def test_orders_differ_between_passes_workers_and_seeds(workers):
    def orders(seed):
        # Positions within the shard, [pass, worker, 20].
        return take(Loader(np.arange(80), workers, 20, seed=seed), 3) // N

    found = np.concatenate([orders(0).reshape(-1, 20), orders(1).reshape(-1, 20)])
    assert len(np.unique(found, axis=0)) == 2 * 3 * N
    np.testing.assert_array_equal(orders(0), orders(0))


def test_the_order_of_a_seed_never_changes():
    """Recorded: a change would break the resumption of old runs."""
    loader = Loader(np.arange(8), dj.Workers(1), 8, seed=7)
    np.testing.assert_array_equal(
        take(loader, 2)[:, 0], [[3, 1, 4, 5, 0, 2, 6, 7], [3, 2, 1, 5, 7, 4, 0, 6]]
    )


def test_remainders_are_skipped_in_one_pass_only(workers):
    """7 examples per worker: one is left over in each pass, not always the same."""
    batches = take(Loader(np.arange(28), workers, 3, seed=0), 40)  # 20 passes
    for worker in range(N):
        seen = batches[:, worker].reshape(20, 6)
        assert all(len(set(one)) == 6 for one in seen)
        assert set(seen.ravel()) == set(range(worker, 28, N))
    batches = take(Loader(np.arange(28), workers, 3, seed=None), 40)
    assert batches.max() < 24


def test_given_shards_of_different_sizes(workers):
    """Small shards begin their next pass while large ones are in their first."""
    shards = [[0, 1], range(2, 8), np.arange(8, 20), [20, 21, 22, 0]]
    loader = Loader(np.arange(23), workers, 2, shards=shards, epochs=1)
    assert loader.batches_per_epoch == 6
    batches = np.stack(list(loader))  # [6, N, 2]
    for worker, shard in enumerate(shards):
        full = len(shard) // 2
        for i in range(0, 6, full):
            passed = batches[i : i + full, worker].ravel()
            assert sorted(passed) == sorted(shard), worker


def test_nested_worker_axes():
    workers = dj.Workers({"hub": 2, "worker": 2})
    batch = next(Loader(np.arange(8.0), workers, 2, seed=None))
    np.testing.assert_array_equal(batch, [[[0, 4], [1, 5]], [[2, 6], [3, 7]]])
    workers.shard(batch, local=True)


def test_memory_mapped_arrays(workers, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(24.0))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    batch = next(Loader(x, workers, 3))
    np.testing.assert_array_equal(batch, next(Loader(np.asarray(x), workers, 3)))
    assert type(batch) is np.ndarray


# Position


@pytest.mark.parametrize("taken", [0, 3, 5, 17])
def test_exact_resumption(workers, taken):
    def new():
        return Loader(np.arange(31), workers, 2, seed=1, epochs=9)

    loader = new()
    take(loader, taken) if taken else None
    state = json.loads(json.dumps(loader.get_state()))
    rest = np.stack(list(loader))
    other = new()
    take(other, 4)
    other.set_state(state)
    np.testing.assert_array_equal(np.stack(list(other)), rest)
    assert len(rest) == 9 * loader.batches_per_epoch - taken


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_position_counts_what_was_returned(workers, size):
    def new():
        return Loader(np.arange(32), workers, 2, seed=1, epochs=3)

    expected = list(new())
    batches = prefetch(new(), workers, size)
    assert batches.get_state() == new().get_state()
    for one in expected[:3]:
        np.testing.assert_array_equal(next(batches), one)
    state = batches.get_state()
    assert state["batches"] == 3
    # With and without prefetch, and back in the same iterator.
    for again in new(), prefetch(new(), workers, 2), batches:
        again.set_state(state)
        rest = list(again)
        assert len(rest) == len(expected) - 3
        for x, y in zip(rest, expected[3:], strict=True):
            np.testing.assert_array_equal(x, y)


def test_prefetched_batches_are_on_the_workers_devices(workers):
    loader = Loader({"x": np.ones((16, 3), np.float32)}, workers, 2)
    batches = prefetch(loader, workers, size=3)
    batch = next(batches)
    assert batch["x"].sharding.is_equivalent_to(workers.sharding, 3)
    assert loader.get_state()["batches"] == 3


def test_position_in_a_checkpoint(workers, tmp_path):
    params = workers.replicate(jnp.zeros(2))
    batches = prefetch(Loader(np.arange(32), workers, 2), workers)
    for _ in range(5):
        next(batches)
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(5, params, data=batches.get_state())
        expected = next(batches)
        found = checkpoints.restore(params)
    again = prefetch(Loader(np.arange(32), workers, 2), workers)
    again.set_state(found.data)
    np.testing.assert_array_equal(next(again), expected)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"batch_size": 3}, "batch_size=2, this loader has 3"),
        ({"seed": 4}, "seed=0, this loader has 4"),
        ({"data": np.arange(40)}, "examples=32, this loader has 40"),
        ({"shards": np.arange(32).reshape(N, 8)}, "shards=None"),
        ({"workers": 2}, "workers="),
    ],
)
def test_another_loader_refuses_the_position(workers, changed, match):
    arguments = {"data": np.arange(32), "workers": N, "batch_size": 2} | changed
    other = Loader(**arguments | {"workers": dj.Workers(arguments["workers"])})
    loader = Loader(np.arange(32), workers, 2)
    take(loader, 3)
    with pytest.raises(ValueError, match=match):
        other.set_state(loader.get_state())
    # As the message says.
    other.set_state({**other.get_state(), "batches": 3})
    assert other.get_state()["batches"] == 3


def test_other_shards_refuse_the_position(workers):
    shards = np.arange(32).reshape(N, 8)
    state = Loader(np.arange(32), workers, 2, shards=shards).get_state()
    with pytest.raises(ValueError, match="shards="):
        Loader(np.arange(32), workers, 2, shards=shards[::-1]).set_state(state)


# Bad arguments


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"data": {}}, ValueError, r"got \[\]"),
        ({"data": (np.ones(5), np.ones(6))}, ValueError, r"got \[5, 6\]"),
        ({"data": ([1, 2], np.ones(2))}, TypeError, r"got a int at \[0\]\[0\]"),
        ({"data": np.float32(1)}, TypeError, "at the top"),
        ({"batch_size": 9}, ValueError, "more than the 8 examples of worker 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"shards": [[1], [2]]}, ValueError, "got 2 for 4 workers"),
        ({"shards": [[1.5]] * N}, TypeError, r"shards\[0\] must be a list of numbers"),
        ({"shards": [[1, 2], [1, 32]] * 2}, ValueError, r"shards\[1\].* 1 to 32"),
        ({"shards": [[1, 2], [-1, 3]] * 2}, ValueError, r"shards\[1\].* -1 to 3"),
        ({"shards": [[1, 2], []] * 2}, TypeError, r"shards\[1\]"),
    ],
)
def test_bad_arguments(workers, changed, error, match):
    arguments = {"data": np.arange(32), "workers": workers, "batch_size": 2}
    with pytest.raises(error, match=match):
        Loader(**arguments | changed)


def test_iterators_without_a_position(workers):
    batches = prefetch([np.full((N, 2), i) for i in range(3)], workers)
    assert [int(batch[0, 0]) for batch in batches] == [0, 1, 2]
    for call in batches.get_state, lambda: batches.set_state({}):
        with pytest.raises(TypeError, match="list_iterator has no get_state"):
            call()
    with pytest.raises(ValueError, match="size must be at least 1"):
        prefetch([], workers, size=0)
    with pytest.raises(ValueError, match="leading axes"):
        next(prefetch([np.ones(3)], workers))


# Several processes


def test_two_processes(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = ROOT / "tests" / "support" / "read_together.py"
    command = [sys.executable, str(program), str(tmp_path)]
    ended = launch.run(command, processes=2, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    lines = sorted(line for line in out.splitlines() if "equal" in line)
    count = read_together.BATCHES
    assert lines == [f"[{i}] {count} batches equal on 2 processes" for i in range(2)]
    # Only one process has written.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, count + 1))
    assert all(row["loss/worker_3"] == pytest.approx(row["loss"]) for row in rows)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == count + 1


# Grain


def test_grain(workers):
    pytest.importorskip("grain", reason="needs Grain: pip install grain")
    path = ROOT / "docs" / "examples" / "grain_batches.py"
    spec = importlib.util.spec_from_file_location("grain_batches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Squares:
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return {"x": np.float32(i), "y": np.float32(i) ** 2}

    def new():
        return prefetch(module.read(Squares(), workers, batch_size=3), workers)

    batches = new()
    first = [next(batches) for _ in range(4)]  # two epochs
    state = json.loads(json.dumps(batches.get_state()))
    rest = [next(batches) for _ in range(3)]
    for batch in first:
        assert batch["x"].shape == (N, 3)
        np.testing.assert_array_equal(batch["x"] ** 2, batch["y"])
    x = np.stack([batch["x"] for batch in first])  # [4, N, 3]
    for worker in range(N):
        for passed in x[:2, worker], x[2:, worker]:
            assert sorted(passed.ravel()) == list(range(worker, 24, N))
        assert (x[:2, worker] != x[2:, worker]).any()
    again = new()
    again.set_state(state)
    for batch in rest:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)
