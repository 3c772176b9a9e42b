"""Checkpoints: complete or ignored, on any layout, also after `kill -9`.

`DECENTRAL_JAX_KILLS=20` kills twenty runs of three or four processes, over all
algorithms listed here, instead of two runs of two processes.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import decentral_jax as dj
from decentral_jax import checkpoints as module
from decentral_jax import launch
from decentral_jax.checkpoints import DIGESTS, NOTES, Checkpoints
from tests.support.checkpointed import SAVE_EVERY, STEPS

HERE = Path(__file__).parent.parent / "support"
ROOT = HERE.parent.parent
KILLS = int(os.environ.get("DECENTRAL_JAX_KILLS", "2"))
KILLED = ["def_sgd_block", "detagm", "choco_sgd_top_k", "powersgd", "d2", "diloco"]
KILLED += ["slowmo", "mll_sgd_two_hubs", "cser", "sgp", "apam_delayed", "d_grab"]
PROCESSES = (3, 4) if "DECENTRAL_JAX_KILLS" in os.environ else (2,)


def state(workers, tx=None):
    """Parameters that differ between workers, and a state that depends on them."""
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
    """Saves the parameters plus the step number at each step."""
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
    """Typed keys, which Orbax cannot write directly."""
    workers = dj.Workers(4)
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 4)
    params, state = workers.shard((jnp.ones((4, 2)), {"key": keys}))
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, params, state)
        others = {"key": jax.random.split(jax.random.key(0, impl="rbg"), 4)}
        found = checkpoints.restore(params, workers.shard(others))
        raw = workers.shard({"key": jnp.zeros((4, 2), jnp.uint32)})
        with pytest.raises(ValueError, match="has another model or optimizer"):
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
    """Donation is safe while the files are still being written."""
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


def steps(folder):
    return sorted(p.name for p in folder.iterdir())


def content(folder):
    """The contents of all files in a folder, to detect changes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def restored(folder, workers):
    """Returns the latest checkpoint's step; asserts that its parameters match."""
    params, opt_state = state(workers)
    with Checkpoints(folder, workers) as checkpoints:
        found = checkpoints.restore(*empty((params, opt_state)))
    if found is None:
        return None
    assert_equal(found.params, jax.tree.map(lambda x: x + found.step, params))
    assert_equal(found.opt_state, opt_state)
    return found.step


@pytest.mark.parametrize("who", ["same run", "resumed", "another run"])
def test_saving_a_step_again_loses_nothing(tmp_path, who):
    """Saves a step again, as after a resume, or in a final save after the loop."""
    workers = dj.Workers(2)
    if who == "same run":
        save(tmp_path, workers, [20, 40, 40, 40])
        assert steps(tmp_path) == ["20", "40.2"]
    elif who == "another run":
        save(tmp_path, workers, [20, 40])
        save(tmp_path, workers, [40])
        # A run does not own a checkpoint that it has not restored.
        assert steps(tmp_path) == ["20", "40", "40.1"]
    else:
        save(tmp_path, workers, [20, 40])
        for attempt in (1, 2):
            params, opt_state = state(workers)
            with Checkpoints(tmp_path, workers) as checkpoints:
                found = checkpoints.restore(params, opt_state)
                checkpoints.save(40, found.params, found.opt_state)
            assert steps(tmp_path) == ["20", f"40.{attempt}"]
    assert restored(tmp_path, workers) == 40


def test_a_step_below_a_complete_checkpoint_is_refused(tmp_path):
    """`restore` would never return it, although the run would consider it saved."""
    workers = dj.Workers(2)
    save(tmp_path, workers, [100])
    before = content(tmp_path)
    for other in (Checkpoints(tmp_path, workers) for _ in range(2)):
        with other, pytest.raises(ValueError, match="step 100, which restore prefers"):
            other.save(20, *state(workers))
    assert content(tmp_path) == before
    # A step below a damaged checkpoint is accepted.
    (tmp_path / "100" / DIGESTS).write_text("{}")
    save(tmp_path, workers, [20])
    assert restored(tmp_path, workers) == 20
    assert steps(tmp_path) == ["100", "20"]


def test_only_checkpoints_that_this_run_superseded_are_deleted(tmp_path):
    workers = dj.Workers(2)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 9):
            manager.save(step, args=ocp.args.StandardSave({"x": np.ones(3)}))
    save(tmp_path, workers, [3])
    foreign = content(tmp_path)
    save(tmp_path, workers, [4, 5, 6], keep=1)
    assert steps(tmp_path) == ["1", "2", "3", "6", "9"]
    assert restored(tmp_path, workers) == 6
    assert foreign.items() <= content(tmp_path).items()


def test_unfinished_and_damaged_checkpoints_do_not_count_as_kept(tmp_path, caplog):
    workers = dj.Workers(2)
    save(tmp_path, workers, [1, 2, 3])
    (tmp_path / "2" / DIGESTS).unlink()
    next((tmp_path / "3" / "state").rglob("d/*")).write_bytes(b"x")
    with Checkpoints(tmp_path, workers, keep=2) as checkpoints:
        found = checkpoints.restore(*state(workers))
        assert found is not None
        assert found.step == 1
        assert steps(tmp_path) == ["1", "2", "3"]
        moved = jax.tree.map(lambda x: x + 3, found.params)
        checkpoints.save(4, moved, found.opt_state)
    assert "3 is skipped" in caplog.text
    assert "2 is skipped: it is unfinished" in caplog.text
    assert steps(tmp_path) == ["1", "4"]
    assert restored(tmp_path, workers) == 4


def test_the_previous_checkpoint_stays_until_the_next_is_complete(
    tmp_path, monkeypatch
):
    """A process that reads at the same time changes nothing."""
    workers = dj.Workers(2)
    params, opt_state = state(workers)
    gate, hashing, digest = threading.Event(), threading.Event(), module.digest_of

    def slow(file, sync=False):
        if sync:
            hashing.set()
            assert gate.wait(60)
        return digest(file, sync)

    with Checkpoints(tmp_path, workers, keep=1) as checkpoints:
        checkpoints.save(1, *jax.tree.map(lambda x: x, (params, opt_state)))
        checkpoints.wait()
        monkeypatch.setattr(module, "digest_of", slow)
        moved = jax.tree.map(lambda x: x + 2, params)
        checkpoints.save(2, moved, opt_state)
        assert hashing.wait(60)
        before = content(tmp_path)
        with Checkpoints(tmp_path, workers, keep=1) as reader:
            found = reader.restore(params, opt_state)
        assert found is not None
        assert found.step == 1
        assert content(tmp_path) == before
        gate.set()
    assert steps(tmp_path) == ["2"]
    assert restored(tmp_path, workers) == 2


KILLED_WHILE_HASHING = """
import os, signal, sys
import jax.numpy as jnp, optax
import decentral_jax as dj
from decentral_jax import checkpoints
workers = dj.Workers(2)
digest, count = checkpoints.digest_of, 0
def kill(file, sync=False):
    global count
    count += 1
    if count > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(file, sync)
with checkpoints.Checkpoints(sys.argv[1], workers, keep=1) as saved:
    saved.save(1, workers.replicate(jnp.ones(3)))
    saved.wait()
    checkpoints.digest_of = kill
    saved.save(2, workers.replicate(jnp.zeros(3)))
    saved.wait()
"""


def test_killed_while_hashing(tmp_path, monkeypatch):
    """With `keep=1`, the next complete checkpoint replaces the unfinished one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", KILLED_WHILE_HASHING, str(tmp_path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert steps(tmp_path) == ["1", "2"]
    workers = dj.Workers(2)
    with Checkpoints(tmp_path, workers, keep=1) as checkpoints:
        found = checkpoints.restore(workers.replicate(jnp.zeros(3)))
        assert found is not None
        assert found.step == 1
        np.testing.assert_array_equal(found.state, np.ones((2, 3)))
        checkpoints.save(2, found.state)
    assert steps(tmp_path) == ["2.1"]


@pytest.mark.parametrize("where", ["orbax", "digests"])
@pytest.mark.parametrize("when", ["save", "restore", "wait", "close", "exit"])
def test_background_errors_are_raised(tmp_path, monkeypatch, where, when):
    workers = dj.Workers(2)
    params, opt_state = state(workers)

    def full(*_, **__):
        raise OSError("disk full")

    saved = Checkpoints(tmp_path, workers, keep=2)
    saved.save(1, params, opt_state)
    saved.wait()
    with monkeypatch.context() as patched:
        if where == "orbax":
            patched.setattr(
                saved._orbax,
                "save",
                lambda *_: patched.setattr(saved._orbax, "wait_until_finished", full),
            )
        else:
            patched.setattr(module, "digest_of", full)
        saved.save(2, params, opt_state)
        saved._sealing.join()
    call = {
        "save": lambda: saved.save(2, params, opt_state),
        "restore": lambda: saved.restore(params, opt_state),
        "wait": saved.wait,
        "close": saved.close,
        "exit": lambda: saved.__exit__(None, None, None),
    }[when]
    with pytest.raises(RuntimeError, match=r"not saved.*disk full"):
        call()
    if when in ("save", "restore", "wait"):
        # The error is raised once, and the run may continue without the failed step.
        saved.save(3, params, opt_state)
        saved.close()
        assert steps(tmp_path) == ["1", "3"]


def test_an_error_inside_the_block_takes_precedence(tmp_path, monkeypatch, caplog):
    workers = dj.Workers(2)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(module, "digest_of", full)

    def block():
        with Checkpoints(tmp_path, workers) as checkpoints:
            checkpoints.save(2, *state(workers))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    assert "disk full" in caplog.text


def emptied(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def made_a_folder(file):
    file.unlink()
    file.mkdir()


def digests(text):
    return lambda folder: (folder / "2" / DIGESTS).write_text(text)


DAMAGE = {
    f"digests {text}": digests(text)
    for text in ("", "{", "[]", "null", "3", '{"x": 1}', "{}", '{"notes.json": "0"}')
}
DAMAGE |= {
    "digests of files outside": digests('{"../../etc/passwd": "0"}'),
    "digests that are not text": lambda f: (f / "2" / DIGESTS).write_bytes(b"\xff"),
    "no state": lambda f: shutil.rmtree(f / "2" / "state"),
    "a file": lambda f: (shutil.rmtree(f / "2"), (f / "2").write_text("x")),
}
HARMLESS = {
    "a file": lambda f: (f / "notes.txt").write_text("x"),
    "a folder": lambda f: (f / "plots").mkdir(),
    "a later folder": lambda f: (f / "3").mkdir(),
    "a later file": lambda f: (f / "3").write_text("x"),
    "a temporary folder of Orbax": lambda f: (f / "3.orbax-checkpoint-tmp").mkdir(),
    "an additional file": lambda f: (f / "2" / "state" / "more").write_text("x"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save(folder, dj.Workers(2), [1, 2])
    return folder


def check_damaged(folder, expected):
    """Checks the restored step, that restoring changes nothing, and later saves."""
    workers, before = dj.Workers(2), content(folder)
    assert restored(folder, workers) == expected
    assert content(folder) == before
    for step in (2, 3):
        save(folder, workers, [step])
        assert restored(folder, workers) == step
    assert before.items() <= content(folder).items()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_not_used(tmp_path, whole, name, caplog):
    shutil.copytree(whole, tmp_path / "damaged")
    DAMAGE[name](tmp_path / "damaged")
    check_damaged(tmp_path / "damaged", 1)
    assert "2 is skipped" in caplog.text


@pytest.mark.parametrize("name", HARMLESS)
def test_foreign_files_are_harmless(tmp_path, whole, name):
    shutil.copytree(whole, tmp_path / "harmless")
    HARMLESS[name](tmp_path / "harmless")
    check_damaged(tmp_path / "harmless", 2)


@pytest.mark.parametrize("damage", [emptied, cut, flipped, Path.unlink, made_a_folder])
def test_damage_of_any_file(tmp_path, whole, damage, caplog):
    """Damage of any one file makes `restore` use the previous checkpoint."""
    names = [p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file()]
    assert len(names) > 5
    workers, count = dj.Workers(2), 0
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        size = (folder / name).stat().st_size
        if size or damage in (Path.unlink, made_a_folder):
            damage(folder / name)
            caplog.clear()
            before = content(folder)
            assert restored(folder, workers) == 1, name
            assert "2 is skipped" in caplog.text
            assert content(folder) == before
            count += 1
    assert count > 5
    check_damaged(folder, 1)


def test_another_format(tmp_path, caplog):
    workers = dj.Workers(2)
    save(tmp_path, workers, [1])
    notes = json.loads((tmp_path / "1" / NOTES).read_text())
    (tmp_path / "1" / NOTES).write_text(json.dumps(notes | {"format": 2}))
    seals = json.loads((tmp_path / "1" / DIGESTS).read_text())
    seals[NOTES] = module.digest_of(tmp_path / "1" / NOTES)
    (tmp_path / "1" / DIGESTS).write_text(json.dumps(seals))
    assert restored(tmp_path, workers) is None
    assert "its format is 2, this version reads 1" in caplog.text


def hidden(trace_workers):
    """An optimizer whose state holds the evaluation model."""
    trace = dj.traces.round_robin(trace_workers, 9)
    return dj.asynchronous(optax.sgd(0.1), trace)


@pytest.mark.parametrize("numbers", [(8, 4), (4, 8), (8, 1)])
@pytest.mark.parametrize("name", ["momentum", "dsgt", "hidden"])
def test_another_number_of_workers(tmp_path, caplog, numbers, name):
    """All workers start from the evaluated model with new states, and a warning."""
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
    assert "start from its evaluated model" in caplog.text
    expected = jax.tree.map(lambda x: np.stack([x[0]] * numbers[1]), model)
    assert_equal(jax.tree.map(np.asarray, found.params), expected)
    assert_equal(found.opt_state, after.spmd(tx.init)(found.params))


def test_levels_and_other_levels(tmp_path):
    """Named axes; different axes count as another number of workers."""
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
        (optax.sgd(0.1), (3,), r"only one of them has state\[1\]\[0\]\.trace"),
        (optax.adam(0.1), (3,), r"only one of them has state\[1\]\[0\]\.trace"),
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


def make_ef(detach=0.0, evaluate="shared"):
    block = dj.compression.random_block(2)
    return dj.error_feedback(block, detach=detach, evaluate=evaluate)


class OneState(NamedTuple):
    value: jax.Array


class OtherState(NamedTuple):
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class WithStatic:
    value: jax.Array
    static: Any = dataclasses.field(metadata={"static": True})


ONES = np.ones((2, 3), np.float32)
DIFFERENT = {
    "EF and DEF": [make_ef(d).init(ONES) for d in (0.0, 0.3)],
    "static number": [make_ef(d).init(ONES) for d in (0.3, 0.4)],
    "static word": [make_ef(0.3, e).init(ONES) for e in ("shared", "averaged")],
    "type": [OneState(ONES), OtherState(ONES)],
    "type inside": [{"a": (OneState(ONES), ())}, {"a": (OtherState(ONES), ())}],
    "type without leaves": [(ONES, optax.EmptyState()), (ONES, optax.MaskedNode())],
    "static field": [WithStatic(ONES, x) for x in ((1, "a"), (1, "b"))],
    "none": [(ONES, None), (ONES, ())],
    "dtype": [ONES, ONES.astype(np.int32)],
    "more": [(ONES,), (ONES, ONES)],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_states_of_other_types_are_refused(tmp_path, name):
    workers = dj.Workers(2)

    def each(x):
        many = jnp.shape(x)[:1] == (2,)
        return jnp.asarray(x) if many else jnp.broadcast_to(x, (2, *jnp.shape(x)))

    for number, (saved, like) in enumerate([DIFFERENT[name], DIFFERENT[name][::-1]]):
        saved, like = jax.tree.map(each, (saved, like))
        with Checkpoints(tmp_path / str(number), workers) as checkpoints:
            checkpoints.save(1, saved)
            with pytest.raises(ValueError, match="has another model or optimizer"):
                checkpoints.restore(like)
            assert checkpoints.restore(saved) is not None


def test_functions_in_static_fields_may_be_recreated(tmp_path):
    """Their addresses differ between processes."""
    workers = dj.Workers(2)
    saved, like = (WithStatic(jnp.asarray(ONES), (lambda x: x, {})) for _ in range(2))
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, saved)
        found = checkpoints.restore(like)
    assert found is not None
    assert_equal(found.state.value, ONES)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": np.zeros((4, 0, 3), np.float32), "b": np.ones((4, 2), np.float32)},
        {"a": np.zeros((4, 0), jnp.bfloat16), "key": None},
        {},
        (),
    ],
)
def test_leaves_without_entries(tmp_path, tree):
    workers = dj.Workers(4)
    tree = workers.shard(tree)
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, tree, ())
        found = checkpoints.restore(tree, ())
    assert found is not None
    assert_equal(found.state, (tree, ()))
    for leaf in jax.tree.leaves(found.state):
        assert leaf.sharding.is_equivalent_to(workers.sharding, leaf.ndim)


class Trained(TrainState):
    batch_stats: Any
    ema: Any
    key: Any


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def start(kind, tx):
    """A complete state of one worker, as the arguments of `save`."""
    params = {"w": jnp.zeros(3), "b": jnp.zeros((), jnp.bfloat16)}
    rest = {"step": jnp.int32(0), "batch_stats": {"mean": jnp.zeros(2)}}
    rest |= {"ema": {"w": jnp.zeros(3)}, "key": jax.random.key(0)}
    if kind == "TrainState":
        rest = {k: v for k, v in rest.items() if k != "step"}
        state = Trained.create(apply_fn=print, params=params, tx=tx, **rest)
        return (state.replace(step=jnp.int32(0)),)
    if kind == "dictionary":
        return ({"params": params, "opt_state": tx.init(params), **rest},)
    if kind == "beside":
        return {"params": params, **rest}, tx.init(params)
    if kind == "further":
        return params, tx.init(params), rest
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    if kind == "nnx":
        return ((model, optimizer),)
    if kind == "nnx.split in three":
        return *nnx.split((model, optimizer), nnx.Param, ...), {"ema": jnp.zeros(3)}
    return nnx.split((model, optimizer))


KINDS = [
    "TrainState",
    "dictionary",
    "beside",
    "further",
    "nnx",
    "nnx.split",
    "nnx.split in three",
]


def varied(trees, number):
    """Makes floating-point leaves and keys differ between workers; integers are 7."""

    def vary(x):
        index = jnp.arange(number)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.vmap(jax.random.key)(index)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.full_like(x, 7)
        index = index.reshape(number, *[1] * (x.ndim - 1)).astype(x.dtype)
        return (
            x + index + jnp.arange(x.size / number).reshape(x.shape[1:]).astype(x.dtype)
        )

    return jax.tree.map(vary, trees)


def named_leaves(trees):
    return {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_flatten_with_path(trees)[0]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_whole_states_in_one_call(tmp_path, kind):
    """Saves and restores a state with step, statistics, averages, and keys."""
    workers = dj.Workers(4)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), make_ef(0.3))
    like = workers.replicate(start(kind, tx))
    saved = workers.shard(varied(like, 4))
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(3, *saved, data={"epoch": 1})
        found = checkpoints.restore(*like)
    assert found is not None
    assert (found.step, found.data, found.reset) == (3, {"epoch": 1}, False)
    state = (found.state,) if len(saved) == 1 else found.state
    assert_equal(*jax.tree.map(_raw, (state, saved)))


def _raw(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@pytest.mark.parametrize("numbers", [(4, 2), (2, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_states_with_another_number_of_workers(tmp_path, kind, numbers):
    before, after = map(dj.Workers, numbers)
    # The state of DEF holds its evaluated model, which differs from the parameters.
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), make_ef(0.3))
    one = start(kind, tx)
    saved = before.shard(varied(before.replicate(one), numbers[0]))
    like = after.replicate(one)
    has_tx = kind == "TrainState" or kind.startswith("nnx")
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(3, *saved)
    with Checkpoints(tmp_path, after) as checkpoints:
        if not has_tx:
            with pytest.raises(ValueError, match=r"pass init=tx\.init"):
                checkpoints.restore(*like)
        found = checkpoints.restore(*like, init=None if has_tx else tx.init)
        assert found is not None
        assert found.reset
        # The run continues from the restored state.
        state = (found.state,) if len(like) == 1 else found.state
        checkpoints.save(4, *state)
        again = checkpoints.restore(*like)
    assert again is not None
    assert (again.step, again.reset) == (4, False)

    assert jax.tree.structure(state) == jax.tree.structure(like)
    old, new = named_leaves(saved), named_leaves(state)
    assert old.keys() == new.keys()
    kept = [x for path, x in old.items() if "shared" in path]
    seen = set()
    for path, x in new.items():
        assert x.shape[0] == numbers[1]
        assert x.dtype == old[path].dtype
        assert x.sharding.is_equivalent_to(after.sharding, x.ndim)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = np.concatenate([_raw(x), _raw(old[path])])
            assert len(np.unique(keys, axis=0)) == sum(numbers)
            seen.add("key")
        elif any(word in path for word in ("trace", "residual")) or (
            "count" in path and "rngs" not in path
        ):
            assert not np.any(x), path
            seen.add("fresh")
        elif "detach" in path:
            np.testing.assert_array_equal(x, np.full(x.shape, 0.3, x.dtype), path)
        elif jnp.issubdtype(x.dtype, jnp.integer):
            np.testing.assert_array_equal(x, np.full(x.shape, 7), path)
            seen.add("copied")
        else:
            # Parameters and DEF's shared model become the mean of the old shared model.
            # Both means are equal, because `varied` adds the same values to both.
            x = np.asarray(x, np.float32)
            mean = np.asarray(old[path], np.float32).mean(0)
            np.testing.assert_allclose(x, np.broadcast_to(mean, x.shape), atol=1e-6)
            seen.add("averaged")
    assert kept
    assert seen == {"key", "fresh", "copied", "averaged"}


def words(path):
    return re.findall(r"\w+", path.removesuffix(".value"))


@pytest.mark.parametrize("kind", ["TrainState", "nnx", "nnx.split", "beside"])
def test_the_hidden_model_of_whole_states(tmp_path, kind):
    """New workers start from the evaluated model, not from the mean of parameters."""
    before, after = dj.Workers(2), dj.Workers(4)
    tx = make_ef(0.3)

    def apart(path, x):
        # Make the shared model differ from the parameters.
        hidden = "shared" in jax.tree_util.keystr(path)
        return x + 1 if hidden else x

    saved = jax.tree_util.tree_map_with_path(
        apart, varied(before.replicate(start(kind, tx)), 2)
    )
    one = start(kind, tx)
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(3, *saved)
    with Checkpoints(tmp_path, after) as checkpoints:
        found = checkpoints.restore(*after.replicate(one), init=tx.init)
    assert found is not None
    state = (found.state,) if len(saved) == 1 else found.state
    old, new = (
        {
            path: np.asarray(x, np.float32)
            for path, x in named_leaves(tree).items()
            if jnp.issubdtype(x.dtype, jnp.floating)
        }
        for tree in (saved, state)
    )
    compared = 0
    for path, x in old.items():
        if "shared" not in path:
            continue
        name = words(path)[words(path).index("shared") + 1 :]
        others = [
            p
            for p in new
            if words(p)[-len(name) :] == name
            and not {"shared", "residual", "ema"} & {*words(p)}
        ]
        assert others
        for p in (path, *others):
            expected = np.broadcast_to(x.mean(0), new[p].shape)
            np.testing.assert_allclose(new[p], expected, atol=1e-6, err_msg=p)
            compared += 1
    assert compared >= 4


def test_equal_keys_are_copied(tmp_path):
    before, after = dj.Workers(2), dj.Workers(4)
    params, key = jnp.zeros(3), jax.random.split(jax.random.key(5))
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(1, *before.replicate((params, (), key)))
    tx = optax.identity()
    like = after.replicate(
        (params, tx.init(params), jax.random.split(jax.random.key(0)))
    )
    with (
        Checkpoints(tmp_path, after) as checkpoints,
        pytest.raises(ValueError, match="has another model or optimizer"),
    ):
        checkpoints.restore(*like, init=tx.init)
    like = (like[0], (), like[2])
    with Checkpoints(tmp_path, after) as checkpoints:
        found = checkpoints.restore(*like, init=lambda params: ())
    assert found is not None
    expected = np.broadcast_to(jax.random.key_data(key), (4, 2, 2))
    np.testing.assert_array_equal(jax.random.key_data(found.state[2]), expected)


def test_states_that_other_workers_cannot_take_over_are_refused(tmp_path):
    before, after, tx = dj.Workers(2), dj.Workers(4), optax.sgd(0.1, momentum=0.9)
    params = jnp.zeros(3)
    one = (params, tx.init(params), {"step": jnp.int32(0)})
    saved = before.replicate(one)
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(1, *saved[:2], {"step": jnp.arange(2)})
        with pytest.raises(ValueError, match="holds a checkpoint of step 1"):
            checkpoints.save(0, *saved)
    like = after.replicate(one)
    narrow = after.replicate((jnp.zeros(2), tx.init(jnp.zeros(2)), one[2]))
    half = after.replicate((params.astype(jnp.bfloat16), *one[1:]))
    with Checkpoints(tmp_path, after) as checkpoints:
        with pytest.raises(
            ValueError, match=r"different integers at state\[2\]\['step'"
        ):
            checkpoints.restore(*like, init=tx.init)
        with pytest.raises(ValueError, match=r"at state\[0\] it has shape \(3,\)"):
            checkpoints.restore(*narrow, init=tx.init)
        with pytest.raises(ValueError, match=r"at state\[0\] it has .*float32"):
            checkpoints.restore(*half, init=tx.init)
        with pytest.raises(ValueError, match="does not return optimizer states"):
            checkpoints.restore(*like, init=optax.identity().init)
        with pytest.raises(ValueError, match=r"pass init=tx\.init"):
            checkpoints.restore(like, init=tx.init)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, ONES), ValueError, "step must be at least 0"),
        ((1.5, ONES), TypeError, "step must be an integer"),
        ((ONES, ONES), TypeError, "step must be an integer"),
        ((1,), TypeError, "save needs a state"),
        ((1, ONES[:1]), ValueError, r"state must have the leading axes \(2,\)"),
        ((1, {"a": "word"}), TypeError, "state must hold arrays, got 'word'"),
    ],
)
def test_bad_arguments_of_save(tmp_path, arguments, error, message):
    workers = dj.Workers(2)
    with (
        Checkpoints(tmp_path, workers) as checkpoints,
        pytest.raises(error, match=message),
    ):
        checkpoints.save(*arguments)
    assert steps(tmp_path) == []


def test_bad_arguments(tmp_path):
    workers = dj.Workers(2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file: pass another path"):
        Checkpoints(tmp_path / "file", workers)
    with pytest.raises(ValueError, match="got the URL 'gs://bucket/run'"):
        Checkpoints("gs://bucket/run", workers)
    for keep, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="keep must be"):
            Checkpoints(tmp_path, workers, keep=keep)  # pyright: ignore
    with Checkpoints(tmp_path / "run", workers) as checkpoints:
        with pytest.raises(TypeError, match="restore needs a state"):
            checkpoints.restore()
        with pytest.raises(TypeError, match="data must hold JSON values"):
            checkpoints.save(1, ONES, data={"rng": object()})
    assert steps(tmp_path) == ["file"]


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_generators_as_data(tmp_path, bits):
    workers, rng = dj.Workers(2), np.random.Generator(bits(3))
    rng.normal(size=5)
    with Checkpoints(tmp_path, workers, keep=None) as checkpoints:
        checkpoints.save(np.int64(1), ONES, data=rng.bit_generator.state)
        found = checkpoints.restore(ONES)
    assert found is not None
    other = np.random.Generator(bits(4))
    other.bit_generator.state = found.data
    np.testing.assert_array_equal(other.normal(size=9), rng.normal(size=9))


def test_parts_by_name(tmp_path):
    workers = dj.Workers(2)
    with Checkpoints(tmp_path, workers) as checkpoints:
        checkpoints.save(1, ONES)
        found = checkpoints.restore(ONES)
        assert found is not None
        with pytest.raises(AttributeError, match=r"no params: use \.state"):
            _ = found.params
        checkpoints.save(2, {"params": ONES, "opt_state": {"m": ONES}})
        found = checkpoints.restore({"params": ONES, "opt_state": {"m": ONES}})
        assert found is not None
        assert_equal((found.params, found.opt_state["m"]), (ONES, ONES))


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install decentral_jax\[checkpoint\]"):
        Checkpoints(tmp_path, dj.Workers(1))


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import decentral_jax as dj
from decentral_jax.checkpoints import Checkpoints
jax.config.update("jax_platforms", "cpu")
dj.initialize(timeout=60)
tx = dj.def_sgd(0.1, dj.compression.random_block(2))
def start(n):
    params = jnp.zeros(3)
    rest = {"step": jnp.int32(3), "none": jnp.zeros(0), "stats": jnp.ones(2)}
    return dj.Workers(n), (params, tx.init(params), rest)
workers, state = start(8)
state = workers.replicate(state)
state[2]["key"] = workers.spmd(lambda i: jax.random.key(i))(
    workers.shard(np.arange(8, dtype=np.int32))
)
with Checkpoints(sys.argv[1], workers, keep=1) as saved:
    for step in (1, 2, 2):
        saved.save(step, *state)
    try:
        saved.save(1, *state)
    except ValueError as error:
        assert "which restore prefers" in str(error)
        print("refused")
after, like = start(4)
like = after.replicate(like)
like[2]["key"] = after.spmd(lambda i: jax.random.key(i))(
    after.shard(np.arange(4, dtype=np.int32))
)
with Checkpoints(sys.argv[1], after, keep=1) as saved:
    found = saved.restore(*like, init=tx.init)
    assert found.reset and found.step == 2
    saved.save(3, *found.state)
    again = saved.restore(*like)
    assert not again.reset and again.step == 3
rest = after.gather(again.state[2])
assert (rest["step"] == 3).all() and (rest["stats"] == 1).all()
assert rest["none"].shape == (4, 0) and len(np.unique(rest["key"], axis=0)) == 4
print("restored")
"""


def test_several_processes(tmp_path, monkeypatch, capfd):
    """All processes raise refusals and restore with another number of workers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(launch, "GRACE", 0.5)
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
    ended = launch.run(command, processes=2, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    lines = sorted(line for line in out.splitlines() if "re" in line)
    assert lines == [f"[{i}] {x}" for i in range(2) for x in ("refused", "restored")]
    assert steps(tmp_path) == ["3"]


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_and_started_again(tmp_path, monkeypatch, capfd, seed):
    """`kill -9` of a random process after a random step leaves the result unchanged."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(launch, "GRACE", 0.5)
    rng = np.random.default_rng(seed)
    name = KILLED[seed % len(KILLED)]
    # When an algorithm's turn comes again, use another number of processes.
    processes = PROCESSES[(seed + seed // len(KILLED)) % len(PROCESSES)]
    victim, at = rng.integers(processes), rng.integers(1, STEPS + 1)

    def run(folder, result, *killed):
        command = [sys.executable, str(HERE / "checkpointed.py"), name]
        command += [str(tmp_path / folder), str(tmp_path / result), *map(str, killed)]
        # Eight workers on the first eight devices: three processes hold 3, 3 and 2.
        devices = math.ceil(8 / processes)
        return launch.run(command, processes=processes, devices=devices)

    assert run("never", "never.npz") == 0
    assert run("killed", "killed.npz", victim, at) == 137
    assert not (tmp_path / "killed.npz").exists()
    capfd.readouterr()
    assert run("killed", "killed.npz") == 0
    out = capfd.readouterr().out
    # The first checkpoint is on disk before the second save begins.
    assert ("resumes after step" in out) or at <= 2 * SAVE_EVERY
    with np.load(tmp_path / "never.npz") as a, np.load(tmp_path / "killed.npz") as b:
        for key in ("bias", "kernel"):
            np.testing.assert_array_equal(a[key], b[key])
