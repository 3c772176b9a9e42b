"""Arguments that `optax.inject_hyperparams` may turn into arrays."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

# Two values, exact in bfloat16, for each number that may be an array.
FLOATS = {
    "b1": (0.5, 0.75),
    "b2": (0.75, 0.875),
    "consensus_rate": (0.5, 0.25),
    "delta": (0.5, 0.25),
    "detach": (0.25, 0.5),
    "eps": (2**-8, 2**-6),
    "factor": (0.5, 0.25),
    "feedback": (0.75, 0.5),
    "momentum": (0.5, 0.75),
    "power": (1.0, 0.5),
    "rates": (0.5, 0.75),
    "ratio": (4.0, 2.0),
    "slow_momentum": (0.5, 0.25),
    "slow_rate": (0.75, 0.5),
    "weight_decay": (0.125, 0.25),
}


def inject(
    build: Callable[..., Any], *args: Any, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation with all injectable numbers as arrays.

    These include positional arguments, such as a rate.
    """
    names = list(inspect.signature(build).parameters)
    static = set(names[len(args) :]) - FLOATS.keys()
    return optax.inject_hyperparams(build, static_args=static)(*args, **arguments)
