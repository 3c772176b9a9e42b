"""Workers as threads of this process."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from decentral_jax.engine.programs import Gradients
from decentral_jax.engine.worker import Failed, Report, Worker

logger = logging.getLogger(__name__)


class Threads:
    """Workers as threads, whose JAX programs run at once; the methods are `Backend`'s.

    Args:
      gradient: The user's gradient function.
      batches: From a worker's number to its iterator of batches.
      devices: One a worker.
      master: The master's device.
    """

    def __init__(
        self,
        gradient: Callable,
        batches: Callable[[int], Iterator],
        devices: Sequence[Any],
        master: Any,
    ):
        self._gradients = Gradients(gradient)
        # Threads do not see the `with jax.enable_x64(...)` that the caller is in.
        self._x64 = jax.config.jax_enable_x64
        self._workers = [
            Worker(i, batches, self._gradients.on(device), device, master)
            for i, device in enumerate(devices)
        ]
        # Bounded: a worker has one report in flight at most.
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._inboxes: dict[int, queue.SimpleQueue] = {}
        self._threads: list[threading.Thread] = []

    def start(self, worker: int) -> None:
        """Starts a worker, again after a failure; it draws a batch."""
        self._inboxes[worker] = inbox = queue.SimpleQueue()
        thread = threading.Thread(
            target=self._work,
            args=(worker, inbox),
            name=f"decentral_jax worker {worker}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def prepare(self, worker: int, params: Any, batch: Any) -> None:
        """Compiles a worker's gradient for batches like this, in the caller's thread.

        There the caller's precision and other settings hold.
        """
        self._gradients.prepare(self._workers[worker].device, params, batch)

    def send(self, worker: int, params: Any) -> None:
        """Has a worker compute the gradient of its next batch."""
        self._inboxes[worker].put((params,))

    def next_report(self, timeout: float) -> Report:
        """The next report in the order of arrival; `queue.Empty` after the timeout."""
        return self._reports.get(timeout=timeout)

    def stop(self, seconds: float) -> None:
        """Stops all threads, and waits for them so long together."""
        for inbox in self._inboxes.values():
            inbox.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        if left:
            logger.warning("still busy, left behind: %s", ", ".join(left))

    def _work(self, index, inbox):
        worker = self._workers[index]
        try:
            with jax.enable_x64(self._x64):
                self._reports.put(worker.start())
                while (message := inbox.get()) is not None:
                    self._reports.put(worker.compute(*message))
        except BaseException as error:  # SystemExit too: silence would look like a hang
            self._reports.put(Failed(index, error))
