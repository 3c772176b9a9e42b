"""The compressor protocol, and codecs, from which most compressors are built.

A `Compressor` controls its exchange: it receives all leaves, communicates with the
other workers through an `Exchange`, and returns the mean. A `Codec` is a compressor
that encodes one array at a time as a payload of few bytes; gossip needs codecs. Both
are small objects that hold no arrays, and users can write their own; see
docs/contributing.md.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from decentral_jax._exchange.numbers import PyTree, wide_zeros
from decentral_jax._validation import check_interval

Tree = TypeVar("Tree")


class Exchange(Protocol):
    """Communication that a compressor may use; a bound worker axis implements it."""

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    @property
    def index(self) -> jax.Array:
        """Number of this worker, counted from 0: an int32 scalar."""
        ...

    def mean(self, tree: Tree) -> Tree:
        """Returns the mean over all workers, computed by one all-reduce."""
        ...

    def gather(self, tree: Tree) -> Tree:
        """Returns the arrays of all workers, with leaves `[size, ...]`."""
        ...


@runtime_checkable
class Compressor(Protocol):
    """Averages arrays over workers in fewer bytes than an all-reduce sends."""

    def init(self, leaves: list[jax.Array]) -> PyTree:
        """Returns the initial memory, the compressor's state between steps.

        Args:
          leaves: Arrays with the shapes and dtypes that `average` receives.

        Returns:
          A pytree of arrays, which must stay equal on all workers. `()` if the
          compressor has no state.
        """
        raise NotImplementedError

    def average(
        self,
        key: jax.Array,
        leaves: list[jax.Array],
        memory: PyTree,
        exchange: Exchange,
    ) -> tuple[list[jax.Array], list[jax.Array], PyTree]:
        """Sends this worker's arrays, compressed, and averages over workers.

        Args:
          key: PRNG key, equal on all workers and different in each step.
          leaves: This worker's arrays.
          memory: Result of `init`, or the memory that the last call returned.
          exchange: Communication with the other workers.

        Returns:
          A triple of this worker's arrays after compression and decompression, the mean
          of these arrays over all workers (bitwise equal on all of them), and the new
          memory. Arrays keep their shapes and dtypes.
        """
        raise NotImplementedError


class Codec:
    """A compressor that works array by array: compress, send, decompress.

    A codec is *linear* if the mean of the payloads is the payload of the mean, provided
    that all workers use the same key. One all-reduce of the payloads then averages
    them. The payloads of other codecs are gathered, and averaged after decompression;
    each worker then uses its own key.

    Attributes:
      linear: Whether the codec is linear.
      whole_model: Whether to compress all leaves together, as one vector.
    """

    linear: ClassVar[bool]
    whole_model: bool = False

    def compress(self, key: jax.Array, x: jax.Array) -> PyTree:
        """Compresses an array.

        Args:
          key: PRNG key.
          x: Array of any shape.

        Returns:
          The payload: a pytree of the arrays to send in place of `x`.
        """
        raise NotImplementedError

    def decompress(
        self,
        key: jax.Array,
        payload: PyTree,
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Decompresses a payload.

        Args:
          key: The key that `compress` used.
          payload: Result of `compress`, or a mean of such results if `linear`.
          like: Array whose shape and dtype the result takes; its values are not used.

        Returns:
          The decompressed array.
        """
        raise NotImplementedError

    def init(self, leaves: list[jax.Array]) -> PyTree:
        """Returns the memory of a codec, which is empty."""
        del leaves
        return ()

    def average(
        self,
        key: jax.Array,
        leaves: list[jax.Array],
        memory: PyTree,
        exchange: Exchange,
    ) -> tuple[list[jax.Array], list[jax.Array], PyTree]:
        """Sends payloads and averages them; see `Compressor.average`."""
        payloads, decode = self.encode(key, leaves, exchange)
        own = decode(payloads)
        # Linear: one all-reduce of the payloads, one decompression.
        if self.linear:
            return own, decode(exchange.mean(payloads)), memory
        # Not linear: gather all payloads, decompress each of them, and average.
        arrived = exchange.gather(payloads)
        return own, _mean_of_gathered(decode, arrived, leaves, exchange.size), memory

    def encode(
        self, key: jax.Array, leaves: list[jax.Array], exchange: Exchange
    ) -> tuple[list, Callable[[list], list[jax.Array]]]:
        """Compresses the leaves of a step.

        Args:
          key: PRNG key, equal on all workers.
          leaves: This worker's arrays.
          exchange: Communication with the other workers.

        Returns:
          A pair: one payload per array, and a function that decompresses the payloads
          of any worker into a list of leaves.
        """
        arrays, unflatten = self.flatten_for(leaves)
        keys = self.keys(key, len(arrays), exchange)
        payloads = [self.compress(*each) for each in zip(keys, arrays, strict=True)]

        def decode(payloads):
            triples = zip(keys, payloads, arrays, strict=True)
            return unflatten([self.decompress(*each) for each in triples])

        return payloads, decode

    def keys(self, key: jax.Array, count: int, exchange: Exchange) -> list[jax.Array]:
        """Returns one key per array; keys differ between workers unless `linear`."""
        if not self.linear:
            key = jax.random.fold_in(key, exchange.index)
        return list(jax.random.split(key, count))

    def flatten_for(
        self, leaves: list[jax.Array]
    ) -> tuple[list[jax.Array], Callable[[list], list[jax.Array]]]:
        """Joins the leaves into one vector if `whole_model`.

        Returns:
          A pair: the arrays to compress, and a function from arrays of these shapes to
          leaves.
        """
        if not self.whole_model:
            return leaves, lambda arrays: arrays
        dtypes = {leaf.dtype for leaf in leaves}
        if len(dtypes) > 1:
            raise TypeError(
                "whole_model=True needs leaves of one dtype, got "
                f"{sorted(map(str, dtypes))}: cast them, or compress leaf by leaf."
            )
        flat, unravel = ravel_pytree(leaves)
        return [flat], lambda arrays: unravel(arrays[0])


def _mean_of_gathered(
    decode: Callable[[list], list[jax.Array]],
    payloads: list,
    leaves: list[jax.Array],
    size: int,
) -> list[jax.Array]:
    """Averages gathered payloads, with leaves `[size, ...]`, after decompression.

    It decompresses one worker's payloads at a time, so that only one dense copy of the
    leaves exists besides the sum.
    """
    zeros = [wide_zeros(x) for x in leaves]

    def add(j, sums):
        arrived = decode(jax.tree.map(lambda p: p[j], payloads))
        return [s + x.astype(s.dtype) for s, x in zip(sums, arrived, strict=True)]

    sums = lax.fori_loop(1, size, add, add(0, zeros))
    return [(s / size).astype(x.dtype) for s, x in zip(sums, leaves, strict=True)]


class Selection(Codec):
    """A codec that sends selected entries, whose positions follow from the key.

    All workers use the same key, so they send no indices.
    """

    linear = True

    def replace(self, key: jax.Array, x: jax.Array, payload: jax.Array) -> jax.Array:
        """Replaces the selected entries of `x` by the payload, in place if XLA can."""
        raise NotImplementedError

    def mask(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns a boolean array of the shape of `x`: whether an entry is selected."""
        ones = jnp.ones_like(self.compress(key, x), bool)
        return self.replace(key, jnp.zeros(x.shape, bool), ones)

    def decompress(
        self,
        key: jax.Array,
        payload: PyTree,
        like: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.Array:
        """Returns an array with the selected entries, and 0 in all other places."""
        return self.replace(key, jnp.zeros(like.shape, like.dtype), payload)


def check_compressor(value: Any, name: str = "compressor") -> None:
    """Checks that a value is a compressor, not the function that constructs one."""
    if isinstance(value, type) or not isinstance(value, Compressor):
        raise TypeError(
            f"{name} must be a compressor, got {value!r}: call a function of "
            f"dj.compression, such as {name}=dj.compression.random_block(64)."
        )


def check_codec(value: Any, name: str = "compressor") -> None:
    """Checks that a value is a codec, which gossip needs."""
    check_compressor(value, name)
    if not isinstance(value, Codec):
        raise TypeError(
            f"{name}={value!r} needs an average over all workers at each exchange, "
            "which gossip does not compute: pass a codec, such as "
            f"{name}=dj.compression.random_block(64)."
        )


def check_ratio(ratio: Any) -> float:
    """Checks a compression ratio, at least 1, and returns it as a float."""
    return float(check_interval("ratio", ratio, 1.0, math.inf, closed="left"))


def share(size: int, ratio: float | None) -> int:
    """Returns the number of entries out of `size` to send: at least 1 unless empty."""
    assert ratio is not None
    # A ratio such as 1 / (1 - 0.99) is meant to be 100 and falls just below.
    return math.ceil(round(size / ratio, 6))
