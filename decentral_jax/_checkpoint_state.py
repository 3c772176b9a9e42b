"""Structure of training states: descriptions, comparisons, and changes of workers.

`dj.Checkpoints` writes a description of the state next to the arrays. With it,
`restore` detects a state of another model or optimizer. If the number of workers
changes, this module finds the parameters and the optimizer state, and converts the
state.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decentral_jax._exchange.numbers import PyTree
from decentral_jax._nnx import values
from decentral_jax.evaluation import eval_params
from decentral_jax.mixing import average
from decentral_jax.workers import Workers, is_key, unwrap_keys, wrap_keys

# Separates the PRNG keys of new workers from keys that a run derives by splitting.
SALT = 0x64656A78


class Parts(NamedTuple):
    """The parameters and optimizer states among all leaves of a state."""

    params: PyTree  # a tree of leaf numbers
    opt_state: PyTree  # a tree of leaf numbers
    init: Callable[[Any], Any]  # from one worker's parameters to its optimizer state


def find_parts(
    numbered: tuple[Any, ...],
    like: tuple[Any, ...],
    init: Callable[[Any], Any] | None,
    axes: int,
) -> Parts | None:
    """Finds the parameters and optimizer states in a state.

    Args:
      numbered: The state, with the numbers of its leaves in place of arrays.
      like: The state.
      init: The optimizer's `init`, or None.
      axes: Number of worker axes.

    Returns:
      The parts, or None if the state has no recognizable form or no `init` is known.

    Raises:
      ValueError: If `init` does not return such optimizer states for the parameters.
    """
    # Three forms: an nnx model with its optimizer; a train state; or params and
    # opt_state. `params` may hold the parameters under the key "params".
    candidates = []
    optimizer, model = _nnx(numbered)
    if optimizer is not None and model is not None:
        nnx = sys.modules["flax.nnx"]
        params = values(nnx.state(model, optimizer.wrt))
        opt_state = values(optimizer.opt_state)
        candidates, init = [params], init or optimizer.tx.init
    elif len(numbered) == 1:
        params = get(numbered[0], "params")
        opt_state = get(numbered[0], "opt_state")
        if params is None or opt_state is None:
            return None
        init = init or getattr(get(numbered[0], "tx"), "init", None)
        candidates = [get(params, "params"), params]
    else:
        params, opt_state = numbered[:2]
        candidates = [get(params, "params"), params]
    if init is None:
        return None

    # Choose the candidate for which `init` returns the structure of `opt_state`.
    leaves = jax.tree.leaves(like)
    for params in candidates:
        numbers = jax.tree.leaves(params)
        if not numbers or not all(
            jnp.issubdtype(jnp.result_type(leaves[i]), jnp.inexact) for i in numbers
        ):
            continue
        # The parameters of one worker.
        one = jax.tree.map(
            lambda i: jax.ShapeDtypeStruct(
                jnp.shape(leaves[i])[axes:], jnp.result_type(leaves[i])
            ),
            params,
        )
        try:
            fresh = jax.eval_shape(init, one)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # `init` expects other trees.
        if jax.tree.structure(fresh) == jax.tree.structure(opt_state):
            return Parts(params, opt_state, init)
    raise ValueError(
        "init(params) does not return optimizer states like those in the state: "
        "pass init=tx.init, and pass what is not a parameter (step counters, PRNG "
        'keys, batch statistics) in {"params": params, ...} or as further trees: '
        "restore(params, opt_state, others)."
    )


def _nnx(state: tuple[Any, ...]) -> tuple[Any, Any]:
    """Returns the nnx optimizer in a state and its model, or None for each."""
    # A state holds objects of nnx only if the caller has imported it.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return None, None
    # The parts that `nnx.split` returns.
    if isinstance(state[0], nnx.GraphDef):
        states = [x for x in state if isinstance(x, nnx.State)]
        state = nnx.merge(state[0], *states)
    kinds = (nnx.Optimizer, nnx.Module)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    optimizers = [x for x in nodes if isinstance(x, nnx.Optimizer)]
    models = [x for x in nodes if isinstance(x, nnx.Module)]
    if len(optimizers) != 1:
        return None, None
    model = models[0] if len(models) == 1 else getattr(optimizers[0], "model", None)
    return optimizers[0], model


def get(tree: object, name: str) -> PyTree:
    """Returns the key or attribute of a state with the given name, or None."""
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def writable(x: PyTree) -> PyTree:
    """Converts an array to a dtype that can be written.

    PRNG keys become their key data. TensorStore supports only some dtypes of at most 8
    bits, so the others become unsigned integers with the same bits.
    """
    x = unwrap_keys(x)
    if is_packed(x):
        return lax.bitcast_convert_type(jnp.asarray(x), bits_of(x)).astype(jnp.uint8)
    return x if isinstance(x, jax.Array) else np.array(x, jnp.result_type(x))


def as_before(x: jax.Array, like: jax.typing.ArrayLike) -> jax.Array:
    """Inverts `writable`, for an array of the dtype of `like`."""
    if is_packed(like):
        return lax.bitcast_convert_type(x.astype(bits_of(like)), jnp.result_type(like))
    return wrap_keys(x, like)


def is_packed(x: jax.typing.ArrayLike) -> bool:
    """Returns whether the dtype is int4, float8, or similar, in any variant."""
    dtype = jnp.result_type(x)
    return dtype.itemsize == 1 and dtype.name not in ("bool", "int8", "uint8")


def bits_of(x: jax.typing.ArrayLike) -> np.dtype:
    """Returns the dtype of unsigned integers of the same width."""
    dtype = jnp.result_type(x)
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return jnp.dtype(f"uint{info(dtype).bits}")


def describe(state: Sequence[Any], axes: int) -> list[list[Any]]:
    """Describes the structure of a state.

    Args:
      state: The trees of the state.
      axes: Number of leading worker axes.

    Returns:
      Entries in the order of the tree: `[path, type]` for each node, where the type
      includes static fields; and `[path, dtype, shape]` for each leaf, where the shape
      is without the worker axes.
    """
    entries = []

    def visit(node, path):
        children, structure = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        # Leaves have no node data.
        data: PyTree = structure.node_data()
        if data is None:
            entries.append(
                [path, str(jnp.result_type(node)), list(jnp.shape(node)[axes:])]
            )
            return
        kind, static = data
        # The keys of dictionaries are already in the paths.
        if kind is dict or static is None:
            text = kind.__qualname__
        elif isinstance(static, kind):
            text = json.dumps(_static(static))
        else:
            text = f"{kind.__qualname__}{json.dumps(_static(static))}"
        entries.append([path, text])
        for key, child in children:
            visit(child, path + jax.tree_util.keystr(key))

    for i, tree in enumerate(state):
        visit(tree, f"state[{i}]")
    return entries


def to_json(value: object) -> PyTree:
    """Converts NumPy arrays and scalars for `json.dumps`."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"got {value!r} of type {type(value).__name__}")


def _static(value: object) -> PyTree:
    """Converts a static field to JSON, such that it is equal in other processes.

    Of values that JSON cannot represent, such as functions, only the type remains.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Mapping):
        return {str(key): _static(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_static(x) for x in value]
    name = type(value).__qualname__
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        return {name: {field: _static(getattr(value, field)) for field in fields}}
    return name


def check_same(
    step: int, saved: list[list[Any]], own: list[list[Any]], renewed: set[int]
) -> None:
    """Checks that a checkpoint matches the state to restore.

    Args:
      step: Step of the checkpoint, for messages.
      saved: Description of the saved state.
      own: Description of the state to restore.
      renewed: Numbers of leaves whose shapes may differ.

    Raises:
      ValueError: If the descriptions differ. The message names the first differences.
    """
    # Compare the paths first, then types, dtypes, and shapes.
    theirs, ours = ({path: rest for path, *rest in x} for x in (saved, own))
    if list(theirs) != list(ours):
        differ = theirs.keys() ^ ours.keys()
        first = [path for path in [*theirs, *ours] if path in differ] or ["its order"]
        more = f" and {len(first) - 3} more" if len(first) > 3 else ""
        raise ValueError(
            f"the checkpoint of step {step} has another model or optimizer: only one "
            f"of them has {', '.join(first[:3])}{more}. Pass the same trees as "
            "in save, of the same algorithm; use another folder for a new run."
        )
    number = 0
    for path, expected in ours.items():
        got, is_leaf = theirs[path], len(expected) == 2
        if got != expected and not (
            is_leaf and number in renewed and got[:1] == expected[:1]
        ):
            # Show long descriptions, such as that of an nnx.GraphDef, from 60
            # characters before the first difference.
            pairs = itertools.zip_longest(got[0], expected[0])
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            start = len(list(same)) - 60
            raise ValueError(
                f"the checkpoint of step {step} has another model or optimizer: at "
                f"{path} it has {_words(got, start)}, expected "
                f"{_words(expected, start)}."
            )
        number += is_leaf


def check_constants(step: int, saved: PyTree, own: PyTree) -> None:
    """Checks the numbers of an optimizer that its state keeps.

    A state class lists them in `constants`, by the names of its fields.

    Args:
      step: The step of the checkpoint, for messages.
      saved: The restored state.
      own: The state of the optimizer that continues.
    """

    def nodes(tree):
        pairs, _ = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda node: hasattr(type(node), "constants")
        )
        return [pair for pair in pairs if hasattr(type(pair[1]), "constants")]

    for (path, theirs), (_, ours) in zip(nodes(saved), nodes(own), strict=True):
        for name in ours.constants:
            before, now = (
                [_first(x) for x in jax.tree.leaves(getattr(state, name))]
                for state in (theirs, ours)
            )
            if None not in now and before != now:
                raise ValueError(
                    f"the checkpoint of step {step} has another model or optimizer: "
                    f"at {jax.tree_util.keystr(path)}.{name} it has {before[0]:.6g}, "
                    f"expected {now[0]:.6g}."
                )


def _first(x: PyTree) -> float | None:
    """Returns the number that all workers share; None if an array has no values."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    x = x.addressable_data(0) if isinstance(x, jax.Array) else x
    return float(np.ravel(x)[0])


def _words(entry: list[Any], start: int) -> str:
    """Returns an entry of a description in words, without its path.

    Args:
      entry: `[type]` of a node, or `[dtype, shape]` of a leaf.
      start: Position in the type from which to show it.
    """
    if len(entry) == 1:
        return entry[0][max(start, 0) :][:120]
    return f"shape {tuple(entry[1])} and dtype {entry[0]} per worker"


def start_anew(
    workers: Workers,
    leaves: list[jax.Array],
    parts: Parts,
    sizes: dict[str, int],
    description: list[list[Any]],
) -> list[jax.Array]:
    """Converts the leaves of a state to another number of workers.

    Args:
      workers: The new workers.
      leaves: All leaves, with the worker axes of the old workers.
      parts: The parameters and optimizer states among the leaves.
      sizes: Sizes of the old worker axes.
      description: Description of the state, for messages.

    Returns:
      All leaves, with the worker axes of the new workers.

    Raises:
      ValueError: If integer leaves differ between the old workers, or the parameters
        are not the whole tree that the optimizer evaluates.
    """
    # Sort the leaves: parameters and optimizer states, other floating-point leaves, and
    # the rest (integers and PRNG keys).
    names = tuple(sizes)
    params, opt_state = jax.tree.map(
        leaves.__getitem__, (parts.params, parts.opt_state)
    )
    renewed = set(jax.tree.leaves((parts.params, parts.opt_state)))
    others = [i for i in range(len(leaves)) if i not in renewed]
    floating = [i for i in others if jnp.issubdtype(leaves[i].dtype, jnp.inexact)]

    # The evaluated model and the means of the other floating-point leaves, computed
    # over the old workers. All old workers have the same results: take the first.
    def worker(params, opt_state, others):
        model = eval_params(opt_state, params, names)
        return model, average(others, names) if others else others

    for name in reversed(names):
        worker = jax.vmap(worker, axis_name=name)
    first = (0,) * len(names)
    model, means = jax.tree.map(
        lambda x: x[first],
        jax.jit(worker)(params, opt_state, [leaves[i] for i in floating]),
    )
    if jax.tree.structure(model) != jax.tree.structure(params):
        raise ValueError(
            "the evaluated model is only part of params: pass the parameters as "
            '{"params": ..., ...}, or pass the other leaves as another tree.'
        )
    # Give all new workers the model, fresh optimizer states, and the means.
    model = workers.replicate(model)
    fresh = workers.spmd(parts.init)(model)
    new = dict(zip(floating, workers.replicate(means), strict=True))
    for trees in ((parts.params, model), (parts.opt_state, fresh)):
        new |= zip(*map(jax.tree.leaves, trees), strict=True)
    paths = [entry[0] for entry in description if len(entry) == 3]
    for i in others:
        if i in new:
            continue
        new[i] = _carry(workers, leaves[i], len(names), paths[i])
    return [new[i] for i in range(len(leaves))]


def _carry(workers: Workers, x: jax.Array, axes: int, path: str) -> jax.Array:
    """Converts a leaf of integers or PRNG keys to another number of workers.

    Args:
      workers: The new workers.
      x: The leaf, with the worker axes of the old workers.
      axes: Number of the old worker axes.
      path: Path of the leaf, for messages.

    Returns:
      The leaf, with the worker axes of the new workers.

    Raises:
      ValueError: If integers differ between the old workers.
    """
    # Copy values that are equal on all old workers.
    values = np.asarray(writable(x))
    first = x[(0,) * axes]
    if (values == values[(0,) * axes]).all():
        return workers.replicate(first)
    if not is_key(x):
        raise ValueError(
            f"the workers of the checkpoint have different integers at {path}, "
            "which another number of workers cannot share: keep only integers that "
            "are equal on all workers, floating-point arrays, and typed "
            "jax.random.key keys."
        )

    # Derive a different key for each new worker from the key of the first old worker.
    def derive():
        keys = jax.random.wrap_key_data(
            jnp.asarray(values[(0,) * axes]), impl=jax.random.key_impl(x)
        )
        new = jax.vmap(
            lambda i: jax.vmap(
                lambda key: jax.random.fold_in(jax.random.fold_in(key, SALT), i)
            )(keys.reshape(-1))
        )(jnp.arange(workers.num_workers))
        return new.reshape(workers.shape + keys.shape)

    return jax.jit(derive, out_shardings=workers.sharding)()
