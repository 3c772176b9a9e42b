"""Arrival traces: which worker's gradient arrives at each tick, and how stale it is.

A trace captures all randomness of an asynchronous run, so `dj.asynchronous` can replay
the run exactly. This module generates traces from models of the workers' speeds.
`decentral_jax.engine` records the traces of real runs.
"""

import dataclasses
import heapq
import os

import numpy as np
from numpy.typing import ArrayLike

from decentral_jax._validation import check_int

__all__ = ["Trace", "from_speeds", "load", "round_robin", "uniform_delay"]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    r"""The sequence of gradients that arrive at a master, one per tick.

    At tick :math:`k`, the master applies the gradient of worker :math:`w_k` to
    :math:`x_k`. The worker computed this gradient at the iterate
    :math:`x_{k - \tau_k}`.

    Attributes:
      workers: Worker :math:`w_k` at each tick, shape `[K]`, int32.
      staleness: Staleness :math:`\tau_k` at each tick, from 0 to :math:`k`, shape
        `[K]`, int32.
      num_workers: Number of workers n.

    Raises:
      TypeError: If `num_workers` is not an integer.
      ValueError: If the arrays are empty or differ in length, any worker is not below
        `num_workers`, or any staleness is negative or refers to an iterate before the
        first one.

    Example:
      >>> import decentral_jax as dj
      >>> trace = dj.traces.Trace([0, 1, 0], [0, 1, 1], num_workers=2)
      >>> len(trace)
      3
    """

    workers: np.ndarray
    staleness: np.ndarray
    num_workers: int

    def __post_init__(self):
        n = check_int("num_workers", self.num_workers, minimum=1)
        object.__setattr__(self, "num_workers", n)
        # Convert both arrays to read-only int32.
        for name in ("workers", "staleness"):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or value.dtype.kind not in "iu" or not value.size:
                raise ValueError(
                    f"{name} must be a vector of at least one integer, with "
                    f"one entry per tick; got shape {value.shape}, dtype {value.dtype}."
                )
            value = value.astype(np.int32)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        if self.workers.shape != self.staleness.shape:
            raise ValueError(
                "staleness must have as many entries as workers, "
                f"{len(self.workers)}, got {len(self.staleness)}."
            )
        # Report the first tick with an invalid worker or staleness.
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
                f"staleness at tick {k} must be from 0 to {k}, the number of updates "
                f"so far, got {self.staleness[k]}."
            )

    def __len__(self) -> int:
        """Returns the number of ticks K."""
        return len(self.workers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the trace to a NumPy `.npz` file.

        Args:
          path: Path of the file, used as is, without an added extension.
        """
        # `savez` would append ".npz" to a path, but not to an open file.
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                workers=self.workers,
                staleness=self.staleness,
                num_workers=np.int32(self.num_workers),
            )


def load(path: str | os.PathLike) -> Trace:
    """Reads a trace that `Trace.save` wrote.

    Args:
      path: Path of the file.

    Returns:
      The trace.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If the file does not hold a valid trace.

    Example:
      >>> import decentral_jax as dj, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.npz"
      >>> dj.traces.round_robin(4, 100).save(path)
      >>> dj.traces.load(path).num_workers
      4
    """
    try:
        with np.load(path) as file:
            return Trace(file["workers"], file["staleness"], int(file["num_workers"]))
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy and zipfile raise many types for broken files.
        raise ValueError(f"{path} is not a trace: {error}.") from error


def round_robin(num_workers: int, num_ticks: int) -> Trace:
    """Returns the trace of equally fast workers, which take turns.

    The staleness grows to `num_workers - 1` ticks and stays there.

    Args:
      num_workers: Number of workers.
      num_ticks: Number of arrivals K.

    Returns:
      The trace.

    Raises:
      TypeError: If any argument is not an integer.
      ValueError: If any argument is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> trace = dj.traces.round_robin(3, 5)
      >>> trace.workers.tolist(), trace.staleness.tolist()
      ([0, 1, 2, 0, 1], [0, 1, 2, 2, 2])
    """
    n = check_int("num_workers", num_workers, minimum=1)
    ticks = np.arange(check_int("num_ticks", num_ticks, minimum=1))
    return Trace(ticks % n, np.minimum(ticks, n - 1), n)


def from_speeds(
    seconds: ArrayLike, num_ticks: int, *, jitter: float = 0.0, seed: int = 0
) -> Trace:
    """Returns the trace of workers that compute gradients at given speeds.

    Each worker starts its next gradient immediately after the last one arrives.
    Simultaneous arrivals come in the order of the workers.

    Args:
      seconds: Mean time per gradient of each worker, in seconds, positive, shape `[n]`.
      num_ticks: Number of arrivals K.
      jitter: Standard deviation of the logarithm of the time per gradient. If 0, each
        gradient takes exactly the mean time.
      seed: Seed for the random numbers of the jitter.

    Returns:
      The trace. The staleness is the number of arrivals since the worker's last one.

    Raises:
      TypeError: If `num_ticks` or `seed` is not an integer.
      ValueError: If any time is not positive, or any other argument is out of range.

    Example:
      >>> import decentral_jax as dj
      >>> trace = dj.traces.from_speeds([1.0, 2.5], 6)  # the second worker is slow
      >>> trace.workers.tolist(), trace.staleness.tolist()
      ([0, 0, 1, 0, 0, 0], [0, 0, 2, 1, 0, 0])
    """
    means = np.asarray(seconds, np.float64)
    if (
        means.ndim != 1
        or not means.size
        or not (np.isfinite(means) & (means > 0)).all()
    ):
        raise ValueError(
            f"seconds must be positive, with one entry per worker, got {seconds!r}."
        )
    num_ticks = check_int("num_ticks", num_ticks, minimum=1)
    if not 0 <= jitter < np.inf:
        raise ValueError(f"jitter must be at least 0 and finite, got {jitter!r}.")
    rng = np.random.default_rng(check_int("seed", seed, minimum=0))

    def duration(worker):
        # A log-normal factor with mean 1.
        factor = np.exp(jitter * rng.standard_normal() - jitter**2 / 2)
        return means[worker] * factor

    # A heap of (time of arrival, worker).
    events = [(duration(worker), worker) for worker in range(len(means))]
    heapq.heapify(events)
    # received[i]: number of updates in the parameters that worker i computes with.
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
    r"""Returns a trace with random artificial delays.

    The staleness :math:`\tau_k` is uniform on :math:`0, \dots, \min(k, D)`. The workers
    take turns.

    Args:
      max_delay: Maximum delay :math:`D` in ticks, at least 0.
      num_ticks: Number of arrivals K.
      num_workers: Number of workers. One suffices, because the delays do not depend on
        it.
      seed: Seed for the random delays.

    Returns:
      The trace. A replay stores up to :math:`D` past iterates.

    Raises:
      TypeError: If any argument is not an integer.
      ValueError: If any argument is out of range.

    Example:
      >>> import decentral_jax as dj
      >>> trace = dj.traces.uniform_delay(3, 100, seed=1)
      >>> int(trace.staleness.max())
      3

    References:
      Xu et al., "Parallel and distributed asynchronous adaptive stochastic gradient
      methods", Math. Prog. Comp. 2023, section 4.
    """
    n = check_int("num_workers", num_workers, minimum=1)
    delay = check_int("max_delay", max_delay, minimum=0)
    ticks = np.arange(check_int("num_ticks", num_ticks, minimum=1))
    rng = np.random.default_rng(check_int("seed", seed, minimum=0))
    return Trace(ticks % n, rng.integers(np.minimum(ticks, delay) + 1), n)
