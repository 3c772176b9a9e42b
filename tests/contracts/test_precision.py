"""States integrated over many steps keep their invariants in half precision.

`python -m benchmarks.one_device.precision` measures the same over 1e5 steps and several
seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decentral_jax as dj
from benchmarks.one_device import precision
from benchmarks.one_device.precision import BLOCK, RING, TOP, TRACE

STEPS, SEEDS = 4000, 2
distance = functools.partial(precision.distances, steps=STEPS, seeds=SEEDS)
BASELINE = "all_reduce_sgd"


@functools.cache
def measured(name, dtype):
    with jax.numpy_dtype_promotion("standard"):
        return distance(name, jnp.dtype(dtype)).mean()


@pytest.mark.parametrize("name", precision.ALGORITHMS)
def test_half_precision_costs_no_more_than_rounding_the_parameters(name):
    """Bound: twice the distance in float32, plus that of all-reduce in bfloat16."""
    rounding = measured(BASELINE, "bfloat16")
    allowed = 2 * measured(name, "float32") + rounding
    assert measured(name, "bfloat16") <= allowed


def test_d2_in_float32_follows_float64(x64):
    """D2 integrates its correction over all steps; its sum over workers stays 0."""
    with jax.numpy_dtype_promotion("standard"):
        wide = distance("d2", jnp.dtype(jnp.float64)).mean()
        narrow = distance("d2", jnp.dtype(jnp.float32)).mean()
    assert narrow <= 10 * wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", precision.INVARIANTS)
def test_invariants_hold_to_rounding_after_many_steps(name, dtype):
    """The equalities that docstrings state hold to a few float32 roundings.

    D2 exchanges only differences, so its rounding error vanishes together with them.
    """
    with jax.numpy_dtype_promotion("standard"):
        error = precision.invariant(name, jnp.dtype(dtype), STEPS)
    assert error < (1 if name == "d2" else 50) * np.finfo(np.float32).eps


SMALL = 1e-3
SMALL_STEPS = {
    "def_sgd": lambda: dj.def_sgd(SMALL, BLOCK, detach=0.3),
    "def_sgd, top-k": lambda: dj.def_sgd(SMALL, TOP, detach=1.0),
    "ef_sgd, period 4": lambda: dj.ef_sgd(SMALL, BLOCK, period=4),
    "sgd_ia": lambda: dj.sgd_ia(SMALL, ratio=4.0, detach=0.3),
    "cser": lambda: dj.cser(SMALL, BLOCK, period=4),
    "average_parameters": lambda: optax.chain(
        optax.sgd(SMALL), dj.average_parameters(period=1, outer=optax.sgd(1.0))
    ),
    "slowmo": lambda: dj.slowmo(
        0.05, period=4, slow_momentum=0.0, slow_rate=10 * SMALL
    ),
    "apam": lambda: dj.apam(SMALL / 5, TRACE),
}


def fraction_covered(tx, dtype):
    """Fraction of the distance from 0.5 to the mean optimum that the model covers."""
    targets = jnp.linspace(0.9, 1.1, 8)[:, None] * jnp.ones(5)
    step = jax.vmap(functools.partial(one_step, tx), axis_name="workers")
    params = jnp.full((8, 5), 0.5, dtype)
    carry = params, jax.vmap(tx.init)(params)
    steps = jax.jit(
        lambda carry: jax.lax.scan(
            lambda carry, _: (step(*carry, targets), None), carry, length=STEPS
        )[0]
    )
    params, state = steps(carry)
    model = jax.vmap(dj.eval_params, axis_name="workers")(state, params)
    return float((model.astype(jnp.float32).mean() - 0.5) / 0.5)


def one_step(tx, params, state, target):
    gradient = (params.astype(jnp.float32) - target).astype(params.dtype)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("name", SMALL_STEPS)
@pytest.mark.usefixtures("standard_promotion")
def test_small_steps_accumulate(name):
    """With all-reduce SGD, rounding to bfloat16 parameters loses every such step."""
    assert fraction_covered(dj.all_reduce_sgd(SMALL), jnp.bfloat16) == 0
    narrow, wide = (
        fraction_covered(SMALL_STEPS[name](), x) for x in (jnp.bfloat16, jnp.float32)
    )
    assert wide > 0.8
    np.testing.assert_allclose(narrow, wide, atol=0.02)


@pytest.mark.parametrize("detach", [0.0, 0.3])
def test_unsent_entries_accumulate(detach):
    """The compressor sends one large entry; the small ones stay in the residual."""
    tx = dj.error_feedback(dj.compression.top_k(k=1), detach=detach)
    update = jnp.tile(jnp.array([1000.0, 1.0, 1.0], jnp.bfloat16), (8, 1))

    def body(state, _):
        _, state = jax.vmap(tx.update, axis_name="workers")(update, state, update)
        return state, None

    state, _ = jax.lax.scan(body, jax.vmap(tx.init)(update), length=900)
    np.testing.assert_array_equal(state.residual[:, 1:], 900)


def test_moments_accumulate():
    """For a constant gradient, the moments approach its powers."""
    tx, steps = dj.amsgrad(0.1, b2=0.999), 4000
    gradient = jnp.full(3, 1.5, jnp.bfloat16)
    state = jax.lax.scan(
        lambda state, _: (tx.update(gradient, state, gradient)[1], None),
        tx.init(gradient),
        length=steps,
    )[0][0]
    np.testing.assert_allclose(state.mean, 1.5, rtol=1e-3)
    for square in (state.square, state.largest):
        np.testing.assert_allclose(square, 2.25 * (1 - 0.999**steps), rtol=1e-3)


@pytest.mark.parametrize("name", ["detag", "defacto"])
def test_long_phases_accumulate(name):
    """A phase's mean gradient is accurate, although each gradient adds little."""
    rounds = 1000
    tx = getattr(dj, name)(0.1, RING, rounds=rounds)
    ones = jnp.ones((8, 3), jnp.bfloat16)

    def body(state, _):
        _, state = jax.vmap(tx.update, axis_name="workers")(ones, state, ones)
        return state, None

    state, _ = jax.lax.scan(body, jax.vmap(tx.init)(ones), length=rounds)
    mean = state.previous if name == "detag" else state.average
    np.testing.assert_allclose(mean, 1, rtol=1e-3)
