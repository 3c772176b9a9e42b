"""`docs/examples/image_classifier_linen.py` by hand: detached error feedback."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decentral_jax as dj
from benchmarks.examples import load

example: Any = load("image_classifier_linen")

SHARED = ("SyncBatchNorm", "CNN", "TrainState", "load_digits", "batches", "loss_fn")

AXIS, RATIO, DETACH = "workers", 16, 0.3
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
# The model x, each worker's residual and momentum, the batch statistics, and the step.
STATE = WHOLE, SPLIT, SPLIT, WHOLE, WHOLE

sgd = optax.sgd(example.RATE, momentum=0.9)


class CNN(nn.Module):
    """The example's CNN with the batch normalization of Flax."""

    momentum: float = 0.9
    axis_name: str | None = AXIS

    @nn.compact
    def __call__(self, x, train):
        """Maps images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            axis_name=self.axis_name,
        )
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(norm(name="norm1")(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(norm(name="norm2")(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def loss_fn(params, stats, images, labels, model):
    """Returns the mean cross-entropy, and the new batch statistics."""
    variables = {"params": params, "batch_stats": stats}
    logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]


value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)


def train_step(state, images, labels):
    """Trains one worker on one batch."""
    x, residual, momentum, stats, step = state
    residual, momentum = jax.tree.map(lambda a: a[0], (residual, momentum))
    # The gradient is taken at x + lambda e.
    params = jax.tree.map(lambda x, e: x + DETACH * e, x, residual)
    (loss, stats), grads = value_and_grad(params, stats, images[0], labels[0], CNN())
    updates, momentum = sgd.update(grads, momentum)
    # Send a random block of p = e + u, the same block on all workers.
    p = jax.tree.map(jnp.add, residual, updates)
    ps, structure = jax.tree.flatten(p)
    xs, keys = jax.tree.leaves(x), jax.random.fold_in(jax.random.key(0), step)
    keys = jax.random.split(keys, len(ps))
    blocks = [block_of(*pair) for pair in zip(keys, ps, strict=True)]
    sent = [p.reshape(-1)[block] for p, block in zip(ps, blocks, strict=True)]
    means = lax.pmean(sent, AXIS)
    for i, block in enumerate(blocks):
        shape = xs[i].shape
        xs[i] = xs[i].reshape(-1).at[block].add(means[i]).reshape(shape)
        ps[i] = ps[i].reshape(-1).at[block].set(0).reshape(shape)
    x, residual = structure.unflatten(xs), structure.unflatten(ps)
    residual, momentum = jax.tree.map(lambda a: a[None], (residual, momentum))
    return (x, residual, momentum, stats, step + 1), lax.pmean(loss, AXIS)


def block_of(key, p):
    """Returns the positions of a random cyclic block of the flattened array."""
    start = (jax.random.bits(key) % p.size).astype(jnp.int32)
    return (start + jnp.arange(math.ceil(p.size / RATIO))) % p.size


def accuracy_of(params, stats, data, axis_name):
    """Returns the accuracy with statistics estimated on the training images."""
    train_images, images, labels = data
    model = CNN(momentum=0.0, axis_name=axis_name)
    variables = {"params": params, "batch_stats": stats}
    _, new = model.apply(variables, train_images, train=True, mutable=["batch_stats"])
    logits: Any = model.apply({"params": params, **new}, images, train=False)
    return (logits.argmax(-1) == labels).mean()


def test_accuracy(state, *data):
    """Evaluates x, each worker on its part of the data."""
    x, _, _, stats, _ = state
    return lax.pmean(accuracy_of(x, stats, [part[0] for part in data], AXIS), AXIS)


def place(tree, spec):
    """Puts arrays on the devices."""
    return jax.device_put(tree, NamedSharding(MESH, spec))


def initial_variables():
    """Returns the initial parameters and statistics."""
    return CNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)


def create():
    """Returns the initial state."""
    variables = initial_variables()
    x, stats = variables["params"], variables["batch_stats"]

    def copies(tree):
        return jax.tree.map(lambda a: jnp.stack([a] * example.NUM_WORKERS), tree)

    zeros = jax.tree.map(jnp.zeros_like, x)
    state = x, copies(zeros), copies(sgd.init(x)), stats, jnp.int32(0)
    return tuple(place(part, spec) for part, spec in zip(state, STATE, strict=True))


def compile_for_all(fn, out_specs, **options):
    """Compiles a function of a worker's state and data for all devices."""

    def run(state, *data):
        specs = STATE, *(SPLIT,) * len(data)
        mapped = jax.shard_map(fn, mesh=MESH, in_specs=specs, out_specs=out_specs)
        return mapped(state, *data)

    return jax.jit(run, **options)


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    (images, labels), test = example.load_digits()
    state = create()
    step = compile_for_all(train_step, (STATE, WHOLE), donate_argnums=0)
    for epoch in range(1, example.EPOCHS + 1):
        for batch in example.batches(images, labels, seed=epoch):
            state, loss = step(state, *place(batch, SPLIT))
        print(f"epoch {epoch}: loss {loss:.3f}")
    evaluate = compile_for_all(test_accuracy, WHOLE)
    accuracy = float(evaluate(state, *place((images, *test), SPLIT)))
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


def joined(parts):
    """Joins the data of all workers."""
    return [part.reshape(-1, *part.shape[2:]) for part in parts]


def single_worker() -> float:
    """Trains one worker with the batches of all workers, without compression."""
    (images, labels), test = example.load_digits()
    variables = initial_variables()
    params, stats = variables["params"], variables["batch_stats"]
    momentum, model = sgd.init(params), CNN(axis_name=None)

    @jax.jit
    def step(params, momentum, stats, images, labels):
        (_, stats), grads = value_and_grad(params, stats, images, labels, model)
        updates, momentum = sgd.update(grads, momentum)
        return optax.apply_updates(params, updates), momentum, stats

    for epoch in range(1, example.EPOCHS + 1):
        for batch in example.batches(images, labels, seed=epoch):
            params, momentum, stats = step(params, momentum, stats, *joined(batch))
    data = joined((images, *test))
    return float(accuracy_of(params, stats, data, axis_name=None))


def steps():
    """Compares three steps, and returns one step of the example and one by hand."""
    (images, labels), _ = example.load_digits()
    workers = dj.Workers(example.NUM_WORKERS)
    ours, theirs = example.create(workers), create()
    our_step = workers.spmd(example.train_step, donate_argnums=0)
    their_step = compile_for_all(train_step, (STATE, WHOLE), donate_argnums=0)
    for _, batch in zip(range(3), example.batches(images, labels, 0), strict=False):
        ours, our_loss = our_step(ours, *workers.shard(batch))
        theirs, their_loss = their_step(theirs, *place(batch, SPLIT))
        np.testing.assert_allclose(our_loss[0], their_loss, rtol=1e-5)
    x, residual, *_ = theirs
    params = jax.tree.map(lambda x, e: x + DETACH * e, x, residual)
    for mine, other in zip(
        jax.tree.leaves(ours.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
    box = [ours, theirs]
    batch = workers.shard(batch), place(batch, SPLIT)

    def our_one():
        box[0], loss = our_step(box[0], *batch[0])
        jax.block_until_ready(loss)

    def their_one():
        box[1], loss = their_step(box[1], *batch[1])
        jax.block_until_ready(loss)

    return our_one, their_one
