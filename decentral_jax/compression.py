"""Compressors: an array becomes the few arrays that travel, and comes back.

A compressor is a small object without arrays of its own. `compress(key, x)` gives the
payload, exactly what is sent and in the dtype in which it is sent;
`decompress(key, payload, like)` gives what the receiver makes of it. No collectives
here: `decentral_jax.transforms.compressed` sends the payloads.

Of a *linear* compressor the mean of the payloads is the payload of the mean, provided
all workers use the same key: one all-reduce of the payload averages it. Payloads of the
others are gathered, and averaged after decompression; there each worker has a key of
its own.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax.collectives import widened
from decentral_jax.validation import check_int, check_interval


class Compressor:
    """What all compressors have.

    Attributes:
      linear: Whether the mean of payloads is the payload of the mean.
      whole_model: Whether all leaves are compressed together, as one vector.
    """

    linear: ClassVar[bool]
    whole_model: bool = False

    def compress(self, key: jax.Array, x: jax.Array) -> Any:
        """The arrays that travel in place of `x`."""
        raise NotImplementedError

    def decompress(self, key: jax.Array, payload: Any, like: Any) -> jax.Array:
        """The array, of the shape and dtype of `like`, that a payload stands for."""
        raise NotImplementedError


class Selection(Compressor):
    """Entries at positions that follow from the key: no indices travel."""

    linear = True

    def replace(self, key: jax.Array, x: jax.Array, payload: jax.Array) -> jax.Array:
        """`x` with the selected entries replaced, in place where XLA can."""
        raise NotImplementedError

    def mask(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Whether an entry of `x` is selected, in its shape."""
        ones = jnp.ones_like(self.compress(key, x), bool)
        return self.replace(key, jnp.zeros(x.shape, bool), ones)

    def decompress(self, key: jax.Array, payload: Any, like: Any) -> jax.Array:
        """The selected entries, zero elsewhere."""
        return self.replace(key, jnp.zeros(like.shape, like.dtype), payload)


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
        return self._position(key, x) < _share(x.size, self.ratio)

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
        return start, _share(x.size, self.ratio)


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
        size = _share(x.size, self.ratio)
        if not size:
            return jnp.zeros(0, jnp.int32)
        return jax.random.choice(key, x.size, (size,), replace=False)


@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """See `top_k`."""

    ratio: float | None
    k: int | None
    whole_model: bool
    linear = False

    def compress(self, key, x):
        """Values and their positions."""
        del key
        k = self.k if self.k is not None else _share(x.size, self.ratio)
        if not x.size:
            k = 0
        if k > x.size:
            raise ValueError(
                f"k={k} must be at most the leaf's size, got a leaf of shape {x.shape} "
                f"with {x.size} entries: pass a smaller k, a ratio, or "
                "whole_model=True."
            )
        flat = x.reshape(-1)
        _, positions = lax.top_k(jnp.abs(flat), k)
        return flat[positions], positions.astype(jnp.int32)

    def decompress(self, key, payload, like):
        """The kept entries, zero elsewhere."""
        del key
        values, positions = payload
        flat = jnp.zeros(math.prod(like.shape), like.dtype).at[positions].set(values)
        return flat.reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Sign(Compressor):
    """See `sign`."""

    linear = False

    def compress(self, key, x):
        """Bits, eight to a byte, and the scale."""
        del key
        # The scale of a leaf without entries is zero, not NaN.
        scale = jnp.mean(jnp.abs(x)) if x.size else jnp.zeros([], x.dtype)
        return jnp.packbits(x.reshape(-1) >= 0), scale

    def decompress(self, key, payload, like):
        """Plus or minus the scale."""
        del key
        bits, scale = payload
        positive = jnp.unpackbits(bits, count=math.prod(like.shape))
        flat = jnp.where(positive.astype(bool), scale, -scale)
        return flat.reshape(like.shape).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Quantize(Compressor):
    """See `quantize`."""

    bits: int
    linear = False

    def compress(self, key, x):
        """Bit planes, eight entries to a byte, and the scale."""
        scale = jnp.max(jnp.abs(x), initial=0)
        top = 2**self.bits - 1
        wide = widened(x.dtype)
        safe = jnp.where(scale > 0, scale, 1).astype(wide)
        level = (x.reshape(-1).astype(wide) / safe + 1) * (top / 2)
        level += jax.random.uniform(key, level.shape, jnp.float32).astype(wide)
        level = jnp.clip(jnp.floor(level), 0, top).astype(jnp.uint8)
        planes = (level >> jnp.arange(self.bits, dtype=jnp.uint8)[:, None]) & 1
        return jnp.packbits(planes.astype(bool), axis=-1), scale

    def decompress(self, key, payload, like):
        """The quantized array."""
        del key
        packed, scale = payload
        planes = jnp.unpackbits(packed, axis=-1, count=math.prod(like.shape))
        wide = widened(like.dtype)
        weights = 2.0 ** jnp.arange(self.bits, dtype=wide)
        level = jnp.sum(planes.astype(wide) * weights[:, None], axis=0)
        x = (level * (2 / (2**self.bits - 1)) - 1) * scale.astype(wide)
        return x.reshape(like.shape).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class LowRank(Compressor):
    """See `low_rank`; two exchanges, so that it has methods of its own."""

    rank: int
    linear = True

    def applies_to(self, x: Any) -> bool:
        """Whether the factors are smaller than the leaf; else it travels whole."""
        if x.ndim < 2 or not x.size:
            return False
        rows, columns = x.size // x.shape[-1], x.shape[-1]
        return self.rank * (rows + columns) < x.size

    def start(self, x: Any) -> jax.Array:
        """The first right factor of a leaf: random, the same for equal shapes."""
        key = jax.random.key(x.size)
        return jax.random.normal(key, (x.shape[-1], self.rank), jnp.float32).astype(
            x.dtype
        )

    def left(self, x: jax.Array, right: jax.Array) -> jax.Array:
        r""":math:`M Q`, to be averaged."""
        return x.reshape(-1, x.shape[-1]) @ right

    def right(self, x: jax.Array, left: jax.Array) -> jax.Array:
        r""":math:`M^T \hat P`, to be averaged."""
        return x.reshape(-1, x.shape[-1]).T @ left

    def product(self, left: jax.Array, right: jax.Array, like: Any) -> jax.Array:
        r""":math:`\hat P Q^T` in the leaf's shape."""
        return (left @ right.T).reshape(like.shape)


def orthonormal(left: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns."""
    wide = widened(left.dtype)
    return jnp.linalg.qr(left.astype(wide))[0].astype(left.dtype)


@dataclasses.dataclass(frozen=True)
class Cast(Compressor):
    """See `cast`."""

    dtype: Any
    linear = True

    def compress(self, key, x):
        """The array in the other dtype."""
        del key
        return x.astype(self.dtype)

    def decompress(self, key, payload, like):
        """The array in its own dtype."""
        del key
        return payload.astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Identity(Compressor):
    """See `identity`."""

    linear = True

    def compress(self, key, x):
        """The array."""
        del key
        return x

    def decompress(self, key, payload, like):
        """The array."""
        del key, like
        return payload


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
    return RandomBlock(_ratio(ratio))


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
    return RandomK(_ratio(ratio))


def top_k(
    ratio: float | None = None, *, k: int | None = None, whole_model: bool = False
) -> TopK:
    r"""The entries of largest magnitude travel, with their positions.

    Args:
      ratio: :math:`\lceil N / r \rceil` entries are kept; or
      k: so many.
      whole_model: Choose among the entries of all leaves together, not leaf by leaf.

    Returns:
      The compressor.

    Raises:
      ValueError: If not exactly one of `ratio` and `k` is given, `ratio` is below 1 or
        `k` exceeds the leaf.

    References:
      Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP
      2017.
    """
    if (ratio is None) == (k is None):
        raise ValueError(f"give either ratio or k, got ratio={ratio} and k={k}.")
    if k is not None:
        k = check_int("k", k, minimum=1)
    return TopK(None if ratio is None else _ratio(ratio), k, bool(whole_model))


def sign() -> Sign:
    r"""One bit an entry and one scale a leaf.

    .. math:: C(x) = \frac{\|x\|_1}{N} \, \mathrm{sgn}(x), \qquad \mathrm{sgn}(0) = 1

    Returns:
      The compressor.

    References:
      Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019, Section 4.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> x, key = jnp.array([3.0, -1.0, 2.0]), jax.random.key(0)
      >>> bits, scale = dj.compression.sign().compress(key, x)
      >>> bits.dtype, bits.shape, float(scale)
      (dtype('uint8'), (1,), 2.0)
    """
    return Sign()


def quantize(bits: int) -> Quantize:
    r"""Unbiased stochastic rounding to :math:`2^b` evenly spaced levels.

    They lie between :math:`-\|x\|_\infty` and :math:`\|x\|_\infty`, a leaf.

    Args:
      bits: :math:`b`, bits an entry, 1 to 8; they travel packed.

    Returns:
      The compressor.

    Raises:
      ValueError: If `bits` is outside 1..8.

    References:
      Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
      Encoding", NeurIPS 2017, Section 3.1; with the largest magnitude as the norm, as
      in its Section 4, and levels that need no bit of their own for the sign.
    """
    bits = check_int("bits", bits, minimum=1)
    if bits > 8:
        raise ValueError(f"bits must be at most 8, got {bits}: pass cast('float16').")
    return Quantize(bits)


def low_rank(rank: int) -> LowRank:
    r"""PowerSGD: a matrix travels as two thin factors, by one power iteration.

    .. math::
       \hat P = \mathrm{orth}\Bigl(\frac1n \sum_i M_i Q\Bigr), \qquad
       Q' = \frac1n \sum_i M_i^T \hat P, \qquad \frac1n \sum_i M_i \approx \hat P Q'^T

    from the last step's :math:`Q`. All but a leaf's last axis become rows. Vectors, and
    matrices that the factors would not make smaller, travel whole.

    Args:
      rank: Columns of the factors.

    Returns:
      The compressor, for `error_feedback`; it has two exchanges a step.

    Raises:
      ValueError: If `rank` is below 1.

    References:
      Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
      for Distributed Optimization", NeurIPS 2019, Algorithm 1.
    """
    return LowRank(check_int("rank", rank, minimum=1))


def cast(dtype: Any) -> Cast:
    """Entries travel in another floating-point dtype, such as "bfloat16".

    Args:
      dtype: The dtype; sums of an all-reduce are taken in it, too.

    Returns:
      The compressor.

    Raises:
      TypeError: If `dtype` is no floating-point dtype.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise TypeError(
            f'dtype must be a floating-point dtype, got {dtype!r}: pass "bfloat16".'
        )
    return Cast(known)


def identity() -> Identity:
    """Everything travels: the baseline."""
    return Identity()


def check_compressor(value: Any, name: str = "compressor") -> None:
    """Checks that a value is a compressor, not the function that makes one."""
    if not isinstance(value, Compressor):
        raise TypeError(
            f"{name} must be a compressor, got {value!r}: call one of dj.compression, "
            f"such as {name}=dj.compression.random_block(64)."
        )


def _ratio(ratio: Any) -> float:
    check_interval("ratio", ratio, 1.0, math.inf, closed="left")
    return float(ratio)


def _share(size: int, ratio: float | None) -> int:
    """Entries that travel out of `size`: at least one, unless there is none."""
    assert ratio is not None
    return math.ceil(size / ratio)
