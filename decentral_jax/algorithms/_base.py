"""The local optimizer, which all named algorithms share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.numbers import value_equal_on_all_workers
from decentral_jax._validation import (
    check_arrays,
    check_learning_rate,
    check_not_multi_steps,
    check_optimizer,
)

Optimizer = optax.GradientTransformationExtraArgs
# What the first argument of a named algorithm may be: an optimizer, or the learning
# rate of plain SGD.
OptimizerLike = optax.GradientTransformation | optax.ScalarOrSchedule

# Optimizers by the types of their states. These compute a step from the result of their
# own earlier steps: from a copy of the parameters, or from the progress made. If other
# workers move the parameters too, they undo that, or their step sizes grow without
# bound.
MOVES_ALONE = {
    "COCOBState": "cocob",
    "DAdaptAdamWState": "dadapt_adamw",
    "MadgradState": "madgrad",
    "MechanicState": "mechanize",
    "ProdigyState": "prodigy",
    "SAMState": "sam",
    "ScaleByRpropState": "rprop",
}
# These evaluate a worker's own loss and its slope at points that other workers do not
# evaluate.
LINE_SEARCHES = {
    "ScaleByBacktrackingLinesearchState": "scale_by_backtracking_linesearch",
    "ScaleByZoomLinesearchState": "scale_by_zoom_linesearch",
}


def local_optimizer(
    optimizer: OptimizerLike, *, calls_per_step: int = 1, alone: bool = False
) -> Optimizer:
    """Returns the optimizer that each worker runs.

    Args:
      optimizer: Any optax optimizer, or a learning rate or schedule for plain SGD.
      calls_per_step: Calls of the algorithm's `update` for each step of the optimizer.
        SGD's schedule counts calls, like one evaluated by `optax.inject_hyperparams`:
        its rate is that of the call in which the step is taken. Schedules inside an
        optax optimizer count steps.
      alone: Whether the optimizer gets the same gradients on all workers, and nothing
        else moves the parameters.

    Returns:
      The optimizer. It rejects parameters that are not arrays, and whatever
      `check_base` rejects. With `alone`, `dj.Workers.spmd` rejects a `value` that
      differs between workers, if the optimizer reads it.
    """
    inner = optax.with_extra_args_support(_as_optimizer(optimizer, calls_per_step))

    def init_fn(params):
        check_arrays("params", params)
        state = inner.init(params)
        check_base(state, alone=alone)
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


def check_base(state: optax.OptState, *, alone: bool = False) -> None:
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
                f"optimizer must not contain {name}: it chooses a step size from one "
                "worker's own loss, so workers choose different step sizes. Pass an "
                "optimizer with a learning rate, such as "
                "optax.lbfgs(0.1, linesearch=None)."
            )
        if not alone:
            raise ValueError(
                f"optimizer must not contain {name}: it computes a step from the "
                "result of its own earlier steps, but here other workers move the "
                "parameters too. Pass another optimizer, such as optax.adam(1e-3), or "
                f"use {name} on averaged gradients: dj.all_reduce_sgd({name}(...))."
            )


def _refused(node: Any) -> str | None:
    """Returns the table entry of the optimizer whose state this is, if it has one."""
    kind = type(node)
    if not kind.__module__.startswith("optax."):
        return None
    if kind.__name__ == "SAMState" and node.cache is None:
        return None  # In opaque mode it keeps no copy of the parameters.
    return (MOVES_ALONE | LINE_SEARCHES).get(kind.__name__)


def learning_rate_of(optimizer: OptimizerLike) -> optax.ScalarOrSchedule | None:
    """Returns the argument if it is a learning rate or schedule, or None."""
    return None if isinstance(optimizer, optax.GradientTransformation) else optimizer


def _as_optimizer(
    optimizer: OptimizerLike, calls_per_step: int
) -> optax.GradientTransformation:
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    check_not_multi_steps("optimizer", optimizer)
    if optimizer is None:
        raise TypeError(
            "optimizer must be an optax optimizer, a learning rate or a schedule, got "
            "None: pass a number for plain SGD, or, for example, optax.adam(1e-3)."
        )
    check_learning_rate(optimizer, "the learning rate passed as optimizer")
    if not callable(optimizer):
        return optax.sgd(optimizer)
    if not _is_schedule(optimizer):
        check_optimizer("optimizer", optimizer)
    schedule = optimizer
    return optax.sgd(lambda step: schedule(calls_per_step * (step + 1) - 1))


def _is_schedule(function: Callable) -> bool:
    """Tells a schedule from a constructor such as `optax.adam`."""
    returned = []
    jax.eval_shape(
        lambda count: returned.append(function(count)),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return not isinstance(returned[0], tuple)


def _reads_value(update: Callable, value: jax.Array) -> bool:
    """Returns whether the result of an update depends on its argument `value`."""
    program = jax.make_jaxpr(lambda value: update(value=value))(value).jaxpr
    read = [x for equation in program.eqns for x in equation.invars]
    return any(program.invars[0] is x for x in [*read, *program.outvars])
