"""Bytes that one call of a function sends, read off the traced program.

Costs are per worker and per call. For an array of `b` bytes and `n` workers, an
all-reduce (`psum`, `pmax`, ...) sends `2 b (n - 1) / n`, as a ring all-reduce does;
`ppermute` sends `b`; `all_gather` of `b` bytes per worker sends `b (n - 1)`;
`all_to_all` and `psum_scatter` send `b (n - 1) / n`. Nothing travels along a `vmap`
axis.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from decentral_jax._validation import check_arrays, check_leading_axes

__all__ = ["Collective", "CommunicationCost", "communication_cost"]

# Sizes of mesh axes by name.
Sizes = Mapping[str, int]

# Bytes sent per worker for an operand of b bytes and n workers.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "ppermute": lambda b, n: b,
    "all-gather": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
}

# JAX's names of the primitives. shard_map(check_vma=True) chooses the variants with
# "invariant" and "2".
KINDS = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "ppermute",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
}

# Primitives that do not change a number that is equal on all workers.
UNCHANGED = ("pmax", "pmin", "pvary", "optimization_barrier")


# Primitives that name an axis, but send nothing along it.
SENDS_NOTHING = (
    "axis_index",
    "pvary",
    "pcast",
    "reshard",
    "core_call",
    "vary_unreduced_cast",
    "reduced_vary_cast",
)

# Parameters in which primitives name their axes.
AXIS_PARAMS = ("axes", "axis_name", "axis_names", "named_axes")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one axis.

    Attributes:
      kind: "ppermute", "all-reduce", "all-gather", "all-to-all" or "reduce-scatter".
      axis: Name of the axis; several names are joined by commas.
      count: Number of executions per call.
      bytes_sent: Bytes sent per worker per call, for all of them together.
      pairs: For `ppermute`, pairs (sender, receiver) of numbers along the axis. Empty
        for the other kinds, in which all workers take part.
    """

    kind: str
    axis: str
    count: int
    bytes_sent: float
    pairs: frozenset[tuple[int, int]] = dataclasses.field(
        default=frozenset(), compare=False
    )

    def plus(self, other: "Collective") -> "Collective":
        """Adds another entry of the same kind and axis."""
        return dataclasses.replace(
            self,
            count=self.count + other.count,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            pairs=self.pairs | other.pairs,
        )


@dataclasses.dataclass(frozen=True)
class CommunicationCost:
    """Traffic of one worker in one call of a function; `print` shows a table.

    Attributes:
      collectives: One entry per kind and axis.
      is_exact: False if a `while` loop or a branch depends on values that are not known
        before the program runs. A loop is then counted once, and the most expensive
        branch counts. Also False if `unlisted` is not empty.
      unlisted: Names of collectives with unknown cost. They count as 0 bytes.
    """

    collectives: tuple[Collective, ...]
    is_exact: bool
    unlisted: tuple[str, ...] = ()

    @property
    def bytes_sent(self) -> float:
        """Bytes sent per worker per call."""
        return float(sum(entry.bytes_sent for entry in self.collectives))

    @property
    def count(self) -> int:
        """Number of collectives executed per call."""
        return sum(entry.count for entry in self.collectives)

    def __str__(self) -> str:
        head = f"{'collective':<16}{'axis':<16}{'count':>7}{'bytes sent':>16}"
        rows = [
            f"{e.kind:<16}{e.axis:<16}{e.count:>7}{e.bytes_sent:>16,.0f}"
            for e in self.collectives
        ]
        total = f"{'total':<32}{self.count:>7}{self.bytes_sent:>16,.0f}"
        note = []
        if self.unlisted:
            note = [f"(not exact; not counted: {', '.join(self.unlisted)})"]
        elif not self.is_exact:
            note = ["(not exact: counts the heavier branch, or one loop iteration)"]
        return "\n".join([head, *rows, total, *note])


def communication_cost(
    fn: Callable,
    *args: Any,
    axis_sizes: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> CommunicationCost:
    """Counts the collectives that a worker executes in one call, and their bytes.

    The function is traced, not run. A function from `dj.Workers.spmd` is traced as if
    every worker had a device of its own, so the result describes the algorithm and not
    the current machine. If the condition of a branch follows from integers in `args`,
    such as a step counter in an optimizer's state, the result counts that branch.

    Args:
      fn: A function from `dj.Workers.spmd`, a function that contains `jax.shard_map` or
        `jax.pmap`, or, with `axis_sizes`, a step for one worker.
      *args: Arguments of `fn`: arrays or `jax.ShapeDtypeStruct`.
      axis_sizes: Number of workers along each worker axis of a step for one worker, by
        the name of the axis.
      **kwargs: Keyword arguments of `fn`.

    Returns:
      The cost, with the attributes `.bytes_sent`, `.count` and `.collectives`. `print`
      shows a table.

    Raises:
      TypeError: If `fn` is not a function, or any leaf of an argument is not an array.
      ValueError: If a leaf for a `dj.Workers.spmd` function lacks the worker axes.

    Example:
      >>> import decentral_jax as dj, jax.numpy as jnp
      >>> step = lambda x: dj.mix(x, dj.topology.ring(8))
      >>> cost = dj.communication_cost(step, jnp.zeros(100), axis_sizes={"workers": 8})
      >>> print(cost)
      collective      axis              count      bytes sent
      ppermute        workers               2             800
      total                                 2             800
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {fn!r}.")
    one_worker = getattr(fn, "one_worker", None)
    if one_worker is not None:
        own, shared, call, axis_sizes = one_worker(*args, **kwargs)
        assert axis_sizes
        dims = len(axis_sizes)
        check_leading_axes("arguments", own, tuple(axis_sizes.values()))
        check_arrays("shared arguments", shared)
        # All workers are in the same phase, so the integers of the first one are used.
        args = jax.tree.map(lambda x: _first(x, dims), own), shared
    else:
        check_arrays("arguments", (args, kwargs))
        args, call = (args, kwargs), lambda args, kwargs: fn(*args, **kwargs)
    if axis_sizes:
        call = on_abstract_devices(call, axis_sizes)
    jaxpr = trace(call, *args)
    known = [known_integer(leaf) for leaf in jax.tree.leaves(args)]
    return cost_of_program(jaxpr, known)[0]


def trace(fn: Callable, *args: Any) -> Any:
    """Returns the closed jaxpr of a function."""
    # Convert to dtypes that JAX has. Tracing warns of int64 arrays; a call does not.
    return jax.make_jaxpr(fn)(*jax.tree.map(_canonical, args))


def cost_of_program(jaxpr: Any, known: Sequence[Any]) -> tuple[CommunicationCost, list]:
    """Returns the cost of one call of a traced program, and the integers it returns.

    Args:
      jaxpr: A closed jaxpr.
      known: One entry per input: the value of an integer scalar, or None.

    Returns:
      The cost, and one entry per output: the value of a scalar, or None.
    """
    interpreter = _JaxprInterpreter()
    found, results = collect(interpreter(jaxpr.jaxpr, jaxpr.consts, list(known), {}))
    # Merge collectives of the same kind and axis.
    merged: dict[tuple[str, str], Collective] = {}
    for new in found:
        key = new.kind, new.axis
        merged[key] = merged[key].plus(new) if key in merged else new
    entries = tuple(entry for _, entry in sorted(merged.items()))
    unlisted = tuple(sorted(interpreter.unlisted))
    exact = interpreter.is_exact and not unlisted
    return CommunicationCost(entries, exact, unlisted), results


def collect(walked: "Walked") -> tuple[list[Collective], list]:
    """Returns everything that a generator yields, and its return value."""
    found = []
    while True:
        try:
            found.append(next(walked))
        except StopIteration as end:
            return found, end.value


def _first(x: Any, dims: int) -> Any:
    """Returns one worker's part of a leaf: an integer, or only a shape and dtype."""
    shape = np.shape(x)[dims:]
    concrete = isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and x.is_fully_addressable
    )
    if concrete and not shape and _is_discrete(x.dtype):
        return np.asarray(x)[(0,) * dims]
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _canonical(x: Any) -> Any:
    """Converts a leaf to the dtype that JAX gives it, without a warning."""
    if not isinstance(x, (np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return x
    dtype = x.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    canonical = jax.dtypes.canonicalize_dtype(dtype)
    if canonical == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, canonical, sharding=x.sharding)
    return np.asarray(x).astype(canonical)


def on_abstract_devices(fn: Callable, axis_sizes: Mapping[str, int]) -> Callable:
    """Maps `fn` over an abstract mesh with one device per worker."""
    names, sizes = tuple(axis_sizes), tuple(axis_sizes.values())
    mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def known_integer(leaf: Any) -> Any:
    """Returns the value of an integer or boolean scalar if it is known, else None."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or np.ndim(leaf):
        return None
    return np.asarray(leaf) if _is_discrete(jnp.result_type(leaf)) else None


def _is_discrete(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_)


# Yields collectives; returns one entry per result: a known value, or None.
Walked = Generator[Collective, None, list]


class _JaxprInterpreter:
    """Interprets a jaxpr, propagating integer scalars whose values are known.

    Attributes:
      is_exact: Whether no cost so far depends on unknown values.
      unlisted: Names of collectives with unknown cost.
    """

    def __init__(self):
        self.is_exact = True
        self.unlisted: set[str] = set()

    def __call__(self, jaxpr, consts, args, sizes) -> Walked:
        known = dict(zip(jaxpr.constvars, map(known_integer, consts), strict=True))
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return atom.val if hasattr(atom, "val") else known.get(atom)

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name in KINDS:
                yield from _sent(eqn, sizes)
            if name in UNCHANGED:
                known |= dict(zip(eqn.outvars, values, strict=True))
            elif name == "cond":
                results = yield from self.cond(eqn, values, sizes)
                known |= dict(zip(eqn.outvars, results, strict=True))
            elif name == "scan":
                # The body runs `length` times, with unknown carries.
                inner = eqn.params["jaxpr"]
                unknown = [None] * len(inner.jaxpr.invars)
                length = eqn.params["length"]
                for entry in self(inner.jaxpr, inner.consts, unknown, sizes):
                    yield dataclasses.replace(
                        entry,
                        count=entry.count * length,
                        bytes_sent=entry.bytes_sent * length,
                    )
            elif name == "while":
                # The number of iterations is unknown: count the loop once.
                found = []
                for inner in (eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]):
                    unknown = [None] * len(inner.jaxpr.invars)
                    found += self(inner.jaxpr, inner.consts, unknown, sizes)
                self.is_exact = self.is_exact and not found
                yield from found
            elif name not in KINDS:
                # A call of other programs, an unlisted collective, or local arithmetic.
                if is_unlisted(eqn, sizes):
                    self.unlisted.add(name)
                inner_sizes = sizes
                if "mesh" in eqn.params:
                    inner_sizes = {**sizes, **eqn.params["mesh"].shape}
                inner_jaxprs = list(inner_programs(eqn))
                for inner, inner_consts in inner_jaxprs:
                    same = len(inner.invars) == len(values)
                    passed = values if same else [None] * len(inner.invars)
                    results = yield from self(inner, inner_consts, passed, inner_sizes)
                    # Propagate results of jitted helpers, such as a remainder.
                    if len(inner_jaxprs) == 1 and len(results) == len(eqn.outvars):
                        known |= dict(zip(eqn.outvars, results, strict=True))
                if not inner_jaxprs:
                    known |= evaluate(eqn, values)
        return [read(atom) for atom in jaxpr.outvars]

    def cond(self, eqn, values, sizes) -> Walked:
        index, *operands = values
        # With a known index that branch counts, otherwise the most expensive one.
        branches = eqn.params["branches"]
        if index is not None:
            branch = branches[int(np.clip(int(index), 0, len(branches) - 1))]
            return (yield from self(branch.jaxpr, branch.consts, operands, sizes))
        costs = [
            list(self(branch.jaxpr, branch.consts, operands, sizes))
            for branch in branches
        ]
        heaviest = max(costs, key=lambda found: sum(e.bytes_sent for e in found))
        if any(Counter(found) != Counter(heaviest) for found in costs):
            self.is_exact = False
        yield from heaviest
        return [None] * len(eqn.outvars)


def _sent(eqn: Any, sizes: Sizes) -> Iterator[Collective]:
    """Yields the cost of a listed collective, one entry per operand."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    axes = axes if isinstance(axes, tuple) else (axes,)
    axes = tuple(axis for axis in axes if axis in sizes)  # others are vmap axes
    n = math.prod(sizes[axis] for axis in axes)
    if n == 1:
        return
    kind = KINDS[eqn.primitive.name]
    pairs = frozenset((int(i), int(j)) for i, j in eqn.params.get("perm", ()))
    for atom in eqn.invars:
        sent = SENT[kind](atom.aval.size * atom.aval.dtype.itemsize, n)
        yield Collective(kind, ",".join(axes), 1, sent, pairs)


def is_unlisted(eqn: Any, sizes: Sizes) -> bool:
    """Returns whether an equation is a collective over a mesh axis, but not listed."""
    if eqn.primitive.name in SENDS_NOTHING or "mesh" in eqn.params:
        return False
    if any(True for _ in inner_programs(eqn)):
        return False  # the interpreter visits what it calls
    named = {
        axis
        for key in AXIS_PARAMS
        for value in [eqn.params.get(key, ())]
        for axis in (value if isinstance(value, (tuple, list)) else (value,))
        if isinstance(axis, str)
    }
    # Other primitives name their axes in their effects.
    for effect in eqn.effects:
        if isinstance(name := getattr(effect, "name", None), str):
            named.add(name)
    return any(sizes.get(axis, 1) > 1 for axis in named)


def inner_programs(eqn: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the jaxprs that an equation calls, with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "jaxpr") and hasattr(item, "consts"):
                yield item.jaxpr, item.consts
            elif hasattr(item, "eqns"):
                yield item, ()


def evaluate(eqn: Any, values: Sequence[Any]) -> dict[Any, np.ndarray]:
    """Returns the results of an equation if all its inputs are known scalars."""
    if any(value is None for value in values) or not values:
        return {}
    if eqn.effects or not all(_is_number(atom.aval) for atom in eqn.outvars):
        return {}
    out = eqn.primitive.bind(*values, **eqn.params)
    out = out if eqn.primitive.multiple_results else [out]
    return {
        atom: np.asarray(value) for atom, value in zip(eqn.outvars, out, strict=True)
    }


def _is_number(aval: Any) -> bool:
    """Returns whether a value is a plain scalar, and not, say, a typed PRNG key."""
    number = jnp.issubdtype(aval.dtype, np.number)
    return not aval.shape and (number or jnp.issubdtype(aval.dtype, np.bool_))
