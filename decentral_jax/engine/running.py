"""Runs a training with asynchronous workers: arguments, checks, start and end."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from decentral_jax.engine.actors import Actors
from decentral_jax.engine.master import Master, Options, Run
from decentral_jax.engine.programs import shapes
from decentral_jax.engine.progress import Progress
from decentral_jax.engine.threads import Threads
from decentral_jax.validation import (
    check_int,
    check_interval,
    check_optimizer,
    check_trees,
)


def run(
    gradient: Callable[[Any, Any], Any],
    params: Any,
    batches: Callable[[int], Iterator],
    optimizer: optax.GradientTransformation,
    num_gradients: int,
    *,
    num_workers: int,
    synchronous: bool = False,
    max_staleness: int | None = None,
    devices: Sequence[Any] | None = None,
    actors: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    max_failures: int = 100,
    max_refused: int = 100,
    on_progress: Callable[[Progress], Any] | None = None,
) -> Run:
    r"""Trains with a master and workers that compute at once, each at its own pace.

    At tick :math:`k` the master applies the next gradient to arrive,

    .. math:: x_{k+1} = x_k + \mathrm{optimizer}\bigl(g_{w_k}(x_{k - \tau_k})\bigr),

    and sends :math:`x_{k+1}` to its worker :math:`w_k` alone. The staleness
    :math:`\tau_k` is the number of updates since that worker received its parameters.
    No other worker waits. What is random about a run is in its trace.

    A worker that raises is replaced: a new one goes on with the next batch of the same
    iterator, from the present parameters. A gradient that is not finite is refused.
    Both are logged as warnings and counted. No gradient is applied twice.

    Args:
      gradient: From one worker's parameters and batch to the gradient, a tree like
        `params`, such as `jax.grad(loss_fn)`. It is jitted here.
      params: The first parameters, a pytree of floating-point arrays.
      batches: From a worker's number to an iterator of its batches, pytrees of arrays.
        It is read in the worker's thread. When it ends, the others go on without this
        worker. Batches of another shape than the first are compiled when they come.
      optimizer: Any optax optimizer; the master applies it to one gradient at a time.
      num_gradients: Gradients to apply in all, K.
      num_workers: The number of workers n.
      synchronous: Whether the master waits for one gradient of every worker and
        applies their mean instead; the last mean is of fewer if n does not divide K.
      max_staleness: Bound on :math:`\tau_k`, at least n - 1; None for none. The
        gradient of a fast worker waits while applying it would make that of a slower
        one too stale; none is dropped.
      devices: Worker i computes on device i modulo their number, the master on the
        first; by default all of this process.
      actors: Options of the workers' Ray actors, such as `{"num_gpus": 1}`: then each
        worker is a process, on the first device it sees. None for threads. Needs the
        extra `decentral_jax[ray]`.
      timeout: Seconds to wait for any worker's report, the first batches included.
      max_failures: Replacements of workers in all.
      max_refused: Refused gradients in a row.
      on_progress: Called with a `Progress` after each step of the master, which waits
        for it; `progress_line()` writes one.

    Returns:
      The last parameters and the optimizer's state, the trace, which batches were used,
      and times; see `Run`.

    Raises:
      ValueError: If the gradient of a worker's first batch fails or is not like
        `params`, a worker has no batch at all, the batches of all workers end too
        early, or a number is out of range.
      TypeError: If `optimizer` is none, or `params` holds other than floating point.
      RuntimeError: If a worker fails after `max_failures` replacements.
      FloatingPointError: If too many gradients in a row are not finite.
      TimeoutError: If no worker reports in time.
      ImportError: If `actors` are asked for without Ray.

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

    params = jax.device_put(params, devices[0])
    if actors is None:
        places = [devices[i % len(devices)] for i in range(n)]
        workers = Threads(gradient, batches, places, devices[0])
    else:
        workers = Actors(gradient, batches, params, devices[0], actors)
    patience = options.timeout
    try:
        master = Master(params, optimizer, workers, options)
        master.prepare(lambda worker, batch: _check(gradient, params, worker, batch))
        return master.train()
    except BaseException:
        # The caller waits for the error, or pressed Ctrl-C.
        patience = min(patience, 1.0)
        raise
    finally:
        workers.stop(patience)


def _bound(max_staleness, num_workers):
    if max_staleness is None:
        return math.inf
    bound = check_int("max_staleness", max_staleness, minimum=0)
    if bound < num_workers - 1:
        raise ValueError(
            f"max_staleness must be at least num_workers - 1 = {num_workers - 1}, got "
            f"{bound}: of gradients computed at once the last is so stale. Pass a "
            "larger bound or fewer workers."
        )
    return bound


def _check(gradient, params, worker, batch):
    """Checks the gradient of a first batch, without computing it."""
    remedy = "pass jax.grad(loss_fn) of a loss that returns one number."
    try:
        grads = jax.eval_shape(gradient, shapes(params), batch)
    except Exception as error:
        raise ValueError(
            f"gradient must be a function of params and a batch, but with the first "
            f"batch of worker {worker} it raised {type(error).__name__}: {error} If it "
            f"is no gradient, {remedy}"
        ) from error
    for what, of in (("structure", jax.tree.structure), ("shapes and dtypes", _types)):
        if of(grads) != of(params):
            raise ValueError(
                f"gradient must return the {what} of params, {of(params)}, got "
                f"{of(grads)} with the first batch of worker {worker}: {remedy}"
            )


def _types(tree):
    return [jax.typeof(leaf).str_short() for leaf in jax.tree.leaves(tree)]
