"""GraB and its variants: example orders that keep partial sums of gradients small.

The module `_balancing` computes signs; this module turns them into example orders.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import wide_zeros
from decentral_jax._validation import check_int, check_nobody_missing
from decentral_jax.transforms._balancing import (
    Leaves,
    balance,
    balance_apart,
    balance_gathered,
    balance_here,
    flat,
    mean_of,
    size_and_dtype,
)
from decentral_jax.transforms._ordering import Step, ordering

__all__ = ["d_grab", "grab", "pair_balance"]


class MeanBalance(NamedTuple):
    """Running sums of `grab`, with the leaves of the parameters."""

    running: jax.Array  # shape=[d], at least float32: r
    mean: Leaves  # mean of the last epoch's gradients
    total: Leaves  # sum of this epoch's gradients so far
    left: jax.Array  # shape=(), dtype=int32: number of examples placed at the front


def grab(
    num_examples: int, *, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    r"""Orders examples by GraB: balances centered gradients, on each worker alone.

    Let :math:`c = g - \bar g`, where :math:`\bar g` is the mean gradient of the last
    epoch (0 in the first one), and let the running sum :math:`r` be 0 at first. If
    :math:`\langle r, c \rangle \le 0`, the example goes to the front of the next
    epoch's order, and :math:`r \leftarrow r + c`. Otherwise it goes to the back, and
    :math:`r \leftarrow r - c`.

    Args:
      num_examples: Number of examples per worker.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it first in a chain. It takes gradients with a leading
      axis of examples, and passes on their mean on this worker. It keeps three copies
      of the parameters.

    Raises:
      ValueError: If `num_examples` is below 2, or gradients lack the leading axis.

    References:
      Lu, Guo & De Sa, "GraB: Finding Provably Better Data Permutations than Random
      Reshuffling", NeurIPS 2022, Algorithm 4.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.grab(num_examples=6), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    n = check_int("num_examples", num_examples, minimum=2)

    def start(leaves):
        zeros = jax.tree.map(wide_zeros, leaves)
        running = jnp.zeros(*size_and_dtype(leaves))
        return MeanBalance(running, zeros, zeros, jnp.zeros([], jnp.int32))

    def place(step, following, sums):
        batch = step.gradients[0].shape[0]
        # Positions in the epoch; those beyond its end are padding and do not count.
        position = step.position + jnp.arange(batch, dtype=jnp.int32)
        counts = position < n
        # Centered gradients, leaves [B, size].
        rows = [
            (g.astype(m.dtype) - m).reshape(batch, -1)
            for g, m in zip(step.gradients, sums.mean, strict=True)
        ]
        signs, running = balance(rows, sums.running, counts, WorkerAxis.bind(axis_name))
        # Sign 1 takes the next free slot from the front, sign -1 the next one from the
        # back. `before` is the number of earlier examples at the front.
        front = (signs > 0).astype(jnp.int32)
        before = sums.left + jnp.cumsum(front, dtype=jnp.int32) - front
        slot = jnp.where(front > 0, before, n - 1 - (position - before))
        following = _put(following, slot, step.order[position % n], counts)
        # Accumulate the gradients for the mean of this epoch.
        total = [
            t + jnp.tensordot(counts.astype(t.dtype), g.astype(t.dtype), 1)
            for t, g in zip(sums.total, step.gradients, strict=True)
        ]
        sums = MeanBalance(
            running, sums.mean, total, sums.left + front.sum(dtype=jnp.int32)
        )
        return following, sums, mean_of(step.gradients)

    def turn(sums):
        mean = [x / n for x in sums.total]
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return zeros._replace(mean=mean)

    return ordering("grab", n, start, place, turn, axis_name)


class PairBalance(NamedTuple):
    """Running sums of `pair_balance` and `d_grab`."""

    # shape=[d], at least float32: r. With d_grab, this worker's slice of r.
    running: jax.Array
    pending: Leaves  # with odd_batches, the gradient that still lacks a partner


def pair_balance(
    num_examples: int, *, odd_batches: bool = False, axis_name: AxisName = "workers"
) -> optax.GradientTransformationExtraArgs:
    r"""Orders examples by PairBalance: balances gradient pairs, on each worker alone.

    Let :math:`r` be the running sum, 0 at first, and :math:`d = g_1 - g_2` the
    difference of the gradients of two consecutive examples. If
    :math:`\langle r, d \rangle \le 0`, the first example goes to the front of the next
    epoch's order, the second one to the back, and :math:`r \leftarrow r + d`.
    Otherwise the second example goes to the front, the first one to the back, and
    :math:`r \leftarrow r - d`. If the number of examples is odd, the last one goes to
    the middle.

    Args:
      num_examples: Number of examples per worker.
      odd_batches: Whether steps may have an odd number of examples. If so, a gradient
        without a partner is kept until the next step.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it first in a chain. It takes gradients with a leading
      axis of examples, and passes on their mean on this worker. It keeps one copy of
      the parameters, or two copies with `odd_batches`.

    Raises:
      ValueError: If `num_examples` is below 2, if gradients lack the leading axis, or
        if a batch is odd without `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 2 (PairBalance).

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.pair_balance(num_examples=6), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    n = check_int("num_examples", num_examples, minimum=2)

    def start(leaves):
        pending = jax.tree.map(wide_zeros, leaves) if odd_batches else []
        return PairBalance(jnp.zeros(*size_and_dtype(leaves)), pending)

    def place(step, following, sums):
        pairs, pending = _pairs(step, sums.pending, n, odd_batches, "pair_balance")
        rows = flat(pairs.gradients)
        signs, running = balance(
            rows, sums.running, pairs.complete, WorkerAxis.bind(axis_name)
        )
        following = _put_pairs(following, pairs, signs, step.order)
        return following, PairBalance(running, pending), mean_of(step.gradients)

    return ordering("pair_balance", n, start, place, _without_sums, axis_name)


def d_grab(
    num_examples: int,
    num_workers: int,
    *,
    odd_batches: bool = False,
    sketch: int | None = None,
    gathered: bool = False,
    axis_name: AxisName = "workers",
) -> optax.GradientTransformationExtraArgs:
    r"""Orders examples by D-GraB (CD-GraB): balances the pairs of all workers together.

    It works like `pair_balance`, with one running sum for all workers: for each pair of
    positions, the differences :math:`d_1, \dots, d_n` of the workers are balanced in
    sequence. It needs no server. Workers exchange slices of their differences, so that
    each worker holds one slice of every difference. The inner products
    :math:`\langle d_i, d_j \rangle` and :math:`\langle r, d_i \rangle` are summed over
    the slices. From these few numbers, all workers compute the same signs, and each
    worker updates its slice of :math:`r`.

    Args:
      num_examples: Number of examples per worker.
      num_workers: Number of workers :math:`n`.
      odd_batches: As in `pair_balance`.
      sketch: Number of entries :math:`k` of random projections of the differences,
        which are balanced instead of the differences. A difference is cut into
        :math:`k` pieces, and each piece is summed with random signs. This preserves
        inner products only on average, so the orders change. It sends few bytes, which
        pays off for large models. None balances the differences themselves.
      gathered: Whether every worker receives all differences and balances them by
        itself. This is the simple form, for comparison; the orders are the same.
      axis_name: Name of the worker axis.

    Returns:
      The transformation. Place it first in a chain. It takes gradients with a leading
      axis of examples, and passes on their mean over all workers. With :math:`P` pairs
      per step and :math:`b` bytes of float32 parameters, each worker sends and keeps
      the following numbers of bytes, which include the averaging of gradients:

      - by default, it sends :math:`(P + 2) b (n - 1) / n` and keeps :math:`b / n`;
      - with `sketch`, it sends :math:`2 b (n - 1) / n + 4 k P (n - 1)` and keeps
        :math:`4 k`;
      - with `gathered`, it sends :math:`2 b (n - 1) / n + b P (n - 1)` and keeps
        :math:`b`.

    Raises:
      ValueError: If `num_examples` is below 2, if `num_workers` or `sketch` is below 1,
        if the size of the axis is not `num_workers`, if gradients lack the leading
        axis, or if a batch is odd without `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 3 (CD-GraB).

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp, optax
      >>> tx = optax.chain(dj.d_grab(num_examples=6, num_workers=4), optax.sgd(0.1))
      >>> dj.next_examples(tx.init(jnp.zeros(3)), batch_size=2)
      Array([0, 1], dtype=int32)
    """
    examples = check_int("num_examples", num_examples, minimum=2)
    n = check_int("num_workers", num_workers, minimum=1)
    if sketch is not None:
        sketch = check_int("sketch", sketch, minimum=1)

    # The running sum: a slice, the whole vector, or a sketch.
    def start(leaves):
        size, dtype = size_and_dtype(leaves)
        if not gathered:
            size = -(-size // n)
        running = jnp.zeros(sketch or size, dtype)
        pending = jax.tree.map(wide_zeros, leaves) if odd_batches else []
        return PairBalance(running, pending)

    def place(step, following, sums):
        axis = WorkerAxis.bind(axis_name)
        if axis.size != n:
            raise ValueError(
                f"num_workers must be the size of the axis {axis_name!r}, {axis.size}, "
                f"got {n}."
            )
        pairs, pending = _pairs(step, sums.pending, examples, odd_batches, "d_grab")
        # Three ways to balance the pairs of all workers, by where the vectors are.
        if sketch is not None or gathered:
            together = functools.partial(balance_gathered, sketch=sketch)
        else:
            together = balance_here if axis.num_devices == 1 else balance_apart
        signs, running, mean = together(
            step.gradients, pairs.gradients, pairs.complete, sums.running, axis
        )
        following = _put_pairs(following, pairs, signs, step.order)
        return following, PairBalance(running, pending), mean

    tx = ordering("d_grab", examples, start, place, _without_sums, axis_name)

    def update_fn(
        updates: optax.Updates,
        state,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_nobody_missing(extra_args, "d_grab")
        return tx.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


class _Pairs(NamedTuple):
    """Pairs of consecutive positions in a step."""

    gradients: Leaves  # leaves [P, 2, ...]
    complete: jax.Array  # shape=[P]: whether both examples are present and count
    number: jax.Array  # shape=[P], dtype=int32: number of the pair in the epoch


def _pairs(
    step: Step, pending: Leaves, n: int, odd_batches: bool, name: str
) -> tuple[_Pairs, Leaves]:
    """Groups the gradients of a step into pairs.

    Args:
      step: The step.
      pending: With `odd_batches`, the last gradient of the previous step.
      n: Number of examples per worker.
      odd_batches: Whether a gradient may lack its partner until the next step.
      name: Name of the transformation, for messages.

    Returns:
      The pairs, and the pending gradient for the next step.
    """
    batch = step.gradients[0].shape[0]
    end = jnp.minimum(step.position + batch, n)
    # Even batches start at even positions: their rows are pairs already.
    if batch % 2 == 0 and not odd_batches:
        rows, first = step.gradients, step.position
    elif not odd_batches:
        raise ValueError(
            f"updates of {name} must hold an even number of examples, got {batch}: "
            "pass odd_batches=True to keep the last gradient until the next step."
        )
    else:
        # Add one row, so that the first row has an even position: the pending gradient
        # in front if the step starts at an odd position, or a filler row at the end.
        waits = step.position % 2
        first = step.position - waits
        rows = []
        for old, new in zip(pending, step.gradients, strict=True):
            new = new.astype(old.dtype)
            both = jnp.concatenate([old[None], new, old[None]])
            rows.append(lax.dynamic_slice_in_dim(both, 1 - waits, batch + 1))
        # Now there are batch + 1 rows: make their number even.
        if batch % 2 == 0:
            rows = [jnp.concatenate([x, jnp.zeros_like(x[:1])]) for x in rows]
        # The last gradient is pending if the number of examples so far is odd.
        pending = [
            x[-1].astype(o.dtype) for x, o in zip(step.gradients, pending, strict=True)
        ]
    # A pair is complete if its second position lies before the end of the step.
    count = rows[0].shape[0] // 2
    number = first // 2 + jnp.arange(count, dtype=jnp.int32)
    paired = [x.reshape(count, 2, *x.shape[1:]) for x in rows]
    return _Pairs(paired, 2 * number + 1 < end, number), pending


def _put(
    order: jax.Array, slots: jax.Array, examples: jax.Array, mask: jax.Array
) -> jax.Array:
    """Writes examples into slots of an order, except for masked ones."""
    # Masked examples get a slot out of range, which the scatter drops.
    slots = jnp.where(mask, slots, order.shape[0])
    return order.at[slots].set(examples, mode="drop")


def _put_pairs(
    following: jax.Array, pairs: _Pairs, signs: jax.Array, order: jax.Array
) -> jax.Array:
    """Places one example of each pair at the front of an order, the other at the back.

    Args:
      following: The next epoch's order so far, `[N]`.
      pairs: Pairs of this step.
      signs: Signs of the pairs `[P]`; -1 swaps the two examples.
      order: This epoch's order, `[N]`.

    Returns:
      The next epoch's order.
    """
    n = order.shape[0]
    first, second = (order[(2 * pairs.number + i) % n] for i in (0, 1))
    swap = signs < 0
    front, back = pairs.number, n - 1 - pairs.number
    following = _put(following, front, jnp.where(swap, second, first), pairs.complete)
    following = _put(following, back, jnp.where(swap, first, second), pairs.complete)
    # With an odd number of examples, the last one has no partner and takes the middle.
    if n % 2:
        following = following.at[n // 2].set(order[n - 1])
    return following


def _without_sums(sums: PairBalance) -> PairBalance:
    """Resets the running sum at the end of an epoch."""
    return sums._replace(running=jnp.zeros_like(sums.running))
