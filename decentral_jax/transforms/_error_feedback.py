"""Error feedback: what compression keeps back is sent later.

Each worker adds what it could not send to what it sends next. Detached, a worker takes
its gradients part of the way towards where its unsent updates would lead.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import (
    advance,
    cast_like,
    fitted,
    is_narrow,
    wide,
    wide_copy,
    wide_zeros,
)
from decentral_jax.compression import Compressor, Selection
from decentral_jax.compression._base import check_compressor
from decentral_jax.validation import (
    check_axis_name,
    check_choice,
    check_int,
    check_interval,
    check_nobody_missing,
    check_trees,
    require_params,
)

__all__ = ["AveragedState", "DetachedState", "ResidualState", "error_feedback"]

Evaluate = Literal["shared", "averaged"]


class ResidualState(NamedTuple):
    """State of `error_feedback` where the parameters are the shared model."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    residual: optax.Params  # like params, at least float32: what is yet to be sent
    memory: Any  # what the compressor remembers, equal on all workers

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        return params


class DetachedState(NamedTuple):
    """State of `error_feedback` where the parameters leave the shared model."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    shared: optax.Params  # like params, at least float32: x, bitwise equal on all
    # Like params, at least float32: e_i. () if e_i is (params - shared) / detach.
    residual: Any
    detach: Any  # shape=(), float: lambda. () if the residual is kept.
    memory: Any  # what the compressor remembers, equal on all workers

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        return jax.tree.map(lambda x, y: x.astype(y.dtype), self.shared, params)


class AveragedState(DetachedState):
    """The same, evaluated with everything that is yet to be sent, as in DEF-A."""

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        residual = self.residual
        if _is_empty(residual):
            residual = _between(self.shared, params, self.detach)
        return jax.tree.map(
            lambda x, e, y: (x + e).astype(y.dtype), self.shared, residual, params
        )


def _is_empty(part: Any) -> bool:
    """Returns whether a part of the state is not kept."""
    return isinstance(part, tuple) and not part


def _between(shared: Any, params: Any, detach: float | jax.Array) -> Any:
    """Returns the residual that lies between the shared model and the parameters."""
    return jax.tree.map(lambda x, y: (wide(y) - x) / detach, shared, params)


def error_feedback(
    compressor: Compressor,
    *,
    detach: float | jax.Array = 0.0,
    period: int = 1,
    feedback: float | jax.Array = 1.0,
    evaluate: Evaluate = "shared",
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Sends updates compressed, and what was kept back with the next ones.

    With the incoming update :math:`u_i`, the residual :math:`e_i` (0 at first) and the
    model :math:`x` that all workers share

    .. math::
       p_i = \phi e_i + u_i, \qquad x \leftarrow x + \frac1n \sum_j C(p_j), \qquad
       e_i \leftarrow p_i - C(p_i),

    and the worker's parameters, where its next gradient is taken, are

    .. math:: y_i = x + \lambda e_i.

    (The papers subtract their updates; here as in optax they are added, and
    :math:`e_i` has their sign.) With `period` above 1 only every so many steps send. In
    between a worker goes alone, :math:`y_i \leftarrow y_i + u_i`, and :math:`u_i` above
    is the sum of its updates since the last exchange, after which it returns to
    :math:`x + \lambda e_i`.

    - :math:`\lambda = 0`: EF-SGD;
    - :math:`0 < \lambda < 1`: detached error feedback, DEF;
    - :math:`\lambda = 1`: step-ahead error feedback.

    Place it after the optimizer, so that momentum comes before compression. With
    `detach=0` it may also stand first, and compress gradients.

    Args:
      compressor: :math:`C`, one of `dj.compression`.
      detach: :math:`\lambda`, in [0, 1].
      period: :math:`p`, steps from one exchange to the next.
      feedback: :math:`\phi`, in (0, 1]; below 1, partial error feedback.
      evaluate: What `dj.eval_params` gives: "shared", :math:`x`; or "averaged",
        :math:`x + \frac1n \sum_i p_i` of all that is yet to be sent, as in DEF-A.
      seed: Of the compressor's random numbers.
      axis_name: The worker axis.

    Returns:
      The transformation. It keeps one copy of the parameters, at least float32: the
      residual if `detach` is 0, else the shared model. It keeps both if `period` is
      above 1, or if the parameters are in half precision and `detach` is not 0: the
      difference of two numbers in half precision is too coarse for a residual. It also
      keeps both if `detach` is an array, as under `optax.inject_hyperparams`. With a
      selecting compressor such as `random_block`, `feedback` 1 and float32 a step reads
      and writes only the selected entries of the copy where `detach` is not 0.

    Raises:
      TypeError: If `compressor` is none, or leaves are no floating-point arrays.
      ValueError: If a number is out of range, a tree is empty or trees do not match, or
        `update` gets no `params` where `detach` is not 0.

    References:
      Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes", ICML 2019, Algorithm 2; Xu & Huang, "Detached Error Feedback for
      Distributed SGD with Random Sparsification", ICML 2022, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> block = dj.compression.random_block(64)
      >>> tx = optax.chain(
      ...     optax.sgd(0.1, momentum=0.9), dj.error_feedback(block, detach=0.3)
      ... )
    """
    check_compressor(compressor)
    detach = check_interval("detach", detach, 0.0, 1.0)
    period = check_int("period", period, minimum=1)
    feedback = check_interval("feedback", feedback, 0.0, 1.0, closed="right")
    check_choice("evaluate", evaluate, get_args(Evaluate))
    seed = check_int("seed", seed, minimum=0)
    check_axis_name(axis_name)
    # Injected numbers may change from step to step: they decide no branch.
    injected = isinstance(detach, jax.Array)
    detached = injected or detach > 0
    weighs = isinstance(feedback, jax.Array) or feedback < 1
    selection = None
    if isinstance(compressor, Selection) and not weighs:
        selection = compressor

    def init_fn(params: optax.Params) -> ResidualState | DetachedState:
        params = require_params(params, "error_feedback")
        check_trees("params", params)
        count = jnp.zeros([], jnp.int32)
        memory = compressor.init(jax.tree.leaves(params))
        zeros, copies = (jax.tree.map(make, params) for make in (wide_zeros, wide_copy))
        if not detached and period == 1 and evaluate == "shared":
            return ResidualState(count, zeros, memory)
        kind = AveragedState if evaluate == "averaged" else DetachedState
        if injected or not detached or period > 1 or is_narrow(params):
            return kind(count, copies, zeros, (), memory)
        return kind(count, copies, (), jnp.asarray(detach, float), memory)

    def compressed(
        p: Any, like: Any, state: ResidualState | DetachedState, axis: WorkerAxis
    ) -> tuple[Any, Any, Any]:
        """Returns what stays with the worker, the mean that arrived, and the memory."""
        # The residual also takes what the cast to the parameters' dtype loses.
        leaves, structure = jax.tree.flatten(cast_like(p, like))
        key = axis.step_key(seed, state.count)
        own, mean, memory = compressor.average(key, leaves, state.memory, axis)
        own, mean = (structure.unflatten(map(wide, x)) for x in (own, mean))
        return jax.tree.map(jnp.subtract, p, own), mean, memory

    def update_attached(us, state: ResidualState, like, axis: WorkerAxis):
        if selection is not None and not is_narrow(like):
            moved, residual = _send_selected(
                selection, axis.step_key(seed, state.count), us, state.residual, axis
            )
            memory = state.memory
        else:
            p = jax.tree.map(
                lambda e, u: fitted(feedback, e) * e + u, state.residual, us
            )
            residual, moved, memory = compressed(p, like, state, axis)
        return moved, ResidualState(advance(state.count), residual, memory)

    def update_detached(us, state: DetachedState, params, axis: WorkerAxis):
        keeps_residual = not _is_empty(state.residual)

        def alone(us, shared, residual, memory):
            # With `feedback`, only what an exchange keeps back is weighed less.
            return us, shared, jax.tree.map(jnp.add, residual, us), memory

        def send(us, shared, residual, memory):
            if selection is not None and not keeps_residual:
                key = axis.step_key(seed, state.count)
                moved, shared = _send_detached(
                    selection, key, us, shared, params, detach, axis
                )
                return moved, shared, residual, memory
            if not keeps_residual:
                residual = _between(shared, params, detach)
            # With a period, the last exchange has weighed what it kept back.
            weight = feedback if period == 1 else 1.0
            p = jax.tree.map(lambda e, u: fitted(weight, e) * e + u, residual, us)
            residual, mean, memory = compressed(p, params, state, axis)
            shared = jax.tree.map(jnp.add, shared, mean)
            moved = jax.tree.map(
                lambda x, e, y: (x + fitted(detach, e) * e) - wide(y),
                shared,
                residual,
                params,
            )
            if not keeps_residual:
                residual = ()
            elif period > 1:
                residual = jax.tree.map(lambda e: fitted(feedback, e) * e, residual)
            return moved, shared, residual, memory

        count = advance(state.count, period)
        operands = us, state.shared, state.residual, state.memory
        moved, shared, residual, memory = axis.cond_every(
            period, count, send, alone, *operands
        )
        return moved, state._replace(
            count=count, shared=shared, residual=residual, memory=memory
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ResidualState | DetachedState]:
        check_nobody_missing(extra_args, "error_feedback")
        attached = isinstance(state, ResidualState)
        if not attached:
            params = require_params(params, "error_feedback with detach or period")
        like = state.residual if attached else state.shared
        check_trees("updates", updates, like)
        if params is not None:
            check_trees("params", params, like)
        like = updates if params is None else params
        axis, us = WorkerAxis.bind(axis_name), jax.tree.map(wide, updates)
        if attached:
            moved, state = update_attached(us, state, like, axis)
        else:
            moved, state = update_detached(us, state, params, axis)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), moved, like), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _send_selected(
    codec: Selection, key: jax.Array, updates: Any, residual: Any, axis: WorkerAxis
) -> tuple[Any, Any]:
    """Returns the move and the new residual; only selected entries are averaged."""
    us, structure = jax.tree.flatten(updates)
    es, take = jax.tree.leaves(residual), codec.compress
    keys = codec.keys(key, len(us), axis)
    sent = [take(k, e) + take(k, u) for k, e, u in zip(keys, es, us, strict=True)]
    # Read before it is written: then the residual need not be copied.
    es, sent = lax.optimization_barrier((es, sent))
    means = axis.mean(sent)
    new = [codec.decompress(*each) for each in zip(keys, means, es, strict=True)]
    es = [
        jnp.where(codec.mask(k, e), jnp.zeros_like(e), e + u)
        for k, e, u in zip(keys, es, us, strict=True)
    ]
    return structure.unflatten(new), structure.unflatten(es)


def _send_detached(
    codec: Selection,
    key: jax.Array,
    updates: Any,
    shared: Any,
    params: Any,
    detach: float | jax.Array,
    axis: WorkerAxis,
) -> tuple[Any, Any]:
    """Returns the move and the shared model, with the residual in between.

    The residual is read and written only where something is sent. Elsewhere e grows by
    u: the parameters move by `detach * u`, and the shared model stays.
    """
    us, structure = jax.tree.flatten(updates)
    xs, ys, take = jax.tree.leaves(shared), jax.tree.leaves(params), codec.compress
    keys = codec.keys(key, len(us), axis)
    blocks = [take(k, x) for k, x in zip(keys, xs, strict=True)]
    sent = [
        (take(k, y) - x) / detach + take(k, u)
        for k, x, y, u in zip(keys, blocks, ys, us, strict=True)
    ]
    means = axis.mean(sent)
    blocks = [x + mean for x, mean in zip(blocks, means, strict=True)]
    xs = [codec.replace(*each) for each in zip(keys, xs, blocks, strict=True)]
    # The selected entries are read from the shared model: an index into the block
    # would keep XLA:CPU from vectorizing the pass.
    new = [
        jnp.where(codec.mask(k, x), x - y, detach * u)
        for k, x, y, u in zip(keys, xs, ys, us, strict=True)
    ]
    return structure.unflatten(new), structure.unflatten(xs)
