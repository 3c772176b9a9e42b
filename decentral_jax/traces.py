"""Arrival traces: whose gradient reaches the master at each tick, and how stale it is.

A trace is all that is random about an asynchronous run: with it `dj.asynchronous`
replays the run exactly. Traces are made here from an idea of the workers' speeds, or
recorded by `decentral_jax.engine`.
"""

import dataclasses
import heapq
import os

import numpy as np
from numpy.typing import ArrayLike

from decentral_jax.validation import check_int

__all__ = ["Trace", "from_speeds", "load", "round_robin", "uniform_delay"]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    r"""Arrivals at a master, one a tick.

    At tick :math:`k` the gradient of worker :math:`w_k`, taken at the iterate
    :math:`x_{k - \tau_k}`, is applied to :math:`x_k`.

    Attributes:
      workers: :math:`w_k`, shape `[K]`, int32.
      staleness: :math:`\tau_k`, from 0 to :math:`k`, shape `[K]`, int32.
      num_workers: The number of workers n.

    Raises:
      ValueError: If the arrays differ in length or are empty, a worker is unknown, or a
        gradient would be taken at an iterate before the first.
    """

    workers: np.ndarray
    staleness: np.ndarray
    num_workers: int

    def __post_init__(self):
        n = check_int("num_workers", self.num_workers, minimum=1)
        object.__setattr__(self, "num_workers", n)
        for name in ("workers", "staleness"):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or value.dtype.kind not in "iu" or not value.size:
                raise ValueError(
                    f"{name} must be integers, one a tick, at least one; got shape "
                    f"{value.shape}, dtype {value.dtype}."
                )
            value = value.astype(np.int32)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        if self.workers.shape != self.staleness.shape:
            raise ValueError(
                f"staleness must have an entry for each of workers, "
                f"{len(self.workers)}, got {len(self.staleness)}."
            )
        unknown = (self.workers < 0) | (self.workers >= n)
        if unknown.any():
            k = int(np.argmax(unknown))
            raise ValueError(
                f"workers must be below num_workers={n}, got {self.workers[k]} at "
                f"tick {k}."
            )
        ticks = np.arange(len(self.workers))
        early = (self.staleness < 0) | (self.staleness > ticks)
        if early.any():
            k = int(np.argmax(early))
            raise ValueError(
                f"staleness at tick {k} must be from 0 to {k}, the updates so far, got "
                f"{self.staleness[k]}."
            )

    def __len__(self) -> int:
        """The number of ticks K."""
        return len(self.workers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the trace to a NumPy `.npz` file."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                workers=self.workers,
                staleness=self.staleness,
                num_workers=np.int32(self.num_workers),
            )


def load(path: str | os.PathLike) -> Trace:
    """Reads what `Trace.save` wrote.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is no trace.
    """
    try:
        with np.load(path) as file:
            return Trace(file["workers"], file["staleness"], int(file["num_workers"]))
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken archive raises nearly anything
        raise ValueError(f"{path} is not a trace: {error}.") from error


def round_robin(num_workers: int, num_ticks: int) -> Trace:
    """Workers of one speed: each in turn, `num_workers - 1` ticks stale at last."""
    n = check_int("num_workers", num_workers, minimum=1)
    ticks = np.arange(check_int("num_ticks", num_ticks, minimum=1))
    return Trace(ticks % n, np.minimum(ticks, n - 1), n)


def from_speeds(
    seconds: ArrayLike, num_ticks: int, *, jitter: float = 0.0, seed: int = 0
) -> Trace:
    """Workers that take a time each for a gradient, and start again at once.

    Args:
      seconds: Mean time of a gradient of each worker, positive, shape `[n]`.
      num_ticks: Arrivals.
      jitter: Standard deviation of the logarithm of a gradient's time; 0 for always the
        mean. Arrivals at one moment come in the workers' order.
      seed: Of the jitter.

    Returns:
      The trace; a worker's staleness is the number of arrivals since its last one.

    Raises:
      ValueError: If a time is not positive, or a number out of range.
    """
    means = np.asarray(seconds, np.float64)
    if (
        means.ndim != 1
        or not means.size
        or not (np.isfinite(means) & (means > 0)).all()
    ):
        raise ValueError(f"seconds must be positive, one a worker, got {seconds!r}.")
    num_ticks = check_int("num_ticks", num_ticks, minimum=1)
    if not 0 <= jitter < np.inf:
        raise ValueError(f"jitter must be at least 0 and finite, got {jitter!r}.")
    rng = np.random.default_rng(check_int("seed", seed, minimum=0))

    def duration(worker):
        # The logarithmic normal's mean is kept.
        factor = np.exp(jitter * rng.standard_normal() - jitter**2 / 2)
        return means[worker] * factor

    events = [(duration(worker), worker) for worker in range(len(means))]
    heapq.heapify(events)
    received = np.zeros(len(means), int)
    workers, staleness = np.zeros((2, num_ticks), int)
    for k in range(num_ticks):
        now, worker = events[0]
        workers[k], staleness[k] = worker, k - received[worker]
        received[worker] = k + 1
        heapq.heapreplace(events, (now + duration(worker), worker))
    return Trace(workers, staleness, len(means))


def uniform_delay(
    max_delay: int, num_ticks: int, *, num_workers: int = 1, seed: int = 0
) -> Trace:
    r"""Artificial delay: each gradient is taken at one of the last iterates.

    :math:`\tau_k` is uniform on :math:`0, \dots, \min(k, D)`. Workers take turns.

    Args:
      max_delay: :math:`D`, at least 0.
      num_ticks: Arrivals.
      num_workers: Workers; one is enough, as the delay is artificial.
      seed: Of the delays.

    Returns:
      The trace. Its replay keeps up to D iterates.

    References:
      Xu et al., "Parallel and distributed asynchronous adaptive stochastic gradient
      methods", Math. Prog. Comp. 2023, section 4.
    """
    n = check_int("num_workers", num_workers, minimum=1)
    delay = check_int("max_delay", max_delay, minimum=0)
    ticks = np.arange(check_int("num_ticks", num_ticks, minimum=1))
    rng = np.random.default_rng(check_int("seed", seed, minimum=0))
    return Trace(ticks % n, rng.integers(np.minimum(ticks, delay) + 1), n)
