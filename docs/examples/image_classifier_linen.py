"""An image classifier with batch normalization: Flax linen, DEF with sparse messages.

Eight workers share the training set of handwritten digits. Each message carries one
sixteenth of the update. Batch statistics are averaged over all workers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import lax
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, EPOCHS, RATE = 8, 16, 12, 0.05


class SyncBatchNorm(nn.Module):
    """Batch normalization with the moments of all workers' batches.

    `dj.average` works in every layout, and gradients flow through it.
    """

    use_running_average: bool
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x):
        """Normalizes all axes but the last one."""
        features = x.shape[-1]
        mean_of_all = self.variable("batch_stats", "mean", jnp.zeros, features)
        var_of_all = self.variable("batch_stats", "var", jnp.ones, features)
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        if self.use_running_average:
            mean, var = mean_of_all.value, var_of_all.value
        else:
            axes = tuple(range(x.ndim - 1))
            mean, square = dj.average((x.mean(axes), jnp.square(x).mean(axes)))
            # Rounding must not make the variance negative.
            var = jnp.maximum(square - jnp.square(mean), 0)
            keep = self.momentum
            mean_of_all.value = keep * mean_of_all.value + (1 - keep) * mean
            var_of_all.value = keep * var_of_all.value + (1 - keep) * var
        return (x - mean) * lax.rsqrt(var + 1e-5) * scale + bias


class CNN(nn.Module):
    """Two convolutions with batch normalization, and one dense layer."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        """Maps images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""
        norm = {"use_running_average": not train, "momentum": self.momentum}
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(SyncBatchNorm(**norm, name="norm1")(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(SyncBatchNorm(**norm, name="norm2")(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class TrainState(train_state.TrainState):
    """The usual state, and the batch statistics."""

    batch_stats: Any


def load_digits():
    """Returns the training and test digits, each as images and labels `[8, n, ...]`."""
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    order = np.random.default_rng(0).permutation(len(images))
    train = order[: len(images) // 5 * 4 // NUM_WORKERS * NUM_WORKERS]
    test = order[len(train) :][: len(images) // 5 // NUM_WORKERS * NUM_WORKERS]
    # Every worker holds its own part of both sets.
    parts = [part.reshape(NUM_WORKERS, -1) for part in (train, test)]
    return [(images[part], labels[part].astype(np.int32)) for part in parts]


def batches(images, labels, seed):
    """Yields one epoch of batches, each as images and labels `[8, 16, ...]`."""
    order = np.random.default_rng(seed).permutation(images.shape[1])
    for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
        yield images[:, chosen], labels[:, chosen]


def loss_fn(params, state, images, labels):
    """Returns the mean cross-entropy, and the new batch statistics."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]


def train_step(state, images, labels):
    """Trains one worker on one batch: an ordinary linen step."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = value_and_grad(state.params, state, images, labels)
    return state.apply_gradients(grads=grads, batch_stats=stats), dj.average(loss)


def create(workers):
    """Returns the initial state of every worker."""
    compressor = dj.compression.random_block(16)
    tx = dj.def_sgd(optax.sgd(RATE, momentum=0.9), compressor, detach=0.3)
    model = CNN()
    # Outside of the step there are no other workers, so initialize without training.
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
    return workers.replicate(state)


def test_accuracy(state, train_images, images, labels):
    """Evaluates the workers' common model, each worker on its part of the test set.

    Returns:
      The accuracy with re-estimated batch statistics, and with the running ones.
    """
    params = dj.eval_params(state.opt_state, state.params)

    def accuracy(stats):
        variables = {"params": params, "batch_stats": stats}
        predicted = state.apply_fn(variables, images, train=False).argmax(-1)
        return dj.average((predicted == labels).mean())

    # DEF evaluates another model than the one whose statistics it has seen in training:
    # estimate them again, in one pass over the training images.
    variables = {"params": params, "batch_stats": state.batch_stats}
    model = CNN(momentum=0.0)
    _, new = model.apply(variables, train_images, train=True, mutable=["batch_stats"])
    return accuracy(new["batch_stats"]), accuracy(state.batch_stats)


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    (images, labels), test = load_digits()
    workers = dj.Workers(NUM_WORKERS)  # on the available devices
    state = create(workers)
    step = workers.spmd(train_step, donate_argnums=0)
    for epoch in range(1, EPOCHS + 1):
        for batch in batches(images, labels, seed=epoch):
            state, loss = step(state, *workers.shard(batch))
        print(f"epoch {epoch}: loss {workers.gather(loss)[0]:.3f}")
    evaluate = workers.spmd(test_accuracy)
    result = evaluate(state, *workers.shard((images, *test)))
    accuracy, running = (values[0] for values in workers.gather(result))
    print(f"test accuracy {accuracy:.3f}; with running statistics {running:.3f}")
    return float(accuracy)


if __name__ == "__main__":
    main()
