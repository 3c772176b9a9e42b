"""Error feedback: the error of a compressed update is added to the next update.

Each worker keeps the part of its updates that compression has removed, the residual,
and adds it to the update that it sends next. With detached error feedback, a worker
evaluates its gradients at a model that includes a fraction of its residual.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import (
    PyTree,
    advance,
    cast_like,
    fitted,
    is_narrow,
    wide,
    wide_copy,
    wide_zeros,
)
from decentral_jax._validation import (
    check_axis_name,
    check_choice,
    check_int,
    check_interval,
    check_nobody_missing,
    check_trees,
    require_params,
)
from decentral_jax.compression import Compressor, Selection
from decentral_jax.compression._base import check_compressor

__all__ = ["AveragedState", "DetachedState", "ResidualState", "error_feedback"]

Evaluate = Literal["shared", "averaged"]


class ResidualState(NamedTuple):
    """State of `error_feedback` if the parameters are the shared model."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    residual: optax.Params  # like params, at least float32: e_i, not sent yet
    memory: PyTree  # the compressor's state, equal on all workers

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        return params


class DetachedState(NamedTuple):
    """State of `error_feedback` if the parameters differ from the shared model."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Like params, at least float32: x, bitwise equal on all workers.
    shared: optax.Params
    # Like params, at least float32: e_i. () if e_i is (params - shared) / detach.
    residual: optax.Params
    detach: jax.Array | tuple[()]  # shape=(), float: lambda. () with a residual.
    memory: PyTree  # the compressor's state, equal on all workers

    # A checkpoint must have the same lambda: with another one, the same parameters
    # would imply another residual.
    constants = ("detach",)

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        return optax.tree.cast_like(self.shared, params)


class AveragedState(DetachedState):
    """A `DetachedState` that evaluates the shared model plus the residuals (DEF-A)."""

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the model to evaluate, before averaging over workers."""
        residual = self.residual
        if _is_empty(residual):
            residual = _between(self.shared, params, self.detach)
        return jax.tree.map(
            lambda x, e, y: (x + e).astype(y.dtype), self.shared, residual, params
        )


def _is_empty(part: PyTree) -> bool:
    """Returns whether a field of the state is `()`, which means that it is not kept."""
    return isinstance(part, tuple) and not part


def _between(shared: optax.Params, params: optax.Params, detach: Any) -> optax.Params:
    """Computes the residual from the shared model and the parameters."""
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
    r"""Compresses updates, and adds the error of the compression to the next update.

    With the incoming update :math:`u_i`, the residual :math:`e_i`, which is 0 at first,
    and the model :math:`x` that all workers share,

    .. math::
       p_i = \phi e_i + u_i, \qquad x \leftarrow x + \frac1n \sum_j C(p_j), \qquad
       e_i \leftarrow p_i - C(p_i),

    and the worker evaluates its next gradient at its parameters

    .. math:: y_i = x + \lambda e_i.

    The papers subtract updates. Here updates are added, as in optax, and :math:`e_i`
    has the sign of the updates. If `period` is above 1, workers send only every
    `period` steps. Between exchanges, each worker takes its own update,
    :math:`y_i \leftarrow y_i + u_i`. At an exchange, :math:`u_i` above stands for the
    sum of the worker's updates since the last exchange, and its parameters become
    :math:`x + \lambda e_i` again.

    - :math:`\lambda = 0`: EF-SGD;
    - :math:`0 < \lambda < 1`: detached error feedback, DEF;
    - :math:`\lambda = 1`: step-ahead error feedback.

    Place it after the optimizer, so that momentum comes before compression. With
    `detach=0` you can also place it first, to compress gradients.

    Args:
      compressor: :math:`C`, from `dj.compression`.
      detach: :math:`\lambda`, in [0, 1].
      period: :math:`p`, number of steps between two exchanges.
      feedback: :math:`\phi`, in (0, 1]. A value below 1 is partial error feedback.
      evaluate: Model that `dj.eval_params` returns: "shared" is :math:`x`; "averaged"
        is :math:`x + \frac1n \sum_i p_i`, which includes everything not yet sent, as in
        DEF-A.
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. It keeps one copy of the parameters, at least float32: the
      residual if `detach` is 0, and the shared model otherwise. It keeps both in these
      cases: `period` is above 1; or `detach` is not 0 and the parameters are in half
      precision, because the difference of two numbers in half precision is too coarse
      for a residual; or `detach` is an array, as under `optax.inject_hyperparams`. If
      `detach` is not 0, `feedback` is 1, parameters are float32 and the compressor is a
      selection such as `random_block`, a step reads and writes only the selected
      entries of the copy.

    Raises:
      TypeError: If `compressor` is not a compressor, or if any leaf is not
        floating-point.
      ValueError: If a number is out of range, if a tree is empty or trees do not match,
        or if `update` gets no `params` although `detach` is not 0.

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
    # An injected hyperparameter may change between steps, so it must not choose a code
    # path: assume the general case.
    injected = isinstance(detach, jax.Array)
    detached = injected or detach > 0
    weighs = isinstance(feedback, jax.Array) or feedback < 1
    # With full feedback, a selection takes a path that touches selected entries only.
    selection = None
    if isinstance(compressor, Selection) and not weighs:
        selection = compressor
    rule = _Rule(compressor, selection, detach, period, feedback, seed)

    def init_fn(params: optax.Params) -> ResidualState | DetachedState:
        params = require_params(params, "error_feedback")
        check_trees("params", params)
        count = jnp.zeros([], jnp.int32)
        memory = compressor.init(jax.tree.leaves(params))
        zeros, copies = (jax.tree.map(make, params) for make in (wide_zeros, wide_copy))
        # Keep as few copies as possible; see the docstring.
        if not detached and period == 1 and evaluate == "shared":
            return ResidualState(count, zeros, memory)
        kind = AveragedState if evaluate == "averaged" else DetachedState
        if injected or not detached or period > 1 or is_narrow(params):
            return kind(count, copies, zeros, (), memory)
        return kind(count, copies, (), jnp.asarray(detach, float), memory)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ResidualState | DetachedState]:
        check_nobody_missing(extra_args, "error_feedback")
        # Trees must match the copy in the state; the result has the parameters' dtypes.
        if isinstance(state, ResidualState):
            check_trees("updates", updates, state.residual)
            if params is not None:
                check_trees("params", params, state.residual)
            like = updates if params is None else params
        else:
            like = require_params(params, "error_feedback with detach or period")
            check_trees("updates", updates, state.shared)
            check_trees("params", like, state.shared)
        axis, us = WorkerAxis.bind(axis_name), jax.tree.map(wide, updates)
        if isinstance(state, ResidualState):
            moved, state = _update_attached(rule, us, state, like, axis)
        else:
            moved, state = _update_detached(rule, us, state, like, axis)
        return optax.tree.cast_like(moved, like), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rule(NamedTuple):
    """The arguments of `error_feedback`, checked."""

    compressor: Compressor
    selection: Selection | None  # the compressor, if selected entries suffice
    detach: float | jax.Array
    period: int
    feedback: float | jax.Array
    seed: int


def _compressed(
    rule: _Rule,
    p: optax.Updates,
    like: optax.Params,
    state: ResidualState | DetachedState,
    axis: WorkerAxis,
) -> tuple[optax.Updates, optax.Updates, PyTree]:
    """Returns the new residual p - C(p), the mean of C(p), and the memory."""
    # The residual also includes the error of the cast to the parameters' dtype.
    leaves, structure = jax.tree.flatten(cast_like(p, like))
    key = axis.step_key(rule.seed, state.count)
    own, mean, memory = rule.compressor.average(key, leaves, state.memory, axis)
    own, mean = (structure.unflatten(map(wide, x)) for x in (own, mean))
    return jax.tree.map(jnp.subtract, p, own), mean, memory


def _update_attached(
    rule: _Rule,
    us: optax.Updates,
    state: ResidualState,
    like: optax.Params,
    axis: WorkerAxis,
) -> tuple[optax.Updates, ResidualState]:
    """Performs a step with `detach` 0 and `period` 1."""
    if rule.selection is not None and not is_narrow(like):
        moved, residual = _send_selected(
            rule.selection,
            axis.step_key(rule.seed, state.count),
            us,
            state.residual,
            axis,
        )
        memory = state.memory
    else:
        p = jax.tree.map(
            lambda e, u: fitted(rule.feedback, e) * e + u, state.residual, us
        )
        residual, moved, memory = _compressed(rule, p, like, state, axis)
    return moved, ResidualState(advance(state.count), residual, memory)


def _update_detached(
    rule: _Rule,
    us: optax.Updates,
    state: DetachedState,
    params: optax.Params,
    axis: WorkerAxis,
) -> tuple[optax.Updates, DetachedState]:
    """Performs a step with a shared model in the state."""
    keeps_residual = not _is_empty(state.residual)

    def alone(us, shared, residual, memory):
        # `feedback` scales only the residual that remains after an exchange.
        return us, shared, jax.tree.map(jnp.add, residual, us), memory

    def send(us, shared, residual, memory):
        if rule.selection is not None and not keeps_residual:
            key = axis.step_key(rule.seed, state.count)
            moved, shared = _send_detached(
                rule.selection, key, us, shared, params, rule.detach, axis
            )
            return moved, shared, residual, memory
        # p = phi e + u, with the residual from the state or from the parameters.
        if not keeps_residual:
            residual = _between(shared, params, rule.detach)
        # With a period, the last exchange has already scaled the residual by phi.
        weight = rule.feedback if rule.period == 1 else 1.0
        p = jax.tree.map(lambda e, u: fitted(weight, e) * e + u, residual, us)
        residual, mean, memory = _compressed(rule, p, params, state, axis)
        # The parameters move to x + lambda e.
        shared = jax.tree.map(jnp.add, shared, mean)
        moved = jax.tree.map(
            lambda x, e, y: (x + fitted(rule.detach, e) * e) - wide(y),
            shared,
            residual,
            params,
        )
        if not keeps_residual:
            residual = ()
        elif rule.period > 1:
            residual = jax.tree.map(lambda e: fitted(rule.feedback, e) * e, residual)
        return moved, shared, residual, memory

    count = advance(state.count, rule.period)
    operands = us, state.shared, state.residual, state.memory
    moved, shared, residual, memory = axis.cond_every(
        rule.period, count, send, alone, *operands
    )
    return moved, state._replace(
        count=count, shared=shared, residual=residual, memory=memory
    )


def _send_selected(
    codec: Selection,
    key: jax.Array,
    updates: optax.Updates,
    residual: optax.Updates,
    axis: WorkerAxis,
) -> tuple[optax.Updates, optax.Updates]:
    """Performs a step of error feedback that averages only the selected entries.

    Returns:
      The change of the parameters, and the new residual.
    """
    us, structure = jax.tree.flatten(updates)
    es, take = jax.tree.leaves(residual), codec.compress
    keys = codec.keys(key, len(us), axis)
    sent = [take(k, e) + take(k, u) for k, e, u in zip(keys, es, us, strict=True)]
    # Read the residual before writing it, so that XLA does not have to copy it.
    es, sent = lax.optimization_barrier((es, sent))
    means = axis.mean(sent)
    new = [codec.decompress(*each) for each in zip(keys, means, es, strict=True)]
    # Selected entries were sent in full, so their residual is 0.
    es = [
        jnp.where(codec.mask(k, e), jnp.zeros_like(e), e + u)
        for k, e, u in zip(keys, es, us, strict=True)
    ]
    return structure.unflatten(new), structure.unflatten(es)


def _send_detached(
    codec: Selection,
    key: jax.Array,
    updates: optax.Updates,
    shared: optax.Params,
    params: optax.Params,
    detach: float | jax.Array,
    axis: WorkerAxis,
) -> tuple[optax.Updates, optax.Params]:
    """Performs a detached step whose residual is (params - shared) / detach.

    It reads and writes the residual only at selected entries. At all other entries, e
    grows by u: the parameters move by `detach * u`, and the shared model does not
    change.

    Returns:
      The change of the parameters, and the new shared model.
    """
    us, structure = jax.tree.flatten(updates)
    xs, ys, take = jax.tree.leaves(shared), jax.tree.leaves(params), codec.compress
    keys = codec.keys(key, len(us), axis)
    # At selected entries, send e + u with e = (y - x) / detach.
    blocks = [take(k, x) for k, x in zip(keys, xs, strict=True)]
    sent = [
        (take(k, y) - x) / detach + take(k, u)
        for k, x, y, u in zip(keys, blocks, ys, us, strict=True)
    ]
    # Add the mean to the selected entries of the shared model.
    means = axis.mean(sent)
    blocks = [x + mean for x, mean in zip(blocks, means, strict=True)]
    xs = [codec.replace(*each) for each in zip(keys, xs, blocks, strict=True)]
    # Read the selected entries from the shared model: indexing into the block would
    # keep XLA:CPU from vectorizing this pass.
    new = [
        jnp.where(codec.mask(k, x), x - y, detach * u)
        for k, x, y, u in zip(keys, xs, ys, us, strict=True)
    ]
    return structure.unflatten(new), structure.unflatten(xs)
