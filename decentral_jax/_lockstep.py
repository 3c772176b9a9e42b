"""Checks before execution that all workers run the same collectives.

A collective waits for every worker. If one worker takes a branch with a collective and
another worker does not, both wait forever when they run on different devices. Under
`vmap`, the same step runs, but returns different numbers. The same happens one step
later if only some workers advance a step counter that determines when to communicate.
The usual recipe for loss scaling does so with
`jnp.where(is_finite, new_state, old_state)`.

Synchronizing the counters during training would cost a message in every step, including
the steps that should send nothing. Therefore, this module analyzes the traced program
instead: which values depend on one worker's own data, and which of those values decide
whether a collective runs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

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

# Names of the jitted functions that mark a value that must be equal on all workers.
MARKER = getattr(equal_on_all_workers, "__name__")  # noqa: B009
VALUE_MARKER = getattr(value_equal_on_all_workers, "__name__")  # noqa: B009

REMEDY = (
    "Skip a step on all workers or on none: make the condition equal, for example "
    "dj.average(is_finite.astype(jnp.float32)) == 1. To leave out only one worker's "
    "gradient, place dj.zero_nonfinite_updates() first in the chain, and wrap the "
    "inner optimizer, which does not communicate, in optax.apply_if_finite or similar."
)


# Primitives whose result is a later value of a counter among their operands. The
# results of other primitives, such as comparisons, only depend on the counter.
COUNTING = (
    *("add", "sub", "mul", "rem", "max", "min", "clamp", "select_n"),
    *("convert_element_type", "optimization_barrier", "copy", "pvary"),
)


class _Origin(NamedTuple):
    """What a value depends on, as far as it concerns collectives.

    Counters are the integer scalars among the function's arguments, given by their
    positions.
    """

    own: bool  # whether the value may differ between workers
    counters: frozenset[int] = frozenset()  # counters that the value depends on
    is_later: frozenset[int] = frozenset()  # counters whose later value it may be


# The origin of constants and of reductions over all workers.
COMMON = _Origin(False)


def _join(origins: Iterable[_Origin], counting: bool = True) -> _Origin:
    """Returns the origin of a value computed from values of the given origins.

    Args:
      origins: Origins of the operands.
      counting: Whether the result may be a later value of a counter.
    """
    own, counters, later = False, frozenset[int](), frozenset[int]()
    for origin in origins:
        own = own or origin.own
        counters |= origin.counters
        later |= origin.is_later
    return _Origin(own, counters, later if counting else frozenset())


def _chosen(condition: _Origin, values: Iterable[_Origin]) -> _Origin:
    """Returns the origin of a value that a condition selects from several values."""
    return _join([condition._replace(is_later=frozenset()), *values])


def _longer(outside: list[Any], inside: list[Any]) -> int:
    """Counts the variables that have more axes outside of a loop than inside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) > len(y.aval.shape) for x, y in pairs)


def check_lockstep(
    fn: Callable[..., Any],
    sizes: Mapping[str, int],
    own: Any,
    shared: Any,
) -> None:
    """Checks that no worker's own data decides which collectives it runs.

    The check assumes that shared arguments, and integer and boolean arguments such as
    step counters, are equal on all workers. Other floating-point arguments and PRNG
    keys, and `dj.worker_index`, belong to one worker until they are reduced over all
    workers.

    Args:
      fn: Function of one worker's own arguments and of shared arguments.
      sizes: Mapping from the names of the worker axes to their sizes.
      own: First argument of `fn`, with leading worker axes.
      shared: Second argument of `fn`, without worker axes.

    Raises:
      ValueError: If any of the following depends on one worker's own data: the
        condition of a branch or loop with collectives; a step counter that decides
        whether a collective runs; the `value` (loss) that an optimizer reads where the
        models must stay equal.
    """
    # Abstract leaves of one worker, without the worker axes.
    leaves, structure = jax.tree.flatten((own, shared))
    num_own = len(jax.tree.leaves(own))
    leaves = [
        jax.ShapeDtypeStruct(
            jnp.shape(leaf)[len(sizes) if i < num_own else 0 :], jnp.result_type(leaf)
        )
        for i, leaf in enumerate(leaves)
    ]
    # `names` receives the path of each result, for messages.
    names = []

    def one_worker(*leaves):
        results, tree = jax.tree.flatten(fn(*structure.unflatten(leaves)))
        paths = jax.tree_util.tree_flatten_with_path(tree.unflatten(results))[0]
        names.extend(jax.tree_util.keystr(path) for path, _ in paths)
        return results

    try:
        program = jax.make_jaxpr(on_abstract_devices(one_worker, sizes))(*leaves)
    except Exception:
        # Compiling the function raises its own error, with a shorter traceback.
        return
    # Follow the origins of all arguments through the program. Every integer scalar is a
    # counter, identified by its position.
    interpreter = _OriginInterpreter(sizes)
    origins = [
        _Origin(False, *[frozenset([] if leaf.shape else [i])] * 2)
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool
        else _Origin(i < num_own)
        for i, leaf in enumerate(leaves)
    ]
    results = interpreter(program.jaxpr, origins)
    # A counter that decides about collectives must not return with a later value that
    # differs between workers.
    for name, value, origin in zip(names, program.jaxpr.outvars, results, strict=True):
        aval: Any = value.aval
        is_counter = not aval.shape and jnp.issubdtype(aval.dtype, jnp.integer)
        if is_counter and origin.own and origin.is_later & interpreter.deciding:
            raise ValueError(
                f"the step counter that the function returns at {name} must be equal "
                "on all workers, but a condition on this worker's own data can stop "
                "it from advancing: this worker would then communicate in the wrong "
                f"step, or wait forever. {REMEDY}"
            )


class _OriginInterpreter:
    """Propagates the origins of values through a jaxpr.

    A call takes a jaxpr and the origins of its arguments, and returns the origins of
    its results.

    Args:
      sizes: Mapping from the names of the worker axes to their sizes.

    Attributes:
      deciding: Counters that decide whether a collective runs, by position.

    Raises:
      ValueError: A call raises it if one worker's own data decides whether a collective
        runs.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = sizes
        # Collectives over axes of size 1 do not wait for anyone.
        self._axes = tuple(name for name, size in sizes.items() if size > 1)
        self.deciding: set[int] = set()

    def __call__(self, jaxpr: Jaxpr, args: list[_Origin]) -> list[_Origin]:
        origins: dict[Any, _Origin]
        origins = dict.fromkeys(jaxpr.constvars, COMMON)
        origins |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return COMMON if hasattr(atom, "val") else origins[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            results = self._equation(equation, values)
            origins |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: JaxprEqn, values: list[_Origin]) -> list[_Origin]:
        """Returns the origins of the results of one equation."""
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
        # A call of one inner program with the same arguments, such as `jit`.
        inner = [program for program, _ in inner_programs(equation)]
        if len(inner) == 1 and len(inner[0].invars) == len(values):
            if equation.params.get("name") == MARKER:
                self._decide(values[0], "a step counter")
            if equation.params.get("name") == VALUE_MARKER and values[0].own:
                raise ValueError(
                    "value must be equal on all workers, because the optimizer reads "
                    "it and their models would diverge, but it depends on this "
                    "worker's own data: pass value=dj.average(loss) to update."
                )
            results = self(inner[0], values)
            if len(results) == count:
                return results
        if name == "select_n":
            return [_chosen(values[0], values[1:])]
        # By default, each result depends on all operands.
        return [_join([*values, *self._hidden(inner)], name in COUNTING)] * count

    def _hidden(self, programs: list[Jaxpr]) -> list[_Origin]:
        """Returns origins that arise inside inner programs, such as `axis_index`.

        How the equation passes arguments to the programs is unknown.
        """
        return [
            origin
            for program in programs
            for origin in self(program, [COMMON] * len(program.invars))
        ]

    def _collective(self, equation: JaxprEqn, values: list[_Origin]) -> list[_Origin]:
        """Returns the origins of a collective's results.

        The results of a reduction over all workers are equal on all workers.
        """
        axes = equation.params.get("axes", equation.params.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        gives_all = KINDS[equation.primitive.name] in ("all-reduce", "all-gather")
        groups = equation.params.get("axis_index_groups")
        if gives_all and groups is None and set(self._axes) <= set(axes):
            return [COMMON] * len(equation.outvars)
        return [_join(values)] * len(equation.outvars)

    def _decide(self, origin: _Origin, what: str) -> None:
        """Records that a value decides whether, or which, collective runs."""
        if origin.own:
            raise ValueError(
                f"{what} must be equal on all workers where the function communicates, "
                "but it depends on this worker's own data: workers that choose "
                f"differently would wait for each other forever. {REMEDY}"
            )
        self.deciding |= origin.counters

    def _cond(self, equation: JaxprEqn, values: list[_Origin]) -> list[_Origin]:
        """Returns the origins of the results of `lax.cond` or `lax.switch`."""
        condition, *operands = values
        branches = [branch.jaxpr for branch in equation.params["branches"]]
        if any(self._communicates(branch) for branch in branches):
            self._decide(condition, "the condition of a branch")
        results = [self(branch, operands) for branch in branches]
        return [_chosen(condition, each) for each in zip(*results, strict=True)]

    def _while(self, equation: JaxprEqn, values: list[_Origin]) -> list[_Origin]:
        """Returns the origins of the results of `lax.while_loop`."""
        test, body = (equation.params[k].jaxpr for k in ("cond_jaxpr", "body_jaxpr"))
        # Operands: constants of the condition, constants of the body, initial carry.
        first = equation.params["cond_nconsts"]
        second = first + equation.params["body_nconsts"]
        fixed, carry = values[first:second], values[second:]
        carry = self._fixed_point(lambda carry: self(body, [*fixed, *carry]), carry)
        condition = self(test, [*values[:first], *carry])[0]
        if self._communicates(test) or self._communicates(body):
            self._decide(condition, "the condition of a loop")
        return [_chosen(condition, [each]) for each in carry]

    def _scan(self, equation: JaxprEqn, values: list[_Origin]) -> list[_Origin]:
        """Returns the origins of the results of `lax.scan`."""
        body = equation.params["jaxpr"].jaxpr
        # Operands: constants, initial carry, scanned arrays. Scanned arrays have one
        # more axis outside of the loop. The parameters that hold the three counts have
        # different names in different versions of JAX.
        num_rows = _longer(equation.invars, body.invars)
        num_carry = len(body.outvars) - _longer(equation.outvars, body.outvars)
        second = len(values) - num_rows
        first = second - num_carry
        fixed, carry, rows = values[:first], values[first:second], values[second:]

        def iteration(carry):
            return self(body, [*fixed, *carry, *rows])

        carry = self._fixed_point(lambda carry: iteration(carry)[: len(carry)], carry)
        return [*carry, *iteration(carry)[len(carry) :]]

    @staticmethod
    def _fixed_point(
        iteration: Callable[[list[_Origin]], list[_Origin]], carry: list[_Origin]
    ) -> list[_Origin]:
        """Returns the origins of a loop's carry after any number of iterations.

        The loop below ends because origins only grow and there are finitely many.
        """
        while True:
            new = [_join(pair) for pair in zip(carry, iteration(carry), strict=True)]
            if new == carry:
                return carry
            carry = new

    def _communicates(self, jaxpr: Jaxpr) -> bool:
        """Returns whether a program, or any program in it, has a collective.

        A primitive that this library does not know may be a collective, too.
        """

        def axes(equation):
            found = equation.params.get("axes", equation.params.get("axis_name", ()))
            return found if isinstance(found, tuple) else (found,)

        return any(
            (equation.primitive.name in KINDS and set(axes(equation)) & set(self._axes))
            or is_unlisted(equation, self._sizes)
            or any(self._communicates(inner) for inner, _ in inner_programs(equation))
            for equation in jaxpr.eqns
        )
