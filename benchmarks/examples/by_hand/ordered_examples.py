"""`docs/examples/ordered_examples.py` by hand: each worker balances all pairs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decentral_jax as dj
from benchmarks.examples import load

example = load("ordered_examples")

SHARED = (
    "Classifier",
    "batches",
    "load_digits",
    "loss_fn",
    "transform",
)

AXIS, WORKERS = "workers", range(example.NUM_WORKERS)
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
# The parameters, the running sum, this epoch's order, and the next epoch's order.
STATE = WHOLE, WHOLE, SPLIT, SPLIT

optimizer = optax.chain(
    optax.add_decayed_weights(example.DECAY), optax.sgd(example.RATE)
)


def train_step(state, images, labels, first):
    """Trains one worker on one batch, which begins at position `first` of the epoch."""
    params, running, order, following = state
    order, following = order[0], following[0]
    model = nnx.merge(nnx.graphdef(example.Classifier(nnx.Rngs(0))), params)
    of_each = nnx.vmap(nnx.value_and_grad(example.loss_fn), in_axes=(None, 0, 0))
    losses, grads = of_each(model, images[0], labels[0])

    # The differences of consecutive gradients, [pairs, workers, size].
    rows = [g.reshape(g.shape[0], -1) for g in jax.tree.leaves(grads)]
    rows = jnp.concatenate(rows, axis=1)
    vectors = lax.all_gather(rows[0::2] - rows[1::2], AXIS, axis=1)

    def balance(running, vector):
        product = jnp.vdot(running, vector, precision="highest")
        sign = jnp.where(product <= 0, 1.0, -1.0)
        return running + sign * vector, sign

    # Balance the first pairs of all workers, then their second pairs, and so on.
    running, signs = lax.scan(balance, running, vectors.reshape(-1, vectors.shape[-1]))
    swap = signs.reshape(-1, example.NUM_WORKERS)[:, lax.axis_index(AXIS)] < 0

    # One example of each pair goes to the front of the next order, one to the back.
    pairs = lax.dynamic_slice_in_dim(order, first, example.BATCH).reshape(-1, 2)
    front = first // 2 + jnp.arange(len(pairs), dtype=jnp.int32)
    following = following.at[front].set(jnp.where(swap, pairs[:, 1], pairs[:, 0]))
    back = example.PER_WORKER - 1 - front
    following = following.at[back].set(jnp.where(swap, pairs[:, 0], pairs[:, 1]))

    mean = lax.pmean(jax.tree.map(lambda g: g.mean(0), grads), AXIS)
    updates, _ = optimizer.update(mean, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    state = params, running, order[None], following[None]
    return state, lax.pmean(losses.mean(), AXIS)


def next_epoch(state):
    """Switches to the next epoch's order, and resets the running sum."""
    params, running, _, following = state
    return params, jnp.zeros_like(running), following, jnp.copy(following)


def test_accuracy(state, images, labels):
    """Evaluates the common model, each worker on its part of the test set."""
    model = nnx.merge(nnx.graphdef(example.Classifier(nnx.Rngs(0))), state[0])
    return lax.pmean((model(images[0]).argmax(-1) == labels[0]).mean(), AXIS)


def compile_for_all(fn, in_specs, out_specs, **options):
    """Compiles a function of a worker's state and data for all devices."""
    # With check_vma=True, sums of gathered vectors count as different on each device.
    mapped = jax.shard_map(
        fn, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, **options)


def compile_step():
    """Compiles the training step."""
    specs = STATE, SPLIT, SPLIT, WHOLE
    return compile_for_all(train_step, specs, (STATE, WHOLE), donate_argnums=0)


def place(tree, spec):
    """Puts arrays on the devices."""
    return jax.device_put(tree, NamedSharding(MESH, spec))


def create():
    """Returns the initial state."""
    params = nnx.state(example.Classifier(nnx.Rngs(0)), nnx.Param)
    running = jnp.zeros(sum(x.size for x in jax.tree.leaves(params)))
    numbers = np.arange(example.PER_WORKER, dtype=np.int32)
    order = np.tile(numbers, (example.NUM_WORKERS, 1))
    state = params, running, order, order
    return tuple(place(part, spec) for part, spec in zip(state, STATE, strict=True))


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    records, test = example.load_digits()
    state, step = create(), compile_step()
    for epoch in range(1, example.EPOCHS + 1):
        losses, order = [], np.asarray(state[2])
        for i, batch in enumerate(example.batches(records, order, WORKERS)):
            first = np.int32(i * example.BATCH)
            state, loss = step(state, *place(batch, SPLIT), first)
            losses.append(float(loss))
        state = next_epoch(state)
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {np.mean(losses):.4f}")
    evaluate = compile_for_all(test_accuracy, (STATE, SPLIT, SPLIT), WHOLE)
    accuracy = float(evaluate(state, *place(test, SPLIT)))
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


def single_worker() -> float:
    """Trains one worker with the batches of all workers, in random orders."""
    records, (test_images, test_labels) = example.load_digits()
    model = example.Classifier(nnx.Rngs(0))
    sgd = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def mean_loss(model, images, labels):
        return example.loss_fn(model, images, labels).mean()

    @nnx.jit
    def step(model, sgd, images, labels):
        sgd.update(model, nnx.grad(mean_loss)(model, images, labels))

    rng = np.random.default_rng(0)
    numbers = np.tile(np.arange(example.PER_WORKER), (example.NUM_WORKERS, 1))
    for _ in range(example.EPOCHS):
        order = rng.permuted(numbers, axis=1)
        for images, labels in example.batches(records, order, WORKERS):
            step(model, sgd, images.reshape(-1, 64), labels.reshape(-1))
    predicted = model(test_images).argmax(-1)
    return float((predicted == test_labels).mean())


def steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """Compares two epochs, and returns one step of the example and one by hand."""
    records, _ = example.load_digits()
    workers = dj.Workers(example.NUM_WORKERS)
    ours, theirs = example.create(workers), create()
    our_step, their_step = workers.spmd(example.train_step, 0), compile_step()
    read_order = workers.spmd(example.next_order)
    first = 0

    def our_one():
        nonlocal ours
        ours, loss = our_step(ours, *batches[0])
        jax.block_until_ready(loss)

    def their_one():
        nonlocal theirs, first
        theirs, loss = their_step(theirs, *batches[1], np.int32(first))
        first += example.BATCH
        if first == example.PER_WORKER:
            theirs, first = next_epoch(theirs), 0
        jax.block_until_ready(loss)

    for _ in range(2):
        order = np.asarray(read_order(ours))
        for batch in example.batches(records, order, WORKERS):
            batches = workers.shard(batch), place(batch, SPLIT)
            our_one()
            their_one()
        # Both have computed the same next order, from the same gradients.
        np.testing.assert_array_equal(np.asarray(read_order(ours)), theirs[2])
        assert not np.array_equal(order, theirs[2])
    params = nnx.state(ours[0], nnx.Param)
    for mine, other in zip(*map(jax.tree.leaves, (params, theirs[0])), strict=True):
        for copy in mine:
            np.testing.assert_allclose(copy, other, rtol=0, atol=1e-5)
    return our_one, their_one
