"""What the experiments show: a progress bar, a table, curves as PNG, numbers as CSV."""

import csv
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.provenance import provenance
from experiments.resuming import Memory
from experiments.settings import Entry, Network
from experiments.training import Curves, Setting, bytes_sent, step_log, train

# One colour and line an algorithm, in every figure.
STYLES = ["-"] * 7 + ["--"] * 6 + [":"] * 5 + ["-."] * 8
AGAINST = {
    "iterations": "iterations (gradients a worker)",
    "megabytes": "megabytes sent by a worker",
    "seconds": "simulated seconds",
}


class Result(NamedTuple):
    """An algorithm's curves and traffic."""

    name: str
    curves: Curves
    megabytes: np.ndarray  # shape=[E]: sent by a worker up to each evaluation
    seconds: np.ndarray  # shape=[E]: simulated, when the last worker is there
    rates: tuple[float, ...]

    @property
    def best(self) -> int:
        """The rate with the lowest final train loss, as a mean over seeds."""
        final = self.curves.train_loss[..., -1].mean(1)
        return int(np.argmin(np.where(np.isfinite(final), final, np.inf)))

    def at_best(self, name: str) -> np.ndarray:
        """A measurement at the best rate, shape `[seeds, E]`."""
        return getattr(self.curves, name)[self.best]

    @property
    def rate_at_edge(self) -> bool:
        """Whether the best rate is the grid's smallest or largest one."""
        return len(self.rates) > 1 and self.best in (0, len(self.rates) - 1)


def run_all(
    entries: dict[str, Entry],
    setting: Setting,
    console: Console,
    title: str,
    memory: Memory,
    network: Network | None = None,
) -> list[Result]:
    """Trains algorithms one after the other behind a progress bar.

    Those that the memory of an interrupted run holds are not trained again.
    """
    network = network or Network()
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
    )
    results = []
    with bar:
        task = bar.add_task(title, total=len(entries))
        for name, entry in entries.items():
            bar.update(task, description=f"{title}: {name}")

            def run(entry=entry):
                advance = functools.partial(bar.advance, task)
                return train(entry.make, setting, advance, entry.levels)._asdict()

            curves = Curves(**memory.recall(f"{title}: {name}", run))
            log = step_log(entry.make, setting, entry.phase, entry.levels)
            sent = bytes_sent(log, setting.iterations)
            at = curves.iteration
            seconds = network.seconds(
                entry, log, setting.num_workers, setting.iterations
            )
            results.append(
                Result(name, curves, sent[at] / 1e6, seconds[at], setting.rates)
            )
        bar.update(task, description=title)
    return results


def print_table(results: Sequence[Result], console: Console, title: str) -> None:
    """Prints the final numbers, mean and standard deviation over seeds."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("algorithm", no_wrap=True)
    for column in (
        "accuracy %",
        "train loss",
        "consensus",
        "MB sent",
        "seconds",
        "rate",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        accuracy = 100 * result.at_best("test_accuracy")[:, -1]
        loss = result.at_best("train_loss")[:, -1]
        table.add_row(
            result.name,
            f"{accuracy.mean():.1f} ± {accuracy.std():.1f}",
            f"{loss.mean():.3f} ± {loss.std():.3f}",
            f"{result.at_best('consensus')[:, -1].mean():.2g}",
            f"{result.megabytes[-1]:.2f}",
            f"{result.curves.seconds:.1f}",
            f"{result.rates[result.best]:g}" + ("*" if result.rate_at_edge else ""),
        )
    console.print(table)
    console.print(
        "Test accuracy and train loss of the averaged model, consensus distance, "
        "megabytes sent by each worker, seconds for all rates and seeds together."
    )
    if any(result.rate_at_edge for result in results):
        console.print("* at the edge of the grid of rates: widen --rates.")


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes dictionaries with the same keys as CSV, after where they come from.

    Lines that begin with "#" say how the file was made: `pandas.read_csv` skips them
    with `comment="#"`.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {text}\n" for name, text in provenance().items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def rows(results: Sequence[Result], **columns: Any) -> Iterable[dict[str, Any]]:
    """One row an algorithm, rate, seed and evaluation."""
    for result in results:
        curves = result.curves
        for r, rate in enumerate(result.rates):
            for seed in range(curves.train_loss.shape[1]):
                for e, iteration in enumerate(curves.iteration):
                    yield {
                        **columns,
                        "algorithm": result.name,
                        "rate": rate,
                        "is_best_rate": r == result.best,
                        "seed": seed,
                        "iteration": int(iteration),
                        "megabytes_sent": round(float(result.megabytes[e]), 6),
                        "simulated_seconds": round(float(result.seconds[e]), 6),
                        "train_loss": float(curves.train_loss[r, seed, e]),
                        "test_accuracy": float(curves.test_accuracy[r, seed, e]),
                        "consensus_distance": float(curves.consensus[r, seed, e]),
                    }


def plot_curves(ax: Any, results: Sequence[Result], against: str, name: str) -> None:
    """Draws a measurement at the best rate: mean and one standard deviation.

    Args:
      ax: The matplotlib axes.
      results: The algorithms.
      against: A key of `AGAINST`.
      name: "train_loss" or "test_accuracy".
    """
    for index, result in enumerate(results):
        y = result.at_best(name)
        x = result.curves.iteration
        x = {"megabytes": result.megabytes, "seconds": result.seconds}.get(against, x)
        style = {"color": f"C{index % 10}", "linestyle": STYLES[index % len(STYLES)]}
        ax.plot(x, y.mean(0), label=result.name, lw=1.6, **style)
        # Not below what was seen: that would be nothing on a logarithmic axis.
        low = np.maximum(y.mean(0) - y.std(0), y.min(0))
        high = y.mean(0) + y.std(0)
        ax.fill_between(x, low, high, alpha=0.15, lw=0, color=style["color"])
    if against == "megabytes":
        ax.set_xscale("log")
    ax.set_xlabel(AGAINST[against])
    ax.set_ylabel(name.replace("_", " "))
    if name == "train_loss":
        ax.set_yscale("log")
    ax.grid(alpha=0.25)


def plot_seeds(ax: Any, x: Any, y: np.ndarray, label: str) -> None:
    """Draws the mean over seeds, `[seeds, E]`, and the span from lowest to highest."""
    (line,) = ax.plot(x, y.mean(0), label=label)
    ax.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15)
    ax.grid(alpha=0.25)


def save(figure: Any, path: Path) -> None:
    """Writes a figure, with where it comes from in its metadata, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = "\n".join(f"{name}: {text}" for name, text in provenance().items())
    figure.savefig(path, dpi=150, metadata={"Description": described})
    plt.close(figure)
