"""Operating rates: each worker takes a step with its own probability.

This models slow workers in a system without synchronization.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import advance
from decentral_jax._validation import (
    as_table,
    check_axis_name,
    check_int,
    check_optimizer,
)

__all__ = ["OperatingRatesState", "operating_rates"]


class OperatingRatesState(NamedTuple):
    """State of `operating_rates`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: ticks so far
    inner: optax.OptState  # this worker's; it changes only in ticks with a step


def operating_rates(
    optimizer: optax.GradientTransformation,
    *,
    rates: jax.typing.ArrayLike | Sequence[Any],
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Lets worker :math:`i` take a step with probability :math:`p_i` in each tick.

    .. math::
       u_i \leftarrow \theta_i \, \mathrm{inner}(g_i), \qquad
       \theta_i \sim \mathrm{Bernoulli}(p_i)

    A worker that takes no step does not change its optimizer state either. This state
    includes momentum, and the counter of a learning rate schedule, which therefore
    counts the worker's own steps.

    Args:
      optimizer: Optimizer of each worker. It must not communicate.
      rates: :math:`p_i`, in (0, 1]: one number for all workers, or one number per
        worker in the shape of the axes. Rows may differ in length; see
        `dj.multi_level`.
      seed: Seed for the draws, which are computed alike on all workers.
      axis_name: Name of the worker axis, or a tuple of names.

    Returns:
      The transformation. It sends nothing.

    Raises:
      TypeError: If `optimizer` is not an optimizer, or if `rates` are not numbers.
      ValueError: If a rate is outside (0, 1], or if the shape of `rates` does not match
        the axes.

    References:
      Castiglia, Das & Patterson, "Multi-Level Local SGD: Distributed SGD for
      Heterogeneous Hierarchical Networks", ICLR 2021, equation (3).

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = dj.operating_rates(optax.sgd(1.0), rates=[1.0, 1e-6])
      >>> step = lambda g: tx.update(g, tx.init(g))[0]
      >>> jax.vmap(step, axis_name="workers")(jnp.array([1.0, 1.0]))
      Array([-1.,  0.], dtype=float32)
    """
    check_optimizer("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)
    # Rates injected by `optax.inject_hyperparams` are tracers and cannot be checked.
    table = rates if isinstance(rates, Tracer) else _rates(rates)
    seed = check_int("seed", seed, minimum=0)
    check_axis_name(axis_name)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)

    def init_fn(params: optax.Params) -> OperatingRatesState:
        return OperatingRatesState(jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OperatingRatesState]:
        sizes = tuple(WorkerAxis.bind(name).size for name in names)
        if table.ndim and table.shape != sizes:
            raise ValueError(
                f"rates must be one number, or one number per worker in the shape "
                f"{sizes} of axis_name={axis_name!r}, got shape {table.shape}."
            )
        index = tuple(WorkerAxis.bind(name).index for name in names)
        key = WorkerAxis.bind(axis_name).step_key(seed, state.count)
        # Each worker draws the numbers of all workers, and takes its own: this is
        # cheaper than one key per worker.
        drawn = jax.random.uniform(key, sizes, jnp.float32)[index]
        p = jnp.asarray(jnp.broadcast_to(table, sizes), jnp.float32)[index]
        operates = drawn < p
        new, inner_state = inner.update(updates, state.inner, params, **extra_args)
        # Without a step, the update is 0 and the inner state does not change.
        new = jax.tree.map(lambda u: jnp.where(operates, u, jnp.zeros_like(u)), new)
        inner_state = optax.tree.where(operates, inner_state, state.inner)
        count = advance(state.count)
        return new, OperatingRatesState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rates(rates: jax.typing.ArrayLike | Sequence[Any]) -> np.ndarray:
    """Checks rates, and returns them as an array."""
    table = as_table("rates", rates, fill=1.0)
    if not ((table > 0) & (table <= 1)).all():
        wrong = table[~((table > 0) & (table <= 1))].flat[0]
        raise ValueError(
            f"rates must lie in (0, 1], got {wrong:.6g}: pass the probability that a "
            "worker takes a step in a tick."
        )
    return table
