"""The worker axis, bound: the only module that calls `jax.lax` collectives.

A worker axis is a `vmap` axis (all workers on one device), a mesh axis of `shard_map`
or `pmap` (one worker per device), or folded: a `vmap` axis called `"<name>.virtual"`
inside a mesh axis called `"<name>.devices"`. Code above this module sees only the name;
`WorkerAxis.bind` tells the three apart at trace time. A folded axis does not bind the
name itself, so a `jax.lax` collective over it fails instead of reducing over the
workers of one device.

Sending is apart from weighing: `send` moves arrays between devices, `weigh` sums what
has arrived. Independent computation between the two calls may overlap with the
exchange, and another transport only has to replace `send`.

Results of reductions are marked as varying over the mesh axes, so that the branches of
a `cond` and the carry of a `scan` have one type under `shard_map(check_vma=True)`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.numbers import (
    equal_on_all_workers,
    weighted,
    wide,
    widened,
)
from decentral_jax._exchange.packing import ALL_REDUCE_BUCKET_BYTES, mapped_packed
from decentral_jax._exchange.plans import Plan, cached_plan
from decentral_jax._exchange.weighing import (
    DENSE_FROM,
    dense_row,
    stacked,
    weighted_sum,
)
from decentral_jax.validation import check_axis_name

AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")

# Suffixes of the two axes that stand for a folded worker axis.
DEVICES, VIRTUAL = ".devices", ".virtual"


@dataclasses.dataclass(frozen=True)
class WorkerAxis:
    """A worker axis as it is bound where the program is being traced.

    Attributes:
      name: The worker axis, or a tuple of axes, the slowest-varying first.
      mesh: Mesh axes: arrays travel along them.
      virtual: `vmap` axes: nothing travels.
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
        """Finds out what a name is bound to.

        Args:
          axis_name: The worker axis, or a tuple of axes, the slowest-varying first.

        Returns:
          The axis.

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
        """This worker's number, from 0: an int32 scalar, different on each worker."""
        self._check_ordered()
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
        unbatched; nothing travels. On mesh axes the value is used as it is: that it is
        equal there is what `decentral_jax.lockstep` checks.
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
        self, due: jax.Array, then: Callable, otherwise: Callable, *operands: Any
    ) -> Any:
        """`lax.cond` with a condition that is equal on all workers: one branch runs.

        Args:
          due: The condition, from `unvmap`, so that `vmap` keeps the `cond` a `cond`.
          then: Function of the operands where `due`.
          otherwise: Function of the operands elsewhere.
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
        then: Callable,
        otherwise: Callable,
        *operands: Any,
    ) -> Any:
        """`uniform_cond` that takes `then` where `period` divides `count`."""
        if period == 1:
            return then(*operands)
        due = self.unvmap(count) % period == 0
        return self.uniform_cond(due, then, otherwise, *operands)

    # Reductions

    def total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over all workers, the same on each."""
        if self.virtual:
            x = lax.psum(x, self.virtual)
        return self.device_total(x)

    def device_total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over devices of an array that a device's workers share."""
        if not self.mesh:
            return x
        return lax.pcast(lax.psum(x, self.mesh), self.mesh, to="varying")

    def mean(self, tree: Tree) -> Tree:
        """Returns the mean over all workers, the same on each, small leaves packed.

        Half precision travels as such. It is divided before it is summed: the sum of
        float16 gradients under loss scaling would overflow where their mean does not.
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

        What `fn` sends along another axis is thus sent once by all devices together,
        not by each of them. It must treat all entries alike.

        Args:
          x: This worker's array.
          fn: Maps an array to one of its shape.
          weight: This worker's weight in the mean. None means equal weights.

        Returns:
          The result, the same on each worker of the axis.
        """
        y = weighted(x, jnp.full([], 1 / self.size) if weight is None else weight)
        if self.virtual:
            y = lax.psum(wide(y), self.virtual).astype(x.dtype)
        if self.num_devices == 1:
            return self.varying(fn(y))
        flat = jnp.pad(y.reshape(-1), (0, -y.size % self.num_devices))
        part = fn(lax.psum_scatter(flat, self.mesh, tiled=True))
        whole = lax.all_gather(part, self.mesh, tiled=True)
        return self.varying(whole[: y.size].reshape(y.shape))

    # All workers' arrays

    def gather(self, tree: Tree) -> Tree:
        """Returns all workers' arrays, `[n, ...]` by worker number, on each worker.

        On one device only the result is copied.
        """
        self._check_ordered()
        return mapped_packed(self._gather, tree, self)

    def _gather(self, x: jax.Array) -> jax.Array:
        rows = self.of_device(x)
        if self.mesh:
            rows = self.varying(lax.all_gather(rows, self.mesh, tiled=True))
        return rows

    def of_device(self, x: jax.Array) -> jax.Array:
        """Returns the arrays of this device's workers, `[num_virtual, ...]`."""
        if not self.virtual:
            return x[None]
        # vmap gathers over one axis at a time, the innermost first.
        for name in reversed(self.virtual):
            x = lax.all_gather(x, name)
        return x.reshape(self.num_virtual, *x.shape[len(self.virtual) :])

    def to_devices(self, x: jax.Array) -> jax.Array:
        """All-to-all: each worker passes one part per device, `[num_devices, ...]`.

        Returns:
          What all workers have for this device, the same on each of its workers:
          `[n, ...]` by worker number.
        """
        block = jnp.moveaxis(self.of_device(x), 1, 0)
        if self.mesh:
            block = lax.all_to_all(block, self.mesh, 0, 0, tiled=True)
        return self.varying(block.reshape(self.size, *x.shape[1:]))

    # Gossip: sending is apart from weighing

    def plan(self, matrices: Sequence[np.ndarray]) -> tuple[Plan, ...]:
        """Returns the messages of a gossip round for each of the matrices `[n, n]`."""
        return tuple(cached_plan(matrix, self.num_devices) for matrix in matrices)

    def send(
        self,
        plans: tuple[Plan, ...],
        tree: Any,
        step: jax.typing.ArrayLike | None = None,
    ) -> tuple:
        """Sends what other devices need of this worker's arrays.

        Args:
          plans: From `plan`; step `t` uses the one at `t % len(plans)`.
          tree: Pytree of arrays.
          step: The step, equal on all workers. Not needed with one plan.

        Returns:
          What has arrived from other devices, for `weigh`: one tree per message, leaves
          `[k, ...]`. Empty where nothing travels.
        """
        if self.num_devices == 1:
            return ()
        block = jax.tree.map(self.of_device, tree)
        if len(plans) == 1:
            return tuple(self._receive(each, block) for each in plans[0].rounds)

        # Branches of a switch return equal shapes: pad to the largest message.
        slots = range(max(len(plan.rounds) for plan in plans))
        rows = [
            max(p.rounds[slot].rows.shape[1] for p in plans if slot < len(p.rounds))
            for slot in slots
        ]

        def receive(plan, block):
            parts = [self._receive(each, block) for each in plan.rounds]
            empty = jax.tree.map(lambda b: b[:0], block)
            parts += [empty] * (len(slots) - len(parts))
            return tuple(map(_padded, parts, rows))

        branches = [functools.partial(receive, plan) for plan in plans]
        return lax.switch(self._round(plans, step), branches, block)

    def _receive(self, message, block):
        """One `ppermute` of the rows that the receiving device needs."""
        if self.num_virtual > 1:
            mine = jnp.asarray(message.rows)[lax.axis_index(self.mesh)]
            block = jax.tree.map(lambda b: b[mine], block)
        return jax.tree.map(lambda b: lax.ppermute(b, self.mesh, message.pairs), block)

    def weigh(
        self,
        plans: tuple[Plan, ...],
        tree: Any,
        received: tuple,
        step: jax.typing.ArrayLike | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> Any:
        r"""Sums the workers' arrays, each times its weight.

        Args:
          plans: As in `send`.
          tree: As in `send`.
          received: The result of `send`.
          step: As in `send`.
          decode: Turns what has traveled into a pytree of the arrays to be summed. None
            sums what has traveled.

        Returns:
          :math:`\sum_j W_{ij} \mathrm{decode}(x_j)`, accumulated in at least float32,
          returned in its own dtypes.
        """
        block = jax.tree.map(self.of_device, tree)
        t, worker = self._round(plans, step), self.index
        degree = max(plan.local.index.shape[1] for plan in plans)
        if self.num_devices == 1 and decode is None and degree > DENSE_FROM:
            matrices = np.stack([plan.matrix for plan in plans])

            def dense(x, rows):
                weights = jnp.asarray(matrices, widened(x.dtype))[t, worker]
                return dense_row(weights, wide(rows)).astype(x.dtype)

            return self.varying(jax.tree.map(dense, tree, block))

        decode = decode or (lambda x: x)
        like = jax.eval_shape(decode, tree)

        def weigh(plans, block, received, t: Any = 0):
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
        # With one message in each step, weights are indexed by the step: without a
        # switch the sums can be fused with what surrounds them.
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

        Weights that do not sum to one by a rounding error would move all workers alike,
        step by step. So they multiply the arrays less their mean.
        """
        rows = self.of_device(x)
        rows = rows - rows.mean(0)
        worker = self.index
        matrices = np.stack([plan.matrix for plan in plans])
        weights = jnp.asarray(matrices, x.dtype)[self._round(plans, step), worker]
        return self.varying(dense_row(weights, rows) - rows[worker])

    def _round(self, plans: tuple[Plan, ...], step: Any) -> Any:
        """The index of the plan that a step uses, equal on all workers."""
        return 0 if len(plans) == 1 else self.unvmap(jnp.asarray(step)) % len(plans)


def _padded(tree: Any, rows: int) -> Any:
    """Appends zeros to the leading axis, up to a number of rows."""

    def pad(x):
        return jnp.pad(x, [(0, rows - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])

    return jax.tree.map(pad, tree)
