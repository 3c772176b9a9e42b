"""Exact averaging and gossip: from synchronous SGD to DeTAG, by their papers' names."""

import jax
import optax

from decentral_jax.algorithms.base import (
    LearningRate,
    Optimizer,
    at_calls,
    local_optimizer,
)
from decentral_jax.collectives import AxisName
from decentral_jax.topology import (
    AnyTopology,
    Topology,
    check_topology,
    exact_factors,
)
from decentral_jax.transforms.averaging import average_gradients
from decentral_jax.transforms.gossip import exact_diffusion, gossip
from decentral_jax.transforms.tracking import (
    accelerated_tracking,
    exact_phases,
    track_gradients,
)
from decentral_jax.validation import check_int, check_interval


def all_reduce_sgd(
    learning_rate: LearningRate,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Synchronous data-parallel SGD: the mean gradient by all-reduce.

    :math:`x \leftarrow x - \gamma \frac1n \sum_i g_i`. See `dj.average_gradients`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.
    """
    return optax.chain(
        average_gradients(axis_name), local_optimizer(learning_rate, base, alone=True)
    )


def d_psgd(
    learning_rate: LearningRate,
    topology: AnyTopology,
    order: str = "combine_then_adapt",
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Decentralized parallel SGD.

    :math:`X \leftarrow W X - \gamma G` (combine-then-adapt) or
    :math:`X \leftarrow W (X - \gamma G)` (adapt-then-combine). See `dj.gossip`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      topology: A doubly stochastic topology or schedule.
      order: "combine_then_adapt", as published, or "adapt_then_combine".
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?",
      NeurIPS 2017, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> plain = dj.d_psgd(0.1, dj.topology.ring(8))
      >>> adam = dj.d_psgd(None, dj.topology.ring(8), base=optax.adam(1e-3))
    """
    return optax.chain(
        local_optimizer(learning_rate, base), gossip(topology, order, axis_name)
    )


def d2(
    learning_rate: LearningRate,
    topology: Topology,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""D2, for workers whose data differ.

    :math:`X_{t+1} = W (2 X_t - X_{t-1} - \gamma (G_t - G_{t-1}))`. See
    `dj.exact_diffusion`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      topology: Static, symmetric, doubly stochastic, smallest eigenvalue above -1/3.
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Tang et al., "D2: Decentralized Training over Decentralized Data", ICML 2018,
      Algorithm 1.
    """
    return optax.chain(
        local_optimizer(learning_rate, base), exact_diffusion(topology, axis_name)
    )


def dsgt(
    learning_rate: LearningRate,
    topology: AnyTopology,
    order: str = "combine_then_adapt",
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Distributed stochastic gradient tracking.

    :math:`X' = W X - \gamma Y,\ Y' = W Y + G' - G` (combine-then-adapt), or
    :math:`X' = W (X - \gamma Y),\ Y' = W (Y + G' - G)` (adapt-then-combine), from
    :math:`Y_0 = G_0`. See `dj.track_gradients` and `dj.gossip`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      topology: A doubly stochastic topology or schedule.
      order: "combine_then_adapt" or "adapt_then_combine".
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Pu & Nedic, "Distributed Stochastic Gradient Tracking Methods", Mathematical
      Programming 2021.
    """
    return optax.chain(
        track_gradients(topology, order, axis_name),
        local_optimizer(learning_rate, base),
        gossip(topology, order, axis_name),
    )


def detag(
    learning_rate: LearningRate,
    topology: Topology,
    rounds: int,
    momentum: float | jax.Array | None = None,
    when: str = "every_step",
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DeTAG; with momentum, DeTAGM.

    Phases of :math:`R` gradients at one point, beside :math:`R` accelerated gossip
    rounds on parameters and tracker. See `dj.accelerated_tracking`.

    Args:
      learning_rate: :math:`\gamma`, a number, or a schedule over iterations, of which
        the phase's last one counts; None with `base`, whose schedules count phases.
      topology: Static, symmetric, doubly stochastic.
      rounds: :math:`R`, iterations and gossip rounds a phase. The paper's choice grows
        like :math:`\log(n) / (2 \sqrt{1 - \lambda})`.
      momentum: Heavy-ball momentum on the tracker.
      when: "every_step", one gossip round an iteration as published, or "phase_end".
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    Raises:
      ValueError: If `momentum` is given with `base`, and as `dj.accelerated_tracking`.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 2.
    """
    if momentum is not None:
        check_interval("momentum", momentum, 0.0, 1.0, closed="left")
        if base is not None:
            raise ValueError(
                f"momentum={momentum} has no meaning beside base: give base its own, "
                "such as base=optax.sgd(0.1, momentum=0.9)."
            )
    rounds = check_int("rounds", rounds, minimum=1)
    inner = local_optimizer(at_calls(learning_rate, rounds), base, momentum)
    return accelerated_tracking(inner, topology, rounds, when, axis_name)


def defacto(
    learning_rate: LearningRate,
    topology: Topology,
    rounds: int | None = None,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DeFacto: exact averaging in phases on the graph's own edges.

    Reaches the lower bound for decentralized training up to constants; a construction
    for proofs and baselines. See `dj.exact_phases`.

    Args:
      learning_rate: :math:`\gamma`, a number, or a schedule over iterations, of which
        the phase's last one counts; None with `base`, whose schedules count phases.
      topology: Static and connected.
      rounds: Gradient iterations a phase; as many as averaging takes if None.
      base: Any optax optimizer in plain SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Lu & De Sa, "Optimal Complexity in Decentralized Training", ICML 2021,
      Algorithm 1.
    """
    check_topology(topology, doubly_stochastic=False, static=True)
    averaging = len(exact_factors(topology))
    rounds = averaging if rounds is None else check_int("rounds", rounds, minimum=1)
    rate = at_calls(learning_rate, rounds + averaging)
    inner = local_optimizer(rate, base, alone=True)
    return exact_phases(inner, topology, rounds, axis_name)
