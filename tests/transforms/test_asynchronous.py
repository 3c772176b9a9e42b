"""Replayed asynchronous training equals a plain master that stores all iterates."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax import engine
from decentral_jax._exchange.axis import WorkerAxis
from tests.reference import asynchronous
from tests.support.layouts import LAYOUTS

D, TICKS = 4, 40
# Convert START to a list before jnp.asarray: JAX 0.12 caches the float32 version of a
# NumPy array, even if float64 is enabled later.
START = np.array([0.3, -0.2, 0.5, 0.1])
TRACES = {
    "in turn": dj.traces.round_robin(4, TICKS),
    "one worker": dj.traces.round_robin(1, TICKS),
    "speeds": dj.traces.from_speeds([1, 2, 2.5, 7], TICKS, jitter=0.3, seed=1),
    "delayed": dj.traces.uniform_delay(6, TICKS, seed=2),
    "delayed, 3 workers": dj.traces.uniform_delay(5, TICKS, num_workers=3, seed=3),
    # Workers that start late or never send a gradient.
    "waiting": dj.traces.Trace([0, 2, 2, 0, 2, 0], [0, 0, 2, 0, 1, 2], 4),
}
box = functools.partial(optax.projections.projection_box, lower=-0.1, upper=0.2)
ball = functools.partial(optax.projections.projection_l2_ball, scale=0.4)
simplex = functools.partial(optax.projections.projection_simplex, scale=1.0)
OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), asynchronous.sgd(0.1)),
    "momentum": (optax.sgd(0.1, 0.9), asynchronous.momentum_sgd(0.1, 0.9)),
    "adam": (optax.adam(0.05, eps=1e-3), asynchronous.adam(0.05, eps=1e-3)),
    "amsgrad": (dj.amsgrad(0.05, b1=0.8, b2=0.9), asynchronous.amsgrad(0.05, 0.8, 0.9)),
    "weight decay": (
        dj.amsgrad(0.05, b2=0.9, weight_decay=0.3),
        asynchronous.amsgrad(0.05, b2=0.9, weight_decay=0.3),
    ),
    "box": (
        dj.amsgrad(0.1, projection=box),
        asynchronous.amsgrad(0.1, projection=asynchronous.box(-0.1, 0.2)),
    ),
    "ball": (
        dj.amsgrad(0.1, projection=ball),
        asynchronous.amsgrad(0.1, projection=asynchronous.ball(0.4)),
    ),
    "simplex": (
        dj.amsgrad(0.1, projection=simplex),
        asynchronous.amsgrad(0.1, projection=asynchronous.simplex(1.0)),
    ),
}


def gradient(worker, x, k, lib=np):
    """Gradients of quadratics that differ between workers and change every tick."""
    return (1 + 0.1 * worker) * (x - 0.4 * worker) + 0.5 * lib.sin(
        3.0 * k + worker + lib.arange(D, dtype=x.dtype)
    )


def replay(tx, num_workers, ticks, layout="vmap"):
    """Returns params after each tick, `[n, ticks, d]`; final models; masters."""

    def worker(_):
        params = jnp.asarray(START.tolist())
        me = dj.worker_index().astype(params.dtype)

        def tick(carry, k):
            params, state = carry
            grads = gradient(me, params, k, jnp)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        start = jax.tree.map(
            lambda x: WorkerAxis.bind("workers").varying(x), (params, tx.init(params))
        )
        times = jnp.arange(ticks, dtype=params.dtype)
        (params, state), path = lax.scan(tick, start, times)
        return path, dj.eval_params(state, params), state.master

    return LAYOUTS[layout](worker, num_workers)(jnp.zeros(num_workers))


def expected(trace, optimizer, **options):
    path = asynchronous.replay(
        START, gradient, trace.workers, trace.staleness, optimizer, **options
    )
    return path, asynchronous.held(
        path, trace.workers, trace.staleness, trace.num_workers
    )


@pytest.mark.parametrize(
    ("name", "trace"),
    [("amsgrad", trace) for trace in TRACES]
    + [(name, "delayed, 3 workers") for name in OPTIMIZERS if name != "amsgrad"],
)
def test_replay_equals_the_master(name, trace, x64, standard_promotion):
    trace, (inner, reference) = TRACES[trace], OPTIMIZERS[name]
    tx = dj.asynchronous(inner, trace)
    path, evaluated, _ = replay(tx, trace.num_workers, len(trace))
    iterates, held = expected(trace, reference)
    np.testing.assert_allclose(np.swapaxes(path, 0, 1), held[1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        evaluated, np.tile(iterates[-1], (trace.num_workers, 1)), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_staler_gradients_make_smaller_steps(power, x64):
    trace = TRACES["speeds"]
    inner = optax.chain(optax.trace(0.9), dj.scale_by_staleness(power), optax.scale(-1))
    found, _, _ = replay(dj.asynchronous(inner, trace), 4, TICKS)
    if power == 1.0:
        momentum = asynchronous.momentum_sgd(1.0, 0.9)
        _, held = expected(trace, momentum, staleness_aware=True)
        np.testing.assert_allclose(np.swapaxes(found, 0, 1), held[1:], atol=1e-10)
    else:
        scale = dj.scale_by_staleness(power)
        for tau, factor in ((0, 1.0), (1, 1.0), (4, 0.5)):
            update, _ = scale.update(jnp.ones(2), scale.init(()), staleness=tau)
            np.testing.assert_allclose(update, factor)


def test_no_delay_is_the_optimizer_itself_exactly(x64):
    """Bitwise equal without compilation, which may change rounding."""
    inner = dj.amsgrad(0.05)
    tx = dj.asynchronous(inner, dj.traces.uniform_delay(0, 12))

    def run(tx):
        params = jnp.asarray(START.tolist())
        state, path = tx.init(params), []
        for k in range(12):
            grads = gradient(jnp.float64(0), params, float(k), jnp)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
        return jnp.stack(path)

    alone = jax.vmap(lambda _: run(inner), axis_name="workers")(jnp.zeros(1))
    found = jax.vmap(lambda _: run(tx), axis_name="workers")(jnp.zeros(1))
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_4"])
def test_masters_are_bitwise_equal(layout):
    trace = dj.traces.from_speeds([1, 1, 1, 2, 3, 3, 4, 9], 30, jitter=0.5)
    _, _, masters = replay(dj.asynchronous(dj.amsgrad(0.1), trace), 8, 30, layout)
    masters = np.asarray(masters)
    assert (masters == masters[:1]).all()
    assert np.isfinite(masters).all()


def test_after_the_last_tick_nothing_changes():
    trace = dj.traces.round_robin(2, 5)
    path, _, masters = replay(dj.asynchronous(dj.amsgrad(0.1), trace), 2, 9)
    # After ticks 3 and 4, the workers send nothing more and keep the newest iterates.
    changes = (np.diff(path, axis=1) != 0).any(2)
    assert np.argwhere(changes).tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]
    np.testing.assert_array_equal(path[0, -1], masters[0])
    assert (masters == masters[0]).all()
    _, _, sooner = replay(dj.asynchronous(dj.amsgrad(0.1), trace), 2, 5)
    np.testing.assert_array_equal(masters, sooner)


def test_unused_gradients_do_not_matter():
    """Gradients that do not arrive may be infinite."""
    trace = dj.traces.round_robin(2, 10)
    tx = dj.asynchronous(optax.sgd(0.1), trace)

    def worker(_):
        params = jnp.zeros(3)
        state = tx.init(params)
        for k in range(3):
            mine = dj.worker_index() == k % 2
            grads = jnp.where(mine, jnp.ones(3), jnp.nan)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return state.master

    found = jax.vmap(worker, axis_name="workers")(jnp.zeros(2))
    np.testing.assert_allclose(found, -0.3, rtol=1e-6)


def test_a_tick_sends_one_gradient():
    trace = dj.traces.round_robin(8, 10)
    tx = dj.apam(0.1, trace)
    params = {"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(20)}
    cost = dj.communication_cost(
        tx.update, params, tx.init(params), params, axis_sizes={"workers": 8}
    )
    assert cost.bytes_sent == pytest.approx(2 * 4 * 620 * 7 / 8)
    assert tx.init(params).recent == ()
    delayed = dj.apam(0.1, dj.traces.uniform_delay(5, 200))
    rows = {x.shape[0] for x in jax.tree.leaves(delayed.init(params).recent)}
    assert rows == {5}


@pytest.mark.parametrize("delay", [0, 3, dj.traces.uniform_delay(7, 30).staleness])
def test_delayed_gradients(delay, x64):
    tx = optax.chain(dj.delay_gradients(delay), dj.amsgrad(0.1))
    params = jnp.asarray(START.tolist())

    def step(carry, k):
        params, state = carry
        updates, state = tx.update(gradient(0.0, params, k, jnp), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, path = lax.scan(step, (params, tx.init(params)), jnp.arange(30.0))
    delays = np.broadcast_to(delay, 30)
    reference = asynchronous.delayed(START, gradient, delays, asynchronous.amsgrad(0.1))
    np.testing.assert_allclose(path, reference[1:], rtol=0, atol=1e-10)


def test_amsgrad_is_adam_while_second_moments_grow(x64, standard_promotion):
    ours, adam = dj.amsgrad(0.1, eps=0.0), optax.adam(0.1, eps=0.0)
    params = jnp.asarray(START.tolist())
    states, ends = [ours.init(params), adam.init(params)], [params, params]
    for k in range(1, 8):
        for i, tx in enumerate((ours, adam)):
            updates, states[i] = tx.update(jnp.full(D, 2.0**k), states[i], ends[i])
            ends[i] = optax.apply_updates(ends[i], updates)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)


class TestTraces:
    """Traces: arrivals, and saving to a file."""

    @pytest.mark.parametrize("seconds", [[1, 1, 1], [1, 3], [2, 3, 5, 7], [4]])
    def test_speeds(self, seconds):
        trace = dj.traces.from_speeds(seconds, 60)
        found = list(zip(trace.workers, trace.staleness, strict=True))
        times = np.array(seconds, float)[:, None]
        assert found == asynchronous.arrivals_from_speeds(times, 60)

    def test_jitter(self):
        make = functools.partial(dj.traces.from_speeds, [1, 2], 4000, jitter=0.5)
        one, same, other = make(seed=1), make(seed=1), make(seed=2)
        np.testing.assert_array_equal(one.workers, same.workers)
        assert (one.workers != other.workers).any()
        # Jitter does not change mean durations.
        assert np.mean(one.workers == 0) == pytest.approx(2 / 3, abs=0.03)

    def test_round_robin(self):
        trace = dj.traces.round_robin(3, 7)
        assert trace.workers.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert trace.staleness.tolist() == [0, 1, 2, 2, 2, 2, 2]

    def test_uniform_delay(self):
        trace = dj.traces.uniform_delay(3, 5000)
        share = np.bincount(trace.staleness) / 5000
        np.testing.assert_allclose(share, 0.25, atol=0.03)
        assert (trace.staleness <= np.arange(5000)).all()

    def test_round_trip(self, tmp_path):
        trace = TRACES["speeds"]
        trace.save(tmp_path / "run.trace")
        loaded = dj.traces.load(tmp_path / "run.trace")
        np.testing.assert_array_equal(loaded.workers, trace.workers)
        np.testing.assert_array_equal(loaded.staleness, trace.staleness)
        assert loaded.num_workers == 4
        assert (tmp_path / "run.trace").stat().st_size < 2000

    def test_broken_files(self, tmp_path):
        (tmp_path / "x").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="is not a trace"):
            dj.traces.load(tmp_path / "x")
        with pytest.raises(FileNotFoundError):
            dj.traces.load(tmp_path / "y")


def test_a_recorded_run_is_replayed(x64):
    """Replaying the trace of real threads gives their parameters, up to rounding."""
    n, ticks = 3, 60
    rng = np.random.default_rng(0)
    data = rng.normal(size=(n, ticks + n, D))

    def gradient(params, batch):
        return params - batch + jnp.sin(3 * params)

    def batches(worker):
        for row in data[worker]:
            time.sleep(0.001 * (1 + worker) * rng.uniform(0.5, 1.5))
            yield row

    inner = dj.amsgrad(0.1, b2=0.9)
    start = jnp.asarray(START.tolist())
    run = engine.run(gradient, start, batches, inner, ticks, num_workers=n)
    assert run.trace is not None
    assert run.staleness_counts[1:].sum() > 0
    tx = dj.asynchronous(inner, run.trace)
    # The batch of each tick's worker. The other workers' batches do not matter.
    given = np.zeros((n, ticks, D))
    every_tick = np.arange(ticks)
    given[run.trace.workers, every_tick] = data[run.trace.workers, run.batch_indices]

    def worker(rows):
        params = jnp.asarray(START.tolist())

        def tick(carry, row):
            params, state = carry
            updates, state = tx.update(gradient(params, row), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = lax.scan(tick, (params, tx.init(params)), rows)
        return dj.eval_params(state, params)

    found = jax.jit(jax.vmap(worker, axis_name="workers"))(jnp.asarray(given))
    np.testing.assert_allclose(found[0], run.params, rtol=0, atol=1e-10)
