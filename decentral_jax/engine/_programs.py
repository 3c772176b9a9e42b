"""Compiled programs: the workers' gradient and the master's step."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

# A jax.Device, which type checkers do not accept as a type.
Device = Any


def shapes(tree: Any, device: Device | None = None) -> Any:
    """Returns the types of a tree of arrays, to lower programs with.

    Args:
      tree: A tree of arrays.
      device: Device for the sharding of the types, or None for no sharding.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
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
    """A gradient function with a check for finite values, compiled per device.

    Args:
      gradient: The user's gradient function.
    """

    def __init__(self, gradient: Callable[..., Any]):
        def checked(params, batch):
            grads = gradient(params, batch)
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]
            return grads, jnp.stack(finite).all()

        self._jitted = jax.jit(checked)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def prepare(self, device: Device, params: optax.Params, batch: Any) -> None:
        """Compiles for arguments of these types, with the JAX settings of this thread.

        Args:
          device: Device to compile for.
          params: The parameters, or their types.
          batch: A batch, or its types.
        """
        key = _key(device, batch)
        if key not in self._compiled:
            args = shapes((params, batch), device)
            self._compiled[key] = self._jitted.lower(*args).compile()

    def on(self, device: Device) -> Callable[..., Any]:
        """Returns the compiled gradient function for a device.

        Args:
          device: Device that holds the arguments.

        Returns:
          Function from parameters and a batch to the gradient and whether it is finite.
        """

        def gradient(params, batch):
            # JAX compiles for batches of other shapes when they arrive.
            program = self._compiled.get(_key(device, batch), self._jitted)
            return program(params, batch)

        return gradient


def _key(device: Device, batch: Any) -> tuple[Any, ...]:
    """Returns a hashable key for a device and the types of a batch."""
    leaves, structure = jax.tree.flatten(batch)
    return device, structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def step_of(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
) -> Callable[[int], Callable[..., Any]]:
    """Returns a function that compiles the master's step for a number of gradients.

    Args:
      optimizer: The optimizer.
      params: The parameters, on the master's device.
      state: The optimizer state.

    Returns:
      Function from a number of gradients to the compiled step. The step takes the
      parameters, the state, which it donates, and a list of gradients. It returns the
      parameters and the state after one update with the mean gradient.
    """

    def step(params, state, gradients):
        mean = jax.tree.map(
            lambda *leaves: functools.reduce(operator.add, leaves) / len(leaves),
            *gradients,
        )
        updates, state = optimizer.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    # Do not donate the parameters, because workers may still read them.
    jitted = jax.jit(step, donate_argnums=1)
    device = jax.tree.leaves(params)[0].device
    params, state = shapes((params, state), device)
    return functools.cache(
        lambda count: jitted.lower(params, state, [params] * count).compile()
    )
