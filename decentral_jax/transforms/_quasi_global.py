"""Quasi-global momentum: momentum from where the mixed model went, not from gradients.

On differing data local momentum drifts apart; the way of the mixed model does not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._exchange.gossip import mix_differences
from decentral_jax._exchange.numbers import advance, fitted, wide, wide_zeros
from decentral_jax.topology import AnyTopology, check_topology
from decentral_jax.validation import (
    check_axis_name,
    check_interval,
    check_learning_rate,
    check_nobody_missing,
    check_trees,
    require_params,
)

__all__ = ["QuasiGlobalState", "quasi_global_momentum"]


class QuasiGlobalState(NamedTuple):
    """State of `quasi_global_momentum`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    momentum: optax.Params  # like params, at least float32: m


def quasi_global_momentum(
    learning_rate: optax.ScalarOrSchedule,
    topology: AnyTopology,
    *,
    momentum: float | jax.Array = 0.9,
    factor: float | jax.Array | None = None,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""A decentralized step with momentum :math:`\beta` along the mixed model's way.

    .. math::
       x_i^+ = \sum_j W_{ij} \bigl(x_j - \gamma (\beta m_j + g_j)\bigr), \qquad
       m_i \leftarrow (1 - f) m_i + f \, (x_i - x_i^+) / \gamma

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; where it is 0, :math:`m`
        stays.
      topology: A doubly stochastic topology or schedule.
      momentum: :math:`\beta`, in [0, 1).
      factor: :math:`f`, in [0, 1]; in the paper :math:`1 - \beta`.
      axis_name: The worker axis.

    Returns:
      The transformation, of gradients; it stands alone, or after what changes
      gradients. A worker sends `max_degree` times the parameters' bytes a step and
      keeps one copy of the parameters, at least float32.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If a number is out of range, the topology not doubly stochastic or not
        connected, or `update` gets no `params`.

    References:
      Lin et al., "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on
      Heterogeneous Data", ICML 2021, Algorithm 1 (QG-DSGDm).
    """
    check_learning_rate(learning_rate)
    check_topology(topology)
    momentum = check_interval("momentum", momentum, 0.0, 1.0, closed="left")
    if factor is None:
        factor = 1 - momentum
    share = check_interval("factor", factor, 0.0, 1.0)
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> QuasiGlobalState:
        params = require_params(params, "quasi_global_momentum")
        check_trees("params", params)
        zeros = jax.tree.map(wide_zeros, params)
        return QuasiGlobalState(jnp.zeros([], jnp.int32), zeros)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuasiGlobalState]:
        check_nobody_missing(extra_args, "quasi_global_momentum")
        params = require_params(params, "quasi_global_momentum")
        check_trees("params", params)
        check_trees("updates", updates, params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate)

        def adapt(x, m, g):
            return wide(x) - rate.astype(m.dtype) * (fitted(momentum, m) * m + wide(g))

        def remember(m, x, mixed):
            gamma = rate.astype(m.dtype)
            way = (wide(x) - mixed) / jnp.where(gamma > 0, gamma, 1)
            return jnp.where(gamma > 0, m + fitted(share, m) * (way - m), m)

        adapted = jax.tree.map(adapt, params, state.momentum, updates)
        change = mix_differences(adapted, topology, axis_name, state.count, like=params)
        mixed = jax.tree.map(jnp.add, adapted, change)
        new = jax.tree.map(remember, state.momentum, params, mixed)
        updates = jax.tree.map(
            lambda m, x: (m - wide(x)).astype(x.dtype), mixed, params
        )
        return updates, QuasiGlobalState(advance(state.count, topology.period), new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
