"""Gossip rounds, the building blocks of `dj.mix` and of the transformations.

Only this module combines topologies (`decentral_jax.topology`) with the worker axis.
Small leaves are sent packed: one message carries a bucket of leaves instead of a single
leaf.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import PyTree, cast_like, weighted, widened
from decentral_jax._exchange.packing import (
    ALL_REDUCE_BUCKET_BYTES,
    mapped_packed,
    packed,
)
from decentral_jax._exchange.weighing import DENSE_FROM
from decentral_jax._validation import check_dtypes
from decentral_jax.topology import AnyTopology, Topology, check_topology, reweighted


def mix_all(
    tree: PyTree,
    topology: AnyTopology,
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None = None,
) -> PyTree:
    """Performs `dj.mix` with all workers present, without checking its arguments."""
    # A complete graph with equal weights needs one all-reduce, not n - 1 messages.
    if isinstance(topology, Topology) and topology.averages_exactly:
        return axis.mean(tree)
    return gossip_round(tree, matrices_of(topology), axis, step)


def gossip_round(
    tree: PyTree,
    matrices: Sequence[np.ndarray],
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None = None,
    decode: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    r"""Performs one gossip round with explicit matrices.

    Args:
      tree: This worker's pytree of arrays.
      matrices: Mixing matrices `[n, n]`; step `t` uses the one at `t % len(matrices)`.
      axis: Worker axis of `n` workers.
      step: Step number, equal on all workers. Not needed with one matrix.
      decode: Function from a received tree to the arrays to sum. None sums the tree as
        it is.

    Returns:
      :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`.
    """
    arrays, unpack = packed(tree, axis)
    plans = axis.plan(matrices)
    received = axis.send(plans, arrays, step)
    if decode is None:
        return unpack(axis.weigh(plans, arrays, received, step))
    return axis.weigh(plans, arrays, received, step, lambda a: decode(unpack(a)))


def mix_decoded(
    tree: PyTree,
    decode: Callable[[PyTree], PyTree],
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    step: jax.Array | int | None = None,
) -> PyTree:
    r"""Performs one gossip round of encoded arrays, such as compressed ones.

    Args:
      tree: Pytree to send in place of this worker's arrays, of any dtypes.
      decode: Function from such a tree to the arrays.
      topology: Mixing matrix, or a schedule of mixing matrices.
      axis_name: Name of the worker axis.
      step: Round number of a schedule: an integer, equal on all workers.

    Returns:
      :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`.
    """
    axis = bind(axis_name, topology)
    return gossip_round(tree, matrices_of(topology), axis, step, decode)


def mix_differences(
    tree: PyTree,
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    step: jax.Array | int | None = None,
    active: jax.Array | bool | None = None,
    like: PyTree = None,
) -> PyTree:
    r"""Returns the change that one gossip round makes to a tree.

    .. math:: \sum_j W_{ij} (x_j - x_i)

    Use it for states that accumulate over many steps. On a symmetric topology, each
    pair of workers exchanges exactly opposite amounts. Rounding therefore does not
    change the sum over all workers, whatever the dtype in which the tree is sent.

    Args:
      tree: This worker's pytree of floating-point arrays, at least float32.
      topology: As in `mix`.
      axis_name: Name of the worker axis.
      step: As in `mix`.
      active: As in `mix`.
      like: Tree with the dtypes in which to send the arrays. None sends them in their
        own dtypes.

    Returns:
      The change, in the dtypes of `tree`.
    """
    axis = bind(axis_name, topology)
    # Many neighbors on one device: one matrix product, after subtracting the mean.
    many = axis.num_devices == 1 and topology.max_degree > DENSE_FROM
    if many and active is None:
        plans = axis.plan(matrices_of(topology))
        return jax.tree.map(lambda x: axis.dense_differences(plans, x, step), tree)
    # An all-reduce, or a matrix product with missing workers, yields only the sum: take
    # the difference afterwards.
    if many or (isinstance(topology, Topology) and topology.averages_exactly):
        if active is None:
            mixed = mix_all(tree, topology, axis, step)
        else:
            mixed = mix_present(tree, topology, axis, step, active)
        return jax.tree.map(jnp.subtract, mixed, tree)

    # Other graphs: send the tree, rounded to the dtypes of `like`, and sum the
    # differences x_j - x_i. Both terms are rounded alike, so differences are opposite.
    if like is None:
        like = tree
    sent = cast_like(tree, like)
    share = None
    if active is not None:
        active = _check_active(topology, active)
        share = active.astype(jax.tree.leaves(sent)[0].dtype)

    def subtract_own(payload):
        others, share = payload

        def subtract(other, own, x):
            difference = other.astype(x.dtype) - own.astype(x.dtype)
            # `where` instead of a product: a missing worker may hold inf or NaN.
            return difference if share is None else jnp.where(share > 0, difference, 0)

        return jax.tree.map(subtract, others, sent, tree)

    change = gossip_round(
        (sent, share), matrices_of(topology), axis, step, subtract_own
    )
    if active is None:
        return change
    # A missing worker keeps its own values.
    return jax.tree.map(lambda c: jnp.where(active, c, jnp.zeros_like(c)), change)


def mix_present(
    tree: PyTree,
    topology: AnyTopology,
    axis: WorkerAxis,
    step: jax.typing.ArrayLike | None,
    active: jax.typing.ArrayLike,
) -> PyTree:
    """Performs `dj.mix` with some workers missing."""
    active = _check_active(topology, active)
    check_dtypes("tree", tree, jnp.inexact)
    # Mix a_j x_j together with the scalars a_j, in at least float32.
    dtypes = [widened(jnp.asarray(x).dtype) for x in jax.tree.leaves(tree)]
    share = active.astype(functools.reduce(jnp.promote_types, dtypes))
    shown = jax.tree.map(lambda x: weighted(x, share), tree)
    mixed, present = mix_all((shown, share), topology, axis, step)

    # `present` is the total weight of the present workers; the rest goes to x_i.
    def add_own(m, x):
        y = m.astype(share.dtype) + (1 - present) * x.astype(share.dtype)
        return jnp.where(active, y.astype(x.dtype), x)

    return jax.tree.map(add_own, mixed, tree)


def _check_active(topology: AnyTopology, active: jax.typing.ArrayLike) -> jax.Array:
    """Returns `active` as a boolean scalar, after checking it and the topology."""
    check_topology(topology, symmetric=True)
    active = jnp.asarray(active)
    if active.shape or active.dtype != bool:
        raise TypeError(
            f"active must be one boolean per worker, got shape {active.shape} and "
            f"dtype {active.dtype}: pass this worker's own boolean."
        )
    return active


def topologies_of(topology: AnyTopology) -> list[Topology]:
    """Returns the topologies of a schedule, or the one static topology, as a list."""
    return [topology] if isinstance(topology, Topology) else list(topology)


def matrices_of(topology: AnyTopology) -> list[np.ndarray]:
    """Returns the mixing matrix `[n, n]` of each round of a period."""
    return [one.matrix for one in topologies_of(topology)]


def bind(axis_name: AxisName, topology: AnyTopology) -> WorkerAxis:
    """Binds an axis, and checks that its size is the topology's number of workers."""
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
    tree: PyTree,
    topology: Topology,
    rounds: int,
    axis_name: AxisName,
    active: jax.typing.ArrayLike | None = None,
    like: PyTree = None,
) -> PyTree:
    """Performs `accelerated_mix` of a tree that is at least float32.

    The arrays are sent in the dtypes of the tree `like`.
    """
    one_round = accelerated_round(topology, axis_name)

    def body(_, carry):
        now, before = carry
        return one_round(now, before, active, like), now

    # z_0 = z_{-1}; marked as varying so that the loop's carry keeps its type.
    start = WorkerAxis.bind(axis_name).varying(tree)
    return lax.fori_loop(0, rounds, body, (start, start))[0]


def accelerated_round(topology: Topology, axis_name: AxisName) -> Callable[..., PyTree]:
    """Returns one round of `accelerated_mix` as a function.

    Args:
      topology: A static, symmetric, doubly stochastic topology.
      axis_name: Name of the worker axis.

    Returns:
      A function `(z_r, z_{r-1}, active, like) -> z_{r+1}` of trees that are at least
      float32. It sends arrays in the dtypes of `like`, and adds the change that the
      round makes, so that rounding does not change the mean; see `mix_differences`.
    """
    check_accelerable(topology)
    eta = momentum(topology)

    def one_round(now, before, active=None, like=None):
        change = mix_differences(now, topology, axis_name, active=active, like=like)

        # z_{r+1} = z_r + (1 + eta) (W - I) z_r + eta (z_r - z_{r-1})
        def extrapolate(z, c, b):
            one, e = jnp.asarray(1 + eta, z.dtype), jnp.asarray(eta, z.dtype)
            return z + (one * c + e * (z - b))

        return jax.tree.map(extrapolate, now, change, before)

    return one_round


def momentum(topology: Topology) -> float:
    r"""Returns the momentum :math:`\eta` of accelerated gossip on this topology."""
    root = math.sqrt(1 - topology.second_eigenvalue**2)
    return (1 - root) / (1 + root)


def check_accelerable(topology: Topology) -> None:
    """Checks that accelerated gossip converges on this topology."""
    check_topology(topology, symmetric=True, static=True)
    if topology.num_workers > 1 and topology.spectral_gap < 1e-12:
        raise ValueError(
            f"topology must have a spectral gap, got {topology!r} (an eigenvalue is "
            "-1): give each worker a weight for its own model, such as "
            "topology.lazy(0.5)."
        )


def apply_factor(
    tree: PyTree,
    factors: Sequence[np.ndarray],
    step: jax.Array | int,
    axis_name: AxisName,
) -> PyTree:
    """Applies factor number `step` of `topology.exact_factors` to a tree."""
    check_dtypes("tree", tree, jnp.inexact)
    return gossip_round(tree, factors, WorkerAxis.bind(axis_name), step)


def hub_average(
    tree: PyTree,
    topology: AnyTopology | None,
    shares: np.ndarray | None,
    step: jax.Array | int | None,
    hub_axis: str,
    worker_axis: str,
) -> PyTree:
    r"""Averages over the workers of each hub, and optionally mixes between hubs.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: Mixing matrix :math:`H` of the hubs, or a schedule. None averages inside
        each hub only.
      shares: Each worker's share of all data, shape `[hubs, workers per hub]`. None
        means equal shares.
      step: Round number of a schedule.
      hub_axis: Name of the axis of hubs.
      worker_axis: Name of the axis of workers in a hub.

    Returns:
      :math:`\sum_j H_{dj} z_j` with :math:`z_d = \sum_{i \in d} v_i x_i`, or
      :math:`z_d` without a topology; equal on all workers of a hub.
    """
    hubs, workers = WorkerAxis.bind(hub_axis), WorkerAxis.bind(worker_axis)
    check_dtypes("tree", tree, jnp.inexact)
    # v_i: this worker's share of the data of its hub.
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

    if topology is None:
        # The average stays inside the hub.
        if weight is None:
            return workers.mean(tree)

        def average(x):
            return workers.total(weighted(x, weight))

    else:
        # With shares, the hubs' matrix must preserve the mean weighted by their data.
        _check_size(hubs, topology)
        rounds = topologies_of(topology)
        if shares is not None:
            rounds = [reweighted(one, shares.sum(1)) for one in rounds]

        def between(z):
            if len(rounds) == 1 and rounds[0].averages_exactly:
                return hubs.mean(z)
            return gossip_round(z, [one.matrix for one in rounds], hubs, step)

        # Each device of a hub sends a different part of z_d to the other hubs.
        def average(x):
            return workers.mean_in_parts(x, between, weight)

    both = WorkerAxis.bind((hub_axis, worker_axis))
    return mapped_packed(average, tree, both, ALL_REDUCE_BUCKET_BYTES)
