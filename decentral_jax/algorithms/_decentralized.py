"""Algorithms with exact averaging or gossip, from synchronous SGD to DeTAG."""

import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._validation import check_int
from decentral_jax.algorithms._base import Optimizer, OptimizerLike, local_optimizer
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
)
from decentral_jax.transforms._averaging import average_gradients
from decentral_jax.transforms._gossip import Order, exact_diffusion, gossip
from decentral_jax.transforms._tracking import (
    When,
    accelerated_tracking,
    exact_phases,
    track_gradients,
)

__all__ = ["all_reduce_sgd", "d2", "d_psgd", "defacto", "detag", "dsgt"]


def all_reduce_sgd(
    optimizer: OptimizerLike, *, axis_name: AxisName = "workers"
) -> Optimizer:
    r"""Synchronous data-parallel training: averages gradients by all-reduce.

    :math:`x \leftarrow x - \gamma \frac1n \sum_i g_i`. See `dj.average_gradients`.

    Args:
      optimizer: Learning rate :math:`\gamma` or schedule of plain SGD, or any optax
        optimizer in its place.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    Example:
      >>> import decentral_jax as dj, optax
      >>> tx = dj.all_reduce_sgd(optax.adam(1e-3))
    """
    local = local_optimizer(optimizer, alone=True)
    return optax.chain(average_gradients(axis_name=axis_name), local)


def d_psgd(
    optimizer: OptimizerLike,
    topology: AnyTopology,
    *,
    order: Order = "combine_then_adapt",
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Decentralized parallel SGD.

    :math:`X \leftarrow W X - \gamma G` (combine-then-adapt) or
    :math:`X \leftarrow W (X - \gamma G)` (adapt-then-combine). See `dj.gossip`.

    Args:
      optimizer: Learning rate :math:`\gamma` or schedule of plain SGD, or any optax
        optimizer in its place.
      topology: A doubly stochastic topology or schedule of topologies.
      order: "combine_then_adapt", as published, or "adapt_then_combine".
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?",
      NeurIPS 2017, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> plain = dj.d_psgd(0.1, dj.topology.ring(8))
      >>> adam = dj.d_psgd(optax.adam(1e-3), dj.topology.ring(8))
    """
    return optax.chain(
        local_optimizer(optimizer), gossip(topology, order=order, axis_name=axis_name)
    )


def d2(
    optimizer: OptimizerLike, topology: Topology, *, axis_name: AxisName = "workers"
) -> Optimizer:
    r"""D2, for workers with heterogeneous data.

    :math:`X_{t+1} = W (2 X_t - X_{t-1} - \gamma (G_t - G_{t-1}))`. See
    `dj.exact_diffusion`.

    Args:
      optimizer: Learning rate :math:`\gamma` or schedule of plain SGD, or any optax
        optimizer in its place.
      topology: Static, symmetric, doubly stochastic, with all eigenvalues above -1/3.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Tang et al., "D2: Decentralized Training over Decentralized Data", ICML 2018,
      Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.d2(0.1, dj.topology.ring(8).lazy(0.75))
    """
    return optax.chain(
        local_optimizer(optimizer), exact_diffusion(topology, axis_name=axis_name)
    )


def dsgt(
    optimizer: OptimizerLike,
    topology: AnyTopology,
    *,
    order: Order = "combine_then_adapt",
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Distributed stochastic gradient tracking.

    :math:`X' = W X - \gamma Y,\ Y' = W Y + G' - G` (combine-then-adapt), or
    :math:`X' = W (X - \gamma Y),\ Y' = W (Y + G' - G)` (adapt-then-combine), starting
    with :math:`Y_0 = G_0`. See `dj.track_gradients` and `dj.gossip`.

    Args:
      optimizer: Learning rate :math:`\gamma` or schedule of plain SGD, or any optax
        optimizer in its place.
      topology: A doubly stochastic topology or schedule of topologies.
      order: "combine_then_adapt" or "adapt_then_combine".
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Pu & Nedic, "Distributed Stochastic Gradient Tracking Methods", Mathematical
      Programming 2021.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.dsgt(0.1, dj.topology.ring(8))
    """
    return optax.chain(
        track_gradients(topology, order=order, axis_name=axis_name),
        local_optimizer(optimizer),
        gossip(topology, order=order, axis_name=axis_name),
    )


def detag(
    optimizer: OptimizerLike,
    topology: Topology,
    *,
    rounds: int,
    when: When = "every_step",
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DeTAG; with momentum in the optimizer, DeTAGM.

    Each phase accumulates :math:`R` gradients at one point while :math:`R` accelerated
    gossip rounds mix parameters and tracker. See `dj.accelerated_tracking`.

    Args:
      optimizer: Learning rate :math:`\gamma` of plain SGD; or a schedule over
        iterations, evaluated at the last iteration of each phase; or any optax
        optimizer, whose own schedules count phases. DeTAGM is
        `optax.sgd(0.1, momentum=0.9)`.
      topology: Static, symmetric and doubly stochastic.
      rounds: :math:`R`, iterations and gossip rounds per phase. The paper's choice
        grows like :math:`\log(n) / (2 \sqrt{1 - \lambda})`.
      when: "every_step", one gossip round per iteration as published, or "phase_end".
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 2.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.detag(0.1, dj.topology.ring(8).lazy(0.5), rounds=4)
    """
    rounds = check_int("rounds", rounds, minimum=1)
    local = local_optimizer(optimizer, calls_per_step=rounds)
    return accelerated_tracking(
        local, topology, rounds=rounds, when=when, axis_name=axis_name
    )


def defacto(
    optimizer: OptimizerLike,
    topology: Topology,
    *,
    rounds: int | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DeFacto: exact averaging in phases, along the graph's own edges.

    It attains the lower bound for decentralized training up to constants. Use it as a
    baseline. See `dj.exact_phases`.

    Args:
      optimizer: Learning rate :math:`\gamma` of plain SGD; or a schedule over
        iterations, evaluated at the last iteration of each phase; or any optax
        optimizer, whose own schedules count phases.
      topology: Static and connected.
      rounds: Number of gradient iterations per phase. None means the number of
        iterations that averaging takes.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.defacto(0.1, dj.topology.ring(8))
    """
    check_topology(topology, doubly_stochastic=False, static=True)
    averaging = len(exact_factors(topology))
    rounds = averaging if rounds is None else check_int("rounds", rounds, minimum=1)
    local = local_optimizer(optimizer, calls_per_step=rounds + averaging, alone=True)
    return exact_phases(local, topology, rounds=rounds, axis_name=axis_name)
