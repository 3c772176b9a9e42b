"""Quasi-global momentum, computed from the displacement of the mixed model.

With heterogeneous data, momentum buffers of local gradients drift apart. The
displacement of the mixed model stays similar on all workers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._exchange.gossip import mix_differences
from decentral_jax._exchange.numbers import advance, fitted, wide, wide_zeros
from decentral_jax._validation import (
    check_axis_name,
    check_interval,
    check_learning_rate,
    check_nobody_missing,
    check_trees,
    require_params,
)
from decentral_jax.topology import AnyTopology, check_topology

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
    r"""Takes a decentralized SGD step with quasi-global momentum.

    .. math::
       x_i^+ = \sum_j W_{ij} \bigl(x_j - \gamma (\beta m_j + g_j)\bigr), \qquad
       m_i \leftarrow (1 - f) m_i + f \, (x_i - x_i^+) / \gamma

    Args:
      learning_rate: :math:`\gamma`, a number or schedule. In steps where it is 0,
        :math:`m` does not change.
      topology: A doubly stochastic topology or schedule.
      momentum: :math:`\beta`, in [0, 1).
      factor: :math:`f`, in [0, 1]. None means :math:`1 - \beta`, as in the paper.
      axis_name: Name of the worker axis.

    Returns:
      The transformation, which takes gradients. Use it alone, or after transformations
      of gradients. Each worker sends `max_degree` times the bytes of the parameters per
      step, and keeps one copy of the parameters, at least float32.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If a number is out of range, if the topology is not doubly stochastic
        or not connected, or if `update` gets no `params`.

    References:
      Lin et al., "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on
      Heterogeneous Data", ICML 2021, Algorithm 1 (QG-DSGDm).

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> tx = dj.quasi_global_momentum(0.1, dj.topology.ring(8))
      >>> step = lambda g, p: tx.update(g, tx.init(p), p)[0]
      >>> params = jnp.zeros(8)
      >>> updates = jax.vmap(step, axis_name="workers")(jnp.ones(8), params)
      >>> bool(jnp.allclose(updates, -0.1))
      True
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

        # The local step x - gamma (beta m + g), in at least float32.
        def adapt(x, m, g):
            return wide(x) - rate.astype(m.dtype) * (fitted(momentum, m) * m + wide(g))

        # Momentum from the displacement (x - x+) / gamma. If gamma is 0, m stays.
        def remember(m, x, mixed):
            gamma = rate.astype(m.dtype)
            displacement = (wide(x) - mixed) / jnp.where(gamma > 0, gamma, 1)
            return jnp.where(gamma > 0, m + fitted(share, m) * (displacement - m), m)

        adapted = jax.tree.map(adapt, params, state.momentum, updates)
        change = mix_differences(adapted, topology, axis_name, state.count, like=params)
        mixed = jax.tree.map(jnp.add, adapted, change)
        new = jax.tree.map(remember, state.momentum, params, mixed)
        updates = jax.tree.map(
            lambda m, x: (m - wide(x)).astype(x.dtype), mixed, params
        )
        return updates, QuasiGlobalState(advance(state.count, topology.period), new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
