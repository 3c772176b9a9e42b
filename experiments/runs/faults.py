"""Training with missing workers: in every round, random workers do not exchange.

D-PSGD, DeTAG, and CHOCO-SGD train on a ring of workers whose data differ. Missing
workers continue to compute, and their neighbors correct the mixing weights. The
experiment measures how much worse the results become.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import decentral_jax as dj
from experiments import catalog, figures, report, settings, styles
from experiments.catalog import Entry
from experiments.errors import UsageError, from_options
from experiments.training import results, resuming


@dataclasses.dataclass
class Faults(settings.ComparisonOptions):
    """Compares D-PSGD, DeTAG, and CHOCO-SGD with workers missing in every round."""

    missing: tuple[int, ...] = (0, 2, 4)
    """Numbers of missing workers, which are chosen at random in every round."""
    ratio: float = 8.0
    """Compression ratio of CHOCO-SGD: number of entries in a leaf per entry sent."""
    consensus_rate: float = 0.2
    """Step size of CHOCO-SGD toward the neighbors."""
    shuffled: float = 25.0
    """Percentage of the label-sorted examples to shuffle."""
    workers: int = 16
    """Number of workers on the ring."""
    iterations: int = 2000
    """Number of gradients per worker."""
    rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    """Learning rates to tune over; results show the best rate of each algorithm."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        inside = [0 <= missing < self.workers for missing in self.missing]
        if not inside or not all(inside):
            raise UsageError(
                f"missing={self.missing} must be at least 0 and less than "
                f"workers={self.workers}."
            )


def run(options: Faults, output: report.Output) -> dict[int, list[results.Result]]:
    """Prints one table per number of missing workers; writes a figure and a `.csv`.

    Returns:
      The results for each number of missing workers.
    """
    setting = options.setting(options.shuffled)
    ring = dj.topology.ring(options.workers)
    with from_options():
        top = dj.compression.top_k(options.ratio)
    algorithms: dict[str, Callable] = {
        "D-PSGD": lambda rate: dj.d_psgd(rate, ring),
        "DeTAG": lambda rate: dj.detag(rate, ring, rounds=catalog.phase_length(ring)),
        "CHOCO-SGD": lambda rate: dj.choco_sgd(
            rate, ring, top, consensus_rate=options.consensus_rate
        ),
    }
    found, rows = {}, []
    for missing in options.missing:
        entries = {
            name: Entry(lambda rate, make=make, m=missing: without(make(rate), m))
            for name, make in algorithms.items()
        }
        title = f"{missing} of {options.workers} missing"
        found[missing] = results.run_all(
            entries, setting, output.progress, title, resuming.memory(options)
        )
        table = report.comparison(found[missing], f"{title}, {options.dataset}")
        output.table(f"missing_{missing}", table)
        rows += results.rows(found[missing], missing=missing)
    # Summarize all numbers of missing workers in one table and one figure.
    cells = {f"{missing} missing": of_these for missing, of_these in found.items()}
    title = f"{options.dataset}, {options.workers} workers"
    output.table("summary", report.summary(cells, title))
    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(algorithms), sharey=True)
    looks = styles.assign(cells)
    for i, (ax, name) in enumerate(zip(axes, algorithms, strict=True)):
        for label, of_these in cells.items():
            loss = of_these[i].at_best("train_loss")
            report.plot_seeds(
                ax, of_these[i].curves.iteration, loss, label, looks[label]
            )
        same = [of[i]._replace(name=label) for label, of in cells.items()]
        output.chart(figures.chart(same, name))
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("iterations")
        ax.set_yscale("log")
    axes[0].set_ylabel("train loss")
    axes[-1].legend(fontsize=8)
    figure.suptitle(
        f"{options.dataset}, {options.workers} workers on a ring, {options.seeds} "
        "seeds; missing at random in every round",
        fontsize=9,
    )
    output.figure("faults", figure)
    output.csv("faults", rows)
    output.html("faults")
    return found


def without(
    tx: optax.GradientTransformation, missing: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps an algorithm so that `missing` random workers are missing in each round."""
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return jnp.zeros([], jnp.int32), tx.init(params)

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        count, inner = state
        active = dj.sample_active(count, missing) if missing else None
        updates, inner = tx.update(updates, inner, params, active=active, **extra_args)
        return updates, (count + 1, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
