"""Workers as threads of this process."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from decentral_jax.engine._programs import Device, Gradients, Model
from decentral_jax.engine._worker import Failed, Report, Worker

logger = logging.getLogger(__name__)


class Threads:
    """Workers as threads whose JAX programs run in parallel; implements `Backend`.

    Args:
      gradients: The user's gradient function.
      batches: Function from a worker's number to its iterator of batches.
      drawn: Number of batches to skip per worker.
      devices: One device per worker.
      master: Device of the master.
    """

    def __init__(
        self,
        gradients: Gradients,
        batches: Callable[[int], Iterator[Any]],
        drawn: Sequence[int],
        devices: Sequence[Device],
        master: Device,
    ):
        self._gradients = gradients
        # Threads do not inherit the caller's `with jax.enable_x64(...)`.
        self._x64 = jax.config.jax_enable_x64
        self._workers = [
            Worker(i, batches, gradients.on(device), device, master, skipped)
            for i, (device, skipped) in enumerate(zip(devices, drawn, strict=True))
        ]
        # The queue stays short, because each worker has at most one unread report.
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        # Each inbox receives tuples of the arguments of `compute`, or None to stop.
        self._inboxes: dict[int, queue.SimpleQueue[tuple[Any] | None]] = {}
        self._threads: list[threading.Thread] = []

    def start(self, worker: int) -> None:
        """Starts or restarts a worker, which draws a batch."""
        self._inboxes[worker] = inbox = queue.SimpleQueue()
        thread = threading.Thread(
            target=self._work,
            args=(worker, inbox),
            name=f"decentral_jax worker {worker}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def prepare(self, worker: int, model: Model, batch: Any) -> None:
        """Compiles a worker's gradient for arguments of these types.

        Compiles in the caller's thread, so that the caller's precision and other JAX
        settings apply.
        """
        self._gradients.prepare(self._workers[worker].device, model, batch)

    def send(self, worker: int, model: Model) -> None:
        """Makes a worker compute the gradient of its next batch."""
        self._inboxes[worker].put((model,))

    def next_report(self, timeout: float) -> Report:
        """Returns the next report to arrive; raises `queue.Empty` after the timeout."""
        return self._reports.get(timeout=timeout)

    def stop(self, seconds: float) -> None:
        """Stops all threads, and waits for up to `seconds` in total."""
        for inbox in self._inboxes.values():
            inbox.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        if left:
            logger.warning("threads still running: %s", ", ".join(left))

    def _work(self, index: int, inbox: "queue.SimpleQueue[tuple[Any] | None]") -> None:
        """Runs one worker until it is stopped or fails; the thread's main function."""
        worker = self._workers[index]
        try:
            with jax.enable_x64(self._x64):
                self._reports.put(worker.start())
                while (message := inbox.get()) is not None:
                    self._reports.put(worker.compute(*message))
        except BaseException as error:
            # Report SystemExit, too: without a report, the master would wait.
            self._reports.put(Failed(index, error))
