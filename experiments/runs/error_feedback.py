"""The experiment of "Detached Error Feedback for Distributed SGD" (ICML 2022).

The experiment tests whether training that sends one entry in 16, 64, or 256 reaches the
accuracy of dense SGD. The data are shuffled, and the momentum is 0.9. Each ratio has
one figure: accuracy against iterations, accuracy against bytes, and the loss in the
first epochs.
"""

import dataclasses

import matplotlib.pyplot as plt
import optax

import decentral_jax as dj
from experiments import catalog, figures, report, settings
from experiments.catalog import Entry
from experiments.errors import from_options
from experiments.training import results, resuming


@dataclasses.dataclass
class ErrorFeedback(settings.ComparisonOptions):
    """Compares DEF, DEF-A, EF-SGD, CSER, and SGD-IA with dense SGD."""

    ratios: tuple[float, ...] = (16.0, 64.0, 256.0)
    """Compression ratios: number of entries in a leaf per entry sent."""
    detach: float = 0.3
    """Detach coefficient of DEF, DEF-A, and SGD-IA."""
    early: float = 0.15
    """Fraction of the iterations that the panel of the first epochs shows."""
    batch_size: int = 16
    """Number of examples per worker per iteration."""
    iterations: int = 1200
    """Number of gradients per worker."""
    evaluations: int = 60
    """Number of points on each curve; must divide the iterations."""
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Learning rates to tune over; results show the best rate of each algorithm."""


def dense() -> dict[str, Entry]:
    """Returns the baseline, which sends all entries."""

    def make(rate):
        return dj.all_reduce_sgd(optax.sgd(rate, momentum=0.9))

    return {"dense SGD": Entry(make)}


def run(options: ErrorFeedback, output: report.Output) -> None:
    """Trains, prints tables, and writes one figure per ratio, and `def.csv`."""
    setting = options.setting(shuffled=100.0)
    examples = setting.parts.size
    with from_options(ratio="ratios"):
        for ratio in options.ratios:
            dj.compression.random_block(ratio)
    memory = resuming.memory(options)
    baseline = results.run_all(dense(), setting, output.progress, "dense", memory)
    rows, found = [], {}
    for ratio in options.ratios:
        entries = catalog.compressed(ratio, options.detach, momentum=0.9)
        title = f"ratio {ratio:g}"
        found[title] = baseline + results.run_all(
            entries, setting, output.progress, title, memory
        )
        name = f"ratio_{ratio:g}"
        table = report.comparison(found[title], f"{title}, {options.dataset}")
        output.table(name, table)
        output.chart(figures.chart(found[title], f"{title}, {options.dataset}"))
        rows += results.rows(found[title], ratio=ratio)
        # Accuracy against iterations, accuracy against bytes, and the early loss.
        figure = plt.figure(figsize=(12, 3.8), layout="constrained")
        axes = figure.subplots(1, 3)
        report.plot_curves(axes[0], found[title], "iterations", "test_accuracy")
        report.plot_curves(axes[1], found[title], "megabytes", "test_accuracy")
        report.plot_curves(axes[2], found[title], "iterations", "train_loss")
        axes[0].legend(fontsize=8)
        axes[1].set_xscale("log")
        axes[2].set_xlim(0, options.early * setting.iterations)
        axes[2].set_title("the first epochs", fontsize=9)
        epoch = examples / (options.workers * options.batch_size)
        figure.suptitle(
            f"{options.dataset}, ratio {ratio:g}, {options.workers} workers, "
            f"{options.seeds} seeds; an epoch is {epoch:.1f} iterations"
        )
        output.figure(name, figure)
    output.csv("def", rows)
    output.table("summary", report.summary(found, options.dataset))
    output.html("def")
