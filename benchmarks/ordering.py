"""What ordering examples costs beside the mean of their gradients.

`python -m benchmarks.ordering`: all workers on one device, microbatches of 4, from 4 to
64 workers and 10^4 to 10^6 parameters; a step of D-GraB, which orders and averages,
against one mean over the same array of gradients.
"""

import argparse

import jax
import jax.numpy as jnp

import decentral_jax as dj
from benchmarks.timing import in_turn, machine, ratio, table

BATCH = 4


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    print(machine())
    for d in (10_000, 100_000, 1_000_000):
        for n in (4, 16, 64):
            calls = max(1, 20_000_000 // (n * BATCH * d))
            times = in_turn(_runs(n, d), repeats, calls)
            print(f"\n{n} workers x {BATCH} gradients of {d:,} entries")
            print(table(times))
            print(ratio(times, "D-GraB", "mean"))


def _runs(n, d):
    grads = jax.random.normal(jax.random.key(0), (n, BATCH, d))
    tx = dj.d_grab(1000, n)
    order = jax.jit(jax.vmap(tx.update, axis_name="workers"), donate_argnums=1)
    state = jax.vmap(tx.init)(jnp.zeros((n, d)))
    box = [state]

    def d_grab():
        mean, box[0] = order(grads, box[0])
        return mean

    mean = jax.jit(lambda grads: grads.mean((0, 1)))
    return {"mean": lambda: mean(grads), "D-GraB": d_grab}


if __name__ == "__main__":
    main()
