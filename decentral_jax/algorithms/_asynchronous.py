"""Asynchronous algorithms."""

from collections.abc import Callable

import jax
import optax

from decentral_jax._exchange.axis import AxisName
from decentral_jax.algorithms._base import Optimizer
from decentral_jax.traces import Trace
from decentral_jax.transforms._amsgrad import amsgrad
from decentral_jax.transforms._asynchronous import asynchronous

__all__ = ["apam"]


def apam(
    learning_rate: optax.ScalarOrSchedule,
    trace: Trace,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array | None = None,
    projection: Callable[[optax.Params], optax.Params] | None = None,
    axis_name: AxisName = "workers",
) -> Optimizer:
    """APAM: AMSGrad on a master whose workers send stale gradients.

    See `dj.asynchronous` for the master and `dj.amsgrad` for its step. To run another
    optimizer on the master, use `dj.asynchronous(optimizer, trace)`.

    Args:
      learning_rate: A number, or a schedule over the master's ticks.
      trace: Which worker arrives when, and how stale its gradient is; see `dj.traces`.
      b1: As in `dj.amsgrad`.
      b2: As in `dj.amsgrad`.
      eps: As in `dj.amsgrad`.
      weight_decay: As in `dj.amsgrad`.
      projection: As in `dj.amsgrad`.
      axis_name: Name of the worker axis.

    Returns:
      The transformation.

    References:
      Xu et al., "Parallel and distributed asynchronous adaptive stochastic gradient
      methods", Math. Prog. Comp. 2023, Algorithm 1.

    Example:
      >>> import decentral_jax as dj
      >>> trace = dj.traces.from_speeds([1.0, 1.0, 3.0], num_ticks=1000)
      >>> tx = dj.apam(1e-3, trace)
    """
    inner = amsgrad(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        projection=projection,
    )
    return asynchronous(inner, trace, axis_name=axis_name)
