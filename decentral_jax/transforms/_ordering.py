"""Which example a worker should see when: orders as optimizer state.

Ordering transformations stand first in a chain. They take the gradients of single
examples (or of microbatches that stay together), with a leading axis, pass on their
mean, and keep the order in which the worker visits its examples in their state. Here is
what all methods share; those that balance gradients are in `grab`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax.transforms._balancing import mean_of
from decentral_jax.validation import (
    check_axis_name,
    check_int,
    check_trees,
    require_params,
)

__all__ = ["OrderingState", "next_examples", "random_reshuffling"]


class OrderingState(NamedTuple):
    """State of the ordering transformations."""

    epoch: jax.typing.ArrayLike  # shape=(), dtype=int32: epochs finished
    position: jax.typing.ArrayLike  # shape=(), dtype=int32: examples seen in this one
    order: jax.Array  # shape=[N], dtype=int32: this epoch's
    following: jax.Array  # shape=[N], dtype=int32: the next epoch's, as far as known
    balance: Any  # the method's running sums

    def next_examples(self, batch_size: int) -> jax.Array:
        """The examples to take next, `[batch_size]`."""
        n = self.order.shape[0]
        return self.order[(self.position + jnp.arange(batch_size, dtype=jnp.int32)) % n]


def next_examples(opt_state: Any, batch_size: int) -> jax.Array:
    """The examples whose gradients this worker should compute next.

    Args:
      opt_state: The optimizer's state, as `init` and `update` return it; an ordering
        transformation is found in it through any `optax.chain`.
      batch_size: Examples in this step. The last batch of an epoch, if the batch size
        does not divide the number of examples, is filled up with the epoch's first
        examples: their gradients count in the mean, but no more for the order.

    Returns:
      Numbers of this worker's examples, shape `[batch_size]`, int32.

    Raises:
      ValueError: If there is not exactly one ordering transformation, or `batch_size`
        is below 1.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.pair_balance(num_examples=6), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    batch_size = check_int("batch_size", batch_size, minimum=1)

    def is_ordering(node):
        return hasattr(node, "next_examples")

    nodes = jax.tree.leaves(opt_state, is_leaf=is_ordering)
    found = [node for node in nodes if is_ordering(node)]
    if len(found) != 1:
        raise ValueError(
            "opt_state must hold exactly one ordering transformation, got "
            f"{len(found)}: chain one such as dj.d_grab(...) first."
        )
    return found[0].next_examples(batch_size)


class Step(NamedTuple):
    """What a method is told of a step of B examples."""

    position: jax.Array  # shape=(), of the first example, equal on all workers
    order: jax.Array  # shape=[N]: this epoch's order
    gradients: list  # leaves [B, ...]


def ordering(
    name: str,
    num_examples: int,
    start: Callable[[list], Any],
    place: Callable[[Step, jax.Array, Any], tuple[jax.Array, Any, list]],
    turn: Callable[[Any], Any],
    axis_name: AxisName,
    shuffle: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """What all methods share: batches, epochs, the order's state.

    Args:
      name: The transformation's, for messages.
      num_examples: Examples of each worker, N.
      start: From the parameters' leaves to the method's running sums.
      place: From a step, the next epoch's order so far and the sums to that order, the
        sums and the mean gradient's leaves.
      turn: What becomes of the sums at the end of an epoch.
      axis_name: The worker axis.
      shuffle: From an epoch's number to its order, instead of the one placed.
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

        done = position + batch >= n
        order, following, sums = axis.uniform_cond(
            done, finish, go_on, state.order, following, sums
        )
        position = jnp.where(done, 0, position + batch).astype(jnp.int32)
        epoch = epoch + done.astype(jnp.int32)
        state = OrderingState(epoch, position, order, following, sums)
        return structure.unflatten(mean), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _batch_size(leaves: list, name: str) -> int:
    """The leading axis of the gradients."""
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
    """A fresh random order of each worker's examples in every epoch (D-RR).

    The first epoch is in the order of the examples' numbers: shuffle the data once.

    Args:
      num_examples: Examples of each worker.
      seed: Of the orders.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain. It takes gradients with a leading
      axis of examples and passes on this worker's mean.

    Raises:
      ValueError: If `num_examples` is below 2, or gradients lack the leading axis.
    """
    seed = check_int("seed", seed, minimum=0)

    def shuffle(epoch):
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
