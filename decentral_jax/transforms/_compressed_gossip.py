"""Gossip of compressed differences (CHOCO-SGD)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.gossip import mix_decoded
from decentral_jax._exchange.numbers import (
    PyTree,
    advance,
    cast_like,
    fitted,
    weighted,
    wide,
    wide_zeros,
)
from decentral_jax._validation import (
    check_axis_name,
    check_int,
    check_interval,
    check_trees,
    require_params,
)
from decentral_jax.compression import Codec
from decentral_jax.compression._base import check_codec
from decentral_jax.mixing import mix
from decentral_jax.topology import Topology, check_topology

__all__ = ["CompressedGossipState", "compressed_gossip"]


class CompressedGossipState(NamedTuple):
    """State of `compressed_gossip`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # Both like params, at least float32.
    public: optax.Params  # this worker's public model, which its neighbors also know
    away: optax.Params  # sum_j W_ij (public of worker j - public of this worker)


def compressed_gossip(
    topology: Topology,
    compressor: Codec,
    *,
    consensus_rate: float | jax.Array,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a local step, then gossips compressed differences.

    With the incoming update :math:`u_i`, the initial values :math:`\hat x_i = s_i = 0`,
    and :math:`x_i' = x_i + u_i`,

    .. math::
       q_i = C(x_i' - \hat x_i), \qquad \hat x_i \leftarrow \hat x_i + q_i, \qquad
       s_i \leftarrow s_i + \sum_j W_{ij} q_j, \qquad
       x_i \leftarrow x_i' + \zeta (s_i - \hat x_i),

    where :math:`\hat x_i` is the public model of worker :math:`i`, and
    :math:`s_i = \sum_j W_{ij} \hat x_j` is computed without a copy of any neighbor's
    model. The state holds :math:`s_i - \hat x_i`, whose sum over workers stays 0.

    Args:
      topology: A static, doubly stochastic, connected topology, undirected or directed.
        With a time-varying topology, :math:`s_i` would need a copy of the
        :math:`\hat x_j` of each neighbor, and every neighbor would have to receive
        every :math:`q_j`.
      compressor: :math:`C`, a codec: any of `dj.compression` except `low_rank`.
      consensus_rate: :math:`\zeta`, in (0, 1]. Stronger compression requires a smaller
        rate.
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it last in a chain. Each worker sends `max_degree`
      payloads per step, and keeps two copies of the parameters, at least float32. Its
      `update` accepts the keyword argument `active` of `dj.mix`. A worker then sends
      only if it and all of its neighbors are present, so that all neighbors agree on
      :math:`\hat x_i`; all workers continue with the sums that they have. The more
      workers are missing, the smaller `consensus_rate` has to be. With `active`, each
      message carries one extra scalar.

    Raises:
      TypeError: If an argument has a wrong type, such as a schedule of topologies.
      ValueError: If the topology lacks a required property, if a number is out of
        range, if a tree is empty or trees do not match, or if `update` gets no
        `params`.

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
        # The local step x', in at least float32.
        half = jax.tree.map(lambda x, u: wide(x) + wide(u), params, updates)
        # Compress x' minus the public model. A later difference includes whatever the
        # cast loses.
        differences = jax.tree.map(jnp.subtract, half, state.public)
        differences = cast_like(differences, params)
        leaves, structure = jax.tree.flatten(differences)
        axis = WorkerAxis.bind(axis_name)
        key = axis.step_key(seed, state.count)
        payloads, decode = compressor.encode(key, leaves, axis)
        # A worker that does not send contributes q_i = 0.
        if active is not None:
            sends = _sends(active, topology, axis_name)
            if compressor.linear:
                payloads = _times(payloads, sends)
            else:
                payloads, decode = _marked(payloads, decode, sends)
        own = [wide(x) for x in decode(payloads)]

        # Sum q_j - q_i instead of q_j: the sum over all workers then stays 0.
        def subtract_own(payloads):
            return [wide(x) - y for x, y in zip(decode(payloads), own, strict=True)]

        arrived = mix_decoded(payloads, subtract_own, topology, axis_name)
        public = jax.tree.map(jnp.add, state.public, structure.unflatten(own))
        away = jax.tree.map(jnp.add, state.away, structure.unflatten(arrived))
        # x' + zeta (s - x hat), as an update of the parameters.
        updates = jax.tree.map(
            lambda x, s, p: (x - wide(p) + fitted(rate, s) * s).astype(p.dtype),
            half,
            away,
            params,
        )
        count = advance(state.count)
        return updates, CompressedGossipState(count, public, away)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sends(
    active: jax.Array | bool, topology: Topology, axis_name: AxisName
) -> jax.Array:
    """Returns 1 if this worker and all of its neighbors are present, and 0 if not.

    If a worker sent while a neighbor is missing, that neighbor would miss the change of
    the public model.
    """
    check_topology(topology, symmetric=True)
    present = mix(jnp.asarray(active, jnp.float32), topology, axis_name)
    # The weights of a row sum to one, up to rounding.
    return (active & (present > 1 - 1e-5)).astype(jnp.float32)


def _times(tree: PyTree, share: jax.Array) -> PyTree:
    """Multiplies a tree by a scalar; 0 times inf or NaN is 0."""
    return jax.tree.map(lambda x: weighted(x, share), tree)


def _marked(
    payloads: PyTree, decode: Callable[[Any], PyTree], sends: jax.Array
) -> tuple[PyTree, Callable[[Any], PyTree]]:
    """Adds to payloads a scalar that tells whether they count.

    Returns:
      The marked payloads, and a function that decodes them, or returns zeros if they do
      not count.
    """
    return (payloads, sends), lambda marked: _times(decode(marked[0]), marked[1])
