"""Reports of the experiments: tables, curves, and numbers as files."""

import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

from experiments import html_report, styles
from experiments.progress import Progress
from experiments.training import resuming
from experiments.training.provenance import provenance
from experiments.training.results import Result

# Labels of the quantities on the horizontal axes.
AGAINST = {
    "iterations": "iterations (gradients per worker)",
    "megabytes": "megabytes sent per worker",
    "seconds": "simulated seconds",
}
EDGE = "* the best rate is at the edge of the grid of rates."


class Table(NamedTuple):
    """A text table, identical in the terminal, in files, and in the documentation."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def all_notes(self) -> list[str]:
        """The notes, with an explanation of the star if any rate has one."""
        marked = any("*" in cell for row in self.rows for cell in row)
        return [*self.notes, *([EDGE] if marked else [])]

    def markdown(self) -> str:
        """Returns the table as Markdown, with the title above and the notes below."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts = [f"{self.title}:", text, "\n".join(self.all_notes)]
        return "\n\n".join(filter(None, parts)).replace("*", "\\*") + "\n"


class Output:
    """The output of an experiment: the terminal, and the files of a folder.

    Every file records the command, options, and code that created it.

    Args:
      options: Options of the experiment, a dataclass with the folder `out`.
    """

    def __init__(self, options: Any):
        self.console = Console()
        self.progress = Progress(self.console)
        self.folder = Path(options.out)
        self.origin = provenance(options)
        self._options, self._begin = options, time.perf_counter()
        self._written: list[str] = []
        self._charts: list[html_report.Chart] = []
        self._tables: list[Table] = []

    def table(self, name: str, table: Table) -> None:
        """Prints a table and writes it as `name.md`."""
        show(self.console, table)
        origin = self.origin | {"seconds": f"{self._seconds():.0f}"}
        self._path(name, ".md").write_text(
            f"{table.markdown()}\n<!--\n{described(origin)}\n-->\n", encoding="utf-8"
        )
        self._tables.append(table)

    def figure(self, name: str, figure: Any) -> None:
        """Writes a figure as `name.png` and closes it."""
        metadata = {"Description": described(self.origin)}
        figure.savefig(self._path(name, ".png"), dpi=150, metadata=metadata)
        plt.close(figure)

    def chart(self, chart: html_report.Chart) -> None:
        """Adds an interactive chart to the HTML report."""
        self._charts.append(chart)

    def html(self, name: str) -> None:
        """Writes all tables and charts so far as one HTML file, `name.html`."""
        origin = self.origin | {"seconds": f"{self._seconds():.0f}"}
        text = html_report.page(name, self._charts, self._tables, self._options, origin)
        self._path(name, ".html").write_text(text, encoding="utf-8")

    def csv(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Writes dictionaries with the same keys to `name.csv`.

        Lines that begin with "#" record how the file was created. To skip these lines,
        pass `comment="#"` to `pandas.read_csv`.
        """
        rows = list(rows)
        with self._path(name, ".csv").open("w", newline="", encoding="utf-8") as file:
            lines = described(self.origin).splitlines()
            file.writelines(f"# {line}\n" for line in lines)
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        """Prints the names of the written files."""
        self.console.print(f"Wrote {', '.join(self._written)} to {self.folder}.")

    def _seconds(self) -> float:
        """Returns the seconds of computing, including interrupted runs if resumed."""
        if hasattr(self._options, "resume"):
            return resuming.memory(self._options).seconds()
        return time.perf_counter() - self._begin

    def _path(self, name: str, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._written.append(name + suffix)
        return self.folder / (name + suffix)


def show(console: Console, table: Table) -> None:
    """Prints a table; as a list of rows if its cells do not fit into a terminal."""
    # Headings wrap between words, and cells do not wrap.
    widths = [
        max(cell_len(text) for text in (*heading.split(), *cells, ""))
        for heading, *cells in zip(table.columns, *table.rows, strict=True)
    ]
    needed = sum(widths) + 3 * len(widths)
    if console.is_terminal and needed > console.width:
        console.print(f"{table.title}:\n", markup=False)
        for first, *cells in table.rows:
            console.print(first, style="bold", markup=False)
            for heading, cell in zip(table.columns[1:], cells, strict=True):
                console.print(f"  {heading}: {cell}", markup=False)
        console.print()
    else:
        shown = RichTable(
            title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        for i, (heading, width) in enumerate(zip(table.columns, widths, strict=True)):
            justify = "right" if i else "left"
            shown.add_column(heading, justify=justify, min_width=width)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown, width=max(needed, console.width), crop=False)
    console.print(*table.all_notes, sep="\n")


def described(origin: Mapping[str, str]) -> str:
    """Formats the origin of a result, one line per entry."""
    return "\n".join(f"{name}: {text}" for name, text in origin.items())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows that `Output.csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def spread(values: np.ndarray, digits: int) -> str:
    """Formats the mean and the standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def rate(rates: Sequence[float], best: int) -> str:
    """Formats the best learning rate, with a star if it is at an edge of the grid."""
    ends = min(rates), max(rates)
    return f"{rates[best]:g}" + ("*" if len(rates) > 1 and rates[best] in ends else "")


def comparison(results: Sequence[Result], title: str) -> Table:
    """Tabulates early and final results, as mean and standard deviation over seeds."""
    first, last = (results[0].curves.iteration[e] for e in (0, -1))
    return Table(
        title,
        (
            *("algorithm", f"accuracy % after {first}", f"after {last}", "train loss"),
            *("consensus", "MB sent", "best rate"),
        ),
        [
            (
                result.name,
                spread(100 * result.at_best("test_accuracy")[:, 0], 1),
                spread(100 * result.at_best("test_accuracy")[:, -1], 1),
                spread(result.at_best("train_loss")[:, -1], 3),
                f"{result.at_best('consensus')[:, -1].mean():.2g}",
                f"{result.megabytes[-1]:.2f}",
                rate(result.rates, result.best),
            )
            for result in results
        ],
        [
            "Test accuracy and train loss of the averaged model, consensus distance, "
            "megabytes sent by each worker; mean and standard deviation over seeds."
        ],
    )


def summary(settings: Mapping[str, Sequence[Result]], title: str) -> Table:
    """Tabulates algorithms against settings, with the longer list as rows."""
    names = [result.name for result in next(iter(settings.values()))]
    cells = np.array(
        [[_accuracy_and_loss(r) for r in results] for results in settings.values()]
    )
    rows, columns, corner = list(settings), names, ""
    if len(rows) <= len(columns):
        rows, columns, corner, cells = columns, rows, "algorithm", cells.T
    return Table(
        f"{title}: test accuracy %, train loss (best rate)",
        (corner, *columns),
        [(row, *of_row) for row, of_row in zip(rows, cells, strict=True)],
        ["Mean over seeds; accuracy with its standard deviation over seeds."],
    )


def _accuracy_and_loss(result: Result) -> str:
    """Formats the final accuracy, the final train loss, and the best rate."""
    accuracy = spread(100 * result.at_best("test_accuracy")[:, -1], 1)
    loss = result.at_best("train_loss")[:, -1].mean()
    return f"{accuracy}, {loss:.3f} ({rate(result.rates, result.best)})"


def quantity(result: Result, against: str) -> np.ndarray:
    """Returns a quantity for the horizontal axis, a key of `AGAINST`, shape `[E]`."""
    if against == "iterations":
        return result.curves.iteration
    return {"megabytes": result.megabytes, "seconds": result.seconds}[against]


def plot_curves(ax: Any, results: Sequence[Result], against: str, name: str) -> None:
    """Plots the mean curves at the best rate, with one standard deviation as a band.

    Args:
      ax: The matplotlib axes.
      results: Results of the algorithms, one curve per result.
      against: Quantity on the horizontal axis, a key of `AGAINST`.
      name: Measurement to plot, "train_loss" or "test_accuracy".
    """
    looks = styles.assign(result.name for result in results)
    for index, result in enumerate(results):
        x, y = quantity(result, against), result.at_best(name)
        style = looks[result.name].matplotlib()
        # About eight markers per curve, not at the same places on all curves.
        every = max(1, len(x) // 8)
        marks = (index % every, every)
        ax.plot(x, y.mean(0), label=result.name, markevery=marks, **style)
        # Clip the band at the lowest seed, so that it stays positive on a log axis.
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


def plot_seeds(ax: Any, x: Any, y: np.ndarray, label: str, style: styles.Style) -> None:
    """Plots the mean over seeds, `[seeds, E]`, and the range from lowest to highest."""
    every = max(1, y.shape[1] // 8)
    ax.plot(x, y.mean(0), label=label, markevery=every, **style.matplotlib())
    ax.fill_between(x, y.min(0), y.max(0), color=style.color, alpha=0.15, lw=0)
    ax.grid(alpha=0.25)
