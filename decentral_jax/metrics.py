"""Metrics of all workers: summaries, and loggers that write them.

`summarize` turns what a step returns into numbers by name. A `Logger` writes such
numbers to a file, to TensorBoard, or to the terminal. In a run of several processes,
every process calls the loggers, and only process 0 writes.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import jax
import numpy as np

from decentral_jax._exchange.numbers import PyTree
from decentral_jax._validation import check_choice, check_int, check_leading_axes
from decentral_jax.workers import Workers

__all__ = [
    "CSV",
    "JSONLines",
    "Logger",
    "Loggers",
    "ProgressBar",
    "TensorBoard",
    "summarize",
]

Detail = Literal["mean", "range", "workers"]


def summarize(
    metrics: PyTree, workers: Workers, detail: Detail = "mean"
) -> dict[str, float]:
    """Returns the metrics of all workers as numbers by name.

    Waits for the devices, so call it only in steps that are logged. In a run of several
    processes, all processes must call it.

    Args:
      metrics: A pytree with one number per worker and leaf, as `Workers.spmd` functions
        return it, such as `{"loss": losses}`. Names of nested trees are joined by "/".
      workers: The workers.
      detail: What to return of each metric, such as `loss`: with "mean", the mean over
        workers, as `loss`; with "range", also `loss/min` and `loss/max`, which show
        that some worker diverges; with "workers", also the value of each worker, as
        `loss/worker_0` and so on, which shows which one. A NaN on any worker makes the
        mean, the minimum and the maximum NaN.

    Returns:
      The numbers by name.

    Raises:
      TypeError: If any leaf is not an array.
      ValueError: If any leaf does not have one number per worker, two numbers would
        have the same name, or `detail` is unknown.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> workers = dj.Workers(4)
      >>> losses = workers.shard(jnp.array([0.5, 0.5, 0.5, 2.5]))
      >>> dj.metrics.summarize({"loss": losses}, workers, detail="range")
      {'loss': 1.0, 'loss/min': 0.5, 'loss/max': 2.5}
    """
    check_choice("detail", detail, get_args(Detail))
    check_leading_axes("metrics", metrics, workers.shape)
    for path, x in jax.tree.leaves_with_path(metrics):
        name = _name(path)
        if not name:
            raise ValueError(
                'metrics must have names, got one array: pass {"loss": ...}.'
            )
        if np.ndim(x) != len(workers.shape):
            raise ValueError(
                f"metrics must have one number per worker, got shape {np.shape(x)} at "
                f"{name}: take the mean in the step."
            )
    numbers: dict[str, float] = {}

    def add(name, value):
        if name in numbers:
            raise ValueError(f"metrics must have distinct names, {name!r} is repeated.")
        numbers[name] = float(value)

    for path, x in jax.tree.leaves_with_path(workers.gather(metrics)):
        name, x = _name(path), x.astype(np.float64).ravel()
        add(name, x.mean())
        if detail != "mean":
            add(f"{name}/min", x.min())
            add(f"{name}/max", x.max())
        if detail == "workers":
            for worker, value in enumerate(x):
                add(f"{name}/worker_{worker}", value)
    return numbers


def _name(path: tuple[Any, ...]) -> str:
    """Returns the name of a metric from its path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Logger(Protocol):
    """Writes metrics. Subclasses define `log`, and `close` if there is something to do.

    A logger is a context manager that closes itself at the end.

    Example:
      >>> import decentral_jax as dj
      >>> class Printer(dj.metrics.Logger):
      ...     def log(self, step, metrics):
      ...         print(step, metrics)
      >>> with Printer() as logger:
      ...     logger.log(10, {"loss": 0.5})
      10 {'loss': 0.5}
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step.

        Args:
          step: Number of completed steps.
          metrics: Numbers by name, such as `summarize` returns.
        """
        ...

    def close(self) -> None:
        """Completes the output."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Loggers(Logger):
    """Logs to several loggers.

    Args:
      *loggers: The loggers. `close` closes all of them, even if one raises an error.

    Example:
      >>> import tempfile, decentral_jax as dj
      >>> from pathlib import Path
      >>> folder = tempfile.mkdtemp()
      >>> with dj.metrics.Loggers(
      ...     dj.metrics.JSONLines(f"{folder}/metrics.jsonl"),
      ...     dj.metrics.CSV(f"{folder}/metrics.csv"),
      ... ) as logger:
      ...     logger.log(10, {"loss": 0.5})
      >>> print(Path(folder, "metrics.csv").read_text(), end="")
      step,loss
      10,0.5
    """

    def __init__(self, *loggers: Logger):
        self._loggers = loggers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step with each logger."""
        for logger in self._loggers:
            logger.log(step, metrics)

    def close(self) -> None:
        """Closes all loggers."""
        with contextlib.ExitStack() as stack:
            for logger in reversed(self._loggers):
                stack.callback(logger.close)


class _RowFile(Logger):
    """A text file with one row per call, which survives crashes and resumes."""

    _begin: str  # how a file of this kind begins

    def __init__(self, path: str | os.PathLike, start: int | None = None):
        self._path = Path(path)
        # The lowest step that is accepted next.
        self._lowest = 0 if start is None else check_int("start", start, 0) + 1
        self._file = None
        if jax.process_index() != 0:
            return
        text = ""
        if self._path.exists():
            with self._path.open(newline="") as file:
                text = file.read()
        if text and start is None:
            raise FileExistsError(
                f"{self._path} exists: to continue it after a restored checkpoint, "
                "pass its step as start, or start=0 to write the file anew; to keep "
                "it, pass another path."
            )
        if text:
            # A crash may have left an incomplete row at the end.
            complete = text[: text.rfind("\n") + 1]
            begins = text.startswith(self._begin) or self._begin.startswith(text)
            try:
                if not begins:
                    raise ValueError(text[:20])
                kept = self._kept(complete, self._lowest) if complete else ""
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{self._path} does not hold rows of {type(self).__name__}: pass "
                    "another path."
                ) from error
            if kept != text:
                # Renaming is atomic: a crash loses nothing.
                partial = self._path.with_name(self._path.name + ".partial")
                with partial.open("w", newline="") as file:
                    file.write(kept)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", newline="")

    def _kept(self, text: str, lowest: int) -> str:
        """Returns the file without rows of steps from `lowest` on."""
        raise NotImplementedError

    def _row(self, row: dict[str, float]) -> str:
        """Returns the text of a row."""
        raise NotImplementedError

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row, and hands it to the operating system.

        Args:
          step: Number of completed steps.
          metrics: Numbers by name.

        Raises:
          TypeError: If `step` is not an integer, or any metric is not a number.
          ValueError: If the step is below that of an earlier row, a metric has the name
            "step", or the file is closed; in `CSV`, if a metric is not in the header.
        """
        step = check_int("step", step, minimum=0)
        if step < self._lowest:
            raise ValueError(
                f"step must be at least {self._lowest}, got {step}: rows are in the "
                "order of steps. To continue a file, pass the step of the restored "
                "checkpoint as start."
            )
        numbers = _floats(metrics)
        if "step" in numbers:
            raise ValueError('metrics must not hold the name "step": rename it.')
        self._lowest = step
        if self._file is not None:
            self._file.write(self._row({"step": step, **numbers}))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class JSONLines(_RowFile):
    """Writes one JSON object per call, such as `{"step": 10, "loss": 0.5}`.

    Each row reaches the operating system before `log` returns, so that it survives if
    the process is killed. Rows may have different metrics. Infinity and NaN are written
    as Python's `json` does, as `Infinity` and `NaN`.

    Args:
      path: Path of the file. Missing folders are created.
      start: Step at which the run continues, which is 0 for a run from the beginning.
        If the file exists, rows of later steps are removed, because the run logs these
        steps again, and so is an incomplete row that a crash left. If None, the file
        must not exist.

    Raises:
      FileExistsError: If the file exists and `start` is None.
      TypeError: If `start` is not an integer.
      ValueError: If the file holds something else, or `start` is negative.

    Example:
      >>> import tempfile, decentral_jax as dj
      >>> from pathlib import Path
      >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
      >>> with dj.metrics.JSONLines(path) as logger:
      ...     logger.log(10, {"loss": 0.5})
      ...     logger.log(20, {"loss": 0.3})
      >>> with dj.metrics.JSONLines(path, start=10) as logger:
      ...     logger.log(20, {"loss": 0.25, "accuracy": 0.9})
      >>> print(Path(path).read_text(), end="")
      {"step": 10, "loss": 0.5}
      {"step": 20, "loss": 0.25, "accuracy": 0.9}
    """

    _begin = '{"step": '

    def _kept(self, text: str, lowest: int) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if json.loads(line)["step"] < lowest)

    def _row(self, row: dict[str, float]) -> str:
        return json.dumps(row) + "\n"


class CSV(_RowFile):
    """Writes comma-separated values: a header, and one row per call.

    The first call determines the columns: `step`, and its metrics. Metrics that a later
    call lacks leave an empty cell; metrics without a column are an error. Each row
    reaches the operating system before `log` returns, so that it survives if the
    process is killed.

    Args:
      path: Path of the file. Missing folders are created.
      start: Step at which the run continues, which is 0 for a run from the beginning.
        If the file exists, rows of later steps are removed, because the run logs these
        steps again, and so is an incomplete row that a crash left. If None, the file
        must not exist.

    Raises:
      FileExistsError: If the file exists and `start` is None.
      TypeError: If `start` is not an integer.
      ValueError: If the file holds something else, or `start` is negative.

    Example:
      >>> import tempfile, decentral_jax as dj
      >>> from pathlib import Path
      >>> path = tempfile.mkdtemp() + "/metrics.csv"
      >>> with dj.metrics.CSV(path) as logger:
      ...     logger.log(10, {"loss": 0.5, "accuracy": 0.8})
      ...     logger.log(20, {"loss": 0.3})
      >>> print(Path(path).read_text(), end="")
      step,loss,accuracy
      10,0.5,0.8
      20,0.3,
    """

    _begin = "step"
    _columns: Sequence[str] = ()

    def _kept(self, text: str, lowest: int) -> str:
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        rows = [row for row in rows if int(row[0]) < lowest]
        if not rows:
            return ""
        self._columns = header
        return "".join(map(_line, [header, *rows]))

    def _row(self, row: dict[str, float]) -> str:
        header = ""
        if not self._columns:
            self._columns = list(row)
            header = _line(self._columns)
        new = [name for name in row if name not in self._columns]
        if new:
            raise ValueError(
                f"metrics must be among the columns of {self._path}, got "
                f"{', '.join(new)}: log all metrics in the first call, or use "
                "JSONLines."
            )
        return header + _line([row.get(name, "") for name in self._columns])


def _line(cells: Sequence[Any]) -> str:
    """Returns a line of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


class TensorBoard(Logger):
    """Writes scalars for TensorBoard, with tensorboardX.

    A thread writes the scalars, about one second after each call.

    Args:
      folder: Folder of the run, to which each run adds a file.
      start: Step at which the run continues. TensorBoard hides what earlier files hold
        of later steps. If None, it hides nothing.

    Raises:
      ImportError: If tensorboardX is missing:
        `pip install decentral_jax[tensorboard]`.
      TypeError: If `start` is not an integer.
      ValueError: If `start` is negative.
    """

    def __init__(self, folder: str | os.PathLike, start: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs tensorboardX: "
                "pip install decentral_jax[tensorboard]."
            ) from error
        purge = None if start is None else check_int("start", start, 0) + 1
        self._writer = None
        if jax.process_index() == 0:
            self._writer = SummaryWriter(
                os.fspath(folder), purge_step=purge, flush_secs=1
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step as scalars."""
        step = check_int("step", step, minimum=0)
        numbers = _floats(metrics)
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


class ProgressBar(Logger):
    """Shows a bar with the step, the time left, and the latest metrics, with rich.

    Args:
      total: Number of steps of the whole run.
      start: Step at which the run continues.

    Raises:
      ImportError: If rich is missing: `pip install rich`.
      TypeError: If `total` or `start` is not an integer.
      ValueError: If `total` is below 1, or `start` is negative.
    """

    def __init__(self, total: int, start: int = 0):
        try:
            from rich import progress
        except ImportError as error:
            raise ImportError("ProgressBar needs rich: pip install rich.") from error
        total = check_int("total", total, minimum=1)
        start = check_int("start", start, minimum=0)
        self._bar = None
        if jax.process_index() == 0:
            self._bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[metrics]}", markup=False),
            )
            self._task = self._bar.add_task(
                "", total=total, completed=start, metrics=""
            )
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar to a step, and shows its metrics."""
        step = check_int("step", step, minimum=0)
        words = [f"{name} {value:.4g}" for name, value in _floats(metrics).items()]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics="  ".join(words))

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns metrics as numbers.

    Raises:
      TypeError: If any metric is not a number.
    """
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"metrics must hold numbers, got {value!r} at {name!r}: pass "
                "dj.metrics.summarize(metrics, workers)."
            ) from None
    return numbers
