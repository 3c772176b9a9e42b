"""What is compiled: the workers' gradient and the master's step."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding


def shapes(tree: Any, device: Any = None) -> Any:
    """The types of a tree of arrays, as compiling takes them; on a device if given."""
    sharding = None if device is None else SingleDeviceSharding(device)

    def struct(x):
        return jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=sharding,
            weak_type=getattr(x, "weak_type", False),
        )

    return jax.tree.map(struct, tree)


class Gradients:
    """A gradient and whether it is finite, compiled for each device.

    Args:
      gradient: The user's gradient function.
    """

    def __init__(self, gradient: Callable):
        def checked(params, batch):
            grads = gradient(params, batch)
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]
            return grads, jnp.stack(finite).all()

        self._jitted = jax.jit(checked)
        self._compiled = {}

    def prepare(self, device: Any, params: Any, batch: Any) -> None:
        """Compiles for trees of these types, with the settings of this thread."""
        key = _key(device, batch)
        if key not in self._compiled:
            args = shapes((params, batch), device)
            self._compiled[key] = self._jitted.lower(*args).compile()

    def on(self, device: Any) -> Callable:
        """The function of parameters and a batch on this device."""

        def gradient(params, batch):
            # Batches of another shape than was prepared are compiled on arrival.
            program = self._compiled.get(_key(device, batch), self._jitted)
            return program(params, batch)

        return gradient


def _key(device, batch):
    leaves, structure = jax.tree.flatten(batch)
    return device, structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def step_of(
    optimizer: optax.GradientTransformation, params: Any, state: optax.OptState
) -> Callable[[int], Callable]:
    """From a number of gradients to the compiled step with their mean.

    The step takes parameters, state and a list of gradients, and returns the new
    parameters and state. It takes over the state's memory.
    """

    def step(params, state, gradients):
        mean = jax.tree.map(
            lambda *leaves: functools.reduce(operator.add, leaves) / len(leaves),
            *gradients,
        )
        updates, state = optimizer.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    # Parameters are not donated: workers may still read them.
    jitted = jax.jit(step, donate_argnums=1)
    device = jax.tree.leaves(params)[0].device
    params, state = shapes((params, state), device)
    return functools.cache(
        lambda count: jitted.lower(params, state, [params] * count).compile()
    )
