"""Vector balancing: signs that keep a running sum of vectors small.

Vectors are taken in sequence, each with the sign that turns it against the sum so far.
The mathematics of `decentral_jax.transforms.ordering`, on lists of leaves.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from decentral_jax import collectives
from decentral_jax.collectives import AxisName
from decentral_jax.mixing import average

# So many vectors are compared with the running sum at once.
CHUNK = 8


def zeros_like_wide(leaves: list) -> list:
    """Zeros of the leaves' shapes, at least float32."""
    return [jnp.zeros(x.shape, collectives.widened(x.dtype)) for x in leaves]


def mean_of(leaves: list) -> list:
    """The mean over the leading axis."""
    return [leaf.mean(0) for leaf in leaves]


def balance(
    leaves: list,
    running: list,
    mask: jax.Array,
    vectors: Callable[[list], list],
) -> tuple[jax.Array, list]:
    """Signs of vectors taken in sequence, and the running sum after them.

    Args:
      leaves: What the vectors are made of, `[K, ...]`.
      running: The sum before, leaves as a vector's.
      mask: Which vectors count, `[K]`.
      vectors: From a part of the leaves, `[C, ...]`, to the vectors.

    Returns:
      1, -1 or, where masked out, 0, `[K]`; and the sum.
    """
    count = mask.shape[0]

    def part(running, inputs):
        leaves, mask = inputs
        given = [
            x.astype(r.dtype) for x, r in zip(vectors(leaves), running, strict=True)
        ]
        gram = _products(given, given)
        start = _products(given, [r[None] for r in running])[:, 0]
        signs = _signs(gram, start, mask)
        running = [
            r + jnp.tensordot(signs, x, 1, precision="highest")
            for r, x in zip(running, given, strict=True)
        ]
        return running, signs

    if count <= CHUNK:
        running, signs = part(running, (leaves, mask))
        return signs, running
    padded = -(-count // CHUNK) * CHUNK

    def chunks(x):
        x = jnp.pad(x, [(0, padded - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, CHUNK, *x.shape[1:])

    running, signs = lax.scan(
        part, running, ([chunks(x) for x in leaves], chunks(mask))
    )
    return signs.reshape(-1)[:count], running


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
    """1 where the product with the running sum is not positive, else -1; or 0."""
    return jnp.where(counts, jnp.where(product <= 0, 1, -1), 0).astype(product.dtype)


def balance_here(
    gradients: list,
    pairs: list,
    complete: jax.Array,
    running: list,
    axis_name: AxisName,
) -> tuple[jax.Array, list, list]:
    """Balances all workers' pairs where they are on one device: nothing travels.

    Args:
      gradients: This worker's, leaves `[B, ...]`.
      pairs: The same in pairs, leaves `[P, 2, ...]`.
      complete: Which pairs count, `[P]`.
      running: This worker's slices of the running sum.
      axis_name: The worker axis.

    Returns:
      This worker's signs `[P]`, its slices of the running sum, the mean gradient.
    """
    n = collectives.bound_axis(axis_name).size
    worker = collectives.worker_index(axis_name)
    whole = [
        collectives.gather(r, axis_name)
        .reshape(-1)[: g[0, 0].size]
        .reshape(g.shape[2:])
        for r, g in zip(running, pairs, strict=True)
    ]
    everyone = [collectives.gather(g, axis_name) for g in pairs]
    complete = collectives.agreed(complete, axis_name)
    count = complete.shape[0]

    def body(i, carry):
        whole, signs = carry
        pair, one = i // n, i % n

        def rows(x):
            start = (one, pair) + (0,) * (x.ndim - 2)
            return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]

        both = [rows(x).astype(r.dtype) for x, r in zip(everyone, whole, strict=True)]
        # Two products, of the gradients as they lie in memory: on a CPU faster than one
        # of a difference that has to be written first.
        products = _products(both, [r[None] for r in whole])[:, 0]
        sign = _sign(products[0] - products[1], complete[pair])
        whole = [r + sign * (x[0] - x[1]) for r, x in zip(whole, both, strict=True)]
        return whole, signs.at[pair, one].set(sign)

    signs = jnp.zeros((count, n), whole[0].dtype)
    whole, signs = lax.fori_loop(0, count * n, body, (whole, signs))

    def own(x, r):
        flat = jnp.pad(x.reshape(-1), (0, n * r.size - x.size))
        return flat.reshape(n, -1)[worker]

    running = [own(x, r) for x, r in zip(whole, running, strict=True)]
    return signs[:, worker], running, average(mean_of(gradients), axis_name)


def balance_apart(
    gradients: list,
    pairs: list,
    complete: jax.Array,
    running: list,
    axis_name: AxisName,
) -> tuple[jax.Array, list, list]:
    """The same where workers are on several devices, each with a slice of all vectors.

    A worker sends its differences and the sum of its gradients, sliced; and receives,
    beside the slices, the mean's other parts.
    """
    axis = collectives.bound_axis(axis_name)
    n, batch = axis.size, gradients[0].shape[0]
    widths = [r.size * axis.num_virtual for r in running]
    dtype = max((g.dtype for g in gradients), key=lambda dtype: dtype.itemsize)

    def sliced(rows, r):
        flat = rows.reshape(rows.shape[0], -1).astype(dtype)
        flat = jnp.pad(flat, ((0, 0), (0, n * r.size - flat.shape[1])))
        return flat.reshape(rows.shape[0], axis.num_devices, -1)

    rows = [
        jnp.concatenate(
            [(g[:, 0] - g[:, 1]).astype(dtype), b.sum(0, keepdims=True).astype(dtype)]
        )
        for g, b in zip(pairs, gradients, strict=True)
    ]
    parts = [sliced(x, r) for x, r in zip(rows, running, strict=True)]
    sent = jnp.moveaxis(jnp.concatenate(parts, -1), 1, 0)
    received = collectives.to_devices(sent, axis_name)  # [n, P + 1, width]
    wide = running[0].dtype
    vectors = received[:, :-1].swapaxes(0, 1).reshape(-1, sum(widths)).astype(wide)
    held = jnp.concatenate(
        [collectives.of_device(r, axis_name).reshape(-1) for r in running]
    )
    products = _products([vectors], [jnp.concatenate([vectors, held[None]])])
    products = collectives.device_total(products, axis_name)
    mask = jnp.repeat(collectives.agreed(complete, axis_name), n)
    signs = _signs(products[:, :-1], products[:, -1], mask)
    held = held + jnp.matmul(signs, vectors, precision="highest")
    ends = list(itertools.accumulate(widths))[:-1]
    row = collectives.worker_index(axis_name) % axis.num_virtual
    running = [
        x.reshape(axis.num_virtual, -1)[row] for x in jnp.split(held, ends, axis=-1)
    ]
    mean = received[:, -1].astype(wide).sum(0) / (n * batch)
    everywhere = collectives.device_gather(mean.astype(dtype), axis_name)
    means = [
        x.reshape(-1)[: b[0].size].reshape(b.shape[1:]).astype(b.dtype)
        for x, b in zip(jnp.split(everywhere, ends, axis=-1), gradients, strict=True)
    ]
    own = signs.reshape(-1, n)[:, collectives.worker_index(axis_name)]
    return own, running, means
