"""The engine applies each gradient once, survives failing workers, and never hangs."""

import functools
import io
import itertools
import logging
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decentral_jax as dj
from decentral_jax import engine
from decentral_jax.engine._master import Master
from decentral_jax.engine._programs import Gradients
from tests.support.batches import endless, target
from tests.support.layouts import compilations

RATE = 0.125
X = np.zeros(3, np.float32)


def quadratic(x, batch):
    return jax.grad(lambda x: jnp.sum((x - batch) ** 2) / 2)(x)


class Source:
    """Batches that continue after an error, unlike a generator."""

    def __init__(self, worker, batch=target, fails=lambda index: False, seconds=0.0):
        self.worker, self.batch, self.fails = worker, batch, fails
        self.seconds = seconds
        self.index = self.draws = 0

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.seconds)
        self.draws += 1
        if self.fails(self.draws):
            raise OSError(f"no disk at draw {self.draws}")
        self.index += 1
        return self.batch(self.worker, self.index - 1)


ONE = jax.devices()[:1]
# On one device, most runs share one compilation.
start = functools.partial(
    engine.run, quadratic, X, optimizer=optax.sgd(RATE), devices=ONE
)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("decentral_jax")]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert not threads()


def replayed(result, batch=target, rate=RATE):
    """Replays the trace and the batch indices; returns the last iterate."""
    iterates = [X]
    for k, (worker, index) in enumerate(
        zip(result.trace.workers, result.batch_indices, strict=True)
    ):
        stale = iterates[k - result.trace.staleness[k]]
        iterates.append(iterates[-1] - rate * (stale - batch(worker, index)))
    return iterates[-1]


@pytest.mark.parametrize("bound", [None, 3, 5])
def test_replay(bound):
    pauses = [0.001, 0.001, 0.003, 0.01]
    seen = []
    result = start(
        batches=lambda i: endless(i, pauses[i]),
        num_gradients=60,
        num_workers=4,
        max_staleness=bound,
        devices=None,
        on_progress=seen.append,
    )
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)
    assert [progress[:2] for progress in seen] == [(k, 60) for k in range(1, 61)]
    staleness = [progress.staleness for progress in seen]
    np.testing.assert_array_equal(staleness, result.trace.staleness)
    assert 0 < seen[0].seconds < seen[-1].seconds <= result.seconds
    first = -RATE * (X - target(result.trace.workers[0], 0))
    np.testing.assert_allclose(seen[0].params, first, rtol=1e-5)
    np.testing.assert_array_equal(seen[-1].params, result.params)
    largest = result.trace.staleness.max()
    assert largest >= 3
    if bound is not None:
        assert largest <= bound
    counts = np.bincount(result.trace.staleness)
    np.testing.assert_array_equal(result.staleness_counts, counts)
    for i in range(4):
        drawn = result.batch_indices[result.trace.workers == i]
        np.testing.assert_array_equal(drawn, np.arange(len(drawn)))
    assert result.params.devices() == {jax.devices()[0]}
    assert result.gradients_per_second == pytest.approx(60 / result.seconds)
    assert 0 < result.master_seconds < result.seconds


def test_the_bound_holds_fast_workers_back():
    """With a bound, workers take turns; without one, slow workers fall far behind."""
    run = functools.partial(
        start,
        batches=lambda i: endless(i, 0.04 * (i >= 2)),
        num_gradients=60,
        num_workers=4,
        timeout=5,
    )
    free = np.bincount(run().trace.workers, minlength=4)
    bounded = run(max_staleness=3)
    assert free[2:].max() < 10
    np.testing.assert_array_equal(np.bincount(bounded.trace.workers), [15] * 4)
    assert bounded.trace.staleness.max() == 3


def test_the_bound_with_equally_old_parameters():
    """Two slow workers hold the same parameters: the bound reserves a step for each."""

    def slowly(batch):
        time.sleep(0.1 if np.asarray(batch)[0] >= 2 / 8 else 0)
        return batch

    def gradient(x, batch):
        shape = jax.ShapeDtypeStruct(batch.shape, batch.dtype)
        return x - jax.pure_callback(slowly, shape, batch)

    result = engine.run(
        gradient,
        X,
        endless,
        optax.sgd(RATE),
        12,
        num_workers=4,
        max_staleness=3,
        timeout=5,
    )
    assert result.trace.staleness.max() == 3
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)


def test_fast_workers_do_not_wait():
    result = start(
        batches=lambda i: endless(i, 0.06 if i == 3 else 0.02),
        num_gradients=60,
        num_workers=4,
    )
    *fast, slow = np.bincount(result.trace.workers, minlength=4)
    assert slow < 0.7 * min(fast)


def test_synchronous_is_the_mean():
    result = start(batches=endless, num_gradients=14, num_workers=4, synchronous=True)
    x = X
    for k in range(4):
        arrived = 2 if k == 3 else 4
        chosen = 4 * k + np.arange(arrived)
        indices = result.batch_indices[chosen]
        np.testing.assert_array_equal(indices, k)
        if k == 3:  # the last round takes the two gradients that arrive first
            break
        x = x - RATE * (x - np.mean([target(i, k) for i in range(4)], 0))
    ends = [
        x - RATE * (x - np.mean([target(i, 3), target(j, 3)], 0))
        for i, j in itertools.combinations(range(4), 2)
    ]
    assert any(np.allclose(result.params, end, rtol=1e-5) for end in ends)
    assert result.trace is None
    np.testing.assert_array_equal(result.staleness_counts, [14])


def test_synchronous_with_refused_and_failed_gradients():
    """Another gradient replaces a refused or failed one within its round."""

    def batch(worker, index):
        # The second draw of worker 1 fails, so its index is one behind its draws.
        return target(worker, index) if (worker, index) != (0, 1) else X + np.nan

    sources = [
        Source(i, batch, fails=lambda draw, i=i: (i, draw) == (1, 2)) for i in range(3)
    ]
    result = start(
        batches=sources.__getitem__, num_gradients=12, num_workers=3, synchronous=True
    )
    indices = np.array([[0, 0, 0], [2, 1, 1], [3, 2, 2], [4, 3, 3]])
    np.testing.assert_array_equal(result.batch_indices.reshape(4, 3), indices)
    x = X
    for row in indices:
        x = x - RATE * (x - np.mean([target(i, row[i]) for i in range(3)], 0))
    np.testing.assert_allclose(result.params, x, rtol=1e-5)
    assert (result.refused, result.replaced) == (1, [(1, 3)])


def one_hot(worker, index):
    return np.eye(400, dtype=np.float32)[100 * worker + index]


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_worker(seed, caplog):
    """Each gradient adds to one entry: all are applied once, and none is lost."""
    rng = np.random.default_rng(seed)
    victim, draw = rng.integers(4), rng.integers(1, 10)
    pauses = rng.uniform(0, 0.002, 4)
    sources = [
        Source(i, one_hot, lambda d, i=i: (i, d) == (victim, draw), pauses[i])
        for i in range(4)
    ]
    result = engine.run(
        lambda x, batch: batch,
        np.zeros(400, np.float32),
        sources.__getitem__,
        optax.sgd(1.0),
        90,  # enough for the victim to reach its failing draw
        num_workers=4,
        max_staleness=6,
        devices=ONE,
    )
    assert [worker for worker, _ in result.replaced] == [victim]
    assert f"worker {victim} failed" in caplog.text
    assert "no disk" in caplog.text
    expected = np.zeros(400)
    expected[100 * result.trace.workers + result.batch_indices] = -1
    assert expected.sum() == -90
    np.testing.assert_array_equal(result.params, expected)
    assert result.trace.staleness.max() <= 6


def test_a_failing_gradient():
    """A failing worker loses its batch and continues with the next one."""
    broken = []

    def check(batch):
        if tuple(np.asarray(batch)[:2]) == (1 / 8, 2 / 8) and not broken:
            broken.append(batch)
            raise OSError("a bad cable")
        return batch

    def gradient(x, batch):
        shape = jax.ShapeDtypeStruct(batch.shape, batch.dtype)
        return x - jax.pure_callback(check, shape, batch)

    result = engine.run(
        gradient, X, endless, optax.sgd(RATE), 40, num_workers=2, max_staleness=2
    )
    assert [worker for worker, _ in result.replaced] == [1]
    used = result.batch_indices[result.trace.workers == 1]
    np.testing.assert_array_equal(used[:4], [0, 1, 3, 4])
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)


def test_a_worker_fails_too_often():
    sources = [Source(i, fails=lambda draw, i=i: i == 1 and draw > 3) for i in range(2)]
    message = "worker 1 failed with OSError after max_failures=3"
    with pytest.raises(RuntimeError, match=message) as caught:
        start(
            batches=sources.__getitem__,
            num_gradients=10**6,
            num_workers=2,
            max_failures=3,
        )
    assert str(caught.value.__cause__) == "no disk at draw 7"


def test_a_worker_fails_at_the_first_batch():
    sources = [Source(i, fails=lambda draw: draw == 1) for i in range(2)]
    result = start(batches=sources.__getitem__, num_gradients=9, num_workers=2)
    assert sorted(result.replaced) == [(0, 0), (1, 0)]
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)


def test_the_bound_ignores_a_restarting_worker():
    """It holds no parameters that could become stale, so the others continue."""

    class Slow(Source):
        def __next__(self):
            if self.worker == 1 and self.draws == 3:
                time.sleep(0.5)
            return super().__next__()

    sources = [Slow(0, seconds=0.002), Slow(1, fails=lambda draw: draw == 3)]
    result = start(
        batches=sources.__getitem__, num_gradients=60, num_workers=2, max_staleness=1
    )
    assert (np.bincount(result.trace.workers) > [40, 0]).all()


def test_an_exiting_worker():
    """SystemExit in a worker's thread counts as a failure."""

    def batches(worker):
        yield target(worker, 0)
        raise SystemExit

    with pytest.raises(RuntimeError, match="failed with SystemExit after max_failures"):
        start(batches=batches, num_gradients=9, num_workers=2)


@pytest.mark.parametrize("draw", [0, 3])
@pytest.mark.parametrize("wrap", [iter, functools.partial(map, np.copy)])
def test_a_generator_that_raises(draw, wrap):
    """The engine recreates it and retries the failed batch: none is lost."""
    raised = []

    def batches(worker):
        for index in range(20):
            if worker == 1 and index == draw and len(raised) < 2:
                raised.append(index)
                raise OSError("no disk")
            yield target(worker, index)

    result = start(
        batches=lambda worker: wrap(batches(worker)),
        num_gradients=40,
        num_workers=2,
    )
    assert [worker for worker, _ in result.replaced] == [1, 1]
    for worker in range(2):
        drawn = result.batch_indices[result.trace.workers == worker]
        np.testing.assert_array_equal(drawn, np.arange(20))
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)


def test_a_generator_that_cannot_be_recreated():
    """A generator that raised is an error, not the end of the data."""

    def batches(worker):
        yield target(worker, 0)
        raise OSError("no disk")

    generators = [batches(0), endless(1, 0.001)]
    with pytest.raises(RuntimeError, match="worker 0 failed") as caught:
        start(
            batches=generators.__getitem__,
            num_gradients=2000,
            num_workers=2,
            max_failures=2,
        )
    assert "return a new iterator" in str(caught.value.__cause__)


def test_recreated_batches_that_are_shorter():
    calls = []

    def batches(worker):
        calls.append(worker)
        if len(calls) > 1:
            return
        for index in range(3):
            yield target(worker, index)
        raise OSError("no disk")

    with pytest.raises(RuntimeError, match="worker 0 failed") as caught:
        start(batches=batches, num_gradients=10, num_workers=1)
    assert "but 3 had been drawn" in str(caught.value.__cause__)


def test_an_end_after_an_error_is_an_end():
    """An iterator that continued after an error may end without another failure."""

    class Short(Source):
        def __next__(self):
            if self.index == 5:
                raise StopIteration
            return super().__next__()

    sources = [Short(0, fails=lambda draw: draw == 2), Source(1)]
    result = start(batches=sources.__getitem__, num_gradients=60, num_workers=2)
    assert [worker for worker, _ in result.replaced] == [0]
    assert np.bincount(result.trace.workers)[0] == 5


def test_gradients_that_are_not_finite(caplog):
    def batch(worker, index):
        bad = {0: np.nan, 1: np.inf}.get(index % 4, 0)
        return target(worker, index) + np.array([0, 0, bad], np.float32)

    result = start(batches=lambda i: Source(i, batch), num_gradients=40, num_workers=2)
    assert (result.batch_indices % 4 >= 2).all()
    assert result.refused >= 38
    assert "not finite" in caplog.text
    np.testing.assert_allclose(result.params, replayed(result, batch), rtol=1e-5)


def test_too_many_gradients_that_are_not_finite():
    def batch(worker, index):
        return target(worker, index) + np.float32(0 if index < 3 else np.nan)

    with pytest.raises(FloatingPointError, match=r"max_refused=5 .* 6 were applied"):
        start(
            batches=lambda i: Source(i, batch),
            num_gradients=40,
            num_workers=2,
            max_refused=5,
        )


def test_refused_gradients_are_counted_in_a_row():
    def batch(worker, index):
        return target(worker, index) + np.float32(0 if index % 2 else np.nan)

    result = start(
        batches=lambda i: Source(i, batch),
        num_gradients=20,
        num_workers=1,
        max_refused=1,
    )
    assert result.refused == 20


def test_batches_end():
    def batches(lengths, worker):
        return itertools.islice(endless(worker, 0.002), lengths[worker])

    for mode in ({}, {"synchronous": True}, {"max_staleness": 2}):
        run = functools.partial(start, num_workers=3, **mode)
        result = run(batches=functools.partial(batches, [5, 2, 90]), num_gradients=50)
        assert len(result.batch_indices) == 50
        assert result.batch_indices.max() >= 42
        with pytest.raises(ValueError, match=r"num_gradients=50 .* after 14 were"):
            run(batches=functools.partial(batches, [5, 2, 7]), num_gradients=50)
        with pytest.raises(ValueError, match=r"batches\(1\) must .* worker 1, got no"):
            run(batches=functools.partial(batches, [5, 0, 7]), num_gradients=50)


def loss(x, batch):
    return jnp.sum((x - batch) ** 2)


@pytest.mark.parametrize(
    ("gradient", "message"),
    {
        "a loss": (loss, r"structure|shapes.*\[3\].*got.*jax\.grad"),
        "value and gradient": (jax.value_and_grad(loss), "structure of params"),
        "a loss with more outputs": (
            jax.grad(lambda x, batch: (loss(x, batch), x), has_aux=True),
            "structure of params",
        ),
        "a vector of losses": (
            jax.grad(lambda x, batch: (x - batch) ** 2),
            "TypeError: Gradient only defined for scalar.*jax.grad",
        ),
        "half precision": (
            lambda x, batch: x.astype(jnp.float16),
            r"float32\[3\].*float16\[3\]",
        ),
        "no batch": (lambda x: x, "TypeError: .*positional argument"),
        "a mistake": (lambda x, batch: x @ jnp.ones(4), "worker 0 it raised TypeError"),
    }.values(),
)
def test_invalid_gradient_functions(gradient, message):
    with pytest.raises(ValueError, match=message):
        engine.run(gradient, X, endless, optax.sgd(0.1), 5, num_workers=1)


BAD = {
    "gradient": ({"gradient": 3}, TypeError, "gradient must be a function, got 3"),
    "batches": ({"batches": [X]}, TypeError, "batches must be a function"),
    "optimizer": ({"optimizer": optax.sgd}, TypeError, "optimizer must be an optax"),
    "integers": ({"params": np.zeros(3, int)}, TypeError, "params must hold floating"),
    "no params": ({"params": {}}, ValueError, "params must hold at least one array"),
    "no gradients": ({"num_gradients": 0}, ValueError, "num_gradients must be at"),
    "no workers": ({"num_workers": 0}, ValueError, "num_workers must be at least 1"),
    "bound": (
        {"max_staleness": 2},
        ValueError,
        "max_staleness must be at least num_workers - 1 = 3, got 2",
    ),
    "no devices": ({"devices": []}, ValueError, "devices must hold at least one"),
    "timeout": ({"timeout": np.inf}, ValueError, r"timeout must lie in \(0"),
    "failures": ({"max_failures": -1}, ValueError, "max_failures must be at least 0"),
    "refused": ({"max_refused": 0.5}, TypeError, "max_refused must be an integer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    arguments = {
        "gradient": quadratic,
        "params": X,
        "batches": endless,
        "optimizer": optax.sgd(0.1),
        "num_gradients": 5,
        "num_workers": 4,
    }
    with pytest.raises(error, match=message):
        engine.run(**(arguments | change))


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("mode", [{"synchronous": True}, {"max_staleness": 3}])
def test_a_hanging_worker(draws, mode, caplog):
    """The error names it, and the engine joins the other threads."""
    wake = threading.Event()

    def batches(worker):
        for index in itertools.count():
            if worker == 1 and index == draws:
                wake.wait()
            yield target(worker, index)

    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"timeout=0.3 .* workers \[1\]"):
        start(batches=batches, num_gradients=10**6, num_workers=4, timeout=0.3, **mode)
    assert time.monotonic() - begin < 10
    assert [thread.name for thread in threads()] == ["decentral_jax worker 1"]
    assert "threads still running: decentral_jax worker 1" in caplog.text
    wake.set()
    for thread in threads():
        thread.join(5)


def test_interrupt():
    """Ctrl-C interrupts the waiting master."""
    main, wake = threading.main_thread().ident, threading.Event()
    timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))

    def batches(worker):
        yield target(worker, 0)
        timer.start()
        wake.wait(30)
        yield target(worker, 1)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        start(batches=batches, num_gradients=2, num_workers=1)
    assert time.monotonic() - begin < 10
    wake.set()
    for thread in threads():
        thread.join(5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_does_not_wait_for_busy_workers(error):
    """The caller receives it within about a second, regardless of the timeout."""
    wake = threading.Event()

    def batches(worker):
        yield target(worker, 0)
        while worker == 0 or wake.wait(30):
            yield target(worker, 1)

    def on_progress(progress):
        if progress.applied == 5:
            began.append(time.monotonic())
            raise error

    began = []
    with pytest.raises(error):
        start(
            batches=batches, num_gradients=10**6, num_workers=2, on_progress=on_progress
        )
    assert time.monotonic() - began[0] < 3
    wake.set()
    for thread in threads():
        thread.join(5)


def test_busy_workers_are_joined():
    start(batches=lambda i: endless(i, 0.3 * i), num_gradients=5, num_workers=2)
    assert not threads()


def test_devices(monkeypatch):
    """Worker i computes on device i modulo the number of devices."""
    seen = set()
    on = Gradients.on

    def spy(self, device):
        gradient = on(self, device)

        def seeing(model, batch):
            (worker,) = {int(8 * batch[0])}
            for leaf in (model.params, batch):
                seen.add((worker, *leaf.devices()))
            return gradient(model, batch)

        return seeing

    monkeypatch.setattr(Gradients, "on", spy)
    devices = jax.devices()[2:5]
    result = start(batches=endless, num_gradients=40, num_workers=4, devices=devices)
    assert seen == {(i, devices[i % 3]) for i in range(4)}
    assert result.params.devices() == {devices[0]}
    np.testing.assert_allclose(result.params, replayed(result), rtol=1e-5)


@pytest.mark.parametrize("synchronous", [False, True])
def test_nothing_is_compiled_while_the_clock_runs(monkeypatch, synchronous):
    train, compiled = Master.train, []

    def spy(self):
        with compilations() as count:
            result = train(self)
        compiled.append(len(count))
        return result

    monkeypatch.setattr(Master, "train", spy)
    for optimizer in (optax.sgd(RATE), optax.sgd(RATE, momentum=0.5)):
        start(
            batches=endless,
            optimizer=optimizer,
            num_gradients=20,
            num_workers=2,
            synchronous=synchronous,
        )
    assert compiled == [0, 0]


def keeping():
    """A transformation whose state holds the parameters themselves, twice."""

    def init(params):
        return params, params

    def update(updates, state, params=None):
        return updates, (params, state[0])

    return optax.GradientTransformation(init, update)


def test_kept_parameters_survive_donation():
    """Donating the state deletes no parameters of the caller or of a busy worker."""
    params = {"x": jnp.zeros(3)}
    result = engine.run(
        lambda params, batch: {"x": quadratic(params["x"], batch)},
        params,
        lambda i: endless(i, 0.01 * i),
        optax.chain(keeping(), optax.sgd(RATE)),
        40,
        num_workers=3,
        devices=ONE,
    )
    np.testing.assert_array_equal(params["x"], 0)
    np.testing.assert_allclose(result.params["x"], replayed(result), rtol=1e-5)
    assert not any(x.is_deleted() for x in jax.tree.leaves(result.opt_state))


def test_gradients_that_are_the_parameters():
    """Arrays that a program returns unchanged are not donated."""
    result = engine.run(
        lambda x, batch: x, jnp.ones(3), endless, optax.sgd(0.5), 9, num_workers=3
    )
    assert np.isfinite(result.params).all()


@pytest.mark.usefixtures("standard_promotion")
def test_any_optimizer():
    result = start(
        batches=endless,
        optimizer=optax.amsgrad(0.01),
        num_gradients=30,
        num_workers=3,
    )
    assert int(optax.tree_utils.tree_get(result.opt_state, "count")) == 30


@pytest.mark.usefixtures("x64")
def test_double_precision():
    """The caller's precision setting applies in the workers' threads."""

    def batches(worker):
        while True:
            yield np.full(3, 1 + 1e-12)

    result = engine.run(
        lambda x, batch: batch, np.zeros(3), batches, optax.sgd(1.0), 4, num_workers=2
    )
    assert result.params.dtype == np.float64
    np.testing.assert_allclose(result.params, -4 - 4e-12, rtol=1e-15)


def test_numbers_and_other_shapes():
    """Parameters may be plain numbers, and batches may change their shape."""

    def batches(worker):
        for size in itertools.cycle([2, 2, 1]):
            yield {"x": np.full(size, 3.0, np.float32), "count": size}

    result = engine.run(
        jax.grad(lambda x, batch: ((x - batch["x"]) ** 2).sum() / batch["count"] / 2),
        0.0,
        batches,
        optax.sgd(0.5),
        30,
        num_workers=2,
        max_staleness=1,
    )
    np.testing.assert_allclose(result.params, 3, rtol=1e-3)
    assert not result.replaced


def test_random_keys():
    """Batches and the optimizer's state may hold typed keys."""

    def init(params):
        return jax.random.key(0)

    def update(updates, state, params=None):
        return updates, jax.random.split(state)[0]

    result = engine.run(
        lambda x, key: x - jax.random.normal(key, (3,)),
        X,
        lambda worker: (jax.random.key(i) for i in itertools.count(worker)),
        optax.chain(optax.GradientTransformation(init, update), optax.sgd(RATE)),
        9,
        num_workers=2,
    )
    assert np.isfinite(result.params).all()


def test_actors_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install decentral_jax\[ray\]"):
        start(batches=endless, num_gradients=9, num_workers=1, actors={})


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_line(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    show = engine.progress_line(stream, every=0.5)
    for applied, seconds in ((1, 0.1), (2, 0.4), (3, 0.6), (4, 1.0)):
        show(engine.Progress(applied, 4, seconds, 2, 1, 0, X))
    last = "4 of 4 gradients, 4.0 per second, staleness 2, 1 refused, 0 replaced"
    *others, end = stream.getvalue().split(last)
    if terminal:
        assert end == "\x1b[K\n"
        assert [line.split()[0] for line in others[0].split("\r")[1:-1]] == ["1", "3"]
    else:
        assert (others, end) == ([""], "\n")


def test_trace_can_be_saved(tmp_path):
    result = start(batches=endless, num_gradients=12, num_workers=3)
    result.trace.save(tmp_path / "trace.npz")
    loaded = dj.traces.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(loaded.workers, result.trace.workers)
    assert loaded.num_workers == 3


def test_failures_are_warnings(caplog):
    sources = [Source(i, fails=lambda draw: draw == 4) for i in range(1)]
    start(batches=sources.__getitem__, num_gradients=9, num_workers=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
