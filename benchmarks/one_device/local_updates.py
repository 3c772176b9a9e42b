"""Measures the speed of simulating Multi-Level Local SGD, in gradients per second.

`python -m benchmarks.one_device.local_updates` simulates 10 hubs of 10 workers on
random images of MNIST's size: logistic regression with batch sizes 40 and 300, and the
paper's CNN with batch size 40. It measures the speed with and without an evaluation
every q * tau ticks, the speed of a NumPy loop over workers with the same arithmetic,
and, for logistic regression, the speed with 1,000 workers. On a CPU, the program
computes the gradients of the workers one after the other; on other devices, it computes
them together.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.numpy_loop import (
    cnn_gradient,
    logistic_gradient,
    multi_level_loop,
)
from benchmarks.support.timing import in_turn, machine
from experiments.training.models import BinaryLogistic, emnist_cnn

TAU, Q, EXAMPLES = 8, 4, 60_000


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-numpy", action="store_true")
    options = parser.parse_args()
    print(machine())
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (EXAMPLES, 28, 28, 1), np.uint8)
    for name, model, classes, batch, rounds in (
        ("logistic, batch 40", BinaryLogistic(), 2, 40, 4),
        ("logistic, batch 300", BinaryLogistic(), 2, 300, 2),
        ("CNN, batch 40", emnist_cnn(62), 62, 40, 1),
    ):
        labels = rng.integers(0, classes, EXAMPLES).astype(np.int32)
        ticks = rounds * TAU * Q
        data = pixels, labels
        # Functions to time, and the number of gradients that each of them computes.
        runs = {
            "evaluation off": _run(model, data, 10, batch, ticks, evaluate=False),
            "evaluation on": _run(model, data, 10, batch, ticks, evaluate=True),
        }
        counts = dict.fromkeys(runs, 100 * ticks)
        if not options.no_numpy:
            few = TAU if classes == 2 else 1
            runs["NumPy loop"] = _numpy_run(classes, data, batch, few)
            counts["NumPy loop"] = 100 * few
        more = "1,000 workers"
        if classes == 2:
            runs[more] = _run(model, data, 100, batch, ticks // rounds, evaluate=False)
            counts[more] = 1000 * (ticks // rounds)
        times = in_turn(runs, options.repeats)
        speeds = {k: 1e3 * counts[k] / times[k] for k in runs}
        print(f"\n{name}: gradients per second, all workers together")
        for k, speed in speeds.items():
            low, high = speed.min(), speed.max()
            print(f"{k:<16}{np.median(speed):>10,.0f}  ({low:,.0f} to {high:,.0f})")
        for k in ("NumPy loop", more):
            if k in speeds:
                pairs = speeds["evaluation off"] / speeds[k]
                print(f"evaluation off / {k}: {np.median(pairs):.2f}")


def _batches(num_hubs, batch, ticks):
    shape = (num_hubs, 10, ticks, batch)
    return np.random.default_rng(1).integers(EXAMPLES, size=shape, dtype=np.int32)


def _run(model, data, num_hubs, batch, ticks, evaluate):
    """Returns one compiled program that runs all ticks."""
    hubs = dj.topology.path(num_hubs)
    tx = dj.mll_sgd(0.01, hubs, tau=TAU, q=Q)
    workers = dj.Workers({"hub": num_hubs, "worker": 10}, devices=jax.devices()[:1])

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x.astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def gradient(params, batch, x, y):
        return jax.grad(loss_fn)(params, x[batch], y[batch])

    if jax.default_backend() == "cpu":
        gradient = jax.custom_batching.sequential_vmap(gradient)

    def rounds(carry, batches, x, y):
        def tick(carry, batch):
            params, state = carry
            updates, state = tx.update(gradient(params, batch, x, y), state, params)
            return (optax.apply_updates(params, updates), state), None

        # A round is q * tau ticks, followed by an optional evaluation.
        def one_round(carry, batches):
            carry, _ = lax.scan(tick, carry, batches)
            params, state = carry
            loss = jnp.zeros(())
            if evaluate:
                averaged = dj.eval_params(state, params, workers.axis_name)
                loss = loss_fn(averaged, x[:10_000], y[:10_000])
            return carry, loss

        return lax.scan(one_round, carry, batches)

    def all_workers(carry, batches, x, y):
        mapped = rounds
        for axis in ("worker", "hub"):
            # The loss is the same on all workers, and is computed once.
            out = ((0, 0), None if evaluate else 0)
            mapped = jax.vmap(mapped, (0, 0, None, None), out, axis_name=axis)
        return mapped(carry, batches, x, y)

    example = jnp.zeros((1, 28, 28, 1))
    params = model.init(jax.random.key(0), example)["params"]
    carry = workers.replicate((params, tx.init(params)))
    x, y = map(jnp.asarray, data)
    batches = _batches(num_hubs, batch, ticks)
    batches = jnp.asarray(batches.reshape(num_hubs, 10, -1, TAU * Q, batch))
    compiled = jax.jit(all_workers).lower(carry, batches, x, y).compile()
    return lambda: compiled(carry, batches, x, y)


def _numpy_run(classes, data, batch, ticks):
    """Returns a function that runs the NumPy loop."""
    rng = np.random.default_rng(2)

    def normal(*shape):
        return (0.1 * rng.normal(size=shape)).astype(np.float32)

    x, y = data
    batches = np.moveaxis(_batches(10, batch, ticks), 2, 0)
    hubs = dj.topology.path(10).matrix
    if classes == 2:
        gradient, x = logistic_gradient, x.reshape(EXAMPLES, -1)
        params = {"kernel": normal(784, 1), "bias": normal(1)}
    else:
        gradient = cnn_gradient
        params = {
            "conv1": normal(5, 5, 1, 10),
            "bias1": normal(10),
            "conv2": normal(5, 5, 10, 20),
            "bias2": normal(20),
            "dense1": normal(320, 100),
            "bias3": normal(100),
            "dense2": normal(100, 62),
            "bias4": normal(62),
        }

    def run():
        multi_level_loop(gradient, params, hubs, batches, (x, y), 0.01, TAU, Q)
        return jnp.zeros(())

    return run


if __name__ == "__main__":
    command.run(main)
