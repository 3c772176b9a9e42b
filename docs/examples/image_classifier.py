"""An image classifier with batch normalization: Flax nnx, DEF with sparse messages.

Eight workers share the training set of handwritten digits. Each message carries one
sixteenth of the update. Batch statistics are averaged over all workers.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, EPOCHS, RATE = 8, 16, 12, 0.05


class SyncBatchNorm(nnx.Module):
    """Batch normalization with the moments of all workers' batches.

    `dj.average` works in every layout, and gradients flow through it.
    """

    def __init__(self, features: int, momentum: float = 0.9):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.use_running_average = momentum, False

    def __call__(self, x):
        """Normalizes all axes but the last one."""
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            mean, square = dj.average((x.mean(axes), jnp.square(x).mean(axes)))
            # Rounding must not make the variance negative.
            var = jnp.maximum(square - jnp.square(mean), 0)
            keep = self.momentum
            self.mean[...] = keep * self.mean[...] + (1 - keep) * mean
            self.var[...] = keep * self.var[...] + (1 - keep) * var
        return (x - mean) * lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class CNN(nnx.Module):
    """Two convolutions with batch normalization, and one dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = SyncBatchNorm(16)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = SyncBatchNorm(32)
        self.logits = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.logits(x.reshape(x.shape[0], -1))


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


def loss_fn(model, images, labels):
    """Returns the mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(state, images, labels):
    """Trains one worker on one batch: an ordinary nnx step."""
    model, optimizer = state
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return (model, optimizer), dj.average(loss)


def create(workers):
    """Returns the initial model and optimizer of every worker."""
    compressor = dj.compression.random_block(16)
    tx = dj.def_sgd(optax.sgd(RATE, momentum=0.9), compressor, detach=0.3)
    model = CNN(nnx.Rngs(0))
    return workers.replicate((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))


def test_accuracy(state, train_images, images, labels):
    """Evaluates the workers' common model, each worker on its part of the test set.

    Returns:
      The accuracy with re-estimated batch statistics, and with the running ones.
    """
    model, optimizer = state
    params = nnx.state(model, nnx.Param)
    nnx.update(model, dj.eval_params(optimizer.opt_state, params))

    def accuracy():
        model.set_attributes(use_running_average=True)
        return dj.average((model(images).argmax(-1) == labels).mean())

    running = accuracy()
    # DEF evaluates another model than the one whose statistics it has seen in training:
    # estimate them again, in one pass over the training images.
    model.set_attributes(use_running_average=False, momentum=0.0)
    model(train_images)
    return accuracy(), running


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
