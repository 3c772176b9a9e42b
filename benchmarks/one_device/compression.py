"""Measures the compute cost of compression, with all workers on one device.

`python -m benchmarks.one_device.compression` compares a step with momentum, compressor,
and error feedback under `vmap` with one read and one write of parameters, residual, and
momentum. It also prints how much the compressor and the error feedback add to a step
with momentum alone.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine, ratio, table


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    print(machine())
    block = dj.compression.random_block(64)
    variants = {
        "momentum SGD": optax.sgd(0.01, 0.9),
        "DEF, ratio 64": dj.def_sgd(optax.sgd(0.01, momentum=0.9), block),
        "EF, ratio 64": dj.ef_sgd(optax.sgd(0.01, momentum=0.9), block),
        "EF, sign": dj.ef_sgd(optax.sgd(0.01, momentum=0.9), dj.compression.sign()),
    }
    for width in (128, 560):
        params = _params(width, options.workers)
        size = sum(x.size for x in jax.tree.leaves(params)) // options.workers
        runs = {"read and write": _passes(params)}
        runs |= {name: _step(tx, params) for name, tx in variants.items()}
        times = in_turn(runs, options.repeats)
        print(f"\n{options.workers} workers x {size:,} parameters")
        print(table(times))
        for name in variants:
            print(ratio(times, name, "read and write"))
        for name in list(variants)[1:]:
            added = (times[name] - times["momentum SGD"]) / times["read and write"]
            print(f"{name}, beyond momentum: {np.median(added):.3f}")


def _params(width, workers):
    """Returns the leaves of a multilayer perceptron, with one copy per worker."""
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise([784, width, width, width, 10]))
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(workers, i, o)), jnp.float32),
            "bias": jnp.zeros((workers, o)),
        }
        for i, o in shapes
    ]


def _in_place(fn, state):
    """Returns a function that repeatedly applies `fn` to its result, in place."""
    jitted = jax.jit(fn, donate_argnums=0)
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        held[0] = jitted(held[0])
        return held[0]

    return run


def _passes(params):
    """Returns a function that reads and writes three copies of the parameters."""

    def fn(state):
        return jax.tree.map(lambda x: x * jnp.float32(0.9999999), state)

    return _in_place(fn, [params, params, params])


def _step(tx, params):
    """Returns a function that takes a step of all workers, in place."""

    def one(state):
        params, opt_state = state
        # The gradient of |x|^2 / 2 is x, so that no pass is needed to compute it.
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = params, jax.vmap(tx.init)(params)
    return _in_place(jax.vmap(one, axis_name="workers"), state)


if __name__ == "__main__":
    command.run(main)
