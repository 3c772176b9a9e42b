"""Faults during training: missing workers and non-finite gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._validation import check_int

__all__ = ["ZeroNonfiniteState", "sample_active", "zero_nonfinite_updates"]


def sample_active(
    step: jax.typing.ArrayLike,
    missing: int,
    *,
    seed: int = 0,
    axis_name: AxisName = "workers",
) -> jax.Array:
    """Returns whether this worker takes part in a round with missing workers.

    Exactly `missing` workers are missing in every round. Each round draws them
    independently and uniformly at random.

    Args:
      step: Number of the round, an integer scalar that is equal on all workers.
      missing: Number of missing workers per round, less than the number of workers.
      seed: Seed for the random choice of the missing workers.
      axis_name: Name of the worker axis.

    Returns:
      A boolean scalar to pass as the keyword `active` to `dj.mix` or `update`.

    Raises:
      TypeError: If `missing` or `seed` is not an integer.
      ValueError: If `missing` or `seed` is out of range.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> ring = dj.topology.ring(8)
      >>> def gossip(x, t):
      ...     return dj.mix(x, ring, active=dj.sample_active(t, missing=2))
      >>> mapped = jax.vmap(gossip, axis_name="workers", in_axes=(0, None))
      >>> mapped(jnp.arange(8.0), 0).mean()  # the mean is preserved
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
    # All workers draw the same permutation. Workers in the first places are missing.
    place = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))
    return place[axis.index] >= missing


class ZeroNonfiniteState(NamedTuple):
    """State of `zero_nonfinite_updates`."""

    refused: jax.typing.ArrayLike  # shape=(), dtype=int32: this worker's count so far


def zero_nonfinite_updates() -> optax.GradientTransformationExtraArgs:
    """Replaces non-finite gradients by zeros, and counts them.

    If any entry of a worker's gradient is infinite or NaN, the whole gradient of this
    worker becomes zero. The other workers are not affected and not notified. An average
    over all `n` workers still divides by `n`, with a zero for this worker.

    Returns:
      The transformation. Place it first in a chain. The field `refused` of its state
      counts the replaced gradients of this worker.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.zero_nonfinite_updates(), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), state)
      >>> updates, optax.tree.get(state, "refused")
      (Array([-0., -0.], dtype=float32), Array(1, dtype=int32))
    """

    def init_fn(params: optax.Params) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        leaves = jax.tree.leaves(updates)
        # There are no leaves if, for example, optax.masked masks all of them.
        if not leaves:
            return updates, state
        good = jnp.stack([jnp.isfinite(g).all() for g in leaves]).all()
        updates = jax.tree.map(lambda g: jnp.where(good, g, jnp.zeros_like(g)), updates)
        refused = jnp.where(good, state.refused, optax.safe_increment(state.refused))
        return updates, ZeroNonfiniteState(refused)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
