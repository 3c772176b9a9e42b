"""Random sparsification: positions follow from a shared key, so no indices travel."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax.compression._base import Selection, check_ratio, share


@dataclasses.dataclass(frozen=True)
class RandomBlock(Selection):
    """See `random_block`."""

    ratio: float

    def compress(self, key, x):
        """The block."""
        if not x.size:
            return x.reshape(-1)
        start, size = self._block(key, x)
        flat = x.reshape(-1)
        if 2 * size > flat.size:
            return flat[(start + jnp.arange(size, dtype=jnp.int32)) % flat.size]
        window, offset = _window(flat, start, size)
        return lax.dynamic_slice(window, (offset,), (size,))

    def replace(self, key, x, payload):
        """`x` with another block."""
        if not x.size:
            return x
        start, size = self._block(key, x)
        # All that reads `x` comes first: then it need not be copied.
        flat, payload = lax.optimization_barrier((x.reshape(-1), payload))
        if 2 * size > flat.size:
            positions = (start + jnp.arange(size, dtype=jnp.int32)) % flat.size
            return flat.at[positions].set(payload).reshape(x.shape)
        window, offset = _window(flat, start, size)
        window = _write(window, payload, offset)
        # The head first: where the block does not wrap, it is written as it was.
        flat = _write(flat, window[size:], jnp.zeros_like(start))
        flat = _write(flat, window[:size], jnp.minimum(start, flat.size - size))
        return lax.optimization_barrier(flat).reshape(x.shape)

    def mask(self, key, x):
        """Whether an entry lies in the block."""
        if not x.size:
            return jnp.zeros(x.shape, bool)
        return self._position(key, x) < share(x.size, self.ratio)

    def decompress(self, key, payload, like):
        """The block, zero elsewhere; one pass, fused with what uses it."""
        if not math.prod(like.shape):
            return jnp.zeros(like.shape, like.dtype)
        position = self._position(key, like)
        entries = payload[jnp.minimum(position, payload.size - 1)]
        return jnp.where(position < payload.size, entries, jnp.zeros_like(entries))

    def _position(self, key, x):
        """Each entry's place counted from the block's start on, cyclically."""
        start, _ = self._block(key, x)
        size = math.prod(x.shape)
        position = lax.iota(jnp.int32, size).reshape(x.shape) - start
        return jnp.where(position < 0, position + size, position)

    def _block(self, key, x):
        # One draw instead of randint's three, which XLA takes long to compile; that the
        # first entries are likelier by N / 2^32 does not matter.
        bits = jax.random.bits(key, (), jnp.uint32)
        start = (bits % jnp.uint32(x.size)).astype(jnp.int32)
        return start, share(x.size, self.ratio)


def _window(flat, start, size):
    """What a cyclic block touches, `[2 size]`, and where in it the block begins.

    The last `size` entries from which the block can start without wrapping, then the
    first `size`: a block that wraps runs from the one into the other.
    """
    tail = jnp.minimum(start, flat.size - size)
    window = jnp.concatenate([lax.dynamic_slice(flat, (tail,), (size,)), flat[:size]])
    return window, start - tail


@jax.custom_batching.custom_vmap
def _write(x, block, start):
    """Overwrites a block of the last axis, in place where XLA can.

    JAX makes a scatter of a mapped `dynamic_update_slice`, and XLA of that a copy; the
    start is the same on all workers, so that it can stay what it is.
    """
    zero = jnp.zeros_like(start)  # of the start's dtype, also where integers are wide
    return lax.dynamic_update_slice(x, block, (*(zero,) * (x.ndim - 1), start))


@_write.def_vmap
def _write_mapped(axis_size, in_batched, x, block, start):
    x_batched, block_batched, start_batched = in_batched
    if start_batched:  # an outer map over runs with keys of their own
        axes = [0 if batched else None for batched in in_batched]
        mapped = jax.vmap(_write.fun, in_axes=axes, axis_size=axis_size)
        return mapped(x, block, start), True
    if not x_batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    if not block_batched:
        block = jnp.broadcast_to(block, (axis_size, *block.shape))
    return _write(x, block, start), True


@dataclasses.dataclass(frozen=True)
class RandomK(Selection):
    """See `random_k`."""

    ratio: float

    def compress(self, key, x):
        """The selected entries."""
        return x.reshape(-1)[self._positions(key, x)]

    def replace(self, key, x, payload):
        """`x` with other selected entries."""
        flat = x.reshape(-1).at[self._positions(key, x)].set(payload)
        return flat.reshape(x.shape)

    def _positions(self, key, x):
        size = share(x.size, self.ratio)
        if not size:
            return jnp.zeros(0, jnp.int32)
        return jax.random.choice(key, x.size, (size,), replace=False)


def random_block(ratio: float) -> RandomBlock:
    r"""Random block-wise sparsification (RBGS): one block of each leaf travels.

    Of a leaf of :math:`N` entries the block of :math:`\lceil N / r \rceil` entries from
    a uniformly random start on, cyclically; the same on all workers, so that a ring
    all-reduce averages it, and no indices travel. Not rescaled: it is meant for error
    feedback.

    Args:
      ratio: :math:`r \ge 1`, entries of the leaf for each entry that travels.

    Returns:
      The compressor.

    Raises:
      ValueError: If `ratio` is below 1.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Definition 1.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> block = dj.compression.random_block(4)
      >>> x, key = jnp.arange(1.0, 9.0), jax.random.key(0)
      >>> payload = block.compress(key, x)
      >>> payload.shape
      (2,)
      >>> int(jnp.count_nonzero(block.decompress(key, payload, x)))
      2
    """
    return RandomBlock(check_ratio(ratio))


def random_k(ratio: float) -> RandomK:
    r"""Random sparsification: :math:`\lceil N / r \rceil` entries of a leaf travel.

    Chosen uniformly without replacement, the same on all workers. Choosing sorts the
    leaf: `random_block` is much cheaper.

    Args:
      ratio: :math:`r \ge 1`, entries of the leaf for each entry that travels.

    Returns:
      The compressor.

    Raises:
      ValueError: If `ratio` is below 1.

    References:
      Stich, Cordonnier & Jaggi, "Sparsified SGD with Memory", NeurIPS 2018.
    """
    return RandomK(check_ratio(ratio))
