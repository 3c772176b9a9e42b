"""Push-sum: gossip on directed graphs without doubly stochastic weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._exchange.numbers import advance, weighted, widened
from decentral_jax._validation import (
    check_axis_name,
    check_nobody_missing,
    check_trees,
    require_params,
)
from decentral_jax.mixing import mix
from decentral_jax.topology import AnyTopology, check_topology

__all__ = ["PushSumState", "push_sum"]


class PushSumState(NamedTuple):
    """State of `push_sum`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: rounds so far
    weight: jax.Array  # shape=(), at least float32: w

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the numerator x = w z; its mean over workers is the model."""
        return jax.tree.map(lambda z: weighted(z, self.weight), params)


def push_sum(
    topology: AnyTopology, *, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    r"""Averages on directed graphs by push-sum.

    Each worker divides its model among its out-neighbors. Workers receive different
    total weights, so each worker also tracks its weight :math:`w` and divides by it.
    With the incoming update :math:`u`, and the column-stochastic matrix :math:`P_t`,

    .. math::
       x \leftarrow P_t (x + u), \qquad w \leftarrow P_t w, \qquad z = x / w,
       \qquad w_0 = 1.

    The parameters are :math:`z`, at which gradients are evaluated, and
    :math:`x = w z`. `dj.eval_params` returns the mean of the :math:`x`, which gossip
    preserves.

    Args:
      topology: A topology or schedule whose columns sum to one, for example
        `dj.topology.from_graph(directed_graph, weights="push")`.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it last in a chain. Each worker sends `max_degree` times
      the bytes of the parameters and of one scalar per step.

    Raises:
      TypeError: If `topology` does not come from `dj.topology`.
      ValueError: If `topology` is not column-stochastic or not connected, or if
        `update` gets no `params`.

    References:
      Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML
      2019, Algorithm 1; Kempe, Dobra & Gehrke, "Gossip-Based Computation of Aggregate
      Information", FOCS 2003.

    Example:
      >>> import decentral_jax as dj, networkx as nx, optax
      >>> graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
      >>> topology = dj.topology.from_graph(graph, weights="push")
      >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), dj.push_sum(topology))
    """
    check_topology(topology, doubly_stochastic=False)
    if not topology.is_column_stochastic:
        raise ValueError(
            f"topology must have columns that sum to one, got {topology!r}: use "
            'dj.topology.from_graph(graph, weights="push").'
        )
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> PushSumState:
        params = require_params(params, "push_sum")
        check_trees("params", params)
        dtype = widened(jnp.result_type(*jax.tree.leaves(params)))
        return PushSumState(jnp.zeros([], jnp.int32), jnp.ones([], dtype))

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PushSumState]:
        check_nobody_missing(extra_args, "push_sum")
        params = require_params(params, "push_sum")
        check_trees("params", params)
        check_trees("updates", updates, params)
        # x + u with x = w z.
        adapted = jax.tree.map(
            lambda z, u: weighted(z, state.weight) + u.astype(z.dtype), params, updates
        )
        x, weight = mix((adapted, state.weight), topology, axis_name, step=state.count)
        # The update that takes the parameters to z = x / w.
        updates = jax.tree.map(lambda x, z: weighted(x, 1 / weight) - z, x, params)
        return updates, PushSumState(advance(state.count, topology.period), weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
