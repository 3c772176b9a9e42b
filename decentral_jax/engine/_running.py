"""Entry point of the engine: argument checks, start, and end of a run."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from decentral_jax._validation import (
    check_int,
    check_interval,
    check_optimizer,
    check_trees,
)
from decentral_jax.engine._actors import Actors
from decentral_jax.engine._master import Master, Options, Run
from decentral_jax.engine._programs import Device, shapes
from decentral_jax.engine._progress import Progress
from decentral_jax.engine._threads import Threads


def run(
    gradient: Callable[[Any, Any], Any],
    params: optax.Params,
    batches: Callable[[int], Iterator[Any]],
    optimizer: optax.GradientTransformation,
    num_gradients: int,
    *,
    num_workers: int,
    synchronous: bool = False,
    max_staleness: int | None = None,
    devices: Sequence[Device] | None = None,
    actors: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    max_failures: int = 100,
    max_refused: int = 100,
    on_progress: Callable[[Progress], Any] | None = None,
) -> Run:
    r"""Trains with a master and workers that run in parallel, each at its own pace.

    At tick :math:`k`, the master applies the next gradient that arrives,

    .. math:: x_{k+1} = x_k + \mathrm{optimizer}\bigl(g_{w_k}(x_{k - \tau_k})\bigr),

    and sends :math:`x_{k+1}` only to its worker :math:`w_k`. The staleness
    :math:`\tau_k` is the number of updates since that worker received its parameters.
    No other worker waits. The trace of the run captures all its randomness.

    A worker that raises an exception is replaced: a new worker continues with the next
    batch of the same iterator, from the current parameters. Gradients that are not
    finite are refused. Both events are logged as warnings and counted. No gradient is
    applied twice.

    Args:
      gradient: Function from parameters and a batch of one worker to the gradient, a
        tree like `params`; for example, `jax.grad(loss_fn)`. It is jitted here.
      params: Initial parameters, a pytree of floating-point arrays.
      batches: Function from a worker's number to an iterator of its batches, which are
        pytrees of arrays. The worker's thread reads the iterator. When it ends, the
        other workers continue without this one. Batches with other shapes than the
        first one are compiled when they arrive.
      optimizer: Any optax optimizer. The master applies it to one gradient at a time.
      num_gradients: Total number of gradients to apply, K.
      num_workers: Number of workers n.
      synchronous: Whether the master instead waits for one gradient per worker and
        applies their mean. The last mean has fewer gradients if n does not divide K.
      max_staleness: Upper bound on :math:`\tau_k`, at least n - 1, or None for no
        bound. The gradient of a fast worker waits as long as applying it would make
        that of a slower worker too stale. No gradient is dropped.
      devices: Devices to use. Worker i uses device i modulo their number, and the
        master uses the first device. If None, uses all devices of this process.
      actors: Options of the workers' Ray actors, such as `{"num_gpus": 1}`. Each worker
        is then a process and uses the first device that it sees. Requires the extra
        `decentral_jax[ray]`. If None, the workers are threads.
      timeout: Seconds to wait for the next report of any worker, including the first
        batches.
      max_failures: Maximum number of worker replacements in total.
      max_refused: Maximum number of refused gradients in a row.
      on_progress: Function that is called with a `Progress` after each step of the
        master, which waits for it. `progress_line()` returns such a function.

    Returns:
      The final parameters and optimizer state, the trace, the indices of the batches,
      and measured times; see `Run`.

    Raises:
      ValueError: If the gradient of a worker's first batch fails or is not a tree like
        `params`, any worker has no batch, the batches of all workers end too early, or
        any number is out of range.
      TypeError: If `optimizer` is not an optax optimizer, or any leaf of `params` is
        not floating-point.
      RuntimeError: If a worker fails after `max_failures` replacements.
      FloatingPointError: If too many gradients in a row are not finite.
      TimeoutError: If no worker reports in time.
      ImportError: If `actors` is set and Ray is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from decentral_jax import engine
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 2)
      >>> def batches(worker):
      ...     while True:
      ...         yield jnp.full(3, float(worker))
      >>> result = engine.run(
      ...     jax.grad(loss), jnp.zeros(3), batches, optax.sgd(0.1), 20, num_workers=2
      ... )
      >>> len(result.trace), result.refused, result.replaced
      (20, 0, [])
    """
    # Check all arguments before any work starts.
    for name, value in (("gradient", gradient), ("batches", batches)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}.")
    check_trees("params", params)
    check_optimizer("optimizer", optimizer)
    n = check_int("num_workers", num_workers, minimum=1)
    check_interval("timeout", timeout, 0, math.inf, closed="neither")
    options = Options(
        num_gradients=check_int("num_gradients", num_gradients, minimum=1),
        num_workers=n,
        synchronous=synchronous,
        max_staleness=_bound(max_staleness, n),
        timeout=float(timeout),
        max_failures=check_int("max_failures", max_failures, minimum=0),
        max_refused=check_int("max_refused", max_refused, minimum=0),
        on_progress=on_progress,
    )
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must hold at least one device, got none.")

    # Create the workers: threads, or Ray actors.
    params = jax.device_put(params, devices[0])
    if actors is None:
        places = [devices[i % len(devices)] for i in range(n)]
        workers = Threads(gradient, batches, places, devices[0])
    else:
        workers = Actors(gradient, batches, params, devices[0], actors)
    # At the end, wait for busy workers for up to `timeout`.
    patience = options.timeout
    try:
        master = Master(params, optimizer, workers, options)
        master.prepare(lambda worker, batch: _check(gradient, params, worker, batch))
        return master.train()
    except BaseException:
        # Do not wait long for busy workers: the caller waits for the error, or has
        # pressed Ctrl-C.
        patience = min(patience, 1.0)
        raise
    finally:
        workers.stop(patience)


def _bound(max_staleness: int | None, num_workers: int) -> float:
    """Returns the valid bound on the staleness; infinity if there is none."""
    if max_staleness is None:
        return math.inf
    bound = check_int("max_staleness", max_staleness, minimum=0)
    if bound < num_workers - 1:
        raise ValueError(
            f"max_staleness must be at least num_workers - 1 = {num_workers - 1}, got "
            f"{bound}: the last of {num_workers} gradients computed in parallel has "
            "this staleness. Pass a larger bound or fewer workers."
        )
    return bound


def _check(
    gradient: Callable[[Any, Any], Any], params: optax.Params, worker: int, batch: Any
) -> None:
    """Checks the type of a gradient without computing it.

    Args:
      gradient: The user's gradient function.
      params: The parameters.
      worker: Number of the worker, for messages.
      batch: Types of the worker's first batch.

    Raises:
      ValueError: If the gradient function fails, or returns a tree unlike `params`.
    """
    remedy = "pass jax.grad(loss_fn) of a loss that returns one number."
    try:
        grads = jax.eval_shape(gradient, shapes(params), batch)
    except Exception as error:
        raise ValueError(
            f"gradient must be a function of params and a batch, but with the first "
            f"batch of worker {worker} it raised {type(error).__name__}: {error} If it "
            f"is not a gradient, {remedy}"
        ) from error
    # The gradient must have the structure, shapes, and dtypes of the parameters.
    for what, of in (("structure", jax.tree.structure), ("shapes and dtypes", _types)):
        if of(grads) != of(params):
            raise ValueError(
                f"gradient must return the {what} of params, {of(params)}, got "
                f"{of(grads)} with the first batch of worker {worker}: {remedy}"
            )


def _types(tree: Any) -> list[str]:
    """Returns the shapes and dtypes of all leaves in words."""
    return [jax.typeof(leaf).str_short() for leaf in jax.tree.leaves(tree)]
