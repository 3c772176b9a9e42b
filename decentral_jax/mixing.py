"""Gossip: a topology's mixing matrix applied to a tree of arrays.

Topologies (`decentral_jax.topology`) meet collectives (`decentral_jax.collectives`)
here and nowhere else. Small leaves travel packed: one message carries a bucket of
leaves, not one leaf.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax import collectives
from decentral_jax.collectives import AxisName
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
    reweighted,
)
from decentral_jax.validation import check_arrays, check_dtypes, check_int

# A leaf of at least this many bytes travels alone: packing it would cost a copy, and
# saves no message worth the name. Smaller ones share buckets by dtype. An all-reduce
# is several messages, so that packing pays for longer (benchmarks/multi_process.py).
BUCKET_BYTES = 1 << 20
ALL_REDUCE_BUCKET_BYTES = 2 << 20


def mix(
    tree: Any,
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    *,
    step: jax.Array | int | None = None,
    active: jax.Array | bool | None = None,
) -> Any:
    r"""One gossip round: replaces each worker's tree by a weighted average.

    .. math:: x_i \leftarrow \sum_j W_{ij} x_j

    Where some workers are missing, those present keep for themselves the weight that
    they would give to them, so that the matrix stays doubly stochastic and the mean of
    all workers stays what it was:

    .. math:: x_i \leftarrow x_i + a_i \sum_j W_{ij} a_j (x_j - x_i)

    Lowered to one all-reduce on a complete graph with equal weights; else, across
    devices, to `topology.max_degree` rounds of `ppermute`, and among the workers of one
    device to a gather or a matrix product. Each worker sends its tree once a round:
    `max_degree * bytes(tree)`.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: The mixing matrix, or a schedule of them.
      axis_name: The worker axis; its size is the topology's number of workers.
      step: The round of a schedule, an integer equal on all workers.
      active: :math:`a_i`, whether this worker takes part, such as
        `dj.takes_part(step, missing=2)`; all do if None. Needs a symmetric topology. A
        number more a message is sent, and what a missing worker holds, finite or not,
        reaches nobody.

    Returns:
      A tree of the same shapes and dtypes. Sums are accumulated in at least float32,
      except that an all-reduce between devices adds half precision as such.

    Raises:
      TypeError: If `topology` is not a topology, or any leaf is not floating-point.
        Convert integers first.
      ValueError: If the axis is not bound or has another size than the topology, a
        schedule gets no `step`, or workers may be missing on a topology that is not
        symmetric.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> ring = dj.topology.ring(4)
      >>> mix = jax.vmap(lambda x: dj.mix(x, ring), axis_name="workers")
      >>> mix(jnp.array([3.0, 0.0, 0.0, 0.0]))
      Array([1., 1., 0., 1.], dtype=float32)
    """
    check_topology(topology, doubly_stochastic=False)
    _check_axis(topology.num_workers, f"{topology!r}", axis_name)
    if active is not None:
        return _mix_present(tree, topology, axis_name, step, jnp.asarray(active))
    check_dtypes("tree", tree, jnp.inexact)
    if isinstance(topology, Topology):
        if topology.averages_exactly:
            return average(tree, axis_name)
        matrices = [topology.matrix]
    else:
        matrices = [one.matrix for one in topology]
        if step is None and len(matrices) > 1:
            raise ValueError(
                f"step must be given for the time-varying {topology!r}, got None: pass "
                "the number of the round."
            )
        if step is not None and not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise TypeError(
                f"step must be an integer, got {step} of dtype "
                f"{jnp.result_type(step)}: pass the number of the round."
            )
    return _by_bucket(
        lambda x: collectives.combine(x, matrices, axis_name, step), tree, axis_name
    )


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
    axis = collectives.bound_axis(axis_name)
    _check_axis(topology.num_workers, f"{topology!r}", axis_name)
    many = axis.num_devices == 1 and topology.max_degree > collectives.DENSE_FROM
    if many and active is None:
        matrices = [one.matrix for one in _rounds(topology)]

        def dense(x):
            return collectives.dense_differences(x, matrices, axis_name, step)

        return jax.tree.map(dense, tree)
    if many or (isinstance(topology, Topology) and topology.averages_exactly):
        mixed = mix(tree, topology, axis_name, step=step, active=active)
        return jax.tree.map(jnp.subtract, mixed, tree)
    if like is None:
        like = tree
    sent = collectives.cast_like(tree, like)
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


def _rounds(topology: AnyTopology) -> list[Topology]:
    return [topology] if isinstance(topology, Topology) else list(topology)


def _check_active(topology: AnyTopology, active: Any) -> jax.Array:
    check_topology(topology, symmetric=True)
    active = jnp.asarray(active)
    if active.shape or active.dtype != bool:
        raise TypeError(
            f"active must be one boolean a worker, got shape {active.shape} and dtype "
            f"{active.dtype}: pass this worker's own."
        )
    return active


def _mix_present(tree, topology, axis_name, step, active):
    """`mix` where only some workers take part."""
    active = _check_active(topology, active)
    check_dtypes("tree", tree, jnp.inexact)
    dtypes = [collectives.widened(jnp.asarray(x).dtype) for x in jax.tree.leaves(tree)]
    share = active.astype(functools.reduce(jnp.promote_types, dtypes))
    shown = jax.tree.map(lambda x: collectives.weighted(x, share), tree)
    mixed, present = mix((shown, share), topology, axis_name, step=step)

    def own(m, x):
        y = m.astype(share.dtype) + (1 - present) * x.astype(share.dtype)
        return jnp.where(active, y.astype(x.dtype), x)

    return jax.tree.map(own, mixed, tree)


def average(tree: Any, axis_name: AxisName = "workers") -> Any:
    """The exact mean over all workers by all-reduce, the same on each.

    Args:
      tree: This worker's pytree of arrays, such as gradients or metrics.
      axis_name: The worker axis.

    Returns:
      The mean, of the same shapes. Floating-point and complex dtypes are kept; the mean
      of integers or booleans is float32, or float64 under `jax_enable_x64`.

    Raises:
      TypeError: If a leaf is not an array of numbers or booleans.
      ValueError: If the axis is not bound.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> def accuracy(labels, predictions):
      ...     return dj.average((labels == predictions).mean())
      >>> accuracy = jax.vmap(accuracy, axis_name="workers")
      >>> accuracy(jnp.array([[1, 2], [3, 4]]), jnp.array([[1, 2], [3, 0]]))
      Array([0.75, 0.75], dtype=float32)
    """
    check_arrays("tree", tree)
    return _by_bucket(
        lambda x: collectives.mean(x, axis_name),
        jax.tree.map(_as_inexact, tree),
        axis_name,
        ALL_REDUCE_BUCKET_BYTES,
    )


def _as_inexact(x: Any) -> Any:
    """An array as it is, but integers and booleans as floats, which have a mean."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
        return jnp.asarray(x, jnp.result_type(float))
    return x


def average_every(
    tree: Any,
    period: int,
    step: jax.Array | int,
    *,
    axis_name: AxisName = "workers",
) -> Any:
    """The mean over all workers in each `period`-th step, else the tree as it is.

    Meant for what no gradient reaches, such as BatchNorm's statistics, at the steps in
    which an algorithm with a period exchanges: `step` counts from 0, and steps
    `period - 1`, `2 * period - 1`, ... average.

    Args:
      tree: This worker's pytree of floating-point arrays.
      period: Steps from one average to the next.
      step: The step, an integer equal on all workers, such as a `TrainState`'s.
      axis_name: The worker axis.

    Returns:
      A tree of the same shapes and dtypes. Other steps send nothing.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> step = lambda x, t: dj.average_every(x, 4, t)
      >>> mapped = jax.vmap(step, axis_name="workers", in_axes=(0, None))
      >>> mapped(jnp.array([1.0, 3.0]), 2), mapped(jnp.array([1.0, 3.0]), 3)
      (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))
    """
    period = check_int("period", period, minimum=1)
    check_dtypes("tree", tree, jnp.inexact)  # both branches return the same dtypes
    return collectives.every(
        *(period, jnp.asarray(step) + 1, axis_name),
        *(lambda tree: average(tree, axis_name), lambda tree: tree),
        tree,
    )


def accelerated_mix(
    tree: Any,
    topology: Topology,
    rounds: int,
    *,
    axis_name: AxisName = "workers",
    active: jax.Array | bool | None = None,
) -> Any:
    r"""Accelerated gossip: `rounds` rounds that contract like twice the square root.

    .. math::
       z_{r+1} = (1 + \eta) W z_r - \eta z_{r-1}, \qquad z_{-1} = z_0, \qquad
       \eta = \frac{1 - \sqrt{1 - \lambda^2}}{1 + \sqrt{1 - \lambda^2}}

    It preserves the mean and contracts by :math:`\sqrt\eta` a round asymptotically,
    where plain gossip contracts by :math:`\lambda`
    (Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021, Alg. 3;
    Liu & Morse, "Accelerated linear iterations for distributed averaging", 2011).

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: A static, symmetric, doubly stochastic topology.
      rounds: Number of rounds, at least 1; each sends what `mix` sends.
      axis_name: The worker axis.
      active: Whether this worker takes part in these rounds, as in `mix`.

    Returns:
      A tree of the same shapes and dtypes.

    Raises:
      TypeError: If `topology` is a schedule or `rounds` no integer.
      ValueError: If the topology has no spectral gap, or as in `mix`.
    """
    rounds = check_int("rounds", rounds, 1)
    check_dtypes("tree", tree, jnp.inexact)
    wide = jax.tree.map(collectives.wide, tree)
    mixed = accelerated_rounds(wide, topology, rounds, axis_name, active, like=tree)
    return collectives.cast_like(mixed, tree)


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

    start = jax.tree.map(lambda x: collectives.varying(x, axis_name), tree)
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


def average_by_factors(
    tree: Any,
    topology: Topology,
    axis_name: AxisName = "workers",
) -> Any:
    """The exact mean over all workers by sparse rounds on the graph's own edges.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: A static, connected topology.
      axis_name: The worker axis.

    Returns:
      The mean, to rounding; a tree of the same shapes and dtypes.

    Raises:
      TypeError: If `topology` is a schedule, or a leaf is no floating-point array.
      ValueError: If the topology is not connected, or as in `mix`.
    """
    for factor in exact_factors(topology):
        tree = apply_factor(tree, [factor], 0, axis_name)
    return tree


def apply_factor(
    tree: Any,
    factors: Sequence[np.ndarray],
    step: jax.Array | int,
    axis_name: AxisName,
) -> Any:
    """Applies the factor of round `step`, one of `topology.exact_factors`."""
    _check_axis(len(factors[0]), f"one of {len(factors[0])} workers", axis_name)
    return _by_bucket(
        lambda x: collectives.combine(x, factors, axis_name, step), tree, axis_name
    )


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
    weight = None
    if shares is not None:
        sizes = tuple(
            collectives.bound_axis(name).size for name in (hub_axis, worker_axis)
        )
        if shares.shape != sizes:
            raise ValueError(
                f"shares must have one row a hub and one entry a worker, {sizes} as "
                f"the axes {hub_axis!r} and {worker_axis!r} are, got shape "
                f"{shares.shape}."
            )
        table = jnp.asarray(shares / shares.sum(1, keepdims=True))
        weight = table[
            collectives.worker_index(hub_axis), collectives.worker_index(worker_axis)
        ]
    if topology is None:
        if weight is None:
            return average(tree, worker_axis)

        def one(x):
            return collectives.total(collectives.weighted(x, weight), worker_axis)

    else:
        _check_axis(topology.num_workers, f"{topology!r}", hub_axis)
        rounds = [topology] if isinstance(topology, Topology) else list(topology)
        if shares is not None:
            rounds = [reweighted(one, shares.sum(1)) for one in rounds]

        def between(z):
            if len(rounds) == 1 and rounds[0].averages_exactly:
                return collectives.mean(z, hub_axis)
            matrices = [one.matrix for one in rounds]
            return collectives.combine(z, matrices, hub_axis, step)

        def one(x):
            return collectives.mean_in_parts(x, between, worker_axis, weight)

    return _by_bucket(one, tree, (hub_axis, worker_axis), ALL_REDUCE_BUCKET_BYTES)


def gather(tree: Any, axis_name: AxisName = "workers") -> Any:
    """All workers' trees, the same on each.

    Args:
      tree: This worker's pytree of arrays, of any dtypes.
      axis_name: The worker axis.

    Returns:
      The tree with a leading axis of workers on each leaf. A worker sends `n - 1` times
      the tree's bytes.
    """
    return _packed(
        lambda x: collectives.gather(x, axis_name), tree, axis_name, BUCKET_BYTES
    )


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
    _check_axis(topology.num_workers, repr(topology), axis_name)
    rounds = _rounds(topology)
    arrays, unpack = _pack(tree, axis_name, BUCKET_BYTES)
    return collectives.combine(
        *(arrays, [one.matrix for one in rounds], axis_name, step),
        decode=lambda a: decode(unpack(a)),
    )


def _check_axis(num_workers: int, topology: str, axis_name: AxisName) -> None:
    size = collectives.bound_axis(axis_name).size
    if size != num_workers:
        raise ValueError(
            f"topology must have as many workers as the axis {axis_name!r} of size "
            f"{size}, got {topology}: build it for {size} workers."
        )


def _by_bucket(
    fn: Callable, tree: Any, axis_name: AxisName, alone_from: int = BUCKET_BYTES
) -> Any:
    """Maps a function that is linear in each element over a tree, leaves packed."""
    check_dtypes("tree", tree, jnp.inexact)
    return _packed(fn, tree, axis_name, alone_from)


def _packed(fn: Callable, tree: Any, axis_name: AxisName, alone_from: int) -> Any:
    """Maps a function over a tree, small leaves of one dtype in one array.

    The function may put axes in front of its argument's.
    """
    arrays, unpack = _pack(tree, axis_name, alone_from)
    return unpack([fn(array) for array in arrays])


def _pack(
    tree: Any, axis_name: AxisName, alone_from: int
) -> tuple[list, Callable[[list], Any]]:
    """The arrays that travel in place of a tree's leaves, and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if collectives.bound_axis(axis_name).num_devices == 1:
        return leaves, structure.unflatten
    buckets: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        big = leaf.size * leaf.dtype.itemsize >= alone_from
        buckets.setdefault(i if big else leaf.dtype, []).append(i)
    members = list(buckets.values())
    arrays = [
        leaves[alone[0]]
        if len(alone) == 1
        else jnp.concatenate([leaves[i].ravel() for i in alone])
        for alone in members
    ]

    def unpack(arrays):
        out = list(leaves)
        for array, inside in zip(arrays, members, strict=True):
            if len(inside) == 1:
                out[inside[0]] = array
                continue
            ends = np.cumsum([leaves[i].size for i in inside])[:-1]
            for i, part in zip(inside, jnp.split(array, ends, axis=-1), strict=True):
                out[i] = part.reshape(*array.shape[:-1], *leaves[i].shape)
        return structure.unflatten(out)

    return arrays, unpack
