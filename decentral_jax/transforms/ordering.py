"""Example orders that balance gradients: which example a worker should see when.

These transformations stand first in a chain. They take the gradients of single examples
(or of microbatches that stay together), with a leading axis, pass on their mean, and
keep the order in which the worker visits its examples in their state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax import collectives
from decentral_jax.collectives import AxisName
from decentral_jax.transforms.balancing import (
    balance,
    balance_apart,
    balance_here,
    mean_of,
    zeros_like_wide,
)
from decentral_jax.validation import (
    check_axis_name,
    check_choice,
    check_int,
    check_trees,
    require_params,
)


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


def _ordering(
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
    n = check_int("num_examples", num_examples, minimum=1)
    check_axis_name(axis_name)

    def init_fn(params):
        params = require_params(params, name)
        check_trees("params", params)
        order, zero = jnp.arange(n, dtype=jnp.int32), jnp.zeros([], jnp.int32)
        sums = start(jax.tree.leaves(params))
        return OrderingState(zero, zero, order, jnp.copy(order), sums)

    def update_fn(updates, state, params=None, **extra_args: Any) -> Any:
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates)
        batch = _batch_size(leaves, name)
        position = collectives.agreed(state.position, axis_name)
        epoch = collectives.agreed(state.epoch, axis_name)
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
        order, following, sums = collectives.either(
            done, axis_name, finish, go_on, state.order, following, sums
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
    num_examples: int, seed: int = 0, axis_name: AxisName = "workers"
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
      ValueError: If `num_examples` is below 1, or gradients lack the leading axis.
    """
    seed = check_int("seed", seed, minimum=0)

    def shuffle(epoch):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        key = jax.random.fold_in(key, collectives.worker_index(axis_name))
        return jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))

    return _ordering(
        "random_reshuffling",
        num_examples,
        start=lambda leaves: (),
        place=lambda step, following, sums: (following, sums, mean_of(step.gradients)),
        turn=lambda sums: sums,
        axis_name=axis_name,
        shuffle=shuffle,
    )


class MeanBalance(NamedTuple):
    """Running sums of `grab`, leaves as the parameters'."""

    running: list  # r, at least float32
    mean: list  # of the last epoch's gradients
    total: list  # of this epoch's gradients
    left: jax.Array  # shape=(), dtype=int32: examples placed at the front


def grab(
    num_examples: int, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    r"""GraB: balances each gradient against the last epoch's mean, a worker by itself.

    With the running sum :math:`r`, 0 at first, and :math:`c = g - \bar g` with the mean
    gradient :math:`\bar g` of the last epoch (0 in the first one): where
    :math:`\langle r, c \rangle \le 0` the example goes to the front of the next order
    and :math:`r \leftarrow r + c`, else to its back and :math:`r \leftarrow r - c`.

    Args:
      num_examples: Examples of each worker.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain. It takes gradients with a leading
      axis of examples and passes on this worker's mean. It keeps three copies of the
      parameters.

    Raises:
      ValueError: If `num_examples` is below 1, or gradients lack the leading axis.

    References:
      Lu, Guo & De Sa, "GraB: Finding Provably Better Data Permutations than Random
      Reshuffling", NeurIPS 2022, Algorithm 4.
    """
    n = check_int("num_examples", num_examples, minimum=1)

    def start(leaves):
        zeros = zeros_like_wide(leaves)
        return MeanBalance(zeros, zeros, zeros, jnp.zeros([], jnp.int32))

    def place(step, following, sums):
        batch = step.gradients[0].shape[0]
        position = step.position + jnp.arange(batch, dtype=jnp.int32)
        counts = position < n
        signs, running = balance(
            step.gradients,
            sums.running,
            counts,
            lambda g: [x - m for x, m in zip(g, sums.mean, strict=True)],
        )
        front = (signs > 0).astype(jnp.int32)
        before = sums.left + jnp.cumsum(front, dtype=jnp.int32) - front
        slot = jnp.where(front > 0, before, n - 1 - (position - before))
        following = _put(following, slot, step.order[position % n], counts)
        total = [
            t + jnp.tensordot(counts.astype(t.dtype), g.astype(t.dtype), 1)
            for t, g in zip(sums.total, step.gradients, strict=True)
        ]
        sums = MeanBalance(
            running, sums.mean, total, sums.left + front.sum(dtype=jnp.int32)
        )
        return following, sums, mean_of(step.gradients)

    def turn(sums):
        zeros = [jnp.zeros_like(x) for x in sums.running]
        mean = [x / n for x in sums.total]
        return MeanBalance(zeros, mean, zeros, jnp.zeros_like(sums.left))

    return _ordering("grab", n, start, place, turn, axis_name)


class PairBalance(NamedTuple):
    """Running sums of `pair_balance` and `d_grab`."""

    running: list  # r, at least float32; of d_grab, this worker's slice of each leaf
    pending: list  # with odd_batches, the gradient whose partner has not come yet


def pair_balance(
    num_examples: int, odd_batches: bool = False, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    r"""Balances the differences of consecutive gradients, a worker by itself.

    With the running sum :math:`r` and the difference :math:`d = g_1 - g_2` of each
    consecutive pair of examples: where :math:`\langle r, d \rangle \le 0` the first
    one goes to the front of the next order, the second one to its back, and
    :math:`r \leftarrow r + d`; else the other way round, and
    :math:`r \leftarrow r - d`. An odd one left at the end goes to the middle.

    Args:
      num_examples: Examples of each worker.
      odd_batches: Whether steps may have an odd number of examples; the gradient of one
        without a partner is then kept until the next step.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain. It takes gradients with a leading
      axis of examples and passes on this worker's mean. It keeps one copy of the
      parameters, two with `odd_batches`.

    Raises:
      ValueError: If `num_examples` is below 1, gradients lack the leading axis, or a
        batch is odd without `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 2 (PairBalance).
    """
    n = check_int("num_examples", num_examples, minimum=1)

    def start(leaves):
        return PairBalance(
            zeros_like_wide(leaves), zeros_like_wide(leaves) if odd_batches else []
        )

    def place(step, following, sums):
        pairs, pending = _pairs(step, sums.pending, n, odd_batches, "pair_balance")
        signs, running = balance(
            pairs.gradients,
            sums.running,
            pairs.complete,
            lambda g: [x[:, 0] - x[:, 1] for x in g],
        )
        following = _put_pairs(following, pairs, signs, step.order)
        return following, PairBalance(running, pending), mean_of(step.gradients)

    return _ordering("pair_balance", n, start, place, _without_sums, axis_name)


def independent_grab(
    num_examples: int,
    balance: str = "mean",
    odd_batches: bool = False,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    """ID-GraB: every worker orders its examples by itself; a baseline for `d_grab`.

    Args:
      num_examples: Examples of each worker.
      balance: "mean", as `grab`, or "pair", as `pair_balance`.
      odd_batches: As in `pair_balance`.
      axis_name: The worker axis.

    Returns:
      The transformation.

    Raises:
      ValueError: If `balance` is unknown, and as `grab` or `pair_balance`.
    """
    check_choice("balance", balance, ("mean", "pair"))
    if balance == "mean":
        return grab(num_examples, axis_name)
    return pair_balance(num_examples, odd_batches, axis_name)


def d_grab(
    num_examples: int,
    num_workers: int,
    odd_batches: bool = False,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""D-GraB (CD-GraB): orders that balance all workers' gradients together.

    As `pair_balance`, but with one running sum for all: for each pair of positions the
    workers' differences :math:`d_1, \dots, d_n` are taken in sequence. No server is
    needed: workers exchange slices of their differences, so that each holds a slice of
    all of them; the products :math:`\langle d_i, d_j \rangle` and
    :math:`\langle r, d_i \rangle` are summed over slices; from these few numbers every
    worker finds the same signs, and updates its slice of :math:`r`.

    Args:
      num_examples: Examples of each worker.
      num_workers: Workers :math:`n`.
      odd_batches: As in `pair_balance`.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain. It takes gradients with a leading
      axis of examples and passes on their mean over all workers. With :math:`P` pairs a
      step and :math:`b` bytes of float32 parameters a worker sends
      :math:`(P + 2) b (n - 1) / n`, averaging included, and keeps :math:`b / n`.

    Raises:
      ValueError: If a number is below 1, the axis has another size, gradients lack the
        leading axis, or a batch is odd without `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 3 (CD-GraB).
    """
    examples = check_int("num_examples", num_examples, minimum=1)
    n = check_int("num_workers", num_workers, minimum=1)

    def start(leaves):
        running = [
            jnp.zeros(-(-x.size // n), collectives.widened(x.dtype)) for x in leaves
        ]
        pending = zeros_like_wide(leaves) if odd_batches else []
        return PairBalance(running, pending)

    def place(step, following, sums):
        axis = collectives.bound_axis(axis_name)
        if axis.size != n:
            raise ValueError(
                f"num_workers must be the size of the axis {axis_name!r}, {axis.size}, "
                f"got {n}."
            )
        pairs, pending = _pairs(step, sums.pending, examples, odd_batches, "d_grab")
        together = balance_here if axis.num_devices == 1 else balance_apart
        signs, running, mean = together(
            step.gradients, pairs.gradients, pairs.complete, sums.running, axis_name
        )
        following = _put_pairs(following, pairs, signs, step.order)
        return following, PairBalance(running, pending), mean

    return _ordering("d_grab", examples, start, place, _without_sums, axis_name)


class _Pairs(NamedTuple):
    """Consecutive positions of a step, two by two."""

    gradients: list  # leaves [P, 2, ...]
    complete: jax.Array  # shape=[P]: whether both are there, and count
    number: jax.Array  # shape=[P], dtype=int32: of the pair in the epoch


def _pairs(
    step: Step, pending: list, n: int, odd_batches: bool, name: str
) -> tuple[_Pairs, list]:
    """A step's pairs, and the gradient that waits for its partner."""
    batch = step.gradients[0].shape[0]
    end = jnp.minimum(step.position + batch, n)
    if batch % 2 == 0 and not odd_batches:
        rows, first = step.gradients, step.position
    elif not odd_batches:
        raise ValueError(
            f"updates of {name} must hold an even number of examples, got {batch}: "
            "pass odd_batches=True to keep the odd one until the next step."
        )
    else:
        # One row more: the one that waits in front, or something at the end.
        waits = step.position % 2
        first = step.position - waits
        rows = []
        for old, new in zip(pending, step.gradients, strict=True):
            new = new.astype(old.dtype)
            both = jnp.concatenate([old[None], new, old[None]])
            rows.append(lax.dynamic_slice_in_dim(both, 1 - waits, batch + 1))
        if batch % 2 == 0:
            rows = [jnp.concatenate([x, jnp.zeros_like(x[:1])]) for x in rows]
        # The last of the step waits, if there is an odd number of them so far.
        pending = [
            x[-1].astype(o.dtype) for x, o in zip(step.gradients, pending, strict=True)
        ]
    count = rows[0].shape[0] // 2
    number = first // 2 + jnp.arange(count, dtype=jnp.int32)
    paired = [x.reshape(count, 2, *x.shape[1:]) for x in rows]
    return _Pairs(paired, 2 * number + 1 < end, number), pending


def _put(order: jax.Array, slots: jax.Array, examples: jax.Array, mask: jax.Array):
    """Writes examples into an order where the mask holds."""
    slots = jnp.where(mask, slots, order.shape[0])
    return order.at[slots].set(examples, mode="drop")


def _put_pairs(
    following: jax.Array, pairs: _Pairs, signs: jax.Array, order: jax.Array
) -> jax.Array:
    """One example of each pair from the front, the other one from the back."""
    n = order.shape[0]
    first, second = (order[(2 * pairs.number + i) % n] for i in (0, 1))
    swap = signs < 0
    front, back = pairs.number, n - 1 - pairs.number
    following = _put(following, front, jnp.where(swap, second, first), pairs.complete)
    following = _put(following, back, jnp.where(swap, first, second), pairs.complete)
    if n % 2:  # the last one has no partner
        following = following.at[n // 2].set(order[n - 1])
    return following


def _without_sums(sums: PairBalance) -> PairBalance:
    return sums._replace(running=[jnp.zeros_like(x) for x in sums.running])
