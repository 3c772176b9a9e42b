"""Compressors: average arrays over workers in fewer bytes than an all-reduce sends.

Lowercase functions such as `top_k` construct compressors. To write your own compressor,
implement `Compressor`, `Codec` or `Selection`.
"""

from decentral_jax.compression._base import Codec, Compressor, Exchange, Selection
from decentral_jax.compression._identity import Identity, Nothing, identity, nothing
from decentral_jax.compression._low_rank import LowRank, low_rank
from decentral_jax.compression._quantization import (
    Cast,
    Quantize,
    Sign,
    cast,
    quantize,
    sign,
)
from decentral_jax.compression._selection import (
    RandomBlock,
    RandomK,
    random_block,
    random_k,
)
from decentral_jax.compression._top_k import TopK, top_k

__all__ = [
    "Cast",
    "Codec",
    "Compressor",
    "Exchange",
    "Identity",
    "LowRank",
    "Nothing",
    "Quantize",
    "RandomBlock",
    "RandomK",
    "Selection",
    "Sign",
    "TopK",
    "cast",
    "identity",
    "low_rank",
    "nothing",
    "quantize",
    "random_block",
    "random_k",
    "sign",
    "top_k",
]
