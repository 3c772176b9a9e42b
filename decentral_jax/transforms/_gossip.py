"""Gossip of parameters: the exchange of decentralized SGD as a transformation.

Place these transformations after any optimizer. They change its update so that it also
averages the parameters with those of the neighbors.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._exchange.gossip import mix_differences
from decentral_jax._exchange.numbers import advance, wide, wide_zeros
from decentral_jax._validation import (
    check_arrays,
    check_axis_name,
    check_choice,
    check_dtypes,
    check_nobody_missing,
    require_params,
)
from decentral_jax.mixing import mix
from decentral_jax.topology import AnyTopology, Topology, check_topology

__all__ = ["ExactDiffusionState", "GossipState", "exact_diffusion", "gossip"]

Order = Literal["adapt_then_combine", "combine_then_adapt"]


class GossipState(NamedTuple):
    """State of `gossip`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: rounds so far


def gossip(
    topology: AnyTopology,
    *,
    order: Order = "combine_then_adapt",
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the incoming update, and averages parameters with those of the neighbors.

    With the incoming update :math:`u_i` and the mixing matrix :math:`W_t`,

    - "adapt_then_combine": :math:`x_i \leftarrow \sum_j W_{ij} (x_j + u_j)`,
    - "combine_then_adapt": :math:`x_i \leftarrow \sum_j W_{ij} x_j + u_i`. The exchange
      does not depend on the gradient, so it can overlap with the backward pass.

    Args:
      topology: A doubly stochastic topology or schedule. Step `t` uses round `t` of a
        schedule.
      order: "adapt_then_combine" or "combine_then_adapt".
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it last in a chain. Each worker sends `max_degree` times
      the bytes of the parameters per step, or performs one all-reduce on a complete
      graph. Its `update` accepts the keyword argument `active` of `dj.mix`; a missing
      worker takes its own update.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If `topology` is not doubly stochastic or not connected, if `order` is
        unknown, or if `update` gets no `params`.

    References:
      Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?",
      NeurIPS 2017, Algorithm 1 (combine-then-adapt); Sayed, "Adaptation, Learning, and
      Optimization over Networks", 2014, sections 7.2-7.3 (both orders).

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), dj.gossip(dj.topology.ring(8)))
      >>> params = jnp.arange(8.0)
      >>> def step(p):
      ...     updates, _ = tx.update(jnp.zeros_like(p), tx.init(p), p)
      ...     return optax.apply_updates(p, updates)
      >>> jax.vmap(step, axis_name="workers")(params)[1:7]
      Array([1., 2., 3., 4., 5., 6.], dtype=float32)
    """
    check_topology(topology)
    check_choice("order", order, get_args(Order))
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> GossipState:
        check_arrays("params", params)
        return GossipState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state,
        params=None,
        *,
        active: jax.Array | bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GossipState]:
        del extra_args
        params = require_params(params, "gossip")
        check_dtypes("params", params, jnp.inexact)
        check_arrays("updates", updates)
        if order == "adapt_then_combine":
            adapted = optax.apply_updates(params, updates)
            mixed = mix(adapted, topology, axis_name, step=state.count, active=active)
            updates = optax.tree.sub(mixed, params)
        else:
            mixed = mix(params, topology, axis_name, step=state.count, active=active)
            updates = jax.tree.map(
                lambda m, p, u: (m - p) + u.astype(p.dtype), mixed, params, updates
            )
        return updates, GossipState(advance(state.count, topology.period))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ExactDiffusionState(NamedTuple):
    """State of `exact_diffusion`."""

    correction: optax.Params  # like params, at least float32: c, of mean 0


def exact_diffusion(
    topology: Topology,
    *,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Performs exact diffusion (D2), gossip without bias from heterogeneous data.

    Plain gossip with a constant step size has a biased fixed point if the workers'
    gradients differ; exact diffusion does not. With the incoming update :math:`u_t`,

    .. math::
       \psi_{t+1} = x_t + u_t, \qquad
       x_{t+1} = W (\psi_{t+1} + x_t - \psi_t), \qquad \psi_0 = x_0,

    which for :math:`u_t = -\gamma g_t` is D2:
    :math:`x_{t+1} = W (2 x_t - x_{t-1} - \gamma (g_t - g_{t-1}))`. The implementation
    uses the correction :math:`c_t = x_t - \psi_t`,

    .. math::
       c_{t+1} = c_t + (W - I) (x_t + u_t + c_t), \qquad
       x_{t+1} = x_t + u_t + c_{t+1}, \qquad c_0 = 0,

    whose sum over workers stays 0, because each pair of workers exchanges opposite
    amounts. In the first form, rounding errors would accumulate in the mean of the
    models.

    Args:
      topology: A static, symmetric, doubly stochastic topology whose smallest
        eigenvalue exceeds -1/3.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it last in a chain. Each worker sends `max_degree` times
      the bytes of the parameters per step, and keeps one copy of the parameters, at
      least float32.

    Raises:
      TypeError: If the topology is a schedule.
      ValueError: If `topology` lacks a required property, or if `update` gets no
        `params`.

    References:
      Tang et al., "D2: Decentralized Training over Decentralized Data", ICML 2018,
      Algorithm 1; Yuan et al., "Exact Diffusion for Distributed Optimization and
      Learning", IEEE TSP 2019, equations (63)-(65).

    Example:
      >>> import decentral_jax as dj, optax
      >>> topology = dj.topology.ring(8).lazy(0.75)
      >>> tx = optax.chain(optax.sgd(0.1), dj.exact_diffusion(topology))
    """
    check_topology(topology, symmetric=True, static=True)
    check_axis_name(axis_name)
    lowest = float(np.real(topology.eigenvalues).min())
    if lowest <= -1 / 3 + 1e-9:
        raise ValueError(
            "topology must have a smallest eigenvalue above -1/3 (D2 diverges "
            f"otherwise), got {lowest:.4f} for {topology!r}: give each worker more "
            "weight for its own model, such as topology.lazy(0.75)."
        )

    def init_fn(params: optax.Params) -> ExactDiffusionState:
        params = require_params(params, "exact_diffusion")
        return ExactDiffusionState(jax.tree.map(wide_zeros, params))

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ExactDiffusionState]:
        check_nobody_missing(extra_args, "exact_diffusion")
        params = require_params(params, "exact_diffusion")
        check_dtypes("params", params, jnp.inexact)
        check_arrays("updates", updates)
        # x + u + c, in at least float32.
        corrected = jax.tree.map(
            lambda x, u, c: wide(x) + (wide(u) + c), params, updates, state.correction
        )
        change = mix_differences(corrected, topology, axis_name, like=params)
        correction = jax.tree.map(jnp.add, state.correction, change)
        # The parameters move by u plus the new correction.
        updates = jax.tree.map(
            lambda u, c, x: (wide(u) + c).astype(x.dtype), updates, correction, params
        )
        return updates, ExactDiffusionState(correction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
