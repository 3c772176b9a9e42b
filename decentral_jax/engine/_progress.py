"""Progress of a run, and a progress line for the terminal."""

import math
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO


class Progress(NamedTuple):
    """Progress of a run after one step of the master."""

    applied: int  # number of gradients applied so far
    num_gradients: int  # number of gradients to apply, K
    seconds: float  # duration of training so far, including that before a resume
    staleness: int  # staleness of the last gradient applied
    refused: int  # number of non-finite gradients
    replaced: int  # number of worker failures
    params: Any  # the master's parameters, which may be kept for a later evaluation
    model_state: Any = None  # the master's model state, which may be kept, too
    metrics: Mapping[str, Any] = MappingProxyType({})  # of the last gradient applied

    def __str__(self) -> str:
        rate = self.applied / self.seconds
        loss = f", loss {self.metrics['loss']:.4g}" if "loss" in self.metrics else ""
        return (
            f"{self.applied:,} of {self.num_gradients:,} gradients, {rate:,.1f} per "
            f"second, staleness {self.staleness}, {self.refused} refused, "
            f"{self.replaced} replaced{loss}"
        )


def progress_line(
    stream: TextIO | None = None, every: float = 0.1
) -> Callable[[Progress], None]:
    """Returns a callback that displays a progress line, for `run(on_progress=...)`.

    Args:
      stream: Stream to write to. If None, uses standard error. If the stream is not a
        terminal, the line is written only once, at the end.
      every: Minimum number of seconds between two updates of the line.

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
            # Return to the start of the line, and clear the rest of the old one.
            start, end = ("\r", "\x1b[K") if out.isatty() else ("", "")
            print(f"{start}{progress}{end}", end="\n" * done, file=out, flush=True)

    return show
