"""Batches of training examples for all workers, read on the host.

`Loader` reads batches from NumPy arrays, and `prefetch` puts them on the workers'
devices ahead of time. Both save and restore their position in the same way as the
iterators of Grain, so each can be replaced by another iterator. `split` divides a whole
set among the workers, for evaluation.
"""

import collections
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from decentral_jax._exchange.numbers import PyTree
from decentral_jax._validation import check_int
from decentral_jax.workers import Workers

__all__ = ["Loader", "Prefetcher", "prefetch", "split"]


class Loader(Iterator[PyTree]):
    """Reads batches for all workers from NumPy arrays.

    Each worker has a shard of the examples, and makes passes over it. A worker begins
    its next pass when fewer than `batch_size` examples are left, so that all batches
    are full. The examples left over are skipped in that pass. With a seed, each pass
    has another order, and skips other examples; without a seed, each pass skips the
    last examples of the shard.

    The order of a pass depends only on the seed, the worker's number, and the number of
    the pass. It is the same in every process, on every layout, and with every version
    of NumPy.

    Args:
      data: A pytree of NumPy arrays `[examples, ...]`, such as `(images, labels)`.
        Memory-mapped arrays (`np.load(path, mmap_mode="r")`) are read batch by batch.
      workers: The workers. In a run of several processes, each process reads only the
        examples of its own workers.
      batch_size: Number of examples per worker and batch.
      shards: Numbers of the examples of each worker, one array per worker, in the
        order in which `Workers.local` numbers workers. Shards may have different sizes
        and may overlap. If None, worker i of n has the examples i, i + n, i + 2n, and
        so on.
      seed: Seed of the order. If None, workers read their shards in order.
      epochs: Number of epochs after which the iterator ends. If None, it never ends.

    Attributes:
      batches_per_epoch: Number of batches in an epoch: one pass over the largest shard.

    Raises:
      TypeError: If any leaf of `data` is not a NumPy or JAX array, or any number is not
        an integer.
      ValueError: If leaves have different numbers of examples; any shard holds fewer
        than `batch_size` examples, or examples that do not exist; or the number of
        shards is not the number of workers.

    Example:
      >>> import decentral_jax as dj, numpy as np
      >>> workers = dj.Workers(2)
      >>> loader = dj.data.Loader(np.arange(10), workers, batch_size=2, seed=None)
      >>> next(loader)
      array([[0, 2],
             [1, 3]])
      >>> position = loader.get_state()
      >>> next(loader)
      array([[4, 6],
             [5, 7]])
      >>> loader.set_state(position)
      >>> next(loader)
      array([[4, 6],
             [5, 7]])
    """

    def __init__(
        self,
        data: PyTree,
        workers: Workers,
        batch_size: int,
        *,
        shards: Sequence[Any] | None = None,
        seed: int | None = 0,
        epochs: int | None = None,
    ):
        self._data, self._num_examples = _as_examples(data)
        self._workers = workers
        self._batch_size = check_int("batch_size", batch_size, minimum=1)
        self._seed = None if seed is None else check_int("seed", seed, minimum=0)
        self._epochs = None if epochs is None else check_int("epochs", epochs, 1)
        n = workers.num_workers
        self._shards = None
        if shards is not None:
            self._shards = _as_shards(shards, n, self._num_examples)
        # The number of full batches in one pass of each worker.
        sizes = (
            [len(range(worker, self._num_examples, n)) for worker in range(n)]
            if self._shards is None
            else [len(shard) for shard in self._shards]
        )
        self._passes = [size // self._batch_size for size in sizes]
        if min(self._passes) == 0:
            worker = int(np.argmin(sizes))
            raise ValueError(
                f"batch_size={batch_size} is more than the {sizes[worker]} examples of "
                f"worker {worker}: pass a smaller batch_size, or larger shards."
            )
        self.batches_per_epoch = max(self._passes)
        self._batches = 0  # returned so far
        # The latest pass of each worker in this process, and its order.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __next__(self) -> PyTree:
        """Returns the next batch of the workers in this process.

        Returns:
          The tree of `data` with NumPy arrays `[workers, batch_size, ...]`, to pass to
          `workers.shard(batch, local=True)`.
        """
        if (
            self._epochs is not None
            and self._batches >= self._epochs * self.batches_per_epoch
        ):
            raise StopIteration
        local = self._workers.local
        rows = np.stack([self._rows(int(worker)) for worker in local.flat])
        rows = rows.reshape(*local.shape, self._batch_size)
        batch = jax.tree.map(lambda x: x[rows], self._data)
        self._batches += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position, which `Checkpoints.save(..., data=...)` can hold.

        The entry `"batches"` is the number of batches returned so far. The other
        entries identify the order, and are equal in all processes.
        """
        shards = None
        if self._shards is not None:
            shards = 0
            for shard in self._shards:
                shards = zlib.crc32(shard.astype("<i8").tobytes() + b";", shards)
        return {
            "batches": self._batches,
            "examples": self._num_examples,
            "workers": dict(self._workers.sizes),
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shards": shards,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position from `get_state`, also of an earlier run.

        Args:
          state: The position.

        Raises:
          ValueError: If the position is of a loader with other examples, workers,
            shards, batch size, or seed, whose order this loader cannot continue.
        """
        own = self.get_state()
        for name, expected in own.items():
            if name not in state or (name != "batches" and state[name] != expected):
                raise ValueError(
                    f"state must be of the same loader: it has {name}="
                    f"{state.get(name)!r}, this loader has {expected!r}. Pass the same "
                    "arguments to Loader; or, to continue in another order, set only "
                    'the position: set_state({**loader.get_state(), "batches": ...}).'
                )
        self._batches = check_int('state["batches"]', state["batches"], minimum=0)

    def _shard(self, worker: int) -> np.ndarray:
        """Returns the numbers of a worker's examples."""
        if self._shards is not None:
            return self._shards[worker]
        return np.arange(worker, self._num_examples, self._workers.num_workers)

    def _rows(self, worker: int) -> np.ndarray:
        """Returns the numbers of the examples in a worker's next batch."""
        number, batch = divmod(self._batches, self._passes[worker])
        latest, order = self._orders.get(worker, (None, None))
        if order is None or latest != number:
            order = self._shard(worker)
            if self._seed is not None:
                # Sorting random bits is a permutation that no version of NumPy changes,
                # unlike `Generator.permutation`.
                seed = np.random.SeedSequence(self._seed, spawn_key=(worker, number))
                bits = np.random.PCG64(seed).random_raw(len(order))
                order = order[np.argsort(bits, kind="stable")]
            self._orders[worker] = number, order
        return order[batch * self._batch_size : (batch + 1) * self._batch_size]


def _as_examples(data: PyTree) -> tuple[PyTree, int]:
    """Returns the data as NumPy arrays, and the number of examples.

    Raises:
      TypeError: If any leaf is not an array.
      ValueError: If the leaves do not have the same number of examples.
    """
    leaves = jax.tree.leaves_with_path(data)
    for path, x in leaves:
        # Other array types, such as those of HDF5 files, do not support the indexing.
        if not isinstance(x, np.ndarray | jax.Array) or np.ndim(x) == 0:
            raise TypeError(
                "data must hold NumPy arrays with one entry per example, got a "
                f"{type(x).__name__} at {jax.tree_util.keystr(path) or 'the top'}: "
                "pass np.asarray(...) of it, or read other sources with Grain."
            )
    sizes = sorted({len(x) for _, x in leaves})
    if len(sizes) != 1:
        raise ValueError(
            "data must hold arrays with the same number of examples, got "
            f"{sizes}: pass a pytree such as (images, labels)."
        )
    return jax.tree.map(np.asarray, data), sizes[0]


def _as_shards(shards: Sequence[Any], n: int, num_examples: int) -> list[np.ndarray]:
    """Returns the shards as arrays of integers.

    Raises:
      TypeError: If any shard does not hold integers.
      ValueError: If there are not n shards, or examples do not exist.
    """
    if len(shards) != n:
        raise ValueError(
            f"shards must have one entry per worker, got {len(shards)} for {n} workers."
        )
    arrays = [np.asarray(shard) for shard in shards]
    for worker, shard in enumerate(arrays):
        if shard.ndim != 1 or not np.issubdtype(shard.dtype, np.integer):
            raise TypeError(
                f"shards[{worker}] must be a list of numbers of examples, got dtype "
                f"{shard.dtype} and shape {shard.shape}: pass integers, for example "
                "np.flatnonzero(labels == 3)."
            )
        if shard.size and not 0 <= shard.min() <= shard.max() < num_examples:
            raise ValueError(
                f"shards[{worker}] must hold numbers from 0 to {num_examples - 1}, got "
                f"{shard.min()} to {shard.max()}."
            )
    return arrays


class Prefetcher(Iterator[PyTree]):
    """Batches on the workers' devices, as `prefetch` returns them."""

    def __init__(self, batches: Iterable[PyTree], workers: Workers, size: int = 2):
        self._iterator: Any = iter(batches)
        self._workers = workers
        self._size = check_int("size", size, minimum=1)
        # Batches on the devices, each with the position of the iterator after it.
        self._ahead: collections.deque[tuple[PyTree, Any]] = collections.deque()
        self._has_state = hasattr(self._iterator, "get_state")
        self._state = self._position()

    def __next__(self) -> PyTree:
        """Returns the next batch, and starts the transfer of later ones."""
        while len(self._ahead) < self._size:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            batch = self._workers.shard(batch, local=True)
            self._ahead.append((batch, self._position()))
        if not self._ahead:
            raise StopIteration
        batch, self._state = self._ahead.popleft()
        return batch

    def get_state(self) -> PyTree:
        """Returns the iterator's position after the last batch that was returned.

        Batches that are only on the devices do not count, so the position is
        independent of `size`, and fits the iterator without `prefetch`, too.

        Raises:
          TypeError: If the iterator has no `get_state`.
        """
        self._check_state()
        return self._state

    def set_state(self, state: PyTree) -> None:
        """Continues at a position, and drops the batches on the devices.

        Args:
          state: The position, from `get_state` of this object or of the iterator.

        Raises:
          TypeError: If the iterator has no `get_state`.
        """
        self._check_state()
        self._iterator.set_state(state)
        self._ahead.clear()
        self._state = state

    def _check_state(self) -> None:
        """Checks that the iterator has a position.

        Raises:
          TypeError: If it has none.
        """
        if not self._has_state:
            raise TypeError(
                f"{type(self._iterator).__name__} has no get_state: pass an iterator "
                "with get_state and set_state to prefetch, such as dj.data.Loader or "
                "an iterator of Grain."
            )

    def _position(self) -> PyTree:
        """Returns the position of the iterator, or None if it has none."""
        return self._iterator.get_state() if self._has_state else None


def prefetch(batches: Iterable[PyTree], workers: Workers, size: int = 2) -> Prefetcher:
    """Puts the next batches on the workers' devices ahead of time.

    Transfers run in the background. The reading of a batch runs in the call to `next`,
    while the devices execute the steps that are already dispatched. It therefore delays
    training only if it takes longer than a step, or if the program waits for the result
    of each step. In that case, use an iterator with threads of its own, such as that of
    Grain.

    Args:
      batches: Batches with the leading axes of this process's workers, such as a
        `Loader`. Its iterator must not overwrite arrays that it has returned.
      workers: The workers.
      size: Number of batches on the devices, including the one that `next` returns.

    Returns:
      An iterator of batches on the workers' devices. `get_state` and `set_state` return
      and set the position of the iterator, counting only batches that were returned.

    Raises:
      TypeError: If `size` is not an integer.
      ValueError: If `size` is below 1. The returned iterator raises it if any array
        lacks the leading worker axes.

    Example:
      >>> import decentral_jax as dj, numpy as np
      >>> workers = dj.Workers(2)
      >>> loader = dj.data.Loader(np.arange(10), workers, batch_size=2, seed=None)
      >>> batches = dj.data.prefetch(loader, workers)
      >>> next(batches)
      Array([[0, 2],
             [1, 3]], dtype=int32)
      >>> batches.get_state()["batches"], loader.get_state()["batches"]
      (1, 2)
    """
    return Prefetcher(batches, workers, size)


def split(data: PyTree, workers: Workers) -> tuple[PyTree, np.ndarray]:
    """Divides a set of examples among the workers, each example to one worker.

    Evaluation on the parts takes an n-th of the time and memory of evaluation of the
    whole set by every worker. Worker i of n gets the examples i, i + n, i + 2n, and so
    on. If the number of examples is not divisible, the last row is padded with copies
    of the first example, whose weight is 0.

    Args:
      data: A pytree of NumPy arrays `[examples, ...]`.
      workers: The workers.

    Returns:
      The parts of all workers, with leaves `[workers, per_worker, ...]`, and the
      weights of their examples, `[workers, per_worker]`, float32, of mean 1: the mean
      over workers of each worker's `mean(weight * metric)` is the mean over all
      examples. Pass both to `workers.shard`.

    Raises:
      TypeError: If any leaf of `data` is not a NumPy or JAX array.
      ValueError: If leaves have different numbers of examples, or none.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, numpy as np
      >>> workers = dj.Workers(2)
      >>> x, weight = dj.data.split(np.array([1.0, 2.0, 6.0], np.float32), workers)
      >>> x
      array([[1., 6.],
             [2., 1.]], dtype=float32)
      >>> mean = workers.spmd(lambda x, w: dj.average(jnp.mean(w * x)))
      >>> workers.gather(mean(*workers.shard((x, weight)))).round(3)
      array([3., 3.], dtype=float32)
    """
    data, num_examples = _as_examples(data)
    if num_examples == 0:
        raise ValueError("data must hold at least one example, got none.")
    n = workers.num_workers
    rows = np.arange(-(-num_examples // n) * n).reshape(-1, n).T
    exists = rows < num_examples
    weight = (exists * (rows.size / num_examples)).astype(np.float32)
    rows = np.where(exists, rows, 0)

    def divide(x):
        return x.reshape(*workers.shape, *x.shape[1:])

    return jax.tree.map(lambda x: divide(x[rows]), data), divide(weight)
