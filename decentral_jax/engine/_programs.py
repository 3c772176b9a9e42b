"""Compiled programs: the workers' gradient and the master's step."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

# A jax.Device, which type checkers do not accept as a type.
Device = Any


class Model(NamedTuple):
    """What the master sends to the workers."""

    params: optax.Params
    state: Any  # variables that are not trained, or None if there are none


class Result(NamedTuple):
    """What a worker computes for the master from a model and a batch."""

    grads: optax.Updates
    state: Any  # the new model state, or None if there is none


def evaluate(
    gradient: Callable[..., Any], has_aux: bool, model: Model, batch: Any
) -> tuple[Result, dict[str, Any]]:
    """Calls the user's gradient function.

    Args:
      gradient: The user's gradient function.
      has_aux: Whether it returns a loss and auxiliary results, too.
      model: The model.
      batch: A batch.

    Returns:
      The result, and the metrics, which include the loss.
    """
    args = (model.params, batch) if model.state is None else (*model, batch)
    if not has_aux:
        return Result(gradient(*args), None), {}
    (loss, aux), grads = gradient(*args)
    state, metrics = (None, aux) if model.state is None else aux
    return Result(grads, state), {"loss": loss, **metrics}


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
      has_aux: Whether it returns a loss and auxiliary results, too.
    """

    def __init__(self, gradient: Callable[..., Any], has_aux: bool):
        def checked(model, batch):
            result, metrics = evaluate(gradient, has_aux, model, batch)
            # Integers and PRNG keys in the model state are always finite.
            finite = [
                jnp.isfinite(leaf).all()
                for leaf in jax.tree.leaves(result)
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
            ]
            return result, metrics, jnp.stack(finite).all()

        self._jitted = jax.jit(checked)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def prepare(self, device: Device, model: Model, batch: Any) -> None:
        """Compiles for arguments of these types, with the JAX settings of this thread.

        Args:
          device: Device to compile for.
          model: The model, or its types.
          batch: A batch, or its types.
        """
        key = _key(device, batch)
        if key not in self._compiled:
            args = shapes((model, batch), device)
            self._compiled[key] = self._jitted.lower(*args).compile()

    def on(self, device: Device) -> Callable[..., Any]:
        """Returns the compiled gradient function for a device.

        Args:
          device: Device that holds the arguments.

        Returns:
          Function from a model and a batch to the result, the metrics, and whether the
          result is finite.
        """

        def gradient(model, batch):
            # JAX compiles for batches of other shapes when they arrive.
            program = self._compiled.get(_key(device, batch), self._jitted)
            return program(model, batch)

        return gradient


def _key(device: Device, batch: Any) -> tuple[Any, ...]:
    """Returns a hashable key for a device and the types of a batch."""
    leaves, structure = jax.tree.flatten(batch)
    return device, structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def step_of(
    optimizer: optax.GradientTransformation,
    model: Model,
    opt_state: optax.OptState,
    share: float,
) -> Callable[[int], Callable[..., Any]]:
    """Returns a function that compiles the master's step for a number of results.

    Args:
      optimizer: The optimizer.
      model: The model, on the master's device.
      opt_state: The optimizer state.
      share: Weight of the mean of the results' model states in the new model state.

    Returns:
      Function from a number of results to the compiled step. The step takes the model,
      the optimizer state, which it donates, and a list of results. It returns the model
      and the optimizer state after one update with the mean gradient.
    """

    def step(model, opt_state, results):
        mean = jax.tree.map(_mean, *(result.grads for result in results))
        updates, opt_state = optimizer.update(mean, opt_state, model.params)
        params = optax.apply_updates(model.params, updates)
        states = [result.state for result in results]
        state = jax.tree.map(functools.partial(_blend, share), model.state, *states)
        return Model(params, state), opt_state

    # Do not donate the model, because workers may still read it.
    jitted = jax.jit(step, donate_argnums=1)
    device = jax.tree.leaves(model.params)[0].device
    model, opt_state = shapes((model, opt_state), device)
    return functools.cache(
        lambda count: jitted.lower(model, opt_state, [Result(*model)] * count).compile()
    )


def _mean(*leaves: jax.Array) -> jax.Array:
    """Returns the mean of some arrays."""
    return functools.reduce(operator.add, leaves) / len(leaves)


def _blend(share: float, old: jax.Array, *new: jax.Array) -> jax.Array:
    """Returns a leaf of the new model state.

    Args:
      share: Weight of the mean of `new`.
      old: The leaf of the master's model state.
      *new: The leaf of the results' model states, in the order of their application.
    """
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return new[-1]
    # A weight of 1 must replace the old value exactly.
    return _mean(*new) if share == 1 else (1 - share) * old + share * _mean(*new)
