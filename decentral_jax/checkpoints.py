"""Checkpoints of whole runs: the state of all workers, and the position in the data.

Orbax writes and reads the arrays. This module adds three guarantees: a checkpoint
counts only if every byte is as it was written, nothing is deleted before its successor
is complete, and a run may resume on other devices or with another number of workers.

A checkpoint is a folder `<step>`, or `<step>.<attempt>` if that step has been saved
before. No save writes into an existing folder. Each folder holds

- `state/`: the arrays, written by Orbax;
- `notes.json`: the run, the workers, the structure of the state, and the user's data;
- `digests.json`: the SHA-256 of each file. It is written last and marks the checkpoint
  as complete.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import operator
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils

from decentral_jax.evaluation import eval_params
from decentral_jax.mixing import average
from decentral_jax.validation import check_int, check_leading_axes
from decentral_jax.workers import Workers, as_before, as_numbers, is_key

logger = logging.getLogger(__name__)

DIGESTS, NOTES, STATE = "digests.json", "notes.json", "state"
FORMAT = 1  # of notes.json
SALT = 0x64656A78  # separates new workers' PRNG keys from keys that a run splits off


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      step: The step passed to `save`.
      state: The restored state. A tuple if several trees were passed to `restore`.
      data: The `data` passed to `save`, as JSON returns it.
      reset: Whether the number of workers has changed, so that all workers restart
        from the evaluated model.
    """

    step: int
    state: Any
    data: Any
    reset: bool

    @property
    def params(self) -> Any:
        """The `params` of a train state, or else the first of several trees."""
        return _part(self.state, "params", 0)

    @property
    def opt_state(self) -> Any:
        """The `opt_state` of a train state, or else the second of several trees."""
        return _part(self.state, "opt_state", 1)


class Checkpoints:
    """Saves and restores the training state of all workers.

    A checkpoint is written in the background. It counts once the digests of all its
    files are written, so a process may be killed at any moment.

    Restoring never deletes or changes anything. Saving deletes superseded checkpoints
    of the same run only, and only after their successor is complete. A run that
    restores a checkpoint continues the run that wrote it. All other files in the folder
    stay as they are.

    Args:
      folder: Path of the folder, created by the first `save`. All processes must see
        the same folder.
      workers: The workers whose state is saved.
      keep: Number of complete checkpoints of this run to keep, the latest ones. None
        keeps all.

    Raises:
      ImportError: If Orbax is missing: `pip install decentral_jax[checkpoint]`.
      NotADirectoryError: If `folder` is a file.
      TypeError: If `keep` is not an integer.
      ValueError: If `keep` is below 1, or `folder` is a URL.

    Example:
      >>> import tempfile, decentral_jax as dj, jax.numpy as jnp, optax
      >>> from decentral_jax.checkpoints import Checkpoints
      >>> workers, tx = dj.Workers(4), optax.sgd(0.1, momentum=0.9)
      >>> params = workers.replicate(jnp.zeros(3))
      >>> opt_state = workers.spmd(tx.init)(params)
      >>> with Checkpoints(tempfile.mkdtemp(), workers) as checkpoints:
      ...     checkpoints.save(100, params, opt_state, data={"epoch": 2})
      ...     found = checkpoints.restore(params, opt_state)
      >>> found.step, found.data, found.reset
      (100, {'epoch': 2}, False)
    """

    def __init__(
        self, folder: str | os.PathLike, workers: Workers, keep: int | None = 3
    ):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoints need Orbax: pip install decentral_jax[checkpoint]."
            ) from error
        if "://" in os.fspath(folder):
            raise ValueError(
                f"folder must be a path, got the URL {str(folder)!r}: mount the store "
                "and pass the path of the mount."
            )
        self._folder = Path(folder).absolute()
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(
                f"folder must be a directory, {self._folder} is a file: pass another "
                "path."
            )
        self._keep = None if keep is None else check_int("keep", keep, minimum=1)
        self._workers = workers
        # Orbax's CheckpointManager would rank, and delete, foreign folders as well.
        self._orbax: Any = ocp.StandardCheckpointer()
        self._run = uuid.uuid4().hex
        self._damaged: set[str] = set()
        self._sealing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self.close()
        except Exception:
            # The error that ends the block is the one to raise.
            if kind is None:
                raise
            logger.exception("the last checkpoint was not saved")

    def save(self, step: int, *state: Any, data: Any = None) -> None:
        """Saves in the background; the arrays may be donated as soon as it returns.

        Saving a step again replaces its checkpoint once the new one is complete.

        Args:
          step: Number of steps done.
          *state: The state of all workers, with leading worker axes: parameters and
            optimizer states; or one train state with `params`, `opt_state` and `tx`; or
            an nnx model and its optimizer, whole or as `nnx.split` returns them. Batch
            statistics, step counters and PRNG keys may be part of it, or be passed as
            further trees.
          data: The position in the data and such, the same in all processes: an epoch,
            or the state of a NumPy generator. Whatever JSON can hold; NumPy arrays and
            scalars come back as lists and numbers.

        Raises:
          TypeError: If `step` is not an integer, or JSON cannot hold `data`.
          ValueError: If the folder holds a later checkpoint, which `restore` would
            prefer, or a leaf lacks the worker axes.
          RuntimeError: If the save before this one failed in the background.
        """
        self.wait()
        try:
            step = operator.index(step)
        except TypeError:
            raise TypeError(
                f"step must be an integer, got {step!r}: pass an int."
            ) from None
        step = check_int("step", step, minimum=0)
        if not state:
            raise TypeError("save needs a state: call save(step, params, opt_state).")
        check_leading_axes("state", state, self._workers.shape)
        try:
            data = json.loads(json.dumps(data, default=_numpy))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"data must be what JSON can hold, or NumPy arrays: {error}. Convert "
                "the rest to lists, numbers and strings."
            ) from error
        notes = {
            "format": FORMAT,
            "step": step,
            "workers": self._workers.sizes,
            "state": _describe(state, len(self._workers.shape)),
            "data": data,
        }
        folder = self._folder / self._on_first(self._claim, step, notes)
        arrays = {str(i): _plain(x) for i, x in enumerate(jax.tree.leaves(state))}
        # Orbax refuses arrays without entries, and trees without arrays.
        arrays = {i: x for i, x in arrays.items() if x.size}
        if arrays:
            self._orbax.save(folder / STATE, arrays)
        self._sealing = threading.Thread(target=self._seal, args=(folder,))
        self._sealing.start()

    def restore(
        self, *like: Any, init: Callable[[Any], Any] | None = None
    ) -> Restored | None:
        """Restores the latest complete checkpoint; changes nothing in the folder.

        Damaged and unfinished checkpoints are skipped with a warning.

        If the number of workers has changed, parameters start from the evaluated model
        (`dj.eval_params`), optimizer states are fresh, and other floating-point leaves
        are averaged over the old workers. Integer leaves are copied, which requires
        that they are equal on all old workers. PRNG keys are copied if they were equal,
        and derived anew for each worker if not. What residuals, trackers and momenta
        held is lost, as a warning says.

        Args:
          *like: The state as at the start, for structure, shapes and dtypes. The same
            trees that were passed to `save`.
          init: The optimizer's `init`, for checkpoints of another number of workers. A
            train state or nnx optimizer that holds its `tx` needs none. It is called
            with one worker's parameters: `params`, or `params["params"]` where other
            variables lie beside them.

        Returns:
          The restored state, on the devices of these workers. None if the folder holds
          no complete checkpoint.

        Raises:
          ValueError: If the checkpoint belongs to another model or optimizer, or to
            another number of workers and there is no `init`.
        """
        self.wait()
        if not like:
            raise TypeError("restore needs a state: call restore(params, opt_state).")
        check_leading_axes("like", like, self._workers.shape)
        found = self._on_first(self._latest)
        if found is None:
            return None
        name, notes = found
        step, sizes = notes["step"], notes["workers"]
        reset = sizes != self._workers.sizes
        own = _describe(like, len(self._workers.shape))
        leaves, structure = jax.tree.flatten(like)
        numbered = structure.unflatten(range(len(leaves)))
        parts = None
        if reset:
            parts = _parts(numbered, like, init, len(self._workers.shape))
            if parts is None:
                raise ValueError(
                    f"the checkpoint of step {step} is of workers {sizes}, these are "
                    f"{self._workers.sizes}: pass init=tx.init to start them all from "
                    "its evaluated model, with fresh optimizer states. The state must "
                    "be params and opt_state; or a train state with params, opt_state "
                    "and tx; or an nnx model and its optimizer, whole or as "
                    "*nnx.split((model, optimizer))."
                )
        renewed = set() if parts is None else set(jax.tree.leaves(parts.opt_state))
        _check(step, notes["state"], own, renewed)
        shapes = [entry[2] for entry in notes["state"] if len(entry) == 3]
        # Of other workers, whole in each process.
        place = self._workers.everywhere if reset else self._workers.sharding
        leaves = self._read(self._folder / name, leaves, shapes, sizes, place)
        if parts is not None:
            logger.warning(
                "the checkpoint of step %d is of workers %s, these are %s: all start "
                "from its evaluated model, optimizer states are fresh",
                *(step, sizes, self._workers.sizes),
            )
            leaves = self._start_anew(leaves, parts, sizes, own)
        state = structure.unflatten(leaves)
        self._run = notes["run"]
        return Restored(
            step, state[0] if len(like) == 1 else state, notes["data"], reset
        )

    def wait(self) -> None:
        """Waits until the checkpoint being saved is complete.

        Raises:
          RuntimeError: If it could not be saved.
        """
        if self._sealing is not None:
            self._sealing.join()
        self._sealing = None
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(
                f"the last checkpoint in {self._folder} was not saved: {error!r}. "
                "Checkpoints before it are kept; free space or repair the folder, and "
                "save again."
            ) from error

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _on_first(self, fn: Callable, *args: Any) -> Any:
        """Runs `fn` in process 0 and gives its result, or its error, to all."""
        if jax.process_count() == 1:
            return fn(*args)
        result, error, answer = None, None, b""
        if jax.process_index() == 0:
            try:
                result = fn(*args)
            except Exception as caught:
                error = caught
            told = None if error is None else str(error)
            answer = json.dumps([result, told]).encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
        content = np.zeros(size, np.uint8)
        content[: len(answer)] = np.frombuffer(answer, np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
        if error is not None:
            raise error
        result, told = json.loads(content.astype(np.uint8).tobytes())
        if told is not None:
            raise ValueError(f"process 0: {told}")
        return result

    def _claim(self, step: int, notes: dict) -> str:
        """Makes a new folder for a checkpoint, after all others of its step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        attempt = 0
        for order, folder in _attempts(self._folder):
            if order[0] == step:
                attempt = order[1] + 1
            later = order[0] > step and folder.name not in self._damaged
            # Only a complete checkpoint is preferred by `restore`.
            if later and self._whole(folder) is not None:
                raise ValueError(
                    f"{self._folder} holds a checkpoint of step {order[0]}, which "
                    f"restore prefers over step {step}: restore it before you go on, "
                    "pass another folder to start a new run, or remove it."
                )
        while True:
            folder = self._folder / (f"{step}.{attempt}" if attempt else str(step))
            try:
                folder.mkdir()
                break
            except FileExistsError:  # of another process, just now
                attempt += 1
        (folder / NOTES).write_text(json.dumps({**notes, "run": self._run}))
        return folder.name

    def _seal(self, folder: Path) -> None:
        """Completes a checkpoint by its digests, then deletes what it supersedes."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                digests = {
                    str(file.relative_to(folder)): _digest(file, sync=True)
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
                partial = folder / f"{DIGESTS}.partial"
                with partial.open("w") as file:
                    json.dump(digests, file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(folder / DIGESTS)
                self._delete_superseded(folder)
        except BaseException as error:
            self._error = error

    def _delete_superseded(self, sealed: Path) -> None:
        """Deletes this run's checkpoints before `sealed`, except the last `keep`."""
        before = []
        for _, folder in _attempts(self._folder):
            if folder == sealed:
                break
            try:
                if json.loads((folder / NOTES).read_text())["run"] == self._run:
                    before.append(folder)
            except (OSError, ValueError, TypeError, LookupError):
                continue  # not this run's, or not recognizable
        kept = {_order(sealed)[0]}
        for folder in reversed(before):
            step = _order(folder)[0]
            complete = (folder / DIGESTS).is_file()
            if not complete or folder.name in self._damaged or step in kept:
                _delete(folder)
            elif self._keep is None or len(kept) < self._keep:
                kept.add(step)
            else:
                _delete(folder)

    def _latest(self) -> tuple[str, dict] | None:
        """The name and the notes of the latest complete checkpoint."""
        for _, folder in reversed(_attempts(self._folder)):
            notes = self._whole(folder)
            if notes is not None:
                return folder.name, notes
        return None

    def _whole(self, folder: Path) -> dict | None:
        """The notes of a checkpoint; None, with a warning, if it is not complete."""
        try:
            self._damaged.discard(folder.name)
            return _verified(folder)
        except (OSError, _Damage) as problem:
            self._damaged.add(folder.name)
            logger.warning("the checkpoint %s is skipped: %s", folder, problem)
            return None

    def _read(
        self, folder: Path, like: list, shapes: list, sizes: dict, place: Any
    ) -> list[jax.Array]:
        """Reads all leaves of a checkpoint, which have the dtypes of `like`."""
        axes = tuple(sizes.values())
        plain = [
            jax.eval_shape(_plain, jax.ShapeDtypeStruct((*axes, *shape), _dtype(x)))
            for x, shape in zip(like, shapes, strict=True)
        ]
        abstract = {
            str(i): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for i, x in enumerate(plain)
            if x.size
        }
        arrays = self._orbax.restore(folder / STATE, abstract) if abstract else {}
        # Arrays without entries were not saved.
        for i, x in enumerate(plain):
            if not x.size:
                zeros = np.zeros(x.shape, x.dtype)
                arrays[str(i)] = jax.make_array_from_callback(
                    x.shape, place, zeros.__getitem__
                )
        return [_as_before(arrays[str(i)], x) for i, x in enumerate(like)]

    def _start_anew(
        self, leaves: list, parts: "_Parts", sizes: dict, description: list
    ) -> list:
        """All leaves for these workers, from all leaves of the old ones."""
        workers, names = self._workers, tuple(sizes)
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
            new[i] = self._carry(leaves[i], len(names), paths[i])
        return [new[i] for i in range(len(leaves))]

    def _carry(self, x: jax.Array, axes: int, path: str) -> jax.Array:
        """An integer or PRNG key of old workers, for these workers."""
        values = np.asarray(_plain(x))
        first = x[(0,) * axes]
        if (values == values[(0,) * axes]).all():
            return self._workers.replicate(first)
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
            )(jnp.arange(self._workers.num_workers))
            return new.reshape(self._workers.shape + keys.shape)

        return jax.jit(derive, out_shardings=self._workers.sharding)()


class _Damage(Exception):
    """A checkpoint that is unfinished, damaged, or none of ours."""


class _Parts(NamedTuple):
    """Where the parameters and optimizer states are among all leaves, by number."""

    params: Any
    opt_state: Any
    init: Callable


def _parts(numbered: tuple, like: tuple, init: Any, axes: int) -> _Parts | None:
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
        params = _get(numbered[0], "params")
        opt_state = _get(numbered[0], "opt_state")
        if params is None or opt_state is None:
            return None
        init = init or getattr(_get(numbered[0], "tx"), "init", None)
        candidates = [_get(params, "params"), params]
    else:
        params, opt_state = numbered[:2]
        candidates = [_get(params, "params"), params]
    if init is None:
        return None

    # The optimizer's parameters are those from which `init` makes such a state.
    leaves = jax.tree.leaves(like)
    for params in candidates:
        numbers = jax.tree.leaves(params)
        if not numbers or not all(
            jnp.issubdtype(_dtype(leaves[i]), jnp.inexact) for i in numbers
        ):
            continue
        one = jax.tree.map(
            lambda i: jax.ShapeDtypeStruct(
                jnp.shape(leaves[i])[axes:], _dtype(leaves[i])
            ),
            params,
        )
        try:
            fresh = jax.eval_shape(init, one)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # other trees than these
        if jax.tree.structure(fresh) == jax.tree.structure(opt_state):
            return _Parts(params, opt_state, init)
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


def _get(tree: Any, name: str) -> Any:
    """A part of a state by the name of its key or attribute, or None."""
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def _part(state: Any, name: str, position: int) -> Any:
    """A part of a state by its name, or else by its position among several trees."""
    part = _get(state, name)
    if part is None and type(state) is tuple and len(state) > position:
        part = state[position]
    if part is None:
        raise AttributeError(f"the restored state has no {name}: use .state.")
    return part


def _dtype(x: Any) -> Any:
    return jnp.result_type(x)


def _plain(x: Any) -> Any:
    """An array that can be written: PRNG keys as the numbers they are made of.

    Of dtypes of 8 bits or less, TensorStore knows few: their bits are written.
    """
    x = as_numbers(x)
    if _is_packed(x):
        bits = lax.bitcast_convert_type(jnp.asarray(x), _bits(x))
        return bits.astype(jnp.uint8)
    return x if isinstance(x, jax.Array) else np.array(x, _dtype(x))


def _as_before(x: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_plain`."""
    if _is_packed(like):
        return lax.bitcast_convert_type(x.astype(_bits(like)), _dtype(like))
    return as_before(x, like)


def _is_packed(x: Any) -> bool:
    """Whether the dtype is int2, int4, float8 or the like, of any variant."""
    dtype = _dtype(x)
    return dtype.itemsize == 1 and dtype.name not in ("bool", "int8", "uint8")


def _bits(x: Any) -> Any:
    """The unsigned integers that are as wide."""
    dtype = _dtype(x)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    bits = (jnp.iinfo if is_integer else jnp.finfo)(dtype).bits
    return jnp.dtype(f"uint{bits}")


def _describe(state: Any, axes: int) -> list:
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
            entries.append([path, str(_dtype(node)), list(jnp.shape(node)[axes:])])
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


def _numpy(value: Any) -> Any:
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


def _check(step: int, saved: list, own: list, renewed: set[int]) -> None:
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


def _order(folder: Path) -> tuple[int, int]:
    """The step and the attempt that a folder is named after; (-1, 0) if neither."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _attempts(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """All that is named like a checkpoint, the earliest first."""
    if not folder.is_dir():
        return []
    named = [(_order(path), path) for path in folder.iterdir()]
    return sorted(x for x in named if x[0][0] >= 0)


def _verified(folder: Path) -> dict:
    """The notes of a complete checkpoint.

    Raises:
      _Damage: If it is unfinished, damaged, or not a checkpoint of this library.
      OSError: If it cannot be read.
    """
    if not (folder / NOTES).exists():
        raise _Damage(f"{NOTES} is missing, so this library has not written it")
    if not (folder / DIGESTS).exists():
        raise _Damage("it is unfinished")
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except ValueError:
        digests = None
    if not isinstance(digests, dict) or NOTES not in digests:
        raise _Damage(f"{DIGESTS} is damaged")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    for name, digest in digests.items():
        if name not in files:
            raise _Damage(f"{name} is missing")
        if _digest(folder / name) != digest:
            raise _Damage(f"{name} is damaged")
    notes = json.loads((folder / NOTES).read_text())
    if notes["format"] != FORMAT:
        raise _Damage(f"its format is {notes['format']}, this version reads {FORMAT}")
    return notes


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("the superseded checkpoint %s is not deleted: %s", folder, error)


def _digest(file: Path, sync: bool = False) -> str:
    with file.open("rb") as content:
        if sync:
            os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()
