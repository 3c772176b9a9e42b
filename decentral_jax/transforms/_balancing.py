"""Vector balancing: signs that keep a running sum of vectors small.

The vectors are processed in sequence. Each one gets the sign for which its inner
product with the running sum is not positive. `decentral_jax.transforms._grab` uses
these functions; they work on vectors given as lists of leaves.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax._exchange.axis import WorkerAxis
from decentral_jax._exchange.numbers import widened

# Leaves of fewer entries are joined: this saves more time in operations than the copy
# costs.
SMALL = 1 << 18

Leaves = list[jax.Array]


def size_and_dtype(leaves: Leaves) -> tuple[int, jnp.dtype]:
    """Returns size and dtype, at least float32, of a vector of all entries."""
    dtypes = [widened(x.dtype) for x in leaves]
    return sum(x.size for x in leaves), functools.reduce(jnp.promote_types, dtypes)


def mean_of(leaves: Leaves) -> Leaves:
    """Returns the mean over the leading axis of each leaf."""
    return [leaf.mean(0) for leaf in leaves]


def _products(xs: Leaves, ys: Leaves) -> jax.Array:
    """Returns the inner products of two stacks of vectors.

    Args:
      xs: Leaves `[a, ...]` of the first `a` vectors.
      ys: Leaves `[b, ...]` of the other `b` vectors.

    Returns:
      The matrix of inner products, `[a, b]`.
    """

    # Sum over all axes of a leaf except for the first one.
    def of_leaf(x, y):
        axes = list(range(1, x.ndim))
        return jnp.tensordot(x, y, (axes, axes), precision="highest")

    first, *others = map(of_leaf, xs, ys)
    return functools.reduce(jnp.add, others, first)


def _signs(gram: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
    r"""Returns the signs of K vectors, computed from inner products only.

    .. math::
       s_k = \pm 1, \quad s_k = 1 \iff \langle r, d_k \rangle \le 0, \qquad
       \langle r, d_k \rangle = \langle r_0, d_k \rangle
       + \sum_{j < k} s_j \langle d_j, d_k \rangle

    Args:
      gram: Inner products :math:`\langle d_j, d_k \rangle`, `[K, K]`.
      start: Products :math:`\langle r_0, d_k \rangle` with the initial sum, `[K]`.
      mask: Whether each vector counts, `[K]`.

    Returns:
      The signs `[K]`, 0 for masked vectors.
    """

    # Signs that are not known yet are 0, so the product with row k sums over j < k.
    def body(k, signs):
        return signs.at[k].set(_sign(start[k] + signs @ gram[k], mask[k]))

    return lax.fori_loop(0, mask.shape[0], body, jnp.zeros_like(start))


def _sign(product: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns 1 if the product with the running sum is not positive, and -1 if it is.

    A vector that does not count gets 0. If the exact product is 0 and rounding makes it
    positive, the sign is -1. A tolerance would not help, because the running sum itself
    may consist of rounding errors.
    """
    return jnp.where(counts, jnp.where(product <= 0, 1, -1), 0).astype(product.dtype)


def balance(
    rows: Leaves,
    running: jax.Array,
    mask: jax.Array,
    axis: WorkerAxis,
    at: Callable[[jax.Array], tuple[jax.Array, ...]] = lambda i: (i,),
) -> tuple[jax.Array, jax.Array]:
    """Balances vectors in sequence.

    Args:
      rows: Leaves of the vectors, `[..., size]`; or of pairs, `[..., 2, size]`, whose
        differences are the vectors.
      running: Running sum before the first vector, `[d]`, in the order of `joined`.
      mask: Whether each vector counts, `[K]`.
      axis: Worker axis.
      at: Function from the number of a vector in the sequence to its indices in the
        leading axes.

    Returns:
      The signs `[K]`, which are 1, -1, or 0 for masked vectors, and the new running
      sum.
    """
    groups = _groups(rows)
    axes = len(at(jnp.zeros([], jnp.int32)))
    # Join the small leaves of all vectors into one leaf: fewer operations per vector.
    parts = [
        rows[group[0]]
        if len(group) == 1
        else joined([_differences(rows[i], axes) for i in group], running.dtype)
        for group in groups
    ]

    # Reads vector i of the sequence as a list of parts.
    def vector(i):
        return [_differences(x[at(i)], 0) for x in parts]

    # Split the running sum in the same way.
    ends = list(itertools.accumulate(x.shape[-1] for x in parts))[:-1]
    sums = jnp.split(running, ends)
    signs, sums = _in_sequence(vector, mask, sums, axis)
    return signs, jnp.concatenate(sums)


def joined(leaves: Leaves, dtype: jnp.dtype) -> jax.Array:
    """Joins leaves `[..., size]` into one array `[..., d]`, large leaves first."""
    order = itertools.chain(*_groups(leaves))
    return jnp.concatenate([leaves[i].astype(dtype) for i in order], -1)


def _groups(leaves: Leaves) -> list[list[int]]:
    """Groups the numbers of leaves: each large leaf alone, then all small leaves."""
    small = [i for i, x in enumerate(leaves) if x.shape[-1] < SMALL]
    large = [[i] for i in range(len(leaves)) if i not in small]
    return large + [small] * bool(small)


def _differences(x: jax.Array, axes: int) -> jax.Array:
    """Returns the differences of pairs, or the vectors themselves.

    Args:
      x: Vectors with `axes` leading axes, or pairs with one more axis of size 2.
      axes: Number of leading axes.
    """
    return x if x.ndim == axes + 1 else x[..., 0, :] - x[..., 1, :]


def _in_sequence(
    vector: Callable[[jax.Array], Leaves],
    mask: jax.Array,
    running: Leaves,
    axis: WorkerAxis,
) -> tuple[jax.Array, Leaves]:
    """Performs `balance` for vectors that a function reads by number.

    It reads each vector once, and two vectors at a time: on CPUs, XLA is fast at
    multiplying two rows with a vector, but neither at multiplying one row with a vector
    nor at multiplying many rows with each other.
    """
    count = mask.shape[0]
    # With an odd number of vectors, the last pair repeats one, which does not count.
    mask = jnp.pad(mask, (0, count % 2))

    def body(i, carry):
        running, signs = carry
        first, second = 2 * i, 2 * i + 1
        pair = vector(first), vector(jnp.minimum(second, count - 1))
        both = [
            jnp.stack([x, y]).astype(r.dtype)
            for x, y, r in zip(*pair, running, strict=True)
        ]
        # Without the barrier, XLA would recompute the vectors for each use.
        both = lax.optimization_barrier(both)
        with_sum = _products(both, [r[None] for r in running])[:, 0]
        with_first = _products(both, [x[:1] for x in both])[:, 0]
        # The second sign follows from the sum that includes the first vector.
        a = _sign(with_sum[0], mask[first])
        b = _sign(with_sum[1] + a * with_first[1], mask[second])
        running = [r + a * x[0] + b * x[1] for r, x in zip(running, both, strict=True)]
        return running, signs.at[first].set(a).at[second].set(b)

    dtype = functools.reduce(jnp.promote_types, (r.dtype for r in running))
    signs = axis.varying(jnp.zeros(mask.shape, dtype))
    running, signs = lax.fori_loop(0, mask.shape[0] // 2, body, (running, signs))
    return signs[:count], running


def balance_here(
    gradients: Leaves,
    pairs: Leaves,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
) -> tuple[jax.Array, jax.Array, Leaves]:
    """Balances the pairs of all workers if they are on one device.

    Args:
      gradients: This worker's gradients, leaves `[B, ...]`.
      pairs: The same gradients in pairs, leaves `[P, 2, ...]`.
      complete: Whether each pair counts, `[P]`, equal on all workers.
      running: This worker's slice of the running sum, `[width]`.
      axis: Worker axis.

    Returns:
      This worker's signs `[P]`, its slice of the new running sum, and the mean gradient
      over the batch and all workers.
    """
    n, rows = axis.size, flat(pairs)
    size = sum(x.shape[-1] for x in rows)
    # Vector i of the sequence is pair i // n of worker i % n.
    signs, whole = balance(
        axis.gather(rows),
        axis.gather(running).reshape(-1)[:size],
        _each(complete, axis),
        axis,
        at=lambda i: (i % n, i // n),
    )
    # Cut the sum into n slices again, and keep this worker's slice and signs.
    running = jnp.pad(whole, (0, n * running.size - size)).reshape(n, -1)[axis.index]
    own = signs.reshape(-1, n)[:, axis.index]
    return own, running, axis.mean(mean_of(gradients))


def flat(pairs: Leaves) -> Leaves:
    """Reshapes leaves `[P, 2, ...]` to `[P, 2, size]`."""
    return [x.reshape(*x.shape[:2], -1) for x in pairs]


def _each(complete: jax.Array, axis: WorkerAxis) -> jax.Array:
    """Returns whether each difference of the sequence counts, `[P * n]`.

    The sequence holds the first differences of all workers, then their second
    differences, and so on.
    """
    return jnp.repeat(axis.unvmap(complete), axis.size)


def balance_gathered(
    gradients: Leaves,
    pairs: Leaves,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
    sketch: int | None,
) -> tuple[jax.Array, jax.Array, Leaves]:
    """Balances gathered differences, or sketches of them.

    Every worker holds the whole running sum, and computes the signs of all workers.

    Args:
      gradients: As in `balance_here`.
      pairs: As in `balance_here`.
      complete: As in `balance_here`.
      running: The whole running sum, `[d]`, or `[sketch]`.
      axis: Worker axis.
      sketch: Number of entries of the sketches. None gathers the differences.

    Returns:
      As `balance_here`, with the whole running sum.
    """
    n = axis.size
    rows = flat(pairs)
    if sketch is not None:
        # Sketch the gradients instead of their differences, which then never have to be
        # written to memory.
        rows = [sketched([x.astype(running.dtype) for x in rows], sketch)]
    # This worker's differences [P, d]; gathered, they are [n, P, d].
    vectors = joined([_differences(x, 1) for x in rows], running.dtype)
    signs, running = balance(
        [axis.gather(vectors)],
        running,
        _each(complete, axis),
        axis,
        at=lambda i: (i % n, i // n),
    )
    own = signs.reshape(-1, n)[:, axis.index]
    return own, running, axis.mean(mean_of(gradients))


def sketched(leaves: Leaves, k: int) -> jax.Array:
    r"""Projects vectors randomly to k entries, and preserves inner products on average.

    Each leaf is cut into k pieces, and each piece is summed with the same random signs
    :math:`a`: :math:`E \langle S x, S y \rangle = \sum_{i,j} E[a_i a_j]
    \sum_p x_{p i} y_{p j} = \langle x, y \rangle`.

    Args:
      leaves: Leaves of the vectors, `[..., size]`.
      k: Number of entries of a sketch.

    Returns:
      The sketches, `[..., k]`.
    """
    parts = []
    for number, x in enumerate(leaves):
        # Pad the leaf, and cut it into k pieces of equal length.
        length = -(-x.shape[-1] // k)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, k * length - x.shape[-1])]
        pieces = jnp.pad(x, padding).reshape(*x.shape[:-1], k, length)
        # The signs depend on the number of the leaf only, so they are equal on all
        # workers and in all steps.
        key = jax.random.fold_in(jax.random.key(0), number)
        signs = jax.random.rademacher(key, (length,), x.dtype)
        parts.append(jnp.matmul(pieces, signs, precision="highest"))
    first, *others = parts
    return functools.reduce(jnp.add, others, first)


def balance_apart(
    gradients: Leaves,
    pairs: Leaves,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
) -> tuple[jax.Array, jax.Array, Leaves]:
    """Balances the pairs of all workers if they are on several devices.

    Each device receives one slice of every difference vector. The devices sum the inner
    products of their slices, and all of them compute the same signs.

    Args:
      gradients: As in `balance_here`.
      pairs: As in `balance_here`.
      complete: As in `balance_here`.
      running: As in `balance_here`.
      axis: Worker axis.

    Returns:
      As `balance_here`.
    """
    n, count, worker = axis.size, len(complete), axis.index
    # The differences are sent in the widest dtype of the gradients.
    dtype = max((x.dtype for x in pairs), key=lambda dtype: dtype.itemsize)

    # The difference of pair i, padded and cut into one slice per device.
    def sliced(i):
        x = joined([(x[i, 0] - x[i, 1]).reshape(-1) for x in pairs], dtype)
        x = jnp.pad(x, (0, n * running.size - x.size))
        return x.reshape(axis.num_devices, -1)

    # Exchange slices: [num_devices, P, width] -> [n, P, width].
    sent = jnp.stack([sliced(i) for i in range(count)], 1)
    received = axis.to_devices(sent)
    vectors = received.reshape(n * count, -1).astype(running.dtype)
    held = axis.of_device(running).reshape(-1)
    # Inner products of all vectors with each other and with the running sum,
    # [n * P, n * P + 1], summed over the slices of all devices.
    products = _products([vectors], [jnp.concatenate([vectors, held[None]])])
    products = axis.device_total(products)
    # Rows are ordered by worker, but vectors are balanced by pair. Reordering the small
    # matrix of products is cheaper than reordering the vectors.
    sequence = jnp.arange(n * count, dtype=jnp.int32).reshape(n, count).T.reshape(-1)
    gram = products[sequence][:, sequence]
    start = products[sequence, -1]
    signs = _signs(gram, start, _each(complete, axis)).reshape(count, n)
    # Update this device's slice of the sum, and split it among the device's workers.
    held = held + jnp.matmul(signs.T.reshape(-1), vectors, precision="highest")
    running = held.reshape(axis.num_virtual, -1)[worker % axis.num_virtual]
    return signs[:, worker], running, axis.mean(mean_of(gradients))
