"""Error reset (CSER): workers apply compression errors locally, and average them later.

Each worker immediately applies the part of its update that compression has removed, but
only to its own model. The resulting differences between workers are averaged
periodically, with compression, too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import (
    PyTree,
    advance,
    cast_like,
    is_narrow,
    wide,
    wide_copy,
    wide_zeros,
)
from decentral_jax._validation import (
    check_axis_name,
    check_int,
    check_nobody_missing,
    check_trees,
    require_params,
)
from decentral_jax.compression import Compressor
from decentral_jax.compression._base import check_compressor

__all__ = ["ErrorResetState", "error_reset"]


class ErrorResetState(NamedTuple):
    """State of `error_reset`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Like params, at least float32.
    shared: optax.Params  # x_i - e_i, bitwise equal on all workers
    error: optax.Params  # e_i; () if it is computed as params - shared
    memory: tuple[PyTree, PyTree]  # states of both compressors, equal on all workers


def error_reset(
    compressor: Compressor,
    *,
    reset_compressor: Compressor | None = None,
    period: int = 8,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages compressed updates, and periodically resets the compression errors.

    With the incoming update :math:`u_i`, and the parameters :math:`x_i` of the worker,

    .. math::
       x_i \leftarrow x_i + \frac1n \sum_j C(u_j) + r_i, \qquad
       e_i \leftarrow e_i + r_i, \qquad r_i = u_i - C(u_i),

    and every `period` steps

    .. math::
       x_i \leftarrow x_i + \frac1n \sum_j C'(e_j) - C'(e_i), \qquad
       e_i \leftarrow e_i - C'(e_i).

    The shared model :math:`x_i - e_i` is equal on all workers. The state holds it, and
    the errors are computed from it and from the parameters, so that rounding does not
    drive the workers apart. For parameters in half precision, the state also holds the
    errors: the difference of two numbers in half precision is too coarse, and small
    steps would be lost.

    Args:
      compressor: :math:`C`, for the updates in every step.
      reset_compressor: :math:`C'`, for the errors. None means `compressor`.
      period: Number of steps between two resets.
      seed: Seed for the compressors' random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it after the base optimizer. It keeps one copy of the
      parameters, at least float32, or two copies if they are in half precision.

    Raises:
      TypeError: If an argument is not a compressor, or if any leaf is not
        floating-point.
      ValueError: If `period` is below 1, if a tree is empty or trees do not match, or
        if `update` gets no `params`.

    References:
      Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
      Algorithm 2.

    Example:
      >>> import decentral_jax as dj, optax
      >>> block = dj.compression.random_block(8)
      >>> tx = optax.chain(optax.sgd(0.1), dj.error_reset(block, period=4))
    """
    check_compressor(compressor)
    if reset_compressor is None:
        reset_compressor = compressor
    check_compressor(reset_compressor, "reset_compressor")
    period = check_int("period", period, minimum=1)
    seed = check_int("seed", seed, minimum=0)
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> ErrorResetState:
        params = require_params(params, "error_reset")
        check_trees("params", params)
        return ErrorResetState(
            count=jnp.zeros([], jnp.int32),
            shared=jax.tree.map(wide_copy, params),
            error=(jax.tree.map(wide_zeros, params) if is_narrow(params) else ()),
            memory=(
                compressor.init(jax.tree.leaves(params)),
                reset_compressor.init(jax.tree.leaves(params)),
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorResetState]:
        check_nobody_missing(extra_args, "error_reset")
        params = require_params(params, "error_reset")
        check_trees("params", params, state.shared)
        check_trees("updates", updates, state.shared)
        axis = WorkerAxis.bind(axis_name)
        keys = jax.random.split(axis.step_key(seed, state.count))

        def synchronize(compressor, key, tree, shared, memory):
            """Averages C(tree) into the shared model, and returns tree - C(tree)."""
            leaves, structure = jax.tree.flatten(cast_like(tree, params))
            own, mean, memory = compressor.average(key, leaves, memory, axis)
            own, mean = structure.unflatten(own), structure.unflatten(mean)
            rest = jax.tree.map(lambda x, o: x - wide(o), tree, own)
            shared = jax.tree.map(lambda x, m: x + wide(m), shared, mean)
            return rest, shared, memory

        # Every step: average the compressed updates, and add the rest to the error.
        step = jax.tree.map(wide, updates)
        rest, shared, memory = synchronize(
            compressor, keys[0], step, state.shared, state.memory[0]
        )
        # In float32 the error is the difference of two models, and is not kept.
        is_difference = not is_narrow(params)
        error = state.error
        if is_difference:
            error = jax.tree.map(jnp.subtract, params, state.shared)
        error = jax.tree.map(jnp.add, rest, error)

        # Every `period` steps: average the compressed errors, too.
        def reset(error, shared, memory):
            return synchronize(reset_compressor, keys[1], error, shared, memory)

        def wait(error, shared, memory):
            return error, shared, memory

        count = advance(state.count, period)
        error, shared, reset_memory = axis.cond_every(
            period, count, reset, wait, error, shared, state.memory[1]
        )
        # The parameters are the shared model plus the error.
        updates = jax.tree.map(
            lambda x, e, p: (x + e - wide(p)).astype(p.dtype),
            shared,
            error,
            params,
        )
        memories = (memory, reset_memory)
        kept = () if is_difference else error
        return updates, ErrorResetState(count, shared, kept, memories)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
