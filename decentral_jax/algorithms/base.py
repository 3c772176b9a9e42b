"""What all named algorithms share: the optimizer that each worker runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from decentral_jax.collectives import fitted, value_equal_on_all_workers
from decentral_jax.validation import (
    check_arrays,
    check_learning_rate,
    check_optimizer,
)

Optimizer = optax.GradientTransformationExtraArgs
LearningRate = optax.ScalarOrSchedule | None

# Optimizers by their states' types. These derive a step from where their own earlier
# steps have led: from a copy of the parameters, or from the progress made. Where other
# workers move the parameters too, they undo it, or their step sizes grow without bound.
MOVES_ALONE = {
    "COCOBState": "cocob",
    "DAdaptAdamWState": "dadapt_adamw",
    "MadgradState": "madgrad",
    "MechanicState": "mechanize",
    "ProdigyState": "prodigy",
    "SAMState": "sam",
    "ScaleByRpropState": "rprop",
}
# These evaluate a worker's own loss, and its slope, at points that others do not see.
LINE_SEARCHES = {
    "ScaleByBacktrackingLinesearchState": "scale_by_backtracking_linesearch",
    "ScaleByZoomLinesearchState": "scale_by_zoom_linesearch",
}


def at_calls(rate: LearningRate, calls: int) -> LearningRate:
    """A rate of an optimizer that steps in every `calls`-th call of `update` only.

    A schedule counts calls, as one does that `optax.inject_hyperparams` evaluates: the
    rate is that of the call in which the step is taken.
    """
    if not callable(rate):
        return rate
    return lambda step: rate(calls * (step + 1) - 1)


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: Any, nesterov: bool = False
) -> optax.GradientTransformation:
    """`optax.sgd`; an injected momentum leaves its buffers' dtypes as they are."""
    if not isinstance(momentum, jax.Array):
        return optax.sgd(learning_rate, momentum, nesterov)

    def update_fn(updates, state, params=None):
        del params

        def add(g: jax.Array, buffer: jax.Array) -> jax.Array:
            return (g + fitted(momentum, buffer) * buffer).astype(buffer.dtype)

        buffers = jax.tree.map(add, updates, state.trace)
        moved = jax.tree.map(add, updates, buffers) if nesterov else buffers
        return moved, optax.TraceState(buffers)

    heavy_ball = optax.GradientTransformation(optax.trace(0.0).init, update_fn)
    return optax.chain(heavy_ball, optax.scale_by_learning_rate(learning_rate))


def local_optimizer(
    learning_rate: LearningRate,
    base: optax.GradientTransformation | None,
    momentum: float | jax.Array | None = None,
    alone: bool = False,
) -> Optimizer:
    """The optimizer that each worker runs: `base`, or SGD at `learning_rate`.

    Args:
      learning_rate: A number or schedule; None with `base`.
      base: Any optax optimizer, or None for SGD.
      momentum: SGD's.
      alone: Whether the optimizer gets the same gradients on all workers, and nothing
        else moves the parameters.

    Returns:
      The optimizer. It refuses parameters that are not arrays, and what `check_base`
      refuses. With `alone`, `dj.Workers.spmd` refuses a `value` that is a worker's own,
      if the optimizer reads it.
    """
    inner = optax.with_extra_args_support(_chosen(learning_rate, base, momentum))

    def init_fn(params):
        check_arrays("params", params)
        state = inner.init(params)
        check_base(state, alone)
        return state

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        check_arrays("updates", updates)
        check_arrays("params", params)
        value = extra_args.pop("value", None)
        if value is None:
            return inner.update(updates, state, params, **extra_args)
        update = functools.partial(inner.update, updates, state, params, **extra_args)
        if alone and isinstance(value, jax.Array) and _reads_value(update, value):
            value = value_equal_on_all_workers(value)
        return update(value=value)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_base(state: Any, alone: bool = False) -> None:
    """Checks that an optimizer works as one of several workers' optimizers.

    Args:
      state: Its state, in which `optax.chain`, `masked`, `partition`,
        `inject_hyperparams`, `MultiSteps` and the like keep the states of their parts.
      alone: As in `local_optimizer`.

    Raises:
      ValueError: If it contains one of `LINE_SEARCHES` or, unless `alone`, one of
        `MOVES_ALONE`.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _refused(node) is not None)
    for name in filter(None, map(_refused, nodes)):
        if name in LINE_SEARCHES.values():
            raise ValueError(
                f"base must not contain {name}: it chooses a step by one worker's own "
                "loss, so that workers choose differently. Pass a base with a learning "
                "rate, such as optax.lbfgs(0.1, linesearch=None)."
            )
        if not alone:
            raise ValueError(
                f"base must not contain {name}: it derives a step from where its own "
                "earlier steps have led, but here other workers move the parameters "
                "too. Pass another base, such as optax.adam(1e-3), or use "
                f"{name} on averaged gradients: dj.all_reduce_sgd(None, base=...)."
            )


def _refused(node: Any) -> str | None:
    """The name of an optimizer in one of the tables, of which this is the state."""
    kind = type(node)
    if not kind.__module__.startswith("optax."):
        return None
    if kind.__name__ == "SAMState" and node.cache is None:
        return None  # in opaque mode it keeps no copy of the parameters
    return (MOVES_ALONE | LINE_SEARCHES).get(kind.__name__)


def _reads_value(update: Callable, value: jax.Array) -> bool:
    """Whether the result of an update follows from its argument `value`."""
    program = jax.make_jaxpr(lambda value: update(value=value))(value).jaxpr
    read = [x for equation in program.eqns for x in equation.invars]
    return any(program.invars[0] is x for x in [*read, *program.outvars])


def _chosen(
    learning_rate: LearningRate,
    base: optax.GradientTransformation | None,
    momentum: float | jax.Array | None,
) -> optax.GradientTransformation:
    if base is None:
        if learning_rate is None:
            raise ValueError(
                "learning_rate must be given, got None: pass a number or schedule, or "
                "base=optax.adam(1e-3) or the like."
            )
        check_learning_rate(learning_rate)
        return sgd(learning_rate, momentum)
    check_optimizer("base", base)
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate} has no meaning beside base, which has its "
            "own: pass learning_rate=None with base."
        )
    return base
