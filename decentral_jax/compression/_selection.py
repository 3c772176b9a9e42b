"""Random sparsification, with positions from a shared key instead of sent indices."""

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

    def compress(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the entries of the block, `[size]`."""
        if not x.size:
            return x.reshape(-1)
        start, size = self._block(key, x)
        flat = x.reshape(-1)
        # A block of more than half of the entries: gather it.
        if 2 * size > flat.size:
            return flat[(start + jnp.arange(size, dtype=jnp.int32)) % flat.size]
        # A smaller block: slices are cheaper than a gather.
        window, offset = _window(flat, start, size)
        return lax.dynamic_slice(window, (offset,), (size,))

    def replace(self, key: jax.Array, x: jax.Array, payload: jax.Array) -> jax.Array:
        """Replaces the block of `x` by the payload, in place if XLA can."""
        if not x.size:
            return x
        start, size = self._block(key, x)
        # Everything that reads `x` runs first, so that XLA does not have to copy it.
        flat, payload = lax.optimization_barrier((x.reshape(-1), payload))
        if 2 * size > flat.size:
            positions = (start + jnp.arange(size, dtype=jnp.int32)) % flat.size
            return flat.at[positions].set(payload).reshape(x.shape)
        window, offset = _window(flat, start, size)
        window = _write(window, payload, offset)
        # Write the head first. If the block does not wrap around, this rewrites old
        # entries, some of which the second write may replace.
        flat = _write(flat, window[size:], jnp.zeros_like(start))
        flat = _write(flat, window[:size], jnp.minimum(start, flat.size - size))
        return lax.optimization_barrier(flat).reshape(x.shape)

    def mask(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns whether each entry of `x` lies in the block."""
        if not x.size:
            return jnp.zeros(x.shape, bool)
        return self._position(key, x) < share(x.size, self.ratio)

    def decompress(
        self,
        key: jax.Array,
        payload: jax.Array,
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns the block, and 0 in all other places.

        It is one elementwise pass, which XLA fuses with the code that uses the result.
        """
        if not math.prod(like.shape):
            return jnp.zeros(like.shape, like.dtype)
        position = self._position(key, like)
        entries = payload[jnp.minimum(position, payload.size - 1)]
        return jnp.where(position < payload.size, entries, jnp.zeros_like(entries))

    def _position(
        self, key: jax.Array, x: jax.Array | jax.ShapeDtypeStruct
    ) -> jax.Array:
        """Returns the cyclic distance of each entry from the start of the block."""
        start, _ = self._block(key, x)
        size = math.prod(x.shape)
        position = lax.iota(jnp.int32, size).reshape(x.shape) - start
        return jnp.where(position < 0, position + size, position)

    def _block(
        self, key: jax.Array, x: jax.Array | jax.ShapeDtypeStruct
    ) -> tuple[jax.Array, int]:
        """Returns the start of the block, an int32 scalar, and its size."""
        # One draw compiles much faster than the three draws of `randint`. It makes the
        # first entries more likely by N / 2^32, which is negligible.
        bits = jax.random.bits(key, (), jnp.uint32)
        start = (bits % jnp.uint32(x.size)).astype(jnp.int32)
        return start, share(x.size, self.ratio)


def _window(
    flat: jax.Array, start: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the entries around a cyclic block, and the position of the block in them.

    Args:
      flat: Vector of at least `2 * size` entries.
      start: Start of the block, an int32 scalar.
      size: Size of the block.

    Returns:
      The window `[2 * size]`, and the start of the block in it. The window consists of
      `size` entries from `start` on, or the last `size` entries if the block wraps
      around, followed by the first `size` entries of the vector. A block that wraps
      around is contiguous in the window.
    """
    tail = jnp.minimum(start, flat.size - size)
    window = jnp.concatenate([lax.dynamic_slice(flat, (tail,), (size,)), flat[:size]])
    return window, start - tail


@jax.custom_batching.custom_vmap
def _write(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    """Overwrites a block of the last axis, in place if XLA can.

    By default, `vmap` turns `dynamic_update_slice` into a scatter, for which XLA copies
    the array. Here the start is equal on all workers, so the custom rule below keeps
    one `dynamic_update_slice`.
    """
    # All start indices must have one dtype, also under `jax_enable_x64`.
    zero = jnp.zeros_like(start)
    return lax.dynamic_update_slice(x, block, (*(zero,) * (x.ndim - 1), start))


@_write.def_vmap
def _write_mapped(axis_size, in_batched, x, block, start):
    x_batched, block_batched, start_batched = in_batched
    # An outer `vmap` over runs with different keys: use the default rule.
    if start_batched:
        axes = [0 if batched else None for batched in in_batched]
        mapped = jax.vmap(_write.fun, in_axes=axes, axis_size=axis_size)
        return mapped(x, block, start), True
    # The start is shared: write the block of every worker along the last axis.
    if not x_batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    if not block_batched:
        block = jnp.broadcast_to(block, (axis_size, *block.shape))
    return _write(x, block, start), True


@dataclasses.dataclass(frozen=True)
class RandomK(Selection):
    """See `random_k`."""

    ratio: float

    def compress(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the selected entries, `[k]`."""
        return x.reshape(-1)[self._positions(key, x)]

    def replace(self, key: jax.Array, x: jax.Array, payload: jax.Array) -> jax.Array:
        """Replaces the selected entries of `x` by the payload."""
        flat = x.reshape(-1).at[self._positions(key, x)].set(payload)
        return flat.reshape(x.shape)

    def _positions(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns distinct positions in the flattened array, `[k]`."""
        size = share(x.size, self.ratio)
        if not size:
            return jnp.zeros(0, jnp.int32)
        return jax.random.choice(key, x.size, (size,), replace=False)


def random_block(ratio: float) -> RandomBlock:
    r"""Constructs random block-wise sparsification (RBGS): one block per leaf is sent.

    From a leaf of :math:`N` entries it sends a block of :math:`\lceil N / r \rceil`
    consecutive entries, which starts at a uniformly random entry and wraps around at
    the end. The block is the same on all workers, so a ring all-reduce averages it, and
    no indices are sent. Entries are not rescaled, because the codec is meant for error
    feedback.

    Args:
      ratio: :math:`r \ge 1`, number of entries of the leaf per entry sent.

    Returns:
      The codec.

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
    r"""Constructs random sparsification, which sends uniformly chosen entries.

    From a leaf of :math:`N` entries it sends :math:`\lceil N / r \rceil` entries,
    chosen without replacement, and the same on all workers. The choice sorts the whole
    leaf, so `random_block` is much cheaper.

    Args:
      ratio: :math:`r \ge 1`, number of entries of the leaf per entry sent.

    Returns:
      The codec.

    Raises:
      ValueError: If `ratio` is below 1.

    References:
      Stich, Cordonnier & Jaggi, "Sparsified SGD with Memory", NeurIPS 2018.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> codec, key = dj.compression.random_k(4), jax.random.key(0)
      >>> codec.compress(key, jnp.arange(1.0, 9.0)).shape
      (2,)
    """
    return RandomK(check_ratio(ratio))
