"""Workers as Ray actors: one process per worker, on this host or on others."""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from decentral_jax.engine._programs import Device, Gradients, Model, shapes
from decentral_jax.engine._worker import Ended, Failed, Gradient, Report, Worker

LOOPBACK = "127.0.0.1"

# JAX settings of the caller that the actors' processes take over.
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
)


class Actor:
    """A worker in its own process, on the first device that the process sees.

    Args:
      index: Number of the worker.
      gradient: The user's gradient function.
      has_aux: Whether it returns a loss and auxiliary results, too.
      batches: Function from a worker's number to its iterator of batches.
      model: Types of the model, a tree of `jax.ShapeDtypeStruct`.
      drawn: Number of batches to skip, because an earlier actor has drawn them.
      settings: JAX configuration options, by name.
    """

    def __init__(
        self,
        index: int,
        gradient: Callable[..., Any],
        has_aux: bool,
        batches: Callable[[int], Iterator[Any]],
        model: Model,
        drawn: int,
        settings: Mapping[str, Any],
    ):
        for name, value in settings.items():
            jax.config.update(name, value)
        self._device = device = jax.local_devices()[0]
        self._gradients = Gradients(gradient, has_aux)
        program = self._gradients.on(device)
        self._worker = Worker(index, batches, program, device, device, drawn)
        self._index = index
        self._model = model

    def start(self) -> tuple[Report, int]:
        """Draws a batch and compiles the gradient for it.

        Returns:
          The report, and the number of batches drawn so far.
        """

        def start():
            report = self._worker.start()
            if not isinstance(report, Ended):
                # If this fails, the master's own check fails too, with a better
                # message.
                with contextlib.suppress(Exception):
                    self._gradients.prepare(self._device, self._model, report.batch)
            return report

        return self._reporting(start)

    def compute(self, model: Model) -> tuple[Report, int]:
        """Computes the gradient of the next batch.

        Args:
          model: The model, as NumPy arrays.

        Returns:
          The report, with the gradient as NumPy arrays, and the number of batches drawn
          so far.
        """

        def compute():
            report = self._worker.compute(model)
            if isinstance(report, Gradient):
                report = report._replace(value=jax.device_get(report.value))
            return report

        return self._reporting(compute)

    def _reporting(self, fn: Callable[[], Report]) -> tuple[Report, int]:
        """Calls a function that returns a report; reports an exception as `Failed`."""
        try:
            report = fn()
        except Exception as error:
            report = Failed(self._index, error)
        return report, self._worker.drawn


class Actors:
    """Workers as Ray actors; implements `Backend`.

    If an actor's process dies, a new actor replaces it and skips the batches that were
    already drawn. The batch that was lost with the process is drawn again.

    Args:
      gradient: The user's gradient function.
      has_aux: Whether it returns a loss and auxiliary results, too.
      batches: Function from a worker's number to its iterator of batches.
      drawn: Number of batches to skip per worker.
      model: The model.
      master: Device of the master.
      options: Ray options of each actor, such as `{"num_gpus": 1}`.

    Raises:
      ImportError: If Ray is not installed.
      RuntimeError: If Ray started on an address that other machines can reach.
    """

    def __init__(
        self,
        gradient: Callable[..., Any],
        has_aux: bool,
        batches: Callable[[int], Iterator[Any]],
        drawn: Sequence[int],
        model: Model,
        master: Device,
        options: Mapping[str, Any],
    ):
        try:
            import ray  # pyright: ignore[reportMissingImports]
            import ray.exceptions  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"actors={options} needs Ray: install the extra, pip install "
                "decentral_jax[ray], or pass actors=None for threads."
            ) from error
        self._ray = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _start_ray(ray)
        # Actors take over the caller's JAX settings, and compile for these types.
        settings = {name: getattr(jax.config, name) for name in SETTINGS}
        model = shapes(model)
        self._master = master
        self._actors: dict[int, Any] = {}  # by the worker's number
        self._drawn = list(drawn)  # batches that each worker has drawn
        self._pending: dict[Any, int] = {}  # from a pending call to the worker's number
        try:
            actor = ray.remote(Actor).options(**options)
        except BaseException:
            self.stop(0)
            raise

        def create(worker):
            drawn = self._drawn[worker]
            return actor.remote(
                worker, gradient, has_aux, batches, model, drawn, settings
            )

        self._create = create

    def start(self, worker: int) -> None:
        """Starts or restarts a worker, which draws a batch."""
        if worker not in self._actors:
            self._actors[worker] = self._create(worker)
        self._pending[self._actors[worker].start.remote()] = worker

    def prepare(self, worker: int, model: Model, batch: Any) -> None:
        """Does nothing, because actors compile in `start`."""

    def send(self, worker: int, model: Model) -> None:
        """Makes a worker compute the gradient of its next batch."""
        model = jax.device_get(model)
        self._pending[self._actors[worker].compute.remote(model)] = worker

    def next_report(self, timeout: float) -> Report:
        """Returns the next report to arrive; raises `queue.Empty` after the timeout."""
        done, _ = self._ray.wait(list(self._pending), timeout=timeout)
        if not done:
            raise queue.Empty
        worker = self._pending.pop(done[0])
        try:
            report, self._drawn[worker] = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            # The process has died: the next `start` creates a new actor.
            self._ray.kill(self._actors.pop(worker))
            return Failed(worker, error)
        # Put the gradient on the master's device before the master uses it.
        if isinstance(report, Gradient):
            value = jax.block_until_ready(jax.device_put(report.value, self._master))
            report = report._replace(value=value)
        return report

    def stop(self, seconds: float) -> None:
        """Kills all actors without waiting for them."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()


def _start_ray(ray: Any) -> None:
    """Starts Ray on this machine only, so that it listens only on loopback.

    Anyone who can reach a port of Ray can run code. To use a cluster, call `ray.init`
    beforehand, or set `RAY_ADDRESS`.

    Raises:
      RuntimeError: If Ray started on an address that other machines can reach.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    import ray._private.ray_constants as constants  # pyright: ignore[reportMissingImports]

    # Ray's servers listen on 127.0.0.1 if that is the node's address, and otherwise on
    # all addresses. `init` replaces this address by that of a network card unless
    # clusters are disabled, which is the default on macOS and Windows.
    enabled = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init("local", include_dashboard=False, _node_ip_address=LOOPBACK)
    finally:
        constants.ENABLE_RAY_CLUSTER = enabled
    address = ray.util.get_node_ip_address()
    if address != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(
            f"Ray {ray.__version__} started on {address} instead of {LOOPBACK}, where "
            "other machines can reach it, and was stopped: start Ray manually and call "
            "ray.init() before engine.run."
        )
