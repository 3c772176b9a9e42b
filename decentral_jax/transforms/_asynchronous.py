"""Replay of asynchronous training: one master applies one stale gradient per tick.

A trace (`decentral_jax.traces`) gives the order in which gradients arrive. Everything
else is deterministic.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import advance, fitted, wide, wide_copy
from decentral_jax._validation import (
    check_axis_name,
    check_interval,
    check_nobody_missing,
    check_optimizer,
    check_static,
    check_trees,
    require_params,
)
from decentral_jax.traces import Trace

__all__ = [
    "AsynchronousState",
    "DelayState",
    "asynchronous",
    "delay_gradients",
    "scale_by_staleness",
]


class AsynchronousState(NamedTuple):
    """State of `asynchronous`; all fields but `waits_for` are equal on all workers."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: ticks so far, k
    master: optax.Params  # like params, at least float32: x_k
    inner: optax.OptState  # state of the master's optimizer
    recent: optax.Params  # leaves [D, ...]: x_j in row j % D, for artificial delays
    # shape=(), dtype=int32: number of the iterate that this worker receives next, or -1
    waits_for: jax.Array

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the master's iterate."""
        return optax.tree.cast_like(self.master, params)


def asynchronous(
    optimizer: optax.GradientTransformation,
    trace: Trace,
    *,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Replays asynchronous training: a master applies the gradients of stale workers.

    In tick :math:`k`, the master applies the gradient of worker :math:`w_k`, evaluated
    at an old iterate,

    .. math:: x_{k+1} = x_k + \operatorname{inner}(g_{w_k}(x_{k - \tau_k})),

    and only this worker receives a new iterate. The parameters of a worker are the
    iterate that it holds; `dj.eval_params` returns the master's iterate
    :math:`x_{k+1}`. All workers compute a gradient in every tick, although only one of
    them is used: a replay serves to study asynchronous training. To also save the
    computation, use `decentral_jax.engine`.

    The inner optimizer receives the master's iterate as `params`, and the keyword
    argument `staleness`, :math:`\tau_k`, for `scale_by_staleness`. After the last tick
    of the trace, no gradient arrives and nothing changes.

    Args:
      optimizer: Optax optimizer of the master.
      trace: Which worker arrives in each tick, and how stale its gradient is; see
        `dj.traces`.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. It keeps one copy of the parameters, and the inner state. For
      traces with artificial delays (`traces.uniform_delay`), it also keeps the most
      recent iterates, as many as the trace requires; traces from speeds require none.

    Raises:
      TypeError: If `optimizer` is not an optimizer, or if `trace` is not a trace.
      ValueError: If the size of the axis is not `trace.num_workers`, if a tree is empty
        or trees do not match, or if `update` gets no `params`.

    References:
      Xu et al., "Parallel and distributed asynchronous adaptive stochastic gradient
      methods", Math. Prog. Comp. 2023, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> trace = dj.traces.from_speeds([1.0, 1.0, 3.0], num_ticks=1000)
      >>> tx = dj.asynchronous(optax.adam(1e-3), trace)
    """
    check_optimizer("optimizer", optimizer)
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace must be a dj.traces.Trace, got {trace!r}: create one with "
            "dj.traces.from_speeds."
        )
    check_axis_name(axis_name)
    inner = optax.with_extra_args_support(optimizer)
    plan = _Plan(trace)

    def init_fn(params: optax.Params) -> AsynchronousState:
        params = require_params(params, "asynchronous")
        check_trees("params", params)
        rows = (plan.depth,)
        master = jax.tree.map(wide_copy, params)
        recent = jax.tree.map(lambda x: jnp.zeros(rows + x.shape, x.dtype), master)
        recent = recent if plan.depth else ()
        zero, none = jnp.zeros([], jnp.int32), jnp.full([], -1, jnp.int32)
        return AsynchronousState(zero, master, inner.init(master), recent, none)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AsynchronousState]:
        check_nobody_missing(extra_args, "asynchronous")
        params = require_params(params, "asynchronous")
        check_trees("params", params, state.master)
        check_trees("updates", updates, state.master)
        axis = WorkerAxis.bind(axis_name)
        size = axis.size
        if size != trace.num_workers:
            raise ValueError(
                f"trace has {trace.num_workers} workers, but the axis {axis_name!r} "
                f"has {size}."
            )
        # The entries of the trace for this tick; after its end, those of the last tick.
        me = axis.index
        k = axis.unvmap(state.count)
        tick = jnp.minimum(k, len(trace) - 1)
        over = k >= len(trace)
        mine = jnp.asarray(plan.workers)[tick] == me
        staleness = jnp.asarray(plan.staleness)[tick]

        # The master's step with the gradient of the worker that arrives.
        def of_one(g):
            # `where` instead of a product: other gradients may be inf or NaN.
            own = jnp.where(mine, wide(g), 0)
            return axis.total(own)

        step, new_inner = inner.update(
            jax.tree.map(of_one, updates),
            state.inner,
            state.master,
            staleness=staleness,
            **extra_args,
        )
        new = optax.apply_updates(state.master, step)

        def unless_over(new, old):
            return jax.tree.map(lambda x, y: jnp.where(over, y, x), new, old)

        master = unless_over(new, state.master)
        # The iterate that this worker receives, and whether the master has reached it.
        waits_for = jnp.where(k == 0, jnp.asarray(plan.first)[me], state.waits_for)
        waits_for = jnp.where(mine, jnp.asarray(plan.next)[tick], waits_for)
        takes = (waits_for >= 0) & (waits_for <= k + 1) & ~over
        recent, given = plan.remember(state.recent, k, state.master, master, waits_for)
        # A worker without staleness holds x_k: it takes the master's step itself, which
        # avoids the rounding of x_{k+1} - x_k.
        same = takes & mine & (staleness == 0) & (waits_for == k + 1)

        def change(step, given, old):
            step = jnp.where(same, step, given - wide(old))
            return jnp.where(takes, step, jnp.zeros_like(step)).astype(old.dtype)

        updates = jax.tree.map(change, step, given, params)
        waits_for = jnp.where(takes, -1, waits_for).astype(jnp.int32)
        inner_state = unless_over(new_inner, state.inner)
        count = jnp.asarray(optax.safe_increment(k), jnp.int32)
        return updates, AsynchronousState(count, master, inner_state, recent, waits_for)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Plan:
    """The iterates that workers receive, precomputed from a trace of `K` ticks.

    Attributes:
      workers: Number of the worker that arrives in each tick, `[K]`.
      staleness: Staleness of its gradient, `[K]`.
      next: Number of the iterate that this worker receives next, `[K]`. The newest
        iterate if the worker does not arrive again.
      first: Number of the first iterate that each worker receives, `[n]`; -1 if it is
        the initial one.
      depth: Number of iterates before the newest one that the master must keep.
    """

    def __init__(self, trace: Trace):
        self.workers, self.staleness = trace.workers, trace.staleness
        # The gradient of tick k was evaluated at iterate k - tau_k.
        taken = np.arange(len(trace)) - trace.staleness
        self.next = np.arange(1, len(trace) + 1, dtype=np.int32)
        self.first = np.full(trace.num_workers, -1, np.int32)
        self.depth = 0
        for worker in range(trace.num_workers):
            ticks = np.flatnonzero(trace.workers == worker)
            if ticks.size:
                # Between two arrivals, a worker receives the iterate of the second one.
                self.first[worker] = taken[ticks[0]] or -1
                self.next[ticks[:-1]] = taken[ticks[1:]]
                back = ticks[:-1] + 1 - taken[ticks[1:]]
                self.depth = max(self.depth, int(back.max(initial=0)))

    def remember(
        self,
        recent: optax.Params,
        k: jax.Array,
        old: optax.Params,
        new: optax.Params,
        wanted: jax.Array,
    ) -> tuple[optax.Params, optax.Params]:
        """Stores an iterate, and looks up the wanted one.

        Args:
          recent: Recent iterates, leaves `[depth, ...]`, in rows modulo `depth`.
          k: Number of the iterate `old`.
          old: Iterate k, to store.
          new: Iterate k + 1.
          wanted: Number of the wanted iterate, from k + 1 - depth to k + 1.

        Returns:
          The recent iterates, and the wanted one.
        """
        if not self.depth:
            return recent, new
        recent = jax.tree.map(
            lambda rows, x: rows.at[k % self.depth].set(x), recent, old
        )
        row, newest = wanted % self.depth, wanted == k + 1
        given = jax.tree.map(
            lambda x, rows: jnp.where(newest, x, rows[row]), new, recent
        )
        return recent, given


def scale_by_staleness(
    power: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates down by the staleness of their gradient.

    .. math:: u \leftarrow u / \max(1, \tau)^p

    Chain it into the optimizer of `asynchronous`, which passes the staleness of each
    gradient. Place it after momentum, so that it scales only the step.

    Args:
      power: :math:`p`, positive. The published value is 1.

    Returns:
      The transformation.

    Raises:
      ValueError: If `power` is not positive.

    References:
      Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI
      2016.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> tx = dj.scale_by_staleness()
      >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)), staleness=2)[0]
      Array([2.], dtype=float32)
    """
    power = check_interval("power", power, 0.0, float("inf"), closed="neither")

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        if "staleness" not in extra_args:
            raise ValueError(
                "scale_by_staleness needs the keyword staleness: place it in the inner "
                "chain of dj.asynchronous, which passes it."
            )
        staleness = jnp.asarray(extra_args["staleness"])
        base = jnp.maximum(staleness, 1).astype(jnp.result_type(float))
        factor = base ** -fitted(power, base)

        def scale(u: jax.Array) -> jax.Array:
            return u * factor.astype(u.dtype)

        scaled = jax.tree.map(scale, updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


class DelayState(NamedTuple):
    """State of `delay_gradients`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Leaves [D + 1, ...]: gradients, the one of step k in row k % (D + 1).
    recent: optax.Updates


def delay_gradients(
    delay: int | Sequence[int] | np.ndarray,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each gradient by an old one.

    .. math:: g_k \leftarrow g_{\max(k - \tau_k, 0)}(x_{k - \tau_k})

    Use it to study delays with one worker and without a worker axis. It delays the
    gradient itself, whereas `asynchronous` evaluates a new gradient at an old iterate.

    Args:
      delay: :math:`\tau`, in steps: an integer, or one integer per step, such as
        `traces.uniform_delay(100, 1000).staleness`, repeated from the start when it
        ends.

    Returns:
      The transformation. Place it first in a chain. For a largest delay of `D` steps,
      it keeps `D + 1` gradients.

    Raises:
      TypeError: If a delay is not an integer.
      ValueError: If a delay is negative.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> tx = dj.delay_gradients(1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for step in range(3):
      ...     updates, state = tx.update(jnp.array([float(step)]), state)
      ...     print(updates)
      [0.]
      [0.]
      [1.]
    """
    check_static("delay", delay, "integers")
    delays = np.atleast_1d(np.asarray(delay))
    if delays.dtype.kind not in "iu":
        raise TypeError(f"delay must hold integers, got {delay!r}.")
    if delays.ndim != 1 or not delays.size or delays.min() < 0:
        raise ValueError(
            "delay must be an integer of at least 0, or a nonempty list of them, got "
            f"{delay!r}."
        )
    rows = int(delays.max()) + 1

    def init_fn(params: optax.Params) -> DelayState:
        params = require_params(params, "delay_gradients")
        check_trees("params", params)
        recent = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), params)
        return DelayState(jnp.zeros([], jnp.int32), recent)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DelayState]:
        del params, extra_args
        count = jnp.asarray(state.count)

        def write(recent: jax.Array, g: jax.Array) -> jax.Array:
            return recent.at[count % rows].set(g.astype(recent.dtype))

        # Write this step's gradient, then read the one of `now` steps ago.
        recent = jax.tree.map(write, state.recent, updates)
        now = jnp.asarray(delays.astype(np.int32))[count % len(delays)]
        step = jnp.maximum(count - now, 0)
        delayed = jax.tree.map(lambda rows_: rows_[step % rows], recent)
        count = advance(count, math.lcm(rows, len(delays)))
        return delayed, DelayState(count, recent)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
