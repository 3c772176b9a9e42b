"""Eight workers on a ring learn handwritten digits: Flax nnx and DeTAG.

Each worker sees only about one of the ten digits. Together they learn all of them.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, STEPS = 8, 16, 400


class MLP(nnx.Module):
    """One hidden layer of 64 units."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images `[batch, 64]` to logits `[batch, 10]`."""
        return self.logits(nnx.relu(self.hidden(x)))


def load_digits():
    """Returns the training digits `[8, per_worker, ...]` and the test digits."""
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    # Sort by label and cut into equal parts, one part per worker.
    train = train[np.argsort(labels[train], kind="stable")]
    train = train[: len(train) // NUM_WORKERS * NUM_WORKERS].reshape(NUM_WORKERS, -1)
    return (images[train], labels[train]), (images[test], labels[test])


def main() -> float:
    """Trains, prints and returns the test accuracy of the averaged model."""
    (images, labels), (test_images, test_labels) = load_digits()
    workers = dj.Workers(NUM_WORKERS)  # on the available devices
    topology = dj.topology.ring(NUM_WORKERS)
    tx = dj.detag(0.3, topology, rounds=4)

    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train_step(state, batch):  # an ordinary nnx step, for one worker
        model, optimizer = state

        def loss_fn(model):
            x, y = batch
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return (model, optimizer), loss

    def test_accuracy(state):
        model, optimizer = state
        params = nnx.state(model, nnx.Param)
        distance = dj.consensus_distance(params)
        nnx.update(model, dj.eval_params(optimizer.opt_state, params))
        return jnp.mean(model(test_images).argmax(-1) == test_labels), distance

    print(f"{workers}, {topology}")
    step = workers.spmd(train_step, donate_argnums=0)
    state = workers.replicate((model, optimizer))
    rng = np.random.default_rng(0)
    for i in range(1, STEPS + 1):
        chosen = rng.integers(images.shape[1], size=BATCH)
        batch = images[:, chosen], labels[:, chosen]  # [8, 16, 64] and [8, 16]
        state, losses = step(state, workers.shard(batch))
        loss = workers.gather(losses).mean()  # waits for the step
        if i % 100 == 0:
            print(f"step {i}: mean loss {loss:.3f}")

    accuracy, distance = workers.gather(workers.spmd(test_accuracy)(state))
    print(f"test accuracy {accuracy[0]:.3f}, consensus distance {distance[0]:.2g}")
    return float(accuracy[0])


if __name__ == "__main__":
    main()
