"""The two extreme compressors: send everything, or send nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from decentral_jax.compression._base import Codec


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """See `identity`."""

    linear = True

    def compress(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the array itself."""
        del key
        return x

    def decompress(
        self,
        key: jax.Array,
        payload: jax.Array,
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns the array itself."""
        del key, like
        return payload


@dataclasses.dataclass(frozen=True)
class Nothing(Codec):
    """See `nothing`."""

    linear = True

    def compress(self, key: jax.Array, x: jax.Array) -> tuple[()]:
        """Returns an empty payload."""
        del key, x
        return ()

    def decompress(
        self,
        key: jax.Array,
        payload: tuple[()],
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns zeros."""
        del key, payload
        return jnp.zeros(like.shape, like.dtype)


def identity() -> Identity:
    r"""Constructs a codec that sends every entry, the uncompressed baseline.

    .. math:: C(x) = x

    Returns:
      The codec.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.error_feedback(dj.compression.identity())
    """
    return Identity()


def nothing() -> Nothing:
    r"""Constructs a codec that sends nothing.

    .. math:: C(x) = 0

    With this codec as its `compressor`, `dj.cser` sends only its resets. This is the
    published configuration that corresponds to partially local SGD (CSER-PL).

    Returns:
      The codec.

    References:
      Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
      Section 4 (the configurations of CSER).

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.cser(
      ...     0.1,
      ...     dj.compression.nothing(),
      ...     reset_compressor=dj.compression.random_block(8),
      ...     period=4,
      ... )
    """
    return Nothing()
