"""`docs/examples/character_model.py` by hand: DiLoCo with accumulated gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decentral_jax as dj
from benchmarks.examples import load

example: Any = load("character_model")

SHARED = (
    "Block",
    "Transformer",
    "load_text",
    "batches",
    "loss_fn",
    "local_optimizer",
)

AXIS = "workers"
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()

inner = example.local_optimizer()
outer = optax.sgd(example.OUTER_RATE, momentum=example.OUTER_MOMENTUM, nesterov=True)


def for_all(in_specs, out_specs, **options):
    """Compiles a function of one worker for all devices."""

    def decorate(fn):
        mapped = jax.shard_map(fn, mesh=MESH, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(mapped, **options)

    return decorate


def loss_of(params, windows):
    """Returns the loss of parameters, for any vocabulary."""
    vocabulary = params["logits"]["bias"].shape[-1]
    model = nnx.eval_shape(lambda: example.Transformer(vocabulary, nnx.Rngs(0)))
    return example.loss_fn(nnx.merge(nnx.graphdef(model), params), windows)


def accumulated_gradient(params, windows):
    """Returns the mean loss and gradient of micro-batches `[micro-batches, ...]`."""
    losses, total = 0.0, jax.tree.map(jnp.zeros_like, params)
    for window in windows:
        loss, grads = jax.value_and_grad(loss_of)(params, window)
        losses, total = losses + loss, jax.tree.map(jnp.add, total, grads)
    count = len(windows)
    return losses / count, jax.tree.map(lambda g: g / count, total)


@for_all((SPLIT, SPLIT, SPLIT), (SPLIT, SPLIT, WHOLE), donate_argnums=(0, 1))
def train_step(params, opt_state, windows):
    """Trains each worker alone."""
    params, opt_state, windows = jax.tree.map(
        lambda a: a[0], (params, opt_state, windows)
    )
    loss, grads = accumulated_gradient(params, windows)
    updates, opt_state = inner.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params, opt_state = jax.tree.map(lambda a: a[None], (params, opt_state))
    return params, opt_state, lax.pmean(loss, AXIS)


@for_all((SPLIT, WHOLE, WHOLE, WHOLE), (SPLIT, WHOLE, WHOLE, WHOLE))
def exchange(params, start, outer_state, ema):
    """Averages the workers' displacements, and takes an outer step with them."""
    moved = jax.tree.map(lambda z, p: z - p[0], start, params)
    updates, outer_state = outer.update(lax.pmean(moved, AXIS), outer_state, start)
    start = optax.apply_updates(start, updates)
    ema = optax.incremental_update(start, ema, 1 - example.EMA_DECAY)
    return jax.tree.map(lambda a: a[None], start), start, outer_state, ema


@for_all((WHOLE, SPLIT), WHOLE)
def test_loss(params, windows):
    """Evaluates each worker's part of the test text."""
    return lax.pmean(loss_of(params, windows[0]), AXIS)


def place(tree, spec):
    """Puts arrays on the devices."""
    return jax.device_put(tree, NamedSharding(MESH, spec))


def create(vocabulary):
    """Returns the state of the workers, and the state that they share."""
    params = nnx.state(example.Transformer(vocabulary, nnx.Rngs(0)), nnx.Param)

    def copies(tree):
        return jax.tree.map(lambda a: jnp.stack([a] * example.NUM_WORKERS), tree)

    own = place((copies(params), copies(inner.init(params))), SPLIT)
    return own, place((params, outer.init(params), params), WHOLE)


def train_batches(text):
    """Yields the micro-batches of one step, `[8, micro-batches, batch, ...]`."""
    stream = example.batches(text)
    while True:
        yield np.stack([next(stream) for _ in range(example.ACCUMULATE)], axis=1)


def main() -> float:
    """Trains, prints and returns the test loss in nats per character."""
    text, test_windows, characters = example.load_text()
    (params, opt_state), shared = create(len(characters))
    stream = train_batches(text)
    for step in range(1, example.STEPS + 1):
        windows = place(next(stream), SPLIT)
        params, opt_state, loss = train_step(params, opt_state, windows)
        if step % example.PERIOD == 0:
            params, *shared = exchange(params, *shared)
        if step % (example.STEPS // 5) == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    _, _, ema = shared
    loss = float(test_loss(ema, place(test_windows, SPLIT)))
    print(f"test loss {loss:.3f}")
    return loss


def single_worker() -> float:
    """Trains one worker with the total batch, without DiLoCo."""
    text, test_windows, characters = example.load_text()
    params = nnx.state(example.Transformer(len(characters), nnx.Rngs(0)), nnx.Param)
    opt_state, ema = inner.init(params), params

    @jax.jit
    def step(params, opt_state, windows):
        _, grads = jax.value_and_grad(loss_of)(params, windows)
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    stream = train_batches(text)
    for number in range(1, example.STEPS + 1):
        windows = next(stream).reshape(-1, example.CONTEXT + 1)
        params, opt_state = step(params, opt_state, windows)
        if number % example.PERIOD == 0:
            ema = optax.incremental_update(params, ema, 1 - example.EMA_DECAY)
    return float(jax.jit(loss_of)(ema, test_windows.reshape(-1, example.CONTEXT + 1)))


def steps():
    """Compares four steps, and returns one step of each program.

    A step consists of all its micro-batches. Every tenth step exchanges.
    """
    text, _, characters = example.load_text()
    workers = dj.Workers(example.NUM_WORKERS)
    micro_step = workers.spmd(example.train_step, donate_argnums=0)
    average = workers.spmd(example.update_ema, donate_argnums=0)

    def programs():
        """Returns functions that take one step, and return the models."""
        ours, our_ema = example.create(workers, len(characters))
        (params, opt_state), shared = create(len(characters))
        counts, period = [0, 0], example.PERIOD

        def our_one(windows):
            nonlocal ours, our_ema
            for window in windows:
                ours, _ = micro_step(ours, window)
            counts[0] += 1
            if counts[0] % period == 0:
                our_ema = average(our_ema, ours)
            return jax.block_until_ready((nnx.state(ours[0], nnx.Param), our_ema))

        def their_one(windows):
            nonlocal params, opt_state, shared
            params, opt_state, _ = train_step(params, opt_state, windows)
            counts[1] += 1
            if counts[1] % period == 0:
                params, *shared = exchange(params, *shared)
            return jax.block_until_ready((params, shared[2]))

        return our_one, their_one

    def place_both(windows):
        return [workers.shard(w) for w in windows.swapaxes(0, 1)], place(windows, SPLIT)

    # Compare a step without an exchange, one with, and the steps around them.
    stream, period = train_batches(text), example.PERIOD
    example.PERIOD = 3
    our_one, their_one = programs()
    example.PERIOD = period
    for _ in range(4):
        our_windows, their_windows = place_both(next(stream))
        ours, theirs = our_one(our_windows), their_one(their_windows)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        expected = np.broadcast_to(other, mine.shape)
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6)
    our_one, their_one = programs()
    return lambda: our_one(our_windows), lambda: their_one(their_windows)
