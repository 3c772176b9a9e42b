"""PowerSGD: a matrix travels as two thin factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from decentral_jax._exchange.numbers import widened
from decentral_jax.compression._base import Exchange
from decentral_jax.validation import check_int


@dataclasses.dataclass(frozen=True)
class LowRank:
    """See `low_rank`. It has two exchanges, so it is a compressor and not a codec."""

    rank: int

    def init(self, leaves: list) -> tuple:
        """Returns the first right factors of the leaves that travel as factors."""
        return tuple(self.start(x) for x in leaves if self.applies_to(x))

    def average(
        self, key: jax.Array, leaves: list, memory: tuple, exchange: Exchange
    ) -> tuple[list, list, tuple]:
        """Averages by one power iteration; see `Compressor.average`."""
        del key
        thin = [i for i, x in enumerate(leaves) if self.applies_to(x)]
        # First exchange: left factors, and the leaves that travel whole.
        sent = list(leaves)
        for i, right in zip(thin, memory, strict=True):
            sent[i] = self.left(leaves[i], right)
        arrived = exchange.mean(sent)
        own, mean = list(leaves), list(arrived)
        if not thin:
            return own, mean, ()
        # Second exchange: right factors.
        lefts = [orthonormal(arrived[i]) for i in thin]
        rights = [self.right(leaves[i], p) for i, p in zip(thin, lefts, strict=True)]
        means = exchange.mean(rights)
        for i, p, right, right_mean in zip(thin, lefts, rights, means, strict=True):
            own[i] = self.product(p, right, leaves[i])
            mean[i] = self.product(p, right_mean, leaves[i])
        return own, mean, tuple(means)

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
