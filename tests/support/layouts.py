"""Layouts: runs one worker's function under every map that the library supports."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

import decentral_jax as dj

Shape = int | dict[str, int]


def named(shape: Shape) -> dict[str, int]:
    """Names and sizes of the worker axes: one default axis, or several levels."""
    return shape if isinstance(shape, dict) else {"workers": shape}


def nested_vmap(fn: Callable, shape: Shape = 8, **options: Any) -> Callable:
    """One `vmap` per level, the outermost first."""
    for name, size in reversed(named(shape).items()):
        fn = jax.vmap(fn, axis_name=name, axis_size=size, **options)
    return fn


def flat(build: Callable) -> Callable:
    """Turns a layout of several levels into one with a single leading worker axis."""

    def flat(fn: Callable, shape: Shape = 8) -> Callable:
        run, sizes = build(fn, shape), tuple(named(shape).values())
        if len(sizes) == 1:
            return run

        def call(*args):
            split = jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), args)
            joined, count = run(*split), int(np.prod(sizes))
            return jax.tree.map(
                lambda x: x.reshape(count, *x.shape[len(sizes) :]), joined
            )

        return call

    return flat


def _vmap(fn: Callable, shape: Shape) -> Callable:
    return jax.jit(nested_vmap(fn, shape))


def shard_map(fn: Callable, shape: Shape, check_vma: bool = True) -> Callable:
    """One worker per device, with `jax.shard_map` directly."""
    names, sizes = tuple(named(shape)), tuple(named(shape).values())
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))

    def one_device(*args):
        result = fn(*jax.tree.map(lambda x: x[(0,) * len(sizes)], args))
        return jax.tree.map(lambda x: x[(None,) * len(sizes)], result)

    spec = PartitionSpec(*names)
    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=check_vma,
        )
    )


def _pmap(fn: Callable, shape: Shape) -> Callable:
    """Maps the outermost level with `pmap`; inner levels stay on one device."""
    (name, size), *inside = named(shape).items()
    if inside:
        fn = nested_vmap(fn, dict(inside))
    return jax.pmap(fn, axis_name=name, devices=jax.devices()[:size])


def on_devices(num_devices: int) -> Callable:
    def build(fn: Callable, shape: Shape) -> Callable:
        return dj.Workers(shape, devices=jax.devices()[:num_devices]).spmd(fn)

    return build


# name -> function of (fn, shape=8) that turns a function of one worker's trees into a
# compiled function of trees with a leading worker axis.
LAYOUTS: dict[str, Callable[..., Callable[..., Any]]] = {
    "vmap": flat(_vmap),
    "shard_map": flat(shard_map),
    "pmap": flat(_pmap),
    "folded_4": flat(on_devices(4)),
    "folded_2": flat(on_devices(2)),
    "one_device": flat(on_devices(1)),
}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a traced program, including its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(item, "eqns"):
                    yield from equations(item)


def primitives(fn: Callable, *args: Any) -> Counter:
    """Counts each primitive in the traced program."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return Counter(equation.primitive.name for equation in equations(jaxpr))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for each program that XLA compiles inside the context."""
    seen = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        del duration, kwargs
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
