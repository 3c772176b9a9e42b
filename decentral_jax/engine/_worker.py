"""A worker's computation, independent of where it runs, and its reports."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from decentral_jax.engine._programs import Device, Model, Result


class Ready(NamedTuple):
    """Report: the worker has started and has drawn a batch."""

    worker: int
    batch: Any  # types of the batch, a tree of jax.ShapeDtypeStruct


class Gradient(NamedTuple):
    """Report: the worker has computed a gradient and sent it to the master's device."""

    worker: int
    value: Result  # the gradient and the new model state
    metrics: dict[str, Any]  # NumPy arrays
    finite: bool  # whether all entries of `value` are finite
    batch_index: int  # number of batches that the worker had drawn before this one


class Ended(NamedTuple):
    """Report: the worker has no batches left."""

    worker: int


class Failed(NamedTuple):
    """Report: the worker has raised an exception and stopped."""

    worker: int
    error: BaseException


Report = Ready | Gradient | Ended | Failed


class Backend(Protocol):
    """The master's interface to the workers.

    Each call of `start` and `send` results in exactly one report.
    """

    def start(self, worker: int) -> None:
        """Starts or restarts a worker, which draws a batch."""

    def prepare(self, worker: int, model: Model, batch: Any) -> None:
        """Compiles a worker's gradient for arguments of these types."""

    def send(self, worker: int, model: Model) -> None:
        """Makes a worker compute the gradient of its next batch."""

    def next_report(self, timeout: float) -> Report:
        """Returns the next report to arrive; raises `queue.Empty` after the timeout."""
        ...

    def stop(self, seconds: float) -> None:
        """Stops all workers, and waits for up to `seconds` in total."""


class Worker:
    """Draws the batches of one worker, and computes their gradients.

    Args:
      index: Number of the worker.
      batches: Function from a worker's number to its iterator of batches.
      gradient: Function from a model and a batch to the result, the metrics, and
        whether the result is finite.
      device: Device on which this worker computes.
      master: Device that receives the gradients.
      drawn: Number of batches to skip.

    Attributes:
      device: Device on which this worker computes.
      drawn: Number of batches drawn so far, including skipped ones.
    """

    def __init__(
        self,
        index: int,
        batches: Callable[[int], Iterator[Any]],
        gradient: Callable[..., Any],
        device: Device,
        master: Device,
        drawn: int = 0,
    ):
        self.device = device
        self.drawn = drawn
        self._index = index
        self._batches = batches
        self._gradient = gradient
        self._master = master
        self._iterator: Iterator[Any] | None = None
        self._position = 0  # number of batches taken from the current iterator
        self._error: BaseException | None = None  # raised by the iterator's last draw
        self._ahead: list[Any] = []  # a batch drawn in advance, at most one

    def start(self) -> Ready | Ended:
        """Draws a batch in advance, and reports its types."""
        if not self._draw():
            return Ended(self._index)
        return Ready(self._index, jax.eval_shape(lambda batch: batch, self._ahead[0]))

    def compute(self, model: Model) -> Gradient | Ended:
        """Computes the gradient of the next batch.

        Args:
          model: The model, on any device.
        """
        if not self._ahead and not self._draw():
            return Ended(self._index)
        # Compute on this worker's device, and wait until the result has arrived.
        args = _on(self.device, (model, self._ahead.pop()))
        value, metrics, finite = self._gradient(*args)
        value = jax.block_until_ready(_on(self._master, value))
        # Without metrics, do not call `device_get`, which takes longer than this check.
        metrics = jax.device_get(metrics) if metrics else {}
        return Gradient(self._index, value, metrics, bool(finite), self.drawn - 1)

    def _draw(self) -> bool:
        """Draws a batch, and returns False if there are none left.

        Raises:
          RuntimeError: If, after a failure or in a resumed run, `batches` does not
            return an iterator over all batches again.
        """
        error = self._error
        if self._iterator is None:
            self._begin()
        same = False
        if self._advance():
            return True
        if error is not None:
            # A generator ends after it raises, which looks like the end of the data.
            # Ask for a new iterator. An iterator that can continue after an error has
            # already returned a batch above.
            same = not self._begin()
            if self._advance():
                return True
        # The end of the same iterator, or of one with fewer batches than were drawn, is
        # not the end of the data.
        if same or self._position < self.drawn:
            raise RuntimeError(
                f"batches({self._index}) ended after {self._position} batches when it "
                "was called again after a failure or in a resumed run, but "
                f"{self.drawn} had been drawn: return a new iterator over all batches "
                "from each call."
            ) from error
        return False

    def _begin(self) -> bool:
        """Asks for a new iterator, and returns False if it is the current one."""
        iterator = iter(self._batches(self._index))
        if iterator is self._iterator:
            return False
        self._iterator, self._position = iterator, 0
        return True

    def _advance(self) -> bool:
        """Draws one batch, and returns False at the end of the iterator."""
        assert self._iterator is not None
        # A new iterator starts at position 0: skip the batches drawn before.
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


def _on(device: Device, tree: Any) -> Any:
    """Puts a tree on a device.

    Returns a tree that is already there unchanged, because `device_put` takes longer
    than this check.
    """

    def is_there(leaf):
        return isinstance(leaf, jax.Array) and leaf.devices() == {device}

    if all(map(is_there, jax.tree.leaves(tree))):
        return tree
    return jax.device_put(tree, device)
