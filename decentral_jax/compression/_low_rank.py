"""PowerSGD: low-rank compression of matrices."""

import dataclasses

import jax
import jax.numpy as jnp

from decentral_jax._exchange.numbers import widened
from decentral_jax._validation import check_int
from decentral_jax.compression._base import Exchange


@dataclasses.dataclass(frozen=True)
class LowRank:
    """See `low_rank`. It needs two exchanges, so it is a compressor but not a codec."""

    rank: int

    def init(self, leaves: list[jax.Array]) -> tuple[jax.Array, ...]:
        """Returns the initial right factors of the leaves to be factorized."""
        return tuple(self.start(x) for x in leaves if self.applies_to(x))

    def average(
        self,
        key: jax.Array,
        leaves: list[jax.Array],
        memory: tuple[jax.Array, ...],
        exchange: Exchange,
    ) -> tuple[list[jax.Array], list[jax.Array], tuple[jax.Array, ...]]:
        """Averages by one power iteration; see `Compressor.average`."""
        del key
        thin = [i for i, x in enumerate(leaves) if self.applies_to(x)]
        # First exchange: left factors, and the leaves that are sent uncompressed.
        sent = list(leaves)
        for i, right in zip(thin, memory, strict=True):
            sent[i] = self.left(leaves[i], right)
        arrived = exchange.mean(sent)
        own, mean = list(leaves), list(arrived)
        if not thin:
            return own, mean, ()
        # Second exchange: right factors, which are also the memory for the next step.
        lefts = [orthonormal(arrived[i]) for i in thin]
        rights = [self.right(leaves[i], p) for i, p in zip(thin, lefts, strict=True)]
        means = exchange.mean(rights)
        for i, p, right, right_mean in zip(thin, lefts, rights, means, strict=True):
            own[i] = self.product(p, right, leaves[i])
            mean[i] = self.product(p, right_mean, leaves[i])
        return own, mean, tuple(means)

    def applies_to(self, x: jax.Array) -> bool:
        """Returns whether the factors of a leaf have fewer entries than the leaf."""
        if x.ndim < 2 or not x.size:
            return False
        rows, columns = x.size // x.shape[-1], x.shape[-1]
        return self.rank * (rows + columns) < x.size

    def start(self, x: jax.Array) -> jax.Array:
        """Returns the initial right factor: random, and equal on all workers."""
        key = jax.random.key(x.size)
        return jax.random.normal(key, (x.shape[-1], self.rank), jnp.float32).astype(
            x.dtype
        )

    def left(self, x: jax.Array, right: jax.Array) -> jax.Array:
        r"""Returns :math:`M Q` for a leaf; the exchange averages it."""
        return x.reshape(-1, x.shape[-1]) @ right

    def right(self, x: jax.Array, left: jax.Array) -> jax.Array:
        r"""Returns :math:`M^T \hat P` for a leaf; the exchange averages it."""
        return x.reshape(-1, x.shape[-1]).T @ left

    def product(self, left: jax.Array, right: jax.Array, like: jax.Array) -> jax.Array:
        r"""Returns :math:`\hat P Q^T` in the shape of the leaf."""
        return (left @ right.T).reshape(like.shape)


def orthonormal(left: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the columns, computed in at least float32."""
    wide = widened(left.dtype)
    return jnp.linalg.qr(left.astype(wide))[0].astype(left.dtype)


def low_rank(rank: int) -> LowRank:
    r"""Constructs a PowerSGD compressor, which sends a matrix as two thin factors.

    Each step performs one power iteration per leaf,

    .. math::
       \hat P = \mathrm{orth}\Bigl(\frac1n \sum_i M_i Q\Bigr), \qquad
       Q' = \frac1n \sum_i M_i^T \hat P, \qquad \frac1n \sum_i M_i \approx \hat P Q'^T

    starting from the :math:`Q` of the previous step. The matrix :math:`M_i` of a leaf
    has its last axis as columns, and all other axes flattened into rows. Vectors, and
    matrices for which the factors have no fewer entries, are sent uncompressed.

    Args:
      rank: Number of columns of the factors.

    Returns:
      The compressor, for `error_feedback`. It performs two exchanges per step.

    Raises:
      TypeError: If `rank` is not an integer.
      ValueError: If `rank` is below 1.

    References:
      Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
      for Distributed Optimization", NeurIPS 2019, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> compressor = dj.compression.low_rank(2)
      >>> [q.shape for q in compressor.init([jnp.zeros((20, 30)), jnp.zeros(30)])]
      [(30, 2)]
    """
    return LowRank(check_int("rank", rank, minimum=1))
