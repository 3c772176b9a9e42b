"""Batches for all workers, read by Grain from any random-access source."""

from collections.abc import Sequence
from typing import Any

import grain

import decentral_jax as dj


def read(
    source: Sequence[Any], workers: dj.Workers, batch_size: int, seed: int = 0
) -> grain.IterDataset:
    """Returns endless batches `[workers, batch_size, ...]` of this process's workers.

    Args:
      source: Random-access source: `len(source)` examples, and `source[i]` is a pytree
        of arrays.
      workers: The workers.
      batch_size: Number of examples per worker and batch.
      seed: Seed of the order, which changes in every epoch.
    """
    shards = [
        grain.MapDataset.source(source)[int(worker) :: workers.num_workers]
        .shuffle(seed=seed + int(worker))
        .repeat()
        .batch(batch_size)
        for worker in workers.local
    ]
    # `mix` takes one batch from each worker in turn, and the last `batch` stacks them.
    batches = grain.MapDataset.mix(shards).batch(len(shards))
    # Four threads read ahead, and hold up to eight batches of all workers in memory.
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    )
