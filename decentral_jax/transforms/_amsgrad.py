"""AMSGrad with projections: the optimizer of APAM's master."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.numbers import fitted, wide, wide_zeros
from decentral_jax._validation import (
    check_interval,
    check_learning_rate,
    require_params,
)

__all__ = ["ScaleByAmsgradState", "amsgrad", "project"]


class ScaleByAmsgradState(NamedTuple):
    """State of `amsgrad`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: steps so far
    # All like params, at least float32.
    mean: optax.Updates  # m
    square: optax.Updates  # v
    largest: optax.Updates  # v hat, the elementwise maximum of all v so far


def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array | None = None,
    projection: Callable[[optax.Params], optax.Params] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Constructs AMSGrad in the form that APAM's master uses.

    It does not communicate, so it also works without a worker axis.

    .. math::
       m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
       \hat v \leftarrow \max(\hat v, v), \\
       x &\leftarrow P\Bigl(x - \gamma \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k}
       \frac{m}{\sqrt{\hat v} + \epsilon}\Bigr), \qquad k = 1, 2, \dots

    It differs from `optax.amsgrad` in two ways: it takes the maximum of the :math:`v`
    before it corrects the bias, and it adds :math:`\epsilon` before it corrects the
    bias.

    Args:
      learning_rate: :math:`\gamma`, a number or schedule.
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, at least 0.
      weight_decay: Weight decay rate, at least 0. The product of the rate and the
        parameters is added to the gradient.
      projection: :math:`P`, a function from parameters to the nearest feasible ones,
        for example
        `functools.partial(optax.projections.projection_box, lower=-1, upper=1)`. The
        module `optax.projections` has boxes, balls and simplices.

    Returns:
      The transformation. It keeps three copies of the parameters.

    Raises:
      ValueError: If a number is out of range, or if `update` gets no `params` although
        `weight_decay` or `projection` is given.

    References:
      Xu et al., "Parallel and distributed asynchronous adaptive stochastic gradient
      methods", Math. Prog. Comp. 2023, (3) to (6).

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> tx = dj.amsgrad(0.1)
      >>> params = jnp.array([1.0, -1.0])
      >>> updates, state = tx.update(jnp.array([4.0, -2.0]), tx.init(params), params)
      >>> bool(jnp.allclose(updates, jnp.array([-0.1, 0.1])))
      True
    """
    check_learning_rate(learning_rate)
    b1 = check_interval("b1", b1, 0.0, 1.0, closed="left")
    b2 = check_interval("b2", b2, 0.0, 1.0, closed="left")
    eps = check_interval("eps", eps, 0.0, float("inf"))
    parts = [
        _scale_by_amsgrad(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if weight_decay is not None:
        decay = check_interval("weight_decay", weight_decay, 0.0, float("inf"))
        parts.insert(0, _add_decayed_weights(decay))
    if projection is not None:
        parts.append(project(projection))
    return optax.chain(*parts)


def _add_decayed_weights(
    decay: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Adds the decayed parameters to the gradient, in the dtype of the gradient.

    Unlike `optax.add_decayed_weights`, it accepts parameters of a wider dtype than an
    injected decay rate, such as a master's iterate.
    """

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        params = require_params(params, "amsgrad with weight_decay")

        def add(g: jax.Array, x: jax.Array) -> jax.Array:
            return g + (fitted(decay, x) * x).astype(g.dtype)

        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def _scale_by_amsgrad(
    b1: float | jax.Array, b2: float | jax.Array, eps: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: optax.Params) -> ScaleByAmsgradState:
        zeros = [jax.tree.map(wide_zeros, params) for _ in range(3)]
        return ScaleByAmsgradState(jnp.zeros([], jnp.int32), *zeros)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAmsgradState]:
        del params, extra_args
        count = optax.safe_increment(jnp.asarray(state.count))
        # The moments m, v and v hat, in at least float32.
        gradient = jax.tree.map(wide, updates)
        mean = jax.tree.map(lambda m, g: _toward(m, g, b1), state.mean, gradient)
        square = jax.tree.map(
            lambda v, g: _toward(v, g * g, b2), state.square, gradient
        )
        largest = jax.tree.map(jnp.maximum, state.largest, square)
        # The bias correction sqrt(1 - b2^k) / (1 - b1^k).
        steps = jnp.asarray(count, jnp.result_type(float))
        first, second = (1 - fitted(b, steps) ** steps for b in (b1, b2))
        factor = jnp.sqrt(second) / first

        def direction(m: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            step = factor.astype(m.dtype) * m / (jnp.sqrt(v) + fitted(eps, v))
            return step.astype(jnp.result_type(g))

        updates = jax.tree.map(direction, mean, largest, updates)
        return updates, ScaleByAmsgradState(count, mean, square, largest)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _toward(old: jax.Array, new: jax.Array, decay: float | jax.Array) -> jax.Array:
    """Returns the next value of an exponential moving average."""
    return fitted(decay, old) * old + fitted(1 - decay, new) * new


def project(
    projection: Callable[[optax.Params], optax.Params],
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps parameters in a feasible set by projecting them after each update.

    .. math:: x \leftarrow P(x + u)

    Args:
      projection: :math:`P`, a function from parameters to the nearest feasible ones;
        see `optax.projections`.

    Returns:
      The transformation. Place it last in a chain.

    Raises:
      TypeError: If `projection` is not a function.
      ValueError: If `update` gets no `params`.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), dj.project(lambda x: jnp.clip(x, -1, 1)))
      >>> params = jnp.zeros(2)
      >>> tx.update(jnp.array([5.0, 0.5]), tx.init(params), params)[0]
      Array([-1. , -0.5], dtype=float32)
    """
    if not callable(projection):
        raise TypeError(
            f"projection must be a function of parameters, got {projection!r}: if you "
            "use optax.inject_hyperparams, which treats functions as schedules, pass "
            'static_args=("projection",) to it.'
        )

    def update_fn(
        updates: optax.Updates,
        state,
        params=None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        params = require_params(params, "project")
        ends = projection(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, ends, params), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
