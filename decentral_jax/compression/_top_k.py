"""Top-k sparsification, which sends the entries of largest magnitude."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax._validation import check_int
from decentral_jax.compression._base import Codec, check_ratio, share


@dataclasses.dataclass(frozen=True)
class TopK(Codec):
    """See `top_k`."""

    ratio: float | None
    k: int | None
    whole_model: bool
    linear = False

    def compress(self, key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns values and positions of the kept entries, both `[k]`."""
        del key
        k = self.k if self.k is not None else share(x.size, self.ratio)
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

    def decompress(
        self,
        key: jax.Array,
        payload: tuple[jax.Array, jax.Array],
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns the kept entries, and 0 in all other places."""
        del key
        values, positions = payload
        flat = jnp.zeros(math.prod(like.shape), like.dtype).at[positions].set(values)
        return flat.reshape(like.shape)


def top_k(
    ratio: float | None = None, *, k: int | None = None, whole_model: bool = False
) -> TopK:
    r"""Constructs top-k sparsification, which sends the entries of largest magnitude.

    The payload holds the values and their int32 positions.

    Args:
      ratio: Compression ratio :math:`r \ge 1`: of a leaf of :math:`N` entries,
        :math:`\lceil N / r \rceil` are kept.
      k: Number of entries to keep. Pass exactly one of `ratio` and `k`.
      whole_model: Whether to choose among the entries of all leaves together, instead
        of in each leaf.

    Returns:
      The codec.

    Raises:
      ValueError: If not exactly one of `ratio` and `k` is given, if `ratio` is below 1,
        or, in `compress`, if `k` exceeds the number of entries.

    References:
      Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP
      2017.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> codec, key = dj.compression.top_k(k=2), jax.random.key(0)
      >>> x = jnp.array([1.0, -4.0, 0.5, 2.0])
      >>> codec.decompress(key, codec.compress(key, x), x)
      Array([ 0., -4.,  0.,  2.], dtype=float32)
    """
    if (ratio is None) == (k is None):
        raise ValueError(
            f"pass exactly one of ratio and k, got ratio={ratio} and k={k}."
        )
    if k is not None:
        k = check_int("k", k, minimum=1)
    return TopK(None if ratio is None else check_ratio(ratio), k, bool(whole_model))
