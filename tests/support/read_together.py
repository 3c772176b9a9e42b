"""One of several processes that read batches, train, and write metrics together.

Started by tests/training/test_data.py.

Usage: python -m decentral_jax.launch --processes P --devices D
    tests/support/read_together.py FOLDER
"""

import sys

import jax
import numpy as np

import decentral_jax as dj

N, EXAMPLES, BATCH, BATCHES = 4, 22, 2, 7


def examples():
    """Numbers of examples in float32, and labels in NumPy's default integers."""
    return np.arange(EXAMPLES, dtype=np.float32), np.arange(EXAMPLES)


def main(folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    dj.initialize(timeout=60)
    workers = dj.Workers(N)
    numbers, labels = examples()
    # What the other processes read is not there.
    numbers = np.where(np.isin(np.arange(EXAMPLES) % N, workers.local), numbers, np.nan)
    loader = dj.data.Loader((numbers, labels), workers, BATCH, seed=3)
    batches = dj.data.prefetch(loader, workers)
    step = workers.spmd(lambda batch: {"loss": dj.average(batch[0].mean())})
    found = []
    with dj.metrics.Loggers(
        dj.metrics.JSONLines(f"{folder}/metrics.jsonl"),
        dj.metrics.CSV(f"{folder}/metrics.csv"),
    ) as logger:
        for t in range(BATCHES):
            batch = next(batches)
            found.append(workers.gather(batch))
            metrics = dj.metrics.summarize(step(batch), workers, detail="workers")
            logger.log(t + 1, metrics)
    assert batches.get_state()["batches"] == BATCHES
    # Every process sees what one process reads alone.
    alone = dj.Workers(N, devices=jax.local_devices()[:1])
    expected = dj.data.Loader(examples(), alone, BATCH, seed=3)
    for one in found:
        for x, y in zip(one, next(expected), strict=True):
            np.testing.assert_array_equal(x, y)
    print(f"{len(found)} batches equal on {jax.process_count()} processes")


if __name__ == "__main__":
    main(sys.argv[1])
