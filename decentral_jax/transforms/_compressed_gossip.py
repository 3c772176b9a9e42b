"""Gossip of compressed differences (CHOCO-SGD)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.gossip import mix_decoded
from decentral_jax._exchange.numbers import (
    advance,
    cast_like,
    fitted,
    weighted,
    wide,
    wide_zeros,
)
from decentral_jax.compression import Codec
from decentral_jax.compression._base import check_codec
from decentral_jax.mixing import mix
from decentral_jax.topology import Topology, check_topology
from decentral_jax.validation import (
    check_axis_name,
    check_int,
    check_interval,
    check_trees,
    require_params,
)

__all__ = ["CompressedGossipState", "compressed_gossip"]


class CompressedGossipState(NamedTuple):
    """State of `compressed_gossip`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Both like params, at least float32.
    public: optax.Params  # what the neighbors know of this worker
    away: optax.Params  # sum_j W_ij (public of worker j - public of this worker)


def compressed_gossip(
    topology: Topology,
    compressor: Codec,
    *,
    consensus_rate: float | jax.Array,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a local step, then gossips what has changed, compressed.

    With the incoming update :math:`u_i`, :math:`\hat x_i = s_i = 0` at first, and
    :math:`x_i' = x_i + u_i`

    .. math::
       q_i = C(x_i' - \hat x_i), \qquad \hat x_i \leftarrow \hat x_i + q_i, \qquad
       s_i \leftarrow s_i + \sum_j W_{ij} q_j, \qquad
       x_i \leftarrow x_i' + \zeta (s_i - \hat x_i),

    where :math:`s_i = \sum_j W_{ij} \hat x_j` without a copy of any neighbor's model.
    Kept is :math:`s_i - \hat x_i`, whose sum over workers stays 0.

    Args:
      topology: A static, doubly stochastic, connected topology, undirected or directed.
        With a time-varying one :math:`s_i` would need a copy of each neighbour's
        :math:`\hat x_j`, and every neighbour would have to hear every :math:`q_j`.
      compressor: :math:`C`, a codec: any of `dj.compression` except `low_rank`.
      consensus_rate: :math:`\zeta`, in (0, 1]: the smaller, the more is compressed.
      seed: Of the compressor's random numbers.
      axis_name: The worker axis.

    Returns:
      The transformation; place it last in a chain. A worker sends `max_degree` payloads
      a step and keeps two copies of the parameters, at least float32. Its `update`
      takes the keyword `active` of `dj.mix`: a worker sends only if it and all its
      neighbors are present, else they would not agree on :math:`\hat x_i`. All go on
      with the sums that they have, which needs a smaller `consensus_rate` the more are
      missing. Each message then carries one more number.

    Raises:
      TypeError: If an argument has a wrong type, such as a schedule of topologies.
      ValueError: If the topology lacks a property above, a number is out of range, a
        tree is empty or trees do not match, or `update` gets no `params`.

    References:
      Koloskova, Stich & Jaggi, "Decentralized Stochastic Optimization and Gossip
      Algorithms with Compressed Communication", ICML 2019, Algorithms 2 and 6.

    Example:
      >>> import decentral_jax as dj, optax
      >>> ring, top = dj.topology.ring(8), dj.compression.top_k(ratio=20)
      >>> gossip = dj.compressed_gossip(ring, top, consensus_rate=0.2)
      >>> tx = optax.chain(optax.sgd(0.1), gossip)
    """
    check_topology(topology, static=True)
    check_codec(compressor)
    rate = check_interval("consensus_rate", consensus_rate, 0.0, 1.0, closed="right")
    seed = check_int("seed", seed, minimum=0)
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> CompressedGossipState:
        params = require_params(params, "compressed_gossip")
        check_trees("params", params)
        public, away = (jax.tree.map(wide_zeros, params) for _ in range(2))
        return CompressedGossipState(jnp.zeros([], jnp.int32), public, away)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        *,
        active: jax.Array | bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressedGossipState]:
        del extra_args
        params = require_params(params, "compressed_gossip")
        check_trees("params", params, state.public)
        check_trees("updates", updates, state.public)
        half = jax.tree.map(lambda x, u: wide(x) + wide(u), params, updates)
        # What the cast of the differences loses is in the next ones.
        differences = jax.tree.map(jnp.subtract, half, state.public)
        differences = cast_like(differences, params)
        leaves, structure = jax.tree.flatten(differences)
        axis = WorkerAxis.bind(axis_name)
        key = axis.step_key(seed, state.count)
        payloads, decode = compressor.encode(key, leaves, axis)
        if active is not None:
            sends = _sends(active, topology, axis_name)
            if compressor.linear:
                payloads = _times(payloads, sends)
            else:
                payloads, decode = _marked(payloads, decode, sends)
        own = [wide(x) for x in decode(payloads)]

        def less_own(payloads):
            return [wide(x) - y for x, y in zip(decode(payloads), own, strict=True)]

        arrived = mix_decoded(payloads, less_own, topology, axis_name)
        public = jax.tree.map(jnp.add, state.public, structure.unflatten(own))
        away = jax.tree.map(jnp.add, state.away, structure.unflatten(arrived))
        updates = jax.tree.map(
            lambda x, s, p: (x - wide(p) + fitted(rate, s) * s).astype(p.dtype),
            half,
            away,
            params,
        )
        count = advance(state.count)
        return updates, CompressedGossipState(count, public, away)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sends(active, topology: Topology, axis_name: AxisName) -> jax.Array:
    """1 where the worker and all of its neighbours are present, else 0.

    Else some neighbours' copies of what is public would not follow.
    """
    check_topology(topology, symmetric=True)
    present = mix(jnp.asarray(active, jnp.float32), topology, axis_name)
    # Weights of a row add up to one, to rounding.
    return (active & (present > 1 - 1e-5)).astype(jnp.float32)


def _times(tree: Any, share: jax.Array) -> Any:
    return jax.tree.map(lambda x: weighted(x, share), tree)


def _marked(payloads: Any, decode: Callable, sends: jax.Array) -> tuple[Any, Callable]:
    """Payloads that say whether they count, and the way to arrays, 0 if not."""
    return (payloads, sends), lambda marked: _times(decode(marked[0]), marked[1])
