"""Where workers live: which device runs whom, and how state and data get there.

`Workers(n)` lays n workers out over the devices there are: one a device, several a
device (folding), or all on one. A step written for one worker runs unchanged in each
layout, and gives the same numbers.
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
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from decentral_jax._exchange.axis import DEVICES, VIRTUAL, AxisName
from decentral_jax._watch import calls
from decentral_jax.lockstep import check_lockstep
from decentral_jax.processes import agree
from decentral_jax.validation import (
    check_arrays,
    check_axis_name,
    check_int,
    check_leading_axes,
)

__all__ = ["Workers"]

AUTO = AxisType.Auto


class Workers:
    """A number of workers on the devices at hand.

    - As many devices as workers, or more: one worker a device.
    - Fewer: the workers are folded, equally many a device.
    - One device: all workers in one `jax.vmap`.

    Args:
      shape: The number of workers; or a mapping such as `{"hub": 4, "worker": 2}` from
        the names of nested axes to their sizes, the outermost first. Outer axes are
        split over devices first.
      devices: The devices to use; all of `jax.devices()` if None.
      axis_name: The worker axis's name, if `shape` is a number.

    Attributes:
      axis_name: The worker axis, for transformations; a tuple for a named shape.
      num_workers: The number of workers.
      num_devices: The number of devices in use.
      sizes: The names of the worker axes and their sizes.
      sharding: Of arrays with leading worker axes, each worker's part where it lives.
      everywhere: Of arrays that all devices hold whole.

    Raises:
      TypeError: If a size is no integer.
      ValueError: If a size is below 1, there is no device, the workers do not divide
        over the devices, or another process has other workers.
      TimeoutError: If another process does not make its workers in time.

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
        if isinstance(shape, Mapping):
            if not shape:
                raise ValueError(
                    'shape must name an axis, got {}: pass {"workers": 8}.'
                )
            if axis_name != "workers":
                raise ValueError(
                    f"axis_name={axis_name!r} has no meaning beside shape={shape}, "
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
            # Before anything is run together, which would hang.
            agree("workers", sizes)
        devices = list(jax.devices() if devices is None else devices)
        if not devices:
            raise ValueError("devices must hold at least one device, got none.")
        devices = devices[: self.num_workers]
        # Split outer axes over devices first: inner levels then talk inside a device.
        split, left = [], len(devices)
        for size in self.shape:
            split.append(int(np.gcd(size, left)))
            left //= split[-1]
        if left != 1:
            fit = max(d for d in range(1, len(devices)) if self.num_workers % d == 0)
            raise ValueError(
                f"shape={shape} does not divide over {len(devices)} devices: pass "
                f"devices=jax.devices()[:{fit}], or a number of workers that is a "
                "multiple of the number of devices."
            )
        self.num_devices = len(devices)
        # An axis that lies whole on the mesh, or whole in a device, keeps its name; one
        # that is split between both becomes two.
        self._virtual = {
            name: (name + VIRTUAL * (parts > 1), size // parts)
            for name, size, parts in zip(names, self.shape, split, strict=True)
            if parts < size or self.num_devices == 1
        }
        on_mesh = [
            None if parts == 1 < size else name + DEVICES * (parts < size)
            for name, size, parts in zip(names, self.shape, split, strict=True)
        ]
        self.sharding: NamedSharding | SingleDeviceSharding
        self.everywhere: NamedSharding | SingleDeviceSharding
        if self.num_devices == 1:
            self.sharding = self.everywhere = SingleDeviceSharding(devices[0])
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
            self.everywhere = NamedSharding(self._mesh, PartitionSpec())
        # Compiled once for each tree, not in each call.
        self._copies = jax.jit(self._stack_copies, out_shardings=self.sharding)
        self._functions = functools.lru_cache(maxsize=128)(self._compiled)

    def __repr__(self) -> str:
        return f"Workers({self.num_workers} on {self.num_devices} devices)"

    def replicate(self, tree: Any) -> Any:
        """Gives every worker its own copy of one worker's tree.

        Args:
          tree: A pytree of arrays, such as a Flax `TrainState`.

        Returns:
          The tree with a leading worker axis (one for each named axis), on the devices.

        Raises:
          TypeError: If a leaf is not an array.
        """
        check_arrays("tree", tree)
        if self.sharding.is_fully_addressable:
            # Arrays that live on other devices would not enter the program.
            tree = jax.device_put(tree, self.everywhere)
        with self._own_mesh():
            return self._copies(tree)

    def _stack_copies(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, self.shape + jnp.shape(x)), tree
        )

    def _own_mesh(self) -> contextlib.AbstractContextManager:
        """These workers' mesh in place of one that the caller has set."""
        present = jax.sharding.get_abstract_mesh()
        if present.empty or present == self._mesh.abstract_mesh:
            return contextlib.nullcontext()
        return jax.set_mesh(self._mesh)

    @property
    def local(self) -> np.ndarray:
        """The workers that live in this process, by number; all if it is alone."""
        return np.arange(self.num_workers).reshape(self.shape)[self._local_part()]

    def _local_part(self) -> tuple[slice, ...]:
        """What this process holds of an array of all workers, one block."""
        parts = self.sharding.addressable_devices_indices_map(self.shape).values()
        return tuple(
            slice(
                min(part[axis].start or 0 for part in parts if part is not None),
                max(part[axis].stop or size for part in parts if part is not None),
            )
            for axis, size in enumerate(self.shape)
        )

    def shard(self, tree: Any, local: bool = False) -> Any:
        """Puts each worker's part of a tree where the worker lives.

        Args:
          tree: A pytree whose leaves have a leading worker axis (one for each named
            axis), such as a batch `[8, per_worker_batch, ...]`.
          local: Whether each process passes only what belongs to its own workers,
            `Workers.local`, instead of all workers' data.

        Returns:
          The same tree on the devices.

        Raises:
          TypeError: If a leaf is not an array.
          ValueError: If a leaf's leading axes are not the workers'.
        """
        shape = self.local.shape if local else self.shape
        check_leading_axes("tree", tree, shape)
        if self.sharding.is_fully_addressable:
            return jax.device_put(tree, self.sharding)

        def put(x):
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return jax.device_put(x, self.sharding)
            x = np.asarray(x)
            if local:
                whole = self.shape + x.shape[len(shape) :]
                return jax.make_array_from_process_local_data(self.sharding, x, whole)
            return jax.make_array_from_callback(x.shape, self.sharding, x.__getitem__)

        return jax.tree.map(lambda x: like_before(put(as_numbers(x)), x), tree)

    def gather(self, tree: Any) -> Any:
        """All workers' values as NumPy arrays, in every process.

        Args:
          tree: A pytree with leading worker axes, as `spmd` functions return it.

        Returns:
          The tree of NumPy arrays; of typed PRNG keys, their `jax.random.key_data`.

        Raises:
          ValueError: If another process gathers another tree or runs something else.
          TimeoutError: If another process does not come to this call in time.
        """

        def is_elsewhere(x):
            return isinstance(x, jax.Array) and not x.is_fully_addressable

        def fetch(x):
            x = as_numbers(x)
            if not np.size(x):
                # JAX 0.10 cannot put the parts of an array without entries together.
                return np.zeros(np.shape(x), jnp.result_type(x))
            if is_elsewhere(x):
                return multihost_utils.process_allgather(x, tiled=True)
            return np.asarray(x)

        types = [str(jax.typeof(x)) for x in jax.tree.leaves(tree) if is_elsewhere(x)]
        if not types:
            return jax.tree.map(fetch, tree)
        with calls("gather"):
            # A process that gathers alone would wait forever.
            digest = hashlib.sha256(str(types).encode()).hexdigest()[:12]
            agree("gather", {"arrays": len(types), "digest": digest})
            return jax.tree.map(fetch, tree)

    def spmd(
        self, fn: Callable, donate_argnums: int | Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Runs a function written for one worker on all of them, compiled.

        A worker's program must not depend on its own data where it communicates: if
        one worker enters a branch with an exchange and another one does not, they wait
        for each other forever. Such a branch, and a step counter that one worker alone
        keeps back, is an error in every layout when the function is first traced.

        Args:
          fn: Takes and returns one worker's pytrees; talks to the others through
            collectives over `axis_name`.
          donate_argnums: Positions of arguments whose memory the result may take over,
            such as the training state.

        Returns:
          A jitted function of trees with leading worker axes, passed by position or by
          keyword. Calls with the same `fn` share one compiled program.

        Raises:
          TypeError: If `fn` is not callable; when called with a leaf that is not an
            array.
          ValueError: When called with a leaf whose leading axes are not the workers';
            if the function communicates in a branch, or counts steps, by a condition
            that depends on one worker's own data; or if another process would run
            another program.
          TimeoutError: If another process does not come to this program in time.
        """
        if not callable(fn):
            raise TypeError(f"fn must be a function of one worker's trees, got {fn!r}.")
        donated = (
            (donate_argnums,)
            if isinstance(donate_argnums, int)
            else tuple(donate_argnums)
        )
        try:
            return self._functions(fn, donated)
        except TypeError:  # a callable that cannot be hashed
            return self._compiled(fn, donated)

    def _compiled(self, fn: Callable, donate_argnums: tuple[int, ...]) -> "_Spmd":
        @functools.wraps(fn)
        def all_workers(*args, **kwargs):
            check_leading_axes("arguments", (args, kwargs), self.shape)
            check_lockstep(fn, self.sizes, args, kwargs)
            # By position: shard_map knows no keywords.
            run = self._on_devices(lambda args, kwargs: fn(*args, **kwargs))
            return run(args, kwargs)

        jitted = jax.jit(all_workers, donate_argnums=donate_argnums)
        return _Spmd(fn, jitted, self)

    def _on_devices(self, fn: Callable) -> Callable:
        """`fn` mapped over the workers of a device, then over devices."""
        for name, size in reversed(self._virtual.values()):
            fn = jax.vmap(fn, axis_name=name, axis_size=size)
        if not isinstance(self.sharding, NamedSharding):
            return fn
        alone = tuple(
            i for i, name in enumerate(self.sizes) if name not in self._virtual
        )

        # The barriers keep XLA from fusing the reshapes into the computation; fused,
        # they would stop a donated array from being updated in place.
        def one_device(*args):
            args = jax.tree.map(lambda x: jnp.squeeze(x, alone), args)
            results = lax.optimization_barrier(fn(*lax.optimization_barrier(args)))
            return jax.tree.map(lambda x: jnp.expand_dims(x, alone), results)

        return jax.shard_map(
            one_device,
            mesh=self.sharding.mesh,
            in_specs=self.sharding.spec,
            out_specs=self.sharding.spec,
            # With varying-axis types the gradient with respect to a value that is not
            # per-worker is summed over workers, and a `scan` from a constant is an
            # error: neither is so in the other layouts.
            check_vma=False,
        )


def is_key(x: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def as_numbers(x: Any) -> Any:
    """PRNG keys as the numbers they are made of, which NumPy and files can hold."""
    return jax.random.key_data(x) if is_key(x) else x


def like_before(numbers: jax.Array, like: Any) -> jax.Array:
    """The inverse of `as_numbers`."""
    if not is_key(like):
        return numbers
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(like))


class _Spmd:
    """A function of all workers; what it lacks, it takes from the jitted one."""

    def __init__(self, fn: Callable, jitted: Any, workers: Workers):
        functools.update_wrapper(self, fn)
        # What `communication_cost` traces, whatever the layout.
        self.one_worker = fn, workers.sizes
        self._jitted = jitted
        self._own_mesh = workers._own_mesh
        alone = workers.sharding.is_fully_addressable
        self._call = jitted if alone else _compared(jitted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._own_mesh():
                return self._call(*args, **kwargs)
        except TypeError:
            # Asked only now: looking through large trees in every step takes time.
            check_arrays("arguments", (args, kwargs))
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _compared(jitted: Any) -> Callable[..., Any]:
    """A jitted function that is compared with the other processes' when it is new.

    Another topology, option or version makes another program, whose collectives would
    wait for each other forever.
    """
    seen = set()
    name = getattr(jitted, "__name__", "function")

    @functools.wraps(jitted)
    def run(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = structure, *(jax.typeof(leaf) for leaf in leaves)
        if key not in seen:
            program = jitted.lower(*args, **kwargs).as_text().encode()
            agree(f"the program of {name}", hashlib.sha256(program).hexdigest())
            seen.add(key)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return jitted(*args, **kwargs)
        with calls(name):
            results = jitted(*args, **kwargs)
        calls.returned(results)
        return results

    return run
