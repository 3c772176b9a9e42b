"""Compares asynchronous with synchronous workers, and measures the master's overhead.

`python -m benchmarks.one_device.asynchronous` emulates compute time by a sleep before
each batch, because the workers share the cores of this machine. The threads, queues,
and optimizer steps of the engine are real. The benchmark measures

1. gradients per second in both modes, for four workers, one of them three times slower;
2. the same for eight workers of equal speed;
3. the master's time per gradient, for a million parameters and AMSGrad.

The first gradient of each worker is not counted, because its batch is drawn before the
clock starts.
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
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradients", type=int, default=400)
    parser.add_argument("--unit", type=float, default=0.02, help="seconds per gradient")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(machine())
    slow = np.array([1, 1, 1, 3])
    cases = {
        "4 workers, one 3x slower, asynchronous": (slow, {}, (1 / slow).sum()),
        "4 workers, one 3x slower, staleness <= 4": (
            slow,
            {"max_staleness": 4},
            # In 3 units of time, the slow worker applies one gradient, and the fast
            # workers apply the 4 gradients that the limit allows.
            5 / 3,
        ),
        "4 workers, one 3x slower, synchronous": (slow, {"synchronous": True}, 4 / 3),
        "8 equal workers, asynchronous": (np.ones(8), {}, 8.0),
        "8 equal workers, synchronous": (np.ones(8), {"synchronous": True}, 8.0),
    }
    print(f"\nGradients per {1e3 * options.unit:.0f} ms, medians of repeats")
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
    print("\nThe master's time per gradient, 1,000,000 parameters, AMSGrad")
    times = [_overhead(options.gradients) for _ in range(options.repeats)]
    print(f"{np.median(times):.3f} ms ({min(times):.3f} to {max(times):.3f})")


def _rate(seconds, num_gradients, mode):
    """Returns gradients per second, without the first gradient of each worker."""
    result = _run(8, seconds, optax.sgd(1e-3), num_gradients, **mode)
    return (num_gradients - len(seconds)) / result.seconds


def _overhead(num_gradients):
    """Returns the master's milliseconds per gradient.

    There is only one worker, so that its computation does not slow down the master.
    """
    result = _run(1_000_000, [0], optax.amsgrad(1e-3), num_gradients)
    return 1e3 * result.master_seconds / num_gradients


def _run(size, seconds, optimizer, num_gradients, **mode):
    """Trains `size` parameters; each batch of worker i takes `seconds[i]`."""
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
