"""Algorithms with compressed communication."""

import math

import jax
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax._validation import check_interval
from decentral_jax.algorithms._base import Optimizer, OptimizerLike, local_optimizer
from decentral_jax.compression import Codec, Compressor, low_rank
from decentral_jax.topology import Topology
from decentral_jax.transforms._averaging import average_gradients
from decentral_jax.transforms._compressed_gossip import compressed_gossip
from decentral_jax.transforms._error_feedback import Evaluate, error_feedback
from decentral_jax.transforms._error_reset import error_reset
from decentral_jax.transforms._iterate_averaging import iterate_averaging

__all__ = [
    "choco_sgd",
    "cser",
    "def_a_sgd",
    "def_sgd",
    "ef_sgd",
    "powersgd",
    "sgd_ia",
]


def ef_sgd(
    optimizer: OptimizerLike,
    compressor: Compressor,
    *,
    period: int = 1,
    feedback: float | jax.Array = 1.0,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with error feedback.

    :math:`p_i = e_i + \gamma m_i,\ x \leftarrow x - \frac1n \sum_j C(p_j),\
    e_i \leftarrow p_i - C(p_i)`. See `dj.error_feedback` for all arguments.

    Args:
      optimizer: The local step, taken before compression: a learning rate
        :math:`\gamma` or schedule of plain SGD, or any optax optimizer, such as
        `optax.sgd(0.05, momentum=0.9)`.
      compressor: :math:`C`, from `dj.compression`.
      period: Steps between exchanges.
      feedback: Share of the residual that is fed back.
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes", ICML 2019, Algorithm 2.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.ef_sgd(0.1, dj.compression.sign())
    """
    return def_sgd(
        optimizer,
        compressor,
        detach=0.0,
        period=period,
        feedback=feedback,
        seed=seed,
        axis_name=axis_name,
    )


def def_sgd(
    optimizer: OptimizerLike,
    compressor: Compressor,
    *,
    detach: float | jax.Array = 0.3,
    period: int = 1,
    feedback: float | jax.Array = 1.0,
    evaluate: Evaluate = "shared",
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Detached error feedback, DEF.

    EF-SGD whose gradients are taken at :math:`y_i = x - \lambda e_i`; evaluates at
    :math:`x`. See `dj.error_feedback` for all arguments.

    Args:
      optimizer: The local step, as in `ef_sgd`.
      compressor: :math:`C`, from `dj.compression`; as published, `random_block(64)`.
      detach: :math:`\lambda`, in [0, 1]; 1 is step-ahead error feedback.
      period: Steps between exchanges.
      feedback: Share of the residual that is fed back.
      evaluate: "shared" evaluates at :math:`x`, "averaged" as `def_a_sgd` does.
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Algorithm 1.

    Example:
      >>> import decentral_jax as dj, optax
      >>> momentum_sgd = optax.sgd(0.05, momentum=0.9)
      >>> tx = dj.def_sgd(momentum_sgd, dj.compression.random_block(64))
    """
    feed = error_feedback(
        compressor,
        detach=detach,
        period=period,
        feedback=feedback,
        evaluate=evaluate,
        seed=seed,
        axis_name=axis_name,
    )
    return optax.chain(local_optimizer(optimizer), feed)


def def_a_sgd(
    optimizer: OptimizerLike,
    compressor: Compressor,
    *,
    detach: float | jax.Array = 0.3,
    period: int = 1,
    feedback: float | jax.Array = 1.0,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Detached error feedback with averaging, DEF-A.

    Trains exactly as `def_sgd`, with the same arguments, and evaluates at
    :math:`x - \frac1n \sum_i e_i`, which includes everything not yet sent.

    Args:
      optimizer: The local step, as in `ef_sgd`.
      compressor: :math:`C`, from `dj.compression`.
      detach: :math:`\lambda`, in [0, 1].
      period: Steps between exchanges.
      feedback: Share of the residual that is fed back.
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.def_a_sgd(0.1, dj.compression.random_block(64))
    """
    return def_sgd(
        optimizer,
        compressor,
        detach=detach,
        period=period,
        feedback=feedback,
        evaluate="averaged",
        seed=seed,
        axis_name=axis_name,
    )


def sgd_ia(
    optimizer: OptimizerLike,
    *,
    ratio: float | jax.Array,
    detach: float | jax.Array = 0.3,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with iterate averaging: the mean dynamics of DEF, without compression.

    See `dj.iterate_averaging`, with :math:`\delta = 1 / r`.

    Args:
      optimizer: The step on the averaged gradient: a learning rate or schedule of plain
        SGD, or any optax optimizer.
      ratio: :math:`r \ge 1`, the compression ratio that it stands for.
      detach: :math:`\lambda`, in [0, 1].
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Section 4.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.sgd_ia(0.1, ratio=64)
    """
    ratio = check_interval("ratio", ratio, 1.0, math.inf, closed="left")
    return optax.chain(
        average_gradients(axis_name=axis_name),
        local_optimizer(optimizer),
        iterate_averaging(1 / ratio, detach=detach),
    )


def cser(
    optimizer: OptimizerLike,
    compressor: Compressor,
    *,
    reset_compressor: Compressor | None = None,
    period: int = 8,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with error reset, CSER. See `dj.error_reset`.

    Args:
      optimizer: The local step, as in `ef_sgd`.
      compressor: Compressor for the steps.
      reset_compressor: Compressor for the errors. None takes `compressor`.
      period: Steps between resets.
      seed: Seed for the compressors' random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
      Algorithm 2.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.cser(0.1, dj.compression.random_block(8), period=4)
    """
    reset = error_reset(
        compressor,
        reset_compressor=reset_compressor,
        period=period,
        seed=seed,
        axis_name=axis_name,
    )
    return optax.chain(local_optimizer(optimizer), reset)


def choco_sgd(
    optimizer: OptimizerLike,
    topology: Topology,
    compressor: Codec,
    *,
    consensus_rate: float | jax.Array,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""CHOCO-SGD: gossip of compressed differences. See `dj.compressed_gossip`.

    Args:
      optimizer: The local step: a learning rate or schedule of plain SGD, or any optax
        optimizer.
      topology: Static, doubly stochastic and connected.
      compressor: A codec: any of `dj.compression` except `low_rank`.
      consensus_rate: :math:`\zeta`, in (0, 1].
      seed: Seed for the compressor's random numbers.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Koloskova, Stich & Jaggi, "Decentralized Stochastic Optimization and Gossip
      Algorithms with Compressed Communication", ICML 2019, Algorithm 2.

    Example:
      >>> import decentral_jax as dj
      >>> ring, sign = dj.topology.ring(8), dj.compression.sign()
      >>> tx = dj.choco_sgd(0.1, ring, sign, consensus_rate=0.2)
    """
    gossiped = compressed_gossip(
        topology,
        compressor,
        consensus_rate=consensus_rate,
        seed=seed,
        axis_name=axis_name,
    )
    return optax.chain(local_optimizer(optimizer), gossiped)


def powersgd(
    optimizer: OptimizerLike,
    *,
    rank: int,
    feedback: float | jax.Array = 1.0,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""PowerSGD: low-rank gradients with error feedback; momentum after averaging.

    As published, momentum SGD follows the average. The authors' program steps by
    :math:`g + m`; the heavy ball of `optax.sgd(rate, momentum=mu)` steps by :math:`m`
    alone, and `nesterov=True` by :math:`g + \mu m`. See `dj.compression.low_rank` and
    `dj.error_feedback`.

    Args:
      optimizer: The step on the averaged gradient: a learning rate or schedule of plain
        SGD, or any optax optimizer.
      rank: Number of columns of the factors.
      feedback: Share of the residual that is fed back.
      axis_name: Name of the worker axis.

    Returns:
      The transformation; all workers take the same step.

    References:
      Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
      for Distributed Optimization", NeurIPS 2019, Algorithms 1 and 2.

    Example:
      >>> import decentral_jax as dj, optax
      >>> tx = dj.powersgd(optax.sgd(0.1, momentum=0.9), rank=4)
    """
    feed = error_feedback(low_rank(rank), feedback=feedback, axis_name=axis_name)
    return optax.chain(feed, local_optimizer(optimizer, alone=True))
