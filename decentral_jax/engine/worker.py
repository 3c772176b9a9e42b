"""What a worker does, wherever it runs, and what it reports to the master."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax


class Ready(NamedTuple):
    """The worker has started and has a batch at hand."""

    worker: int
    batch: Any  # its jax.ShapeDtypeStructs


class Gradient(NamedTuple):
    """A gradient, computed to the end, on the master's device."""

    worker: int
    value: Any
    finite: bool
    batch_index: int  # batches that the worker had drawn before this one


class Ended(NamedTuple):
    """The worker has no batch left."""

    worker: int


class Failed(NamedTuple):
    """The worker raised, and is gone."""

    worker: int
    error: BaseException


Report = Ready | Gradient | Ended | Failed


class Backend(Protocol):
    """Workers of a kind, as the master sees them.

    Each `start` and each `send` is answered by one report.
    """

    def start(self, worker: int) -> None:
        """Starts a worker, again after a failure; it draws a batch."""

    def prepare(self, worker: int, params: Any, batch: Any) -> None:
        """Compiles a worker's gradient of trees like these."""

    def send(self, worker: int, params: Any) -> None:
        """Has a worker compute the gradient of its next batch."""

    def next_report(self, timeout: float) -> Report:
        """The next report to arrive; raises `queue.Empty` after the timeout."""
        ...

    def stop(self, seconds: float) -> None:
        """Stops all workers, and waits for them so long together."""


class Worker:
    """One worker's batches and gradients.

    Args:
      index: The worker's number.
      batches: From the number to an iterator of batches.
      gradient: Of parameters and a batch, and whether it is finite.
      device: Where this worker computes.
      master: Where its gradients go.
      drawn: Batches to pass over.
    """

    def __init__(
        self,
        index: int,
        batches: Callable[[int], Iterator],
        gradient: Callable,
        device: Any,
        master: Any,
        drawn: int = 0,
    ):
        self.device = device
        self.drawn = drawn
        self._index = index
        self._batches = batches
        self._gradient = gradient
        self._master = master
        self._iterator: Iterator | None = None
        self._ahead = []  # at most one batch

    def start(self) -> Ready | Ended:
        """Draws a batch ahead."""
        if not self._draw():
            return Ended(self._index)
        return Ready(self._index, jax.eval_shape(lambda batch: batch, self._ahead[0]))

    def compute(self, params: Any) -> Gradient | Ended:
        """The gradient of the next batch, at parameters on any device."""
        if not self._ahead and not self._draw():
            return Ended(self._index)
        args = _on(self.device, (params, self._ahead.pop()))
        report = _on(self._master, self._gradient(*args))
        grads, finite = jax.block_until_ready(report)
        return Gradient(self._index, grads, bool(finite), self.drawn - 1)

    def _draw(self):
        if self._iterator is None:
            self._iterator = iter(self._batches(self._index))
            for _ in range(self.drawn):
                next(self._iterator, None)
        try:
            self._ahead.append(next(self._iterator))
        except StopIteration:
            return False
        self.drawn += 1
        return True


def _on(device, tree):
    """Sends trees to a device, as one, unless they are there: a call costs more."""

    def there(leaf):
        return isinstance(leaf, jax.Array) and leaf.devices() == {device}

    return (
        tree if all(map(there, jax.tree.leaves(tree))) else jax.device_put(tree, device)
    )
