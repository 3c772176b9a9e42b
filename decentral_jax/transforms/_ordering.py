"""Example orders, kept in the optimizer state.

Ordering transformations come first in a chain. They take the gradients of single
examples (or of microbatches that stay together) with a leading axis, and pass on their
mean. Their state holds the order in which the worker visits its examples. This module
has the common parts of all methods; the methods that balance gradients are in `_grab`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import PyTree
from decentral_jax._nnx import values
from decentral_jax._validation import (
    check_axis_name,
    check_int,
    check_trees,
    require_params,
)
from decentral_jax.transforms._balancing import Leaves, mean_of

__all__ = ["OrderingState", "next_examples", "random_reshuffling"]


class OrderingState(NamedTuple):
    """State of the ordering transformations."""

    epoch: jax.typing.ArrayLike  # shape=(), dtype=int32: number of finished epochs
    position: jax.typing.ArrayLike  # shape=(), dtype=int32: examples seen in this epoch
    order: jax.Array  # shape=[N], dtype=int32: this epoch's order
    following: jax.Array  # shape=[N], dtype=int32: the next epoch's order so far
    balance: PyTree  # running sums of the method

    def next_examples(self, batch_size: int) -> jax.Array:
        """Returns the numbers of the next examples, `[batch_size]`."""
        n = self.order.shape[0]
        # The last batch of an epoch wraps around to the epoch's first examples.
        return self.order[(self.position + jnp.arange(batch_size, dtype=jnp.int32)) % n]


def next_examples(opt_state: optax.OptState, batch_size: int) -> jax.Array:
    """Returns the examples whose gradients this worker computes next.

    Args:
      opt_state: Optimizer state, as returned by `init` and `update`. The state of the
        ordering transformation is found in it, also inside `optax.chain`.
      batch_size: Number of examples in this step. If it does not divide the number of
        examples, the last batch of an epoch is padded with the epoch's first examples.
        Their gradients count in the mean, but not for the order.

    Returns:
      Numbers of this worker's examples, shape `[batch_size]`, int32.

    Raises:
      ValueError: If `opt_state` does not hold exactly one ordering transformation, or
        if `batch_size` is below 1.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.pair_balance(num_examples=6), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    batch_size = check_int("batch_size", batch_size, minimum=1)
    found = orders_in(opt_state)
    if len(found) != 1:
        raise ValueError(
            "opt_state must hold exactly one ordering transformation, got "
            f"{len(found)}: chain one such as dj.d_grab(...) first."
        )
    return found[0].next_examples(batch_size)


def orders_in(opt_state: optax.OptState) -> list[Any]:
    """Returns the states of all ordering transformations in an optimizer state."""

    def is_ordering(node):
        return hasattr(node, "next_examples")

    nodes = jax.tree.leaves(values(opt_state), is_leaf=is_ordering)
    return [node for node in nodes if is_ordering(node)]


class Step(NamedTuple):
    """A step of B examples, as input for an ordering method."""

    # shape=(): position of the first example in the epoch, equal on all workers
    position: jax.Array
    order: jax.Array  # shape=[N]: this epoch's order
    gradients: Leaves  # leaves [B, ...]


def ordering(
    name: str,
    num_examples: int,
    start: Callable[[Leaves], PyTree],
    place: Callable[[Step, jax.Array, Any], tuple[jax.Array, PyTree, Leaves]],
    turn: Callable[[Any], PyTree],
    axis_name: AxisName,
    shuffle: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Constructs an ordering transformation from the functions of a method.

    It handles batches, epochs, and the state of the order.

    Args:
      name: Name of the transformation, for messages.
      num_examples: Number of examples per worker, N.
      start: Function from the leaves of the parameters to the initial running sums.
      place: Function that processes a step. It takes the step, the next epoch's order
        so far, and the running sums. It returns the new order, the new sums, and the
        leaves of the mean gradient.
      turn: Function from the running sums at the end of an epoch to those at the start
        of the next one.
      axis_name: Name of the worker axis.
      shuffle: Function from the number of an epoch to its order, which replaces the
        order that `place` returns.

    Returns:
      The transformation.
    """
    n = check_int("num_examples", num_examples, minimum=2)
    check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> OrderingState:
        params = require_params(params, name)
        check_trees("params", params)
        order, zero = jnp.arange(n, dtype=jnp.int32), jnp.zeros([], jnp.int32)
        sums = start(jax.tree.leaves(params))
        return OrderingState(zero, zero, order, jnp.copy(order), sums)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OrderingState]:
        del params, extra_args
        axis = WorkerAxis.bind(axis_name)
        leaves, structure = jax.tree.flatten(updates)
        batch = _batch_size(leaves, name)
        # Let the method place this step's examples in the next epoch's order.
        position = axis.unvmap(state.position)
        epoch = axis.unvmap(state.epoch)
        step = Step(position, state.order, leaves)
        following, sums, mean = place(step, state.following, state.balance)

        def finish(order, following, sums):
            del order
            if shuffle is not None:
                following = shuffle(epoch + 1)
            return following, following, turn(sums)

        def go_on(order, following, sums):
            return order, following, sums

        # At the end of the epoch, switch to the next order, and update the sums.
        done = position + batch >= n
        order, following, sums = axis.uniform_cond(
            done, finish, go_on, state.order, following, sums
        )
        position = jnp.where(done, 0, position + batch).astype(jnp.int32)
        epoch = epoch + done.astype(jnp.int32)
        state = OrderingState(epoch, position, order, following, sums)
        return structure.unflatten(mean), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _batch_size(leaves: Leaves, name: str) -> int:
    """Returns the size of the leading axis of the gradients, after checking it."""
    check_trees("updates", leaves)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) > 1 or sizes == {()}:
        raise ValueError(
            f"updates of {name} must have one leading axis of examples in common, got "
            f"shapes {[leaf.shape for leaf in leaves]}: pass the gradients of single "
            "examples, such as jax.vmap(jax.grad(loss), (None, 0))."
        )
    return sizes.pop()[0]


def random_reshuffling(
    num_examples: int, *, seed: int = 0, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    """Orders each worker's examples randomly, with a new order per epoch (D-RR).

    The first epoch visits examples in the order of their numbers, so shuffle the data
    once before training.

    Args:
      num_examples: Number of examples per worker.
      seed: Seed for the random orders.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it first in a chain. It takes gradients with a leading
      axis of examples, and passes on their mean on this worker.

    Raises:
      ValueError: If `num_examples` is below 2, or if gradients lack the leading axis.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.random_reshuffling(num_examples=6), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    seed = check_int("seed", seed, minimum=0)

    def shuffle(epoch):
        # A different key for each epoch and each worker.
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        key = jax.random.fold_in(key, WorkerAxis.bind(axis_name).index)
        return jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))

    return ordering(
        "random_reshuffling",
        num_examples,
        start=lambda leaves: (),
        place=lambda step, following, sums: (following, sums, mean_of(step.gradients)),
        turn=lambda sums: sums,
        axis_name=axis_name,
        shuffle=shuffle,
    )
