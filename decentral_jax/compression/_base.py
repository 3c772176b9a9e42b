"""What a compressor is: the protocol, and codecs, from which most are built.

A `Compressor` owns its exchange: it gets all leaves, talks to the other workers through
an `Exchange`, and returns their mean. A `Codec` is a compressor that turns one array
into the few arrays that travel, and back; gossip needs codecs. Both are small objects
without arrays of their own, and anybody can write one; see docs/contributing.md.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from decentral_jax._exchange.numbers import widened
from decentral_jax.validation import check_interval

Tree = TypeVar("Tree")


class Exchange(Protocol):
    """What a compressor may ask of the other workers: a bound worker axis."""

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    @property
    def index(self) -> jax.Array:
        """This worker's number, an int32 scalar."""
        ...

    def mean(self, tree: Tree) -> Tree:
        """Returns the mean over all workers, by all-reduce."""
        ...

    def gather(self, tree: Tree) -> Tree:
        """Returns all workers' arrays, leaves `[size, ...]`."""
        ...


@runtime_checkable
class Compressor(Protocol):
    """Averages arrays over workers in fewer bytes than an all-reduce sends."""

    def init(self, leaves: list[jax.Array]) -> Any:
        """Returns what the compressor remembers from step to step.

        Args:
          leaves: Arrays of the shapes and dtypes that `average` gets.

        Returns:
          A pytree of arrays; `()` if it remembers nothing. It must stay equal on all
          workers.
        """
        raise NotImplementedError

    def average(
        self, key: jax.Array, leaves: list[jax.Array], memory: Any, exchange: Exchange
    ) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """Sends this worker's arrays and averages what all workers sent.

        Args:
          key: A PRNG key that is equal on all workers and differs between steps.
          leaves: This worker's arrays.
          memory: From `init` or the last call.
          exchange: The way to the other workers.

        Returns:
          What arrived of this worker's arrays; the mean over workers of what arrived,
          bitwise the same on all; and the new memory. Arrays keep shapes and dtypes.
        """
        raise NotImplementedError


class Codec:
    """A compressor that works array by array: compress, send, decompress.

    If a codec is *linear*, the mean of the payloads is the payload of the mean,
    provided that all workers use the same key: one all-reduce of the payload averages
    it. Payloads of other codecs are gathered, and averaged after decompression; there
    each worker has a key of its own.

    Attributes:
      linear: Whether the mean of payloads is the payload of the mean.
      whole_model: Whether all leaves are compressed together, as one vector.
    """

    linear: ClassVar[bool]
    whole_model: bool = False

    def compress(self, key: jax.Array, x: jax.Array) -> Any:
        """Returns the arrays that travel in place of `x`, a pytree."""
        raise NotImplementedError

    def decompress(self, key: jax.Array, payload: Any, like: Any) -> jax.Array:
        """Returns the array, of the shape and dtype of `like`, for a payload."""
        raise NotImplementedError

    def init(self, leaves: list[jax.Array]) -> Any:
        """Returns the memory of a codec, which is empty."""
        del leaves
        return ()

    def average(
        self, key: jax.Array, leaves: list[jax.Array], memory: Any, exchange: Exchange
    ) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """Sends payloads and averages them; see `Compressor.average`."""
        payloads, decode = self.encode(key, leaves, exchange)
        own = decode(payloads)
        if self.linear:
            return own, decode(exchange.mean(payloads)), memory
        arrived = exchange.gather(payloads)
        return own, _mean_of_gathered(decode, arrived, leaves, exchange.size), memory

    def encode(
        self, key: jax.Array, leaves: list[jax.Array], exchange: Exchange
    ) -> tuple[list, Callable[[list], list[jax.Array]]]:
        """Returns the payloads of a step, and what turns any worker's into arrays."""
        arrays, unflatten = self.flatten_for(leaves)
        keys = self.keys(key, len(arrays), exchange)
        payloads = [self.compress(*each) for each in zip(keys, arrays, strict=True)]

        def decode(payloads):
            triples = zip(keys, payloads, arrays, strict=True)
            return unflatten([self.decompress(*each) for each in triples])

        return payloads, decode

    def keys(self, key: jax.Array, count: int, exchange: Exchange) -> list[jax.Array]:
        """Returns one key per array; a worker's own unless the codec is linear."""
        if not self.linear:
            key = jax.random.fold_in(key, exchange.index)
        return list(jax.random.split(key, count))

    def flatten_for(
        self, leaves: list[jax.Array]
    ) -> tuple[list[jax.Array], Callable[[list], list[jax.Array]]]:
        """Returns the arrays to compress, one by one or joined, and the way back."""
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
    decode: Callable[[list], list], payloads: list, leaves: list, size: int
) -> list:
    """Averages decompressed payloads, one dense array at a time."""
    zeros = [jnp.zeros(x.shape, widened(x.dtype)) for x in leaves]

    def add(j, sums):
        arrived = decode(jax.tree.map(lambda p: p[j], payloads))
        return [s + x.astype(s.dtype) for s, x in zip(sums, arrived, strict=True)]

    sums = lax.fori_loop(1, size, add, add(0, zeros))
    return [(s / size).astype(x.dtype) for s, x in zip(sums, leaves, strict=True)]


class Selection(Codec):
    """A codec that sends entries at positions that follow from the key: no indices."""

    linear = True

    def replace(self, key: jax.Array, x: jax.Array, payload: jax.Array) -> jax.Array:
        """Returns `x` with the selected entries replaced, in place where XLA can."""
        raise NotImplementedError

    def mask(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Returns whether an entry of `x` is selected, in its shape."""
        ones = jnp.ones_like(self.compress(key, x), bool)
        return self.replace(key, jnp.zeros(x.shape, bool), ones)

    def decompress(self, key: jax.Array, payload: Any, like: Any) -> jax.Array:
        """Returns the selected entries, zero elsewhere."""
        return self.replace(key, jnp.zeros(like.shape, like.dtype), payload)


def check_compressor(value: Any, name: str = "compressor") -> None:
    """Checks that a value is a compressor, not the function that makes one."""
    if isinstance(value, type) or not isinstance(value, Compressor):
        raise TypeError(
            f"{name} must be a compressor, got {value!r}: call one of dj.compression, "
            f"such as {name}=dj.compression.random_block(64)."
        )


def check_codec(value: Any, name: str = "compressor") -> None:
    """Checks that a value is a codec, which gossip needs."""
    check_compressor(value, name)
    if not isinstance(value, Codec):
        raise TypeError(
            f"{name}={value!r} needs an average over all workers at each exchange: "
            f"pass a codec for gossip, such as {name}=dj.compression.random_block(64)."
        )


def check_ratio(ratio: Any) -> float:
    """Returns a compression ratio as a float, after checking it."""
    return float(check_interval("ratio", ratio, 1.0, math.inf, closed="left"))


def share(size: int, ratio: float | None) -> int:
    """Returns how many entries out of `size` travel: at least one, if there are any."""
    assert ratio is not None
    return math.ceil(size / ratio)
