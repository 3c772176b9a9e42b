"""Argument checks shared by several modules, so that bad input fails early.

Every message names the argument, its value, and what to pass instead.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

Tree = TypeVar("Tree")


def check_static(name: str, value: object, kind: str, arrays: type = jax.Array) -> None:
    """Checks that a value that determines the program is not an array.

    `optax.inject_hyperparams` converts arguments to arrays unless told otherwise.

    Args:
      name: Name of the argument, for the message.
      value: The value.
      kind: What the argument must be, for the message.
      arrays: Types to refuse. Pass `Tracer` to accept arrays with known entries.

    Raises:
      TypeError: If `value` is an instance of `arrays`.
    """
    if isinstance(value, arrays):
        raise TypeError(
            f"{name} must be {kind} known before tracing, got the array {value}: with "
            f"optax.inject_hyperparams, pass static_args=({name!r},) and all other "
            "arguments that determine the program's structure."
        )


def check_int(name: str, value: Any, minimum: int) -> int:
    """Returns `value` as an `int`.

    Args:
      name: Name of the argument, for the message.
      value: The value.
      minimum: Smallest allowed value.

    Returns:
      The integer.

    Raises:
      TypeError: If `value` is not an integer.
      ValueError: If `value` is below `minimum`.
    """
    # `bool` is a subclass of `int`, but a flag in place of a number is a mistake.
    check_static(name, value, "a Python integer")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type "
            f"{type(value).__name__}: pass an int >= {minimum}."
        )
    if value < minimum:
        raise ValueError(
            f"{name} must be at least {minimum}, got {value}: pass an int >= {minimum}."
        )
    return int(value)


def check_interval(
    name: str,
    value: Any,
    low: float,
    high: float,
    closed: Literal["both", "left", "right", "neither"] = "both",
) -> Any:
    """Returns a number between `low` and `high`.

    If `optax.inject_hyperparams` has converted the value to an array, the result is an
    array of at least float32. Traced values pass unchecked, because they are not known
    yet.

    Args:
      name: Name of the argument, for the message.
      value: A number, an array of shape `()`, or a tracer.
      low: Lower bound.
      high: Upper bound.
      closed: Which bounds are allowed values: "both", "left", "right", or "neither".

    Returns:
      A float, or an array of shape `()` if `value` is a JAX array.

    Raises:
      TypeError: If `value` is not a number.
      ValueError: If `value` is out of range or not finite.
    """
    if isinstance(value, (bool, str)) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got {value!r}: pass a float.")
    # The value of a tracer is not known.
    if isinstance(value, Tracer):
        return _as_wide_float(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}: "
            "pass a float."
        ) from None
    # Comparisons with NaN are false, so `isfinite` also reports NaN.
    above = number >= low if closed in ("both", "left") else number > low
    below = number <= high if closed in ("both", "right") else number < high
    if not (math.isfinite(number) and above and below):
        left = "[" if closed in ("both", "left") else "("
        right = "]" if closed in ("both", "right") else ")"
        raise ValueError(
            f"{name} must lie in {left}{low}, {high}{right}, got {number}: pass a "
            "number in that range."
        )
    return _as_wide_float(value) if isinstance(value, jax.Array) else number


def _as_wide_float(value: jax.Array) -> jax.Array:
    """Converts integers to floats, and half precision to float32."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value.astype(jnp.result_type(float))
    return value.astype(jnp.float32) if value.dtype.itemsize < 4 else value


def check_learning_rate(value: Any, name: str = "learning_rate") -> None:
    """Checks that a learning rate is a finite number >= 0, or a schedule."""
    if not callable(value):
        check_interval(name, value, 0.0, math.inf, closed="left")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Checks that a value is one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def check_axis_name(axis_name: object) -> None:
    """Checks that an axis name is a string or a tuple of distinct strings."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"axis_name must be a string or a tuple of strings, got {axis_name!r}: "
            'pass the name of the worker axis, for example "workers".'
        )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name must not repeat a name, got {axis_name!r}.")


def check_optimizer(name: str, value: object) -> None:
    """Checks that a value is an optax optimizer, not a constructor of optimizers."""
    check_not_multi_steps(name, value)
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax optimizer, got {value!r}: call the constructor, "
            f"such as {name}=optax.adam(1e-3)."
        )


def check_not_multi_steps(name: str, value: object) -> None:
    """Checks that a value is not `optax.MultiSteps`, which is not a transformation."""
    if isinstance(value, optax.MultiSteps):
        raise TypeError(
            f"{name} must be an optax optimizer, got optax.MultiSteps: pass "
            f"{name}=optax.MultiSteps(...).gradient_transformation()."
        )


def as_table(name: str, value: Any, fill: float) -> np.ndarray:
    """Converts a number, or one number per worker, to a float64 array.

    Args:
      name: Name of the argument, for the message.
      value: A number, one number per worker, or one row of numbers per hub. The rows
        may have different lengths, because hubs may have different sizes.
      fill: Value that fills up short rows.

    Returns:
      An array of shape `()`, `[n]`, or `[hubs, workers]`.

    Raises:
      TypeError: If `value` is not known before tracing or does not hold numbers.
    """
    check_static(name, value, "numbers", Tracer)
    try:
        if not (np.iterable(value) and all(map(np.iterable, value))):
            return np.asarray(value, np.float64)
        # Pad all rows to the length of the longest one.
        rows = [np.asarray(row, np.float64) for row in value]
        longest = max(map(len, rows))
        return np.stack(
            [np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows]
        )
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must hold numbers, got {value!r}: pass a number, an array with "
            "one entry per worker, or a list of rows, one per hub."
        ) from None


def require_params(params: Tree | None, who: str) -> Tree:
    """Returns the parameters that were passed to a transformation.

    Args:
      params: The parameters.
      who: Name of the transformation, for the message.

    Raises:
      TypeError: If any leaf is not an array.
      ValueError: If `params` is None.
    """
    if params is None:
        raise ValueError(
            f"{who} needs params, got None: call update(grads, state, params)."
        )
    check_arrays("params", params)
    return params


def check_nobody_missing(extra_args: Mapping[str, Any], who: str) -> None:
    """Checks that `active` is not passed to a transformation that needs all workers."""
    if extra_args.get("active") is not None:
        raise ValueError(
            f"{who} cannot leave workers out, but received active: call update "
            "without it, or use gossip, track_gradients, accelerated_tracking or "
            "compressed_gossip."
        )


def check_arrays(name: str, tree: Any) -> None:
    """Checks that all leaves are arrays or numbers, not functions or strings."""
    # Modules of Equinox hold functions as leaves, which JAX would reject later with an
    # obscure message.
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_array = hasattr(leaf, "dtype") or hasattr(leaf, "__jax_array__")
        if not is_array and not isinstance(leaf, numbers.Number):
            raise TypeError(
                f"{name} must hold arrays, got {leaf!r} of type "
                f"{type(leaf).__name__} at {_where(path)}: split the tree and pass "
                "only the arrays. In Equinox, use params, static = "
                "eqx.partition(model, eqx.is_inexact_array), and combine them in the "
                "loss with eqx.combine(params, static)."
            )


def _where(path: tuple[Any, ...]) -> str:
    """Returns the path of a leaf in words."""
    return jax.tree_util.keystr(path) or "the top"


def check_dtypes(name: str, tree: Any, kind: Any) -> None:
    """Checks that all leaves have a dtype of the kind `jnp.floating` or `jnp.inexact`.

    Args:
      name: Name of the argument, for the message.
      tree: The argument.
      kind: Abstract dtype, `jnp.floating` or `jnp.inexact`.

    Raises:
      TypeError: If any leaf is not an array or has another dtype.
    """
    check_arrays(name, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, kind):
            raise TypeError(
                f"{name} must hold floating-point arrays, got dtype {dtype} at "
                f"{_where(path)}: convert it, for example with .astype(jnp.float32), "
                "or leave it out, for example with optax.masked."
            )


def check_trees(name: str, tree: Any, like: Any = None) -> None:
    """Checks that a tree has floating-point leaves, and the structure of another tree.

    Args:
      name: Name of the argument, for the message.
      tree: The argument.
      like: The tree whose structure and shapes `tree` must have, or None.

    Raises:
      TypeError: If any leaf is not a floating-point array.
      ValueError: If the tree has no leaves, or another structure or other shapes than
        `like`.
    """
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} must hold at least one array, got {tree!r}.")
    check_dtypes(name, tree, jnp.floating)
    if like is None:
        return
    for what, of in (("structure", jax.tree.structure), ("shapes", _shapes)):
        if of(tree) != of(like):
            raise ValueError(
                f"{name} must have the {what} that init saw, {of(like)}, got "
                f"{of(tree)}: pass the parameters given to init, and their gradients."
            )


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def check_leading_axes(name: str, tree: Any, shape: tuple[int, ...]) -> None:
    """Checks that every leaf is an array with the leading axes of the workers."""
    check_arrays(name, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if np.shape(leaf)[: len(shape)] != shape:
            raise ValueError(
                f"{name} must have the leading axes {shape}, one entry per worker, got "
                f"shape {np.shape(leaf)} at {_where(path)}: stack the workers' "
                "values, or use .replicate for a value that all workers share."
            )
