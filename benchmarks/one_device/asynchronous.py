"""Asynchronous against synchronous workers, and what the master costs.

`python -m benchmarks.one_device.asynchronous` emulates computing by a sleep in the
batches, as the workers share this machine's cores; the engine's threads, queues and
steps are real:

1. four workers, one three times slower: gradients a second of both modes;
2. eight equal workers;
3. the master's time a gradient for a million parameters under AMSGrad.

The rates leave out each worker's first gradient: its batch is drawn before the clock.
"""

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.support import command
from benchmarks.support.timing import machine
from decentral_jax import engine


def main() -> None:
    """Measures and prints."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradients", type=int, default=400)
    parser.add_argument("--unit", type=float, default=0.02, help="seconds a gradient")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(machine())
    slow = np.array([1, 1, 1, 3])
    cases = {
        "4 workers, one 3x slower, asynchronous": (slow, {}, (1 / slow).sum()),
        "4 workers, one 3x slower, staleness <= 4": (
            slow,
            {"max_staleness": 4},
            # The fast ones make 4 updates while the slow one computes, and its own.
            5 / 3,
        ),
        "4 workers, one 3x slower, synchronous": (slow, {"synchronous": True}, 4 / 3),
        "8 equal workers, asynchronous": (np.ones(8), {}, 8.0),
        "8 equal workers, synchronous": (np.ones(8), {"synchronous": True}, 8.0),
    }
    print(
        f"\nGradients in units of 1 / {1e3 * options.unit:.0f} ms, medians of repeats"
    )
    for name, (factors, mode, ideal) in cases.items():
        rates = [
            _rate(options.unit * factors, options.gradients, mode) * options.unit
            for _ in range(options.repeats)
        ]
        rate = np.median(rates)
        print(
            f"{name:<41} {rate:6.3f} ({min(rates):.3f} to {max(rates):.3f}), "
            f"ideal {ideal:.3f}, ratio {rate / ideal:.3f}"
        )
    print("\nThe master's time a gradient, 1,000,000 parameters, AMSGrad")
    times = [_overhead(options.gradients) for _ in range(options.repeats)]
    print(f"{np.median(times):.3f} ms ({min(times):.3f} to {max(times):.3f})")


def _rate(seconds, num_gradients, mode):
    result = _run(8, seconds, optax.sgd(1e-3), num_gradients, **mode)
    return (num_gradients - len(seconds)) / result.seconds


def _overhead(num_gradients):
    """With one worker, so that its computing does not disturb the master's."""
    result = _run(1_000_000, [0], optax.amsgrad(1e-3), num_gradients)
    return 1e3 * result.master_seconds / num_gradients


def _run(size, seconds, optimizer, num_gradients, **mode):
    """Trains so many parameters; each worker's batches take so many seconds."""
    batch = jnp.ones(())

    def batches(worker):
        while True:
            time.sleep(seconds[worker])
            yield batch

    return engine.run(
        jax.grad(lambda x, batch: jnp.sum((x - batch) ** 2)),
        jnp.zeros(size),
        batches,
        optimizer,
        num_gradients,
        num_workers=len(seconds),
        **mode,
    )


if __name__ == "__main__":
    command.run(main)
