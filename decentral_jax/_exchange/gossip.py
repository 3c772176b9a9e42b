"""Gossip rounds: what `dj.mix` and the transformations are built on.

Topologies (`decentral_jax.topology`) meet the worker axis here and nowhere else. Small
leaves travel packed: one message carries a bucket of leaves, not one leaf.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import cast_like, weighted, widened
from decentral_jax._exchange.packing import (
    ALL_REDUCE_BUCKET_BYTES,
    mapped_packed,
    packed,
)
from decentral_jax._exchange.weighing import DENSE_FROM
from decentral_jax.topology import AnyTopology, Topology, check_topology, reweighted
from decentral_jax.validation import check_dtypes


def mix_all(
    tree: Any,
    topology: AnyTopology,
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None = None,
) -> Any:
    """One gossip round in which all workers take part; `dj.mix` without its checks."""
    if isinstance(topology, Topology) and topology.averages_exactly:
        return axis.mean(tree)
    return gossip_round(tree, matrices_of(topology), axis, step)


def gossip_round(
    tree: Any,
    matrices: Sequence[np.ndarray],
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Any:
    """One gossip round of arrays, or of what `decode` turns into arrays."""
    arrays, unpack = packed(tree, axis)
    plans = axis.plan(matrices)
    received = axis.send(plans, arrays, step)
    if decode is None:
        return unpack(axis.weigh(plans, arrays, received, step))
    return axis.weigh(plans, arrays, received, step, lambda a: decode(unpack(a)))


def mix_decoded(
    tree: Any,
    decode: Callable[[Any], Any],
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    step: jax.Array | int | None = None,
) -> Any:
    r"""One gossip round of arrays that travel as something else.

    Args:
      tree: What travels in place of this worker's arrays, of any dtypes.
      decode: Turns it into the arrays.
      topology: The mixing matrix, or a schedule of them.
      axis_name: The worker axis.
      step: The round of a schedule, an integer equal on all workers.

    Returns:
      :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`.
    """
    axis = bind(axis_name, topology)
    return gossip_round(tree, matrices_of(topology), axis, step, decode)


def mix_differences(
    tree: Any,
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    step: jax.Array | int | None = None,
    active: jax.Array | bool | None = None,
    like: Any = None,
) -> Any:
    r"""What one gossip round adds to a tree: :math:`\sum_j W_{ij} (x_j - x_i)`.

    For states that are integrated over many steps. On a symmetric topology what a
    worker receives from another one is exactly what it gives, so that rounding does not
    move the sum over all workers, whatever the dtype in which the tree travels.

    Args:
      tree: This worker's pytree of floating-point arrays, at least float32.
      topology: As in `mix`.
      axis_name: The worker axis.
      step: As in `mix`.
      active: As in `mix`.
      like: A tree with the dtypes in which the arrays travel; their own if None.

    Returns:
      The differences, of the dtypes of `tree`.
    """
    axis = bind(axis_name, topology)
    many = axis.num_devices == 1 and topology.max_degree > DENSE_FROM
    if many and active is None:
        plans = axis.plan(matrices_of(topology))
        return jax.tree.map(lambda x: axis.dense_differences(plans, x, step), tree)
    if many or (isinstance(topology, Topology) and topology.averages_exactly):
        if active is None:
            mixed = mix_all(tree, topology, axis, step)
        else:
            mixed = mix_present(tree, topology, axis, step, active)
        return jax.tree.map(jnp.subtract, mixed, tree)
    if like is None:
        like = tree
    sent = cast_like(tree, like)
    share = None
    if active is not None:
        active = _check_active(topology, active)
        share = active.astype(jax.tree.leaves(sent)[0].dtype)

    def less_own(payload):
        others, share = payload

        def less(other, own, x):
            away = other.astype(x.dtype) - own.astype(x.dtype)
            # Where and not times: what a missing worker holds may be infinite.
            return away if share is None else jnp.where(share > 0, away, 0)

        return jax.tree.map(less, others, sent, tree)

    change = mix_decoded((sent, share), less_own, topology, axis_name, step)
    if active is None:
        return change
    return jax.tree.map(lambda c: jnp.where(active, c, jnp.zeros_like(c)), change)


def mix_present(
    tree: Any,
    topology: AnyTopology,
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None,
    active: Any,
) -> Any:
    """`dj.mix` where only some workers take part."""
    active = _check_active(topology, active)
    check_dtypes("tree", tree, jnp.inexact)
    dtypes = [widened(jnp.asarray(x).dtype) for x in jax.tree.leaves(tree)]
    share = active.astype(functools.reduce(jnp.promote_types, dtypes))
    shown = jax.tree.map(lambda x: weighted(x, share), tree)
    mixed, present = mix_all((shown, share), topology, axis, step)

    def own(m, x):
        y = m.astype(share.dtype) + (1 - present) * x.astype(share.dtype)
        return jnp.where(active, y.astype(x.dtype), x)

    return jax.tree.map(own, mixed, tree)


def _check_active(topology: AnyTopology, active: Any) -> jax.Array:
    check_topology(topology, symmetric=True)
    active = jnp.asarray(active)
    if active.shape or active.dtype != bool:
        raise TypeError(
            f"active must be one boolean a worker, got shape {active.shape} and dtype "
            f"{active.dtype}: pass this worker's own."
        )
    return active


def topologies_of(topology: AnyTopology) -> list[Topology]:
    """Returns a topology, or those of a schedule, as a list."""
    return [topology] if isinstance(topology, Topology) else list(topology)


def matrices_of(topology: AnyTopology) -> list[np.ndarray]:
    """Returns the mixing matrix of each round."""
    return [one.matrix for one in topologies_of(topology)]


def bind(axis_name: AxisName, topology: AnyTopology) -> WorkerAxis:
    """Binds an axis that must have the topology's number of workers."""
    axis = WorkerAxis.bind(axis_name)
    _check_size(axis, topology)
    return axis


def _check_size(axis: WorkerAxis, topology: AnyTopology) -> None:
    if axis.size != topology.num_workers:
        raise ValueError(
            f"topology must have as many workers as the axis {axis.name!r} of size "
            f"{axis.size}, got {topology!r}: build it for {axis.size} workers."
        )


def accelerated_rounds(
    tree: Any,
    topology: Topology,
    rounds: int,
    axis_name: AxisName,
    active: Any = None,
    like: Any = None,
) -> Any:
    """`accelerated_mix` of a tree of at least float32, which travels as `like`."""
    one_round = accelerated_round(topology, axis_name)

    def body(_, carry):
        now, before = carry
        return one_round(now, before, active, like), now

    start = WorkerAxis.bind(axis_name).varying(tree)
    return lax.fori_loop(0, rounds, body, (start, start))[0]


def accelerated_round(topology: Topology, axis_name: AxisName) -> Callable:
    """One round of `accelerated_mix`, `(z_r, z_{r-1}, active, like) -> z_{r+1}`.

    Trees are at least float32 and travel in the dtypes of `like`. Written as what the
    round adds, so that rounding leaves the mean alone; see `mix_differences`.
    """
    check_accelerable(topology)
    eta = momentum(topology)

    def one_round(now, before, active=None, like=None):
        change = mix_differences(now, topology, axis_name, active=active, like=like)

        def extrapolate(z, c, b):
            one, e = jnp.asarray(1 + eta, z.dtype), jnp.asarray(eta, z.dtype)
            return z + (one * c + e * (z - b))

        return jax.tree.map(extrapolate, now, change, before)

    return one_round


def momentum(topology: Topology) -> float:
    r"""The momentum :math:`\eta` of accelerated gossip on this topology."""
    root = math.sqrt(1 - topology.second_eigenvalue**2)
    return (1 - root) / (1 + root)


def check_accelerable(topology: Topology) -> None:
    """Checks that accelerated gossip converges on this topology."""
    check_topology(topology, symmetric=True, static=True)
    if topology.num_workers > 1 and topology.spectral_gap < 1e-12:
        raise ValueError(
            f"topology must have a spectral gap, got {topology!r} (an eigenvalue is "
            "-1): give workers a weight of their own, such as topology.lazy(0.5)."
        )


def apply_factor(
    tree: Any,
    factors: Sequence[np.ndarray],
    step: jax.Array | int,
    axis_name: AxisName,
) -> Any:
    """Applies the factor of round `step`, one of `topology.exact_factors`."""
    check_dtypes("tree", tree, jnp.inexact)
    return gossip_round(tree, factors, WorkerAxis.bind(axis_name), step)


def hub_average(
    tree: Any,
    topology: AnyTopology | None,
    shares: np.ndarray | None,
    step: jax.Array | int | None,
    hub_axis: str,
    worker_axis: str,
) -> Any:
    r"""The mean over a hub's workers; with a topology, then mixed with other hubs'.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: The hubs' mixing matrix, or a schedule; None to stay inside the hub.
      shares: Shape `[hubs, workers a hub]`, each worker's share of all data; equal if
        None.
      step: The round of a schedule.
      hub_axis: The axis of hubs.
      worker_axis: The axis of workers in a hub.

    Returns:
      :math:`\sum_j H_{dj} z_j` with :math:`z_d = \sum_{i \in d} v_i x_i`, or
      :math:`z_d`; the same on all workers of a hub.
    """
    hubs, workers = WorkerAxis.bind(hub_axis), WorkerAxis.bind(worker_axis)
    check_dtypes("tree", tree, jnp.inexact)
    weight = None
    if shares is not None:
        sizes = hubs.size, workers.size
        if shares.shape != sizes:
            raise ValueError(
                f"shares must have one row per hub and one entry per worker, {sizes} "
                f"as the axes {hub_axis!r} and {worker_axis!r} are, got shape "
                f"{shares.shape}."
            )
        table = jnp.asarray(shares / shares.sum(1, keepdims=True))
        weight = table[hubs.index, workers.index]
    both = WorkerAxis.bind((hub_axis, worker_axis))

    if topology is None:
        if weight is None:
            return workers.mean(tree)
        return mapped_packed(
            lambda x: workers.total(weighted(x, weight)),
            tree,
            both,
            ALL_REDUCE_BUCKET_BYTES,
        )

    _check_size(hubs, topology)
    rounds = topologies_of(topology)
    if shares is not None:
        rounds = [reweighted(one, shares.sum(1)) for one in rounds]

    def between(z):
        if len(rounds) == 1 and rounds[0].averages_exactly:
            return hubs.mean(z)
        return gossip_round(z, [one.matrix for one in rounds], hubs, step)

    return mapped_packed(
        lambda x: workers.mean_in_parts(x, between, weight),
        tree,
        both,
        ALL_REDUCE_BUCKET_BYTES,
    )
