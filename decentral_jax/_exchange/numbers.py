"""Dtypes and counters that keep numbers accurate, and equal on all workers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any  # a pytree of arrays

# Largest step count that `advance` returns; it fits into int32.
LARGEST_COUNT = 2**31 - 2


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the accumulation dtype: float32 for half precision, else `dtype`."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts an array to its accumulation dtype, at least float32."""
    x = jnp.asarray(x)
    return x.astype(widened(x.dtype))


def is_narrow(tree: PyTree) -> bool:
    """Returns whether any leaf has a dtype narrower than float32."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    return any(widened(dtype) != dtype for dtype in dtypes)


def wide_zeros(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns zeros of an array's shape, in its accumulation dtype."""
    x = jnp.asarray(x)
    return jnp.zeros(x.shape, widened(x.dtype))


def wide_copy(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns a copy of an array, in its accumulation dtype."""
    return jnp.copy(wide(x))


def fitted(value: float | jax.Array, x: jax.Array) -> float | jax.Array:
    """Returns a hyperparameter for use with `x`; an array is cast to the dtype of `x`.

    A hyperparameter injected by `optax.inject_hyperparams` is an array with its own
    dtype, which must not change the dtype of the state.
    """
    return value.astype(x.dtype) if isinstance(value, jax.Array) else value


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts a tree to the dtypes of another tree, with one rounding for every use.

    Without the optimization barrier, XLA may skip the rounding for one use of a value
    and not for another. The values that a worker subtracts from its own state would
    then differ from the values that the other workers receive.
    """
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(like)]
    leaves, structure = jax.tree.flatten(tree)
    if [x.dtype for x in leaves] == dtypes:
        return tree
    leaves = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
    return structure.unflatten(lax.optimization_barrier(leaves))


def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `x` times a scalar weight, in the dtype of `x`; 0 if the weight is 0."""
    # `where` instead of a product alone: 0 times inf or NaN would be NaN.
    y = wide(x) * weight.astype(widened(x.dtype))
    return jnp.where(weight != 0, y, jnp.zeros_like(y)).astype(x.dtype)


def advance(count: jax.typing.ArrayLike, period: int = 1) -> jax.Array:
    """Returns the next step number, without overflowing int32.

    At the end of int32 the count jumps back by a multiple of `period`, to a number
    above 0. Anything that happens every `period` steps therefore continues on schedule,
    and anything that happens only in step 0 does not happen again.

    Args:
      count: Number of steps so far, an int32 scalar.
      period: Common multiple of all numbers that the count is taken modulo of.

    Returns:
      The count plus one, or a smaller number with the same remainder modulo `period`.
    """
    last = LARGEST_COUNT // period * period
    count = jnp.asarray(count, jnp.int32)
    return jnp.where(count < last, count, count - last + period) + 1


@jax.jit
def equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks a value that must be equal on all workers.

    `decentral_jax._lockstep` finds the mark by this function's name in the jaxpr.
    """
    return lax.optimization_barrier(x)


@jax.jit
def value_equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks a loss that an optimizer reads, and that must be equal on all workers.

    `decentral_jax._lockstep` finds the mark by this function's name in the jaxpr.
    """
    return lax.optimization_barrier(x)
