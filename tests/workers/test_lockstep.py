"""Programs in which workers would run different collectives fail before they run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj

N = 8
RING = dj.topology.ring(N)
ONE_PEER = dj.topology.one_peer_exponential(N)
BLOCK = dj.compression.random_block(4)
LAYOUTS = (8, 2, 1)


def workers_on(num_devices):
    return dj.Workers(N, devices=jax.devices()[:num_devices])


def keep_state_where_not_finite(tx, agree=False):
    """Keeps old parameters and state, as in Flax's recipe for loss scaling."""

    def step(params, state, target):
        grads = params - target
        updates, new_state = tx.update(grads, state, params)
        is_finite = jnp.isfinite(grads).all()
        if agree:
            is_finite = dj.average(is_finite.astype(jnp.float32)) == 1

        def keep(new, old):
            return jnp.where(is_finite, new, old)

        new = optax.apply_updates(params, updates)
        kept = jax.tree.map(keep, new_state, state)
        return jax.tree.map(keep, new, params), kept

    return step


def run(workers, step, tx):
    params, state = workers.replicate((jnp.zeros(12), tx.init(jnp.zeros(12))))
    return workers.spmd(step)(params, state, jnp.zeros((N, 12)))


COUNTING = {
    "one_peer": dj.d_psgd(0.1, ONE_PEER),
    "local_sgd": dj.local_sgd(0.1, period=4),
    "random_block": dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK),
    "detag": dj.detag(0.1, RING, rounds=3),
    "hidden in a chain": optax.chain(optax.clip(1.0), dj.d_psgd(0.1, ONE_PEER)),
}


@pytest.mark.parametrize("num_devices", LAYOUTS)
@pytest.mark.parametrize("name", COUNTING)
def test_a_counter_that_one_worker_does_not_advance_is_refused(name, num_devices):
    tx = COUNTING[name]
    with pytest.raises(ValueError, match=r"step counter .*count must be equal"):
        run(workers_on(num_devices), keep_state_where_not_finite(tx), tx)


@pytest.mark.parametrize("num_devices", LAYOUTS)
@pytest.mark.parametrize("name", COUNTING)
def test_a_counter_that_all_workers_do_not_advance_is_accepted(name, num_devices):
    tx = COUNTING[name]
    step = keep_state_where_not_finite(tx, agree=True)
    params, _ = run(workers_on(num_devices), step, tx)
    assert np.isfinite(params).all()


def test_an_unused_counter_may_lag():
    """On a ring, every step sends the same messages, regardless of the counter."""
    tx = dj.d_psgd(0.1, RING)
    params, _ = run(workers_on(8), keep_state_where_not_finite(tx), tx)
    assert np.isfinite(params).all()


@pytest.mark.parametrize("num_devices", LAYOUTS)
def test_multi_steps_that_skip_one_worker_are_refused(num_devices):
    inner = dj.d_psgd(0.1, RING)
    tx = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)

    def step(params, state, target):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(params - target, state, params)
        return optax.apply_updates(params, updates), state

    with pytest.raises(ValueError, match="condition of a branch must be equal"):
        run(workers_on(num_devices), step, tx)


def branch(x):
    return lax.cond(x.sum() > 0, lambda x: dj.average(x), lambda x: x, x)


def branch_in_scan(x):
    def body(carry, _):
        return branch(carry), None

    return lax.scan(body, x, length=2)[0]


def branch_of_carried_data(x):
    """The condition differs between workers only in the second iteration."""

    def body(carry, _):
        y, condition = carry
        y = lax.cond(condition > 0, lambda y: dj.mix(y, RING), lambda y: y, y)
        return (y, x.sum()), None

    return lax.scan(body, (x, jnp.ones([])), length=2)[0][0]


def branch_by_number(x):
    return lax.cond(dj.worker_index() > 3, lambda x: dj.average(x), lambda x: x, x)


def loop(x):
    return lax.while_loop(lambda x: x.sum() < 1, lambda x: dj.average(x) + 1, x)


def round_by_data(x):
    return dj.mix(x, ONE_PEER, step=x[0].astype(jnp.int32))


def in_nested_jit(x):
    return jax.jit(jax.checkpoint(branch))(x)


@pytest.mark.parametrize("num_devices", LAYOUTS)
@pytest.mark.parametrize(
    "fn",
    [
        *(branch, branch_in_scan, branch_of_carried_data, branch_by_number),
        *(loop, round_by_data, in_nested_jit),
    ],
)
def test_collectives_that_depend_on_local_data_are_refused(fn, num_devices):
    with pytest.raises(ValueError, match="must be equal on all workers"):
        workers_on(num_devices).spmd(fn).lower(jnp.ones((N, 3)))


def branch_on_common_data(x):
    return lax.cond(dj.average(x).sum() > 0, lambda x: dj.average(x), lambda x: x, x)


def branch_without_collectives(x):
    return dj.average(lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x))


def branch_on_a_counter(x):
    def body(count, _):
        y = lax.cond(count % 2 == 0, lambda x: dj.average(x), lambda x: x, x)
        return count + 1, y

    return lax.scan(body, 0, length=3)[1].sum(0)


def a_fixed_loop(x):
    return lax.fori_loop(0, 3, lambda _, x: dj.mix(x, RING), x)


def converged(x):
    return lax.while_loop(
        lambda x: dj.consensus_distance(x) > 1e-3, lambda x: dj.mix(x, RING), x
    )


def missing_workers(x):
    active = dj.sample_active(3, missing=2)
    return dj.mix(x, RING, active=active)


@pytest.mark.parametrize(
    "fn",
    [
        *(branch_on_common_data, branch_without_collectives, branch_on_a_counter),
        *(a_fixed_loop, converged, missing_workers),
    ],
)
def test_equal_conditions_run_alike_in_all_layouts(fn):
    x = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    expected = jax.vmap(fn, axis_name="workers")(x)
    for num_devices in LAYOUTS:
        found = workers_on(num_devices).spmd(fn)(x)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_unrelated_counters_may_differ():
    """Communication does not depend on counters such as that of refused gradients."""
    tx = optax.chain(dj.zero_nonfinite_updates(), dj.d_psgd(0.1, ONE_PEER))

    def step(params, state, target):
        updates, state = tx.update(params - target, state, params)
        return optax.apply_updates(params, updates), state

    params, state = workers_on(8).replicate((jnp.zeros(3), tx.init(jnp.zeros(3))))
    targets = jnp.zeros((N, 3)).at[2].set(jnp.nan)
    params, state = workers_on(8).spmd(step)(params, state, targets)
    np.testing.assert_array_equal(state[0].refused, np.arange(N) == 2)
    assert np.isfinite(params).all()


def test_errors_of_the_function_are_passed_on():
    with pytest.raises(ZeroDivisionError):
        workers_on(8).spmd(lambda x: x / (1 // 0))(jnp.ones(N))
