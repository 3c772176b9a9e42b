"""Gossip and averaging: a topology's mixing matrix applied to a tree of arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.gossip import (
    accelerated_rounds,
    apply_factor,
    bind,
    mix_all,
    mix_present,
)
from decentral_jax._exchange.numbers import cast_like, wide
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
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
    axis = bind(axis_name, topology)
    if active is not None:
        return mix_present(tree, topology, axis, step, active)
    check_dtypes("tree", tree, jnp.inexact)
    if not isinstance(topology, Topology):
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
    return mix_all(tree, topology, axis, step)


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
    tree = jax.tree.map(_as_inexact, tree)
    check_dtypes("tree", tree, jnp.inexact)
    return WorkerAxis.bind(axis_name).mean(tree)


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
    bind(axis_name, topology)
    for factor in exact_factors(topology):
        tree = apply_factor(tree, [factor], 0, axis_name)
    return tree
