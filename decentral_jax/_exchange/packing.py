"""Packing: small leaves of a tree travel together, in one message per dtype."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# A leaf of at least this many bytes travels alone: packing it would cost a copy, and
# saves only a negligible number of messages. An all-reduce is several messages, so that
# packing pays for larger leaves (benchmarks/processes/multi_process.py).
BUCKET_BYTES = 1 << 20
ALL_REDUCE_BUCKET_BYTES = 2 << 20


class _HasDevices(Protocol):
    @property
    def num_devices(self) -> int: ...


def packed(
    tree: Any, axis: _HasDevices, alone_from: int = BUCKET_BYTES
) -> tuple[list, Callable[[list], Any]]:
    """Returns the arrays that travel in place of a tree's leaves, and the way back.

    Args:
      tree: Pytree of arrays.
      axis: The worker axis. On one device nothing travels, and nothing is packed.
      alone_from: Leaves of at least this many bytes travel alone.

    Returns:
      The arrays; and a function from arrays of the same shapes, with or without further
      leading axes, to a tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if axis.num_devices == 1:
        return leaves, structure.unflatten
    buckets: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        big = leaf.size * leaf.dtype.itemsize >= alone_from
        buckets.setdefault(i if big else leaf.dtype, []).append(i)
    members = list(buckets.values())
    arrays = [
        leaves[alone[0]]
        if len(alone) == 1
        else jnp.concatenate([leaves[i].ravel() for i in alone])
        for alone in members
    ]

    def unpack(arrays):
        out = list(leaves)
        for array, inside in zip(arrays, members, strict=True):
            if len(inside) == 1:
                out[inside[0]] = array
                continue
            ends = np.cumsum([leaves[i].size for i in inside])[:-1]
            for i, part in zip(inside, jnp.split(array, ends, axis=-1), strict=True):
                out[i] = part.reshape(*array.shape[:-1], *leaves[i].shape)
        return structure.unflatten(out)

    return arrays, unpack


def mapped_packed(
    fn: Callable, tree: Any, axis: _HasDevices, alone_from: int = BUCKET_BYTES
) -> Any:
    """Maps a function that treats all entries alike over a tree, small leaves packed.

    The function may add leading axes.
    """
    arrays, unpack = packed(tree, axis, alone_from)
    return unpack([fn(array) for array in arrays])
