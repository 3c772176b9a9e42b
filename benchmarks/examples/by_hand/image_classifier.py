"""`docs/examples/image_classifier.py` by hand: detached error feedback."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decentral_jax as dj
from benchmarks.examples import load

example = load("image_classifier")

SHARED = ("SyncBatchNorm", "CNN", "load_digits", "batches", "loss_fn")

AXIS, RATIO, DETACH = "workers", 16, 0.3
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
# The model x, each worker's residual and momentum, the batch statistics, and the step.
STATE = WHOLE, SPLIT, SPLIT, WHOLE, WHOLE

sgd = optax.sgd(example.RATE, momentum=0.9)


class CNN(example.CNN):
    """The example's CNN with the batch normalization of Flax."""

    def __init__(self, axis_name: str | None = AXIS):
        rngs = nnx.Rngs(0)
        super().__init__(rngs)
        norm = functools.partial(
            nnx.BatchNorm, momentum=0.9, axis_name=axis_name, rngs=rngs
        )
        self.norm1, self.norm2 = norm(16), norm(32)


def train_step(state, images, labels):
    """Trains one worker on one batch."""
    x, residual, momentum, stats, step = state
    images, labels = images[0], labels[0]
    residual, momentum = jax.tree.map(lambda a: a[0], (residual, momentum))
    # The gradient is taken at x + lambda e.
    params = jax.tree.map(lambda x, e: x + DETACH * e, x, residual)
    model = nnx.merge(nnx.graphdef(CNN()), params, stats)
    loss, grads = nnx.value_and_grad(example.loss_fn)(model, images, labels)
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
    stats = nnx.state(model, nnx.BatchStat)
    return (x, residual, momentum, stats, step + 1), lax.pmean(loss, AXIS)


def block_of(key, p):
    """Returns the positions of a random cyclic block of the flattened array."""
    start = (jax.random.bits(key) % p.size).astype(jnp.int32)
    return (start + jnp.arange(math.ceil(p.size / RATIO))) % p.size


def test_accuracy(state, train_images, images, labels):
    """Evaluates x with re-estimated statistics, each worker on its part of the data."""
    x, _, _, stats, _ = state
    model = nnx.merge(nnx.graphdef(CNN()), x, stats)
    model.set_attributes(momentum=0.0)
    model(train_images[0])
    model.set_attributes(use_running_average=True)
    return lax.pmean((model(images[0]).argmax(-1) == labels[0]).mean(), AXIS)


def place(tree, spec):
    """Puts arrays on the devices."""
    return jax.device_put(tree, NamedSharding(MESH, spec))


def create():
    """Returns the initial state."""
    x, stats = nnx.state(CNN(), nnx.Param, nnx.BatchStat)

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


def single_worker() -> float:
    """Trains one worker with the batches of all workers, without compression."""
    (images, labels), test = example.load_digits()
    model = CNN(axis_name=None)
    optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)

    @jax.jit
    def step(model, optimizer, images, labels):
        _, grads = nnx.value_and_grad(example.loss_fn)(model, images, labels)
        optimizer.update(model, grads)
        return model, optimizer

    for epoch in range(1, example.EPOCHS + 1):
        for batch in example.batches(images, labels, seed=epoch):
            joined = (part.reshape(-1, *part.shape[2:]) for part in batch)
            model, optimizer = step(model, optimizer, *joined)
    # Estimate the statistics again, as the example does.
    model.set_attributes(momentum=0.0)
    model(images.reshape(-1, *images.shape[2:]))
    model.set_attributes(use_running_average=True)
    predicted = model(test[0].reshape(-1, *test[0].shape[2:])).argmax(-1)
    return float((predicted == test[1].reshape(-1)).mean())


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
    (model, _), (x, residual, *_) = ours, theirs
    params = jax.tree.map(lambda x, e: x + DETACH * e, x, residual)
    for mine, other in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)),
        jax.tree.leaves(params),
        strict=True,
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
