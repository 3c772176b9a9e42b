"""Workers as Ray actors: processes of their own, on this or other hosts."""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from decentral_jax.engine.programs import Gradients, shapes
from decentral_jax.engine.worker import Ended, Failed, Gradient, Report, Worker

LOOPBACK = "127.0.0.1"

# The caller's, for the actors' processes.
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
)


class Actor:
    """A worker in a process of its own, on the first device that it sees.

    Args:
      index: The worker's number.
      gradient: The user's gradient function.
      batches: From a worker's number to its iterator of batches.
      params: The types of the parameters.
      drawn: Batches to pass over, as an actor that is gone has drawn them.
      settings: JAX's configuration.
    """

    def __init__(
        self,
        index: int,
        gradient: Callable,
        batches: Callable[[int], Iterator],
        params: Any,
        drawn: int,
        settings: Mapping[str, Any],
    ):
        for name, value in settings.items():
            jax.config.update(name, value)
        self._device = device = jax.local_devices()[0]
        self._gradients = Gradients(gradient)
        program = self._gradients.on(device)
        self._worker = Worker(index, batches, program, device, device, drawn)
        self._index = index
        self._params = params

    def start(self) -> tuple[Report, int]:
        """Draws a batch and compiles; also the number of batches drawn."""

        def start():
            report = self._worker.start()
            if not isinstance(report, Ended):
                # What fails here also fails in the master's check, by a better name.
                with contextlib.suppress(Exception):
                    self._gradients.prepare(self._device, self._params, report.batch)
            return report

        return self._reporting(start)

    def compute(self, params: Any) -> tuple[Report, int]:
        """The gradient of the next batch as NumPy arrays."""

        def compute():
            report = self._worker.compute(params)
            if isinstance(report, Gradient):
                report = report._replace(value=jax.device_get(report.value))
            return report

        return self._reporting(compute)

    def _reporting(self, fn):
        try:
            report = fn()
        except Exception as error:
            report = Failed(self._index, error)
        return report, self._worker.drawn


class Actors:
    """Workers as Ray actors; the methods are those of `Backend`.

    An actor whose process died is replaced by one that passes over the batches drawn;
    the batch that was lost with the process is drawn again.

    Args:
      gradient: The user's gradient function.
      batches: From a worker's number to its iterator of batches.
      params: The parameters.
      master: The master's device.
      options: Of each actor, such as `{"num_gpus": 1}`.
    """

    def __init__(
        self,
        gradient: Callable,
        batches: Callable[[int], Iterator],
        params: Any,
        master: Any,
        options: Mapping[str, Any],
    ):
        try:
            import ray  # pyright: ignore[reportMissingImports]
            import ray.exceptions  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"actors={options} need Ray: install the extra, pip install "
                "decentral_jax[ray], or pass actors=None for threads."
            ) from error
        self._ray = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _start_ray(ray)
        settings = {name: getattr(jax.config, name) for name in SETTINGS}
        params = shapes(params)
        self._master = master
        self._actors = {}
        self._drawn: dict[int, int] = {}
        self._pending = {}
        try:
            actor = ray.remote(Actor).options(**options)
        except BaseException:
            self.stop(0)
            raise

        def create(worker, drawn):
            return actor.remote(worker, gradient, batches, params, drawn, settings)

        self._create = create

    def start(self, worker: int) -> None:
        """Starts a worker, again after a failure; it draws a batch."""
        if worker not in self._actors:
            drawn = self._drawn.get(worker, 0)
            self._actors[worker] = self._create(worker, drawn)
        self._pending[self._actors[worker].start.remote()] = worker

    def prepare(self, worker: int, params: Any, batch: Any) -> None:
        """Nothing: actors have compiled when they are ready."""

    def send(self, worker: int, params: Any) -> None:
        """Has a worker compute the gradient of its next batch."""
        params = jax.device_get(params)
        self._pending[self._actors[worker].compute.remote(params)] = worker

    def next_report(self, timeout: float) -> Report:
        """The next report; `queue.Empty` after the timeout."""
        done, _ = self._ray.wait(list(self._pending), timeout=timeout)
        if not done:
            raise queue.Empty
        worker = self._pending.pop(done[0])
        try:
            report, self._drawn[worker] = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            self._ray.kill(self._actors.pop(worker))
            return Failed(worker, error)
        if isinstance(report, Gradient):
            value = jax.block_until_ready(jax.device_put(report.value, self._master))
            report = report._replace(value=value)
        return report

    def stop(self, seconds: float) -> None:
        """Ends all actors, at once."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()


def _start_ray(ray: Any) -> None:
    """Starts Ray for this machine alone: all its processes listen on loopback only.

    Whoever reaches a port of Ray can run code. A caller who has a cluster connects to
    it beforehand, or names it in `RAY_ADDRESS`.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    import ray._private.ray_constants as constants  # pyright: ignore[reportMissingImports]

    # Ray's servers listen on 127.0.0.1 if that is the node's address, else on all
    # addresses. `init` replaces it by a network card's unless clusters are disabled,
    # as they are on macOS and Windows.
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
            "other machines reach it, and was stopped: start Ray yourself and call "
            "ray.init() before engine.run."
        )
