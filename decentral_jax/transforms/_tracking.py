"""Gradient tracking: each worker tracks the mean gradient of all workers.

The tracker starts at the worker's own gradient. It is mixed and corrected in such a way
that the mean of the trackers always equals the mean of the gradients.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.gossip import (
    accelerated_round,
    accelerated_rounds,
    apply_factor,
    mix_differences,
)
from decentral_jax._exchange.numbers import (
    PyTree,
    advance,
    is_narrow,
    wide,
    wide_zeros,
)
from decentral_jax._validation import (
    check_arrays,
    check_axis_name,
    check_choice,
    check_dtypes,
    check_int,
    check_nobody_missing,
    check_optimizer,
    require_params,
)
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
    from_graph,
)
from decentral_jax.transforms._gossip import Order

__all__ = [
    "AcceleratedTrackingState",
    "ExactPhasesState",
    "TrackGradientsState",
    "accelerated_tracking",
    "exact_phases",
    "track_gradients",
]

When = Literal["every_step", "phase_end"]


class TrackGradientsState(NamedTuple):
    """State of `track_gradients`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: rounds so far
    tracker: optax.Updates  # like gradients, at least float32: y_{t-1}
    gradient: optax.Updates  # like gradients, at least float32: g_{t-1}


def track_gradients(
    topology: AnyTopology,
    *,
    order: Order = "combine_then_adapt",
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by a tracker of the mean gradient.

    The tracker starts at :math:`y_0 = g_0`, and changes by

    - "combine_then_adapt": :math:`y_t = W y_{t-1} + g_t - g_{t-1}`,
    - "adapt_then_combine": :math:`y_t = W (y_{t-1} + g_t - g_{t-1})`.

    In both orders, :math:`\sum_i y_{t,i} = \sum_i g_{t,i}`.

    Args:
      topology: A doubly stochastic topology or schedule.
      order: "adapt_then_combine" or "combine_then_adapt". Pass the same order to
        `dj.gossip` in the chain.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it first in a chain, and `dj.gossip` last. Each worker
      sends `max_degree` times the bytes of the gradients per step, and keeps two copies
      of the gradients. Its `update` accepts the keyword argument `active` of `dj.mix`.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If `topology` is not doubly stochastic or not connected, or if `order`
        is unknown.

    References:
      Nedic, Olshevsky & Shi, "Achieving Geometric Convergence for Distributed
      Optimization over Time-Varying Graphs", SIAM J. Optim. 2017 (combine-then-adapt);
      Xu et al., "Augmented Distributed Gradient Methods for Multi-Agent Optimization",
      CDC 2015 (adapt-then-combine); with stochastic gradients, Pu & Nedic,
      "Distributed Stochastic Gradient Tracking Methods", Mathematical Programming 2021.

    Example:
      >>> import decentral_jax as dj, optax
      >>> topology = dj.topology.ring(8)
      >>> tx = optax.chain(
      ...     dj.track_gradients(topology), optax.adam(1e-3), dj.gossip(topology)
      ... )
    """
    check_topology(topology)
    check_choice("order", order, get_args(Order))
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> TrackGradientsState:
        check_arrays("params", params)
        return TrackGradientsState(
            count=jnp.zeros([], jnp.int32),
            tracker=_wide_zeros(params),
            gradient=_wide_zeros(params),
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        *,
        active: jax.Array | bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackGradientsState]:
        del params, extra_args
        check_arrays("updates", updates)

        # W y, computed as y + (W - I) y, so that rounding preserves the sum.
        def mixed(tracker):
            count = jnp.asarray(state.count)
            change = mix_differences(
                tracker, topology, axis_name, count, active, like=updates
            )
            return jax.tree.map(jnp.add, tracker, change)

        gradient = jax.tree.map(wide, updates)
        if order == "combine_then_adapt":
            tracker = _correct(mixed(state.tracker), gradient, state.gradient)
        else:
            corrected = _correct(state.tracker, gradient, state.gradient)
            # The first tracker is the gradient itself, without mixing.
            tracker = optax.tree.where(state.count == 0, gradient, mixed(corrected))
        count = advance(state.count, topology.period)
        state = TrackGradientsState(count, tracker, gradient)
        return optax.tree.cast_like(tracker, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AcceleratedTrackingState(NamedTuple):
    """State of `accelerated_tracking`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: iterations so far
    # All like gradients, at least float32.
    total: optax.Updates  # sum of this phase's gradients so far, divided by R
    previous: optax.Updates  # mean gradient of the previous phase
    tracker: optax.Updates  # y_k
    # Gossip in progress, as pairs (parameters, tracker): z_r in `now`, z_{r-1} in
    # `before`. None if all rounds happen at the end of the phase.
    now: PyTree
    before: PyTree
    inner: optax.OptState  # state of the inner optimizer


def accelerated_tracking(
    optimizer: optax.GradientTransformation,
    topology: Topology,
    *,
    rounds: int,
    when: When = "every_step",
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Tracks gradients in phases with accelerated gossip (DeTAG).

    A phase :math:`k` consists of :math:`R` iterations, which are calls of `update`. The
    parameters :math:`x_k` do not change within a phase:

    .. math::
       \bar g_k &= \tfrac1R \textstyle\sum_r g(x_k; \xi_r) \\
       \tilde x, \tilde y &= \mathrm{AG}_R(x_k), \mathrm{AG}_R(y_k) \\
       x_{k+1} &= \tilde x + \mathrm{inner}(\tilde y) \\
       y_{k+1} &= \tilde y + \bar g_k - \bar g_{k-1},
       \qquad y_0 = \bar g_{-1} = 0

    where :math:`\mathrm{AG}_R` is `dj.accelerated_mix` with :math:`R` rounds, and
    :math:`\mathrm{inner}(y) = -\gamma y` for SGD. In every phase,
    :math:`\sum_i y_{k+1,i} = \sum_i \bar g_{k,i}`.

    Args:
      optimizer: Optimizer that takes the tracker as its gradient. With momentum, DeTAG
        becomes DeTAGM. Its steps, and therefore its schedules, count phases.
      topology: A static, symmetric, doubly stochastic topology.
      rounds: :math:`R`, number of gradients and of gossip rounds per phase.
      when: "every_step" performs one gossip round per iteration, in parallel with the
        gradient. "phase_end" performs all rounds in the last iteration of the phase,
        which gives the same result and keeps four fewer copies of the parameters.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. On average, each worker sends twice `max_degree` times the
      bytes of the parameters per iteration. Its `update` accepts the keyword argument
      `active` of `dj.mix` for the gossip round of this iteration. With "phase_end",
      `active` of the last iteration applies to all rounds.

    Raises:
      TypeError: If `topology` is a schedule, or if `rounds` is not an integer.
      ValueError: If `topology` lacks a required property, if `rounds` is below 1, if
        `when` is unknown, or if `update` gets no `params`.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithms 2-3.

    Example:
      >>> import decentral_jax as dj, optax
      >>> topology = dj.topology.ring(8).lazy(0.5)
      >>> tx = dj.accelerated_tracking(optax.sgd(0.1), topology, rounds=4)
    """
    gossip_round = accelerated_round(topology, axis_name)
    rounds = check_int("rounds", rounds, 1)
    check_choice("when", when, get_args(When))
    check_axis_name(axis_name)
    check_optimizer("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> AcceleratedTrackingState:
        params = require_params(params, "accelerated_tracking")

        def zeros():
            # New arrays for each field, because a buffer cannot be donated twice.
            return _wide_zeros(params)

        def pair():
            return (zeros(), zeros()) if when == "every_step" else None

        return AcceleratedTrackingState(
            count=jnp.zeros([], jnp.int32),
            total=zeros(),
            previous=zeros(),
            tracker=zeros(),
            now=pair(),
            before=pair(),
            inner=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        *,
        active: jax.Array | bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AcceleratedTrackingState]:
        params = require_params(params, "accelerated_tracking")
        check_dtypes("params", params, jnp.inexact)
        check_arrays("updates", updates)
        axis = WorkerAxis.bind(axis_name)
        count = axis.unvmap(state.count)
        first, last = count % rounds == 0, count % rounds == rounds - 1
        # Accumulate the mean gradient. Parameters and tracker are mixed together, in at
        # least float32, and sent in the dtypes of `like`.
        total = jax.tree.map(lambda s, g: s + wide(g) / rounds, state.total, updates)
        start = (jax.tree.map(wide, params), state.tracker)
        like = (params, updates)

        # One gossip round per iteration; the first one of a phase starts at (x_k, y_k).
        now, before = state.now, state.before
        if when == "every_step":
            now, before = (optax.tree.where(first, start, z) for z in (now, before))
            now, before = gossip_round(now, before, active, like), now

        def finish_phase(now, inner_state):
            if when == "phase_end":
                now = accelerated_rounds(
                    start, topology, rounds, axis_name, active, like
                )
            # x_{k+1} and y_{k+1} from the mixed parameters and tracker.
            mixed, tracked = now
            step, inner_state = _step(inner, tracked, inner_state, params, extra_args)
            moved = jax.tree.map(lambda m, x, u: m - x + wide(u), mixed, start[0], step)
            tracker = _correct(tracked, total, state.previous)
            zeros = optax.tree.zeros_like(total)
            return optax.tree.cast_like(moved, params), (
                zeros,
                total,
                tracker,
                inner_state,
            )

        def go_on(now, inner_state):
            del now
            zeros = optax.tree.zeros_like(params)
            return zeros, (total, state.previous, state.tracker, inner_state)

        moved, (total, previous, tracker, inner_state) = axis.uniform_cond(
            last, finish_phase, go_on, now, state.inner
        )
        return moved, AcceleratedTrackingState(
            count=advance(state.count, rounds),
            total=total,
            previous=previous,
            tracker=tracker,
            now=now,
            before=before,
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ExactPhasesState(NamedTuple):
    """State of `exact_phases`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: iterations so far
    # Like gradients, at least float32: the mean of this phase's gradients so far, then
    # their partial average over workers.
    average: optax.Updates
    inner: optax.OptState  # state of the inner optimizer


def exact_phases(
    optimizer: optax.GradientTransformation,
    topology: Topology,
    *,
    rounds: int | None = None,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients exactly, in phases and on the edges of the graph (DeFacto).

    A phase first takes :math:`R` iterations that accumulate the mean gradient
    :math:`\bar g_k` at fixed parameters :math:`x_k`. It then takes one iteration per
    factor of :math:`11^T/n = F_m \cdots F_1`, and ignores the gradients of these
    iterations:

    .. math:: x_{k+1} = x_k + \mathrm{inner}(F_m \cdots F_1 \bar g_k)

    Args:
      optimizer: Optimizer of the averaged gradient. Its steps count phases.
      topology: A static, connected topology. Only its edges are used.
      rounds: :math:`R`. None means the number of factors.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Only the iterations with a factor send, at most `max_degree`
      times the bytes of the gradients each. All workers add the same update to their
      models, up to rounding, and nothing else brings the models together. In float32,
      the models drift apart by about 1e-5 of their size in 1e5 iterations. In half
      precision they would drift a thousand times as fast. Parameters narrower than
      float32 therefore also take one gossip round, with Metropolis weights, in the last
      iteration of each phase.

    Raises:
      TypeError: If `topology` is a schedule, or if `rounds` is not an integer.
      ValueError: If `topology` is not connected, if `rounds` is below 1, or if `update`
        gets no `params`.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> tx = dj.exact_phases(optax.sgd(0.1), dj.topology.ring(8))
    """
    check_topology(topology, doubly_stochastic=False, static=True)
    check_axis_name(axis_name)
    factors = exact_factors(topology)
    rounds = len(factors) if rounds is None else check_int("rounds", rounds, 1)
    phase = rounds + len(factors)
    check_optimizer("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)
    # Metropolis weights on the same edges, for parameters in half precision.
    metropolis = from_graph(topology.graph.to_undirected(reciprocal=True))

    def gossip_narrow(moved, params):
        """Adds a gossip round to the updates of parameters in half precision."""
        moved, structure = jax.tree.flatten(moved)
        leaves = jax.tree.leaves(params)
        half = [i for i, x in enumerate(leaves) if is_narrow(x)]
        models = [leaves[i] for i in half]
        change = mix_differences(
            [wide(x) for x in models], metropolis, axis_name, like=models
        )
        for i, c in zip(half, change, strict=True):
            moved[i] = wide(moved[i]) + c
        return optax.tree.cast_like(structure.unflatten(moved), params)

    def init_fn(params: optax.Params) -> ExactPhasesState:
        params = require_params(params, "exact_phases")
        return ExactPhasesState(
            count=jnp.zeros([], jnp.int32),
            average=_wide_zeros(params),
            inner=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ExactPhasesState]:
        check_nobody_missing(extra_args, "exact_phases")
        params = require_params(params, "exact_phases")
        check_dtypes("params", params, jnp.inexact)
        check_arrays("updates", updates)
        axis = WorkerAxis.bind(axis_name)
        position = axis.unvmap(state.count) % phase

        # The first R iterations of a phase accumulate; the others apply a factor each.
        def accumulate(average):
            return jax.tree.map(lambda a, g: a + wide(g) / rounds, average, updates)

        def spread(average):
            return apply_factor(average, factors, position - rounds, axis_name)

        average = axis.uniform_cond(
            position >= rounds, spread, accumulate, state.average
        )

        # The last iteration takes the step; in all others, the parameters do not move.
        def finish_phase(average, inner_state):
            moved, inner_state = _step(inner, average, inner_state, params, extra_args)
            moved = gossip_narrow(moved, params)
            return moved, optax.tree.zeros_like(average), inner_state

        def go_on(average, inner_state):
            return optax.tree.zeros_like(params), average, inner_state

        moved, average, inner_state = axis.uniform_cond(
            position == phase - 1, finish_phase, go_on, average, state.inner
        )
        count = advance(state.count, phase)
        return moved, ExactPhasesState(count, average, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide_zeros(tree: PyTree) -> PyTree:
    """Returns zeros of the shapes of a tree, in at least float32."""
    return jax.tree.map(wide_zeros, tree)


def _step(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """Returns the step of the inner optimizer, and its new state in the old dtypes.

    Hyperparameters injected in a wider dtype would widen the state. Both branches of a
    `cond` must return the same dtypes, and the branch without a step keeps the state.
    """
    step, new = inner.update(
        optax.tree.cast_like(updates, params), state, params, **extra_args
    )

    def as_it_was(new, old):
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)

    return step, jax.tree.map(as_it_was, new, state)


def _correct(
    tracker: optax.Updates, new: optax.Updates, old: optax.Updates
) -> optax.Updates:
    """Adds the change of the gradient, so that the trackers keep the mean gradient."""
    return jax.tree.map(lambda y, a, b: y + (a - b), tracker, new, old)
