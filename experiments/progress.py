"""Progress of long runs: a bar in a terminal, and plain lines everywhere else."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import rich.progress
from rich.console import Console
from rich.table import Column

# Seconds from one line to the next, where lines replace the bar.
INTERVAL = 10.0


class Bar:
    """Counts what is done out of a total, and shows it.

    Args:
      text: Description of what is going on.
      show: Called with the description and the amount that is done.
    """

    def __init__(self, text: str, show: Callable[[str, float], None]):
        self._text, self._done, self._show = text, 0.0, show

    def advance(self, amount: float = 1.0) -> None:
        """Adds to what is done."""
        self.update(self._text, self._done + amount)

    def update(self, text: str, done: float) -> None:
        """Sets the description, and what is done."""
        self._text, self._done = text, done
        self._show(text, done)


class Progress:
    """Shows the progress of a run.

    In a terminal, it redraws a bar or a spinner in place. Elsewhere, such as in files
    and pipes, it prints plain lines, at most one per `INTERVAL` seconds.

    Args:
      console: The console to write to.
    """

    def __init__(self, console: Console):
        self._console = console
        self._begin = time.monotonic()
        self._last = -math.inf

    @contextlib.contextmanager
    def bar(self, text: str, total: float) -> Iterator[Bar]:
        """Shows how much of a total is done."""
        if not self._console.is_interactive:

            def line(text, done):
                self._line(f"{text}: {100 * done / total:.0f}%")

            line(text, 0.0)
            yield Bar(text, line)
            return
        shown = rich.progress.Progress(
            rich.progress.TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            rich.progress.BarColumn(min(40, self._console.width // 4)),
            rich.progress.TextColumn("{task.percentage:>3.0f}%"),
            rich.progress.TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        with shown:
            task = shown.add_task(text, total=total)
            yield Bar(
                text,
                lambda text, done: shown.update(task, description=text, completed=done),
            )

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Shows what is going on, without a measure of how much is done."""
        if self._console.is_interactive:
            with self._console.status(text):
                yield
        else:
            self._line(text)
            yield

    def _line(self, text: str) -> None:
        """Prints a line with the elapsed time, unless the last one is too recent."""
        now = time.monotonic()
        if now - self._last < INTERVAL:
            return
        self._last = now
        minutes, seconds = divmod(int(now - self._begin), 60)
        line = f"{text}, {minutes} min {seconds} s"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
