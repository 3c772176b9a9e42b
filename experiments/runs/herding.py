"""The herding test of CD-GraB (NeurIPS 2023): example orders without training.

Workers share a million vectors that are drawn uniformly, centered, and scaled to norm
one. Every round visits all vectors in each worker's order and determines the orders of
the next round. The test measures how far the prefix sums over all workers deviate from
zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax

import decentral_jax as dj
from experiments import report, styles
from experiments.errors import UsageError
from experiments.html_report import Chart, Series
from experiments.settings import check_at_least
from experiments.training.resuming import Memory

# Published means of rounds 11 to 15 for 5, 10, 20, 50, and 100 workers.
QUOTED = {
    "D-GraB": (2.59, 2.52, 2.45, 2.44, 2.26),
    "ID-GraB, pairs": (6.31, 8.50, 11.45, 17.67, 24.82),
    "ID-GraB, mean": (4.24, 6.09, 8.23, 12.60, 17.13),
}
QUOTED_WORKERS = (5, 10, 20, 50, 100)


@dataclasses.dataclass
class Herding:
    """Options of the herding test."""

    vectors: int = 1_000_000
    """Number of vectors of all workers together."""
    dimension: int = 16
    """Number of entries per vector."""
    shared_by: tuple[int, ...] = QUOTED_WORKERS
    """Numbers of workers that share the vectors; each gets an even number of them."""
    rounds: int = 15
    """Number of rounds over all vectors; results average the last five rounds."""
    draws: int = 1
    """Number of random draws of the vectors."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        for m in self.shared_by:
            if m < 1 or self.vectors % (2 * m):
                raise UsageError(
                    f"vectors={self.vectors} must divide into an even number of "
                    f"vectors for each of shared_by={m} workers."
                )
        check_at_least(self, 1, "dimension", "rounds", "draws")


def run(
    options: Herding, output: report.Output, memory: Memory
) -> dict[str, np.ndarray]:
    """Prints a table, and writes `herding.png` and `.csv`.

    Returns:
      The bounds of each method, shape `[len(options.shared_by), draws]`.
    """
    methods = {
        "D-GraB": lambda n, m: dj.d_grab(n, m),
        "ID-GraB, pairs": lambda n, m: dj.pair_balance(n),
        "ID-GraB, mean": lambda n, m: dj.grab(n),
        "D-RR": lambda n, m: dj.random_reshuffling(n),
    }
    found = {
        name: np.zeros((len(options.shared_by), options.draws)) for name in methods
    }
    for seed in range(options.draws):
        vectors = unit_vectors(options.vectors, options.dimension, seed)
        for i, m in enumerate(options.shared_by):
            parts = jnp.asarray(vectors.reshape(m, -1, options.dimension))
            for name, make in methods.items():

                def bounds(make=make, parts=parts, m=m):
                    tx = make(parts.shape[1], m)
                    return {"bounds": herding(tx, parts, options.rounds)}

                with output.progress.status(f"{name}, {m} workers"):
                    recalled = memory.recall(f"{name}, {m} workers, {seed}", bounds)
                found[name][i, seed] = recalled["bounds"][-5:].mean()
    _report(found, options, output)
    return found


def unit_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    """Draws uniform float32 vectors that are centered and scaled to norm one.

    Scaling shifts the mean of the vectors, and the shift would accumulate over all of
    them. Therefore, the vectors are centered again, which changes their norms by less
    than a thousandth.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(count, dimension))
    x -= x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return (x - x.mean(0)).astype(np.float32)


def herding(tx, vectors: jax.Array, rounds: int) -> np.ndarray:
    r"""Computes the herding bound of the orders in each round.

    .. math:: \max_t \Bigl\| \sum_{s \le t} \sum_i x_{i, \pi_i(s)} \Bigr\|_\infty

    Args:
      tx: Ordering transformation.
      vectors: Vectors of all workers, shape `[m, N, d]`.
      rounds: Number of rounds.

    Returns:
      The bounds, shape `[rounds]`.
    """
    n = vectors.shape[1]

    def worker(vectors):
        def one_round(state, _):
            given = vectors[dj.next_examples(state, n)]
            prefix = jnp.cumsum(lax.psum(given, "workers"), axis=0)
            return tx.update(given, state)[1], jnp.abs(prefix).max()

        state = tx.init(vectors[0])
        return lax.scan(one_round, state, length=rounds)[1]

    mapped = jax.vmap(worker, axis_name="workers")
    return np.asarray(jax.jit(mapped)(vectors))[0]


def _report(
    found: dict[str, np.ndarray], options: Herding, output: report.Output
) -> None:
    figure = plt.figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    rows, lines, series = [], [], []
    for name, bounds in found.items():
        published = QUOTED.get(name, (None,) * len(QUOTED_WORKERS))
        quoted: dict[int, float | None] = dict(
            zip(QUOTED_WORKERS, published, strict=True)
        )
        cells = zip(options.shared_by, bounds, strict=True)
        lines.append((name, *(_cell(of_m, quoted.get(m)) for m, of_m in cells)))
        style = styles.STYLES[name].matplotlib()
        ax.loglog(options.shared_by, bounds.mean(1), label=name, **style)
        x, y = {"workers": options.shared_by}, {"largest prefix sum": bounds.T}
        series.append(Series(name, x, y))
        rows += [
            {"method": name, "workers": m, "seed": seed, "bound": bound}
            for m, of_m in zip(options.shared_by, bounds, strict=True)
            for seed, bound in enumerate(of_m)
        ]
    title = f"Herding bound, {options.draws} draws"
    columns = "method", *(f"m = {m}" for m in options.shared_by)
    notes = [
        "Mean and standard deviation over draws, the lowest and highest draw, and in "
        "parentheses the published value; † marks values outside the range of the "
        "draws."
    ]
    output.table("herding", report.Table(title, columns, lines, notes))
    ax.set_xlabel("workers")
    ax.set_ylabel("largest prefix sum")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    output.figure("herding", figure)
    output.chart(Chart(title, series, ("workers", "largest prefix sum")))
    output.csv("herding", rows)


def _cell(bounds: np.ndarray, quoted: float | None) -> str:
    """Formats the bounds for one number of workers, next to the published value."""
    text = report.spread(bounds, 2)
    if len(bounds) > 1:
        text += f", {bounds.min():.2f} to {bounds.max():.2f}"
    if quoted is None:
        return text
    inside = len(bounds) == 1 or bounds.min() <= quoted <= bounds.max()
    return f"{text} ({quoted:.2f}{'' if inside else '†'})"
