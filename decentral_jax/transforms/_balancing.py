"""Vector balancing: signs that keep a running sum of vectors small.

Vectors are taken in sequence, each with the sign that turns it against the sum so far.
The mathematics of `decentral_jax.transforms._grab`, on lists of leaves.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax._exchange.axis import WorkerAxis
from decentral_jax._exchange.numbers import widened

# Leaves of fewer entries are joined, which saves more operations than it copies.
SMALL = 1 << 18


def zeros_like_wide(leaves: list) -> list:
    """Zeros of the leaves' shapes, at least float32."""
    return [jnp.zeros(x.shape, widened(x.dtype)) for x in leaves]


def size_and_dtype(leaves: list) -> tuple[int, jnp.dtype]:
    """Of a vector of all entries, at least float32."""
    dtypes = [widened(x.dtype) for x in leaves]
    return sum(x.size for x in leaves), functools.reduce(jnp.promote_types, dtypes)


def mean_of(leaves: list) -> list:
    """The mean over the leading axis."""
    return [leaf.mean(0) for leaf in leaves]


def _products(xs: list, ys: list) -> jax.Array:
    """All inner products of two stacks of vectors, given by their leaves."""

    def of_leaf(x, y):
        axes = list(range(1, x.ndim))
        return jnp.tensordot(x, y, (axes, axes), precision="highest")

    first, *others = map(of_leaf, xs, ys)
    return functools.reduce(jnp.add, others, first)


def _signs(gram: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
    r"""Signs in sequence: :math:`s_k = 1` where :math:`\langle r, d_k \rangle \le 0`.

    :math:`\langle r, d_k \rangle` is the start's product and, of all vectors before,
    their signs times their products with this one.
    """

    def body(k, signs):
        return signs.at[k].set(_sign(start[k] + signs @ gram[k], mask[k]))

    return lax.fori_loop(0, mask.shape[0], body, jnp.zeros_like(start))


def _sign(product: jax.Array, counts: jax.Array) -> jax.Array:
    """1 where the product with the running sum is not positive, else -1; or 0.

    Where the exact product is 0 and rounding makes it positive, the sign is -1. A
    tolerance would not change that: the running sum itself may be nothing but rounding.
    """
    return jnp.where(counts, jnp.where(product <= 0, 1, -1), 0).astype(product.dtype)


def balance(
    rows: list,
    running: jax.Array,
    mask: jax.Array,
    axis: WorkerAxis,
    at: Callable[[jax.Array], tuple] = lambda i: (i,),
) -> tuple[jax.Array, jax.Array]:
    """Signs of vectors taken in sequence, and the running sum after them.

    Args:
      rows: Leaves of the vectors, `[..., size]`; or pairs, `[..., 2, size]`, whose
        differences are the vectors.
      running: The sum before, `[d]`, its leaves as `joined` has them.
      mask: Which vectors count, `[K]`.
      axis: The worker axis.
      at: From a vector's number in the sequence to its place in the leading axes.

    Returns:
      1, -1 or, where masked out, 0, `[K]`; and the sum.
    """
    groups = _groups(rows)
    axes = len(at(jnp.zeros([], jnp.int32)))
    # Small leaves become one vector: fewer operations for a short copy.
    parts = [
        rows[group[0]]
        if len(group) == 1
        else joined([_differences(rows[i], axes) for i in group], running.dtype)
        for group in groups
    ]

    def vector(i):
        return [_differences(x[at(i)], 0) for x in parts]

    ends = list(itertools.accumulate(x.shape[-1] for x in parts))[:-1]
    sums = jnp.split(running, ends)
    signs, sums = _in_sequence(vector, mask, sums, axis)
    return signs, jnp.concatenate(sums)


def joined(leaves: list, dtype: jnp.dtype) -> jax.Array:
    """Leaves `[..., size]` in one, `[..., d]`: large ones in front, then the others."""
    order = itertools.chain(*_groups(leaves))
    return jnp.concatenate([leaves[i].astype(dtype) for i in order], -1)


def _groups(leaves: list) -> list[list[int]]:
    """Which leaves are taken together: large ones alone, all others."""
    small = [i for i, x in enumerate(leaves) if x.shape[-1] < SMALL]
    large = [[i] for i in range(len(leaves)) if i not in small]
    return large + [small] * bool(small)


def _differences(x: jax.Array, axes: int) -> jax.Array:
    """Of pairs, their differences; of vectors, themselves."""
    return x if x.ndim == axes + 1 else x[..., 0, :] - x[..., 1, :]


def _in_sequence(
    vector: Callable[[jax.Array], list],
    mask: jax.Array,
    running: list,
    axis: WorkerAxis,
) -> tuple[jax.Array, list]:
    """`balance` of vectors that are read by number.

    Each is read once, two at a time: XLA multiplies two rows with a vector well on
    CPUs, but neither one row nor many rows with each other.
    """
    count = mask.shape[0]
    mask = jnp.pad(mask, (0, count % 2))

    def body(i, carry):
        running, signs = carry
        first, second = 2 * i, 2 * i + 1
        pair = vector(first), vector(jnp.minimum(second, count - 1))
        both = [
            jnp.stack([x, y]).astype(r.dtype)
            for x, y, r in zip(*pair, running, strict=True)
        ]
        # Else the vectors would be computed again for every use of them.
        both = lax.optimization_barrier(both)
        with_sum = _products(both, [r[None] for r in running])[:, 0]
        with_first = _products(both, [x[:1] for x in both])[:, 0]
        a = _sign(with_sum[0], mask[first])
        b = _sign(with_sum[1] + a * with_first[1], mask[second])
        running = [r + a * x[0] + b * x[1] for r, x in zip(running, both, strict=True)]
        return running, signs.at[first].set(a).at[second].set(b)

    dtype = functools.reduce(jnp.promote_types, (r.dtype for r in running))
    signs = axis.varying(jnp.zeros(mask.shape, dtype))
    running, signs = lax.fori_loop(0, mask.shape[0] // 2, body, (running, signs))
    return signs[:count], running


def balance_here(
    gradients: list,
    pairs: list,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
) -> tuple[jax.Array, jax.Array, list]:
    """Balances all workers' pairs where they are on one device: nothing travels.

    Args:
      gradients: This worker's, leaves `[B, ...]`.
      pairs: The same in pairs, leaves `[P, 2, ...]`.
      complete: Which pairs count, `[P]`.
      running: This worker's slice of the running sum.
      axis: The worker axis.

    Returns:
      This worker's signs `[P]`, its slice of the running sum, the mean gradient.
    """
    n, rows = axis.size, flat(pairs)
    size = sum(x.shape[-1] for x in rows)
    signs, whole = balance(
        axis.gather(rows),
        axis.gather(running).reshape(-1)[:size],
        _each(complete, axis),
        axis,
        at=lambda i: (i % n, i // n),
    )
    running = jnp.pad(whole, (0, n * running.size - size)).reshape(n, -1)[axis.index]
    own = signs.reshape(-1, n)[:, axis.index]
    return own, running, axis.mean(mean_of(gradients))


def flat(pairs: list) -> list:
    """Leaves `[P, 2, ...]` as `[P, 2, size]`."""
    return [x.reshape(*x.shape[:2], -1) for x in pairs]


def _each(complete: jax.Array, axis: WorkerAxis) -> jax.Array:
    """Which differences count, in sequence: all workers' first, then their second."""
    return jnp.repeat(axis.unvmap(complete), axis.size)


def balance_gathered(
    gradients: list,
    pairs: list,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
    sketch: int | None,
) -> tuple[jax.Array, jax.Array, list]:
    """The same where everyone gets all differences, or sketches of them.

    Every worker has the whole running sum.
    """
    n = axis.size
    rows = flat(pairs)
    if sketch is not None:
        # Of the gradients as they are: their differences need not be written then.
        rows = [sketched([x.astype(running.dtype) for x in rows], sketch)]
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


def sketched(leaves: list, k: int) -> jax.Array:
    r"""A random projection to k entries that keeps inner products on average.

    A vector is cut into k pieces, and each is summed with the same random signs
    :math:`a`: :math:`E \langle S x, S y \rangle = \sum_{i,j} E[a_i a_j]
    \sum_p x_{p i} y_{p j} = \langle x, y \rangle`.

    Args:
      leaves: Vectors' leaves, `[..., size]`.
      k: The number of entries.

    Returns:
      The sketches, `[..., k]`.
    """
    parts = []
    for number, x in enumerate(leaves):
        length = -(-x.shape[-1] // k)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, k * length - x.shape[-1])]
        pieces = jnp.pad(x, padding).reshape(*x.shape[:-1], k, length)
        key = jax.random.fold_in(jax.random.key(0), number)
        signs = jax.random.rademacher(key, (length,), x.dtype)
        parts.append(jnp.matmul(pieces, signs, precision="highest"))
    first, *others = parts
    return functools.reduce(jnp.add, others, first)


def balance_apart(
    gradients: list,
    pairs: list,
    complete: jax.Array,
    running: jax.Array,
    axis: WorkerAxis,
) -> tuple[jax.Array, jax.Array, list]:
    """The same where workers are on several devices, each with a slice of all vectors.

    Vectors lie in memory by worker, and are taken in sequence by pair: only the small
    matrix of their products is put in order.
    """
    n, count, worker = axis.size, len(complete), axis.index
    dtype = max((x.dtype for x in pairs), key=lambda dtype: dtype.itemsize)

    def sliced(i):
        x = joined([(x[i, 0] - x[i, 1]).reshape(-1) for x in pairs], dtype)
        x = jnp.pad(x, (0, n * running.size - x.size))
        return x.reshape(axis.num_devices, -1)

    sent = jnp.stack([sliced(i) for i in range(count)], 1)
    received = axis.to_devices(sent)  # [n, P, width]
    vectors = received.reshape(n * count, -1).astype(running.dtype)
    held = axis.of_device(running).reshape(-1)
    # The running sum takes part in the products as one vector more.
    products = _products([vectors], [jnp.concatenate([vectors, held[None]])])
    products = axis.device_total(products)
    sequence = jnp.arange(n * count, dtype=jnp.int32).reshape(n, count).T.reshape(-1)
    gram = products[sequence][:, sequence]
    start = products[sequence, -1]
    signs = _signs(gram, start, _each(complete, axis)).reshape(count, n)
    held = held + jnp.matmul(signs.T.reshape(-1), vectors, precision="highest")
    running = held.reshape(axis.num_virtual, -1)[worker % axis.num_virtual]
    return signs[:, worker], running, axis.mean(mean_of(gradients))
