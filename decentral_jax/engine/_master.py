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
from decentral_jax.engine._state import Applied, Saver, State
from decentral_jax.engine._worker import Backend, Ended, Failed, Gradient, Ready, Report
from decentral_jax.traces import Trace

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """Result of a run of K gradients."""

    params: Any  # the master's final parameters
    opt_state: optax.OptState  # the final state of the optimizer
    model_state: Any  # the master's final model state, or None
    metrics: dict[str, np.ndarray]  # shape=[K, ...]: metrics of each gradient
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
    checkpoint_every: int
    on_progress: Callable[[Progress], Any] | None


class Master:
    """The master's model, and its view of the workers.

    Args:
      state: State to start from, on the master's device. It is changed in place.
      optimizer: Optimizer that applies one gradient at a time.
      workers: The workers.
      saver: Destination of checkpoints, or None.
      options: Valid options.
    """

    def __init__(
        self,
        state: State,
        optimizer: optax.GradientTransformation,
        workers: Backend,
        saver: Saver | None,
        options: Options,
    ):
        self._state = state
        # One worker's model state counts as much as in a mean over all workers.
        share = 1.0 if options.synchronous else 1 / options.num_workers
        self._step = step_of(optimizer, state.model, state.opt_state, share)
        self._workers = workers
        self._saver = saver
        self._options = options
        self._alive = set(range(options.num_workers))  # workers with batches left
        self._given: dict[int, int] = {}  # number of updates in each worker's params
        self._arrived: dict[int, Gradient] = {}  # not yet applied, the oldest first
        self._updates = 0  # number of steps since the start or the resume
        self._refused_in_row = 0

    def prepare(self, check: Callable[[int, Any], None]) -> None:
        """Starts the workers and compiles their programs, which is not timed.

        Args:
          check: Function that checks the gradient of a worker for the types of its
            first batch.

        Raises:
          ValueError: If a worker has no batch, or no worker has one left.
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
                    self._workers.prepare(worker, self._state.model, batch)
                    starting.discard(worker)
                case Ended(worker) if self._state.next_batches[worker]:
                    # A resumed run has already used all batches of this worker.
                    starting.discard(worker)
                    self._end(worker)
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
        options, state = self._options, self._state
        start = time.perf_counter() - state.seconds
        for worker in sorted(self._alive):
            self._send(worker)
        # Apply gradients that are due; if there are none, wait for the next report.
        while (before := len(state.applied)) < options.num_gradients:
            due = self._due()
            if not due:
                self._take(self._receive(self._alive - set(self._arrived)))
                continue
            began = time.perf_counter()
            self._apply(due)
            now = time.perf_counter()
            state.master_seconds += now - began
            state.seconds = now - start
            if self._saver is not None and self._completes_period(before):
                self._saver.save(state)
            if options.on_progress is not None:
                options.on_progress(self._progress())
        return result_of(state, options)

    def _completes_period(self, before: int) -> bool:
        """Returns whether the last step completes a period between checkpoints.

        Args:
          before: Number of gradients applied before the step.
        """
        now, every = len(self._state.applied), self._options.checkpoint_every
        return now // every > before // every or now == self._options.num_gradients

    def _progress(self) -> Progress:
        """Returns the progress after a step."""
        state = self._state
        return Progress(
            applied=len(state.applied),
            num_gradients=self._options.num_gradients,
            seconds=state.seconds,
            staleness=state.applied[-1].staleness,
            refused=state.refused,
            replaced=len(state.replaced),
            params=state.model.params,
            model_state=state.model.state,
            metrics={name: values[-1] for name, values in state.metrics.items()},
        )

    def _due(self) -> list[int]:
        """Returns the workers whose gradients the master must apply now, if any."""
        # Synchronous: wait for all workers, or for as many as the last step needs.
        # Sort them, so that the order of the sum does not depend on arrivals.
        if self._options.synchronous:
            left = self._options.num_gradients - len(self._state.applied)
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
        # Average the gradients and update the model in one compiled program.
        state = self._state
        gradients = [self._arrived.pop(worker) for worker in due]
        step = self._step(len(due))
        values = [gradient.value for gradient in gradients]
        state.model, state.opt_state = step(state.model, state.opt_state, values)
        # Record each gradient with its staleness and metrics.
        for gradient in gradients:
            self._check_metrics(gradient)
            worker, index = gradient.worker, gradient.batch_index
            staleness = self._updates - self._given.pop(worker)
            state.applied.append(Applied(worker, staleness, index))
            state.next_batches[worker] = index + 1
            for name, value in gradient.metrics.items():
                state.metrics.setdefault(name, []).append(value)
        self._updates += 1
        self._refused_in_row = 0
        if len(state.applied) < self._options.num_gradients:
            for worker in due:
                self._send(worker)
        # Wait only after sending, so that the workers start as early as possible.
        jax.block_until_ready((state.model, state.opt_state))

    def _take(self, report: Report) -> None:
        """Processes a worker's report during the run."""
        match report:
            case Ready(worker):
                self._send(worker)
            case Gradient(worker, finite=True):
                self._arrived[worker] = report
            case Gradient(worker):  # Not finite.
                self._refuse(report)
            case Ended(worker):
                self._end(worker)
            case Failed(worker, error):
                self._given.pop(worker, None)
                self._replace(worker, error)

    def _end(self, worker: int) -> None:
        """Continues without a worker, or raises an error if it was the last one."""
        self._alive.discard(worker)
        self._given.pop(worker, None)
        if not self._alive:
            raise ValueError(
                f"batches must last for num_gradients={self._options.num_gradients} "
                "gradients, but all workers' batches ended after "
                f"{len(self._state.applied)} were applied."
            )

    def _check_metrics(self, report: Gradient) -> None:
        """Checks that metrics have the names and shapes of earlier ones."""
        state = self._state
        if not state.applied:
            return
        before = {name: values[-1].shape for name, values in state.metrics.items()}
        now = {name: value.shape for name, value in report.metrics.items()}
        if now != before:
            raise ValueError(
                "gradient must return metrics of the same names and shapes in each "
                f"call, {before}, got {now} with batch {report.batch_index} of worker "
                f"{report.worker}: return numbers, such as means over the batch."
            )

    def _send(self, worker: int) -> None:
        """Sends the current model to a worker."""
        self._given[worker] = self._updates
        self._workers.send(worker, self._state.model)

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
                f"workers {sorted(waited_for)}, {len(self._state.applied)} of "
                f"{self._options.num_gradients} gradients were applied."
            ) from None

    def _replace(self, worker: int, error: BaseException) -> None:
        """Restarts a worker that failed, or raises an error after too many failures."""
        limit, state = self._options.max_failures, self._state
        if len(state.replaced) >= limit:
            raise RuntimeError(
                f"worker {worker} failed with {type(error).__name__} after "
                f"max_failures={limit} replacements; {len(state.applied)} gradients "
                "were applied."
            ) from error
        # `start` reports again, and the worker then receives the current parameters.
        tick = len(state.applied)
        state.replaced.append((worker, tick))
        logger.warning(
            "worker %d failed at tick %d and is replaced: %r", worker, tick, error
        )
        self._workers.start(worker)

    def _refuse(self, report: Gradient) -> None:
        """Refuses a worker's non-finite gradient, and sends the new model to it."""
        worker = report.worker
        self._state.next_batches[worker] = report.batch_index + 1
        self._state.refused += 1
        self._refused_in_row += 1
        limit = self._options.max_refused
        if self._refused_in_row > limit:
            raise FloatingPointError(
                f"more than max_refused={limit} gradients in a row were not finite, "
                f"the last of worker {worker}; {len(self._state.applied)} were "
                "applied."
            )
        logger.warning("a gradient of worker %d is not finite and is refused", worker)
        self._send(worker)


def result_of(state: State, options: Options) -> Run:
    """Returns the result of a run in its final state."""
    # Columns of the applied gradients, each of shape [K].
    workers, staleness, batches = np.array(state.applied).T
    trace = Trace(workers, staleness, options.num_workers)
    return Run(
        params=state.model.params,
        opt_state=state.opt_state,
        model_state=state.model.state,
        metrics={name: np.stack(values) for name, values in state.metrics.items()},
        trace=None if options.synchronous else trace,
        batch_indices=batches,
        staleness_counts=np.bincount(staleness),
        refused=state.refused,
        replaced=state.replaced,
        seconds=state.seconds,
        gradients_per_second=options.num_gradients / state.seconds,
        master_seconds=state.master_seconds,
    )
