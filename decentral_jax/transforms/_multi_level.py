"""Multi-level averaging: often inside each hub, and less often between hubs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decentral_jax._exchange.axis import WorkerAxis
from decentral_jax._exchange.gossip import hub_average
from decentral_jax._exchange.numbers import advance
from decentral_jax._validation import (
    as_table,
    check_axis_name,
    check_int,
    check_nobody_missing,
    check_trees,
    require_params,
)
from decentral_jax.topology import AnyTopology, check_topology

__all__ = ["MultiLevelState", "multi_level"]


class MultiLevelState(NamedTuple):
    """State of `multi_level`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: ticks so far


def multi_level(
    hub_topology: AnyTopology,
    *,
    tau: int,
    q: int,
    shares: Sequence[Sequence[float]] | np.ndarray | None = None,
    hub_axis: str = "hub",
    worker_axis: str = "worker",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages inside hubs every `tau` ticks, and between hubs every `q * tau` ticks.

    With the incoming update :math:`u_i` of worker :math:`i` of hub :math:`d`, every
    tick performs :math:`x_i \leftarrow x_i + u_i`. Every :math:`\tau` ticks, each hub
    averages its workers' models,

    .. math:: z_d = \sum_{i \in d} v_i x_i, \qquad x_i \leftarrow z_d,

    where :math:`v_i` is the worker's share of its hub's data. Every :math:`q \tau`
    ticks, the hubs mix their averages before their workers receive them,

    .. math:: z_d \leftarrow \sum_j H_{dj} z_j.

    :math:`H` is the matrix of the hub topology, modified to preserve the mean weighted
    by the hubs' shares of the data (`dj.topology.reweighted`). All other ticks send
    nothing.

    Args:
      hub_topology: A doubly stochastic topology or schedule of the hubs.
      tau: :math:`\tau`, number of ticks between two averages inside hubs.
      q: Number of averages inside hubs per exchange between hubs.
      shares: Each worker's share of all data, with one row per hub; all shares sum to
        1. Rows may differ in length: a hub with fewer workers than the size of
        `worker_axis` is padded with workers of share 0, which do not count. None means
        equal shares.
      hub_axis: Name of the axis of hubs.
      worker_axis: Name of the axis of workers in a hub.

    Returns:
      The transformation. Place it last in a chain. With `b` bytes of parameters and
      `n` workers per hub, each worker sends `2 b (n - 1) / n` bytes inside its hub
      every `tau` ticks, and `max_degree * b / n` bytes to other hubs every `q * tau`
      ticks. The workers of a hub share its messages to other hubs: each worker sends
      one part.

    Raises:
      TypeError: If `tau` or `q` is not an integer, or if `hub_topology` is not a
        topology.
      ValueError: If `tau` or `q` is below 1, if shares are negative or do not sum to 1
        or are all 0 in a hub, if the hub topology is not connected or not doubly
        stochastic or its size is not that of the hub axis, or if `update` gets no
        `params`.

    References:
      Castiglia, Das & Patterson, "Multi-Level Local SGD: Distributed SGD for
      Heterogeneous Hierarchical Networks", ICLR 2021, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), dj.multi_level(dj.topology.ring(4), tau=1, q=2)
      ... )
      >>> params = jnp.arange(8.0).reshape(4, 2)
      >>> def step(p):
      ...     updates, _ = tx.update(jnp.zeros_like(p), tx.init(p), p)
      ...     return optax.apply_updates(p, updates)
      >>> jax.vmap(jax.vmap(step, axis_name="worker"), axis_name="hub")(params)[:, 0]
      Array([0.5, 2.5, 4.5, 6.5], dtype=float32)
    """
    check_topology(hub_topology)
    tau = check_int("tau", tau, minimum=1)
    q = check_int("q", q, minimum=1)
    check_axis_name((hub_axis, worker_axis))
    axes = (hub_axis, worker_axis)
    table = None if shares is None else _shares(shares, hub_topology)

    def init_fn(params: optax.Params) -> MultiLevelState:
        params = require_params(params, "multi_level")
        check_trees("params", params)
        return MultiLevelState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MultiLevelState]:
        check_nobody_missing(extra_args, "multi_level")
        params = require_params(params, "multi_level")
        check_trees("params", params)
        check_trees("updates", updates, params)
        # Counted from 1 here: tick tau is the first one that averages.
        count = advance(state.count, q * tau * hub_topology.period)
        axis = WorkerAxis.bind(axes)
        tick = axis.unvmap(count)

        # The update that takes parameters to the average inside the hub, mixed with
        # other hubs if there is a topology.
        def average(topology):
            def run(updates, params):
                adapted = optax.apply_updates(params, updates)
                round_number = tick // (q * tau) - 1
                mean = hub_average(adapted, topology, table, round_number, *axes)
                return optax.tree.sub(mean, params)

            return run

        # Every q-th average also mixes between hubs.
        def exchange(updates, params):
            both = average(hub_topology), average(None)
            return axis.cond_every(q, tick // tau, *both, updates, params)

        def wait(updates, params):
            return optax.tree.cast_like(updates, params)

        updates = axis.cond_every(tau, tick, exchange, wait, updates, params)
        return updates, MultiLevelState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shares(
    shares: Sequence[Sequence[float]] | np.ndarray, hub_topology: AnyTopology
) -> np.ndarray:
    """Checks shares, and returns them as an array `[hubs, workers per hub]`."""
    table = as_table("shares", shares, fill=0.0)
    hubs = hub_topology.num_workers
    if table.ndim != 2 or len(table) != hubs:
        raise ValueError(
            f"shares must have {hubs} rows, one per hub of {hub_topology!r}, got shape "
            f"{table.shape}: pass a list of rows with one entry per worker."
        )
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(
            f"shares must not be negative, got {table.min():.6g}: pass each worker's "
            "number of examples divided by the total number of examples."
        )
    if abs(table.sum() - 1) > 1e-6:
        raise ValueError(
            f"shares must sum to 1, got {table.sum():.6g}: divide them by their sum."
        )
    if (table.sum(1) == 0).any():
        raise ValueError(
            "shares must be positive for at least one worker per hub, got none in hub "
            f"{int(table.sum(1).argmin())}: leave the hub out."
        )
    return table
