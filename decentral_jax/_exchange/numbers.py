"""Dtypes and counters: how numbers stay accurate, and equal on all workers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_COUNT = 2**31 - 2


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype to accumulate in: float32 for half precision, else the same."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns an array in the dtype to accumulate in."""
    x = jnp.asarray(x)
    return x.astype(widened(x.dtype))


def is_narrow(tree: Any) -> bool:
    """Returns whether any array of a tree has a dtype too narrow to accumulate in."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    return any(widened(dtype) != dtype for dtype in dtypes)


def wide_zeros(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns zeros of an array's shape in the dtype to accumulate in."""
    x = jnp.asarray(x)
    return jnp.zeros(x.shape, widened(x.dtype))


def wide_copy(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns a copy of an array in the dtype to accumulate in."""
    return jnp.copy(wide(x))


def fitted(value: float | jax.Array, x: jax.Array) -> float | jax.Array:
    """Returns a hyperparameter for use with `x`: an array is cast to its dtype.

    An injected hyperparameter has a dtype of its own, which must not change that of
    the state.
    """
    return value.astype(x.dtype) if isinstance(value, jax.Array) else value


def cast_like(tree: Any, like: Any) -> Any:
    """Casts a tree to the dtypes of another one, rounded alike for every use.

    XLA may skip a rounding for one use of a value and not for another. What a worker
    subtracts from its own state would then differ from what the others received.
    """
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(like)]
    leaves, structure = jax.tree.flatten(tree)
    if [x.dtype for x in leaves] == dtypes:
        return tree
    leaves = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
    return structure.unflatten(lax.optimization_barrier(leaves))


def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns an array times a weight, in its dtype; where the weight is 0, it is 0."""
    y = wide(x) * weight.astype(widened(x.dtype))
    return jnp.where(weight != 0, y, jnp.zeros_like(y)).astype(x.dtype)


def advance(count: jax.typing.ArrayLike, period: int = 1) -> jax.Array:
    """Returns the next step number, which never stops counting.

    At the end of int32 it continues at the beginning of a period, but not at 0: what
    happens every `period` steps continues, and what happens in step 0 alone does not
    happen again.

    Args:
      count: An int32 scalar, the number of steps so far.
      period: What the count is used modulo, a multiple of all such numbers.

    Returns:
      The count plus one, or a number of the same remainder.
    """
    last = LARGEST_COUNT // period * period
    count = jnp.asarray(count, jnp.int32)
    return jnp.where(count < last, count, count - last + period) + 1


@jax.jit
def equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks, by this function's name in the traced program, what must be equal."""
    return lax.optimization_barrier(x)


@jax.jit
def value_equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks, likewise, the loss that an optimizer reads where models stay equal."""
    return lax.optimization_barrier(x)
