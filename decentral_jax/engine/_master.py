"""The master: applies gradients as they arrive, and sends parameters to the workers."""

import logging
import queue
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from decentral_jax.engine._programs import step_of
from decentral_jax.engine._progress import Progress
from decentral_jax.engine._worker import Backend, Ended, Failed, Gradient, Ready, Report
from decentral_jax.traces import Trace

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """Result of a run of K gradients."""

    params: Any  # the master's final parameters
    opt_state: optax.OptState  # the final state of the optimizer
    trace: Trace | None  # arrivals, for `dj.asynchronous`; None if synchronous
    batch_indices: np.ndarray  # shape=[K]: index of each gradient's batch on its worker
    staleness_counts: np.ndarray  # shape=[max + 1]: number of gradients per staleness
    refused: int  # number of non-finite gradients
    replaced: list[tuple[int, int]]  # (worker, tick) of each failure
    seconds: float  # duration without compilation and each worker's first batch
    gradients_per_second: float
    master_seconds: float  # part of `seconds` in which the master applied gradients


class Options(NamedTuple):
    """Arguments of `run` that only the master uses."""

    num_gradients: int
    num_workers: int
    synchronous: bool
    max_staleness: float  # infinite if unbounded
    timeout: float
    max_failures: int
    max_refused: int
    on_progress: Callable[[Progress], Any] | None


class Master:
    """The master's parameters, and its view of the workers.

    Args:
      params: Initial parameters, on the master's device.
      optimizer: Optimizer that applies one gradient at a time.
      workers: The workers.
      options: Valid options.
    """

    def __init__(
        self,
        params: optax.Params,
        optimizer: optax.GradientTransformation,
        workers: Backend,
        options: Options,
    ):
        self._params = params
        self._state = jax.jit(optimizer.init)(params)
        self._step = step_of(optimizer, params, self._state)
        self._workers = workers
        self._options = options
        self._alive = set(range(options.num_workers))  # workers with batches left
        self._given: dict[int, int] = {}  # number of updates in each worker's params
        self._arrived: dict[int, Gradient] = {}  # not yet applied, the oldest first
        self._updates = 0
        self._applied: list[tuple[int, int, int]] = []  # (worker, staleness, batch)
        self._replaced: list[tuple[int, int]] = []  # (worker, tick)
        self._refused = self._refused_in_row = 0

    def prepare(self, check: Callable[[int, Any], None]) -> None:
        """Starts the workers and compiles their programs, which is not timed.

        Args:
          check: Function that checks the gradient of a worker for the types of its
            first batch.

        Raises:
          ValueError: If a worker has no batch.
          RuntimeError: If workers fail more than `max_failures` times.
          TimeoutError: If no worker reports in time.
        """
        for worker in sorted(self._alive):
            self._workers.start(worker)
        starting = set(self._alive)
        while starting:
            # Each worker reports its first batch, for which its gradient is compiled.
            match self._receive(starting):
                case Ready(worker, batch):
                    check(worker, batch)
                    self._workers.prepare(worker, self._params, batch)
                    starting.discard(worker)
                case Ended(worker):
                    raise ValueError(
                        f"batches({worker}) must have at least one batch for worker "
                        f"{worker}, got none."
                    )
                case Failed(worker, error):
                    self._replace(worker, error)
        # Compile the usual step. The last synchronous step may have fewer gradients.
        options = self._options
        self._step(options.num_workers if options.synchronous else 1)

    def train(self) -> Run:
        """Applies `num_gradients` gradients, and measures the time.

        Returns:
          The result.

        Raises:
          ValueError: If the batches of all workers end too early.
          RuntimeError: If workers fail more than `max_failures` times.
          FloatingPointError: If too many gradients in a row are not finite.
          TimeoutError: If no worker reports in time.
        """
        options = self._options
        master_seconds = 0.0
        start = time.perf_counter()
        for worker in sorted(self._alive):
            self._send(worker)
        # Apply gradients that are due; if there are none, wait for the next report.
        while len(self._applied) < options.num_gradients:
            if due := self._due():
                before = time.perf_counter()
                self._apply(due)
                master_seconds += time.perf_counter() - before
                if options.on_progress is not None:
                    options.on_progress(self._progress(time.perf_counter() - start))
            else:
                self._take(self._receive(self._alive - set(self._arrived)))
        # Columns of the applied gradients, each of shape [K].
        seconds = time.perf_counter() - start
        workers, staleness, batches = np.array(self._applied).T
        trace = Trace(workers, staleness, options.num_workers)
        return Run(
            params=self._params,
            opt_state=self._state,
            trace=None if options.synchronous else trace,
            batch_indices=batches,
            staleness_counts=np.bincount(staleness),
            refused=self._refused,
            replaced=self._replaced,
            seconds=seconds,
            gradients_per_second=options.num_gradients / seconds,
            master_seconds=master_seconds,
        )

    def _progress(self, seconds: float) -> Progress:
        """Returns the progress after `seconds` of the run."""
        return Progress(
            applied=len(self._applied),
            num_gradients=self._options.num_gradients,
            seconds=seconds,
            staleness=self._applied[-1][1],
            refused=self._refused,
            replaced=len(self._replaced),
            params=self._params,
        )

    def _due(self) -> list[int]:
        """Returns the workers whose gradients the master must apply now, if any."""
        # Synchronous: wait for all workers, or for as many as the last step needs.
        # Sort them, so that the order of the sum does not depend on arrivals.
        if self._options.synchronous:
            left = self._options.num_gradients - len(self._applied)
            count = min(len(self._alive), left)
            enough = len(self._arrived) >= count
            return sorted(self._arrived)[:count] if enough else []
        bound = self._options.max_staleness
        for worker in self._arrived:
            # Apply this gradient only if all others can still be applied afterward
            # within the bound, one per tick, the stalest first.
            others = sorted(self._given[v] for v in self._given if v != worker)
            ticks = range(self._updates + 1, self._updates + 1 + len(others))
            if all(k - x <= bound for k, x in zip(ticks, others, strict=True)):
                return [worker]
        return []

    def _apply(self, due: list[int]) -> None:
        """Takes one step, and sends new parameters to the workers.

        Args:
          due: Workers whose gradients the step averages.
        """
        # Average the gradients and update the parameters in one compiled program.
        gradients = [self._arrived.pop(worker) for worker in due]
        step = self._step(len(due))
        values = [gradient.value for gradient in gradients]
        self._params, self._state = step(self._params, self._state, values)
        # Record each gradient with its staleness.
        for gradient in gradients:
            staleness = self._updates - self._given.pop(gradient.worker)
            self._applied.append((gradient.worker, staleness, gradient.batch_index))
        self._updates += 1
        self._refused_in_row = 0
        if len(self._applied) < self._options.num_gradients:
            for worker in due:
                self._send(worker)
        # Wait only after sending, so that the workers start as early as possible.
        jax.block_until_ready((self._params, self._state))

    def _take(self, report: Report) -> None:
        """Processes a worker's report during the run."""
        match report:
            case Ready(worker):
                self._send(worker)
            case Gradient(worker, finite=True):
                self._arrived[worker] = report
            case Gradient(worker):  # Not finite.
                self._refuse(worker)
            case Ended(worker):
                self._alive.discard(worker)
                self._given.pop(worker, None)
                if not self._alive:
                    raise ValueError(
                        "batches must last for num_gradients="
                        f"{self._options.num_gradients} gradients, but all workers' "
                        f"batches ended after {len(self._applied)} were applied."
                    )
            case Failed(worker, error):
                self._given.pop(worker, None)
                self._replace(worker, error)

    def _send(self, worker: int) -> None:
        """Sends the current parameters to a worker."""
        self._given[worker] = self._updates
        self._workers.send(worker, self._params)

    def _receive(self, waited_for: set[int]) -> Report:
        """Returns the next report.

        Args:
          waited_for: Workers that have not reported, for the error message.

        Raises:
          TimeoutError: If no worker reports in time.
        """
        timeout = self._options.timeout
        try:
            return self._workers.next_report(timeout)
        except queue.Empty:
            raise TimeoutError(
                f"nothing arrived within timeout={timeout} seconds; waiting for "
                f"workers {sorted(waited_for)}, {len(self._applied)} of "
                f"{self._options.num_gradients} gradients were applied."
            ) from None

    def _replace(self, worker: int, error: BaseException) -> None:
        """Restarts a worker that failed, or raises an error after too many failures."""
        limit = self._options.max_failures
        if len(self._replaced) >= limit:
            raise RuntimeError(
                f"worker {worker} failed with {type(error).__name__} after "
                f"max_failures={limit} replacements; {len(self._applied)} gradients "
                "were applied."
            ) from error
        # `start` reports again, and the worker then receives the current parameters.
        tick = len(self._applied)
        self._replaced.append((worker, tick))
        logger.warning(
            "worker %d failed at tick %d and is replaced: %r", worker, tick, error
        )
        self._workers.start(worker)

    def _refuse(self, worker: int) -> None:
        """Refuses a worker's non-finite gradient, and sends new parameters to it."""
        self._refused += 1
        self._refused_in_row += 1
        limit = self._options.max_refused
        if self._refused_in_row > limit:
            raise FloatingPointError(
                f"more than max_refused={limit} gradients in a row were not finite, "
                f"the last of worker {worker}; {len(self._applied)} were applied."
            )
        logger.warning("a gradient of worker %d is not finite and is refused", worker)
        self._send(worker)
