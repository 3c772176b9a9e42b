"""Error feedback: what compression keeps back is sent later.

Each worker adds what it could not send to what it sends next. Detached, a worker takes
its gradients part of the way towards where its unsent updates would lead.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax.collectives import (
    AxisName,
    advance,
    cast_like,
    every,
    fitted,
    is_narrow,
    wide,
    wide_copy,
    wide_zeros,
)
from decentral_jax.compression import Compressor, Selection, check_compressor
from decentral_jax.mixing import average
from decentral_jax.transforms.compressed import (
    average_compressed,
    leaf_keys,
    start_memory,
    step_key,
)
from decentral_jax.validation import (
    check_axis_name,
    check_choice,
    check_int,
    check_interval,
    check_nobody_missing,
    check_trees,
    require_params,
)

Evaluate = Literal["shared", "averaged"]


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    What follows from the parameters is not kept. All arrays are at least float32.
    """

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    shared: Any  # like params: the shared model x; () if the parameters are that
    residual: Any  # like params: what is yet to be sent; () if it lies between both
    memory: tuple  # what the compressor remembers, equal on all workers
    model: Any  # static: `_Model`, where to evaluate

    def evaluation_params(self, params):
        """The model to evaluate, before averaging over workers."""
        return self.model(self.shared, self.residual, params)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Model:
    """Which model `eval_params` finds."""

    detach: float | None  # None if both copies are kept, which do without it
    evaluate: str

    def __call__(self, shared, residual, params):
        if _none(shared):
            shared = jax.tree.map(wide, params)
        if self.evaluate == "averaged":
            if _none(residual):
                assert self.detach is not None
                residual = _between(shared, params, self.detach)
            shared = jax.tree.map(jnp.add, shared, residual)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), shared, params)


def _none(kept: Any) -> bool:
    """Whether a part of the state is not kept."""
    return isinstance(kept, tuple) and not kept


def _between(shared: Any, params: Any, detach: float | jax.Array) -> Any:
    """The residual that lies between the shared model and the parameters."""
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

    Place it after the base optimizer, so that momentum comes before compression. With
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

    def init_fn(params):
        params = require_params(params, "error_feedback")
        check_trees("params", params)
        both = period > 1 or injected or (detached and is_narrow(params))
        zeros, copies = (jax.tree.map(make, params) for make in (wide_zeros, wide_copy))
        return ErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            shared=copies if detached or both else (),
            residual=zeros if not detached or both else (),
            memory=start_memory(compressor, params),
            model=_Model(None if both else float(detach), evaluate),
        )

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        check_nobody_missing(extra_args, "error_feedback")
        if detached or period > 1:
            params = require_params(params, "error_feedback with detach or period")
        like = state.residual if _none(state.shared) else state.shared
        check_trees("updates", updates, like)
        if params is not None:
            check_trees("params", params, like)
        own_dtypes = updates if params is None else params
        us = jax.tree.map(wide, updates)

        def cast(tree):
            return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, own_dtypes)

        def alone(us, shared, residual, params):
            del params
            # With `feedback`, only what an exchange keeps back is weighed less.
            return cast(us), shared, jax.tree.map(jnp.add, residual, us), state.memory

        def send(us, shared, residual, params):
            key = step_key(seed, state.count, axis_name)
            one_copy = _none(shared) or _none(residual)
            selects = isinstance(compressor, Selection) and not weighs and one_copy
            if selects and not is_narrow(own_dtypes):
                return select(key, us, shared, residual, params)
            if _none(residual):
                residual = _between(shared, params, detach)
            # With a period, the last exchange has weighed what it kept back.
            weight = feedback if period == 1 else 1.0
            p = jax.tree.map(lambda e, u: fitted(weight, e) * e + u, residual, us)
            # The residual also takes what the cast to the parameters' dtype loses.
            own, mean, memory = average_compressed(
                *(compressor, key, cast_like(p, own_dtypes)),
                *(state.memory, axis_name),
            )
            own, mean = jax.tree.map(wide, (own, mean))
            residual = jax.tree.map(jnp.subtract, p, own)
            if _none(shared):
                return cast(mean), shared, residual, memory
            shared = jax.tree.map(jnp.add, shared, mean)
            moved = jax.tree.map(
                lambda x, e, y: (x + fitted(detach, e) * e) - wide(y),
                *(shared, residual, params),
            )
            if _none(state.residual):
                residual = ()
            elif period > 1:
                residual = jax.tree.map(lambda e: fitted(feedback, e) * e, residual)
            return cast(moved), shared, residual, memory

        def select(key, us, shared, residual, params):
            assert isinstance(compressor, Selection)
            us, structure = jax.tree.flatten(us)
            keys = leaf_keys(compressor, key, us, axis_name)
            kept = jax.tree.leaves(shared if detached else residual)
            if detached:
                ys = jax.tree.leaves(params)
                sent = _send_detached(compressor, keys, us, kept, ys, detach, axis_name)
            else:
                sent = _send_selected(compressor, keys, us, kept, axis_name)
            moved, kept = map(structure.unflatten, sent)
            if detached:
                return cast(moved), kept, residual, state.memory
            return cast(moved), shared, kept, state.memory

        count = advance(state.count, period)
        moved, shared, residual, memory = every(
            *(period, count, axis_name, send, alone),
            *(us, state.shared, state.residual, params),
        )
        return moved, ErrorFeedbackState(count, shared, residual, memory, state.model)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _send_selected(
    compressor: Selection, keys: list, us: list, es: list, axis_name: AxisName
) -> tuple[list, list]:
    """The updates and residuals of a step; only the selected entries are averaged."""
    take = compressor.compress
    sent = [take(k, e) + take(k, u) for k, e, u in zip(keys, es, us, strict=True)]
    # Read before it is written: then the residual need not be copied.
    es, sent = lax.optimization_barrier((es, sent))
    means = average(sent, axis_name)
    new = [
        compressor.decompress(k, mean, e)
        for k, mean, e in zip(keys, means, es, strict=True)
    ]
    es = [
        jnp.where(compressor.mask(k, e), jnp.zeros_like(e), e + u)
        for k, e, u in zip(keys, es, us, strict=True)
    ]
    return new, es


def _send_detached(
    compressor: Selection,
    keys: list,
    us: list,
    xs: list,
    ys: list,
    detach: float | jax.Array,
    axis_name: AxisName,
) -> tuple[list, list]:
    """The same with the residual between shared model and parameters.

    It is read and written only where something is sent. Elsewhere e grows by u: the
    parameters move by `detach * u`, and the shared model stays.
    """
    take = compressor.compress
    blocks = [take(k, x) for k, x in zip(keys, xs, strict=True)]
    sent = [
        (take(k, y) - x) / detach + take(k, u)
        for k, x, y, u in zip(keys, blocks, ys, us, strict=True)
    ]
    means = average(sent, axis_name)
    blocks = [x + mean for x, mean in zip(blocks, means, strict=True)]
    xs = [compressor.replace(*each) for each in zip(keys, xs, blocks, strict=True)]
    # The selected entries are read from the shared model: an index into the block
    # would keep XLA:CPU from vectorizing the pass.
    new = [
        jnp.where(compressor.mask(k, x), x - y, detach * u)
        for k, x, y, u in zip(keys, xs, ys, us, strict=True)
    ]
    return new, xs
