"""The bound worker axis; only this module calls `jax.lax` collectives.

A worker axis is a `vmap` axis (all workers on one device), a mesh axis of `shard_map`
or `pmap` (one worker per device), or folded: a `vmap` axis called `"<name>.virtual"`
inside a mesh axis called `"<name>.devices"`. Code above this module sees only the name;
`WorkerAxis.bind` tells the three apart at trace time. A folded axis does not bind the
name itself, so a `jax.lax` collective over it fails instead of reducing over the
workers of one device.

Sending and weighing are separate: `send` moves arrays between devices, and `weigh` sums
the arrays that have arrived. Independent computation between the two calls may overlap
with the exchange. Another transport only has to replace `deliver`, which `send` calls
once per message.

Results of reductions are marked as varying over the mesh axes, so that the branches of
a `cond` and the carry of a `scan` have one type under `shard_map(check_vma=True)`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.numbers import (
    PyTree,
    equal_on_all_workers,
    weighted,
    wide,
    widened,
)
from decentral_jax._exchange.packing import ALL_REDUCE_BUCKET_BYTES, mapped_packed
from decentral_jax._exchange.plans import Plan, Round, cached_plan
from decentral_jax._exchange.weighing import (
    DENSE_FROM,
    dense_row,
    stacked,
    weighted_sum,
)
from decentral_jax._validation import check_axis_name

AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")

# Suffixes of the two axes that stand for a folded worker axis.
DEVICES, VIRTUAL = ".devices", ".virtual"


@dataclasses.dataclass(frozen=True)
class WorkerAxis:
    """A worker axis, as bound at the current point of tracing.

    Attributes:
      name: Name of the worker axis, or a tuple of names, the slowest-varying first.
      mesh: Names of mesh axes, along which devices send arrays.
      virtual: Names of `vmap` axes, along which nothing is sent.
      num_devices: Number of devices along the mesh axes.
      num_virtual: Number of workers per device.
      ordered: Whether no mesh axis lies inside a `vmap` axis.
    """

    name: AxisName
    mesh: tuple[str, ...]
    virtual: tuple[str, ...]
    num_devices: int
    num_virtual: int
    ordered: bool

    @classmethod
    def bind(cls, axis_name: AxisName) -> Self:
        """Looks up the mesh axes and `vmap` axes that a name is bound to.

        Args:
          axis_name: Name of the worker axis, or a tuple of names, the slowest-varying
            first.

        Returns:
          The bound axis.

        Raises:
          ValueError: If the name is not bound.
        """
        check_axis_name(axis_name)
        names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
        # A name is a mesh axis, a `vmap` axis, or both (folded, by the suffixes).
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
            num_devices = math.prod(lax.axis_size(name) for name in mesh)
            num_virtual = math.prod(lax.axis_size(name) for name in virtual)
        except NameError:
            raise ValueError(
                f"axis_name={axis_name!r} is not bound here: call this under "
                "jax.vmap(..., axis_name=...), jax.shard_map or dj.Workers(...).spmd "
                "with that name, or pass the name that you use there."
            ) from None
        mesh, virtual = tuple(mesh), tuple(virtual)
        return cls(axis_name, mesh, virtual, num_devices, num_virtual, ordered)

    @property
    def size(self) -> int:
        """Number of workers."""
        return self.num_devices * self.num_virtual

    @property
    def index(self) -> jax.Array:
        """Number of this worker, counted from 0: an int32 scalar."""
        self._check_ordered()
        # Workers are numbered device by device.
        index = jnp.zeros([], jnp.int32)
        if self.mesh:
            index = lax.axis_index(self.mesh).astype(jnp.int32) * self.num_virtual
        if self.virtual:
            index = index + lax.axis_index(self.virtual).astype(jnp.int32)
        return index

    def _check_ordered(self) -> None:
        if not self.ordered:
            raise ValueError(
                f"axis_name={self.name!r} puts a mesh axis inside a vmap axis: name "
                "mesh axes first, or use numbers of devices that divide the outer axis."
            )

    # Agreement between workers

    def unvmap(self, x: jax.typing.ArrayLike) -> jax.Array:
        """Returns a value that is equal on all workers, without its batch dimension.

        A step counter in a worker's state is batched under `vmap`, and a `cond` on it
        would run both branches. Its maximum over the `vmap` axis is the same number,
        unbatched, and needs no communication. On mesh axes the value is used as it is;
        `decentral_jax._lockstep` checks that it is equal there.
        """
        if self.virtual:
            return lax.pmax(x, self.virtual)
        return equal_on_all_workers(jnp.asarray(x))

    def step_key(self, seed: int, count: jax.typing.ArrayLike) -> jax.Array:
        """Returns the PRNG key of a step, equal on all workers."""
        return jax.random.fold_in(jax.random.key(seed), self.unvmap(count))

    def varying(self, tree: Tree) -> Tree:
        """Marks arrays as different on each worker for `shard_map(check_vma=True)`."""

        def mark(x):
            x = jnp.asarray(x)
            for name in self.mesh:
                # It fails where x already varies; JAX offers no stable way to ask.
                with contextlib.suppress(ValueError):
                    x = lax.pcast(x, name, to="varying")
            return x

        return jax.tree.map(mark, tree)

    def uniform_cond(
        self,
        due: jax.Array,
        then: Callable[..., PyTree],
        otherwise: Callable[..., PyTree],
        *operands: PyTree,
    ) -> PyTree:
        """Runs one of two branches, chosen by a condition equal on all workers.

        Args:
          due: Boolean scalar computed from `unvmap`. It is not batched, so `vmap` does
            not turn the `lax.cond` into a select that runs both branches.
          then: Function of the operands that runs if `due` is true.
          otherwise: Function of the operands that runs if `due` is false.
          *operands: Pytrees of arrays.

        Returns:
          The result of the branch, marked as varying.
        """
        branches = [
            lambda *operands, branch=branch: self.varying(branch(*operands))
            for branch in (then, otherwise)
        ]
        return lax.cond(due, *branches, *operands)

    def cond_every(
        self,
        period: int,
        count: jax.typing.ArrayLike,
        then: Callable[..., PyTree],
        otherwise: Callable[..., PyTree],
        *operands: PyTree,
    ) -> PyTree:
        """Runs `then` if `period` divides `count`, and `otherwise` if not."""
        if period == 1:
            return then(*operands)
        due = self.unvmap(count) % period == 0
        return self.uniform_cond(due, then, otherwise, *operands)

    # Reductions

    def total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over all workers, equal on all of them."""
        if self.virtual:
            x = lax.psum(x, self.virtual)
        return self.device_total(x)

    def device_total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over devices of an array that the workers of each share."""
        if not self.mesh:
            return x
        return lax.pcast(lax.psum(x, self.mesh), self.mesh, to="varying")

    def mean(self, tree: Tree) -> Tree:
        """Returns the mean over all workers, equal on all of them.

        Half precision is sent as it is. It is divided before it is summed: the sum of
        float16 gradients under loss scaling could overflow although their mean does
        not.
        """
        return mapped_packed(self._mean, tree, self, ALL_REDUCE_BUCKET_BYTES)

    def _mean(self, x: jax.Array) -> jax.Array:
        first = widened(x.dtype) != x.dtype
        y = wide(x) / self.size if first else x
        if self.virtual:
            y = lax.psum(y, self.virtual)
        y = y.astype(x.dtype)
        if self.mesh:
            y = lax.pcast(lax.psum(y, self.mesh), self.mesh, to="varying")
        return y if first else y / self.size

    def mean_in_parts(
        self,
        x: jax.Array,
        fn: Callable[[jax.Array], jax.Array],
        weight: jax.Array | None = None,
    ) -> jax.Array:
        """Returns `fn` of the mean; each device computes it for a part of the entries.

        If `fn` sends the mean along another axis, the devices of this axis share the
        work: together they send each entry once.

        Args:
          x: This worker's array.
          fn: Function from an array to an array of the same shape, which treats all
            entries alike.
          weight: This worker's weight in the mean. None means equal weights.

        Returns:
          The result, equal on all workers of the axis.
        """
        # The weighted sum over the workers of this device.
        y = weighted(x, jnp.full([], 1 / self.size) if weight is None else weight)
        if self.virtual:
            y = lax.psum(wide(y), self.virtual).astype(x.dtype)
        if self.num_devices == 1:
            return self.varying(fn(y))
        # Reduce-scatter, apply `fn` to this device's part, and gather all parts.
        flat = jnp.pad(y.reshape(-1), (0, -y.size % self.num_devices))
        part = fn(lax.psum_scatter(flat, self.mesh, tiled=True))
        whole = lax.all_gather(part, self.mesh, tiled=True)
        return self.varying(whole[: y.size].reshape(y.shape))

    # All workers' arrays

    def gather(self, tree: Tree) -> Tree:
        """Returns the arrays of all workers, `[n, ...]` by worker number, on each one.

        On one device, only the result is copied.
        """
        self._check_ordered()
        return mapped_packed(self._gather, tree, self)

    def _gather(self, x: jax.Array) -> jax.Array:
        rows = self.of_device(x)
        if self.mesh:
            rows = self.varying(lax.all_gather(rows, self.mesh, tiled=True))
        return rows

    def of_device(self, x: jax.Array) -> jax.Array:
        """Returns the arrays of the workers on this device, `[num_virtual, ...]`."""
        if not self.virtual:
            return x[None]
        # `vmap` gathers over one axis at a time; start with the innermost one.
        for name in reversed(self.virtual):
            x = lax.all_gather(x, name)
        return x.reshape(self.num_virtual, *x.shape[len(self.virtual) :])

    def to_devices(self, x: jax.Array) -> jax.Array:
        """Performs an all-to-all exchange with one part per device.

        Args:
          x: This worker's parts, `[num_devices, ...]`; part `d` goes to device `d`.

        Returns:
          The parts that all workers sent to this device, `[n, ...]` by worker number,
          equal on all workers of the device.
        """
        block = jnp.moveaxis(self.of_device(x), 1, 0)
        if self.mesh:
            block = lax.all_to_all(block, self.mesh, 0, 0, tiled=True)
        return self.varying(block.reshape(self.size, *x.shape[1:]))

    # Gossip: sending and weighing are separate

    def plan(self, matrices: Sequence[np.ndarray]) -> tuple[Plan, ...]:
        """Returns the plan of a gossip round for each mixing matrix `[n, n]`."""
        return tuple(cached_plan(matrix, self.num_devices) for matrix in matrices)

    def send(
        self,
        plans: tuple[Plan, ...],
        tree: PyTree,
        step: jax.typing.ArrayLike | None = None,
    ) -> tuple[PyTree, ...]:
        """Sends this worker's arrays to the devices that need them.

        Args:
          plans: Result of `plan`; step `t` uses the plan at `t % len(plans)`.
          tree: Pytree of arrays.
          step: Step number, equal on all workers. Not needed with one plan.

        Returns:
          The rows received from other devices, as input for `weigh`: one tree per
          message, with leaves `[k, ...]`. Empty on one device.
        """
        if self.num_devices == 1:
            return ()
        block = jax.tree.map(self.of_device, tree)
        if len(plans) == 1:
            return tuple(self.deliver(each, block) for each in plans[0].rounds)

        # All branches of a switch must return the same shapes: pad every message to
        # the largest one in the same slot, and every plan to the most messages.
        slots = range(max(len(plan.rounds) for plan in plans))
        rows = [
            max(p.rounds[slot].rows.shape[1] for p in plans if slot < len(p.rounds))
            for slot in slots
        ]

        def receive(plan, block):
            parts = [self.deliver(each, block) for each in plan.rounds]
            empty = jax.tree.map(lambda b: b[:0], block)
            parts += [empty] * (len(slots) - len(parts))
            return tuple(map(_padded, parts, rows))

        branches = [functools.partial(receive, plan) for plan in plans]
        return lax.switch(self._round(plans, step), branches, block)

    def deliver(self, message: Round, block: PyTree) -> PyTree:
        """Delivers one message of a plan: the rows that the receiving device needs.

        Another transport overrides this method.

        Args:
          message: Round of a plan: who sends which rows to whom.
          block: Arrays of this device's workers, leaves `[num_virtual, ...]`.

        Returns:
          The rows from the sender in `message.pairs`, leaves `[k, ...]`. What a device
          without a sender returns is not used.
        """
        if self.num_virtual > 1:
            mine = jnp.asarray(message.rows)[lax.axis_index(self.mesh)]
            block = jax.tree.map(lambda b: b[mine], block)
        return jax.tree.map(lambda b: lax.ppermute(b, self.mesh, message.pairs), block)

    def weigh(
        self,
        plans: tuple[Plan, ...],
        tree: PyTree,
        received: tuple[PyTree, ...],
        step: jax.typing.ArrayLike | None = None,
        decode: Callable[[PyTree], PyTree] | None = None,
    ) -> PyTree:
        r"""Sums the arrays of all workers, each times its weight.

        Args:
          plans: As in `send`.
          tree: As in `send`.
          received: Result of `send`.
          step: As in `send`.
          decode: Function from a sent tree to a pytree of the arrays to sum. None sums
            the sent trees as they are.

        Returns:
          :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`, accumulated in at least float32,
          and returned in the dtypes of the decoded arrays.
        """
        # Rows of the workers on this device, leaves [num_virtual, ...].
        block = jax.tree.map(self.of_device, tree)
        degree = max(plan.local.index.shape[1] for plan in plans)

        # Many neighbors on one device: one matrix product instead of a sum of rows.
        if self.num_devices == 1 and decode is None and degree > DENSE_FROM:

            def dense(x, rows):
                weights = self._weights(plans, step, widened(x.dtype))
                return dense_row(weights, wide(rows)).astype(x.dtype)

            return self.varying(jax.tree.map(dense, tree, block))

        t, worker = self._round(plans, step), self.index
        decode = decode or (lambda x: x)
        like = jax.eval_shape(decode, tree)

        # Sum this device's own rows first, then the rows of each message. The plans of
        # several steps are stacked, and `t` selects one of them.
        def weigh(plans, block, received, t: jax.Array | int = 0):
            messages = zip(received, *(plan.rounds for plan in plans), strict=False)
            y = weighted_sum(
                block, decode, like, stacked([p.local for p in plans]), worker, t
            )
            for rows, *rounds in messages:
                sources = stacked([each.source for each in rounds])
                more = weighted_sum(rows, decode, like, sources, worker, t)
                y = jax.tree.map(jnp.add, y, more)
            return jax.tree.map(lambda y, x: y.astype(x.dtype), y, like)

        if self.num_devices == 1:
            return self.varying(weigh(plans, block, received, t))
        # If each step has one message, index the weights by the step instead of using a
        # switch, so that XLA can fuse the sums with the surrounding operations.
        single = all(len(plan.rounds) == 1 for plan in plans)
        if len(plans) == 1 or (single and self.num_virtual == 1):
            return weigh(plans, block, received, t)
        branches = [functools.partial(weigh, [plan]) for plan in plans]
        return lax.switch(t, branches, block, received)

    def dense_differences(
        self,
        plans: tuple[Plan, ...],
        x: jax.Array,
        step: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        r"""Returns :math:`\sum_j W_{ij} (x_j - x_i)` on one device.

        If the weights sum to one only up to rounding, their error times the mean would
        move all workers alike, step after step. The weights therefore multiply the
        deviations from the mean.
        """
        rows = self.of_device(x)
        rows = rows - rows.mean(0)
        weights = self._weights(plans, step, x.dtype)
        return self.varying(dense_row(weights, rows) - rows[self.index])

    def _weights(
        self,
        plans: tuple[Plan, ...],
        step: jax.typing.ArrayLike | None,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Returns this worker's row of the mixing matrix of a step, `[n]`."""
        matrices = jnp.asarray(np.stack([plan.matrix for plan in plans]), dtype)
        return matrices[self._round(plans, step), self.index]

    def _round(
        self, plans: tuple[Plan, ...], step: jax.typing.ArrayLike | None
    ) -> jax.Array | int:
        """Returns the index of the plan that a step uses, equal on all workers."""
        return 0 if len(plans) == 1 else self.unvmap(jnp.asarray(step)) % len(plans)


def _padded(tree: PyTree, rows: int) -> PyTree:
    """Pads the leading axis of each leaf with zeros to the given number of rows."""

    def pad(x):
        return jnp.pad(x, [(0, rows - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])

    return jax.tree.map(pad, tree)
