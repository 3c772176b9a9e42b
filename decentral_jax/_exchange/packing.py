"""Packing of the small leaves of a tree into one message per dtype."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from decentral_jax._exchange.numbers import PyTree

# Leaves of at least this many bytes are sent alone: packing such a leaf costs a copy,
# and saves only a negligible number of messages. An all-reduce consists of several
# messages, so packing pays off for larger leaves; benchmarks/processes/multi_process.py
# measures it.
BUCKET_BYTES = 1 << 20
ALL_REDUCE_BUCKET_BYTES = 2 << 20


class _HasDevices(Protocol):
    @property
    def num_devices(self) -> int: ...


def packed(
    tree: PyTree, axis: _HasDevices, alone_from: int = BUCKET_BYTES
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """Packs the leaves of a tree into fewer arrays.

    Args:
      tree: Pytree of arrays.
      axis: Worker axis. On one device nothing is sent, so nothing is packed.
      alone_from: Leaves of at least this many bytes are not packed.

    Returns:
      A pair: the packed arrays, and a function that unpacks arrays of these shapes into
      a tree. The function also accepts arrays with additional leading axes.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if axis.num_devices == 1:
        return leaves, structure.unflatten

    # Group the leaf numbers: one bucket per large leaf, and one per dtype for the
    # small leaves.
    buckets: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        big = leaf.size * leaf.dtype.itemsize >= alone_from
        buckets.setdefault(i if big else leaf.dtype, []).append(i)
    members = list(buckets.values())

    # A bucket of one leaf keeps its shape; others become one vector.
    arrays = [
        leaves[bucket[0]]
        if len(bucket) == 1
        else jnp.concatenate([leaves[i].ravel() for i in bucket])
        for bucket in members
    ]

    def unpack(arrays):
        out = list(leaves)
        for array, bucket in zip(arrays, members, strict=True):
            if len(bucket) == 1:
                out[bucket[0]] = array
                continue
            # Split along the last axis, and keep any leading axes.
            ends = np.cumsum([leaves[i].size for i in bucket])[:-1]
            for i, part in zip(bucket, jnp.split(array, ends, axis=-1), strict=True):
                out[i] = part.reshape(*array.shape[:-1], *leaves[i].shape)
        return structure.unflatten(out)

    return arrays, unpack


def mapped_packed(
    fn: Callable[[jax.Array], jax.Array],
    tree: PyTree,
    axis: _HasDevices,
    alone_from: int = BUCKET_BYTES,
) -> PyTree:
    """Applies a function to each packed array of a tree, and unpacks the results.

    Args:
      fn: Function that treats all entries of an array alike, such as an all-reduce. It
        may add leading axes.
      tree: Pytree of arrays.
      axis: Worker axis.
      alone_from: Leaves of at least this many bytes are not packed.

    Returns:
      The results, in a tree of the same structure.
    """
    arrays, unpack = packed(tree, axis, alone_from)
    return unpack([fn(array) for array in arrays])
