"""Top-k sparsification: the entries of largest magnitude travel."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from decentral_jax.compression._base import Codec, check_ratio, share
from decentral_jax.validation import check_int


@dataclasses.dataclass(frozen=True)
class TopK(Codec):
    """See `top_k`."""

    ratio: float | None
    k: int | None
    whole_model: bool
    linear = False

    def compress(self, key, x):
        """Values and their positions."""
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

    def decompress(self, key, payload, like):
        """The kept entries, zero elsewhere."""
        del key
        values, positions = payload
        flat = jnp.zeros(math.prod(like.shape), like.dtype).at[positions].set(values)
        return flat.reshape(like.shape)


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
    return TopK(None if ratio is None else check_ratio(ratio), k, bool(whole_model))
