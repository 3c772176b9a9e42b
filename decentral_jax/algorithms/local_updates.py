"""Algorithms that exchange seldom, or on directed graphs, by their papers' names."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax.algorithms.base import LearningRate, Optimizer, local_optimizer, sgd
from decentral_jax.collectives import AxisName, wide
from decentral_jax.topology import AnyTopology, complete
from decentral_jax.transforms.averaging import average_parameters
from decentral_jax.transforms.multi_level import multi_level
from decentral_jax.transforms.operating import operating_rates
from decentral_jax.transforms.push_sum import push_sum
from decentral_jax.transforms.quasi_global import quasi_global_momentum
from decentral_jax.validation import check_int, check_interval, check_learning_rate


def local_sgd(
    learning_rate: LearningRate,
    period: int,
    momentum: float | jax.Array | None = None,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Local SGD: own steps, and the exact mean of parameters every `period` of them.

    See `dj.average_parameters`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      period: Steps from one average to the next.
      momentum: Of the local step; its buffers stay local. Without effect beside `base`.
      base: Any optax optimizer in SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, Algorithm 1.
    """
    local = local_optimizer(learning_rate, base, momentum)
    return optax.chain(local, average_parameters(period, axis_name=axis_name))


def slowmo(
    learning_rate: LearningRate,
    period: int,
    slow_momentum: float | jax.Array = 0.5,
    slow_rate: float | jax.Array = 1.0,
    momentum: float | jax.Array | None = 0.9,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SlowMo: local steps, and slow momentum on the averaged way of a period.

    With :math:`\bar x` the mean after a period that began at :math:`z`, and
    :math:`\bar\gamma` the period's mean learning rate,

    .. math::
       u \leftarrow \beta u + (z - \bar x) / \bar\gamma, \qquad
       z \leftarrow z - \alpha \bar\gamma u.

    The mean is of the rates used in the period, one per call of `update`, for a
    schedule and for a rate injected by `optax.inject_hyperparams` alike. With a
    constant rate :math:`\bar\gamma` cancels. A schedule inside `base` is not visible
    here: :math:`\bar\gamma` is taken as constant, and cancels too.
    See `dj.average_parameters`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      period: Local steps in a period.
      slow_momentum: :math:`\beta`, in [0, 1).
      slow_rate: :math:`\alpha`, a number or a schedule over iterations.
      momentum: Of the local step; its buffers are kept. Without effect beside `base`.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Wang et al., "SlowMo: Improving Communication-Efficient Distributed SGD with Slow
      Momentum", ICLR 2020, Algorithm 1.
    """
    slow_momentum = check_interval(
        "slow_momentum", slow_momentum, 0.0, 1.0, closed="left"
    )
    check_learning_rate(slow_rate, "slow_rate")
    period = check_int("period", period, minimum=1)
    outer = _outer_sgd(slow_rate, slow_momentum)
    local = local_optimizer(learning_rate, base, momentum)
    # `optax.inject_hyperparams` passes this iteration's rate as an array.
    if learning_rate is None or isinstance(learning_rate, numbers.Real):
        averaging = average_parameters(period, outer, axis_name=axis_name)
    else:
        averaging = _average_by_mean_rate(learning_rate, period, outer, axis_name)
    return optax.chain(local, averaging)


def diloco(
    learning_rate: LearningRate,
    period: int,
    outer_rate: float | jax.Array = 0.7,
    outer_momentum: float | jax.Array = 0.9,
    fragments: int = 1,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""DiLoCo: AdamW on each worker, Nesterov momentum on the averaged difference.

    With `fragments` above 1, the parts of the model take turns (Streaming DiLoCo,
    without its overlap and quantization). See `dj.average_parameters`.

    Args:
      learning_rate: AdamW's, a number or schedule; None with `base`.
      period: Local steps from one exchange to the next, some hundreds.
      outer_rate: The outer learning rate, a number or a schedule over iterations.
      outer_momentum: The outer momentum, in [0, 1).
      fragments: Parts that are exchanged in turns.
      base: Any optax optimizer in AdamW's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
      Models", 2023, Algorithm 1; Douillard et al., "Streaming DiLoCo with overlapping
      communication", 2025, Section 2.1.
    """
    outer_momentum = check_interval(
        "outer_momentum", outer_momentum, 0.0, 1.0, closed="left"
    )
    check_learning_rate(outer_rate, "outer_rate")
    if base is None and learning_rate is not None:
        check_learning_rate(learning_rate)
        base, learning_rate = optax.adamw(learning_rate), None
    local = local_optimizer(learning_rate, base)
    outer = _outer_sgd(outer_rate, outer_momentum, nesterov=True)
    return optax.chain(local, average_parameters(period, outer, fragments, axis_name))


def mll_sgd(
    learning_rate: LearningRate,
    hub_topology: AnyTopology,
    tau: int,
    q: int,
    rates: Any = 1.0,
    shares: Any = None,
    base: optax.GradientTransformation | None = None,
    seed: int = 0,
    hub_axis: str = "hub",
    worker_axis: str = "worker",
) -> Optimizer:
    r"""Multi-Level Local SGD: hubs and workers that step at rates of their own.

    In each tick worker :math:`i` takes a step with probability :math:`p_i`; every
    :math:`\tau` ticks hubs average, every :math:`q \tau` ticks they mix with other
    hubs. Nobody waits for slow workers. See `dj.multi_level` and `dj.operating_rates`.

    Args:
      learning_rate: :math:`\gamma`, a number or a schedule over ticks; None with
        `base`, whose schedules count a worker's own steps.
      hub_topology: A doubly stochastic topology or schedule of the hubs.
      tau: :math:`\tau`, ticks from one average inside hubs to the next.
      q: Averages inside hubs from one exchange between hubs to the next.
      rates: :math:`p_i`, in (0, 1]: a number, or a row a hub.
      shares: Each worker's share of all data, a row a hub; equal if None.
      base: Any optax optimizer in plain SGD's place.
      seed: Of the draws of who operates.
      hub_axis: The axis of hubs.
      worker_axis: The axis of workers in a hub.

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
    axes = (hub_axis, worker_axis)
    local = local_optimizer(1.0 if callable(learning_rate) else learning_rate, base)
    parts: list[optax.GradientTransformation]
    parts = [operating_rates(local, rates, seed, axes)]
    if callable(learning_rate):
        # Outside: inside, the schedule would count a worker's own steps.
        parts.append(optax.scale_by_schedule(learning_rate))
    return optax.chain(*parts, multi_level(hub_topology, tau, q, shares, *axes))


def hl_sgd(
    learning_rate: LearningRate,
    num_hubs: int,
    tau: int,
    q: int,
    shares: Any = None,
    base: optax.GradientTransformation | None = None,
    hub_axis: str = "hub",
    worker_axis: str = "worker",
) -> Optimizer:
    r"""Hierarchical Local SGD: `mll_sgd` on a complete hub graph, all at work.

    See `dj.multi_level`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      num_hubs: The number of hubs.
      tau: Steps from one average inside hubs to the next.
      q: Averages inside hubs from one over all workers to the next.
      shares: Each worker's share of all data, a row a hub; equal if None.
      base: Any optax optimizer in plain SGD's place.
      hub_axis: The axis of hubs.
      worker_axis: The axis of workers in a hub.

    Returns:
      The transformation.

    References:
      Lin, Stich, Patel & Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR
      2020, Section 4 (hierarchical local SGD).
    """
    hubs = complete(check_int("num_hubs", num_hubs, minimum=1))
    local = local_optimizer(learning_rate, base)
    return optax.chain(local, multi_level(hubs, tau, q, shares, hub_axis, worker_axis))


def sgp(
    learning_rate: LearningRate,
    topology: AnyTopology,
    momentum: float | jax.Array | None = None,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Stochastic gradient push, for directed graphs. See `dj.push_sum`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      topology: A topology or schedule whose columns sum to one.
      momentum: Of the local step; without effect beside `base`.
      base: Any optax optimizer in SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML
      2019, Algorithm 1.
    """
    local = local_optimizer(learning_rate, base, momentum)
    return optax.chain(local, push_sum(topology, axis_name))


def qg_dsgdm(
    learning_rate: optax.ScalarOrSchedule,
    topology: AnyTopology,
    momentum: float | jax.Array = 0.9,
    factor: float | jax.Array | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Decentralized SGD with quasi-global momentum. See `dj.quasi_global_momentum`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule.
      topology: A doubly stochastic topology or schedule.
      momentum: :math:`\beta`, in [0, 1).
      factor: How much of the last way enters the momentum; `1 - momentum` if None.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Lin et al., "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on
      Heterogeneous Data", ICML 2021, Algorithm 1.
    """
    return quasi_global_momentum(learning_rate, topology, momentum, factor, axis_name)


class _MeanRateState(NamedTuple):
    """State of the outer optimizer that works in units of the mean rate."""

    rate: jax.typing.ArrayLike  # shape=(), float: mean rate of the period so far
    outer: Any


def _outer_sgd(
    rate: optax.ScalarOrSchedule, momentum: Any, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD for `average_parameters`, whose schedule counts iterations."""
    if not callable(rate):
        # Models are averaged at least in float32, and an injected rate meets them.
        rate = wide(rate) if isinstance(rate, jax.Array) else rate
        return sgd(rate, momentum, nesterov)

    def scale(updates, state, params=None, **extra_args: Any) -> Any:
        del params
        factor = jnp.asarray(rate(extra_args["step"]))
        scaled = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return scaled, state

    by_step = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), scale
    )
    return optax.chain(sgd(1.0, momentum, nesterov), by_step)


def _average_by_mean_rate(
    learning_rate: Any,
    period: int,
    outer: optax.GradientTransformation,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """`average_parameters` whose outer step is scaled by the period's mean rate.

    The mean is of the rates used, one per call of `update`, so a schedule and the same
    schedule under `optax.inject_hyperparams` give the same steps.
    """

    def init_outer(params):
        return _MeanRateState(jnp.zeros([]), outer.init(params))

    def update_outer(updates, state, params=None, **extra_args):
        # A period whose rates are all zero does not move; do not divide by its rate.
        rate = jnp.where(state.rate > 0, state.rate, jnp.ones_like(state.rate))
        updates = jax.tree.map(lambda u: u / rate.astype(u.dtype), updates)
        updates, inner = inner_outer.update(updates, state.outer, params, **extra_args)
        updates = jax.tree.map(lambda u: u * state.rate.astype(u.dtype), updates)
        return updates, _MeanRateState(state.rate, inner)

    inner_outer = optax.with_extra_args_support(outer)
    scaled = optax.GradientTransformationExtraArgs(init_outer, update_outer)
    averaging = average_parameters(period, scaled, axis_name=axis_name)

    def update_fn(updates, state, params=None, **extra_args):
        rate = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.count)
        (mean,) = state.outer
        step = (state.count % period).astype(mean.rate.dtype)
        rate = (mean.rate * step + jnp.asarray(rate, step.dtype)) / (step + 1)
        state = state._replace(outer=(mean._replace(rate=rate),))
        return averaging.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(averaging.init, update_fn)
