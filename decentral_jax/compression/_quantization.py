"""Quantization: few bits per entry travel."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from decentral_jax._exchange.numbers import widened
from decentral_jax.compression._base import Codec
from decentral_jax.validation import check_int


@dataclasses.dataclass(frozen=True)
class Sign(Codec):
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
class Quantize(Codec):
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
class Cast(Codec):
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
