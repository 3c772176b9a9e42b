"""Placement of workers on devices, and of their state and data.

`Workers(n)` places n workers on the available devices: one worker per device, several
workers per device (folding), or all workers on one device. A step that is written for
one worker runs unchanged in each layout and returns the same numbers.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from decentral_jax._exchange.axis import DEVICES, VIRTUAL, AxisName
from decentral_jax._exchange.numbers import PyTree
from decentral_jax._lockstep import check_lockstep
from decentral_jax._spmd import Arguments, P, R, Spmd
from decentral_jax._validation import (
    check_arrays,
    check_axis_name,
    check_int,
    check_leading_axes,
)
from decentral_jax._watch import calls
from decentral_jax.processes import agree, check_initialized

__all__ = ["Workers"]

AUTO = AxisType.Auto

Sharding = NamedSharding | SingleDeviceSharding


class Workers:
    """A group of workers, placed on devices.

    - With at least as many devices as workers, each device runs one worker.
    - With fewer devices, each device runs the same number of workers (folding).
    - On one device, all workers run in one `jax.vmap`.

    Args:
      shape: Number of workers; or a mapping from the names of nested worker axes to
        their sizes, the outermost axis first, such as `{"hub": 4, "worker": 2}`. Outer
        axes are split over devices first.
      devices: Devices to use. If None, uses all of `jax.devices()`.
      axis_name: Name of the worker axis, if `shape` is a number.

    Attributes:
      axis_name: Name of the worker axis, to pass to transformations. A tuple of names
        if `shape` is a mapping.
      num_workers: Number of workers.
      num_devices: Number of devices in use.
      sizes: Mapping from the names of the worker axes to their sizes.
      sharding: Sharding of arrays with leading worker axes. Each worker's part is on
        the worker's device.
      replicated: Sharding of arrays that every device holds in full.

    Raises:
      TypeError: If any size is not an integer.
      ValueError: If any size is below 1, `devices` is empty, the workers cannot be
        divided evenly over the devices, or another process has different workers.
      RuntimeError: If a launcher has started several processes, `devices` is None, and
        this process has not called `dj.initialize`.
      TimeoutError: If another process does not create its workers in time.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> workers = dj.Workers(4)
      >>> step = workers.spmd(lambda x: dj.mix(x, dj.topology.complete(4)))
      >>> workers.gather(step(workers.shard(jnp.array([4.0, 0.0, 0.0, 0.0]))))
      array([1., 1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        shape: int | Mapping[str, int],
        devices: Sequence[Any] | None = None,
        axis_name: str = "workers",
    ):
        # Convert `shape` to a mapping from axis names to sizes.
        if isinstance(shape, Mapping):
            if not shape:
                raise ValueError(
                    'shape must name an axis, got {}: pass {"workers": 8}.'
                )
            if axis_name != "workers":
                raise ValueError(
                    f"axis_name={axis_name!r} has no effect if shape={shape}, "
                    "which names its axes: leave it out."
                )
            sizes = {k: check_int(f"shape[{k!r}]", v, 1) for k, v in shape.items()}
        else:
            sizes = {axis_name: check_int("shape", shape, 1)}
        names = tuple(sizes)
        check_axis_name(names)
        self.sizes = sizes
        self.axis_name: AxisName = names if isinstance(shape, Mapping) else axis_name
        self.shape = tuple(sizes.values())
        self.num_workers = int(np.prod(self.shape))

        if devices is None:
            check_initialized()
            # Compare the workers of all processes now: a difference would later show
            # as a hang.
            agree("workers", sizes)
        devices = list(jax.devices() if devices is None else devices)
        if not devices:
            raise ValueError("devices must hold at least one device, got none.")
        devices = devices[: self.num_workers]
        # Split outer axes over the devices first, so that inner levels communicate
        # within a device. `split` holds the number of parts of each axis, `left` the
        # number of devices for the remaining axes.
        split, left = [], len(devices)
        for size in self.shape:
            split.append(int(np.gcd(size, left)))
            left //= split[-1]
        if left != 1:
            fit = max(d for d in range(1, len(devices)) if self.num_workers % d == 0)
            # Suggest the largest number of devices that works.
            raise ValueError(
                f"shape={shape} does not divide evenly over {len(devices)} devices: "
                f"pass devices=jax.devices()[:{fit}], or a number of workers that is a "
                "multiple of the number of devices."
            )
        self.num_devices = len(devices)
        # An axis that lies entirely on the mesh, or entirely within a device, keeps its
        # name. An axis that is split between both becomes two axes, with the suffixes
        # DEVICES and VIRTUAL. `_virtual` maps the name of each axis with a part within
        # a device to the name and size of that part.
        self._virtual = {
            name: (name + VIRTUAL * (parts > 1), size // parts)
            for name, size, parts in zip(names, self.shape, split, strict=True)
            if parts < size or self.num_devices == 1
        }
        # The name of each axis's part on the mesh, or None if it has none.
        on_mesh = [
            None if parts == 1 < size else name + DEVICES * (parts < size)
            for name, size, parts in zip(names, self.shape, split, strict=True)
        ]
        self.sharding: Sharding
        self.replicated: Sharding
        if self.num_devices == 1:
            # No worker axis is on the mesh.
            self.sharding = self.replicated = SingleDeviceSharding(devices[0])
            self._mesh = Mesh(np.array(devices), ("device",), axis_types=(AUTO,))
        else:
            axes = {
                name: parts for name, parts in zip(on_mesh, split, strict=True) if name
            }
            self._mesh = Mesh(
                np.array(devices).reshape(tuple(axes.values())),
                tuple(axes),
                axis_types=(AUTO,) * len(axes),
            )
            self.sharding = NamedSharding(self._mesh, PartitionSpec(*on_mesh))
            self.replicated = NamedSharding(self._mesh, PartitionSpec())
        # Both caches avoid a new compilation in each call.
        self._copies = jax.jit(self._stack_copies, out_shardings=self.sharding)
        self._functions = functools.lru_cache(maxsize=128)(self._compiled)

    def __repr__(self) -> str:
        return f"Workers({self.num_workers} on {self.num_devices} devices)"

    def replicate(self, tree: PyTree) -> PyTree:
        """Gives every worker a copy of one worker's tree.

        Args:
          tree: A pytree of arrays, such as a Flax `TrainState`.

        Returns:
          The same tree with leading worker axes, on the workers' devices.

        Raises:
          TypeError: If any leaf is not an array.
        """
        check_arrays("tree", tree)
        if self.sharding.is_fully_addressable:
            # A jitted function does not accept arrays that are committed to devices
            # other than its own.
            tree = jax.device_put(tree, self.replicated)
        with self._own_mesh():
            return self._copies(tree)

    def _stack_copies(self, tree: PyTree) -> PyTree:
        """Broadcasts every leaf to the leading worker axes."""

        def stack(x):
            # The type of a Python number is weak. Results of the first step would not
            # have the same type, and the second step would be compiled again.
            x = jnp.asarray(x)
            x = x if is_key(x) else x.astype(x.dtype)
            return jnp.broadcast_to(x, self.shape + x.shape)

        return jax.tree.map(stack, tree)

    def _own_mesh(self) -> contextlib.AbstractContextManager:
        """Returns a context that replaces the caller's mesh by these workers' mesh."""
        present = jax.sharding.get_abstract_mesh()
        if present.empty or present == self._mesh.abstract_mesh:
            return contextlib.nullcontext()
        return jax.set_mesh(self._mesh)

    @property
    def local(self) -> np.ndarray:
        """Numbers of the workers in this process; all workers in a single process."""
        return np.arange(self.num_workers).reshape(self.shape)[self._local_part()]

    def _local_part(self) -> tuple[slice, ...]:
        """Returns the slices of this process's block of an array of all workers."""
        # The union of the parts on this process's devices is one contiguous block.
        parts = self.sharding.addressable_devices_indices_map(self.shape).values()
        return tuple(
            slice(
                min(part[axis].start or 0 for part in parts if part is not None),
                max(part[axis].stop or size for part in parts if part is not None),
            )
            for axis, size in enumerate(self.shape)
        )

    def shard(self, tree: PyTree, local: bool = False) -> PyTree:
        """Puts each worker's part of a tree on the worker's device.

        Args:
          tree: A pytree of arrays with leading worker axes (one per named axis), such
            as a batch of shape `[8, per_worker_batch, ...]`.
          local: Whether each process passes only the data of its own workers,
            `Workers.local`, instead of the data of all workers.

        Returns:
          The same tree on the workers' devices.

        Raises:
          TypeError: If any leaf is not an array.
          ValueError: If any leaf lacks the leading worker axes.
        """
        shape = self.local.shape if local else self.shape
        check_leading_axes("tree", tree, shape)
        if self.sharding.is_fully_addressable:
            return jax.device_put(tree, self.sharding)

        # With several processes, `device_put` places only arrays that already span all
        # processes. Each process contributes its own part of other arrays.
        def put(x):
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return jax.device_put(x, self.sharding)
            x = np.asarray(x)
            if local:
                whole = self.shape + x.shape[len(shape) :]
                return jax.make_array_from_process_local_data(self.sharding, x, whole)
            return jax.make_array_from_callback(x.shape, self.sharding, x.__getitem__)

        return jax.tree.map(lambda x: wrap_keys(put(unwrap_keys(x)), x), tree)

    def gather(self, tree: PyTree) -> PyTree:
        """Returns the values of all workers as NumPy arrays, in every process.

        Args:
          tree: A pytree with leading worker axes, as `spmd` functions return it.

        Returns:
          The tree of NumPy arrays. Typed PRNG keys are returned as their
          `jax.random.key_data`.

        Raises:
          ValueError: If another process gathers a different tree or runs something
            else.
          TimeoutError: If another process does not reach this call in time.
        """

        def is_remote(x):
            return isinstance(x, jax.Array) and not x.is_fully_addressable

        def fetch(x):
            x = unwrap_keys(x)
            if not np.size(x):
                # JAX 0.10 cannot assemble the parts of an array without entries.
                return np.zeros(np.shape(x), jnp.result_type(x))
            if is_remote(x):
                return multihost_utils.process_allgather(x, tiled=True)
            return np.asarray(x)

        types = [str(jax.typeof(x)) for x in jax.tree.leaves(tree) if is_remote(x)]
        if not types:
            return jax.tree.map(fetch, tree)
        with calls("gather"):
            # A process that gathers alone, or gathers other arrays, would hang.
            digest = hashlib.sha256(str(types).encode()).hexdigest()[:12]
            agree("gather", {"arrays": len(types), "digest": digest})
            return jax.tree.map(fetch, tree)

    def spmd(
        self,
        fn: Callable[P, R],
        donate_argnums: int | Sequence[int] = (),
        *,
        shared_argnames: str | Sequence[str] = (),
        static_argnames: str | Sequence[str] = (),
    ) -> Spmd[P, R]:
        """Compiles a function of one worker to run on all workers.

        Where a worker communicates, its control flow must not depend on its own data.
        If one worker enters a branch with a collective and another worker does not,
        they wait for each other forever. Such a branch is an error in every layout when
        the function is first traced. A step counter that only some workers advance is
        an error, too.

        Args:
          fn: Function that takes and returns one worker's pytrees. It communicates with
            other workers through collectives over `axis_name`.
          donate_argnums: Positions of arguments to donate: their memory may be reused
            for the results. Use it for the training state.
          shared_argnames: Names of parameters of `fn` that all workers share, such as
            frozen weights, a PRNG key, or a step number. They have no worker axes and
            are held once per device. A call may pass them by position or by name, and
            in several processes they must be equal in all of them. Place a large one
            beforehand: `jax.device_put(x, workers.replicated)`.
          static_argnames: Names of parameters of `fn` that are not arrays, such as a
            string or `train=True`. They must be hashable; `fn` is compiled once per
            value.

        Returns:
          A jitted function of trees with leading worker axes, except for shared and
          static arguments. It accepts positional and keyword arguments. Calls with the
          same `fn` share one compiled program.

        Raises:
          TypeError: If `fn` is not callable, or names are not strings. The returned
            function raises it if any leaf is not an array.
          ValueError: If `fn` has no parameter of a given name, or one is named twice.
            The returned function raises it if any leaf lacks the leading worker axes;
            if a branch with a collective, or a step counter, depends on one worker's
            own data; or if another process would run a different program.
          TimeoutError: The returned function raises it if another process does not
            reach this program in time.

        Example:
          >>> import decentral_jax as dj, jax.numpy as jnp
          >>> workers = dj.Workers(4)
          >>> def scaled_sum(x, scale, mean):
          ...     return scale * (dj.average(x) if mean else 4 * dj.average(x))
          >>> step = workers.spmd(
          ...     scaled_sum, shared_argnames="scale", static_argnames="mean")
          >>> workers.gather(step(jnp.arange(4.0), 10.0, mean=False))
          array([60., 60., 60., 60.], dtype=float32)
        """
        if not callable(fn):
            raise TypeError(f"fn must be a function of one worker's trees, got {fn!r}.")
        arguments = Arguments.of(fn, shared_argnames, static_argnames)
        donated = (
            (donate_argnums,)
            if isinstance(donate_argnums, int)
            else tuple(donate_argnums)
        )
        try:
            return self._functions(fn, donated, arguments)
        except TypeError:  # Not hashable, so not cacheable.
            return self._compiled(fn, donated, arguments)

    def _compiled(
        self, fn: Callable[P, R], donate_argnums: tuple[int, ...], arguments: Arguments
    ) -> Spmd[P, R]:
        """Returns `spmd(fn)`, not cached."""

        @functools.wraps(fn)
        def all_workers(*args, **kwargs):
            own, shared, _, call = arguments.separate(fn, args, kwargs)
            # These checks run only while the function is traced.
            check_leading_axes("arguments", own, self.shape)
            check_arrays("shared arguments", shared)
            check_lockstep(call, self.sizes, own, shared)
            return self._on_devices(call)(own, shared)

        jitted = jax.jit(
            all_workers,
            donate_argnums=donate_argnums,
            static_argnames=arguments.static or None,
        )
        single_process = self.sharding.is_fully_addressable
        return Spmd(fn, jitted, arguments, self.sizes, self._own_mesh, single_process)

    def _on_devices(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Maps `fn(own, shared)` over the workers of a device, then over the devices.

        Only the trees in `own` have worker axes.
        """
        for name, size in reversed(self._virtual.values()):
            fn = jax.vmap(fn, in_axes=(0, None), axis_name=name, axis_size=size)
        if not isinstance(self.sharding, NamedSharding):
            return fn
        # Axes that lie entirely on the mesh have size 1 within a device: remove them
        # before the call, and restore them afterward.
        unit_axes = tuple(
            i for i, name in enumerate(self.sizes) if name not in self._virtual
        )

        # The barriers keep XLA from fusing the reshapes into the computation. Fused
        # reshapes would prevent in-place updates of donated arrays.
        def one_device(own, shared):
            own = jax.tree.map(lambda x: jnp.squeeze(x, unit_axes), own)
            own = lax.optimization_barrier(own)
            results = lax.optimization_barrier(fn(own, shared))
            return jax.tree.map(lambda x: jnp.expand_dims(x, unit_axes), results)

        return jax.shard_map(
            one_device,
            mesh=self.sharding.mesh,
            in_specs=(self.sharding.spec, PartitionSpec()),
            out_specs=self.sharding.spec,
            # With check_vma=True, the gradient with respect to a value that is equal on
            # all workers is summed over the workers, and a `scan` that starts from a
            # constant is an error. Both would differ from the other layouts.
            check_vma=False,
        )


def is_key(x: jax.typing.ArrayLike) -> bool:
    """Returns whether an array holds typed PRNG keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def unwrap_keys(x: PyTree) -> PyTree:
    """Returns the key data of PRNG keys, and other arrays unchanged.

    NumPy and files cannot hold typed PRNG keys.
    """
    return jax.random.key_data(x) if is_key(x) else x


def wrap_keys(data: jax.Array, like: jax.typing.ArrayLike) -> jax.Array:
    """Inverts `unwrap_keys`, for an array of the type of `like`."""
    if not is_key(like):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
