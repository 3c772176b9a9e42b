"""The library's random draws for the NumPy references, which compute the values.

A key determines which entries a compressor selects, or how it rounds. This module takes
these draws from the library. The arithmetic on the entries is the reference's own.
"""

import functools

import jax
import numpy as np

from decentral_jax import compression as library
from tests.reference import compression

LEAVES = (4, 6)  # default sizes of the leaves that make up the reference's vector


def dense(compressor, of_step=lambda key: key, seed=0, leaves=LEAVES):
    """`compress(t, i, v)` for a reference; `of_step` derives the key of a step."""

    @functools.cache
    def keys(t, i):
        key = of_step(jax.random.fold_in(jax.random.key(seed), t))
        if not compressor.linear:
            key = jax.random.fold_in(key, i)
        return jax.random.split(key, 1 if compressor.whole_model else len(leaves))

    draw, apply = KINDS[type(compressor)]

    @functools.cache
    def drawn(t, i, leaf, size):
        return draw(compressor, keys(t, i)[leaf], size)

    def compress(t, i, v):
        ends = () if compressor.whole_model else np.cumsum(leaves)[:-1]
        worker = 0 if compressor.linear else i
        sent = [
            apply(compressor, part, drawn(t, worker, leaf, part.size))
            if part.size
            else part
            for leaf, part in enumerate(np.split(v, ends))
        ]
        return np.concatenate(sent)

    return compress


def _selected(compressor, key, size):
    return np.asarray(compressor.compress(key, np.arange(size)))


def _uniform(compressor, key, size):
    return np.asarray(jax.random.uniform(key, (size,), np.float32), np.float64)


def _nothing(compressor, key, size):
    return None


def _top_k(compressor, v, _):
    k = compressor.k or int(np.ceil(v.size / compressor.ratio))
    return compression.top_k(v, k=k)


# Type -> (function that draws for a leaf, function that applies the draw to the leaf)
KINDS = {
    library.RandomBlock: (
        _selected,
        lambda compressor, v, selected: compression.random_block(
            v, compressor.ratio, selected[0]
        ),
    ),
    library.RandomK: (
        _selected,
        lambda compressor, v, selected: compression.random_k(v, selected),
    ),
    library.TopK: (_nothing, _top_k),
    library.Sign: (_nothing, lambda compressor, v, _: compression.sign(v)),
    library.Quantize: (
        _uniform,
        lambda compressor, v, uniform: compression.quantize(
            v, compressor.bits, uniform
        ),
    ),
    library.Identity: (_nothing, lambda compressor, v, _: v),
}
