"""Quantization: compressors that send few bits per entry."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from decentral_jax._exchange.numbers import widened
from decentral_jax._validation import check_int
from decentral_jax.compression._base import Codec


@dataclasses.dataclass(frozen=True)
class Sign(Codec):
    """See `sign`."""

    linear = False

    def compress(self, key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the signs, eight per byte, and the scale."""
        del key
        # The scale of a leaf without entries is 0; the mean would be NaN.
        scale = jnp.mean(jnp.abs(x)) if x.size else jnp.zeros([], x.dtype)
        return jnp.packbits(x.reshape(-1) >= 0), scale

    def decompress(
        self,
        key: jax.Array,
        payload: tuple[jax.Array, jax.Array],
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns plus or minus the scale for each entry."""
        del key
        bits, scale = payload
        positive = jnp.unpackbits(bits, count=math.prod(like.shape))
        flat = jnp.where(positive.astype(bool), scale, -scale)
        return flat.reshape(like.shape).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Quantize(Codec):
    """See `quantize`."""

    bits: int
    linear = False

    def compress(self, key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns one bit plane per bit, with eight entries per byte, and the scale."""
        scale = jnp.max(jnp.abs(x), initial=0)
        top = 2**self.bits - 1
        # Map [-scale, scale] to [0, top], and round up with a probability equal to the
        # fractional part, so that the level is unbiased.
        wide = widened(x.dtype)
        safe = jnp.where(scale > 0, scale, 1).astype(wide)
        level = (x.reshape(-1).astype(wide) / safe + 1) * (top / 2)
        level += jax.random.uniform(key, level.shape, jnp.float32).astype(wide)
        level = jnp.clip(jnp.floor(level), 0, top).astype(jnp.uint8)
        # Bit planes [bits, size], packed along the entries.
        planes = (level >> jnp.arange(self.bits, dtype=jnp.uint8)[:, None]) & 1
        return jnp.packbits(planes.astype(bool), axis=-1), scale

    def decompress(
        self,
        key: jax.Array,
        payload: tuple[jax.Array, jax.Array],
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns the quantized array."""
        del key
        # Sum the bit planes to levels, and map [0, top] back to [-scale, scale].
        packed, scale = payload
        planes = jnp.unpackbits(packed, axis=-1, count=math.prod(like.shape))
        wide = widened(like.dtype)
        weights = 2.0 ** jnp.arange(self.bits, dtype=wide)
        level = jnp.sum(planes.astype(wide) * weights[:, None], axis=0)
        x = (level * (2 / (2**self.bits - 1)) - 1) * scale.astype(wide)
        return x.reshape(like.shape).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """See `cast`."""

    dtype: jnp.dtype
    linear = True

    def compress(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Casts the array to the dtype in which it is sent."""
        del key
        return x.astype(self.dtype)

    def decompress(
        self,
        key: jax.Array,
        payload: jax.Array,
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Casts the array back to its own dtype."""
        del key
        return payload.astype(like.dtype)


def sign() -> Sign:
    r"""Constructs a sign compressor, which sends 1 bit per entry and 1 scale per leaf.

    .. math:: C(x) = \frac{\|x\|_1}{N} \, \mathrm{sgn}(x), \qquad \mathrm{sgn}(0) = 1

    Here :math:`N` is the number of entries of the leaf.

    Returns:
      The codec.

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
    r"""Constructs a quantizer, which rounds stochastically to :math:`2^b` levels.

    The levels of a leaf :math:`x` are evenly spaced between :math:`-\|x\|_\infty` and
    :math:`\|x\|_\infty`. The rounding is unbiased. A payload holds the packed levels,
    and one scale per leaf.

    Args:
      bits: :math:`b`, number of bits per entry, from 1 to 8.

    Returns:
      The codec.

    Raises:
      TypeError: If `bits` is not an integer.
      ValueError: If `bits` is not between 1 and 8.

    References:
      Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
      Encoding", NeurIPS 2017, Section 3.1; with the largest magnitude as the norm, as
      in its Section 4, and levels that need no extra bit for the sign.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> x, key = jnp.linspace(-1.0, 1.0, 16), jax.random.key(0)
      >>> levels, scale = dj.compression.quantize(bits=2).compress(key, x)
      >>> levels.nbytes, float(scale)
      (4, 1.0)
    """
    bits = check_int("bits", bits, minimum=1)
    if bits > 8:
        raise ValueError(f"bits must be at most 8, got {bits}: pass cast('float16').")
    return Quantize(bits)


def cast(dtype: jax.typing.DTypeLike) -> Cast:
    """Constructs a codec that sends entries in another floating-point dtype.

    Args:
      dtype: Dtype to send, such as "bfloat16". An all-reduce also sums in this dtype.

    Returns:
      The codec.

    Raises:
      TypeError: If `dtype` is not a floating-point dtype.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> codec = dj.compression.cast("bfloat16")
      >>> codec.compress(jax.random.key(0), jnp.ones(4)).nbytes
      8
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
