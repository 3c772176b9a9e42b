"""`docs/examples/sweep.py` by hand: four algorithms, mapped over seeds and rates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decentral_jax as dj
from benchmarks.examples import load

example = load("sweep")

SHARED = ("MLP", "load_digits", "loss_fn", "print_row")

AXIS, SIZE, PERIOD = "workers", example.NUM_WORKERS, 8
MESH = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


def mix(params):
    """Averages the parameters with those of both neighbors on the ring."""

    def received(offset):
        pairs = [(i, (i + offset) % SIZE) for i in range(SIZE)]
        return lax.ppermute(params, AXIS, pairs)

    return jax.tree.map(lambda *x: sum(x) / 3, params, received(1), received(-1))


def descend(params, direction, rate):
    """Takes a gradient step."""
    return jax.tree.map(lambda x, d: x - rate * d, params, direction)


def train_step(state, images, labels, algorithm, rate):
    """Trains one worker of one run on one batch."""
    model, memory, step = state
    loss, grads = nnx.value_and_grad(example.loss_fn)(model, images, labels)
    params = nnx.state(model, nnx.Param)
    match algorithm:
        case "all_reduce_sgd":
            params = descend(params, lax.pmean(grads, AXIS), rate)
        case "local_sgd":
            params = lax.cond(
                step % PERIOD == PERIOD - 1,
                lambda params: lax.pmean(params, AXIS),
                lambda params: params,
                descend(params, grads, rate),
            )
        case "d_psgd":
            params = descend(mix(params), grads, rate)
        case "dsgt":
            tracker, last = memory
            change = jax.tree.map(jnp.subtract, grads, last)
            tracker = jax.tree.map(jnp.add, mix(tracker), change)
            params = descend(mix(params), tracker, rate)
            memory = tracker, grads
    nnx.update(model, params)
    return (model, memory, step + 1), loss


def create(seed):
    """Returns the initial model, the memory of gradient tracking, and the step."""
    model = example.MLP(nnx.Rngs(jax.random.key(seed)))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    return model, (zeros, zeros), jnp.int32(0)


def accuracy(state, images, labels):
    """Evaluates the workers' averaged model, each worker on its part of the images."""
    model = state[0]
    nnx.update(model, lax.pmean(nnx.state(model, nnx.Param), AXIS))
    return lax.pmean((model(images).argmax(-1) == labels).mean(), AXIS)


def train(data, algorithm, seed, rate):
    """Trains one worker of one run, and returns validation and test accuracy."""
    (images, labels), validation_set, test_set = data

    def step(state, key):
        chosen = jax.random.randint(key, (example.BATCH,), 0, len(images))
        return train_step(state, images[chosen], labels[chosen], algorithm, rate)

    own_key = jax.random.fold_in(jax.random.key(seed), lax.axis_index(AXIS))
    keys = jax.random.split(own_key, example.STEPS)
    state, _ = lax.scan(step, create(seed), keys)
    return accuracy(state, *validation_set), accuracy(state, *test_set)


def grid():
    """Returns the seeds and the rates."""
    return jnp.array(example.SEEDS), jnp.array(example.RATES)


def over_runs(fn, seeds, rates):
    """Maps a function of a seed and a rate over all pairs."""
    return jax.vmap(jax.vmap(fn, (None, 0)), (0, None))(seeds, rates)


@partial(jax.jit, static_argnames="algorithm")
def sweep(data, seeds, rates, algorithm):
    """Returns the accuracies of all runs, each `[seeds, rates]`."""

    def one_device(data, seeds, rates):
        data = jax.tree.map(lambda x: x[0], data)
        return over_runs(partial(train, data, algorithm), seeds, rates)

    specs = SPLIT, WHOLE, WHOLE
    # The initial model is equal on all workers, but each needs its own gradient.
    run = jax.shard_map(
        one_device, mesh=MESH, in_specs=specs, out_specs=WHOLE, check_vma=False
    )
    return run(data, seeds, rates)


def main() -> float:
    """Trains all runs, prints a table, and returns the lowest accuracy in it."""
    data = jax.device_put(example.load_digits(), NamedSharding(MESH, SPLIT))
    seeds, rates = grid()
    print("algorithm       best rate test accuracy")
    accuracies = []
    for algorithm in example.ALGORITHMS:
        results = jax.device_get(sweep(data, seeds, rates, algorithm))
        accuracies.append(example.print_row(algorithm, *results))
    return min(accuracies)


def single_worker() -> float:
    """Trains one worker with the total batch for all seeds and rates."""
    sets = [
        (images.reshape(-1, 64), labels.reshape(-1))
        for images, labels in example.load_digits()
    ]
    (images, labels), *others = sets

    def run(seed, rate):
        def step(model, key):
            chosen = jax.random.randint(key, (SIZE * example.BATCH,), 0, len(images))
            _, grads = nnx.value_and_grad(example.loss_fn)(
                model, images[chosen], labels[chosen]
            )
            nnx.update(model, descend(nnx.state(model, nnx.Param), grads, rate))
            return model, None

        model = example.MLP(nnx.Rngs(jax.random.key(seed)))
        keys = jax.random.split(jax.random.key(seed), example.STEPS)
        model, _ = lax.scan(step, model, keys)
        return [(model(x).argmax(-1) == y).mean() for x, y in others]

    images, labels = jnp.asarray(images), jnp.asarray(labels)
    results = jax.jit(partial(over_runs, run))(*grid())
    return example.print_row("one worker", *jax.device_get(results))


def steps():
    """Compares the programs, and returns a step of `dsgt` of each, for all runs."""
    for algorithm in example.ALGORITHMS:
        ours, theirs = our_step(algorithm), their_step(algorithm)
        for _ in range(PERIOD + 1):
            pair = ours(), theirs()
        for mine, other in zip(*map(jax.tree.leaves, pair), strict=True):
            # The largest rate magnifies the rounding.
            mine, other = mine[:, :, :-1], other[:, :, :-1]
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    return our_step("dsgt"), their_step("dsgt")


def first_batch():
    """Returns the first images and labels of every worker."""
    images, labels = example.load_digits()[0]
    return images[:, : example.BATCH], labels[:, : example.BATCH]


def our_step(algorithm):
    """Returns a function that advances the example's runs and returns their models."""
    workers = dj.Workers(SIZE)
    optimizer = example.ALGORITHMS[algorithm]
    seeds, rates = grid()

    def one_worker(state, images, labels, rates):
        def one_run(state, rate):
            return example.train_step(state, images, labels, optimizer(rate))[0]

        return jax.vmap(jax.vmap(one_run), (0, None))(state, rates)

    step = workers.spmd(one_worker, donate_argnums=0, shared_argnames="rates")
    state = over_runs(lambda seed, r: example.create(seed, optimizer(r)), seeds, rates)
    return advancing(step, workers.replicate(state), *workers.shard(first_batch()))


def their_step(algorithm):
    """Returns a function that advances the runs by hand and returns their models."""
    seeds, rates = grid()

    @partial(jax.jit, donate_argnums=0)
    @partial(
        jax.shard_map,
        mesh=MESH,
        in_specs=(SPLIT, SPLIT, SPLIT, WHOLE),
        out_specs=SPLIT,
        check_vma=False,
    )
    def step(state, images, labels, rates):
        def one_run(state, rate):
            return train_step(state, images[0], labels[0], algorithm, rate)[0]

        state = jax.tree.map(lambda x: x[0], state)
        state = jax.vmap(jax.vmap(one_run), (0, None))(state, rates)
        return jax.tree.map(lambda x: x[None], state)

    state = over_runs(lambda seed, _: create(seed), seeds, rates)
    state = jax.tree.map(lambda x: jnp.stack([x] * SIZE), state)
    split = NamedSharding(MESH, SPLIT)
    return advancing(step, *jax.device_put((state, *first_batch()), split))


def advancing(step, state, images, labels):
    """Returns a function without arguments that runs one step until it is done."""
    _, rates = grid()

    def advance():
        nonlocal state
        state = jax.block_until_ready(step(state, images, labels, rates))
        return state[0]

    return advance
