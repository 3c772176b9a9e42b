"""The two ends: everything travels, or nothing does."""

import dataclasses

import jax.numpy as jnp

from decentral_jax.compression._base import Codec


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
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


@dataclasses.dataclass(frozen=True)
class Nothing(Codec):
    """See `nothing`."""

    linear = True

    def compress(self, key, x):
        """Returns no array."""
        del key, x
        return ()

    def decompress(self, key, payload, like):
        """Returns zeros."""
        del key, payload
        return jnp.zeros(like.shape, like.dtype)


def identity() -> Identity:
    """Everything travels: the baseline."""
    return Identity()


def nothing() -> Nothing:
    r"""Nothing travels, :math:`C(x) = 0`.

    With it as `compressor`, `dj.cser` sends only its resets, as in the published
    setting that partially local SGD is (CSER-PL).

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
