"""Compares a gossip step with a hand-written one, and packed with unpacked exchanges.

`python -m benchmarks.one_device.gossip_step` compares on eight fake CPU devices

1. a step of `dj.d_psgd` on a ring with a hand-written step in `jax.shard_map`, for
   ResNet-20 and an MLP; the batch size is 1, so that the exchange is a large part of
   the time;
2. an exchange without training whose leaves are packed into buckets with an exchange
   leaf by leaf.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine, ratio, table
from decentral_jax import mixing
from experiments.training.models import MLP, ResNet20


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    workers = dj.Workers(8)
    print(machine())
    for name, model, shape in (
        ("ResNet-20", ResNet20(10), (8, 1, 32, 32, 3)),
        ("MLP 1M", MLP((784, 440), 10), (8, 1, 28, 28, 1)),
    ):
        times = in_turn(_steps(workers, model, shape), repeats, calls=3)
        print(f"\nStep of D-PSGD on a ring of 8, {name}, batch 1")
        print(table(times))
        print(ratio(times, "library", "by hand"))
    times = in_turn(_exchanges(workers), repeats, calls=5)
    print("\nExchange without training, leaves of ResNet-20")
    print(table(times))
    print(ratio(times, "packed", "leaf by leaf"))


def _steps(workers: dj.Workers, model, shape) -> dict:
    """Returns functions that take a step with the library, and by hand."""
    ring = dj.topology.ring(8)
    params = model.init(jax.random.key(0), jnp.zeros(shape[1:]))["params"]
    batch = workers.shard(
        (
            jax.random.normal(jax.random.key(1), shape),
            jnp.zeros(shape[:2], jnp.int32),
        )
    )
    tx = dj.d_psgd(0.1, ring)

    def gradient(params, batch):
        def loss(params):
            logits = model.apply({"params": params}, batch[0])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return losses.mean()

        return jax.grad(loss)(params)

    def library(carry, batch):
        params, state = carry
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    right = [(i, (i + 1) % 8) for i in range(8)]
    left = [(i, (i - 1) % 8) for i in range(8)]

    def by_hand(params, batch):
        params, batch = jax.tree.map(lambda x: x[0], (params, batch))
        grads = gradient(params, batch)

        def new(x, g):
            received = (
                lax.ppermute(x, "workers", right),
                lax.ppermute(x, "workers", left),
            )
            return (x + received[0] + received[1]) / 3 - 0.1 * g

        return jax.tree.map(lambda x, g: new(x, g)[None], params, grads)

    spec = PartitionSpec("workers")
    mesh = Mesh(np.array(jax.devices()), ("workers",), axis_types=(AxisType.Auto,))
    by_hand = jax.jit(
        jax.shard_map(by_hand, mesh=mesh, in_specs=spec, out_specs=spec),
        donate_argnums=0,
    )
    variants = {
        "library": (
            workers.spmd(library, donate_argnums=0),
            workers.replicate((params, tx.init(params))),
        ),
        "by hand": (by_hand, workers.replicate(params)),
    }
    return {name: _loop(fn, state, batch) for name, (fn, state) in variants.items()}


def _loop(fn, state, batch):
    """Returns a function that takes a step and keeps the new state."""
    box = [state]

    def run():
        box[0] = fn(box[0], batch)
        return box[0]

    return run


def _exchanges(workers: dj.Workers) -> dict:
    """Returns functions that mix the leaves packed, and leaf by leaf."""
    ring = dj.topology.ring(8)
    params = ResNet20(10).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    state = workers.replicate(params)

    def leaf_by_leaf(tree):
        return jax.tree.map(lambda x: mixing.mix(x, ring), tree)

    return {
        "packed": functools.partial(workers.spmd(lambda t: mixing.mix(t, ring)), state),
        "leaf by leaf": functools.partial(workers.spmd(leaf_by_leaf), state),
    }


if __name__ == "__main__":
    command.run(main)
