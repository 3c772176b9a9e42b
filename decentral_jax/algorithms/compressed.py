"""Algorithms that send fewer bytes in each exchange, by their papers' names."""

import math

import jax
import optax

from decentral_jax.algorithms.base import LearningRate, Optimizer, local_optimizer
from decentral_jax.collectives import AxisName
from decentral_jax.compression import Compressor, low_rank
from decentral_jax.topology import Topology
from decentral_jax.transforms.averaging import average_gradients
from decentral_jax.transforms.compressed_gossip import compressed_gossip
from decentral_jax.transforms.error_feedback import error_feedback
from decentral_jax.transforms.error_reset import error_reset
from decentral_jax.transforms.iterate_averaging import iterate_averaging
from decentral_jax.validation import check_interval


def ef_sgd(
    learning_rate: LearningRate,
    compressor: Compressor,
    momentum: float | jax.Array | None = 0.9,
    period: int = 1,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with error feedback.

    :math:`p_i = e_i + \gamma m_i,\ x \leftarrow x - \frac1n \sum_j C(p_j),\
    e_i \leftarrow p_i - C(p_i)`. See `dj.error_feedback`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      compressor: :math:`C`, one of `dj.compression`.
      momentum: Of the local step, before compression; without effect beside `base`.
      period: Steps from one exchange to the next.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes", ICML 2019, Algorithm 2.
    """
    return def_sgd(learning_rate, compressor, 0.0, momentum, period, base, axis_name)


def def_sgd(
    learning_rate: LearningRate,
    compressor: Compressor,
    detach: float | jax.Array = 0.3,
    momentum: float | jax.Array | None = 0.9,
    period: int = 1,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Detached error feedback, DEF.

    EF-SGD whose gradients are taken at :math:`y_i = x - \lambda e_i`; evaluates at
    :math:`x`. See `dj.error_feedback`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      compressor: :math:`C`, one of `dj.compression`; as published, `random_block(64)`.
      detach: :math:`\lambda`, in [0, 1]; 1 is step-ahead error feedback.
      momentum: Of the local step, before compression; without effect beside `base`.
      period: Steps from one exchange to the next.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> tx = dj.def_sgd(0.05, dj.compression.random_block(64))
    """
    feedback = error_feedback(compressor, detach, period, axis_name=axis_name)
    return optax.chain(local_optimizer(learning_rate, base, momentum), feedback)


def def_a_sgd(
    learning_rate: LearningRate,
    compressor: Compressor,
    detach: float | jax.Array = 0.3,
    momentum: float | jax.Array | None = 0.9,
    period: int = 1,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""Detached error feedback with averaging, DEF-A.

    Trains as `def_sgd`, with the same arguments, and evaluates at
    :math:`x - \frac1n \sum_i e_i`, where all that was kept back is counted in.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      compressor: :math:`C`, one of `dj.compression`.
      detach: :math:`\lambda`, in [0, 1].
      momentum: Of the local step, before compression; without effect beside `base`.
      period: Steps from one exchange to the next.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022.
    """
    feedback = error_feedback(
        compressor, detach, period, evaluate="averaged", axis_name=axis_name
    )
    return optax.chain(local_optimizer(learning_rate, base, momentum), feedback)


def sgd_ia(
    learning_rate: LearningRate,
    ratio: float | jax.Array,
    detach: float | jax.Array = 0.3,
    momentum: float | jax.Array | None = 0.9,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with iterate averaging: the mean dynamics of DEF, without compression.

    See `dj.iterate_averaging`, with :math:`\delta = 1 / r`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      ratio: :math:`r`, the ratio of the compressor that it stands for.
      detach: :math:`\lambda`, in [0, 1].
      momentum: Of the step; without effect beside `base`.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Section 4.
    """
    ratio = check_interval("ratio", ratio, 1.0, math.inf, closed="left")
    return optax.chain(
        average_gradients(axis_name),
        local_optimizer(learning_rate, base, momentum),
        iterate_averaging(1 / ratio, detach),
    )


def cser(
    learning_rate: LearningRate,
    compressor: Compressor,
    reset_compressor: Compressor | None = None,
    period: int = 8,
    momentum: float | jax.Array | None = 0.9,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""SGD with error reset, CSER. See `dj.error_reset`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      compressor: For the steps.
      reset_compressor: For the errors; `compressor` if None.
      period: Steps from one reset to the next.
      momentum: Of the local step, before compression; without effect beside `base`.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
      Algorithm 2.
    """
    reset = error_reset(compressor, reset_compressor, period, axis_name=axis_name)
    return optax.chain(local_optimizer(learning_rate, base, momentum), reset)


def choco_sgd(
    learning_rate: LearningRate,
    topology: Topology,
    compressor: Compressor,
    consensus_rate: float | jax.Array,
    momentum: float | jax.Array | None = None,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""CHOCO-SGD: gossip of compressed differences. See `dj.compressed_gossip`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      topology: Static, doubly stochastic, connected.
      compressor: One of `dj.compression` but `low_rank`.
      consensus_rate: :math:`\zeta`, in (0, 1].
      momentum: Of the local step; without effect beside `base`.
      base: Any optax optimizer in SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation.

    References:
      Koloskova, Stich & Jaggi, "Decentralized Stochastic Optimization and Gossip
      Algorithms with Compressed Communication", ICML 2019, Algorithm 2.
    """
    gossiped = compressed_gossip(
        topology, compressor, consensus_rate, axis_name=axis_name
    )
    return optax.chain(local_optimizer(learning_rate, base, momentum), gossiped)


def powersgd(
    learning_rate: LearningRate,
    rank: int,
    momentum: float | jax.Array | None = 0.9,
    base: optax.GradientTransformation | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    r"""PowerSGD: low-rank gradients with error feedback, momentum after averaging.

    The momentum is the heavy ball of `optax.sgd`, which steps by :math:`m` alone.
    The authors' program steps by :math:`g + m`; optax's `nesterov=True` would step by
    :math:`g + \mu m`. See `dj.compression.low_rank` and `dj.error_feedback`.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule; None with `base`.
      rank: Columns of the factors.
      momentum: Of the step, after decompression; without effect beside `base`.
      base: Any optax optimizer in momentum SGD's place.
      axis_name: The worker axis.

    Returns:
      The transformation; all workers take the same step.

    References:
      Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
      for Distributed Optimization", NeurIPS 2019, Algorithms 1 and 2.
    """
    feedback = error_feedback(low_rank(rank), axis_name=axis_name)
    local = local_optimizer(learning_rate, base, momentum, alone=True)
    return optax.chain(feedback, local)
