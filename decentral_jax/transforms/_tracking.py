"""Gradient tracking: each worker follows the mean gradient of all.

The tracker starts at the worker's own gradient and is mixed and corrected so that the
trackers' mean always equals the gradients' mean.
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
from decentral_jax._exchange.numbers import advance, is_narrow, wide, wide_zeros
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
    from_graph,
)
from decentral_jax.transforms._gossip import Order
from decentral_jax.validation import (
    check_arrays,
    check_axis_name,
    check_choice,
    check_dtypes,
    check_int,
    check_nobody_missing,
    check_optimizer,
    require_params,
)

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

    With :math:`y_0 = g_0`

    - "combine_then_adapt": :math:`y_t = W y_{t-1} + g_t - g_{t-1}`,
    - "adapt_then_combine": :math:`y_t = W (y_{t-1} + g_t - g_{t-1})`.

    Either way :math:`\sum_i y_{t,i} = \sum_i g_{t,i}`.

    Args:
      topology: A doubly stochastic topology or schedule.
      order: "adapt_then_combine" or "combine_then_adapt"; the same as that of
        `dj.gossip` in the chain.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain, and `dj.gossip` last. A worker
      sends `max_degree` times the gradients' bytes a step and keeps two copies of them.
      Its `update` takes the keyword `active` of `dj.mix`.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If it is not doubly stochastic or not connected, or if `order` is
        unknown.

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
            # The first tracker is the gradient itself, unmixed.
            tracker = optax.tree.where(state.count == 0, gradient, mixed(corrected))
        count = advance(state.count, topology.period)
        state = TrackGradientsState(count, tracker, gradient)
        return _like(tracker, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AcceleratedTrackingState(NamedTuple):
    """State of `accelerated_tracking`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: iterations so far
    # All like gradients, at least float32.
    total: optax.Updates  # sum of this phase's gradients so far / R
    previous: optax.Updates  # mean gradient of the phase before
    tracker: optax.Updates  # y_k
    # Gossip under way, each the pair (parameters, tracker): now z_r, before z_{r-1}.
    # None where all rounds are done at the phase's end.
    now: Any
    before: Any
    inner: optax.OptState  # state of the inner optimizer


def accelerated_tracking(
    optimizer: optax.GradientTransformation,
    topology: Topology,
    *,
    rounds: int,
    when: When = "every_step",
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Phases of gradient accumulation, accelerated gossip and gradient tracking.

    A phase :math:`k` takes :math:`R` iterations (calls of `update`), in which the
    parameters :math:`x_k` stay where they are:

    .. math::
       \bar g_k &= \tfrac1R \textstyle\sum_r g(x_k; \xi_r) \\
       \tilde x, \tilde y &= \mathrm{AG}_R(x_k), \mathrm{AG}_R(y_k) \\
       x_{k+1} &= \tilde x + \mathrm{inner}(\tilde y) \\
       y_{k+1} &= \tilde y + \bar g_k - \bar g_{k-1},
       \qquad y_0 = \bar g_{-1} = 0

    with :math:`\mathrm{AG}_R` as in `dj.accelerated_mix`, and
    :math:`\mathrm{inner}(y) = -\gamma y` for SGD. Always
    :math:`\sum_i y_{k+1,i} = \sum_i \bar g_{k,i}`.

    Args:
      optimizer: Optimizer of the tracker; with momentum in it, DeTAG is DeTAGM. Its
        steps, and so its schedules, count phases.
      topology: A static, symmetric, doubly stochastic topology.
      rounds: :math:`R`, gradients and gossip rounds a phase.
      when: "every_step" spreads the rounds over the phase, one an iteration, beside the
        gradient; "phase_end" does all of them in the phase's last iteration, with the
        same result and four copies of the parameters less to keep.
      axis_name: The worker axis.

    Returns:
      The transformation. A worker sends twice `max_degree` times the parameters' bytes
      an iteration, on average. Its `update` takes the keyword `active` of `dj.mix`, for
      this iteration's round; with "phase_end" the last one's holds for all rounds.

    Raises:
      TypeError: If `topology` is a schedule, or `rounds` no integer.
      ValueError: If the topology lacks a property above, `rounds` is below 1, `when` is
        unknown, or `update` gets no `params`.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithms 2-3.
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
            # Arrays of their own: a buffer cannot be donated twice.
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
        total = jax.tree.map(lambda s, g: s + wide(g) / rounds, state.total, updates)
        start = (jax.tree.map(wide, params), state.tracker)
        like = (params, updates)

        now, before = state.now, state.before
        if when == "every_step":
            now, before = (optax.tree.where(first, start, z) for z in (now, before))
            now, before = gossip_round(now, before, active, like), now

        def finish_phase(now, inner_state):
            if when == "phase_end":
                now = accelerated_rounds(
                    start, topology, rounds, axis_name, active, like
                )
            mixed, tracked = now
            step, inner_state = _step(inner, tracked, inner_state, params, extra_args)
            moved = jax.tree.map(lambda m, x, u: m - x + wide(u), mixed, start[0], step)
            tracker = _correct(tracked, total, state.previous)
            zeros = optax.tree.zeros_like(total)
            return _like(moved, params), (zeros, total, tracker, inner_state)

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
    # like gradients, at least float32: the gradient, then its running average
    average: optax.Updates
    inner: optax.OptState  # state of the inner optimizer


def exact_phases(
    optimizer: optax.GradientTransformation,
    topology: Topology,
    *,
    rounds: int | None = None,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Phases of gradient accumulation and exact averaging on the graph's own edges.

    A phase takes :math:`R` iterations that accumulate :math:`\bar g_k` at the fixed
    :math:`x_k`, then one iteration for each factor of
    :math:`11^T/n = F_m \cdots F_1`, whose gradients are not used:

    .. math:: x_{k+1} = x_k + \mathrm{inner}(F_m \cdots F_1 \bar g_k)

    Args:
      optimizer: Optimizer of the averaged gradient; its steps count phases.
      topology: A static, connected topology; only its edges are used.
      rounds: :math:`R`; as many as there are factors if None.
      axis_name: The worker axis.

    Returns:
      The transformation. Only the iterations with a factor send: at most `max_degree`
      times the gradients' bytes each. What workers add to their models is equal up to
      rounding, and nothing else brings the models together: in float32 they part by
      about 1e-5 of their size in 1e5 iterations. In half precision they would part a
      thousand times as fast, so parameters of less than float32 also take one round of
      gossip, with Metropolis weights, in the last iteration of each phase.

    Raises:
      TypeError: If `topology` is a schedule, or `rounds` no integer.
      ValueError: If the topology is not connected, `rounds` is below 1, or `update`
        gets no `params`.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 1.
    """
    check_topology(topology, doubly_stochastic=False, static=True)
    check_axis_name(axis_name)
    factors = exact_factors(topology)
    rounds = len(factors) if rounds is None else check_int("rounds", rounds, 1)
    phase = rounds + len(factors)
    check_optimizer("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)
    around = from_graph(topology.graph.to_undirected(reciprocal=True))

    def reunite(moved, params):
        """Adds a round of gossip to how parameters in half precision move."""
        moved, structure = jax.tree.flatten(moved)
        leaves = jax.tree.leaves(params)
        half = [i for i, x in enumerate(leaves) if is_narrow(x)]
        models = [leaves[i] for i in half]
        change = mix_differences(
            [wide(x) for x in models], around, axis_name, like=models
        )
        for i, c in zip(half, change, strict=True):
            moved[i] = wide(moved[i]) + c
        return _like(structure.unflatten(moved), params)

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

        def accumulate(average):
            return jax.tree.map(lambda a, g: a + wide(g) / rounds, average, updates)

        def spread(average):
            return apply_factor(average, factors, position - rounds, axis_name)

        average = axis.uniform_cond(
            position >= rounds, spread, accumulate, state.average
        )

        def finish_phase(average, inner_state):
            moved, inner_state = _step(inner, average, inner_state, params, extra_args)
            moved = reunite(moved, params)
            return moved, optax.tree.zeros_like(average), inner_state

        def go_on(average, inner_state):
            return optax.tree.zeros_like(params), average, inner_state

        moved, average, inner_state = axis.uniform_cond(
            position == phase - 1, finish_phase, go_on, average, state.inner
        )
        count = advance(state.count, phase)
        return moved, ExactPhasesState(count, average, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide_zeros(tree: Any) -> Any:
    return jax.tree.map(wide_zeros, tree)


def _like(updates: Any, reference: Any) -> Any:
    """Updates in the dtypes of another tree."""
    return jax.tree.map(lambda u, r: u.astype(jnp.result_type(r)), updates, reference)


def _step(inner: Any, updates: Any, state: Any, params: Any, extra_args: dict) -> Any:
    """The inner optimizer's step, and its state in the dtypes that it had.

    Hyperparameters injected in a wider dtype would widen it, but in the iterations in
    between it stays.
    """
    step, new = inner.update(_like(updates, params), state, params, **extra_args)

    def as_it_was(new, old):
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)

    return step, jax.tree.map(as_it_was, new, state)


def _correct(tracker: Any, new: Any, old: Any) -> Any:
    """Adds the gradients' change, so that the trackers' mean follows theirs."""
    return jax.tree.map(lambda y, a, b: y + (a - b), tracker, new, old)
