"""Entry point of the engine: argument checks, start, and end of a run."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from decentral_jax._validation import (
    check_arrays,
    check_int,
    check_interval,
    check_optimizer,
    check_trees,
)
from decentral_jax.engine._actors import Actors
from decentral_jax.engine._master import Master, Options, Run, result_of
from decentral_jax.engine._programs import Device, Gradients, Model, shapes
from decentral_jax.engine._progress import Progress
from decentral_jax.engine._state import Saver, State
from decentral_jax.engine._threads import Threads


def run(
    gradient: Callable[..., Any],
    params: optax.Params,
    batches: Callable[[int], Iterator[Any]],
    optimizer: optax.GradientTransformation,
    num_gradients: int,
    *,
    num_workers: int,
    has_aux: bool = False,
    model_state: Any = None,
    opt_state: optax.OptState | None = None,
    synchronous: bool = False,
    max_staleness: int | None = None,
    devices: Sequence[Device] | None = None,
    actors: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    max_failures: int = 100,
    max_refused: int = 100,
    on_progress: Callable[[Progress], Any] | None = None,
    checkpoints: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
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

    A model may have variables that no gradient trains, such as the batch statistics of
    BatchNorm. The master holds them as its model state :math:`s_k`, and sends them with
    the parameters. The gradient function returns new ones, :math:`s'_k`, computed from
    :math:`s_{k - \tau_k}`. With n workers,

    .. math:: s_{k+1} = (1 - \tfrac{1}{n}) s_k + \tfrac{1}{n} s'_k,

    or their mean over workers if `synchronous`. The model state thus averages over the
    data of all workers, and changes as fast per gradient as in a synchronous run. As a
    convex combination, it is stable for any staleness, and variances stay nonnegative.
    Values that are not floating-point, such as counters and PRNG keys, are taken from
    the last gradient applied.

    Args:
      gradient: Function from parameters and a batch of one worker to the gradient, a
        tree like `params`; for example, `jax.grad(loss_fn)`. It is jitted here.
        `has_aux` and `model_state` change its signature.
      params: Initial parameters, a pytree of floating-point arrays.
      batches: Function from a worker's number to an iterator of its batches, which are
        pytrees of arrays. The worker's thread reads the iterator. When it ends, the
        other workers continue without this one. Batches with other shapes than the
        first one are compiled when they arrive.
      optimizer: Any optax optimizer. The master applies it to one gradient at a time.
      num_gradients: Total number of gradients to apply, K.
      num_workers: Number of workers n.
      has_aux: Whether `gradient` instead returns `((loss, metrics), grads)`, as
        `jax.value_and_grad(loss_fn, has_aux=True)` does. `metrics` is a dictionary from
        names to real numbers or arrays of fixed shapes. The loss is recorded with them
        under the name "loss".
      model_state: Initial model state, a pytree of arrays. If set, `gradient` is a
        function from parameters, the model state, and a batch, and returns `((loss,
        (model_state, metrics)), grads)`. Requires `has_aux=True`.
      opt_state: Initial optimizer state, such as that of an earlier run. If None, uses
        `optimizer.init(params)`. It is copied.
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
      checkpoints: Folder of checkpoints, as `decentral_jax.checkpoints.Checkpoints`
        writes them; requires the extra `decentral_jax[checkpoint]`. If it holds a
        complete checkpoint, the run continues from there: the checkpoint replaces
        `params`, `model_state`, and `opt_state`, and each worker skips the batches that
        it had used. `batches` must return the same batches again. The result is that of
        the whole run, with its times.
      checkpoint_every: Number of gradients between two checkpoints. The last step is
        also followed by a checkpoint.

    Returns:
      The final parameters, optimizer state, and model state, the metrics, the trace,
      the indices of the batches, and measured times; see `Run`.

    Raises:
      ValueError: If the gradient of a worker's first batch fails, does not return trees
        like `params` and `model_state`, or returns invalid metrics; if metrics change
        their names or shapes; if `opt_state` is not that of `optimizer`; if any worker
        has no batch, or the batches of all workers end too early; if a checkpoint is of
        another run; or if any number is out of range.
      TypeError: If `optimizer` is not an optax optimizer, any leaf of `params` is not
        floating-point, or any leaf of `model_state` or `opt_state` is not an array.
      RuntimeError: If a worker fails after `max_failures` replacements, or a checkpoint
        cannot be written.
      FloatingPointError: If too many gradients in a row are not finite.
      TimeoutError: If no worker reports in time.
      NotADirectoryError: If `checkpoints` is a file.
      ImportError: If `actors` is set and Ray is not installed, or `checkpoints` is set
        and Orbax is not installed.

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
    if model_state is not None:
        check_arrays("model_state", model_state)
        if not has_aux:
            raise ValueError(
                "model_state needs has_aux=True, got has_aux=False: the gradient "
                "function must return the new model state. Pass "
                "jax.value_and_grad(loss_fn, has_aux=True) of a loss that returns loss,"
                " (model_state, metrics)."
            )
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
        checkpoint_every=check_int("checkpoint_every", checkpoint_every, minimum=1),
        on_progress=on_progress,
    )
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must hold at least one device, got none.")

    # The initial state, on the master's device, or that of the latest checkpoint.
    model = jax.device_put(Model(params, model_state), devices[0])
    opt_state = _initial(optimizer, model.params, opt_state, devices[0])
    state = State(model, opt_state, next_batches=[0] * n)
    with contextlib.ExitStack() as stack:
        saver = None
        if checkpoints is not None:
            saver = Saver(checkpoints, devices[0], synchronous)
            state = stack.enter_context(saver).restore(state)
        if len(state.applied) > options.num_gradients:
            raise ValueError(
                f"num_gradients must be at least {len(state.applied)}, the number of "
                f"gradients in the checkpoint in {str(checkpoints)!r}, got "
                f"{options.num_gradients}. To start a new run, pass another folder."
            )
        if len(state.applied) == options.num_gradients:
            return result_of(state, options)

        # Create the workers: threads, or Ray actors.
        drawn = state.next_batches
        if actors is None:
            places = [devices[i % len(devices)] for i in range(n)]
            gradients = Gradients(gradient, has_aux)
            workers = Threads(gradients, batches, drawn, places, devices[0])
        else:
            workers = Actors(
                gradient, has_aux, batches, drawn, state.model, devices[0], actors
            )
        # At the end, wait for busy workers for up to `timeout`.
        patience = options.timeout
        try:
            master = Master(state, optimizer, workers, saver, options)
            master.prepare(
                lambda worker, batch: _check(gradient, has_aux, model, worker, batch)
            )
            return master.train()
        except BaseException:
            # Do not wait long for busy workers: the caller waits for the error, or has
            # pressed Ctrl-C.
            patience = min(patience, 1.0)
            raise
        finally:
            workers.stop(patience)


def _initial(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState | None,
    device: Device,
) -> optax.OptState:
    """Returns the valid initial optimizer state, on a device, for donation."""
    init = jax.jit(optimizer.init)
    if opt_state is None:
        return init(params)
    check_arrays("opt_state", opt_state)
    expected = jax.eval_shape(init, params)
    for what, of in (("structure", jax.tree.structure), ("shapes and dtypes", _types)):
        if of(opt_state) != of(expected):
            raise ValueError(
                f"opt_state must have the {what} of optimizer.init(params), "
                f"{of(expected)}, got {of(opt_state)}: pass a state of the same "
                "optimizer and model, or None to start from optimizer.init(params). In "
                "Flax nnx, pass nnx.as_pure of the parameters and of "
                "nnx.Optimizer.opt_state."
            )
    # The master's step donates its state: never that of the caller.
    return jax.device_put(opt_state, device, may_alias=False)


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
    gradient: Callable[..., Any], has_aux: bool, model: Model, worker: int, batch: Any
) -> None:
    """Checks the types that a gradient function returns, without computing them.

    Args:
      gradient: The user's gradient function.
      has_aux: Whether it returns a loss and auxiliary results, too.
      model: The model.
      worker: Number of the worker, for messages.
      batch: Types of the worker's first batch.

    Raises:
      ValueError: If the gradient function fails, or returns other trees.
    """
    stateful = model.state is not None
    remedy = "pass jax.grad(loss_fn) of a loss that returns one number."
    returned = "(model_state, metrics)" if stateful else "metrics"
    if has_aux:
        remedy = (
            "pass jax.value_and_grad(loss_fn, has_aux=True) of a loss that returns "
            f"loss, {returned}, where loss is one number and metrics is a dictionary."
        )
    args = (model.params, model.state, batch) if stateful else (model.params, batch)
    try:
        result = jax.eval_shape(gradient, *shapes(args[:-1]), batch)
    except Exception as error:
        names = "params, model_state, and" if stateful else "params and"
        raise ValueError(
            f"gradient must be a function of {names} a batch, but with the first "
            f"batch of worker {worker} it raised {type(error).__name__}: {error} If it "
            f"is not a gradient, {remedy}"
        ) from error
    where = f"with the first batch of worker {worker}: {remedy}"
    # Take the nested pairs apart.
    grads, state = result, None
    if has_aux:
        try:
            (loss, aux), grads = result
            state, metrics = aux if stateful else (None, aux)
            valid = _types(loss)[0].endswith("[]") and isinstance(metrics, dict)
        except (TypeError, ValueError, IndexError):
            valid = False
        if not valid:
            raise ValueError(
                f"gradient must return ((loss, {returned}), grads), got "
                f"{jax.tree.structure(result)} {where}"
            )
        _check_metrics(metrics, where)
    # The trees must have the structure, shapes, and dtypes of the model.
    for name, got, like in (
        ("params", grads, model.params),
        ("model_state", state, model.state),
    ):
        for what, of in (
            ("structure", jax.tree.structure),
            ("shapes and dtypes", _types),
        ):
            if of(got) != of(like):
                raise ValueError(
                    f"gradient must return the {what} of {name}, {of(like)}, got "
                    f"{of(got)} {where}"
                )


def _check_metrics(metrics: dict[str, Any], where: str) -> None:
    """Checks the names and types of the metrics that a gradient function returns."""
    if "loss" in metrics:
        raise ValueError(
            "gradient must not return a metric with the name 'loss', under which the "
            "loss itself is recorded: rename it."
        )
    for name, value in metrics.items():
        dtype = getattr(value, "dtype", None)
        kinds = jnp.floating, jnp.integer, jnp.bool
        if not isinstance(name, str) or not any(
            dtype is not None and jnp.issubdtype(dtype, kind) for kind in kinds
        ):
            raise ValueError(
                "gradient must return metrics that map names to real numbers or "
                f"arrays, got {name!r}: {value!r} {where}"
            )


def _types(tree: Any) -> list[str]:
    """Returns the shapes and dtypes of all leaves in words."""
    return [jax.typeof(leaf).str_short() for leaf in jax.tree.leaves(tree)]
