"""The only module that calls `jax.lax` collectives.

A worker axis can be a `vmap` axis (all workers on one device), a mesh axis of
`shard_map` or `pmap` (one worker a device), or folded: a `vmap` axis called
`"<name>.virtual"` inside a mesh axis called `"<name>.devices"`. Everything above this
module sees only the name; here the three are told apart, at trace time. When folded the
name itself is not bound, so that a collective of `jax.lax` over it fails instead of
reducing over one device's workers alone.

Results of reductions are marked as varying over the mesh axes, so that the branches of
a `cond` and the carry of a `scan` have one type under `shard_map(check_vma=True)`.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax.plans import Source, cached_plan
from decentral_jax.validation import check_axis_name

AxisName = str | tuple[str, ...]

# Endings of the two axes that stand for a folded worker axis.
DEVICES, VIRTUAL = ".devices", ".virtual"

# With more neighbours than this, a matrix product beats a sum of gathered rows.
DENSE_FROM = 24


class Axis(NamedTuple):
    """A worker axis as it is bound where the program is being traced."""

    mesh: tuple[str, ...]  # mesh axes: something travels along them
    virtual: tuple[str, ...]  # vmap axes: nothing travels
    num_devices: int
    num_virtual: int
    ordered: bool  # whether no mesh axis lies inside a vmap axis

    @property
    def size(self) -> int:
        """The number of workers."""
        return self.num_devices * self.num_virtual


def bound_axis(axis_name: AxisName) -> Axis:
    """Finds out what kind of axis a name is bound to.

    Args:
      axis_name: The worker axis, or a tuple of axes, the slowest-varying first.

    Returns:
      Its mesh and vmap axes and their sizes.

    Raises:
      ValueError: If the name is not bound.
    """
    check_axis_name(axis_name)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mesh, virtual = [], []
    ordered = True
    for name in names:
        folded = name + DEVICES in manual
        on_mesh = folded or name in manual
        ordered = ordered and not (on_mesh and virtual)
        if on_mesh:
            mesh.append(name + DEVICES if folded else name)
        if folded or not on_mesh:
            virtual.append(name + VIRTUAL if folded else name)
    try:
        num_devices = int(np.prod([lax.axis_size(name) for name in mesh], dtype=int))
        num_virtual = int(np.prod([lax.axis_size(name) for name in virtual], dtype=int))
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: call this under "
            f"jax.vmap(..., axis_name=...), jax.shard_map or dj.Workers(...).spmd with "
            "that name, or pass the name that you use there."
        ) from None
    return Axis(tuple(mesh), tuple(virtual), num_devices, num_virtual, ordered)


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to accumulate in: float32 for half precision, else the same."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """An array in the dtype to accumulate in."""
    x = jnp.asarray(x)
    return x.astype(widened(x.dtype))


def is_narrow(tree: Any) -> bool:
    """Whether any array of a tree has fewer digits than the dtype to accumulate in."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    return any(widened(dtype) != dtype for dtype in dtypes)


def fitted(value: float | jax.Array, x: jax.Array) -> float | jax.Array:
    """A hyperparameter for use with `x`: a float as it is, an array in its dtype.

    An injected hyperparameter has a dtype of its own, which must not change that of
    the state.
    """
    return value.astype(x.dtype) if isinstance(value, jax.Array) else value


def cast_like(tree: Any, like: Any) -> Any:
    """A tree in the dtypes of another one, which all who use it see rounded alike.

    XLA may leave out a rounding for one use of a value and not for another. What a
    worker subtracts of itself would then differ from what the others received.
    """
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(like)]
    leaves, structure = jax.tree.flatten(tree)
    if [x.dtype for x in leaves] == dtypes:
        return tree
    leaves = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
    return structure.unflatten(lax.optimization_barrier(leaves))


def wide_zeros(x: jax.typing.ArrayLike) -> jax.Array:
    """Zeros of an array's shape in the dtype to accumulate in."""
    x = jnp.asarray(x)
    return jnp.zeros(x.shape, widened(x.dtype))


def wide_copy(x: jax.typing.ArrayLike) -> jax.Array:
    """A copy of an array in the dtype to accumulate in."""
    return jnp.copy(wide(x))


def worker_index(axis_name: AxisName = "workers") -> jax.Array:
    """This worker's number, from 0, in every layout.

    Args:
      axis_name: The worker axis.

    Returns:
      An int32 scalar, different on each worker: fold it into a shared PRNG key for
      random numbers of the worker's own.

    Raises:
      ValueError: If a mesh axis lies inside a vmap axis, so that a device's workers
        have no consecutive numbers.
    """
    axis = bound_axis(axis_name)
    if not axis.ordered:
        raise ValueError(
            f"axis_name={axis_name!r} puts a mesh axis inside a vmap axis: name mesh "
            "axes first, or use numbers of devices that divide the outer axis."
        )
    index = jnp.zeros([], jnp.int32)
    if axis.mesh:
        index = lax.axis_index(axis.mesh).astype(jnp.int32) * axis.num_virtual
    if axis.virtual:
        index = index + lax.axis_index(axis.virtual).astype(jnp.int32)
    return index


def total(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sum over all workers, the same on each."""
    axis = bound_axis(axis_name)
    if axis.virtual:
        x = lax.psum(x, axis.virtual)
    return device_total(x, axis_name)


def mean(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Mean over all workers, the same on each; half precision travels as such.

    Half precision is divided before it is summed: the sum of float16 gradients under
    loss scaling would overflow where their mean does not.
    """
    axis = bound_axis(axis_name)
    first = widened(x.dtype) != x.dtype
    y = wide(x) / axis.size if first else x
    if axis.virtual:
        y = lax.psum(y, axis.virtual)
    y = y.astype(x.dtype)
    if axis.mesh:
        y = lax.pcast(lax.psum(y, axis.mesh), axis.mesh, to="varying")
    return y if first else y / axis.size


def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """An array times a weight, in its own dtype; where the weight is 0, it is 0."""
    wide = widened(x.dtype)
    y = x.astype(wide) * weight.astype(wide)
    return jnp.where(weight != 0, y, jnp.zeros_like(y)).astype(x.dtype)


def mean_in_parts(
    x: jax.Array,
    fn: Callable[[jax.Array], jax.Array],
    axis_name: AxisName,
    weight: jax.Array | None = None,
) -> jax.Array:
    """`fn` of the mean over workers; each device computes it for a part of the entries.

    What `fn` sends along another axis is thus sent once by all devices together, not by
    each of them. It must treat all entries alike.

    Args:
      x: This worker's array.
      fn: Maps an array to one of its shape.
      axis_name: The worker axis of the mean.
      weight: This worker's weight in the mean; equal if None.

    Returns:
      The result, the same on each worker of the axis.
    """
    axis = bound_axis(axis_name)
    y = weighted(x, jnp.full([], 1 / axis.size) if weight is None else weight)
    if axis.virtual:
        wide = widened(x.dtype)
        y = lax.psum(y.astype(wide), axis.virtual).astype(x.dtype)
    if axis.num_devices == 1:
        return varying(fn(y), axis_name)
    flat = jnp.pad(y.reshape(-1), (0, -y.size % axis.num_devices))
    part = fn(lax.psum_scatter(flat, axis.mesh, tiled=True))
    whole = lax.all_gather(part, axis.mesh, tiled=True)
    return varying(whole[: y.size].reshape(y.shape), axis_name)


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """All workers' arrays, the same on each: `[n, ...]` in the order of their numbers.

    On one device nothing is copied but the result.
    """
    axis = bound_axis(axis_name)
    if not axis.ordered:
        worker_index(axis_name)  # raises, with the remedy
    rows = _gather_virtual(x, axis)
    if axis.mesh:
        rows = varying(lax.all_gather(rows, axis.mesh, tiled=True), axis_name)
    return rows


def of_device(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The arrays of this device's workers, the same on each: `[num_virtual, ...]`."""
    return _gather_virtual(x, bound_axis(axis_name))


def to_devices(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """All-to-all: each worker has a part for each device, `[num_devices, ...]`.

    Returns:
      What all workers have for this device, the same on each of its workers:
      `[n, ...]` in the order of their numbers.
    """
    axis = bound_axis(axis_name)
    block = jnp.moveaxis(_gather_virtual(x, axis), 1, 0)
    if axis.mesh:
        block = lax.all_to_all(block, axis.mesh, 0, 0, tiled=True)
    return varying(block.reshape(axis.size, *x.shape[1:]), axis_name)


def device_total(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sum over devices of an array that a device's workers have in common."""
    axis = bound_axis(axis_name)
    if not axis.mesh:
        return x
    return lax.pcast(lax.psum(x, axis.mesh), axis.mesh, to="varying")


def device_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """All devices' arrays, which a device's workers have in common, stacked."""
    axis = bound_axis(axis_name)
    if not axis.mesh:
        return x[None]
    return varying(lax.all_gather(x, axis.mesh), axis_name)


def agreed(x: jax.typing.ArrayLike, axis_name: AxisName) -> jax.Array:
    """A value that is equal on all workers, without its batch dimension.

    A step counter in a worker's state is batched under `vmap`, and a `cond` on it would
    run both branches. Its maximum over the `vmap` axis is the same number, unbatched;
    nothing travels. On mesh axes the value is used as it is: that it is equal there is
    what `decentral_jax.lockstep` checks.
    """
    virtual = bound_axis(axis_name).virtual
    return lax.pmax(x, virtual) if virtual else equal_on_all_workers(jnp.asarray(x))


@jax.jit
def equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks, by this function's name in the traced program, what must be equal."""
    return lax.optimization_barrier(x)


@jax.jit
def value_equal_on_all_workers(x: jax.Array) -> jax.Array:
    """Marks, likewise, the loss that an optimizer reads where models stay equal."""
    return lax.optimization_barrier(x)


LARGEST_COUNT = 2**31 - 2


def advance(count: jax.typing.ArrayLike, period: int = 1) -> jax.Array:
    """The next step number, which never stops counting.

    At the end of int32 it goes on at the period's beginning, but not at 0, so that what
    happens every `period` steps goes on, and what happens in step 0 alone does not
    happen again.

    Args:
      count: An int32 scalar, the number of steps so far.
      period: What the count is used modulo, a multiple of all such numbers.

    Returns:
      The count plus one, or a number of the same remainder.
    """
    last = LARGEST_COUNT // period * period
    count = jnp.asarray(count, jnp.int32)
    return jnp.where(count < last, count, count - last + period) + 1


def either(
    due: jax.Array,
    axis_name: AxisName,
    then: Callable,
    otherwise: Callable,
    *operands: Any,
) -> Any:
    """`then(*operands)` where `due`, else `otherwise(*operands)`; only that one runs.

    A `cond` on devices and, since `due` must be `agreed`, also under `vmap`.
    """

    def marked(branch):
        def run(*operands):
            result = branch(*operands)
            return jax.tree.map(lambda x: varying(x, axis_name), result)

        return run

    return lax.cond(due, marked(then), marked(otherwise), *operands)


def every(
    period: int,
    count: jax.typing.ArrayLike,
    axis_name: AxisName,
    then: Callable,
    otherwise: Callable,
    *operands: Any,
) -> Any:
    """`then(*operands)` where `period` divides `count`, else `otherwise(*operands)`."""
    if period == 1:
        return then(*operands)
    due = agreed(count, axis_name) % period == 0
    return either(due, axis_name, then, otherwise, *operands)


def varying(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Marks a value as different on each worker for `shard_map(check_vma=True)`."""
    for name in bound_axis(axis_name).mesh:
        # It fails where x already varies; JAX offers no stable way to ask.
        with contextlib.suppress(ValueError):
            x = lax.pcast(x, name, to="varying")
    return x


def combine(
    x: Any,
    matrices: Sequence[np.ndarray],
    axis_name: AxisName,
    step: jax.Array | int | None = None,
    decode: Callable[[Any], Any] = lambda x: x,
) -> Any:
    r"""This worker's row of :math:`W X`: the weighted sum of all workers' arrays.

    Args:
      x: This worker's array, or whatever pytree travels in its place.
      matrices: One matrix `[n, n]`, or several of which round `step` uses the one at
        `step % len(matrices)`.
      axis_name: The worker axis, of size `n`.
      step: The round; must be equal on all workers.
      decode: Turns what has travelled into a pytree of the arrays to be summed.

    Returns:
      :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`, accumulated in at least float32, in
      its own dtype.
    """
    axis = bound_axis(axis_name)
    plans = [cached_plan(matrix, axis.num_devices) for matrix in matrices]
    worker = worker_index(axis_name)
    block = jax.tree.map(lambda x: _gather_virtual(x, axis), x)
    t = _round(len(plans), step, axis_name)
    like = jax.eval_shape(decode, x)

    def weigh(rows, source, t: Any = 0):
        return _weigh(rows, decode, like, source, worker, t)

    def narrow(y):
        return jax.tree.map(lambda y, x: y.astype(x.dtype), y, like)

    def plus(y, z):
        return jax.tree.map(jnp.add, y, z)

    if axis.num_devices == 1:
        # Nothing travels: index the weights instead of switching between programs, so
        # that an outer vmap over runs does not compute every round's branch.
        local = _stack([plan.local for plan in plans])
        if isinstance(x, jax.Array) and local.index.shape[-1] > DENSE_FROM:
            dtype = widened(x.dtype)
            weights = jnp.asarray(np.stack(matrices), dtype)[t, worker]
            y = _dense_row(weights, block.astype(dtype))
        else:
            y = weigh(block, local, t)
        return jax.tree.map(lambda y: varying(y, axis_name), narrow(y))

    def receive(pairs, rows, block):
        sent = block
        if axis.num_virtual > 1:
            mine = jnp.asarray(rows)[lax.axis_index(axis.mesh)]
            sent = jax.tree.map(lambda b: b[mine], block)
        return jax.tree.map(lambda s: lax.ppermute(s, axis.mesh, pairs), sent)

    def exchange(plan, block):
        y = weigh(block, _stack([plan.local]))
        for pairs, rows, source in plan.rounds:
            y = plus(y, weigh(receive(pairs, rows, block), _stack([source])))
        return narrow(y)

    if len(plans) == 1:
        return exchange(plans[0], block)
    if axis.num_virtual > 1 or any(len(plan.rounds) != 1 for plan in plans):
        return lax.switch(t, [functools.partial(exchange, p) for p in plans], block)
    # One exchange in each round: what is outside the switch can be fused with the
    # computation around it.
    rounds = [plan.rounds[0] for plan in plans]
    received = lax.switch(
        t, [functools.partial(receive, pairs, rows) for pairs, rows, _ in rounds], block
    )
    y = weigh(block, _stack([plan.local for plan in plans]), t)
    return narrow(plus(y, weigh(received, _stack([r.source for r in rounds]), t)))


def _round(count: int, step: Any, axis_name: AxisName) -> Any:
    """Which of `count` rounds step `step` uses, equal on all workers."""
    return 0 if count == 1 else agreed(jnp.asarray(step), axis_name) % count


def dense_differences(
    x: jax.Array,
    matrices: Sequence[np.ndarray],
    axis_name: AxisName,
    step: jax.Array | int | None = None,
) -> jax.Array:
    r"""What `combine` adds on one device, :math:`\sum_j W_{ij} (x_j - x_i)`.

    Of the arrays less their mean: weights that do not sum to one by a rounding error
    would else move all workers alike, step by step.
    """
    axis, worker = bound_axis(axis_name), worker_index(axis_name)
    rows = _gather_virtual(x, axis)
    rows = rows - rows.mean(0)
    t = _round(len(matrices), step, axis_name)
    weights = jnp.asarray(np.stack(matrices), x.dtype)[t, worker]
    return varying(_dense_row(weights, rows) - rows[worker], axis_name)


def _gather_virtual(x: jax.Array, axis: Axis) -> jax.Array:
    """The arrays of this device's virtual workers, stacked: `[num_virtual, ...]`."""
    if not axis.virtual:
        return x[None]
    # vmap gathers over one axis at a time, the innermost first.
    for name in reversed(axis.virtual):
        x = lax.all_gather(x, name)
    return x.reshape(axis.num_virtual, *x.shape[len(axis.virtual) :])


def _stack(sources: Sequence[Source]) -> Source:
    """Stacks sources over rounds, padded to the same number of rows."""
    most = max(source.index.shape[1] for source in sources)

    def pad(array):
        return np.pad(array, ((0, 0), (0, most - array.shape[1])))

    return Source(
        np.stack([pad(source.index) for source in sources]),
        np.stack([pad(source.weight) for source in sources]),
    )


def _weigh(
    rows: Any,
    decode: Callable[[Any], Any],
    like: Any,
    source: Source,
    worker: jax.Array,
    t: jax.Array | int,
) -> Any:
    """Sums the rows that this worker uses in round `t`, each times its weight."""
    y = jax.tree.map(lambda x: jnp.zeros(x.shape, widened(x.dtype)), like)
    for slot in range(source.index.shape[-1]):
        index, weight = source.index[..., slot], source.weight[..., slot]
        same = (index == index.flat[0]).all()
        at = int(index.flat[0]) if same else jnp.asarray(index)[t, worker]
        arrays = decode(jax.tree.map(lambda r, at=at: r[at], rows))
        add = functools.partial(_add_weighted, weight=weight, worker=worker, t=t)
        y = jax.tree.map(add, y, arrays)
    return y


def _dense_row(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums all workers' arrays `[n, ...]`, each times its weight `[n]`.

    As a matrix product where all is finite. Else 0 times NaN would carry one worker's
    NaN to workers that do not talk to it.
    """

    def product(weights, rows):
        flat = rows.reshape(rows.shape[0], -1)
        product = jnp.matmul(weights, flat, precision="highest")
        return product.reshape(rows.shape[1:])

    def one_by_one(weights, rows):
        def add(j, y):
            w = weights[j]
            return y + jnp.where(w != 0, rows[j] * w, jnp.zeros_like(y))

        return lax.fori_loop(0, rows.shape[0], add, jnp.zeros_like(rows[0]))

    finite = jnp.isfinite(rows).all()
    return lax.cond(finite, product, one_by_one, weights, rows)


def _add_weighted(y, row, weight, worker, t):
    row = row.astype(y.dtype)
    if (weight == weight.flat[0]).all():
        return y + row * jnp.asarray(weight.flat[0], y.dtype)
    own = jnp.asarray(weight, y.dtype)[t, worker]
    # An unused slot points at some worker's row, which may hold inf or NaN.
    return y + (row * own if weight.all() else jnp.where(own != 0, row * own, 0))
