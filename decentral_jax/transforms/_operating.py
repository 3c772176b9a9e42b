"""Workers that are not always at work: each takes a step with a probability of its own.

How slow workers look in a system that waits for nobody.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import advance
from decentral_jax.validation import (
    as_table,
    check_axis_name,
    check_int,
    check_optimizer,
)

__all__ = ["OperatingRatesState", "operating_rates"]


class OperatingRatesState(NamedTuple):
    """State of `operating_rates`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: ticks so far
    inner: optax.OptState  # the worker's own; moves only when it operates


def operating_rates(
    optimizer: optax.GradientTransformation,
    *,
    rates: Any,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Lets worker :math:`i` take its step with probability :math:`p_i` a tick.

    .. math::
       u_i \leftarrow \theta_i \, \mathrm{inner}(g_i), \qquad
       \theta_i \sim \mathrm{Bernoulli}(p_i)

    A worker that does not operate keeps its optimizer's state as well: momentum, and
    the counter of a learning rate's schedule, which thus counts the worker's own steps.

    Args:
      optimizer: The worker's optimizer; it must not communicate.
      rates: :math:`p_i`, in (0, 1]: a number for all; or one a worker, in the shape of
        the axes; rows may differ in length (see `dj.multi_level`).
      seed: Of the draws, which every worker can repeat.
      axis_name: The worker axis or axes.

    Returns:
      The transformation. It sends nothing.

    Raises:
      TypeError: If `optimizer` is no optimizer or `rates` no numbers.
      ValueError: If a rate is outside (0, 1], or there is not one a worker.

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
    # Injected rates are not known yet.
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
                f"rates must be one number, or one a worker in the shape {sizes} of "
                f"axis_name={axis_name!r}, got shape {table.shape}."
            )
        index = tuple(WorkerAxis.bind(name).index for name in names)
        key = WorkerAxis.bind(axis_name).step_key(seed, state.count)
        # All workers' draws by each: cheaper than a key for each worker.
        drawn = jax.random.uniform(key, sizes, jnp.float32)[index]
        p = jnp.asarray(jnp.broadcast_to(table, sizes), jnp.float32)[index]
        operates = drawn < p
        new, inner_state = inner.update(updates, state.inner, params, **extra_args)
        new = jax.tree.map(lambda u: jnp.where(operates, u, jnp.zeros_like(u)), new)
        inner_state = optax.tree.where(operates, inner_state, state.inner)
        count = advance(state.count)
        return new, OperatingRatesState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rates(rates: Any) -> np.ndarray:
    """Rates as a checked array."""
    table = as_table("rates", rates, fill=1.0)
    if not ((table > 0) & (table <= 1)).all():
        wrong = table[~((table > 0) & (table <= 1))].flat[0]
        raise ValueError(
            f"rates must lie in (0, 1], got {wrong:.6g}: pass the probability that a "
            "worker takes a step in a tick."
        )
    return table
