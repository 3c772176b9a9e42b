"""Gossip and averaging: a topology's mixing matrix applied to a pytree of arrays."""

from typing import TypeVar

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
from decentral_jax._validation import check_arrays, check_dtypes, check_int
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
)

Tree = TypeVar("Tree")

__all__ = [
    "accelerated_mix",
    "average",
    "average_by_factors",
    "average_every",
    "mix",
    "worker_index",
]


def worker_index(axis_name: AxisName = "workers") -> jax.Array:
    """Returns the number of this worker, counted from 0, in every layout.

    Args:
      axis_name: Name of the worker axis.

    Returns:
      An int32 scalar that differs between workers. To give each worker its own random
      numbers, fold it into a PRNG key that all workers share.

    Raises:
      ValueError: If the axis is not bound, or if a mesh axis lies inside a `vmap` axis,
        so that the workers of a device do not have consecutive numbers.

    Example:
      >>> import decentral_jax as dj, jax
      >>> own_key = lambda key: jax.random.fold_in(key, dj.worker_index())
    """
    return WorkerAxis.bind(axis_name).index


def mix(
    tree: Tree,
    topology: AnyTopology,
    axis_name: AxisName = "workers",
    *,
    step: jax.Array | int | None = None,
    active: jax.Array | bool | None = None,
) -> Tree:
    r"""Performs one gossip round: replaces each worker's tree by a weighted average.

    .. math:: x_i \leftarrow \sum_j W_{ij} x_j

    If some workers are missing, each present worker adds the weights of its missing
    neighbors to its own weight. The matrix then stays doubly stochastic, and the mean
    over all workers does not change:

    .. math:: x_i \leftarrow x_i + a_i \sum_j W_{ij} a_j (x_j - x_i)

    On a complete graph with equal weights, the round lowers to one all-reduce. On other
    graphs it lowers to `topology.max_degree` rounds of `ppermute` between devices, and
    to a gather or a matrix product between the workers of one device. Each worker sends
    its tree once to each neighbor: `max_degree * bytes(tree)` bytes per round.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: Mixing matrix :math:`W`, or a schedule of mixing matrices.
      axis_name: Name of the worker axis. Its size is `topology.num_workers`.
      step: Round number of a schedule: an integer, equal on all workers.
      active: :math:`a_i`, whether this worker takes part: a boolean, for example
        `dj.sample_active(step, missing=2)`. If None, all workers take part. Requires a
        symmetric topology. Each message carries one extra scalar. A missing worker's
        values never propagate, even if they are NaN.

    Returns:
      A tree of the same shapes and dtypes. Sums accumulate in at least float32, with
      one exception: an all-reduce between devices adds half precision as it is.

    Raises:
      TypeError: If `topology` is not a topology, or if any leaf is not floating-point.
        Convert integers first.
      ValueError: If the axis is not bound or its size is not the topology's number of
        workers, if a schedule gets no `step`, or if `active` is given with a topology
        that is not symmetric.

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
                "the round number."
            )
        if step is not None and not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise TypeError(
                f"step must be an integer, got {step} of dtype "
                f"{jnp.result_type(step)}: pass the round number."
            )
    return mix_all(tree, topology, axis, step)


def average(tree: Tree, axis_name: AxisName = "workers") -> Tree:
    r"""Returns the exact mean over all workers, computed by one all-reduce.

    .. math:: x_i \leftarrow \frac1n \sum_j x_j

    Args:
      tree: This worker's pytree of arrays, such as gradients or metrics.
      axis_name: Name of the worker axis.

    Returns:
      The mean, equal on all workers, in a tree of the same shapes. Floating-point and
      complex dtypes do not change. The mean of integers or booleans is float32, or
      float64 under `jax_enable_x64`.

    Raises:
      TypeError: If any leaf is not an array of numbers or booleans.
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


def _as_inexact(x: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Converts integers and booleans to floats, and returns other arrays unchanged."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
        return jnp.asarray(x, jnp.result_type(float))
    return x


def average_every(
    tree: Tree,
    period: int,
    step: jax.Array | int,
    *,
    axis_name: AxisName = "workers",
) -> Tree:
    """Returns the mean over all workers every `period` steps, and the tree otherwise.

    Use it for arrays that no gradient updates, such as BatchNorm statistics. It
    averages in the steps in which an algorithm with the same period exchanges
    parameters: `step` counts from 0, and the steps `period - 1`, `2 * period - 1`, ...
    average.

    Args:
      tree: This worker's pytree of floating-point arrays.
      period: Number of steps between two averages.
      step: Step number: an integer, equal on all workers, such as `TrainState.step`.
      axis_name: Name of the worker axis.

    Returns:
      A tree of the same shapes and dtypes. The steps in between send nothing.

    Raises:
      TypeError: If `period` is not an integer, or if any leaf is not floating-point.
      ValueError: If `period` is below 1, or if the axis is not bound.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> step = lambda x, t: dj.average_every(x, 4, t)
      >>> mapped = jax.vmap(step, axis_name="workers", in_axes=(0, None))
      >>> mapped(jnp.array([1.0, 3.0]), 2), mapped(jnp.array([1.0, 3.0]), 3)
      (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))
    """
    period = check_int("period", period, minimum=1)
    # Only floats pass: the mean of integers would be a float, and the two branches of
    # the `cond` must return the same dtypes.
    check_dtypes("tree", tree, jnp.inexact)
    axis = WorkerAxis.bind(axis_name)
    count = jnp.asarray(step) + 1
    return axis.cond_every(period, count, axis.mean, lambda tree: tree, tree)


def accelerated_mix(
    tree: Tree,
    topology: Topology,
    rounds: int,
    *,
    axis_name: AxisName = "workers",
    active: jax.Array | bool | None = None,
) -> Tree:
    r"""Performs `rounds` rounds of accelerated gossip.

    .. math::
       z_{r+1} = (1 + \eta) W z_r - \eta z_{r-1}, \qquad z_{-1} = z_0, \qquad
       \eta = \frac{1 - \sqrt{1 - \lambda^2}}{1 + \sqrt{1 - \lambda^2}}

    Here :math:`\lambda` is the second largest magnitude of an eigenvalue of :math:`W`.
    Accelerated gossip preserves the mean. Asymptotically it contracts the consensus
    distance by a factor of :math:`\sqrt\eta` per round, whereas plain gossip contracts
    it by :math:`\lambda`.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: A static, symmetric, doubly stochastic topology.
      rounds: Number of rounds, at least 1. Each round sends as many bytes as `mix`.
      axis_name: Name of the worker axis.
      active: Whether this worker takes part in these rounds, as in `mix`.

    Returns:
      A tree of the same shapes and dtypes.

    Raises:
      TypeError: If `topology` is a schedule, or if `rounds` is not an integer.
      ValueError: If the topology has no spectral gap, or for the reasons given in
        `mix`.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> ring = dj.topology.ring(8)
      >>> mix = lambda x: dj.accelerated_mix(x, ring, rounds=10)
      >>> mixed = jax.vmap(mix, axis_name="workers")(jnp.arange(8.0))
      >>> bool(jnp.allclose(mixed, 3.5, atol=0.1))
      True

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021, Alg. 3;
      Liu & Morse, "Accelerated linear iterations for distributed averaging", 2011.
    """
    rounds = check_int("rounds", rounds, 1)
    check_dtypes("tree", tree, jnp.inexact)
    # All rounds compute in at least float32 and send in the dtypes of `tree`.
    mixed = accelerated_rounds(
        jax.tree.map(wide, tree), topology, rounds, axis_name, active, like=tree
    )
    return cast_like(mixed, tree)


def average_by_factors(
    tree: Tree,
    topology: Topology,
    axis_name: AxisName = "workers",
) -> Tree:
    r"""Returns the exact mean over all workers, using only the edges of the graph.

    .. math:: x \leftarrow F_m \cdots F_1 x, \qquad F_m \cdots F_1 = 11^T / n

    Each factor :math:`F_k` of `dj.topology.exact_factors` is one gossip round.

    Args:
      tree: This worker's pytree of floating-point arrays.
      topology: A static, connected topology.
      axis_name: Name of the worker axis.

    Returns:
      The mean, up to rounding, in a tree of the same shapes and dtypes.

    Raises:
      TypeError: If `topology` is a schedule, or if any leaf is not floating-point.
      ValueError: If the topology is not connected, or for the reasons given in `mix`.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> ring = dj.topology.ring(4)
      >>> mean = jax.vmap(
      ...     lambda x: dj.average_by_factors(x, ring), axis_name="workers"
      ... )
      >>> bool(jnp.allclose(mean(jnp.arange(4.0)), 1.5, atol=1e-5))
      True
    """
    # Checks that the axis has as many workers as the topology.
    bind(axis_name, topology)
    for factor in exact_factors(topology):
        tree = apply_factor(tree, [factor], 0, axis_name)
    return tree
