"""Exact averaging over all workers, of gradients or of parameters.

Averaging gradients in every step is the centralized baseline. Averaging parameters
every few steps is Local SGD. With an outer optimizer on the averaged difference, it is
SlowMo or DiLoCo.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import advance, wide, wide_copy
from decentral_jax._validation import (
    check_arrays,
    check_axis_name,
    check_dtypes,
    check_int,
    check_nobody_missing,
    check_optimizer,
    check_trees,
    require_params,
)
from decentral_jax.mixing import average

__all__ = ["PeriodicAveragingState", "average_gradients", "average_parameters"]


def average_gradients(
    *,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each worker's gradient by the mean over all workers.

    .. math:: g_i \leftarrow \frac1n \sum_j g_j

    Place it first in a chain. All workers then take bitwise the same step.

    Args:
      axis_name: Name of the worker axis.

    Returns:
      The transformation, which has no state. With a ring all-reduce, each worker sends
      `2 (n - 1) / n` times the bytes of the gradient per step.

    Raises:
      TypeError: If any leaf of the gradients is not floating-point or complex.
      ValueError: If the axis is not bound.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.average_gradients(), optax.sgd(1.0))
      >>> params, grads = jnp.zeros(2), jnp.array([1.0, 3.0])
      >>> step = lambda g, p: tx.update(g, tx.init(p), p)[0]
      >>> jax.vmap(step, axis_name="workers")(grads, params)
      Array([-2., -2.], dtype=float32)
    """
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        check_arrays("params", params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        check_nobody_missing(extra_args, "average_gradients")
        check_dtypes("updates", updates, jnp.inexact)
        return average(updates, axis_name), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class PeriodicAveragingState(NamedTuple):
    """State of `average_parameters`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Like params, at least float32: the common model z of the last exchange. () without
    # an outer optimizer.
    start: optax.Params
    # One state of the outer optimizer per fragment, equal on all workers.
    outer: tuple[optax.OptState, ...]


def average_parameters(
    *,
    period: int,
    outer: optax.GradientTransformation | None = None,
    fragments: int = 1,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages parameters over workers every `period` steps.

    Between exchanges, each worker takes its incoming update and sends nothing. At an
    exchange, with the incoming update :math:`u_i`,

    .. math:: \bar x = \frac1n \sum_j (x_j + u_j), \qquad x_i \leftarrow \bar x.

    An outer optimizer receives the difference between the last common model :math:`z`
    and :math:`\bar x` as its gradient,

    .. math::
       z \leftarrow z + \mathrm{outer}(z - \bar x), \qquad x_i \leftarrow z,

    so `outer=optax.sgd(1.0)` is plain averaging.

    With :math:`P > 1` fragments, the leaves are divided into :math:`P` parts of similar
    size, which are exchanged in different steps: part :math:`p = 1 \dots P` in step
    :math:`\lfloor p H / P \rfloor` of each period of :math:`H` steps. The bytes per
    period do not change, but they are spread over the period.

    Args:
      period: :math:`H`, number of steps between two exchanges.
      outer: Optax optimizer for the averaged difference. Its own schedules count
        exchanges. Its `update` receives the keyword argument `step`, the number of the
        iteration.
      fragments: :math:`P`, at most `period` and at most the number of leaves.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it last in a chain. With a ring all-reduce, each worker
      sends `2 (n - 1) / n` times the bytes of the parameters per period. With `outer`,
      it keeps one copy of the parameters, at least float32, and the state of the outer
      optimizer.

    Raises:
      TypeError: If `period` or `fragments` is not an integer, or if `outer` is not an
        optimizer.
      ValueError: If `period` or `fragments` is out of range, if trees do not match, or
        if `update` gets no `params`.

    References:
      Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, Algorithm 1;
      Wang et al., "SlowMo", ICLR 2020, Algorithm 1; Douillard et al., "DiLoCo", 2023,
      Algorithm 1; Douillard et al., "Streaming DiLoCo with overlapping communication",
      2025, Section 2.1 (fragments; here without overlap).

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), dj.average_parameters(period=2))
      >>> def two_steps(p, g):
      ...     state = tx.init(p)
      ...     for _ in range(2):
      ...         updates, state = tx.update(g, state, p)
      ...         p = optax.apply_updates(p, updates)
      ...     return p
      >>> jax.vmap(two_steps, axis_name="workers")(jnp.zeros(2), jnp.array([1.0, 3.0]))
      Array([-4., -4.], dtype=float32)
    """
    period = check_int("period", period, minimum=1)
    if outer is not None:
        check_optimizer("outer", outer)
        with_step = optax.with_extra_args_support(outer)
    fragments = check_int("fragments", fragments, minimum=1)
    if fragments > period:
        raise ValueError(
            f"fragments must be at most period={period}, got {fragments}: each part "
            "is exchanged in a different step of the period."
        )
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> PeriodicAveragingState:
        params = require_params(params, "average_parameters")
        check_trees("params", params)
        if outer is None:
            return PeriodicAveragingState(jnp.zeros([], jnp.int32), (), ())
        start = jax.tree.map(wide_copy, params)
        leaves = jax.tree.leaves(start)
        states = [
            outer.init([leaves[i] for i in part]) for part in _deal(leaves, fragments)
        ]
        return PeriodicAveragingState(jnp.zeros([], jnp.int32), start, tuple(states))

    def exchange(updates, params, start, state, count):
        if outer is None:
            mean = average(optax.apply_updates(params, updates), axis_name)
        else:
            # Send how far this worker has moved from the common model, instead of its
            # parameters: half precision then rounds only the small difference. All
            # workers started from `start`, cast to the dtype of the parameters.
            moved = jax.tree.map(
                lambda z, p, u: (wide(z.astype(p.dtype)) - wide(p) - wide(u)).astype(
                    p.dtype
                ),
                start,
                params,
                updates,
            )
            moved = jax.tree.map(wide, average(moved, axis_name))
            # The outer gradient is z minus the mean. `step` counts iterations, for
            # learning rates that follow a schedule over the run.
            step, state = with_step.update(moved, state, start, step=count - 1)
            start = mean = optax.apply_updates(start, step)
        # The update that takes this worker to the common model.
        updates = jax.tree.map(
            lambda x, p: (wide(x) - wide(p)).astype(p.dtype), mean, params
        )
        return updates, start, state

    def wait(updates, params, start, state, count):
        del count
        updates = optax.tree.cast_like(updates, params)
        return updates, start, state

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PeriodicAveragingState]:
        check_nobody_missing(extra_args, "average_parameters")
        params = require_params(params, "average_parameters")
        check_trees("params", params)
        check_trees("updates", updates, params)
        axis = WorkerAxis.bind(axis_name)
        count = advance(state.count, period)
        us, structure = jax.tree.flatten(updates)
        ps, starts = jax.tree.leaves(params), jax.tree.leaves(state.start)
        outer_states = []
        # Each part has its own condition: it is due in step p * H // P of the period.
        for p, part in enumerate(_deal(ps, fragments), start=1):
            mine = [us[i] for i in part], [ps[i] for i in part]
            start = [starts[i] for i in part] if outer is not None else ()
            outer_state = state.outer[p - 1] if outer is not None else ()
            since_turn = count - p * period // fragments
            new, start, outer_state = axis.cond_every(
                period, since_turn, exchange, wait, *mine, start, outer_state, count
            )
            # Put the part's leaves back in their places.
            for i, leaf in zip(part, new, strict=True):
                us[i] = leaf
            if outer is not None:
                for i, leaf in zip(part, start, strict=True):
                    starts[i] = leaf
                outer_states.append(outer_state)
        start = structure.unflatten(starts) if outer is not None else ()
        updates = structure.unflatten(us)
        return updates, PeriodicAveragingState(count, start, tuple(outer_states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _deal(leaves: Sequence[jax.Array], parts: int) -> list[list[int]]:
    """Divides leaves into parts of similar size, the largest leaves first.

    Returns:
      The numbers of the leaves in each part, in ascending order.
    """
    if parts > len(leaves):
        raise ValueError(
            f"fragments must be at most the number of leaves, got {parts} for "
            f"{len(leaves)}: pass a smaller number."
        )
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for i in sorted(range(len(leaves)), key=lambda i: -leaves[i].size):
        lightest = sizes.index(min(sizes))
        dealt[lightest].append(i)
        sizes[lightest] += max(1, leaves[i].size)
    return [sorted(part) for part in dealt]
