"""A sweep over seeds and learning rates: 25 runs of 8 workers in one compiled program.

Eight workers on a ring learn handwritten digits. Each worker sees only about one of the
ten digits. Validation images choose the learning rate of each of four algorithms.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, STEPS = 8, 16, 500
SEEDS, RATES = range(5), (0.03, 0.1, 0.3, 1.0, 3.0)
RING = dj.topology.ring(NUM_WORKERS)

# Each function returns the optimizer for one learning rate.
ALGORITHMS = {
    "all_reduce_sgd": dj.all_reduce_sgd,
    "local_sgd": lambda rate: dj.local_sgd(rate, period=8),
    "d_psgd": lambda rate: dj.d_psgd(rate, RING),
    "dsgt": lambda rate: dj.dsgt(rate, RING),
}


class MLP(nnx.Module):
    """One hidden layer of 32 units."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.logits = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images `[batch, 64]` to logits `[batch, 10]`."""
        return self.logits(nnx.relu(self.hidden(x)))


def load_digits():
    """Returns training, validation and test digits, each `[8, per_worker, ...]`."""
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    train, validation, test = order[:1072], order[1072:1432], order[1432:1792]
    train = train[np.argsort(labels[train], kind="stable")]
    parts = [part.reshape(NUM_WORKERS, -1) for part in (train, validation, test)]
    return [(images[part], labels[part]) for part in parts]


def loss_fn(model, images, labels):
    """Returns the mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def create(seed, tx):
    """Returns the initial model and optimizer state of one run."""
    model = MLP(nnx.Rngs(jax.random.key(seed)))
    return model, tx.init(nnx.state(model, nnx.Param))


def train_step(state, images, labels, tx):
    """Trains one worker of one run on one batch."""
    model, opt_state = state
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    params = nnx.state(model, nnx.Param)
    updates, opt_state = tx.update(grads, opt_state, params)
    nnx.update(model, optax.apply_updates(params, updates))
    return (model, opt_state), loss


def accuracy(state, images, labels):
    """Evaluates the workers' averaged model, each worker on its part of the images."""
    model, opt_state = state
    nnx.update(model, dj.eval_params(opt_state, nnx.state(model, nnx.Param)))
    return dj.average(jnp.mean(model(images).argmax(-1) == labels))


def train(data, algorithm, seed, rate):
    """Trains one worker of one run, and returns validation and test accuracy."""
    (images, labels), validation_set, test_set = data
    tx = ALGORITHMS[algorithm](rate)

    def step(state, key):
        chosen = jax.random.randint(key, (BATCH,), 0, len(images))
        return train_step(state, images[chosen], labels[chosen], tx)

    own_key = jax.random.fold_in(jax.random.key(seed), dj.worker_index())
    state, _ = lax.scan(step, create(seed, tx), jax.random.split(own_key, STEPS))
    return accuracy(state, *validation_set), accuracy(state, *test_set)


def sweep(data, seeds, rates, algorithm):
    """Trains one worker of all runs: accuracies of shape `[seeds, rates]`."""
    run = partial(train, data, algorithm)
    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(seeds, rates)


def print_row(algorithm, validation, test):
    """Prints an algorithm's best rate, and returns its mean test accuracy there.

    Args:
      algorithm: Name of the algorithm.
      validation: Validation accuracies `[seeds, rates]`, which choose the rate.
      test: Test accuracies `[seeds, rates]`.
    """
    best = int(validation.mean(0).argmax())
    mean, std = test[:, best].mean(), test[:, best].std(ddof=1)
    edge = " (edge of the grid)" if best in (0, len(RATES) - 1) else ""
    print(f"{algorithm:<15} {RATES[best]:>9} {mean:.3f} ± {std:.3f}{edge}")
    return float(mean)


def main() -> float:
    """Trains all runs, prints a table, and returns the lowest accuracy in it."""
    workers = dj.Workers(NUM_WORKERS)
    data = workers.shard(load_digits())
    seeds, rates = jnp.array(SEEDS), jnp.array(RATES)
    run = workers.spmd(
        sweep, shared_argnames=("seeds", "rates"), static_argnames="algorithm"
    )
    print(f"{workers}, {len(SEEDS)} seeds, rates {RATES}")
    print("algorithm       best rate test accuracy")
    accuracies = []
    for algorithm in ALGORITHMS:
        results = workers.gather(run(data, seeds, rates, algorithm=algorithm))
        validation, test = (result[0] for result in results)  # equal on all workers
        accuracies.append(print_row(algorithm, validation, test))
    return min(accuracies)


if __name__ == "__main__":
    main()
