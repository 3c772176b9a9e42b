"""Bytes on the wire, read off the traced program.

The convention, a worker and a call, for an array of `b` bytes among `n` workers:
an all-reduce (`psum`, `pmax`, ...) sends `2 b (n - 1) / n`, as a ring all-reduce does;
`ppermute` sends `b`; `all_gather` of `b` a worker, `b (n - 1)`; `all_to_all` and
`psum_scatter`, `b (n - 1) / n`. Nothing travels along a `vmap` axis.
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

# Bytes sent by a worker for an operand of b bytes among n workers.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "ppermute": lambda b, n: b,
    "all-gather": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
}

# What JAX calls them; "invariant" and "2" are variants that shard_map(check_vma=True)
# chooses.
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

# What leaves a number as it is on which all workers agree, such as a step counter.
UNCHANGED = ("pmax", "pmin", "pvary", "optimization_barrier")


# Name an axis, but send nothing along it.
SENDS_NOTHING = (
    "axis_index",
    "pvary",
    "pcast",
    "reshard",
    "core_call",
    "xla_pmap",
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
      axis: The axis, several joined by commas.
      count: How many are executed a call.
      bytes_sent: Bytes that a worker sends for all of them together.
      pairs: Of `ppermute`, who sends to whom, as numbers along the axis; all take part
        in the others.
    """

    kind: str
    axis: str
    count: int
    bytes_sent: float
    pairs: frozenset[tuple[int, int]] = dataclasses.field(
        default=frozenset(), compare=False
    )

    def plus(self, other: "Collective") -> "Collective":
        """Both together, of one kind and axis."""
        return dataclasses.replace(
            self,
            count=self.count + other.count,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            pairs=self.pairs | other.pairs,
        )


@dataclasses.dataclass(frozen=True)
class CommunicationCost:
    """What a worker sends in one call of a function; `print` shows a table.

    Attributes:
      collectives: One entry a kind and axis.
      is_exact: False if a `while` loop or a branch depends on values that are not known
        before running; then a loop is counted once and the heavier branch is taken.
        Also False if there are collectives in `unlisted`.
      unlisted: Names of collectives whose cost is not known. They count as 0 bytes.
    """

    collectives: tuple[Collective, ...]
    is_exact: bool
    unlisted: tuple[str, ...] = ()

    @property
    def bytes_sent(self) -> float:
        """Bytes that a worker sends a call."""
        return float(sum(entry.bytes_sent for entry in self.collectives))

    @property
    def count(self) -> int:
        """Collectives executed a call."""
        return sum(entry.count for entry in self.collectives)

    def __str__(self) -> str:
        head = f"{'collective':<16}{'axis':<16}{'count':>7}{'bytes sent':>16}"
        rows = [
            f"{e.kind:<16}{e.axis:<16}{e.count:>7}{e.bytes_sent:>16,.0f}"
            for e in self.collectives
        ]
        total = f"{'total':<32}{self.count:>7}{self.bytes_sent:>16,.0f}"
        note = [] if self.is_exact else ["(an upper branch, or a loop counted once)"]
        if self.unlisted:
            note = [f"(not exact; not counted: {', '.join(self.unlisted)})"]
        return "\n".join([head, *rows, total, *note])


def communication_cost(
    fn: Callable, *args: Any, axis_sizes: Mapping[str, int] | None = None
) -> CommunicationCost:
    """Counts the collectives and bytes that a worker sends in one call.

    The function is traced, not run. A function from `dj.Workers.spmd` is traced as if
    every worker had a device of its own, so that the answer belongs to the algorithm
    and not to the machine at hand. Branches whose condition follows from integers in
    `args`, such as a step counter in an optimizer's state, are taken as they would be.

    Args:
      fn: A function from `dj.Workers.spmd`; or one that contains `jax.shard_map` or
        `jax.pmap`; or, with `axis_sizes`, a step for one worker.
      *args: Its arguments, arrays or `jax.ShapeDtypeStruct`.
      axis_sizes: Sizes of the worker axes that a step for one worker uses.

    Returns:
      The cost, with `.bytes_sent`, `.count`, `.collectives`, and a table when printed.

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
    check_arrays("arguments", args)
    one_worker = getattr(fn, "one_worker", None)
    if one_worker is not None:
        fn, axis_sizes = one_worker
        assert axis_sizes
        dims = len(axis_sizes)
        check_leading_axes("arguments", args, tuple(axis_sizes.values()))
        # All workers are in the same phase: the first one's integers stand for all.
        args = jax.tree.map(lambda x: _first(x, dims), args)
    if axis_sizes:
        fn = on_abstract_devices(fn, axis_sizes)
    jaxpr = trace(fn, *args)
    known = [known_integer(leaf) for leaf in jax.tree.leaves(args)]
    return cost_of_program(jaxpr, known)[0]


def trace(fn: Callable, *args: Any) -> Any:
    """The closed jaxpr of a function, which is not run."""
    # As types that JAX has: it would warn of int64 arrays, which a call takes silently.
    return jax.make_jaxpr(fn)(*jax.tree.map(_canonical, args))


def cost_of_program(jaxpr: Any, known: Sequence[Any]) -> tuple[CommunicationCost, list]:
    """The cost of one call of a traced program, and the integers that it returns.

    Args:
      jaxpr: A closed jaxpr.
      known: One entry per input: the value of an integer scalar, or None.

    Returns:
      The cost, and one entry per output: the value of a scalar, or None.
    """
    walk = _Walk()
    found, results = collect(walk(jaxpr.jaxpr, jaxpr.consts, list(known), {}))
    merged: dict[tuple[str, str], Collective] = {}
    for new in found:
        key = new.kind, new.axis
        merged[key] = merged[key].plus(new) if key in merged else new
    entries = tuple(entry for _, entry in sorted(merged.items()))
    unlisted = tuple(sorted(walk.unlisted))
    exact = walk.is_exact and not unlisted
    return CommunicationCost(entries, exact, unlisted), results


def collect(walked: "Walked") -> tuple[list[Collective], list]:
    """All that a walk yields, and what it returns."""
    found = []
    while True:
        try:
            found.append(next(walked))
        except StopIteration as end:
            return found, end.value


def _first(x: Any, dims: int) -> Any:
    """One worker's part of a leaf, or only its shape where the value is of no use."""
    shape = np.shape(x)[dims:]
    concrete = isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and x.is_fully_addressable
    )
    if concrete and not shape and _is_discrete(x.dtype):
        return np.asarray(x)[(0,) * dims]
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _canonical(x: Any) -> Any:
    """A leaf in the dtype that JAX gives it, without a warning."""
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
    """`fn` with every worker on a device of its own, none of which need exist."""
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
    """The value of an integer or boolean scalar that is at hand, else None."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or np.ndim(leaf):
        return None
    return np.asarray(leaf) if _is_discrete(jnp.result_type(leaf)) else None


def _is_discrete(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_)


# Yields collectives; returns the results that are known, None for the others.
Walked = Generator[Collective, None, list]


class _Walk:
    """Walks a jaxpr, following integer scalars whose values are known."""

    def __init__(self):
        self.is_exact = True
        self.unlisted: set[str] = set()  # collectives of unknown cost

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
                found = []
                for inner in (eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]):
                    unknown = [None] * len(inner.jaxpr.invars)
                    found += self(inner.jaxpr, inner.consts, unknown, sizes)
                self.is_exact = self.is_exact and not found
                yield from found
            elif name not in KINDS:
                if is_unlisted(eqn, sizes):
                    self.unlisted.add(name)
                inner_sizes = sizes
                if "mesh" in eqn.params:
                    inner_sizes = {**sizes, **eqn.params["mesh"].shape}
                elif name == "xla_pmap":
                    axis_size = eqn.params["axis_size"]
                    inner_sizes = {**sizes, eqn.params["axis_name"]: axis_size}
                inner_jaxprs = list(inner_programs(eqn))
                for inner, inner_consts in inner_jaxprs:
                    same = len(inner.invars) == len(values)
                    passed = values if same else [None] * len(inner.invars)
                    results = yield from self(inner, inner_consts, passed, inner_sizes)
                    # A jitted helper, such as the remainder of a counter.
                    if len(inner_jaxprs) == 1 and len(results) == len(eqn.outvars):
                        known |= dict(zip(eqn.outvars, results, strict=True))
                if not inner_jaxprs:
                    known |= evaluate(eqn, values)
        return [read(atom) for atom in jaxpr.outvars]

    def cond(self, eqn, values, sizes) -> Walked:
        index, *operands = values
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


def _sent(eqn, sizes) -> Iterator[Collective]:
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    axes = axes if isinstance(axes, tuple) else (axes,)
    axes = tuple(axis for axis in axes if axis in sizes)  # the rest are vmap axes
    n = math.prod(sizes[axis] for axis in axes)
    if n == 1:
        return
    kind = KINDS[eqn.primitive.name]
    pairs = frozenset((int(i), int(j)) for i, j in eqn.params.get("perm", ()))
    for atom in eqn.invars:
        sent = SENT[kind](atom.aval.size * atom.aval.dtype.itemsize, n)
        yield Collective(kind, ",".join(axes), 1, sent, pairs)


def is_unlisted(eqn, sizes) -> bool:
    """Whether an equation that is not listed uses a mesh axis by name, and sends."""
    if eqn.primitive.name in SENDS_NOTHING or "mesh" in eqn.params:
        return False
    if any(True for _ in inner_programs(eqn)):
        return False  # what it calls is walked
    named = {
        axis
        for key in AXIS_PARAMS
        for value in [eqn.params.get(key, ())]
        for axis in (value if isinstance(value, (tuple, list)) else (value,))
        if isinstance(axis, str)
    }
    # Primitives that name their axis otherwise tell it by their effects.
    for effect in eqn.effects:
        if isinstance(name := getattr(effect, "name", None), str):
            named.add(name)
    return any(sizes.get(axis, 1) > 1 for axis in named)


def inner_programs(eqn) -> Iterator[tuple[Any, Any]]:
    """The jaxprs that an equation calls, with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "jaxpr") and hasattr(item, "consts"):
                yield item.jaxpr, item.consts
            elif hasattr(item, "eqns"):
                yield item, ()


def evaluate(eqn, values) -> dict:
    """Results of an equation on known scalars, if it is one."""
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
    """Whether a value is a plain scalar, and no typed PRNG key for example."""
    number = jnp.issubdtype(aval.dtype, np.number)
    return not aval.shape and (number or jnp.issubdtype(aval.dtype, np.bool_))
