"""Measures the cost of the steps between two exchanges, relative to plain SGD.

`python -m benchmarks.one_device.steps_alone` trains an MLP with 1.0M parameters, batch
size 16, with eight workers: under `vmap` on one device, and on four fake CPU devices.
It compares plain SGD with steps of Local SGD, MLL-SGD, and DiLoCo that exchange
nothing, and with an average in every step.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine, ratio, table
from experiments.training.models import MLP

NEVER = 1_000_000  # a period longer than any run


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    print(machine())
    sgd = optax.sgd(0.01)
    hubs = dj.topology.ring(4)
    variants = {
        "SGD alone": (sgd, 8),
        "Local SGD, alone": (dj.local_sgd(0.01, period=NEVER), 8),
        "MLL-SGD, alone": (
            dj.mll_sgd(0.01, hubs, tau=NEVER, q=2),
            {"hub": 4, "worker": 2},
        ),
        "DiLoCo on SGD, alone": (dj.diloco(sgd, period=NEVER), 8),
        "an average every step": (dj.local_sgd(0.01, period=1), 8),
    }
    for num_devices, length in ((1, 1), (1, 10), (4, 1)):
        runs = {
            name: _steps(tx, dj.Workers(shape, jax.devices()[:num_devices]), length)
            for name, (tx, shape) in variants.items()
        }
        times = in_turn(runs, repeats, calls=max(1, 3 // length))
        print(f"\n8 workers on {num_devices} device(s), {length} step(s) per call")
        print(table(times))
        for name in list(variants)[1:]:
            print(ratio(times, name, "SGD alone"))


def _steps(tx: optax.GradientTransformation, workers: dj.Workers, length: int):
    """Returns a function that takes `length` steps and keeps the new state."""
    model = MLP((784, 440), 10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
    x = np.random.default_rng(0).normal(size=(*workers.shape, 16, 784))
    x = workers.shard(x.astype(np.float32))

    def step(carry, x):
        params, state = carry

        def loss(params):
            logits = cast(jax.Array, model.apply({"params": params}, x))
            labels = jnp.zeros(16, jnp.int32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def steps(carry, x):
        if length == 1:
            return step(carry, x)
        return lax.scan(lambda carry, _: (step(carry, x), None), carry, length=length)[
            0
        ]

    run = workers.spmd(steps, donate_argnums=0)
    box = [workers.replicate((params, tx.init(params)))]

    def advance():
        box[0] = run(box[0], x)
        return box[0]

    return advance


if __name__ == "__main__":
    command.run(main)
