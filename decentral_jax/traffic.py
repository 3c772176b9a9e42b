"""Traffic of a transformation over one period, read off its traced step."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
import optax

from decentral_jax._periods import CONSTANT, UNKNOWN, Branches, Repeats, Scalar
from decentral_jax._validation import check_arrays, check_int
from decentral_jax.communication import (
    CommunicationCost,
    cost_of_program,
    on_abstract_devices,
    trace,
)

__all__ = ["CommunicationCosts", "communication_costs"]

# The longest period to look for, in steps.
LONGEST = 2**16


@dataclasses.dataclass(frozen=True)
class CommunicationCosts(Sequence[CommunicationCost]):
    """Cost of each step of a transformation; `print` shows a table.

    A sequence: `costs[t]` is the cost of step `t`, and `len(costs)` is the number of
    steps that were counted.

    Attributes:
      steps: One cost per step, from the first step on.
      period: Number of steps after which the traffic repeats, partners of messages
        included. None if it does not repeat, or only after the first steps.
    """

    steps: tuple[CommunicationCost, ...]
    period: int | None

    @overload
    def __getitem__(self, index: int) -> CommunicationCost: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[CommunicationCost, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def bytes_sent(self) -> np.ndarray:
        """Bytes sent per worker in each step, `[steps]`."""
        return np.array([cost.bytes_sent for cost in self.steps])

    @property
    def bytes_per_step(self) -> float:
        """Bytes sent per worker per step, averaged over the steps."""
        return float(self.bytes_sent.mean())

    @property
    def is_exact(self) -> bool:
        """Whether the cost of every step is exact."""
        return all(cost.is_exact for cost in self.steps)

    def __str__(self) -> str:
        head = f"{'steps':<16}{'count':>7}{'bytes sent':>16}"
        rows, first = [], 0
        for (count, sent), same in itertools.groupby(
            self.steps, key=lambda cost: (cost.count, cost.bytes_sent)
        ):
            after = first + len(list(same))
            name = f"{first}" if after == first + 1 else f"{first}-{after - 1}"
            rows.append(f"{name:<16}{count:>7}{sent:>16,.0f}")
            first = after
        count = sum(cost.count for cost in self.steps) / len(self)
        mean = f"{'mean per step':<16}{count:>7.4g}{self.bytes_per_step:>16,.0f}"
        note = [] if self.is_exact else ["(not exact: see the costs of the steps)"]
        return "\n".join([head, *rows, mean, *note])


def communication_costs(
    tx: optax.GradientTransformation,
    params: Any,
    steps: int | None = None,
    *,
    axis_sizes: Mapping[str, int],
    **extra_args: Any,
) -> CommunicationCosts:
    """Counts the bytes that a worker sends in each step of one period.

    `tx.init` and `tx.update` are traced once and nothing runs: the step counters and
    other integer scalars of the state are followed from step to step, from their
    initial values on. The period is derived from the program, from what the conditions
    of its branches compute with the counters, and not guessed from costs that look
    alike. It is the smallest period for which each step sends the same messages.

    Args:
      tx: The transformation; its `update` exchanges along the axes in `axis_sizes`.
      params: One worker's parameters, arrays or `jax.ShapeDtypeStruct`; gradients are
        taken to have the same shapes and dtypes.
      steps: Number of steps to count, from the first one on. If None, one period.
      axis_sizes: Number of workers along each worker axis, by the name of the axis.
      **extra_args: Further arguments of `tx.update`, such as `value`.

    Returns:
      One `dj.CommunicationCost` per step, as a sequence, with the attributes `.period`,
      `.bytes_sent` (in bytes, one entry per step) and `.bytes_per_step` (their mean).

    Raises:
      TypeError: If `tx` is not a transformation, or any leaf of `params` or
        `extra_args` is not an array.
      ValueError: If `steps` is not positive, or if it is None and the traffic does not
        repeat from the first step on, or only after more than 65,536 steps.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> tx = dj.local_sgd(0.1, period=4)
      >>> costs = dj.communication_costs(tx, jnp.zeros(100), axis_sizes={"workers": 8})
      >>> costs.period, costs.bytes_per_step
      (4, 175.0)
      >>> print(costs)
      steps             count      bytes sent
      0-2                   0               0
      3                     1             700
      mean per step      0.25             175
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(f"tx must be an optax transformation, got {tx!r}.")
    check_arrays("params", params)
    check_arrays("extra_args", extra_args)
    if steps is not None:
        steps = check_int("steps", steps, 1)
    program = _Program(tx, params, axis_sizes, extra_args)
    repeats = program.repeats()
    period = None if repeats is None else program.period(repeats)
    if steps is None and period is None:
        raise ValueError(
            "the traffic of tx does not repeat from the first step on, got steps=None: "
            "pass steps, the number of steps to count."
        )
    counted = steps or period
    assert counted is not None
    # Steps after the first period are those of the first period again.
    costs = [program.cost(t % period if period else t) for t in range(counted)]
    return CommunicationCosts(tuple(costs), period)


class _Program:
    """A traced step, and the costs and integers of the steps so far."""

    def __init__(self, tx, params, axis_sizes, extra_args):
        tx = optax.with_extra_args_support(tx)

        def update(params, state, extra_args):
            return tx.update(params, state, params, **extra_args)

        init = on_abstract_devices(tx.init, axis_sizes)
        state = jax.eval_shape(init, params)
        update = on_abstract_devices(update, axis_sizes)
        started = trace(init, params)
        none = [None] * len(started.jaxpr.invars)
        _, first = cost_of_program(started, none)
        self.jaxpr = trace(update, params, state, extra_args)
        self.before = [None] * len(jax.tree.leaves(params))
        self.after = [None] * len(jax.tree.leaves(extra_args))
        # The known integers of the state before each step, one list per step.
        self.states = [_integers(first)]
        self.costs: list[CommunicationCost] = []

    def cost(self, step: int) -> CommunicationCost:
        """The cost of a step."""
        self._go_to(step + 1)
        return self.costs[step]

    def _go_to(self, step: int) -> None:
        while len(self.costs) < step:
            known = [*self.before, *self.states[-1], *self.after]
            cost, results = cost_of_program(self.jaxpr, known)
            self.costs.append(cost)
            self.states.append(_integers(results[len(results) - len(self.states[0]) :]))

    def repeats(self) -> Repeats | None:
        """How the branches with collectives repeat; None if they do not."""
        self._go_to(1)
        assumed = [self._measured(i, CONSTANT) for i in range(len(self.states[0]))]
        # Most integers grow evenly. What the others do often decides no branch, and
        # measuring it means to follow the program through a whole period of theirs.
        branches = self._agreed(assumed, lambda i, old, new: None)
        if branches is None:
            branches = self._agreed(
                assumed, lambda i, old, new: self._measured(i, _both(old, new))
            )
        return branches

    def _agreed(
        self,
        assumed: list[Repeats | None],
        revise: Callable[[int, Repeats, Repeats | None], Repeats | None],
    ) -> Repeats | None:
        """How the branches repeat, under assumptions that prove to be right.

        Assumes how each integer of the state continues, derives how it does if that is
        so, and revises what does not agree until all does. Then all of it follows, by
        induction over the steps.
        """
        while True:
            branches = Branches()
            state = [
                UNKNOWN if value is None else Scalar(value, repeats)
                for value, repeats in zip(self.states[0], assumed, strict=True)
            ]
            before, after = ([UNKNOWN] * len(x) for x in (self.before, self.after))
            jaxpr, consts = self.jaxpr.jaxpr, self.jaxpr.consts
            results = branches(jaxpr, consts, [*before, *state, *after])
            results = results[len(results) - len(state) :]
            agreed = True
            for i, old in enumerate(assumed):
                if old is not None and (new := results[i].repeats) != old:
                    revised = revise(i, old, new)
                    assumed = [*assumed[:i], revised, *assumed[i + 1 :]]
                    # What cannot be revised any more is not known.
                    if revised == old:
                        assumed[i] = None
                    agreed = False
            if agreed:
                return branches.repeats

    def _measured(self, i: int, repeats: Repeats | None) -> Repeats | None:
        """The growth that an integer of the state has over a period."""
        if repeats is None or (last := repeats.start + repeats.period) > LONGEST:
            return None
        self._go_to(last)
        begin, end = self.states[repeats.start][i], self.states[last][i]
        if begin is None or end is None:
            return None
        return repeats._replace(growth=int(end) - int(begin))

    def period(self, repeats: Repeats) -> int | None:
        """The smallest period from the first step on, if there is one."""
        found = repeats.period
        if found + repeats.start > LONGEST:
            return None
        for t in range(repeats.start):
            if _messages(self.cost(t)) != _messages(self.cost(t + found)):
                return None
        messages = [_messages(self.cost(t)) for t in range(found)]
        return next(
            d
            for d in range(1, found + 1)
            if found % d == 0 and messages[d:] == messages[:-d]
        )


def _both(old: Repeats | None, new: Repeats | None) -> Repeats | None:
    """A period of both."""
    if old is None or new is None:
        return None
    return Repeats(math.lcm(old.period, new.period), 0, max(old.start, new.start))


def _integers(values: Sequence[Any]) -> list[Any]:
    """The values that are integers or booleans; None for the others."""
    return [
        x if x is not None and np.asarray(x).dtype.kind in "biu" else None
        for x in values
    ]


def _messages(cost: CommunicationCost) -> tuple:
    """What two steps that repeat have in common, partners of messages included."""
    return cost, tuple(collective.pairs for collective in cost.collectives)
