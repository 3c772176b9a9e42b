"""Error feedback: what compression keeps back is sent later.

Each worker adds what it could not send to what it sends next. Detached, a worker takes
its gradients part of the way towards where its unsent updates would lead.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax.collectives import AxisName, advance, every
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

EVALUATED = ("shared", "averaged")


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    With `detach` 0 the parameters are the shared model and the residual is kept; else
    the shared model is kept, and the residual is what lies between both.
    """

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    kept: optax.Params  # like params: shared model x, or residual e if detach is 0
    memory: tuple  # what the compressor remembers, equal on all workers
    model: Any  # static: `_Model`, where to evaluate

    def evaluation_params(self, params):
        """The model to evaluate, before averaging over workers."""
        return self.model(self.kept, params)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Model:
    """Which model `eval_params` finds."""

    detach: float
    evaluate: str

    def __call__(self, kept, params):
        if self.evaluate == "shared":
            return params if self.detach == 0 else kept
        if self.detach == 0:
            return jax.tree.map(jnp.add, params, kept)
        return jax.tree.map(lambda x, y: x + (y - x) / self.detach, kept, params)


def error_feedback(
    compressor: Compressor,
    detach: float = 0.0,
    period: int = 1,
    feedback: float = 1.0,
    evaluate: str = "shared",
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
    :math:`e_i` has their sign.) With `period` :math:`p > 1` only every p-th step sends;
    the others collect: :math:`C(p_i) = 0`.

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
        :math:`x + \frac1n \sum_i e_i`, as in DEF-A.
      seed: Of the compressor's random numbers.
      axis_name: The worker axis.

    Returns:
      The transformation. It keeps one copy of the parameters; with a selecting
      compressor such as `random_block` and `feedback` 1 a step reads and writes only
      the selected entries of it where `detach` is not 0.

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
    check_interval("detach", detach, 0.0, 1.0)
    period = check_int("period", period, minimum=1)
    check_interval("feedback", feedback, 0.0, 1.0, closed="right")
    check_choice("evaluate", evaluate, EVALUATED)
    seed = check_int("seed", seed, minimum=0)
    check_axis_name(axis_name)
    detached = detach > 0
    model = _Model(float(detach), evaluate)

    def init_fn(params):
        params = require_params(params, "error_feedback")
        check_trees("params", params)
        kept = jnp.copy if detached else jnp.zeros_like
        return ErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            kept=jax.tree.map(kept, params),
            memory=start_memory(compressor, params),
            model=model,
        )

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        check_nobody_missing(extra_args, "error_feedback")
        if detached:
            params = require_params(params, "error_feedback with detach > 0")
        check_trees("updates", updates, state.kept)

        def plus_residual(e, u):
            return (e if feedback == 1 else feedback * e) + u.astype(e.dtype)

        def collected(updates, state, params):
            """What is to be sent, p."""
            residual = state.kept
            if detached:
                residual = jax.tree.map(
                    lambda x, y: (y - x) / detach, state.kept, params
                )
            return jax.tree.map(plus_residual, residual, updates)

        def towards(shared, residual, params):
            """Updates that lead to the next gradient's point."""
            return jax.tree.map(
                lambda x, e, y: (x + detach * e) - y, shared, residual, params
            )

        def collect(updates, state, params):
            p = collected(updates, state, params)
            if not detached:
                return optax.tree.zeros_like(p), p, state.memory
            return towards(state.kept, p, params), state.kept, state.memory

        def send(updates, state, params):
            key = step_key(seed, state.count, axis_name)
            if isinstance(compressor, Selection) and feedback == 1:
                us, structure = jax.tree.flatten(updates)
                kept = jax.tree.leaves(state.kept)
                us = [u.astype(k.dtype) for u, k in zip(us, kept, strict=True)]
                keys = leaf_keys(compressor, key, us, axis_name)
                if detached:
                    ys = jax.tree.leaves(params)
                    sent = _send_detached(
                        compressor, keys, us, kept, ys, detach, axis_name
                    )
                else:
                    sent = _send_selected(compressor, keys, us, kept, axis_name)
                return *map(structure.unflatten, sent), state.memory
            p = collected(updates, state, params)
            own, mean, memory = average_compressed(
                compressor, key, p, state.memory, axis_name
            )
            residual = jax.tree.map(jnp.subtract, p, own)
            if not detached:
                return mean, residual, memory
            shared = jax.tree.map(jnp.add, state.kept, mean)
            return towards(shared, residual, params), shared, memory

        count = advance(state.count, period)
        updates, kept, memory = every(
            period, count, axis_name, send, collect, updates, state, params
        )
        return updates, ErrorFeedbackState(count, kept, memory, model)

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
    detach: float,
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
