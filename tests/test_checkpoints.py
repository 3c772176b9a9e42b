"""Checkpoints: whole or not at all, on any layout, after `kill -9`.

`DECENTRAL_JAX_KILLS=20` kills twenty runs of two processes, over all algorithms here.
"""

import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decentral_jax as dj
from decentral_jax import launch
from decentral_jax.checkpoints import DIGESTS, Checkpoints
from tests.checkpointed import SAVE_EVERY, STEPS

HERE = Path(__file__).parent
KILLS = int(os.environ.get("DECENTRAL_JAX_KILLS", "2"))
KILLED = ["def_sgd_block", "detagm", "choco_sgd_top_k", "powersgd", "d2", "diloco"]
KILLED += ["slowmo", "mll_sgd_two_hubs", "cser", "sgp", "apam_delayed", "d_grab"]


def state(workers, tx=None):
    """Parameters that differ between workers, and a state that knows of them."""
    tx = tx or optax.sgd(0.1, momentum=0.9)
    n = workers.num_workers
    params = {
        "w": jnp.arange(3.0 * n).reshape(n, 3),
        "b": jnp.arange(n, dtype=jnp.bfloat16),
    }
    params = workers.shard(params)
    opt_state = workers.spmd(tx.init)(params)
    _, opt_state = workers.spmd(tx.update)(params, opt_state, params)
    return params, opt_state


def empty(trees):
    return jax.tree.map(jnp.zeros_like, trees)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


def save(folder, workers, steps, **options):
    """Of each step the parameters plus the step's number."""
    params, opt_state = state(workers)
    with Checkpoints(folder, workers, **options) as checkpoints:
        for step in steps:
            moved = jax.tree.map(lambda x, step=step: x + step, params)
            checkpoints.save(step, moved, opt_state, data={"epoch": step})


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_round_trip_on_any_layout(tmp_path, devices):
    workers = dj.Workers(8)
    save(tmp_path, workers, [7])
    other = dj.Workers(8, devices=jax.devices()[:devices])
    params, opt_state = state(other)
    with Checkpoints(tmp_path, other) as checkpoints:
        found = checkpoints.restore(*empty((params, opt_state)))
    assert found is not None
    assert (found.step, found.data, found.reset) == (7, {"epoch": 7}, False)
    assert_equal(found.params, jax.tree.map(lambda x: x + 7, params))
    assert_equal(found.opt_state, opt_state)
    for leaf in jax.tree.leaves((found.params, found.opt_state)):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def test_random_keys(tmp_path):
    """Typed ones, which cannot be written as they are."""
    workers = dj.Workers(4)
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 4)
    params, state = workers.shard((jnp.ones((4, 2)), {"key": keys}))
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, params, state)
        others = {"key": jax.random.split(jax.random.key(0, impl="rbg"), 4)}
        found = checkpoints.restore(params, workers.shard(others))
        raw = workers.shard({"key": jnp.zeros((4, 2), jnp.uint32)})
        with pytest.raises(ValueError, match="of another model or optimizer"):
            checkpoints.restore(params, raw)
    assert found is not None
    assert found.opt_state["key"].dtype == keys.dtype
    draws = jax.vmap(jax.random.normal)
    np.testing.assert_array_equal(draws(found.opt_state["key"]), draws(keys))


def test_nothing_to_restore(tmp_path):
    workers = dj.Workers(4)
    with Checkpoints(tmp_path / "new" / "folder", workers) as checkpoints:
        assert checkpoints.restore(*state(workers)) is None


def test_the_latest_are_kept(tmp_path):
    workers = dj.Workers(4)
    save(tmp_path, workers, range(5), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "4"]


def test_saved_arrays_may_be_donated(tmp_path):
    """While the files are still being written."""
    workers = dj.Workers(4)
    params, opt_state = state(workers)
    expected = jax.tree.map(np.asarray, params)
    overwrite = workers.spmd(
        lambda p: jax.tree.map(lambda x: x * 0 - 1, p), donate_argnums=0
    )
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, params, opt_state)
        overwrite(params)
        found = checkpoints.restore(*state(workers))
    assert found is not None
    assert_equal(found.params, expected)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_torn_checkpoint_is_not_used(tmp_path, caplog):
    """Cut short, changed or missing at any place, of any file: the one before is."""
    workers = dj.Workers(2)
    save(tmp_path / "whole", workers, [1, 2])
    params, opt_state = state(workers)
    rng = np.random.default_rng(0)
    names = [p.relative_to(tmp_path / "whole") for p in files(tmp_path / "whole/2")]
    assert len(names) > 5
    for number, name in enumerate(names):
        for way in ("cut", "changed", "missing"):
            folder = tmp_path / f"{way} {number}"
            shutil.copytree(tmp_path / "whole", folder)
            content = bytearray((folder / name).read_bytes())
            at = rng.integers(len(content)) if content else 0
            if way == "cut":
                (folder / name).write_bytes(content[:at])
            elif way == "changed" and content:
                content[at] ^= 1 << rng.integers(8)
                (folder / name).write_bytes(content)
            else:
                (folder / name).unlink()
            if way == "cut" and not content:
                continue
            caplog.clear()
            with Checkpoints(folder, workers) as checkpoints:
                found = checkpoints.restore(params, opt_state)
                assert found is not None
                assert found.step == 1, (name, way)
                assert "2 is skipped" in caplog.text
                assert_equal(found.params, jax.tree.map(lambda x: x + 1, params))
                # The run goes on over the torn one.
                checkpoints.save(2, params, opt_state)
                again = checkpoints.restore(params, opt_state)
                assert again is not None
                assert again.step == 2
            shutil.rmtree(folder)


def test_all_torn(tmp_path, caplog):
    workers = dj.Workers(2)
    save(tmp_path, workers, [1])
    (tmp_path / "1" / DIGESTS).unlink()
    with Checkpoints(tmp_path, workers) as checkpoints:
        assert checkpoints.restore(*state(workers)) is None
    assert "1 is skipped: it is unfinished" in caplog.text


def hidden(trace_workers):
    """An optimizer whose model to evaluate is in its state."""
    trace = dj.traces.round_robin(trace_workers, 9)
    return dj.asynchronous(optax.sgd(0.1), trace)


@pytest.mark.parametrize("numbers", [(8, 4), (4, 8), (8, 1)])
@pytest.mark.parametrize("name", ["momentum", "dsgt", "hidden"])
def test_another_number_of_workers(tmp_path, caplog, numbers, name):
    """All start from the evaluated model, with fresh states, said aloud."""
    make = {
        "momentum": lambda n: optax.sgd(0.1, momentum=0.9),
        "dsgt": lambda n: dj.dsgt(0.1, dj.topology.ring(n)),
        "hidden": hidden,
    }[name]
    before, after = (dj.Workers(n) for n in numbers)
    params, opt_state = state(before, make(numbers[0]))
    model = before.gather(before.spmd(dj.eval_params)(opt_state, params))
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(3, params, opt_state, data=[1, 2])
    tx = make(numbers[1])
    fresh = state(after, tx)
    with Checkpoints(tmp_path, after) as checkpoints:
        with pytest.raises(ValueError, match=r"pass init=tx\.init"):
            checkpoints.restore(*fresh)
        found = checkpoints.restore(*fresh, init=tx.init)
    assert found is not None
    assert (found.step, found.data, found.reset) == (3, [1, 2], True)
    assert "all start from its evaluated model" in caplog.text
    expected = jax.tree.map(lambda x: np.stack([x[0]] * numbers[1]), model)
    assert_equal(jax.tree.map(np.asarray, found.params), expected)
    assert_equal(found.opt_state, after.spmd(tx.init)(found.params))


def test_levels_and_other_levels(tmp_path):
    """Named axes; other ones are another number of workers."""
    hubs, flat = dj.Workers({"hub": 2, "worker": 2}), dj.Workers(4)
    tx = optax.sgd(0.1)
    params = hubs.shard(jnp.arange(12.0).reshape(2, 2, 3))
    with Checkpoints(tmp_path, hubs) as checkpoints:
        checkpoints.save(1, params, hubs.spmd(tx.init)(params))
        found = checkpoints.restore(params, hubs.spmd(tx.init)(params))
    assert found is not None
    assert_equal(found.params, params)
    other = flat.replicate(jnp.zeros(3))
    with Checkpoints(tmp_path, flat) as checkpoints:
        found = checkpoints.restore(other, flat.spmd(tx.init)(other), init=tx.init)
    assert found is not None
    np.testing.assert_array_equal(found.params, np.tile([4.5, 5.5, 6.5], (4, 1)))


@pytest.mark.parametrize(
    ("tx", "shape", "message"),
    [
        (optax.sgd(0.1), (3,), r"only one of both has state\[1\]\[0\]\.trace"),
        (optax.adam(0.1), (3,), r"only one of both has state\[1\]\[0\]\.trace"),
        (
            optax.sgd(0.1, momentum=0.9),
            (5,),
            r"at state\[0\]\['w'\] it has shape \(3,\)",
        ),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_another_model_or_optimizer(tmp_path, tx, shape, message):
    workers = dj.Workers(2)
    save(tmp_path, workers, [1])
    params = workers.replicate({"w": jnp.zeros(shape), "b": jnp.zeros((), "bfloat16")})
    with (
        Checkpoints(tmp_path, workers) as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoints.restore(params, workers.spmd(tx.init)(params))


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install decentral_jax\[checkpoint\]"):
        Checkpoints(tmp_path, dj.Workers(1))


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_and_started_again(tmp_path, monkeypatch, capfd, seed):
    """`kill -9` of a process after a step, both at random: the end is the same."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setattr(launch, "GRACE", 0.5)
    rng = np.random.default_rng(seed)
    name = KILLED[seed % len(KILLED)]
    victim, at = rng.integers(2), rng.integers(1, STEPS + 1)

    def run(folder, result, *killed):
        command = [sys.executable, str(HERE / "checkpointed.py"), name]
        command += [str(tmp_path / folder), str(tmp_path / result), *map(str, killed)]
        return launch.run(command, processes=2, devices=4)

    assert run("never", "never.npz") == 0
    assert run("killed", "killed.npz", victim, at) == 137
    assert not (tmp_path / "killed.npz").exists()
    capfd.readouterr()
    assert run("killed", "killed.npz") == 0
    out = capfd.readouterr().out
    # The first is surely on disk when the second is begun.
    assert ("goes on after step" in out) or at <= 2 * SAVE_EVERY
    with np.load(tmp_path / "never.npz") as a, np.load(tmp_path / "killed.npz") as b:
        for key in ("bias", "kernel"):
            np.testing.assert_array_equal(a[key], b[key])
