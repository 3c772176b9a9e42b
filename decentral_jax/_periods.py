"""After how many steps the branches that a program takes repeat.

A step counter never repeats, but `count % period` does, and so do the branches that
depend on it. This module follows the integer scalars of a traced step and derives, for
each one, how it continues: a value `v` repeats with period `P` and growth `k` from step
`s` on if `v(t + P) = v(t) + k` for all `t >= s`. A counter has `P = k = 1`, its
remainder by 4 has `P = 4, k = 0`, and a constant has `P = 1, k = 0`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from decentral_jax.communication import (
    KINDS,
    UNCHANGED,
    evaluate,
    inner_programs,
    known_integer,
)

# A comparison that changes only after so many steps counts as one that never changes,
# such as the comparison of a step counter with the largest int32.
NEVER = 2**24


class Repeats(NamedTuple):
    """How a scalar continues: `v(t + period) = v(t) + growth` for `t >= start`."""

    period: int = 1
    growth: int = 0
    start: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same in every step."""
        return self == CONSTANT

    def over(self, period: int) -> int:
        """The growth over a multiple of the period."""
        return self.growth * (period // self.period)

    def plus(self, other: Self) -> "Repeats":
        """The sum of two values."""
        period = math.lcm(self.period, other.period)
        growth = self.over(period) + other.over(period)
        return Repeats(period, growth, max(self.start, other.start))

    def times(self, factor: int) -> "Repeats":
        """The product with a constant."""
        return self._replace(growth=self.growth * factor) if factor else CONSTANT


CONSTANT = Repeats()


class Scalar(NamedTuple):
    """A scalar of the first step, and how it continues; each None if not known."""

    value: np.ndarray | None = None
    repeats: Repeats | None = None


UNKNOWN = Scalar()


class Branches:
    """Interprets a jaxpr and collects how its branches with collectives repeat.

    Attributes:
      repeats: The period after which all of them repeat, and from which step on; None
        if some of them do not repeat.
    """

    def __init__(self):
        self.repeats: Repeats | None = CONSTANT

    def __call__(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Scalar]
    ) -> list[Scalar]:
        """Interprets a jaxpr.

        Args:
          jaxpr: An open jaxpr.
          consts: Its constants.
          args: One scalar per input.

        Returns:
          One scalar per output.
        """
        integers = map(known_integer, consts)
        known = {
            var: UNKNOWN if value is None else Scalar(value, CONSTANT)
            for var, value in zip(jaxpr.constvars, integers, strict=True)
        }
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom) -> Scalar:
            if hasattr(atom, "val"):
                return Scalar(atom.val, CONSTANT)
            return known.get(atom, UNKNOWN)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            results = self._results(eqn, operands)
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, eqn: Any, operands: list[Scalar]) -> list[Scalar]:
        name = eqn.primitive.name
        unknown = [UNKNOWN] * len(eqn.outvars)
        if name in UNCHANGED:
            return operands
        if name == "cond":
            return self._cond(eqn, operands)
        inner = list(inner_programs(eqn))
        if name in ("scan", "while"):
            # Branches inside depend on the iteration, not on the step.
            return unknown
        for program, consts in inner:
            same = len(program.invars) == len(operands)
            passed = operands if same else [UNKNOWN] * len(program.invars)
            results = self(program, consts, passed)
            if len(inner) == 1 and len(results) == len(unknown):
                return results
        if inner or len(unknown) != 1:
            return unknown
        values = evaluate(eqn, [operand.value for operand in operands])
        if eqn.outvars[0] not in values:
            return unknown
        return [Scalar(values[eqn.outvars[0]], _continued(eqn, operands))]

    def _cond(self, eqn: Any, operands: list[Scalar]) -> list[Scalar]:
        index, *arguments = operands
        branches = eqn.params["branches"]
        if index.value is None:
            for branch in branches:
                self(branch.jaxpr, branch.consts, [UNKNOWN] * len(arguments))
            return [UNKNOWN] * len(eqn.outvars)
        taken = int(np.clip(int(index.value), 0, len(branches) - 1))
        if index.repeats is not None and index.repeats.is_constant:
            branch = branches[taken]
            return self(branch.jaxpr, branch.consts, arguments)
        if any(_communicates(branch.jaxpr) for branch in branches):
            self._include(index.repeats)
        results = [self(branch.jaxpr, branch.consts, arguments) for branch in branches]
        return [
            Scalar(
                outputs[taken].value,
                _chosen(index.repeats, [output.repeats for output in outputs]),
            )
            for outputs in zip(*results, strict=True)
        ]

    def _include(self, repeats: Repeats | None) -> None:
        if repeats is None or repeats.growth or self.repeats is None:
            self.repeats = None
        else:
            self.repeats = self.repeats.plus(repeats)


def _communicates(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in KINDS
        or any(_communicates(inner) for inner, _ in inner_programs(eqn))
        for eqn in jaxpr.eqns
    )


def _continued(eqn: Any, operands: list[Scalar]) -> Repeats | None:
    """How the result of an operation on scalars continues."""
    known = [operand.repeats for operand in operands]
    if eqn.primitive.name == "select_n":
        if known[0] is not None and known[0].is_constant:
            return known[1 + int(_value(operands[0]))]
        return _chosen(known[0], known[1:])
    repeats = [each for each in known if each is not None]
    if len(repeats) < len(known):
        return None
    if not any(each.growth for each in repeats):
        return _all(repeats)
    rule = RULES.get(eqn.primitive.name)
    return rule(operands, repeats, eqn) if rule else None


def _all(repeats: Sequence[Repeats]) -> Repeats:
    """How a function of several values without growth continues."""
    period = math.lcm(*(each.period for each in repeats))
    return Repeats(period, 0, max(each.start for each in repeats))


def _chosen(index: Repeats | None, cases: Sequence[Repeats | None]) -> Repeats | None:
    """How the value of the case that an index chooses continues."""
    known = [case for case in cases if case is not None]
    if index is None or index.growth or len(known) < len(cases):
        return None
    every = _all([index, *known])
    # The cases must grow alike, or a sum of growths would depend on the index.
    if len(growths := {case.over(every.period) for case in known}) > 1:
        return None
    return every._replace(growth=growths.pop())


def _sign(difference: int, repeats: Repeats) -> Repeats:
    """How the sign of a value continues that is `difference` in the first step."""
    if not repeats.growth:
        return repeats
    # The sign of a growing value changes once. Two periods are for values that do not
    # grow evenly within a period.
    distance = max(0, -difference if repeats.growth > 0 else difference)
    periods = math.ceil(distance / abs(repeats.growth)) + 2
    start = repeats.start + repeats.period * periods
    return CONSTANT if start > NEVER else Repeats(1, 0, start)


def _compare(operands: list[Scalar], repeats: list[Repeats], eqn: Any) -> Repeats:
    del eqn
    first, second = (int(_value(operand)) for operand in operands)
    return _sign(first - second, repeats[0].plus(repeats[1].times(-1)))


def _sign_of(operands: list[Scalar], repeats: list[Repeats], eqn: Any) -> Repeats:
    del eqn
    return _sign(int(_value(operands[0])), repeats[0])


def _copy(operands: list[Scalar], repeats: list[Repeats], eqn: Any) -> Repeats | None:
    del operands
    is_integer = np.issubdtype(eqn.outvars[0].aval.dtype, np.integer)
    return repeats[0] if is_integer else None


def _multiply(
    operands: list[Scalar], repeats: list[Repeats], eqn: Any
) -> Repeats | None:
    del eqn
    for i, j in ((0, 1), (1, 0)):
        if repeats[i].is_constant:
            return repeats[j].times(int(_value(operands[i])))
    return None


def _divide(operands: list[Scalar], repeats: list[Repeats], eqn: Any) -> Repeats | None:
    is_integer = np.issubdtype(eqn.outvars[0].aval.dtype, np.integer)
    if not is_integer or not repeats[1].is_constant or not _value(operands[1]):
        return None
    # It grows by a whole number once the dividend has grown by a multiple.
    divisor, growth = int(_value(operands[1])), repeats[0].growth
    factor = abs(divisor) // math.gcd(divisor, growth)
    # Integers are divided toward 0, so that the quotient changes course there.
    start = _sign(int(_value(operands[0])), repeats[0]).start
    period = repeats[0].period * factor
    return Repeats(period, growth * factor // divisor, max(repeats[0].start, start))


def _remainder(
    operands: list[Scalar], repeats: list[Repeats], eqn: Any
) -> Repeats | None:
    quotient = _divide(operands, repeats, eqn)
    return quotient and quotient._replace(growth=0)


def _value(operand: Scalar) -> np.ndarray:
    assert operand.value is not None
    return operand.value


# How results of operations on growing integers continue; of others it is not known.
RULES: dict[str, Callable[[list[Scalar], list[Repeats], Any], Repeats | None]] = {
    "add": lambda operands, repeats, eqn: repeats[0].plus(repeats[1]),
    "sub": lambda operands, repeats, eqn: repeats[0].plus(repeats[1].times(-1)),
    "neg": lambda operands, repeats, eqn: repeats[0].times(-1),
    "mul": _multiply,
    "div": _divide,
    "rem": _remainder,
    "sign": _sign_of,
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
    **dict.fromkeys(
        ("convert_element_type", "copy", "squeeze", "reshape", "broadcast_in_dim"),
        _copy,
    ),
}
