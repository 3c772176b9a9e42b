"""Asynchronous training, replayed: one master, one stale gradient a tick.

The order of arrivals is a trace (`decentral_jax.traces`); all else is deterministic.
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
from decentral_jax.traces import Trace
from decentral_jax.validation import (
    check_axis_name,
    check_interval,
    check_nobody_missing,
    check_optimizer,
    check_static,
    check_trees,
    require_params,
)

__all__ = [
    "AsynchronousState",
    "DelayState",
    "asynchronous",
    "delay_gradients",
    "scale_by_staleness",
]


class AsynchronousState(NamedTuple):
    """State of `asynchronous`; all but `waits_for` is equal on all workers."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: ticks so far, k
    master: optax.Params  # like params, at least float32: x_k
    inner: optax.OptState  # the master's optimizer's
    recent: optax.Params  # leaves [D, ...]: x_j in row j % D, for artificial delays
    waits_for: jax.Array  # shape=(), dtype=int32: iterate this worker takes next, or -1

    def evaluation_params(self, params):
        """The master's iterate."""
        return jax.tree.map(lambda x, p: x.astype(p.dtype), self.master, params)


def asynchronous(
    optimizer: optax.GradientTransformation,
    trace: Trace,
    *,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Turns an optimizer into its asynchronous form: a master and stale workers.

    At tick :math:`k` the master applies the gradient of one worker, which took it at an
    old iterate,

    .. math:: x_{k+1} = x_k + \operatorname{inner}(g_{w_k}(x_{k - \tau_k})),

    and that worker alone receives a new one. Each worker's parameters are the iterate
    it holds, its snapshot; `dj.eval_params` gives the master's, :math:`x_{k+1}`. All
    workers compute a gradient in every tick, of which one is used: a replay is for
    studying, the work is saved by `decentral_jax.engine`.

    The inner optimizer sees the master's iterate as `params`, and gets the keyword
    `staleness`, :math:`\tau_k`, for `scale_by_staleness`. After the trace's last tick
    nothing arrives, and nothing changes.

    Args:
      optimizer: Any optax optimizer; its state is the master's.
      trace: Who arrives when, how stale; see `dj.traces`.
      axis_name: The worker axis.

    Returns:
      The transformation. It keeps a copy of the parameters and the inner state; and as
      many further copies as the trace asks for iterates older than the last one when a
      worker returns (`traces.uniform_delay`; none for traces of speeds).

    Raises:
      TypeError: If `optimizer` is no optimizer, or `trace` no trace.
      ValueError: If the axis has not `trace.num_workers` workers, a tree is empty or
        trees do not match, or `update` gets no `params`.

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
            f"trace must be a dj.traces.Trace, got {trace!r}: make one by "
            "dj.traces.from_speeds."
        )
    check_axis_name(axis_name)
    inner = optax.with_extra_args_support(optimizer)
    plan = _Plan(trace)

    def init_fn(params):
        params = require_params(params, "asynchronous")
        check_trees("params", params)
        rows = (plan.depth,)
        master = jax.tree.map(wide_copy, params)
        recent = jax.tree.map(lambda x: jnp.zeros(rows + x.shape, x.dtype), master)
        recent = recent if plan.depth else ()
        zero, none = jnp.zeros([], jnp.int32), jnp.full([], -1, jnp.int32)
        return AsynchronousState(zero, master, inner.init(master), recent, none)

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
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
        me = axis.index
        k = axis.unvmap(state.count)
        tick = jnp.minimum(k, len(trace) - 1)
        over = k >= len(trace)
        mine = jnp.asarray(plan.workers)[tick] == me
        staleness = jnp.asarray(plan.staleness)[tick]

        def of_one(g):
            # Where and not times: what the others compute may be infinite.
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
        # Which iterate this worker takes, and whether there is it already.
        waits_for = jnp.where(k == 0, jnp.asarray(plan.first)[me], state.waits_for)
        waits_for = jnp.where(mine, jnp.asarray(plan.next)[tick], waits_for)
        takes = (waits_for >= 0) & (waits_for <= k + 1) & ~over
        recent, given = plan.remember(state.recent, k, state.master, master, waits_for)
        # A worker that is up to date makes the master's step, without rounding.
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
    """What a trace says of the iterates that workers take.

    Attributes:
      workers: `[K]`.
      staleness: `[K]`.
      next: The iterate that the worker of tick k takes after it, `[K]`; the newest one
        if it never comes again.
      first: The iterate that each worker takes first, -1 if that is the start, `[n]`.
      depth: How many iterates before the newest one the master must remember.
    """

    def __init__(self, trace: Trace):
        self.workers, self.staleness = trace.workers, trace.staleness
        taken = np.arange(len(trace)) - trace.staleness
        self.next = np.arange(1, len(trace) + 1, dtype=np.int32)
        self.first = np.full(trace.num_workers, -1, np.int32)
        self.depth = 0
        for worker in range(trace.num_workers):
            ticks = np.flatnonzero(trace.workers == worker)
            if ticks.size:
                self.first[worker] = taken[ticks[0]] or -1
                self.next[ticks[:-1]] = taken[ticks[1:]]
                back = ticks[:-1] + 1 - taken[ticks[1:]]
                self.depth = max(self.depth, int(back.max(initial=0)))

    def remember(self, recent, k, old, new, wanted):
        """Keeps iterate k, and gives the wanted one: this, an older one or the next."""
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
    r"""Smaller steps for staler gradients, :math:`u / \max(1, \tau)^p`.

    Chain it into the optimizer of `asynchronous`, which passes the staleness of each
    gradient; after momentum, so that only the step becomes smaller.

    Args:
      power: :math:`p`, positive; 1 as published.

    Returns:
      The transformation.

    Raises:
      ValueError: If `power` is not positive.

    References:
      Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI
      2016.
    """
    power = check_interval("power", power, 0.0, float("inf"), closed="neither")

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
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
    recent: optax.Updates  # leaves [D + 1, ...]: gradients, step k's in row k % (D + 1)


def delay_gradients(
    delay: int | Sequence[int] | np.ndarray,
) -> optax.GradientTransformationExtraArgs:
    r"""Passes on an old gradient: :math:`g_{\max(k - \tau_k, 0)}(x_{k - \tau_k})`.

    For studies of one worker, without a worker axis. It delays the gradient itself;
    `asynchronous` takes a new one at an old iterate.

    Args:
      delay: :math:`\tau`, in steps; or one for each step, such as
        `traces.uniform_delay(100, 1000).staleness`, which begin again at their end.

    Returns:
      The transformation; place it first in a chain. It keeps one gradient more than the
      largest delay.

    Raises:
      TypeError: If a delay is no integer.
      ValueError: If a delay is negative.
    """
    check_static("delay", delay, "integers")
    delays = np.atleast_1d(np.asarray(delay))
    if delays.dtype.kind not in "iu":
        raise TypeError(f"delay must be integers, got {delay!r}.")
    if delays.ndim != 1 or not delays.size or delays.min() < 0:
        raise ValueError(f"delay must be at least 0, at least one, got {delay!r}.")
    rows = int(delays.max()) + 1

    def init_fn(params):
        params = require_params(params, "delay_gradients")
        check_trees("params", params)
        recent = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), params)
        return DelayState(jnp.zeros([], jnp.int32), recent)

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        del params, extra_args
        count = jnp.asarray(state.count)

        def write(recent: jax.Array, g: jax.Array) -> jax.Array:
            return recent.at[count % rows].set(g.astype(recent.dtype))

        recent = jax.tree.map(write, state.recent, updates)
        now = jnp.asarray(delays.astype(np.int32))[count % len(delays)]
        step = jnp.maximum(count - now, 0)
        delayed = jax.tree.map(lambda rows_: rows_[step % rows], recent)
        count = advance(count, math.lcm(rows, len(delays)))
        return delayed, DelayState(count, recent)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
