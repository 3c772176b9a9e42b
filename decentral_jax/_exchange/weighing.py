"""Weighted sums of workers' arrays, once these are on the device.

A `Source` says which rows a worker sums, and with which weights; see `plans`. No
collectives here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.numbers import widened
from decentral_jax._exchange.plans import Source

# With more neighbors than this, a matrix product beats a sum of gathered rows.
DENSE_FROM = 24


def stacked(sources: Sequence[Source]) -> Source:
    """Stacks the sources of several steps, padded to the same number of rows."""
    most = max(source.index.shape[1] for source in sources)

    def pad(array):
        return np.pad(array, ((0, 0), (0, most - array.shape[1])))

    return Source(
        np.stack([pad(source.index) for source in sources]),
        np.stack([pad(source.weight) for source in sources]),
    )


def weighted_sum(
    rows: Any,
    decode: Callable[[Any], Any],
    like: Any,
    source: Source,
    worker: jax.Array,
    t: jax.Array | int,
) -> Any:
    """Sums the rows that a worker uses, each decoded and times its weight.

    Args:
      rows: Pytree of arrays, leaves `[k, ...]`.
      decode: Turns one row into the arrays to be summed.
      like: The shapes and dtypes of these arrays.
      source: Stacked sources: index and weight `[steps, n, m]`.
      worker: Which worker sums.
      t: Which of the stacked sources it uses.

    Returns:
      The sums, at least float32.
    """
    y = jax.tree.map(lambda x: jnp.zeros(x.shape, widened(x.dtype)), like)
    for slot in range(source.index.shape[-1]):
        index, weight = source.index[..., slot], source.weight[..., slot]
        # A constant index is a slice instead of a gather.
        same = (index == index.flat[0]).all()
        at = int(index.flat[0]) if same else jnp.asarray(index)[t, worker]
        arrays = decode(jax.tree.map(lambda r, at=at: r[at], rows))
        add = functools.partial(_add_weighted, weight=weight, worker=worker, t=t)
        y = jax.tree.map(add, y, arrays)
    return y


def _add_weighted(y, row, weight, worker, t):
    row = row.astype(y.dtype)
    if (weight == weight.flat[0]).all():
        return y + row * jnp.asarray(weight.flat[0], y.dtype)
    own = jnp.asarray(weight, y.dtype)[t, worker]
    # An unused slot points at some worker's row, which may hold inf or NaN.
    return y + (row * own if weight.all() else jnp.where(own != 0, row * own, 0))


def dense_row(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums all workers' arrays `[n, ...]`, each times its weight `[n]`.

    A matrix product where everything is finite. Elsewhere 0 times NaN would carry one
    worker's NaN to workers that do not communicate with it.
    """

    def product(weights, rows):
        flat = rows.reshape(rows.shape[0], -1)
        product = jnp.matmul(weights, flat, precision="highest")
        return product.reshape(rows.shape[1:])

    def one_by_one(weights, rows):
        def add(j, y):
            w = weights[j]
            return y + jnp.where(w != 0, rows[j] * w, jnp.zeros_like(y))

        return lax.fori_loop(0, rows.shape[0], add, jnp.zeros_like(rows[0]))

    finite = jnp.isfinite(rows).all()
    return lax.cond(finite, product, one_by_one, weights, rows)
