"""States of the engine: model state, metrics, warm starts, checkpoints, and resumes."""

import functools
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import decentral_jax as dj
from decentral_jax import engine
from decentral_jax.checkpoints import Checkpoints
from tests.support.batches import endless, target

ROOT = Path(__file__).parent.parent.parent
RATE = 0.125
X = np.zeros(3, np.float32)
ONE = jax.devices()[:1]


def loss(x, batch):
    return jnp.sum((x - batch) ** 2) / 2, {"first": batch[0], "largest": batch.max()}


def loss_with_state(x, state, batch):
    value, metrics = loss(x, batch)
    return value, (track(state, batch), metrics)


def track(state, batch):
    """An exponential moving average, a counter, and a key."""
    return {
        "mean": 0.5 * state["mean"] + 0.5 * batch,
        "count": state["count"] + 1,
        "key": jax.random.split(state["key"])[0],
    }


def fresh():
    return {"mean": jnp.ones(3), "count": jnp.int32(0), "key": jax.random.key(0)}


# All arguments by name, so that tests replace any of them.
start = functools.partial(
    engine.run,
    gradient=jax.value_and_grad(loss, has_aux=True),
    params=X,
    batches=endless,
    optimizer=optax.sgd(RATE),
    has_aux=True,
    devices=ONE,
)
start_with_state = functools.partial(
    start, gradient=jax.value_and_grad(loss_with_state, has_aux=True)
)


def replayed(result, n):
    """Iterates, means, and counters of the master, from the trace."""
    xs, means, counts = [X], [np.ones(3, np.float32)], [0]
    for worker, index, delay in zip(
        result.trace.workers, result.batch_indices, result.trace.staleness, strict=True
    ):
        read, batch = len(xs) - 1 - delay, target(worker, index)
        xs.append(xs[-1] - RATE * (xs[read] - batch))
        new = 0.5 * means[read] + 0.5 * batch
        means.append((1 - 1 / n) * means[-1] + new / n)
        counts.append(counts[read] + 1)
    return xs, means, counts


def assert_replays(result, n):
    xs, means, counts = replayed(result, n)
    np.testing.assert_allclose(result.params, xs[-1], rtol=1e-5)
    np.testing.assert_allclose(result.model_state["mean"], means[-1], rtol=1e-5)
    assert result.model_state["count"] == counts[-1]
    # The gradients were evaluated at the stale iterates.
    for k, (worker, index) in enumerate(
        zip(result.trace.workers, result.batch_indices, strict=True)
    ):
        read, batch = xs[k - result.trace.staleness[k]], target(worker, index)
        value = ((read - batch) ** 2).sum() / 2
        np.testing.assert_allclose(
            result.metrics["loss"][k], value, rtol=1e-4, atol=1e-6
        )
        assert result.metrics["first"][k] == batch[0]
        assert result.metrics["largest"][k] == batch.max()
    for i in range(n):
        drawn = result.batch_indices[result.trace.workers == i]
        np.testing.assert_array_equal(drawn, np.arange(len(drawn)))


@pytest.mark.parametrize("n", [1, 4])
def test_model_state_and_metrics(n):
    pauses = [0.001, 0.001, 0.003, 0.01]
    seen = []
    result = start_with_state(
        batches=lambda i: endless(i, pauses[i]),
        model_state=fresh(),
        num_gradients=60,
        num_workers=n,
        devices=None,
        on_progress=seen.append,
    )
    assert_replays(result, n)
    xs, means, _ = replayed(result, n)
    for k, progress in enumerate(seen):
        np.testing.assert_allclose(progress.params, xs[k + 1], rtol=1e-5)
        np.testing.assert_allclose(
            progress.model_state["mean"], means[k + 1], rtol=1e-5
        )
        assert progress.metrics.keys() == {"loss", "first", "largest"}
        for name, value in progress.metrics.items():
            assert value == result.metrics[name][k]
    assert f"replaced, loss {result.metrics['loss'][-1]:.4g}" in str(seen[-1])
    # The key is that of a worker, split once per gradient.
    key = fresh()["key"]
    for _ in range(result.model_state["count"]):
        key = jax.random.split(key)[0]
    assert result.model_state["key"] == key


def test_synchronous_model_state_is_the_mean():
    result = start_with_state(
        model_state=fresh(), num_gradients=12, num_workers=3, synchronous=True
    )
    mean = np.ones(3)
    for k in range(4):
        mean = np.mean([0.5 * mean + 0.5 * target(i, k) for i in range(3)], 0)
    np.testing.assert_allclose(result.model_state["mean"], mean, rtol=1e-5)
    assert result.model_state["count"] == 4
    first = [target(i, k)[0] for k in range(4) for i in range(3)]
    np.testing.assert_array_equal(result.metrics["first"], first)


def test_metrics_without_model_state():
    result = start(num_gradients=9, num_workers=2)
    assert result.model_state is None
    expected = [
        target(worker, index)[0]
        for worker, index in zip(
            result.trace.workers, result.batch_indices, strict=True
        )
    ]
    np.testing.assert_array_equal(result.metrics["first"], expected)
    plain = engine.run(
        jax.grad(lambda x, b: loss(x, b)[0]),
        X,
        endless,
        optax.sgd(0.1),
        9,
        num_workers=2,
    )
    assert plain.metrics == {}


def test_an_empty_model_state():
    """Of a model without such variables."""
    result = engine.run(
        jax.value_and_grad(lambda x, s, b: (loss(x, b)[0], (s, {})), has_aux=True),
        X,
        endless,
        optax.sgd(RATE),
        9,
        num_workers=2,
        has_aux=True,
        model_state={},
    )
    assert result.model_state == {}
    assert result.metrics.keys() == {"loss"}


def test_a_model_state_that_is_not_finite_is_refused():
    def track_bad(x, state, batch):
        value, (state, metrics) = loss_with_state(x, state, batch)
        bad = jnp.where(batch[1] == 2 / 8, jnp.nan, 0.0)
        return value, ({**state, "mean": state["mean"] + bad}, metrics)

    result = start_with_state(
        gradient=jax.value_and_grad(track_bad, has_aux=True),
        model_state=fresh(),
        num_gradients=9,
        num_workers=1,
    )
    assert result.refused == 1
    np.testing.assert_array_equal(result.batch_indices, [0, 1, 3, 4, 5, 6, 7, 8, 9])
    assert np.isfinite(result.model_state["mean"]).all()
    assert result.model_state["count"] == 9


def aux(metrics):
    return jax.value_and_grad(lambda x, b: (loss(x, b)[0], metrics), has_aux=True)


def stateful(change):
    def changed(x, state, batch):
        value, (state, metrics) = loss_with_state(x, state, batch)
        return value, change(state, metrics)

    return jax.value_and_grad(changed, has_aux=True)


@pytest.mark.parametrize(
    ("gradient", "state", "message"),
    {
        "only a gradient": (
            jax.grad(lambda x, b: loss(x, b)[0]),
            None,
            r"must return \(\(loss, metrics\), grads\).*value_and_grad",
        ),
        "no loss": (jax.grad(loss, has_aux=True), None, r"\(\(loss, metrics\), grads"),
        "no dictionary": (aux(jnp.ones(2)), None, "metrics is a dictionary"),
        "the loss twice": (aux({"loss": 1.0}), None, "with the name 'loss'"),
        "a number as a name": (aux({3: jnp.ones(2)}), None, "metrics that map names"),
        "a key": (
            aux({"k": jax.random.key(0)}),
            None,
            "real numbers or arrays, got 'k",
        ),
        "a tree": (aux({"k": {"a": 1.0}}), None, "real numbers or arrays, got 'k"),
        "complex": (aux({"k": jnp.complex64(1)}), None, "real numbers or arrays"),
        "no state": (
            stateful(lambda state, metrics: metrics),
            fresh(),
            r"must return \(\(loss, \(model_state, metrics\)\), grads\)",
        ),
        "another state": (
            stateful(lambda state, metrics: (state["mean"], metrics)),
            fresh(),
            "the structure of model_state",
        ),
        "another dtype": (
            stateful(lambda state, metrics: ({**state, "count": 1.5}, metrics)),
            fresh(),
            "the shapes and dtypes of model_state",
        ),
        "no argument": (
            jax.value_and_grad(loss, has_aux=True),
            fresh(),
            "function of params, model_state, and a batch, .* TypeError",
        ),
    }.values(),
)
def test_bad_auxiliary_results(gradient, state, message):
    with pytest.raises(ValueError, match=message):
        start(gradient=gradient, num_gradients=5, num_workers=1, model_state=state)


def test_metrics_that_change_their_shape():
    def batches(worker):
        for size in (2, 2, 1):
            yield np.ones((size, 3), np.float32)

    with pytest.raises(ValueError, match=r"same names and shapes .*\(2,\).*\(1,\)"):
        start(
            gradient=jax.value_and_grad(
                lambda x, b: (loss(x, b)[0], {"m": b[:, 0]}), has_aux=True
            ),
            batches=batches,
            num_gradients=3,
            num_workers=1,
        )


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_warm_start_continues(momentum):
    optimizer = optax.sgd(RATE, momentum=momentum)
    run = functools.partial(
        start_with_state, optimizer=optimizer, num_workers=1, max_staleness=0
    )
    whole = run(model_state=fresh(), num_gradients=20)
    half = run(model_state=fresh(), num_gradients=10)
    rest = run(
        params=half.params,
        opt_state=half.opt_state,
        model_state=half.model_state,
        batches=lambda i: itertools.islice(endless(i), 10, None),
        num_gradients=10,
    )
    np.testing.assert_array_equal(rest.params, whole.params)
    np.testing.assert_array_equal(rest.model_state["mean"], whole.model_state["mean"])
    # The caller's state survives the master's donation.
    for leaf in jax.tree.leaves((half.opt_state, half.model_state, half.params)):
        assert not leaf.is_deleted()


BAD = {
    "opt_state of another optimizer": (
        {"opt_state": optax.adam(0.1).init(X)},
        ValueError,
        "opt_state must have the structure of optimizer.init",
    ),
    "opt_state of another model": (
        {"opt_state": optax.sgd(0.1, momentum=0.5).init(np.zeros(4, np.float32))},
        ValueError,
        r"opt_state must have the shapes .*float32\[3\].*float32\[4\]",
    ),
    "opt_state that is a function": (
        {"opt_state": optax.sgd},
        TypeError,
        "opt_state must hold arrays",
    ),
    "model_state": ({"model_state": {"a": "b"}}, TypeError, "model_state must hold"),
    "no aux": (
        {"model_state": fresh(), "has_aux": False},
        ValueError,
        "model_state needs has_aux=True",
    ),
    "period": ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at"),
    "a file": (
        {"checkpoints": __file__},
        NotADirectoryError,
        "checkpoints must be a folder: .*must be a directory",
    ),
    "a URL": (
        {"checkpoints": "gs://bucket"},
        ValueError,
        "checkpoints must be a folder: .*got the URL",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    arguments = {"optimizer": optax.sgd(0.1, momentum=0.5), "num_gradients": 5}
    with pytest.raises(error, match=message):
        start(num_workers=1, **(arguments | change))


class Interrupt:
    """Presses Ctrl-C when a number of gradients is applied."""

    def __init__(self, applied):
        self.applied = applied

    def __call__(self, progress):
        if progress.applied >= self.applied:
            raise KeyboardInterrupt


def interrupted(run, applied, **options):
    with pytest.raises(KeyboardInterrupt):
        run(on_progress=Interrupt(applied), **options)


@pytest.mark.parametrize("mode", [{"num_workers": 1}, {"num_workers": 3}])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, mode):
    """With one worker, or with synchronous workers."""
    run = functools.partial(
        start_with_state,
        optimizer=optax.sgd(RATE, momentum=0.5),
        model_state=fresh(),
        num_gradients=60,
        synchronous=mode["num_workers"] > 1,
        **mode,
    )
    whole = run()
    run = functools.partial(run, checkpoints=tmp_path, checkpoint_every=12)
    interrupted(run, 30)
    interrupted(run, 45)
    result = run(params=X + 7, on_progress=(seen := []).append)
    assert seen[0].applied == 36 + mode["num_workers"]
    np.testing.assert_array_equal(result.params, whole.params)
    for got, expected in zip(
        jax.tree.leaves((result.opt_state, result.model_state, result.metrics)),
        jax.tree.leaves((whole.opt_state, whole.model_state, whole.metrics)),
        strict=True,
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(*map(as_numbers, (got, expected)))
    np.testing.assert_array_equal(result.batch_indices, whole.batch_indices)
    np.testing.assert_array_equal(result.staleness_counts, whole.staleness_counts)
    assert result.seconds > seen[0].seconds


def as_numbers(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def test_a_resumed_asynchronous_run_replays(tmp_path):
    """The trace and the batches' indices are those of the whole run."""
    run = functools.partial(
        start_with_state,
        batches=lambda i: endless(i, [0.001, 0.002, 0.005][i]),
        model_state=fresh(),
        num_gradients=60,
        num_workers=3,
        checkpoints=tmp_path,
        checkpoint_every=10,
        devices=jax.devices()[2:4],
    )
    for applied in (17, 38):
        interrupted(run, applied)
    result = run()
    assert result.params.devices() == {jax.devices()[2]}
    assert len(result.trace) == 60
    assert_replays(result, 3)
    # All workers start from the same parameters again.
    assert result.trace.staleness[[0, 10, 30]].tolist() == [0, 0, 0]
    # `dj.asynchronous` repeats the run.
    tx = dj.asynchronous(optax.sgd(RATE), result.trace)
    drawn = zip(result.trace.workers, result.batch_indices, strict=True)
    given = np.zeros((3, 60, 3), np.float32)
    for k, (worker, index) in enumerate(drawn):
        given[worker, k] = target(worker, index)

    def worker(rows):
        def tick(carry, row):
            params, state = carry
            updates, state = tx.update(params - row, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.asarray(X)
        (params, state), _ = jax.lax.scan(tick, (params, tx.init(params)), rows)
        return dj.eval_params(state, params)

    found = jax.jit(jax.vmap(worker, axis_name="workers"))(given)
    np.testing.assert_allclose(found[0], result.params, rtol=1e-5)


def test_refused_batches_are_not_drawn_again(tmp_path):
    """Also if their worker has had no gradient applied before the checkpoint."""

    def batches(worker):
        if worker == 0:
            yield X + np.float32(np.nan)
            time.sleep(0.5)
        yield from endless(worker, 0.02)

    run = functools.partial(
        start, batches=batches, num_gradients=8, num_workers=2, checkpoints=tmp_path
    )
    interrupted(run, 5, checkpoint_every=4)
    assert run().refused == 1


def test_counts_and_ended_workers_survive(tmp_path):
    def batches(worker):
        for index in range(3 if worker == 1 else 100):
            if worker == 0 and index == 4 and not failed:
                failed.append(index)
                raise OSError("no disk")
            bad = np.float32(np.nan if (worker, index) == (0, 6) else 0)
            # Worker 1 uses all its batches before the first checkpoint.
            time.sleep(0 if worker == 1 else 0.02)
            yield target(worker, index) + bad

    failed = []
    run = functools.partial(
        start,
        batches=batches,
        num_gradients=30,
        num_workers=2,
        checkpoints=tmp_path,
        checkpoint_every=15,
    )
    interrupted(run, 17)
    result = run()
    assert failed == [4]
    assert result.refused == 1
    assert [worker for worker, _ in result.replaced] == [0]
    used = result.batch_indices[result.trace.workers == 0]
    np.testing.assert_array_equal(used, [*range(6), *range(7, 28)])
    assert result.batch_indices[result.trace.workers == 1].tolist() == [0, 1, 2]


def test_a_finished_run(tmp_path):
    run = functools.partial(start, num_workers=2, checkpoints=tmp_path)
    first = run(num_gradients=10)

    def batches(worker):
        raise AssertionError("nothing is left to do")

    again = run(num_gradients=10, batches=batches)
    np.testing.assert_array_equal(again.params, first.params)
    np.testing.assert_array_equal(again.metrics["loss"], first.metrics["loss"])
    np.testing.assert_array_equal(again.trace.workers, first.trace.workers)
    assert again.seconds == first.seconds
    longer = run(num_gradients=15)
    np.testing.assert_array_equal(longer.trace.workers[:10], first.trace.workers)
    with pytest.raises(
        ValueError, match=r"num_gradients must be at least 15, .*got 10"
    ):
        run(num_gradients=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 3}, "num_workers must be 2, .* got 3"),
        ({"synchronous": True}, "synchronous must be False, .* got True"),
        ({"optimizer": optax.adam(0.1)}, "has another model or optimizer"),
        ({"params": np.zeros(4, np.float32)}, "has another model or optimizer"),
    ],
)
def test_checkpoints_of_another_run(tmp_path, change, message):
    options = {"num_workers": 2, "checkpoints": tmp_path, "num_gradients": 10}
    start(**options)
    before = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    with pytest.raises(ValueError, match=message):
        start(**(options | change))
    assert before.keys() == set(tmp_path.rglob("*"))


def test_other_metrics_than_in_the_checkpoint(tmp_path):
    run = functools.partial(start, num_workers=1, checkpoints=tmp_path)
    run(num_gradients=5)
    with pytest.raises(ValueError, match="metrics of the same names and shapes"):
        run(gradient=aux({}), num_gradients=10)


@pytest.mark.parametrize("data", [None, {"epoch": 1}])
def test_checkpoints_of_lock_step_training(tmp_path, data):
    workers = dj.Workers(1, devices=ONE)
    params = workers.replicate(jnp.zeros(3))
    with Checkpoints(tmp_path, workers) as checkpoints:
        opt_state = workers.replicate(optax.sgd(RATE).init(X))
        checkpoints.save(3, params, opt_state, (), data=data)
    with pytest.raises(ValueError, match=r"that engine\.run has not written"):
        start(num_workers=1, num_gradients=5, checkpoints=tmp_path)


def test_batches_that_are_not_returned_again(tmp_path):
    """A resumed run does not train on other data silently."""
    run = functools.partial(start, num_workers=1, checkpoints=tmp_path, max_failures=0)
    run(num_gradients=5)
    with pytest.raises(RuntimeError, match="worker 0 failed") as caught:
        run(batches=lambda i: itertools.islice(endless(i), 3), num_gradients=9)
    assert "but 5 had been drawn" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match=r"num_gradients=9 .* after 5 were"):
        run(batches=lambda i: itertools.islice(endless(i), 5), num_gradients=9)


PROGRAM = """
import sys, time
import test_state as state

def on_progress(progress):
    print(progress.applied, flush=True)

state.start_with_state(
    batches=lambda worker: state.endless(worker, 0.02),
    model_state=state.fresh(), num_gradients=int(sys.argv[2]), num_workers=2,
    checkpoints=sys.argv[1], checkpoint_every=10, on_progress=on_progress,
)
"""


def test_killed_and_resumed(tmp_path):
    """`kill -9` between checkpoints, or while one is written."""
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "1000000"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        for line in process.stdout:
            applied = int(line)
            if applied == 37:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    seen = []
    result = start_with_state(
        model_state=fresh(),
        num_gradients=applied + 20,
        num_workers=2,
        checkpoints=tmp_path,
        on_progress=seen.append,
    )
    assert (seen[0].applied - 1) in (10, 20, 30)
    assert_replays(result, 2)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))[:, 0]


def regression(worker):
    rng = np.random.default_rng(worker)
    while True:
        x = rng.normal(size=(16, 3)).astype(np.float32) + 1
        yield x, x.sum(-1)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("n", [1, 3])
def test_nnx(tmp_path, n):
    """An nnx model and its optimizer go in and come out, also after a resume."""

    def objects():
        model = Net(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)

    def mean_square(model, batch):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    model, optimizer = objects()
    graphdef, params, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))

    def loss_fn(params, rest, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        value = mean_square(model, batch)
        return value, (nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))), {})

    run = functools.partial(
        engine.run,
        jax.value_and_grad(loss_fn, has_aux=True),
        params,
        regression,
        optimizer.tx,
        150,
        num_workers=n,
        has_aux=True,
        model_state=rest,
        opt_state=nnx.as_pure(optimizer.opt_state),
        checkpoints=tmp_path,
        checkpoint_every=40,
        devices=ONE,
    )
    interrupted(run, 90)
    result = run()
    nnx.update(model, result.params, result.model_state)
    nnx.update(optimizer.opt_state, nnx.state(result.opt_state))
    assert optimizer.opt_state[0].count[...] == 150
    assert result.metrics["loss"][-10:].mean() < 0.3 * result.metrics["loss"][:3].mean()
    # The batch statistics serve for evaluation.
    model.eval()
    assert mean_square(model, next(regression(99))) < 1
    model.train()
    if n > 1:
        return
    # One worker trains as an ordinary nnx loop does.
    plain, optimizer = objects()

    @nnx.jit
    def step(model, optimizer, batch):
        _, grads = nnx.value_and_grad(mean_square)(model, batch)
        optimizer.update(model, grads)

    for batch in itertools.islice(regression(0), 150):
        step(plain, optimizer, batch)
    for got, expected in zip(
        jax.tree.leaves(nnx.state(model)),
        jax.tree.leaves(nnx.state(plain)),
        strict=True,
    ):
        got, expected = map(as_numbers, (got, expected))
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_linen():
    """A train state goes in and comes out."""

    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(
                nn.Dense(8)(x)
            )
            return nn.Dense(1)(nn.relu(x))[:, 0]

    class State(TrainState):
        batch_stats: dict

    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)), train=False)
    state = State.create(apply_fn=net.apply, tx=optax.adam(0.03), **variables)

    def loss_fn(params, batch_stats, batch):
        y, new = net.apply(
            {"params": params, "batch_stats": batch_stats},
            batch[0],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((y - batch[1]) ** 2), (new["batch_stats"], {})

    losses = []
    for _ in range(2):
        result = engine.run(
            jax.value_and_grad(loss_fn, has_aux=True),
            state.params,
            regression,
            state.tx,
            60,
            num_workers=2,
            has_aux=True,
            model_state=state.batch_stats,
            opt_state=state.opt_state,
        )
        state = state.replace(
            step=state.step + 60,
            params=result.params,
            opt_state=result.opt_state,
            batch_stats=result.model_state,
        )
        losses.append(result.metrics["loss"].mean())
    assert state.opt_state[0].count == 120
    assert losses[1] < 0.5 * losses[0]


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install decentral_jax\[checkpoint\]"):
        start(num_workers=1, num_gradients=5, checkpoints=tmp_path)


def test_half_precision_metrics(tmp_path):
    run = functools.partial(
        start,
        gradient=jax.value_and_grad(
            lambda x, b: (
                loss(x, b)[0],
                {"half": b.astype(jnp.bfloat16), "yes": b > 0},
            ),
            has_aux=True,
        ),
        num_workers=1,
        num_gradients=5,
        checkpoints=tmp_path,
    )
    first, again = run(), run()
    for result in (first, again):
        expected = np.stack([target(0, i) for i in range(5)])
        assert result.metrics["half"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            result.metrics["half"], expected.astype("bfloat16")
        )
        np.testing.assert_array_equal(result.metrics["yes"], expected > 0)
        assert result.metrics["yes"].dtype == bool


def test_progress_line_with_a_loss():
    stream = io.StringIO()
    metrics = {"loss": np.float32(0.5), "other": 3}
    progress = engine.Progress(4, 4, 1.0, 2, 1, 0, X, metrics=metrics)
    engine.progress_line(stream)(progress)
    assert stream.getvalue().endswith("1 refused, 0 replaced, loss 0.5\n")
