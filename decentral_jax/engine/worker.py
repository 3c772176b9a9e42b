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
        self._position = 0  # batches taken from the iterator
        self._error: BaseException | None = None  # raised by the iterator's last draw
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
        error = self._error
        if self._iterator is None:
            self._begin()
        same = False
        if self._advance():
            return True
        if error is not None:
            # A generator that raised is finished, which looks like the end of the data:
            # make the iterator anew. An iterator that continues after an error stays.
            same = not self._begin()
            if self._advance():
                return True
        if same or self._position < self.drawn:
            raise RuntimeError(
                f"batches({self._index}) ended after {self._position} batches when it "
                f"was called again after a failure, but {self.drawn} had been drawn: "
                "return a new iterator over all batches from each call."
            ) from error
        return False

    def _begin(self) -> bool:
        """Asks for the iterator; returns False if it is the one at hand."""
        iterator = iter(self._batches(self._index))
        if iterator is self._iterator:
            return False
        self._iterator, self._position = iterator, 0
        return True

    def _advance(self) -> bool:
        """Draws one batch, past those drawn before; returns False at the end."""
        assert self._iterator is not None
        try:
            while self._position <= self.drawn:
                batch = next(self._iterator)
                self._position += 1
        except StopIteration:
            return False
        except BaseException as error:
            self._error = error
            raise
        self._error = None
        self._ahead.append(batch)
        self.drawn += 1
        return True


def _on(device, tree):
    """Sends trees to a device, as one, unless they are there: a call costs more."""

    def there(leaf):
        return isinstance(leaf, jax.Array) and leaf.devices() == {device}

    return (
        tree if all(map(there, jax.tree.leaves(tree))) else jax.device_put(tree, device)
    )
