"""Algorithms with rare exchanges, or on directed graphs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._exchange.numbers import fitted, wide
from decentral_jax._validation import check_int, check_interval, check_learning_rate
from decentral_jax.algorithms._base import (
    Optimizer,
    OptimizerLike,
    learning_rate_of,
    local_optimizer,
)
from decentral_jax.topology import AnyTopology, complete
from decentral_jax.transforms._averaging import average_parameters
from decentral_jax.transforms._multi_level import multi_level
from decentral_jax.transforms._operating import operating_rates
from decentral_jax.transforms._push_sum import push_sum
from decentral_jax.transforms._quasi_global import quasi_global_momentum

__all__ = ["diloco", "hl_sgd", "local_sgd", "mll_sgd", "qg_dsgdm", "sgp", "slowmo"]


def local_sgd(
    optimizer: OptimizerLike,
    *,
    period: int,
    fragments: int = 1,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Local SGD: local steps, and every `period` steps the exact mean of parameters.

    See `dj.average_parameters`.

    Args:
      optimizer: The local step: a learning rate or schedule of plain SGD, or any optax
        optimizer. Its state, such as momentum, stays local.
      period: Steps between averages.
      fragments: Number of parts of the model that are averaged in turn.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.local_sgd(0.1, period=8)
    """
    averaging = average_parameters(
        period=period, fragments=fragments, axis_name=axis_name
    )
    return optax.chain(local_optimizer(optimizer), averaging)


def slowmo(
    optimizer: OptimizerLike,
    *,
    period: int,
    slow_momentum: float | jax.Array = 0.5,
    slow_rate: optax.ScalarOrSchedule = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    fragments: int = 1,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SlowMo: local steps, and slow momentum on the average displacement of a period.

    With :math:`\bar x` the mean after a period that began at :math:`z`, and
    :math:`\bar\gamma` the period's mean learning rate,

    .. math::
       u \leftarrow \beta u + (z - \bar x) / \bar\gamma, \qquad
       z \leftarrow z - \alpha \bar\gamma u.

    A constant :math:`\bar\gamma` cancels. See `dj.average_parameters`.

    Args:
      optimizer: The local step: a learning rate or schedule of plain SGD, or any optax
        optimizer, as published `optax.sgd(0.1, momentum=0.9)`. Its state is kept from
        period to period.
      period: Local steps per period.
      slow_momentum: :math:`\beta`, in [0, 1).
      slow_rate: :math:`\alpha`, a number or a schedule over iterations.
      learning_rate: The learning rate or schedule inside an optax optimizer, which is
        not visible from outside. Pass it if it is a schedule. None means that it is
        constant. Do not pass it if `optimizer` is itself a learning rate.
      fragments: Number of parts of the model that are exchanged in turn.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Wang et al., "SlowMo: Improving Communication-Efficient Distributed SGD with Slow
      Momentum", ICLR 2020, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> rate = optax.cosine_decay_schedule(0.1, decay_steps=1000)
      >>> momentum_sgd = optax.sgd(rate, momentum=0.9)
      >>> tx = dj.slowmo(momentum_sgd, period=12, learning_rate=rate)
    """
    slow_momentum = check_interval(
        "slow_momentum", slow_momentum, 0.0, 1.0, closed="left"
    )
    check_learning_rate(slow_rate, "slow_rate")
    period = check_int("period", period, minimum=1)
    local = local_optimizer(optimizer)
    outer = _outer_sgd(slow_rate, slow_momentum)
    own_rate = learning_rate_of(optimizer)
    if own_rate is not None:
        if learning_rate is not None:
            raise ValueError(
                f"learning_rate={learning_rate} has no meaning if optimizer is itself "
                "a learning rate: leave it out, or pass an optax optimizer."
            )
        learning_rate = own_rate
    elif learning_rate is not None:
        check_learning_rate(learning_rate)
    # `optax.inject_hyperparams` passes this iteration's rate as an array.
    if callable(learning_rate) or isinstance(learning_rate, jax.Array):
        averaging = _average_by_mean_rate(
            learning_rate, period, outer, fragments, axis_name
        )
    else:
        averaging = average_parameters(
            period=period, outer=outer, fragments=fragments, axis_name=axis_name
        )
    return optax.chain(local, averaging)


def diloco(
    optimizer: OptimizerLike,
    *,
    period: int,
    outer: optax.GradientTransformation | None = None,
    fragments: int = 1,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DiLoCo: AdamW on each worker, Nesterov momentum on the averaged difference.

    With `fragments` above 1, different parts of the model are exchanged in different
    steps (Streaming DiLoCo, without its overlap and quantization). See
    `dj.average_parameters`.

    Args:
      optimizer: The local step, as published `optax.adamw(4e-4)`; a learning rate or
        schedule means plain SGD.
      period: Number of local steps between exchanges, typically several hundred.
      outer: Optimizer of the averaged difference. None means the published
        `optax.sgd(0.7, momentum=0.9, nesterov=True)`. Its schedules count exchanges.
      fragments: Number of parts, which are exchanged in different steps.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
      Models", 2023, Algorithm 1; Douillard et al., "Streaming DiLoCo with overlapping
      communication", 2025, Section 2.1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> tx = dj.diloco(optax.adamw(4e-4), period=500)
    """
    if outer is None:
        outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    averaging = average_parameters(
        period=period, outer=outer, fragments=fragments, axis_name=axis_name
    )
    return optax.chain(local_optimizer(optimizer), averaging)


def mll_sgd(
    optimizer: OptimizerLike,
    hub_topology: AnyTopology,
    *,
    tau: int,
    q: int,
    rates: jax.typing.ArrayLike | Sequence[Any] = 1.0,
    shares: Sequence[Sequence[float]] | np.ndarray | None = None,
    seed: int = 0,
    hub_axis: str = "hub",
    worker_axis: str = "worker",
) -> Optimizer:
    r"""Multi-Level Local SGD: hubs, and workers that step at their own rates.

    In each tick, worker :math:`i` takes a step with probability :math:`p_i`. Hubs
    average every :math:`\tau` ticks, and mix with other hubs every :math:`q \tau`
    ticks. No worker waits for slow workers. See `dj.multi_level` and
    `dj.operating_rates`.

    Args:
      optimizer: The local step: a learning rate of plain SGD, or a schedule over ticks;
        or any optax optimizer, whose own schedules count a worker's own steps.
      hub_topology: A doubly stochastic topology or schedule of topologies of the hubs.
      tau: :math:`\tau`, ticks between averages within hubs.
      q: Averages within hubs for each exchange between hubs.
      rates: :math:`p_i`, in (0, 1]: one number, or one row per hub.
      shares: Each worker's share of all data, one row per hub. None means equal shares.
      seed: Seed for the draws of which workers step.
      hub_axis: Name of the axis of hubs.
      worker_axis: Name of the axis of workers in a hub.

    Returns:
      The transformation.

    References:
      Castiglia, Das & Patterson, "Multi-Level Local SGD: Distributed SGD for
      Heterogeneous Hierarchical Networks", ICLR 2021, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> workers = dj.Workers({"hub": 4, "worker": 2})
      >>> slow_and_fast = [[0.5, 1.0]] * 4
      >>> tx = dj.mll_sgd(0.1, dj.topology.ring(4), tau=8, q=4, rates=slow_and_fast)
    """
    rate = learning_rate_of(optimizer)
    local = local_optimizer(optimizer)
    if callable(rate):
        # The schedule stays outside `operating_rates`: inside, it would count a
        # worker's own steps instead of ticks.
        local = local_optimizer(1.0)
    axis_name = (hub_axis, worker_axis)
    parts = [operating_rates(local, rates=rates, seed=seed, axis_name=axis_name)]
    if callable(rate):
        parts.append(optax.with_extra_args_support(optax.scale_by_schedule(rate)))
    levels = multi_level(
        hub_topology,
        tau=tau,
        q=q,
        shares=shares,
        hub_axis=hub_axis,
        worker_axis=worker_axis,
    )
    return optax.chain(*parts, levels)


def hl_sgd(
    optimizer: OptimizerLike,
    num_hubs: int,
    *,
    tau: int,
    q: int,
    shares: Sequence[Sequence[float]] | np.ndarray | None = None,
    hub_axis: str = "hub",
    worker_axis: str = "worker",
) -> Optimizer:
    r"""Hierarchical Local SGD: averages inside hubs, and less often over all workers.

    It is `mll_sgd` on a complete graph of hubs, with operating rates of 1.

    See `dj.multi_level`.

    Args:
      optimizer: The local step: a learning rate or schedule of plain SGD, or any optax
        optimizer.
      num_hubs: Number of hubs.
      tau: Steps between averages within hubs.
      q: Averages within hubs for each average over all workers.
      shares: Each worker's share of all data, one row per hub. None means equal shares.
      hub_axis: Name of the axis of hubs.
      worker_axis: Name of the axis of workers in a hub.

    Returns:
      The transformation.

    References:
      Lin, Stich, Patel & Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR
      2020, Section 4 (hierarchical local SGD).

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.hl_sgd(0.1, num_hubs=4, tau=8, q=4)
    """
    levels = multi_level(
        complete(check_int("num_hubs", num_hubs, minimum=1)),
        tau=tau,
        q=q,
        shares=shares,
        hub_axis=hub_axis,
        worker_axis=worker_axis,
    )
    return optax.chain(local_optimizer(optimizer), levels)


def sgp(
    optimizer: OptimizerLike, topology: AnyTopology, *, axis_name: AxisName = "workers"
) -> Optimizer:
    r"""Stochastic gradient push, for directed graphs. See `dj.push_sum`.

    Args:
      optimizer: The local step: a learning rate or schedule of plain SGD, or any optax
        optimizer.
      topology: A topology or schedule of topologies whose columns sum to one.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML
      2019, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.sgp(0.1, dj.topology.ring(8))
    """
    return optax.chain(
        local_optimizer(optimizer), push_sum(topology, axis_name=axis_name)
    )


def qg_dsgdm(
    learning_rate: optax.ScalarOrSchedule,
    topology: AnyTopology,
    *,
    momentum: float | jax.Array = 0.9,
    factor: float | jax.Array | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Decentralized SGD with quasi-global momentum. See `dj.quasi_global_momentum`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule.
      topology: A doubly stochastic topology or schedule of topologies.
      momentum: :math:`\beta`, in [0, 1).
      factor: Weight of the last displacement in the momentum. None takes
        `1 - momentum`.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Lin et al., "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on
      Heterogeneous Data", ICML 2021, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.qg_dsgdm(0.1, dj.topology.ring(8))
    """
    return quasi_global_momentum(
        learning_rate, topology, momentum=momentum, factor=factor, axis_name=axis_name
    )


class _MeanRateState(NamedTuple):
    """State of the outer optimizer that works in units of the mean rate."""

    rate: jax.typing.ArrayLike  # shape=(), float: mean rate of the period so far
    outer: optax.OptState


def _outer_sgd(
    rate: optax.ScalarOrSchedule, momentum: float | jax.Array
) -> optax.GradientTransformation:
    """Constructs SGD for `average_parameters`, with a schedule over iterations."""
    if not callable(rate):
        # Models are averaged in at least float32, so widen an injected rate, too.
        rate = wide(rate) if isinstance(rate, jax.Array) else rate
        return optax.chain(_heavy_ball(momentum), optax.scale_by_learning_rate(rate))

    def scale(updates, state, params=None, **extra_args: Any) -> Any:
        del params
        factor = jnp.asarray(rate(extra_args["step"]))
        scaled = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return scaled, state

    by_step = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), scale
    )
    return optax.chain(_heavy_ball(momentum), optax.scale(-1.0), by_step)


def _heavy_ball(momentum: float | jax.Array) -> optax.GradientTransformation:
    """Constructs `optax.trace` whose buffers keep their dtypes.

    In `optax.trace`, an injected momentum in a wider dtype would widen the buffers.
    """

    def update_fn(updates, state, params=None):
        del params
        buffers = jax.tree.map(
            lambda g, b: (g + fitted(momentum, b) * b).astype(b.dtype),
            updates,
            state.trace,
        )
        return buffers, optax.TraceState(buffers)

    return optax.GradientTransformation(optax.trace(0.0).init, update_fn)


def _average_by_mean_rate(
    learning_rate: optax.ScalarOrSchedule | None,
    period: int,
    outer: optax.GradientTransformation,
    fragments: int,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """Constructs `average_parameters` with outer steps scaled by the mean rate.

    The mean is taken over the learning rates of the period, one per call of `update`. A
    schedule, and the same schedule under `optax.inject_hyperparams`, therefore give the
    same steps.
    """

    def init_outer(params):
        return _MeanRateState(jnp.zeros([]), outer.init(params))

    # Divide the displacement by the mean rate before the outer optimizer, and multiply
    # its step by the mean rate afterwards.
    def update_outer(updates, state, params=None, **extra_args):
        # A period with rates of 0 does not move; do not divide by 0.
        rate = jnp.where(state.rate > 0, state.rate, jnp.ones_like(state.rate))
        updates = jax.tree.map(lambda u: u / rate.astype(u.dtype), updates)
        updates, inner = inner_outer.update(updates, state.outer, params, **extra_args)
        updates = jax.tree.map(lambda u: u * state.rate.astype(u.dtype), updates)
        return updates, _MeanRateState(state.rate, inner)

    inner_outer = optax.with_extra_args_support(outer)
    scaled = optax.GradientTransformationExtraArgs(init_outer, update_outer)
    averaging = average_parameters(
        period=period, outer=scaled, fragments=fragments, axis_name=axis_name
    )

    # Update the mean rate of each fragment's period, in its state of `outer`.
    def update_fn(updates, state, params=None, **extra_args):
        rate = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.count)
        means = []
        for part, mean in enumerate(state.outer, start=1):
            # Steps since the fragment's last exchange, or since the start.
            since = (state.count - part * period // fragments) % period
            step = jnp.minimum(since, state.count).astype(mean.rate.dtype)
            new = (mean.rate * step + jnp.asarray(rate, step.dtype)) / (step + 1)
            means.append(mean._replace(rate=new))
        state = state._replace(outer=tuple(means))
        return averaging.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(averaging.init, update_fn)
