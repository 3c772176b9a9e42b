"""Checks, before anything runs, that all workers will run the same collectives.

A collective waits for every worker. If one worker takes a branch with a collective in
it and another worker does not, both wait forever on devices, while under `vmap` the
same step runs and gives other numbers. The same happens one step later if a worker
alone keeps back a step counter that says when to communicate, as the usual recipe
for loss scaling does with `jnp.where(is_finite, new_state, old_state)`.

Making counters agree while training would cost a message in every step, also in those
that are meant to send nothing. So the traced program is read instead: which values
follow from one worker's own data, and which of them decide about collectives.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decentral_jax._exchange.numbers import (
    equal_on_all_workers,
    value_equal_on_all_workers,
)
from decentral_jax.communication import (
    KINDS,
    inner_programs,
    is_unlisted,
    on_abstract_devices,
)

MARKER = getattr(equal_on_all_workers, "__name__")  # noqa: B009
VALUE_MARKER = getattr(value_equal_on_all_workers, "__name__")  # noqa: B009
REMEDY = (
    "Skip a step on all workers or on none: make the condition equal, for example "
    "dj.average(is_finite.astype(jnp.float32)) == 1. To leave out one worker's "
    "gradient alone, place dj.guard_gradients() first in the chain, and "
    "optax.apply_if_finite or the like inside, around the optimizer that does not "
    "communicate."
)


# Of these the result is a later value of the counter that goes in; others, such as
# comparisons, only follow from it.
COUNTING = (
    *("add", "sub", "mul", "rem", "max", "min", "clamp", "select_n"),
    *("convert_element_type", "optimization_barrier", "copy", "pvary"),
)


class _Origin(NamedTuple):
    """Where a value comes from, as far as it concerns collectives."""

    own: bool  # whether it may differ between workers
    counters: frozenset[int] = frozenset()  # the integer scalars that it follows from
    is_later: frozenset[int] = frozenset()  # those of which it is a later value


COMMON = _Origin(False)


def _join(origins: Iterable[_Origin], counting: bool = True) -> _Origin:
    own, counters, later = False, frozenset[int](), frozenset[int]()
    for origin in origins:
        own = own or origin.own
        counters |= origin.counters
        later |= origin.is_later
    return _Origin(own, counters, later if counting else frozenset())


def _chosen(condition: _Origin, values: Iterable[_Origin]) -> _Origin:
    """Of one of some values: which one it is follows from the condition."""
    return _join([condition._replace(is_later=frozenset()), *values])


def _longer(outside: list, inside: list) -> int:
    """How many variables have more axes outside of a loop than inside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) > len(y.aval.shape) for x, y in pairs)


def check_lockstep(
    fn: Callable, sizes: Mapping[str, int], args: tuple, kwargs: Mapping[str, Any]
) -> None:
    """Checks that no worker's own data decide which collectives it runs.

    Integers and booleans that come in, such as step counters, are taken to be equal on
    all workers; floating-point values, PRNG keys and `dj.worker_index` are a worker's
    own until they are reduced over all workers.

    Args:
      fn: A function of one worker.
      sizes: The worker axes and their sizes.
      args: Its positional arguments, with leading worker axes.
      kwargs: Its keyword arguments, alike.

    Raises:
      ValueError: If a branch or loop with collectives in it, a step counter that
        decides about collectives, or the loss that an optimizer reads where models stay
        equal, depends on a worker's own data.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    leaves = [
        jax.ShapeDtypeStruct(jnp.shape(leaf)[len(sizes) :], jnp.result_type(leaf))
        for leaf in leaves
    ]
    out = []

    def one_worker(*leaves):
        args, kwargs = structure.unflatten(leaves)
        results, tree = jax.tree.flatten(fn(*args, **kwargs))
        paths = jax.tree_util.tree_flatten_with_path(tree.unflatten(results))[0]
        out.extend(jax.tree_util.keystr(path) for path, _ in paths)
        return results

    try:
        program = jax.make_jaxpr(on_abstract_devices(one_worker, sizes))(*leaves)
    except Exception:
        # The function's own error comes, with less around it, when it is compiled.
        return
    reader = _Reader(sizes)
    origins = [
        _Origin(False, *[frozenset([] if leaf.shape else [i])] * 2)
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool
        else _Origin(True)
        for i, leaf in enumerate(leaves)
    ]
    results = reader(program.jaxpr, origins)
    for name, value, origin in zip(out, program.jaxpr.outvars, results, strict=True):
        aval: Any = value.aval
        is_counter = not aval.shape and jnp.issubdtype(aval.dtype, jnp.integer)
        if is_counter and origin.own and origin.is_later & reader.deciding:
            raise ValueError(
                f"the step counter that the function returns at {name} must be equal "
                "on all workers, but a condition on this worker's own data keeps it "
                "back: this worker would exchange with the others in the wrong step, "
                f"or wait forever. {REMEDY}"
            )


class _Reader:
    """Follows where values come from through a traced program.

    Attributes:
      deciding: The counters that decide about collectives, by their position.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = sizes
        self._axes = tuple(name for name, size in sizes.items() if size > 1)
        self.deciding: set[int] = set()

    def __call__(self, jaxpr: Any, args: list[_Origin]) -> list[_Origin]:
        origins = dict.fromkeys(jaxpr.constvars, COMMON)
        origins |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return COMMON if hasattr(atom, "val") else origins[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            results = self._equation(equation, values)
            origins |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[_Origin]) -> list[_Origin]:
        name, count = equation.primitive.name, len(equation.outvars)
        if name == "axis_index":
            return [_Origin(True)] * count
        if name in KINDS:
            return self._collective(equation, values)
        if name == "cond":
            return self._cond(equation, values)
        if name == "while":
            return self._while(equation, values)
        if name == "scan":
            return self._scan(equation, values)
        inner = [program for program, _ in inner_programs(equation)]
        if len(inner) == 1 and len(inner[0].invars) == len(values):
            if equation.params.get("name") == MARKER:
                self._decide(values[0], "a step counter")
            if equation.params.get("name") == VALUE_MARKER and values[0].own:
                raise ValueError(
                    "value must be equal on all workers, because the optimizer reads "
                    "it and would part their models, but it depends on this worker's "
                    "own data: pass value=dj.average(loss) to update."
                )
            results = self(inner[0], values)
            if len(results) == count:
                return results
        if name == "select_n":
            return [_chosen(values[0], values[1:])]
        return [_join([*values, *self._hidden(inner)], name in COUNTING)] * count

    def _hidden(self, programs: list) -> list[_Origin]:
        """What programs of unknown arguments add, such as `axis_index` in them."""
        return [
            origin
            for program in programs
            for origin in self(program, [COMMON] * len(program.invars))
        ]

    def _collective(self, equation: Any, values: list[_Origin]) -> list[_Origin]:
        axes = equation.params.get("axes", equation.params.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        gives_all = KINDS[equation.primitive.name] in ("all-reduce", "all-gather")
        groups = equation.params.get("axis_index_groups")
        if gives_all and groups is None and set(self._axes) <= set(axes):
            return [COMMON] * len(equation.outvars)
        return [_join(values)] * len(equation.outvars)

    def _decide(self, origin: _Origin, what: str) -> None:
        """Notes what a collective, or which collective, depends on."""
        if origin.own:
            raise ValueError(
                f"{what} must be equal on all workers where the function communicates, "
                "but it depends on this worker's own data: workers that choose "
                f"differently would wait for each other forever. {REMEDY}"
            )
        self.deciding |= origin.counters

    def _cond(self, equation: Any, values: list[_Origin]) -> list[_Origin]:
        condition, *operands = values
        branches = [branch.jaxpr for branch in equation.params["branches"]]
        if any(self._communicates(branch) for branch in branches):
            self._decide(condition, "the condition of a branch")
        results = [self(branch, operands) for branch in branches]
        return [_chosen(condition, each) for each in zip(*results, strict=True)]

    def _while(self, equation: Any, values: list[_Origin]) -> list[_Origin]:
        test, body = (equation.params[k].jaxpr for k in ("cond_jaxpr", "body_jaxpr"))
        first = equation.params["cond_nconsts"]
        second = first + equation.params["body_nconsts"]
        fixed, carry = values[first:second], values[second:]
        carry = self._settle(lambda carry: self(body, [*fixed, *carry]), carry)
        condition = self(test, [*values[:first], *carry])[0]
        if self._communicates(test) or self._communicates(body):
            self._decide(condition, "the condition of a loop")
        return [_chosen(condition, [each]) for each in carry]

    def _scan(self, equation: Any, values: list[_Origin]) -> list[_Origin]:
        body = equation.params["jaxpr"].jaxpr
        # What is scanned has one axis more outside; JAX names the counts differently in
        # each version.
        num_rows = _longer(equation.invars, body.invars)
        num_carry = len(body.outvars) - _longer(equation.outvars, body.outvars)
        second = len(values) - num_rows
        first = second - num_carry
        fixed, carry, rows = values[:first], values[first:second], values[second:]

        def turn(carry):
            return self(body, [*fixed, *carry, *rows])

        carry = self._settle(lambda carry: turn(carry)[: len(carry)], carry)
        return [*carry, *turn(carry)[len(carry) :]]

    @staticmethod
    def _settle(turn: Callable, carry: list[_Origin]) -> list[_Origin]:
        """What a loop's values may come from, after any number of turns."""
        while True:
            new = [_join(pair) for pair in zip(carry, turn(carry), strict=True)]
            if new == carry:
                return carry
            carry = new

    def _communicates(self, jaxpr: Any) -> bool:
        def axes(equation):
            found = equation.params.get("axes", equation.params.get("axis_name", ()))
            return found if isinstance(found, tuple) else (found,)

        return any(
            (equation.primitive.name in KINDS and set(axes(equation)) & set(self._axes))
            or is_unlisted(equation, self._sizes)
            or any(self._communicates(inner) for inner, _ in inner_programs(equation))
            for equation in jaxpr.eqns
        )
