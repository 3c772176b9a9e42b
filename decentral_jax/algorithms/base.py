"""What all named algorithms share: the optimizer that each worker runs."""

import optax

from decentral_jax.validation import check_learning_rate, check_optimizer

Optimizer = optax.GradientTransformationExtraArgs
LearningRate = optax.ScalarOrSchedule | None


def at_calls(rate: LearningRate, calls: int) -> LearningRate:
    """A rate of an optimizer that steps in every `calls`-th call of `update` only.

    A schedule counts calls, as one does that `optax.inject_hyperparams` evaluates: the
    rate is that of the call in which the step is taken.
    """
    if not callable(rate):
        return rate
    return lambda step: rate(calls * (step + 1) - 1)


def local_optimizer(
    learning_rate: LearningRate,
    base: optax.GradientTransformation | None,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer that each worker runs: `base`, or SGD at `learning_rate`."""
    if base is None:
        if learning_rate is None:
            raise ValueError(
                "learning_rate must be given, got None: pass a number or schedule, or "
                "base=optax.adam(1e-3) or the like."
            )
        check_learning_rate(learning_rate)
        return optax.sgd(learning_rate, momentum)
    check_optimizer("base", base)
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate} has no meaning beside base, which has its "
            "own: pass learning_rate=None with base."
        )
    return base
