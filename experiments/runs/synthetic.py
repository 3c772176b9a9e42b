"""Heterogeneous quadratics on a sparse ring, where the algorithms differ most.

Eight workers minimize the sum of `f_i(x) = ||A_i x - b_i||^2 / 2`. The entries of A_i,
shape `[d, d]`, are drawn from N(0, 1/d), b_i is drawn from N(0, I), and gradients have
N(0, I) noise. The ring has weights 1/3 and is made lazier by kappa. The error is the
mean over workers of `||x_i - x*||^2 / ||x_0 - x*||^2`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from experiments import catalog, report
from experiments.errors import from_options
from experiments.html_report import Chart, Series
from experiments.settings import RunOptions, check_at_least, check_positive
from experiments.training import resuming

NUM_WORKERS, DIMENSION = 8, 20

# Errors of a single trial run, given with the design of this experiment.
QUOTED = {"D-PSGD": 2.1e-1, "D2": 9.5e-3, "DSGT": 8.4e-3, "DeTAG": 4.7e-3}


@dataclasses.dataclass
class Synthetic(RunOptions):
    """Compares errors on heterogeneous quadratics, with the best rate per algorithm."""

    kappa: float = 0.1
    """Sparsity of the ring: kappa W + (1 - kappa) I, with weights 1/3 in W."""
    rounds: int = 16
    """DeTAG's rounds per phase."""
    iterations: int = 2000
    """Number of gradients per worker."""
    rates: tuple[float, ...] = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)
    """Learning rates to tune over."""
    seeds: int = 6
    """Number of random problems, each with its own noise."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        check_at_least(self, 1, "rounds", "iterations")
        check_positive(self, "rates")


def run(options: Synthetic, output: report.Output) -> dict[str, np.ndarray]:
    """Prints a table, writes `synthetic.csv`, and returns errors `[rates, seeds]`."""
    with from_options():
        topology = dj.topology.ring(NUM_WORKERS).lazy(options.kappa)
    entries = {
        "all-reduce SGD": catalog.Entry(dj.all_reduce_sgd),
        **catalog.decentralized(topology, options.rounds),
    }
    problems = _problems(options)
    memory = resuming.memory(options)
    errors = {
        name: memory.recall(
            name, lambda entry=entry: {"errors": _errors(entry.make, options, problems)}
        )["errors"]
        for name, entry in entries.items()
    }
    # The best rate has the lowest geometric mean of the errors over seeds.
    rows, lines = [], []
    for name, error in errors.items():
        mean = np.exp(np.log(error).mean(1))
        best = int(np.nanargmin(mean))
        lines.append(
            (
                name,
                f"{mean[best]:.1e}",
                f"{error[best].min():.1e} to {error[best].max():.1e}",
                report.rate(options.rates, best),
            )
        )
        rows += [
            {"algorithm": name, "rate": rate, "seed": seed, "relative_error": value}
            for rate, of_rate in zip(options.rates, error, strict=True)
            for seed, value in enumerate(of_rate)
        ]
    title = f"Relative squared error after {options.iterations} iterations"
    columns = "algorithm", "geometric mean", "lowest to highest seed", "best rate"
    output.table("synthetic", report.Table(title, columns, lines))
    output.csv("synthetic", rows)
    rates = {"learning rate": options.rates}
    series = [
        Series(name, rates, {"relative error": error.T})
        for name, error in errors.items()
    ]
    output.chart(Chart(title, series, ("learning rate", "relative error")))
    output.html("synthetic")
    return errors


def _problems(options: Synthetic) -> tuple[np.ndarray, ...]:
    """Draws matrices, right-hand sides, noise, and optima, with a leading seed axis."""
    n, d = NUM_WORKERS, DIMENSION
    drawn = []
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        matrix = rng.normal(size=(n, d, d)) / np.sqrt(d)
        right = rng.normal(size=(n, d))
        noise = rng.normal(size=(options.iterations, n, d))
        # The optimum solves the normal equations of the sum over workers.
        hessian = np.einsum("nij,nik->jk", matrix, matrix)
        optimum = np.linalg.solve(hessian, np.einsum("nij,ni->j", matrix, right))
        drawn.append((matrix, right, noise.swapaxes(0, 1), optimum))
    arrays = (
        np.stack(arrays).astype(np.float32) for arrays in zip(*drawn, strict=True)
    )
    return tuple(arrays)


def _errors(make, options: Synthetic, problems) -> np.ndarray:
    """Computes the final relative error of every rate and seed, `[rates, seeds]`."""

    def run(rate, matrix, right, noise, optimum):
        tx = make(rate)

        def worker(matrix, right, noise):
            def iteration(carry, noise_now):
                x, state = carry
                gradient = matrix.T @ (matrix @ x - right) + noise_now
                updates, state = tx.update(gradient, state, x)
                return (optax.apply_updates(x, updates), state), None

            x = jnp.zeros(DIMENSION)
            (x, _), _ = lax.scan(iteration, (x, tx.init(x)), noise)
            return jnp.sum((x - optimum) ** 2) / jnp.sum(optimum**2)

        return jax.vmap(worker, axis_name="workers")(matrix, right, noise).mean()

    over_seeds = jax.vmap(run, in_axes=(None, 0, 0, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(0, None, None, None, None))
    rates = jnp.asarray(options.rates, jnp.float32)
    return np.asarray(jax.jit(over_rates)(rates, *problems))
