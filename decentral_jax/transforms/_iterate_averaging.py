"""Iterate averaging: the mean dynamics of detached error feedback."""

from typing import Any, NamedTuple

import jax
import optax

from decentral_jax._exchange.numbers import fitted, wide, wide_copy
from decentral_jax._validation import check_interval, check_trees, require_params

__all__ = ["IterateAveragingState", "iterate_averaging"]


class IterateAveragingState(NamedTuple):
    """State of `iterate_averaging`."""

    average: optax.Params  # like params, at least float32: x
    iterate: optax.Params  # like params, at least float32: z

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the average x."""
        return optax.tree.cast_like(self.average, params)


def iterate_averaging(
    delta: float | jax.Array, *, detach: float | jax.Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Evaluates gradients between an iterate and its running average.

    With the incoming update :math:`u`,

    .. math::
       z \leftarrow z + u, \qquad x \leftarrow (1 - \delta) x + \delta z, \qquad
       y = (1 - \lambda) x + \lambda z,

    where the parameters are :math:`y`, and `dj.eval_params` returns :math:`x`. These
    are the mean dynamics of `error_feedback` with a compressor that sends a fraction
    :math:`\delta` of the entries.

    Args:
      delta: :math:`\delta`, in (0, 1].
      detach: :math:`\lambda`, in [0, 1].

    Returns:
      The transformation. Place it last in a chain. It sends nothing, and keeps two
      copies of the parameters, at least float32.

    Raises:
      ValueError: If a number is out of range, if a tree is empty or trees do not match,
        or if `update` gets no `params`.

    References:
      Xu & Huang, "Detached Error Feedback for Distributed SGD with Random
      Sparsification", ICML 2022, Section 4.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), dj.iterate_averaging(0.25, detach=0.5))
      >>> params = jnp.zeros(1)
      >>> tx.update(jnp.array([-8.0]), tx.init(params), params)[0]
      Array([5.], dtype=float32)
    """
    delta = check_interval("delta", delta, 0.0, 1.0, closed="right")
    detach = check_interval("detach", detach, 0.0, 1.0)

    def init_fn(params: optax.Params) -> IterateAveragingState:
        params = require_params(params, "iterate_averaging")
        check_trees("params", params)
        copies = [jax.tree.map(wide_copy, params) for _ in range(2)]
        return IterateAveragingState(*copies)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, IterateAveragingState]:
        del extra_args
        params = require_params(params, "iterate_averaging")
        check_trees("params", params, state.iterate)
        check_trees("updates", updates, state.iterate)
        # The iterate z and its average x, in at least float32.
        z = jax.tree.map(lambda z, u: z + u.astype(z.dtype), state.iterate, updates)
        x = jax.tree.map(lambda x, z: x + fitted(delta, x) * (z - x), state.average, z)
        # The update that takes the parameters to the new y.
        updates = jax.tree.map(
            lambda x, z, y: ((x + fitted(detach, x) * (z - x)) - wide(y)).astype(
                y.dtype
            ),
            x,
            z,
            params,
        )
        return updates, IterateAveragingState(x, z)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
