"""Error reset (CSER): local models bear the error of compression, and are reset.

What compression keeps back is applied at once, but only by the worker itself; from time
to time the difference between the workers that grows so is averaged, compressed too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import (
    advance,
    cast_like,
    is_narrow,
    wide,
    wide_copy,
    wide_zeros,
)
from decentral_jax.compression import Compressor
from decentral_jax.compression._base import check_compressor
from decentral_jax.validation import (
    check_axis_name,
    check_int,
    check_nobody_missing,
    check_trees,
    require_params,
)

__all__ = ["ErrorResetState", "error_reset"]


class ErrorResetState(NamedTuple):
    """State of `error_reset`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Like params, at least float32.
    shared: optax.Params  # x_i - e_i, bitwise equal on all workers
    error: Any  # e_i; () if it lies between the shared model and the parameters
    memory: tuple  # what the compressors remember, equal on all workers


def error_reset(
    compressor: Compressor,
    *,
    reset_compressor: Compressor | None = None,
    period: int = 8,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Synchronizes updates partially, and resets the workers' difference.

    With the incoming update :math:`u_i` and the worker's parameters :math:`x_i`

    .. math::
       x_i \leftarrow x_i + \frac1n \sum_j C(u_j) + r_i, \qquad
       e_i \leftarrow e_i + r_i, \qquad r_i = u_i - C(u_i),

    and every `period` steps

    .. math::
       x_i \leftarrow x_i + \frac1n \sum_j C'(e_j) - C'(e_i), \qquad
       e_i \leftarrow e_i - C'(e_i).

    :math:`x_i - e_i` is the same on all workers. It is kept, and the errors follow from
    it and the parameters, so that rounding does not part the workers. Of parameters in
    half precision the errors are kept as well: the difference of two numbers in half
    precision is too coarse, and small steps would be lost.

    Args:
      compressor: :math:`C`, for the updates, every step.
      reset_compressor: :math:`C'`, for the errors; `compressor` if None.
      period: Steps from one reset to the next.
      seed: Of the compressors' random numbers.
      axis_name: The worker axis.

    Returns:
      The transformation; place it after the base optimizer. It keeps one copy of the
      parameters, at least float32; two if they are in half precision.

    Raises:
      TypeError: If a compressor is none, or leaves are no floating-point arrays.
      ValueError: If `period` is below 1, a tree is empty, or trees do not match.

    References:
      Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
      Algorithm 2.
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
            """Returns what this worker keeps, the shared model and the memory."""
            leaves, structure = jax.tree.flatten(cast_like(tree, params))
            own, mean, memory = compressor.average(key, leaves, memory, axis)
            own, mean = structure.unflatten(own), structure.unflatten(mean)
            rest = jax.tree.map(lambda x, o: x - wide(o), tree, own)
            shared = jax.tree.map(lambda x, m: x + wide(m), shared, mean)
            return rest, shared, memory

        step = jax.tree.map(wide, updates)
        rest, shared, memory = synchronize(
            compressor, keys[0], step, state.shared, state.memory[0]
        )
        follows = not is_narrow(params)  # and so is not kept
        error = state.error
        if follows:
            error = jax.tree.map(jnp.subtract, params, state.shared)
        error = jax.tree.map(jnp.add, rest, error)

        def reset(error, shared, memory):
            return synchronize(reset_compressor, keys[1], error, shared, memory)

        def wait(error, shared, memory):
            return error, shared, memory

        count = advance(state.count, period)
        error, shared, reset_memory = axis.cond_every(
            period, count, reset, wait, error, shared, state.memory[1]
        )
        updates = jax.tree.map(
            lambda x, e, p: (x + e - wide(p)).astype(p.dtype),
            shared,
            error,
            params,
        )
        memories = (memory, reset_memory)
        kept = () if follows else error
        return updates, ErrorResetState(count, shared, kept, memories)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
