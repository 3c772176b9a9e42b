"""JAX process of `multi_process.py`, which builds and times steps on command."""

import itertools
import json
import sys
import time

import jax

from benchmarks.support.answers import ANSWERS, RANK, SIZE, join

join()

import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import decentral_jax as dj

WIDTH = int(sys.argv[1])
RATE = 0.01
WORKERS = dj.Workers(SIZE)


def initial_params():
    """Returns the parameters of an MLP with He initialization."""
    rng = np.random.default_rng(0)
    widths = [784, WIDTH, WIDTH, WIDTH, 10]
    return [
        {
            "kernel": np.float32(rng.normal(size=(i, o)) * np.sqrt(2 / i)),
            "bias": np.zeros(o, np.float32),
        }
        for i, o in itertools.pairwise(widths)
    ]


def loss_fn(params, batch):
    """Computes the mean cross-entropy of a ReLU MLP."""
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch():
    """Returns one batch, with 16 examples per worker."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(SIZE, 16, 784)))
    return WORKERS.shard((x, np.tile(np.arange(16, dtype=np.int32) % 10, (SIZE, 1))))


def library(tx):
    """Returns a training step with the library, and its initial state."""

    def one_worker(state, batch):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = initial_params()
    state = WORKERS.replicate((params, tx.init(params)))
    return WORKERS.spmd(one_worker, donate_argnums=0), state


def by_hand_ring():
    """Returns a step of D-PSGD on a ring without the library, and its initial state."""
    right = [(i, (i + 1) % SIZE) for i in range(SIZE)]
    left = [(i, (i - 1) % SIZE) for i in range(SIZE)]

    def one_device(params, batch):
        params, batch = jax.tree.map(lambda x: x[0], (params, batch))
        grads = jax.grad(loss_fn)(params, batch)

        def new(x, g):
            a, b = lax.ppermute(x, "workers", right), lax.ppermute(x, "workers", left)
            return (((x + a + b) / 3) - RATE * g)[None]

        return jax.tree.map(new, params, grads)

    spec = PartitionSpec("workers")
    mesh = Mesh(np.array(jax.devices()), ("workers",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped, donate_argnums=0), WORKERS.replicate(initial_params())


def exchange(update, start):
    """Returns a step without training, and its initial state.

    Args:
      update: Function from four gradients with `WIDTH` entries and a state to the mean
        gradient and a new state.
      start: Function from parameters to the initial state.
    """
    rng = np.random.default_rng(RANK)
    grads = rng.normal(size=(4, WIDTH)).astype(np.float32)
    mean = np.zeros(WIDTH, np.float32)

    def one_worker(state, batch):
        del batch
        grads, _, state = state
        mean, state = update(grads, state)
        return grads, mean, state

    state = WORKERS.replicate((grads, mean, start(mean)))
    return WORKERS.spmd(one_worker, donate_argnums=0), state


def ordering(**options):
    """Returns a step of D-GraB with microbatches of four, and its initial state."""
    tx = dj.d_grab(1000, SIZE, **options)
    return exchange(tx.update, tx.init)


def one_average():
    """Returns an all-reduce of one gradient, and its initial state."""
    tx = dj.average_gradients()
    return exchange(lambda grads, state: tx.update(grads[0], state), tx.init)


TOPOLOGY = dj.topology
BUILD = {
    "none": lambda: library(optax.sgd(RATE)),
    "all_reduce_sgd": lambda: library(dj.all_reduce_sgd(RATE)),
    "d_psgd one-peer ring": lambda: library(
        dj.d_psgd(RATE, TOPOLOGY.one_peer_ring(SIZE))
    ),
    "d_psgd one-peer exponential": lambda: library(
        dj.d_psgd(RATE, TOPOLOGY.one_peer_exponential(SIZE))
    ),
    "d_psgd ring": lambda: library(dj.d_psgd(RATE, TOPOLOGY.ring(SIZE))),
    "by hand ring": by_hand_ring,
    "none, momentum": lambda: library(optax.sgd(RATE, 0.9)),
    "all_reduce_sgd, momentum": lambda: library(
        dj.all_reduce_sgd(optax.sgd(RATE, 0.9))
    ),
    "DEF, ratio 64": lambda: library(
        dj.def_sgd(optax.sgd(RATE, momentum=0.9), dj.compression.random_block(64))
    ),
    "EF, ratio 64": lambda: library(
        dj.ef_sgd(optax.sgd(RATE, momentum=0.9), dj.compression.random_block(64))
    ),
    "EF, sign": lambda: library(
        dj.ef_sgd(optax.sgd(RATE, momentum=0.9), dj.compression.sign())
    ),
    "one all-reduce": one_average,
    "D-GraB": ordering,
    "D-GraB, gathered": lambda: ordering(gathered=True),
    "D-GraB, sketch 4096": lambda: ordering(sketch=4096),
    "PowerSGD, rank 4": lambda: library(
        dj.powersgd(optax.sgd(RATE, momentum=0.9), rank=4)
    ),
}


def main() -> None:
    """Executes commands until standard input ends."""
    data, built = batch(), {}
    for line in sys.stdin:
        command, name, *rest = json.loads(line)
        if command == "make":
            built[name] = BUILD[name]()
            print(json.dumps(None), file=ANSWERS)
            continue
        (steps,) = rest
        step, state = built[name]
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, data)
        jax.block_until_ready(state)
        milliseconds = 1e3 * (time.perf_counter() - start) / steps
        built[name] = step, state
        print(json.dumps(milliseconds), file=ANSWERS)


if __name__ == "__main__":
    main()
