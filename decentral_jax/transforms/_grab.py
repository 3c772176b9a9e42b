"""GraB and its relatives: orders that keep partial sums of gradients small.

How the signs are found is in `balancing`; here they become orders.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax.transforms._balancing import (
    balance,
    balance_apart,
    balance_gathered,
    balance_here,
    flat,
    mean_of,
    size_and_dtype,
    zeros_like_wide,
)
from decentral_jax.transforms._ordering import Step, ordering
from decentral_jax.validation import check_int, check_nobody_missing

__all__ = ["d_grab", "grab", "pair_balance"]


class MeanBalance(NamedTuple):
    """Running sums of `grab`, leaves as the parameters'."""

    running: jax.Array  # shape=[d], at least float32: r
    mean: list  # of the last epoch's gradients
    total: list  # of this epoch's gradients
    left: jax.Array  # shape=(), dtype=int32: examples placed at the front


def grab(
    num_examples: int, *, axis_name: AxisName = "workers"
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
      ValueError: If `num_examples` is below 2, or gradients lack the leading axis.

    References:
      Lu, Guo & De Sa, "GraB: Finding Provably Better Data Permutations than Random
      Reshuffling", NeurIPS 2022, Algorithm 4.
    """
    n = check_int("num_examples", num_examples, minimum=2)

    def start(leaves):
        zeros = zeros_like_wide(leaves)
        running = jnp.zeros(*size_and_dtype(leaves))
        return MeanBalance(running, zeros, zeros, jnp.zeros([], jnp.int32))

    def place(step, following, sums):
        batch = step.gradients[0].shape[0]
        position = step.position + jnp.arange(batch, dtype=jnp.int32)
        counts = position < n
        rows = [
            (g.astype(m.dtype) - m).reshape(batch, -1)
            for g, m in zip(step.gradients, sums.mean, strict=True)
        ]
        signs, running = balance(rows, sums.running, counts, WorkerAxis.bind(axis_name))
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
        mean = [x / n for x in sums.total]
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return zeros._replace(mean=mean)

    return ordering("grab", n, start, place, turn, axis_name)


class PairBalance(NamedTuple):
    """Running sums of `pair_balance` and `d_grab`."""

    running: jax.Array  # shape=[d], at least float32: r; of d_grab, a worker's slice
    pending: list  # with odd_batches, the gradient whose partner has not come yet


def pair_balance(
    num_examples: int, *, odd_batches: bool = False, axis_name: AxisName = "workers"
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
      ValueError: If `num_examples` is below 2, gradients lack the leading axis, or a
        batch is odd without `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 2 (PairBalance).
    """
    n = check_int("num_examples", num_examples, minimum=2)

    def start(leaves):
        pending = zeros_like_wide(leaves) if odd_batches else []
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
      sketch: Balance random projections of the differences to so many entries :math:`k`
        instead of the differences: each is cut into :math:`k` pieces, summed with
        random signs. Inner products are kept on average only, so the orders are
        others; worth it for large models, where little travels then.
      gathered: Whether every worker gets all differences and balances them by itself,
        the plain form, for comparison. Orders are the same.
      axis_name: The worker axis.

    Returns:
      The transformation; place it first in a chain. It takes gradients with a leading
      axis of examples and passes on their mean over all workers. With :math:`P` pairs a
      step and :math:`b` bytes of float32 parameters, averaging included, a worker

      - sends :math:`(P + 2) b (n - 1) / n` and keeps :math:`b / n`;
      - with a sketch sends :math:`2 b (n - 1) / n + 4 k P (n - 1)` and keeps
        :math:`4 k`;
      - gathered sends :math:`2 b (n - 1) / n + b P (n - 1)` and keeps :math:`b`.

    Raises:
      ValueError: If `num_examples` is below 2, another number below 1, the axis has
        another size, gradients lack the leading axis, or a batch is odd without
        `odd_batches`.

    References:
      Cooper et al., "Coordinating Distributed Example Orders for Provably Accelerated
      Training", NeurIPS 2023, Algorithm 3 (CD-GraB).
    """
    examples = check_int("num_examples", num_examples, minimum=2)
    n = check_int("num_workers", num_workers, minimum=1)
    if sketch is not None:
        sketch = check_int("sketch", sketch, minimum=1)

    def start(leaves):
        size, dtype = size_and_dtype(leaves)
        if not gathered:
            size = -(-size // n)
        running = jnp.zeros(sketch or size, dtype)
        pending = zeros_like_wide(leaves) if odd_batches else []
        return PairBalance(running, pending)

    def place(step, following, sums):
        axis = WorkerAxis.bind(axis_name)
        if axis.size != n:
            raise ValueError(
                f"num_workers must be the size of the axis {axis_name!r}, {axis.size}, "
                f"got {n}."
            )
        pairs, pending = _pairs(step, sums.pending, examples, odd_batches, "d_grab")
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
    return sums._replace(running=jnp.zeros_like(sums.running))
