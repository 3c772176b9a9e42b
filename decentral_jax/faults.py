"""What goes wrong while training: missing workers, gradients that are not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax.validation import check_int

__all__ = ["GuardState", "guard_gradients", "takes_part"]


def takes_part(
    step: jax.typing.ArrayLike,
    missing: int,
    *,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> jax.Array:
    """Whether this worker takes part in a round, where some are missing at random.

    Exactly `missing` of all workers are missing in every round, drawn anew for each.

    Args:
      step: The round, an integer equal on all workers.
      missing: How many, fewer than there are workers.
      seed: Of the draw.
      axis_name: The worker axis.

    Returns:
      A boolean, for the keyword `active` of `dj.mix` and of `update`.

    Raises:
      ValueError: If `missing` is out of range.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> ring = dj.topology.ring(8)
      >>> def gossip(x, t):
      ...     return dj.mix(x, ring, active=dj.takes_part(t, missing=2))
      >>> mapped = jax.vmap(gossip, axis_name="workers", in_axes=(0, None))
      >>> mapped(jnp.arange(8.0), 0).mean()  # as before
      Array(3.5, dtype=float32)
    """
    axis = WorkerAxis.bind(axis_name)
    size = axis.size
    missing = check_int("missing", missing, minimum=0)
    check_int("seed", seed, minimum=0)
    if missing >= size:
        raise ValueError(
            f"missing={missing} must be fewer than the {size} workers of the axis "
            f"{axis_name!r}."
        )
    step = axis.unvmap(jnp.asarray(step))
    key = jax.random.fold_in(jax.random.key(seed), step)
    place = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))
    return place[axis.index] >= missing


class GuardState(NamedTuple):
    """State of `guard_gradients`."""

    refused: jax.typing.ArrayLike  # shape=(), dtype=int32: of this worker, so far


def guard_gradients() -> optax.GradientTransformationExtraArgs:
    """Keeps gradients that are not finite out of the network, and counts them.

    A gradient with an infinity or NaN anywhere becomes zero as a whole, on the worker
    that has it alone: the others do not hear of it. An average over all workers is then
    one over n with a zero in it.

    Returns:
      The transformation; place it first in a chain. `refused` in its state counts.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.guard_gradients(), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), state)
      >>> updates, optax.tree.get(state, "refused")
      (Array([-0., -0.], dtype=float32), Array(1, dtype=int32))
    """

    def init_fn(params):
        del params
        return GuardState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        del params, extra_args
        leaves = jax.tree.leaves(updates)
        if not leaves:  # nothing to refuse, as where optax.masked leaves all out
            return updates, state
        good = jnp.stack([jnp.isfinite(g).all() for g in leaves]).all()
        updates = jax.tree.map(lambda g: jnp.where(good, g, jnp.zeros_like(g)), updates)
        refused = jnp.where(good, state.refused, optax.safe_increment(state.refused))
        return updates, GuardState(refused)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
