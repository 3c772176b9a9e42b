"""Measures the time per worker per step on one device, for 8 to 1,024 workers.

`python -m benchmarks.one_device.many_workers` measures

1. the time per worker per step, and the memory, of D-PSGD and DeTAG;
2. the time of a gossip round under `vmap`, relative to one copy of the same bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine, ratio, table
from experiments.training.models import MLP

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    options = parser.parse_args()
    print(machine())
    model = MLP((options.hidden,), 10)
    algorithms = {
        "D-PSGD, ring": lambda n: dj.d_psgd(0.1, dj.topology.ring(n)),
        "D-PSGD, exponential": lambda n: dj.d_psgd(0.1, dj.topology.exponential(n)),
        "DeTAG, ring, R=8": lambda n: dj.detag(0.1, dj.topology.ring(n), rounds=8),
    }
    for name, make in algorithms.items():
        runs = {n: _run(make(n), model, n, options.batch_size) for n in COUNTS}
        times = in_turn({str(n): run for n, (run, _) in runs.items()}, options.repeats)
        print(f"\n{name}: MLP 64-{options.hidden}-10, batch {options.batch_size}")
        print("workers   us per worker-step    relative   MB of state   MB at peak")
        # Microseconds per worker per step, relative to the lowest, and the memory.
        each = {n: np.median(times[str(n)]) * 1e3 / (n * _steps(n)) for n in COUNTS}
        for n in COUNTS:
            memory = runs[n][1]
            state = memory.argument_size_in_bytes / 1e6
            peak = state + memory.temp_size_in_bytes / 1e6
            share = each[n] / min(each.values())
            numbers = f"{each[n]:18.2f}   {share:9.2f}   {state:11.2f}   {peak:10.2f}"
            print(f"{n:7}   {numbers}")
    print("\nGossip round under vmap, relative to a copy of the same bytes")
    for n, size in ((8, 1_000_000), (64, 200_000), (1024, 20_000)):
        times = in_turn(_gossip_and_copy(n, size), 3 * options.repeats)
        print(f"\n{n} workers x {size:,} float32")
        print(table(times))
        for variant in list(times)[1:]:
            print(ratio(times, variant, "copy"))


def _steps(n):
    """Returns the number of steps per compiled call, so that all calls take long."""
    return max(32, 16384 // n)


def _run(tx, model, n, batch_size):
    """Returns a function that runs one compiled call, and its memory analysis."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    workers = dj.Workers(n, devices=jax.devices()[:1])
    state = workers.replicate((params, tx.init(params)))
    x = jax.random.normal(jax.random.key(1), (n, batch_size, 64))
    y = jnp.zeros((n, batch_size), jnp.int32)

    def many_steps(carry, x, y):
        def loss(params):
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, carry, length=_steps(n))[0]

    compiled = workers.spmd(many_steps).lower(state, x, y).compile()
    return lambda: compiled(state, x, y), compiled.memory_analysis()


def _gossip_and_copy(n, size):
    """Returns functions that copy, or mix by several topologies, the same array."""
    x = jax.random.normal(jax.random.key(0), (n, size))

    def gossip(topology):
        mix = jax.jit(jax.vmap(lambda x: dj.mix(x, topology), axis_name="workers"))
        return lambda: mix(x)

    # Scale the copy: for a plain copy, XLA would return the argument itself.
    copy = jax.jit(lambda x: x * jnp.float32(1.0000001))
    return {
        "copy": lambda: copy(x),
        "ring": gossip(dj.topology.ring(n)),
        "exponential": gossip(dj.topology.exponential(n)),
        "complete": gossip(dj.topology.complete(n)),
    }


if __name__ == "__main__":
    command.run(main)
