"""Weighted sums of arrays that have arrived on the device.

A `Source` (see `plans`) lists the rows that a worker sums, and their weights. This
module calls no collectives.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.numbers import PyTree, widened
from decentral_jax._exchange.plans import Source

# Above this number of neighbors, a matrix product is faster than a sum of gathered
# rows.
DENSE_FROM = 24


def stacked(sources: Sequence[Source]) -> Source:
    """Stacks the sources of several steps, padded to the same number of slots.

    Args:
      sources: One source per step, with arrays `[n, m]`. The number of slots `m` may
        differ between steps.

    Returns:
      A source with arrays `[steps, n, max m]`. Unused slots have index and weight 0.
    """
    most = max(source.index.shape[1] for source in sources)

    def pad(array):
        return np.pad(array, ((0, 0), (0, most - array.shape[1])))

    return Source(
        np.stack([pad(source.index) for source in sources]),
        np.stack([pad(source.weight) for source in sources]),
    )


def weighted_sum(
    rows: PyTree,
    decode: Callable[[PyTree], PyTree],
    like: PyTree,
    source: Source,
    worker: jax.Array,
    t: jax.Array | int,
) -> PyTree:
    """Decodes the rows that a worker uses, and sums them with its weights.

    Args:
      rows: Pytree of arrays with leaves `[k, ...]`.
      decode: Function from one row to the arrays to sum.
      like: Shapes and dtypes of the decoded arrays.
      source: Stacked sources, with index and weight `[steps, n, m]`.
      worker: Number of the worker that sums.
      t: Index of the source to use, in [0, steps).

    Returns:
      The sums, in at least float32.
    """
    y = jax.tree.map(lambda x: jnp.zeros(x.shape, widened(x.dtype)), like)
    for slot in range(source.index.shape[-1]):
        index, weight = source.index[..., slot], source.weight[..., slot]
        # If all workers use the same row in all steps, slice it instead of gathering.
        same = (index == index.flat[0]).all()
        at = int(index.flat[0]) if same else jnp.asarray(index)[t, worker]
        arrays = decode(jax.tree.map(lambda r, at=at: r[at], rows))
        add = functools.partial(_add_weighted, weight=weight, worker=worker, t=t)
        y = jax.tree.map(add, y, arrays)
    return y


def _add_weighted(
    y: jax.Array,
    row: jax.Array,
    weight: np.ndarray,
    worker: jax.Array,
    t: jax.Array | int,
) -> jax.Array:
    """Adds a row to `y`, times the entry `[t, worker]` of the weights `[steps, n]`."""
    row = row.astype(y.dtype)
    # If all workers use the same weight in all steps, it is a constant.
    if (weight == weight.flat[0]).all():
        return y + row * jnp.asarray(weight.flat[0], y.dtype)
    own = jnp.asarray(weight, y.dtype)[t, worker]
    # An unused slot points at the row of an arbitrary worker, which may hold inf or
    # NaN, so a weight of 0 must select 0 instead of multiplying.
    return y + (row * own if weight.all() else jnp.where(own != 0, row * own, 0))


def dense_row(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums the arrays of all workers with one worker's weights.

    If all entries are finite, this is a matrix product. If not, rows of weight 0 are
    skipped one by one: in a matrix product, 0 times NaN would propagate the NaN of one
    worker to workers that do not communicate with it.

    Args:
      weights: Weights `[n]`.
      rows: Arrays of all workers, `[n, ...]`.

    Returns:
      The sum, `[...]`.
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
