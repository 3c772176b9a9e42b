"""Example orders of D-GraB (CD-GraB, NeurIPS 2023): the herding test, and training.

Training compares losses seed by seed. A seed determines the initial model and the
examples of each worker, so that only the order differs between methods.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np

from experiments import report, styles
from experiments.errors import UsageError
from experiments.html_report import Chart, Series
from experiments.runs import herding as herding_test
from experiments.settings import RunOptions, check_positive
from experiments.training import ordered, resuming
from experiments.training.tasks import Source, Task, load


@dataclasses.dataclass
class DGraB(RunOptions):
    """Compares example orders, by the herding test and by training losses."""

    parts: tuple[Literal["herding", "training"], ...] = ("herding", "training")
    """Parts of the experiment to run."""
    herding: herding_test.Herding = dataclasses.field(
        default_factory=herding_test.Herding
    )
    """Options of the herding test."""
    tasks: tuple[Literal["logistic", "lenet", "lstm", "forecast"], ...] = (
        "logistic",
        "lenet",
        "lstm",
    )
    """Tasks to train; "forecast" needs --data-dir."""
    source: Source | None = None
    """Data set instead of digits or the text "python"; requires a single task."""
    data_dir: Path | None = None
    """Folder with the files of a9a, MNIST, CIFAR-10, WikiText-2, or M4 weekly."""
    examples: int | None = None
    """Number of training examples to use, from the first on; all if not given."""
    workers: tuple[int, ...] = (4, 16)
    """Numbers of workers in training."""
    epochs: int | None = None
    """Number of epochs; the default of the task if not given."""
    rates: tuple[float, ...] | None = None
    """Learning rates to tune over; the defaults of the task if not given."""
    seeds: int = 5
    """Number of seeds in training."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        self.herding.check()
        check_positive(self, "workers", "epochs", "examples", "rates")
        if "training" not in self.parts or self.source is None:
            return
        if len(self.tasks) != 1:
            raise UsageError(
                f"source={self.source!r} requires a single task, got {self.tasks}: "
                "pass --tasks with that task."
            )


def run(
    options: DGraB, output: report.Output
) -> dict[tuple[str, int, str], np.ndarray]:
    """Prints tables; writes `herding`, and one figure and one `.csv` per task.

    Returns:
      A dictionary from (task, number of workers, method) to the losses at the method's
      best rate, shape `[seeds, epochs + 1]`.
    """
    found, chosen = {}, []
    if "training" in options.parts:
        chosen = [_load(name, options) for name in options.tasks]
    if "herding" in options.parts:
        memory = resuming.memory(options)
        herding_test.run(options.herding, output, memory)
    for task in chosen:
        found |= _train(task, options, output)
    output.html("d_grab")
    return found


def _load(name: str, options: DGraB) -> Task:
    task = load(name, options.data_dir, options.source, options.examples)
    if len(task.x) < 2 * max(options.workers):
        raise UsageError(
            f"workers={max(options.workers)} is too many for the {len(task.x)} "
            f"examples of {task.name}: pass fewer, so that each has at least two."
        )
    return task._replace(
        epochs=options.epochs or task.epochs, rates=options.rates or task.rates
    )


def _train(
    task: Task, options: DGraB, output: report.Output
) -> dict[tuple[str, int, str], np.ndarray]:
    """Trains all methods with each number of workers, at the rate best on seed 0."""
    seeds = tuple(range(options.seeds))
    memory = resuming.memory(options)
    found, rates = {}, {}
    for m in options.workers:
        for name, order in ordered.methods(len(task.x) // m, m).items():
            title = f"{task.name}: {name}, {m} workers"
            total = task.epochs * ((len(task.rates) > 1) + 1)
            with output.progress.bar(title, total) as bar:

                def train(rates, seeds, order=order, m=m, bar=bar):
                    return ordered.train(order, task, m, rates, seeds, bar.advance)

                def tuned(train=train):
                    # Tune the rate on seed 0, then train with all seeds.
                    best = 0
                    if len(task.rates) > 1:
                        final = train(task.rates, (0,))[:, 0, -1]
                        best = int(np.nanargmin(final))
                    rate = task.rates[best]
                    return {"rate": rate, "losses": train((rate,), seeds)[0]}

                recalled = memory.recall(title, tuned)
            key = task.name, m, name
            rates[key], found[key] = float(recalled["rate"]), recalled["losses"]
    _report(task, found, rates, options, output)
    return found


def _report(
    task: Task,
    found: dict[tuple[str, int, str], np.ndarray],
    rates: dict[tuple[str, int, str], float],
    options: DGraB,
    output: report.Output,
) -> None:
    figure = plt.figure(figsize=(3.6 * len(options.workers), 3.2), layout="constrained")
    axes = figure.subplots(1, len(options.workers), squeeze=False, sharey=True)[0]
    at = dict(zip(options.workers, axes, strict=True))
    # Tabulate, plot, and record each method, one panel per number of workers.
    rows, lines = [], []
    series: dict[int, list[Series]] = {m: [] for m in options.workers}
    looks = styles.assign(name for _, _, name in found)
    for (_, m, name), losses in found.items():
        key = task.name, m, name
        # D-RR has the same models and examples per seed, so that losses pair up.
        random = found[task.name, m, "D-RR"]
        final, gap = losses[:, -1], random[:, -1] - losses[:, -1]
        lines.append(
            (
                f"{name}, {m} workers",
                report.spread(final, 5),
                "" if name == "D-RR" else report.spread(gap, 5),
                report.rate(task.rates, task.rates.index(rates[key])),
            )
        )
        epochs = np.arange(losses.shape[1])
        report.plot_seeds(at[m], epochs, losses, name, looks[name])
        note = f"rate {rates[key]:g}"
        curves = Series(name, {"epochs": epochs}, {"train loss": losses}, note)
        series[m].append(curves)
        rows += [
            {
                "workers": m,
                "method": name,
                "rate": rates[key],
                "seed": seed,
                "epoch": epoch,
                "train_loss": loss,
            }
            for seed, of_seed in enumerate(losses)
            for epoch, loss in enumerate(of_seed)
        ]
    for m, ax in at.items():
        output.chart(Chart(f"{task.name}, {m} workers", series[m], ("train loss",)))
        ax.set_title(f"{m} workers", fontsize=9)
        ax.set_xlabel("epochs")
        ax.set_yscale("log")
    axes[0].set_ylabel("train loss")
    axes[-1].legend(fontsize=8)
    name = task.name.replace(", ", "_")
    columns = "method", "train loss", "reduction from D-RR, per seed", "best rate"
    output.table(name, report.Table(task.name, columns, lines))
    output.figure(name, figure)
    output.csv(name, rows)
