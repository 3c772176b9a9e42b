"""What a training state consists of: described, compared, and carried to new workers.

`dj.Checkpoints` writes the description beside the arrays. It tells a state of another
model or optimizer from this one, and finds the parameters and the optimizer state when
the number of workers changes.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from decentral_jax.evaluation import eval_params
from decentral_jax.mixing import average
from decentral_jax.workers import Workers, is_key, unwrap_keys, wrap_keys

SALT = 0x64656A78  # separates new workers' PRNG keys from keys that a run splits off


class Parts(NamedTuple):
    """Where the parameters and optimizer states are among all leaves, by number."""

    params: Any
    opt_state: Any
    init: Callable


def find_parts(numbered: tuple, like: tuple, init: Any, axes: int) -> Parts | None:
    """Finds parameters and optimizer states; None if they are not recognizable.

    Args:
      numbered: The state, with the numbers of its leaves in place of arrays.
      like: The state.
      init: The optimizer's `init`, or None.
      axes: Number of worker axes.
    """
    candidates = []
    optimizer, model = _nnx(numbered)
    if optimizer is not None and model is not None:
        params = _values(nnx.state(model, optimizer.wrt))
        opt_state = _values(optimizer.opt_state)
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

    # The optimizer's parameters are those from which `init` makes such a state.
    leaves = jax.tree.leaves(like)
    for params in candidates:
        numbers = jax.tree.leaves(params)
        if not numbers or not all(
            jnp.issubdtype(jnp.result_type(leaves[i]), jnp.inexact) for i in numbers
        ):
            continue
        one = jax.tree.map(
            lambda i: jax.ShapeDtypeStruct(
                jnp.shape(leaves[i])[axes:], jnp.result_type(leaves[i])
            ),
            params,
        )
        try:
            fresh = jax.eval_shape(init, one)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # other trees than these
        if jax.tree.structure(fresh) == jax.tree.structure(opt_state):
            return Parts(params, opt_state, init)
    raise ValueError(
        "init does not make optimizer states like those given from the parameters: "
        "pass init=tx.init, and what lies beside the parameters (step counters, PRNG "
        'keys, batch statistics) as {"params": params, ...} or as further trees: '
        "restore(params, opt_state, others)."
    )


def _nnx(state: tuple) -> tuple[Any, Any]:
    """An nnx optimizer in the state and its model, or None."""
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


def _values(tree: Any) -> Any:
    """The same tree with the value of each `nnx.Variable` in place of it."""

    def is_variable(x):
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x,
        tree,
        is_leaf=is_variable,
    )


def get(tree: Any, name: str) -> Any:
    """A part of a state by the name of its key or attribute, or None."""
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def writable(x: Any) -> Any:
    """An array that can be written: PRNG keys as the numbers they are made of.

    TensorStore knows only some dtypes of 8 bits or less: their bits are written.
    """
    x = unwrap_keys(x)
    if is_packed(x):
        return lax.bitcast_convert_type(jnp.asarray(x), bits_of(x)).astype(jnp.uint8)
    return x if isinstance(x, jax.Array) else np.array(x, jnp.result_type(x))


def as_before(x: jax.Array, like: Any) -> jax.Array:
    """The inverse of `writable`."""
    if is_packed(like):
        return lax.bitcast_convert_type(x.astype(bits_of(like)), jnp.result_type(like))
    return wrap_keys(x, like)


def is_packed(x: Any) -> bool:
    """Whether the dtype is int4, float8 or the like, of any variant."""
    dtype = jnp.result_type(x)
    return dtype.itemsize == 1 and dtype.name not in ("bool", "int8", "uint8")


def bits_of(x: Any) -> Any:
    """The dtype of unsigned integers that are as wide."""
    dtype = jnp.result_type(x)
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return jnp.dtype(f"uint{info(dtype).bits}")


def describe(state: Any, axes: int) -> list:
    """Names what a state is made of.

    Returns:
      In the order of the tree, `[path, type]` of each node, with its static fields;
      and `[path, dtype, shape]` of each leaf, without the worker axes.
    """
    entries = []

    def visit(node, path):
        children, structure = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        data: Any = structure.node_data()
        if data is None:
            entries.append(
                [path, str(jnp.result_type(node)), list(jnp.shape(node)[axes:])]
            )
            return
        kind, static = data
        # A dictionary's keys are in the paths.
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


def to_json(value: Any) -> Any:
    """Converts what JSON does not know: NumPy arrays and numbers."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"got {value!r} of type {type(value).__name__}")


def _static(value: Any) -> Any:
    """What JSON can hold of a static field, and is the same in another process."""
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


def check_same(step: int, saved: list, own: list, renewed: set[int]) -> None:
    """Checks that a checkpoint is of the state to be restored.

    Args:
      step: The step of the checkpoint, for messages.
      saved: The description of its state.
      own: The description of the state to be restored.
      renewed: Numbers of leaves whose shapes may differ.
    """
    theirs, ours = ({path: rest for path, *rest in x} for x in (saved, own))
    if list(theirs) != list(ours):
        differ = theirs.keys() ^ ours.keys()
        first = [path for path in [*theirs, *ours] if path in differ] or ["its order"]
        more = f" and {len(first) - 3} more" if len(first) > 3 else ""
        raise ValueError(
            f"the checkpoint of step {step} is of another model or optimizer: only one "
            f"of both has {', '.join(first[:3])}{more}."
        )
    number = 0
    for path, expected in ours.items():
        got, is_leaf = theirs[path], len(expected) == 2
        if got != expected and not (
            is_leaf and number in renewed and got[:1] == expected[:1]
        ):
            # Long ones, such as an nnx.GraphDef, from shortly before they differ.
            pairs = itertools.zip_longest(got[0], expected[0])
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            start = len(list(same)) - 60
            raise ValueError(
                f"the checkpoint of step {step} is of another model or optimizer: at "
                f"{path} it has {_words(got, start)}, expected "
                f"{_words(expected, start)}."
            )
        number += is_leaf


def _words(entry: list, start: int) -> str:
    if len(entry) == 1:
        return entry[0][max(start, 0) :][:120]
    return f"shape {tuple(entry[1])} and dtype {entry[0]} per worker"


def start_anew(
    workers: Workers, leaves: list, parts: Parts, sizes: dict, description: list
) -> list:
    """All leaves for `workers`, from all leaves of the old ones."""
    names = tuple(sizes)
    params, opt_state = jax.tree.map(
        leaves.__getitem__, (parts.params, parts.opt_state)
    )
    renewed = set(jax.tree.leaves((parts.params, parts.opt_state)))
    others = [i for i in range(len(leaves)) if i not in renewed]
    floating = [i for i in others if jnp.issubdtype(leaves[i].dtype, jnp.inexact)]

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
            '{"params": ..., ...}, or what lies beside them as another tree.'
        )
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
    """An integer or PRNG key of old workers, for these workers."""
    values = np.asarray(writable(x))
    first = x[(0,) * axes]
    if (values == values[(0,) * axes]).all():
        return workers.replicate(first)
    if not is_key(x):
        raise ValueError(
            f"the workers of the checkpoint have different integers at {path}, "
            "which another number of workers cannot share: keep only what is equal "
            "on all workers, floating-point arrays, and typed jax.random.key keys."
        )

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
