"""States integrated over many steps keep their invariants in half precision.

`python -m benchmarks.precision` measures the same over 1e5 steps and several seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import precision

STEPS, SEEDS = 4000, 2
distance = functools.partial(precision.distances, steps=STEPS, seeds=SEEDS)
YARDSTICK = "all_reduce_sgd"


@functools.cache
def measured(name, dtype):
    with jax.numpy_dtype_promotion("standard"):
        return distance(name, jnp.dtype(dtype)).mean()


@pytest.mark.parametrize("name", precision.ALGORITHMS)
def test_half_precision_costs_what_rounding_the_parameters_costs(name):
    """Within twice the distance in float32, plus what all-reduce pays."""
    rounding = measured(YARDSTICK, "bfloat16")
    allowed = 2 * measured(name, "float32") + rounding
    assert measured(name, "bfloat16") <= allowed


def test_d2_in_float32_follows_float64(x64):
    """Its correction adds up over all steps; its sum over workers stays 0."""
    with jax.numpy_dtype_promotion("standard"):
        wide = distance("d2", jnp.dtype(jnp.float64)).mean()
        narrow = distance("d2", jnp.dtype(jnp.float32)).mean()
    assert narrow <= 10 * wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", precision.INVARIANTS)
def test_invariants_hold_to_rounding_after_many_steps(name, dtype):
    """What docstrings call equal is, to a thousand roundings of float32."""
    with jax.numpy_dtype_promotion("standard"):
        error = precision.invariant(name, jnp.dtype(dtype), STEPS)
    assert error < 1000 * np.finfo(np.float32).eps
