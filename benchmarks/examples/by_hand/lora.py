"""`docs/examples/lora.py` by hand: adapters averaged with one other worker per step."""

import functools
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

example = load("lora")

SHARED = (
    "ADAPTERS",
    "MLP",
    "add_adapters",
    "batches",
    "load_digits",
    "loss_fn",
    "pretrain",
    "split_digits",
)

AXIS, SHIFTS = "workers", (1, 2, 4)
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))

adam = optax.adam(example.RATE)


def train_step(state, images, labels, base, shift):
    """Trains the adapters of one worker on one batch."""
    own = jax.tree.map(lambda x: x[0], (state, images, labels))
    (adapters, opt_state), images, labels = own
    model = nnx.merge(*base, adapters)
    loss, grads = nnx.value_and_grad(example.loss_fn, argnums=example.ADAPTERS)(
        model, images, labels
    )
    updates, opt_state = adam.update(grads, opt_state)
    # Each worker sends to the worker `shift` places ahead.
    n = example.NUM_WORKERS
    pairs = [(i, (i + shift) % n) for i in range(n)]
    received = lax.ppermute(adapters, AXIS, pairs)
    mixed = jax.tree.map(lambda x, y: (x + y) / 2, adapters, received)
    adapters = optax.apply_updates(mixed, updates)
    state = jax.tree.map(lambda x: x[None], (adapters, opt_state))
    return state, lax.pmean(loss, AXIS)


def test_accuracy(state, images, labels, base):
    """Evaluates the averaged adapters, each worker on its part of the test set."""
    adapters = lax.pmean(jax.tree.map(lambda x: x[0], state[0]), AXIS)
    model = nnx.merge(*base, adapters)
    return lax.pmean((model(images[0]).argmax(-1) == labels[0]).mean(), AXIS)


def compile_for_all(fn, out_specs, **options):
    """Compiles a function of a worker's state and data, and of the base."""
    specs = SPLIT, SPLIT, SPLIT, WHOLE
    mapped = jax.shard_map(fn, mesh=MESH, in_specs=specs, out_specs=out_specs)
    return jax.jit(mapped, **options)


def place(tree, spec):
    """Puts arrays on the devices."""
    return jax.device_put(tree, NamedSharding(MESH, spec))


def create():
    """Returns the initial state of all workers, and the base."""
    model = example.pretrain()
    example.add_adapters(model, nnx.Rngs(1))
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.tree.map(
        lambda x: jnp.stack([x] * example.NUM_WORKERS), (adapters, adam.init(adapters))
    )
    return place(state, SPLIT), place((graphdef, frozen), WHOLE)


def compile_steps():
    """Returns one compiled step per shift, to be used in turn."""
    return [
        compile_for_all(
            functools.partial(train_step, shift=shift), (SPLIT, WHOLE), donate_argnums=0
        )
        for shift in SHIFTS
    ]


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    (images, labels), test = example.split_digits()
    state, base = create()
    programs = compile_steps()
    rng, count = np.random.default_rng(0), 0
    for epoch in range(1, example.EPOCHS + 1):
        losses = []
        for batch in example.batches(rng, images, labels):
            step = programs[count % len(programs)]
            state, loss = step(state, *place(batch, SPLIT), base)
            losses.append(float(loss))
            count += 1
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {np.mean(losses):.3f}")
    evaluate = compile_for_all(test_accuracy, WHOLE)
    accuracy = float(evaluate(state, *place(test, SPLIT), base))
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


def single_worker() -> float:
    """Trains one worker with the batches of all workers."""
    (images, labels), test = example.split_digits()
    model = example.pretrain()
    example.add_adapters(model, nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.LoRAParam)
    gradient = nnx.grad(example.loss_fn, argnums=example.ADAPTERS)

    @nnx.jit
    def step(model, optimizer, images, labels):
        optimizer.update(model, gradient(model, images, labels))

    rng = np.random.default_rng(0)
    for _ in range(example.EPOCHS):
        for images_now, labels_now in example.batches(rng, images, labels):
            step(model, optimizer, images_now.reshape(-1, 64), labels_now.reshape(-1))
    predicted = model(test[0].reshape(-1, 64)).argmax(-1)
    return float((predicted == test[1].reshape(-1)).mean())


def steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """Compares six steps, and returns one step of the example and one by hand."""
    (images, labels), _ = example.split_digits()
    workers = dj.Workers(example.NUM_WORKERS)
    ours, base, _ = example.create(workers)
    our_step = workers.spmd(
        example.train_step, donate_argnums=0, shared_argnames="base"
    )
    theirs, their_base = create()
    programs = compile_steps()
    data = list(example.batches(np.random.default_rng(0), images, labels))
    count = 0

    def our_one():
        nonlocal ours
        ours, loss = our_step(ours, *batches[0], base)
        jax.block_until_ready(loss)

    def their_one():
        nonlocal theirs, count
        step = programs[count % len(programs)]
        theirs, loss = step(theirs, *batches[1], their_base)
        jax.block_until_ready(loss)
        count += 1

    for batch in data[:6]:
        batches = workers.shard(batch), place(batch, SPLIT)
        our_one()
        their_one()
    for mine, other in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)
    return our_one, their_one
