"""Measures the error of all algorithms in half precision after many steps.

`python -m benchmarks.one_device.precision` trains eight workers whose quadratics have
different optima, with noisy gradients and a constant learning rate, for 1e5 steps and
five seeds. Each algorithm runs in bfloat16 and float32, and D2 also in float64. The
benchmark averages the mean model of the workers over the second half of the steps, and
prints the distance of this average from the optimum. All-reduce in bfloat16 shows the
effect of rounding only the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax

import decentral_jax as dj
from benchmarks.support import command

N, SIZE, RATE = 8, 6, 0.05
RING = dj.topology.ring(N)
TOP, BLOCK = dj.compression.top_k(ratio=2), dj.compression.random_block(2)
# A directed graph on which worker 0 receives from more workers than the others.
UNBALANCED = dj.topology.from_graph(
    nx.DiGraph([(i, (i + 1) % N) for i in range(N)] + [(i, 0) for i in (2, 3, 5)]),
    weights="push",
)
TRACE = dj.traces.from_speeds([1, 1.1, 1.2, 1.3, 1.4, 1.5, 2, 3], 400_000)

ALGORITHMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "all_reduce_sgd": lambda: dj.all_reduce_sgd(RATE),
    "d_psgd": lambda: dj.d_psgd(RATE, RING),
    "d2": lambda: dj.d2(RATE, RING.lazy(0.75)),
    "dsgt": lambda: dj.dsgt(RATE, RING),
    "dsgt, adapt first": lambda: dj.dsgt(RATE, RING, order="adapt_then_combine"),
    "detag": lambda: dj.detag(RATE, RING, rounds=4),
    "defacto": lambda: dj.defacto(RATE, RING),
    "ef_sgd": lambda: dj.ef_sgd(RATE, BLOCK),
    "ef_sgd, top-k": lambda: dj.ef_sgd(RATE, TOP),
    "ef_sgd, period 4": lambda: dj.ef_sgd(RATE, BLOCK, period=4),
    "def_sgd": lambda: dj.def_sgd(RATE, BLOCK, detach=0.3),
    "def_sgd, top-k": lambda: dj.def_sgd(RATE, TOP, detach=0.3),
    "sgd_ia": lambda: dj.sgd_ia(RATE, ratio=4.0, detach=0.3),
    "cser": lambda: dj.cser(RATE, BLOCK, period=4),
    "choco_sgd": lambda: dj.choco_sgd(RATE, RING, TOP, consensus_rate=0.3),
    "local_sgd": lambda: dj.local_sgd(RATE, period=4),
    "slowmo": lambda: dj.slowmo(RATE, period=4),
    "sgp": lambda: dj.sgp(RATE, dj.topology.exponential(N)),
    "sgp, unbalanced": lambda: dj.sgp(RATE, UNBALANCED),
    "qg_dsgdm": lambda: dj.qg_dsgdm(RATE, RING),
    "apam": lambda: dj.apam(0.01, TRACE),
}


def _run(name: str, dtype: Any, steps: int, targets: jax.Array, key: jax.Array):
    """Trains all workers.

    Returns:
      The mean model averaged over the second half of the steps, and the last carry.
    """
    tx = ALGORITHMS[name]()
    wide = jnp.promote_types(dtype, jnp.float32)

    def step(params, state, target, noise):
        gradient = (params.astype(wide) - target + noise).astype(dtype)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    step = jax.vmap(step, axis_name="workers")
    model = jax.vmap(dj.eval_params, axis_name="workers")

    def body(carry, t):
        params, state, total, _ = carry
        noise = jax.random.normal(jax.random.fold_in(key, t), (N, SIZE), wide)
        params, state, gradient = step(params, state, targets.astype(wide), noise)
        now = model(state, params)[0].astype(total.dtype)
        total = total + jnp.where(t >= steps // 2, now, 0)
        return (params, state, total, gradient), None

    params = jnp.zeros((N, SIZE), dtype)
    state = jax.vmap(tx.init)(params)
    total = jnp.zeros(SIZE, jnp.promote_types(wide, jnp.result_type(float)))
    carry = (params, state, total, params)
    times = jnp.arange(steps, dtype=jnp.int32)
    carry, _ = jax.lax.scan(body, carry, times)
    return carry[2] / (steps - steps // 2), carry


def distances(name: str, dtype: Any, steps: int, seeds: int) -> np.ndarray:
    """Computes the distance of the averaged mean model from the optimum for each seed.

    The distance is the largest absolute difference of an entry.

    Args:
      name: A key of `ALGORITHMS`.
      dtype: Dtype of parameters and gradients.
      steps: Number of steps.
      seeds: Number of seeds; one program runs all of them.

    Returns:
      Distances, shape `[seeds]`.
    """
    targets = 3 + np.random.default_rng(0).normal(size=(seeds, N, SIZE))
    keys = jax.random.split(jax.random.key(1), seeds)

    def one(targets, key):
        return _run(name, dtype, steps, targets, key)[0]

    found = jax.jit(lambda *each: jax.lax.map(lambda x: one(*x), each))(
        jnp.asarray(targets, jnp.promote_types(dtype, jnp.float32)), keys
    )
    return np.abs(np.asarray(found) - targets.mean(1)).max(1)


def _mean(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64).mean(0)


def _public_sum_error(state: Any) -> np.ndarray:
    """Returns the error of CHOCO-SGD's sums of differences of public models."""
    public, away = (np.asarray(x, np.float64) for x in (state.public, state.away))
    return away - (RING.matrix @ public - public)


# Functions of the final parameters, state, and gradients whose result should be zero.
INVARIANTS: dict[str, Callable[[Any, Any, Any], np.ndarray]] = {
    "dsgt": lambda params, state, gradient: (
        _mean(state[0].tracker) - _mean(state[0].gradient)
    ),
    "dsgt, adapt first": lambda params, state, gradient: (
        _mean(state[0].tracker) - _mean(gradient)
    ),
    "detag": lambda params, state, gradient: (
        _mean(state.tracker) - _mean(state.previous)
    ),
    "d2": lambda params, state, gradient: _mean(state[-1].correction),
    "choco_sgd": lambda params, state, gradient: np.stack(
        [_mean(state[-1].away), *_public_sum_error(state[-1])]
    ),
    "sgp, unbalanced": lambda params, state, gradient: _mean(state[-1].weight) - 1,
    "def_sgd": lambda params, state, gradient: np.ptp(
        np.asarray(state[-1].shared, np.float64), axis=0
    ),
    "cser": lambda params, state, gradient: np.ptp(
        np.asarray(state[-1].shared, np.float64), axis=0
    ),
}


def invariant(name: str, dtype: Any, steps: int) -> float:
    """Returns the largest violation of an algorithm's invariant after some steps."""
    targets = 3 + np.random.default_rng(0).normal(size=(N, SIZE))
    run = jax.jit(functools.partial(_run, name, dtype, steps))
    _, (params, state, _, gradient) = run(
        jnp.asarray(targets, jnp.promote_types(dtype, jnp.float32)), jax.random.key(1)
    )
    return float(np.abs(INVARIANTS[name](params, state, gradient)).max())


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS))
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {options.steps} steps, {options.seeds} seeds")
    print(f"{'algorithm':<20}{'float32':>18}{'bfloat16':>18}{'invariant, bf16':>18}")
    for name in options.algorithms:
        cells = []
        for dtype in (jnp.float32, jnp.bfloat16):
            found = distances(name, dtype, options.steps, options.seeds)
            cells.append(f"{found.mean():.4f} ± {found.std():.4f}")
        error = ""
        if name in INVARIANTS:
            error = f"{invariant(name, jnp.bfloat16, options.steps):.1e}"
        print(f"{name:<20}{cells[0]:>18}{cells[1]:>18}{error:>18}", flush=True)
    if "d2" in options.algorithms:
        with jax.enable_x64(True):
            found = distances("d2", jnp.float64, options.steps, options.seeds)
        print(f"{'d2, float64':<20}{f'{found.mean():.4f} ± {found.std():.4f}':>18}")


if __name__ == "__main__":
    command.run(main)
