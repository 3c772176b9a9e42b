"""Gossip: a topology's mixing matrix applied to a tree of arrays.

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
from decentral_jax._exchange.numbers import cast_like, weighted, wide, widened
from decentral_jax._exchange.packing import (
    ALL_REDUCE_BUCKET_BYTES,
    mapped_packed,
    packed,
)
from decentral_jax._exchange.weighing import DENSE_FROM
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
    reweighted,
)
from decentral_jax.validation import check_arrays, check_dtypes, check_int

__all__ = [
    "accelerated_mix",
    "average",
    "average_by_factors",
    "average_every",
    "mix",
    "worker_index",
]


def worker_index(axis_name: AxisName = "workers") -> jax.Array:
    """Returns this worker's number, from 0, in every layout.

    Args:
      axis_name: Name of the worker axis.

    Returns:
      An int32 scalar, different on each worker: fold it into a shared PRNG key for
      random numbers of the worker's own.

    Raises:
      ValueError: If a mesh axis lies inside a `vmap` axis, so that a device's workers
        have no consecutive numbers.

    Example:
      >>> import decentral_jax as dj, jax
      >>> own_key = lambda key: jax.random.fold_in(key, dj.worker_index())
    """
    return WorkerAxis.bind(axis_name).index


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
        `dj.sample_active(step, missing=2)`; all do if None. Needs a symmetric topology.
        Each message carries one extra scalar. A missing worker's values never
        propagate, even if they are NaN.

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
    axis = _bind(axis_name, topology)
    if active is not None:
        return _mix_present(tree, topology, axis_name, step, jnp.asarray(active))
    check_dtypes("tree", tree, jnp.inexact)
    if isinstance(topology, Topology):
        if topology.averages_exactly:
            return axis.mean(tree)
    else:
        if step is None and topology.period > 1:
            raise ValueError(
                f"step must be given for the time-varying {topology!r}, got None: pass "
                "the number of the round."
            )
        if step is not None and not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise TypeError(
                f"step must be an integer, got {step} of dtype "
                f"{jnp.result_type(step)}: pass the number of the round."
            )
    return _gossip(tree, [one.matrix for one in _rounds(topology)], axis, step)


def _gossip(
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
    axis = _bind(axis_name, topology)
    many = axis.num_devices == 1 and topology.max_degree > DENSE_FROM
    if many and active is None:
        plans = axis.plan([one.matrix for one in _rounds(topology)])
        return jax.tree.map(lambda x: axis.dense_differences(plans, x, step), tree)
    if many or (isinstance(topology, Topology) and topology.averages_exactly):
        mixed = mix(tree, topology, axis_name, step=step, active=active)
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
    dtypes = [widened(jnp.asarray(x).dtype) for x in jax.tree.leaves(tree)]
    share = active.astype(functools.reduce(jnp.promote_types, dtypes))
    shown = jax.tree.map(lambda x: weighted(x, share), tree)
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
    return WorkerAxis.bind(axis_name).mean(jax.tree.map(_as_inexact, tree))


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
    axis = WorkerAxis.bind(axis_name)
    count = jnp.asarray(step) + 1
    return axis.cond_every(period, count, axis.mean, lambda tree: tree, tree)


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
    mixed = accelerated_rounds(
        jax.tree.map(wide, tree), topology, rounds, axis_name, active, like=tree
    )
    return cast_like(mixed, tree)


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
    _bind(axis_name, topology)
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
    check_dtypes("tree", tree, jnp.inexact)
    return _gossip(tree, factors, WorkerAxis.bind(axis_name), step)


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
    rounds = _rounds(topology)
    if shares is not None:
        rounds = [reweighted(one, shares.sum(1)) for one in rounds]

    def between(z):
        if len(rounds) == 1 and rounds[0].averages_exactly:
            return hubs.mean(z)
        return _gossip(z, [one.matrix for one in rounds], hubs, step)

    return mapped_packed(
        lambda x: workers.mean_in_parts(x, between, weight),
        tree,
        both,
        ALL_REDUCE_BUCKET_BYTES,
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
    axis = _bind(axis_name, topology)
    return _gossip(tree, [one.matrix for one in _rounds(topology)], axis, step, decode)


def _bind(axis_name: AxisName, topology: AnyTopology) -> WorkerAxis:
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
