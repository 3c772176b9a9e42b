"""Asynchronous training on Ray: a master and three workers, one of them slow.

Each worker is a process. The master applies each gradient as soon as it arrives, and
nobody waits for the slow worker. For comparison, the program then trains with
synchronous workers. Arrivals depend on time, so no two asynchronous runs are the same.

Without Ray, the workers are threads.
"""

import functools
import importlib.util
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

from decentral_jax import engine

BATCH, GRADIENTS, RATE = 32, 240, 5e-3
SECONDS = (0.02, 0.02, 0.06)  # per gradient, for each worker
NUM_WORKERS = len(SECONDS)


class MLP(nnx.Module):
    """One hidden layer of 64 units."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images `[batch, 64]` to logits `[batch, 10]`."""
        return self.logits(nnx.relu(self.hidden(x)))


def load_digits():
    """Returns the training digits and the test digits."""
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(worker):
    """Yields the batches of one worker. The worker's own process calls this."""
    (images, labels), _ = load_digits()
    rng = np.random.default_rng(worker)
    while True:
        time.sleep(SECONDS[worker])  # as long as the gradient of a large model takes
        chosen = rng.integers(len(images), size=BATCH)
        yield images[chosen], labels[chosen]


def create():
    """Returns the structure of the model and its initial parameters."""
    return nnx.split(MLP(nnx.Rngs(0)))


def loss_fn(params, batch, graphdef):
    """Returns the mean cross-entropy."""
    model, (images, labels) = nnx.merge(graphdef, params), batch
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_accuracy(params, graphdef):
    """Returns the model's accuracy on the test digits."""
    images, labels = load_digits()[1]
    model = nnx.merge(graphdef, params)
    return float(jnp.mean(model(images).argmax(-1) == labels))


def train(synchronous, actors):
    """Trains, prints the results, and returns the test accuracy and the seconds.

    Args:
      synchronous: Whether the master waits for one gradient of every worker per step.
      actors: Options of the workers' Ray actors, or None for threads.
    """
    graphdef, params = create()
    gradient = jax.grad(functools.partial(loss_fn, graphdef=graphdef))

    def show(progress):
        if progress.applied % 60 == 0:
            print(f"  {progress}")

    run = engine.run(
        gradient,
        params,
        batches,
        optax.adam(RATE),
        GRADIENTS,
        num_workers=NUM_WORKERS,
        synchronous=synchronous,
        actors=actors,
        timeout=300,  # seconds to wait for a worker, including the start of its process
        on_progress=show,
    )
    accuracy = test_accuracy(run.params, graphdef)
    print(
        f"{'synchronous' if synchronous else 'asynchronous'}: {run.seconds:.1f} s, "
        f"{run.gradients_per_second:.0f} gradients per second, "
        f"largest staleness {len(run.staleness_counts) - 1}, "
        f"test accuracy {accuracy:.3f}"
    )
    return accuracy, run.seconds


def main() -> float:
    """Trains in both ways, and returns the accuracy of the asynchronous run."""
    # Ray would otherwise report statistics of its use to its developers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    actors = {"num_cpus": 0.1}  # several actors per core; with GPUs: {"num_gpus": 1}
    if importlib.util.find_spec("ray") is None:
        print("Workers are threads. For processes: pip install decentral_jax[ray]")
        actors = None
    accuracy, seconds = train(False, actors)
    _, synchronous_seconds = train(True, actors)
    ratio = synchronous_seconds / seconds
    print(f"synchronous training takes {ratio:.1f} times as long")
    return accuracy


if __name__ == "__main__":
    main()
