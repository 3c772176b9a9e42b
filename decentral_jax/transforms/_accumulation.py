"""Gradient accumulation that communicates only in the steps that move the parameters.

`optax.MultiSteps` runs the wrapped optimizer in every micro-step and discards most of
its results, including everything that it has sent. Here, a `cond` on a step counter
skips the optimizer and its communication.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import wide_zeros
from decentral_jax._validation import (
    check_axis_name,
    check_int,
    check_optimizer,
    check_trees,
)
from decentral_jax.transforms._ordering import orders_in

__all__ = ["AccumulationState", "accumulate"]


class AccumulationState(NamedTuple):
    """State of `accumulate`."""

    micro_step: jax.typing.ArrayLike  # shape=(), dtype=int32: gradients in the sum
    total: optax.Updates  # sum of this worker's gradients, at least float32
    inner: optax.OptState  # state of the optimizer


def accumulate(
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step of an optimizer with the mean of `steps` gradients.

    .. math::
       u_t = \begin{cases}
       \mathrm{optimizer}\bigl(\frac1K \sum_{k=0}^{K-1} g_{t-k}\bigr)
       & K \text{ divides } t + 1 \\ 0 & \text{else} \end{cases}

    The steps in between are micro-steps: they leave the parameters and the optimizer's
    state unchanged, and send nothing. Schedules inside the optimizer count steps, not
    micro-steps. Gradients are summed in at least float32.

    Wrap the whole algorithm, as in `dj.accumulate(dj.d_psgd(0.1, ring), 4)`. An
    accumulation inside of it, such as `dj.d_psgd(dj.accumulate(...), ring)`, would
    still communicate in every micro-step. An ordering transformation goes outside, as
    it must see each micro-step's gradients:
    `optax.chain(dj.d_grab(...), dj.accumulate(...))`.

    Args:
      optimizer: Named algorithm, or other optax optimizer, that may communicate.
      steps: :math:`K`, number of gradients per step of the optimizer.
      axis_name: Name of the worker axis, or a tuple of names.

    Returns:
      The transformation. Extra arguments of `update`, such as `value` and `active`,
      reach the optimizer from the micro-step in which it takes its step.

    Raises:
      TypeError: If `optimizer` is not an optimizer, if `steps` is not an integer, or if
        any leaf of the gradients is not floating-point.
      ValueError: If `steps` is below 1, if the optimizer contains an ordering
        transformation, or if gradients and parameters differ in shape.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> tx = dj.accumulate(dj.all_reduce_sgd(1.0), 2)
      >>> def two_steps(first, second):
      ...     state = tx.init(first)
      ...     update, state = tx.update(first, state)
      ...     return update, tx.update(second, state)[0]
      >>> first, second = jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])
      >>> jax.vmap(two_steps, axis_name="workers")(first, second)
      (Array([0., 0.], dtype=float32), Array([-4., -4.], dtype=float32))
    """
    check_optimizer("optimizer", optimizer)
    steps = check_int("steps", steps, minimum=1)
    check_axis_name(axis_name)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> AccumulationState:
        total = jax.tree.map(wide_zeros, params)
        state = inner.init(params)
        if orders_in(state):
            raise ValueError(
                "optimizer must not contain an ordering transformation, which must see "
                "the gradients of every micro-step: chain it before the accumulation, "
                "as in optax.chain(dj.d_grab(...), dj.accumulate(...))."
            )
        return AccumulationState(jnp.zeros([], jnp.int32), total, state)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulationState]:
        check_trees("updates", updates, state.total)
        total = jax.tree.map(lambda s, g: s + g.astype(s.dtype), state.total, updates)

        def step(total, inner_state):
            mean = jax.tree.map(
                lambda s, g: (s / steps).astype(g.dtype), total, updates
            )
            new, inner_state = inner.update(mean, inner_state, params, **extra_args)
            return new, optax.tree.zeros_like(total), inner_state

        def wait(total, inner_state):
            # The optimizer decides on the dtypes of its updates.
            shapes, _, _ = jax.eval_shape(step, total, inner_state)
            none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return none, total, inner_state

        axis = WorkerAxis.bind(axis_name)
        count = jnp.asarray(state.micro_step, jnp.int32) + 1
        new, total, inner_state = axis.cond_every(
            steps, count, step, wait, total, state.inner
        )
        return new, AccumulationState(count % steps, total, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
