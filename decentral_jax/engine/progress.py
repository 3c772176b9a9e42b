"""How far a run is, and a line that says so."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO


class Progress(NamedTuple):
    """How far a run is, after one of the master's steps."""

    applied: int  # gradients
    num_gradients: int  # K
    seconds: float
    staleness: int  # of the last gradient applied
    refused: int  # gradients that were not finite
    replaced: int  # workers that failed
    params: Any  # the master's, which may be kept to evaluate them later

    def __str__(self) -> str:
        rate = self.applied / self.seconds
        return (
            f"{self.applied:,} of {self.num_gradients:,} gradients, {rate:,.1f} a "
            f"second, staleness {self.staleness}, {self.refused} refused, "
            f"{self.replaced} replaced"
        )


def progress_line(
    stream: TextIO | None = None, every: float = 0.1
) -> Callable[[Progress], None]:
    """A line that keeps saying how far a run is, for `run(on_progress=...)`.

    Args:
      stream: Where to; by default standard error. If it is no terminal, the line is
        written once, at the end.
      every: Seconds between two changes of the line.

    Returns:
      The callback.

    Example:
      >>> from decentral_jax import engine
      >>> show = engine.progress_line()
      >>> show(engine.Progress(400, 400, 2.0, 3, 0, 1, params=None))  # to stderr
    """
    last = -math.inf

    def show(progress: Progress) -> None:
        nonlocal last
        out = sys.stderr if stream is None else stream
        done = progress.applied == progress.num_gradients
        if done or (out.isatty() and progress.seconds - last >= every):
            last = progress.seconds
            # Back to the start of the line, and clear what is left of the old one.
            start, end = ("\r", "\x1b[K") if out.isatty() else ("", "")
            print(f"{start}{progress}{end}", end="\n" * done, file=out, flush=True)

    return show
