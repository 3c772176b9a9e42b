"""Eight workers on a ring learn handwritten digits: Flax linen and DeTAG.

Each worker sees only about one of the ten digits. Together they learn all of them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, STEPS = 8, 16, 400


class MLP(nn.Module):
    """One hidden layer of 64 units."""

    @nn.compact
    def __call__(self, x):
        """Maps images `[batch, 64]` to logits `[batch, 10]`."""
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


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

    model = MLP()
    params = jax.jit(model.init)(jax.random.key(0), images[0, :1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def train_step(state, batch):  # an ordinary Flax step, for one worker
        def loss_fn(params):
            x, y = batch
            logits = state.apply_fn(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    def test_accuracy(state):
        params = dj.eval_params(state.opt_state, state.params)  # the averaged model
        predicted = state.apply_fn(params, test_images).argmax(-1)
        return jnp.mean(predicted == test_labels), dj.consensus_distance(state.params)

    print(f"{workers}, {topology}")
    step = workers.spmd(train_step, donate_argnums=0)
    state = workers.replicate(state)
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
