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

import json
import logging
import operator
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from decentral_jax._checkpoint_files import (
    DIGESTS,
    FORMAT,
    NOTES,
    STATE,
    Damage,
    attempts,
    delete,
    digest_of,
    rank,
    verified,
)
from decentral_jax._checkpoint_state import (
    as_before,
    check_constants,
    check_same,
    describe,
    find_parts,
    get,
    start_anew,
    to_json,
    writable,
)
from decentral_jax._exchange.numbers import PyTree
from decentral_jax._validation import check_int, check_leading_axes
from decentral_jax.workers import Workers

__all__ = ["Checkpoints", "Restored"]

logger = logging.getLogger(__name__)


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
    state: PyTree
    data: PyTree
    reset: bool

    @property
    def params(self) -> PyTree:
        """The `params` of a train state, or else the first of several trees."""
        return _part(self.state, "params", 0)

    @property
    def opt_state(self) -> PyTree:
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
                f"folder must be a directory, but {self._folder} is a file: pass "
                "another path."
            )
        self._keep = None if keep is None else check_int("keep", keep, minimum=1)
        self._workers = workers
        # Orbax's CheckpointManager would also count, and delete, unrelated folders.
        self._orbax: PyTree = ocp.StandardCheckpointer()
        # Identifies this run in the notes of its checkpoints. `restore` takes over the
        # identity of the run that it continues.
        self._run = uuid.uuid4().hex
        self._damaged: set[str] = set()  # names of folders
        # The background thread that completes the latest checkpoint, and its error.
        self._sealing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            # Do not hide an exception from inside the block.
            if kind is None:
                raise
            logger.exception("the last checkpoint was not saved")

    def save(self, step: int, *state: PyTree, data: PyTree = None) -> None:
        """Saves in the background. The arrays may be donated after this call returns.

        Saving a step again replaces its checkpoint after the new one is complete.

        Args:
          step: Number of completed steps.
          *state: The state of all workers, with leading worker axes: parameters and
            optimizer states; or one train state with `params`, `opt_state` and `tx`; or
            an nnx model and its optimizer, whole or as `nnx.split` returns them. Batch
            statistics, step counters and PRNG keys may be part of it, or be passed as
            further trees.
          data: Other values to save, equal in all processes, such as the epoch or the
            state of a NumPy generator. They must be serializable as JSON. NumPy arrays
            and scalars are restored as lists and numbers.

        Raises:
          TypeError: If `step` is not an integer, any leaf is not an array, or `data` is
            not serializable as JSON.
          ValueError: If the folder holds a complete checkpoint of a later step, which
            `restore` would prefer, or any leaf lacks the leading worker axes.
          RuntimeError: If the previous save failed in the background.
        """
        # Only one save runs at a time.
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
            data = json.loads(json.dumps(data, default=to_json))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"data must hold JSON values or NumPy arrays: {error}. Convert "
                "other values to lists, numbers, and strings."
            ) from error
        # The notes describe the checkpoint for `restore`.
        notes = {
            "format": FORMAT,
            "step": step,
            "workers": self._workers.sizes,
            "state": describe(state, len(self._workers.shape)),
            "data": data,
        }
        folder = self._folder / self._on_first(self._claim, step, notes)
        arrays = {str(i): writable(x) for i, x in enumerate(jax.tree.leaves(state))}
        # Orbax refuses arrays without entries, and trees without arrays.
        arrays = {i: x for i, x in arrays.items() if x.size}
        if arrays:
            # Returns after copying the arrays, and writes them in the background.
            self._orbax.save(folder / STATE, arrays)
        self._sealing = threading.Thread(target=self._seal, args=(folder,))
        self._sealing.start()

    def restore(
        self, *like: PyTree, init: Callable[[Any], Any] | None = None
    ) -> Restored | None:
        """Restores the latest complete checkpoint without changing the folder.

        Skips damaged and unfinished checkpoints with a warning.

        If the number of workers has changed, all workers start from the evaluated model
        (`dj.eval_params`) with fresh optimizer states. The contents of residuals,
        trackers, and momenta are lost, as a warning says. Other floating-point leaves
        are averaged over the old workers. Integer leaves are copied and must be equal
        on all old workers. PRNG keys are copied if they were equal on all old workers;
        otherwise, each worker derives a new key.

        Args:
          *like: The same trees that were passed to `save`, with initial values. They
            determine the structure, shapes, and dtypes.
          init: The optimizer's `init`, for checkpoints of another number of workers. It
            is called with one worker's parameters: `params`, or `params["params"]` if
            `params` also holds other variables. Not necessary for a train state or nnx
            optimizer, which holds its `tx`.

        Returns:
          The restored state, on the devices of these workers. None if the folder holds
          no complete checkpoint.

        Raises:
          TypeError: If any leaf is not an array.
          ValueError: If the checkpoint belongs to another model or optimizer; or if the
            number of workers has changed and `init` is missing.
        """
        self.wait()
        if not like:
            raise TypeError("restore needs a state: call restore(params, opt_state).")
        check_leading_axes("like", like, self._workers.shape)
        # Process 0 chooses the checkpoint for all processes.
        found = self._on_first(self._latest)
        if found is None:
            return None
        name, notes = found
        step, sizes = notes["step"], notes["workers"]
        reset = sizes != self._workers.sizes
        own = describe(like, len(self._workers.shape))
        # If the number of workers has changed, find the parameters and optimizer states
        # among the numbered leaves.
        leaves, structure = jax.tree.flatten(like)
        numbered = structure.unflatten(range(len(leaves)))
        parts = None
        if reset:
            parts = find_parts(numbered, like, init, len(self._workers.shape))
            if parts is None:
                raise ValueError(
                    f"the checkpoint of step {step} has workers {sizes}, but this run "
                    f"has {self._workers.sizes}: pass init=tx.init to start all "
                    "workers from its evaluated model with fresh optimizer states. The "
                    "state must be params and opt_state; or a train state with params, "
                    "opt_state, and tx; or an nnx model and its optimizer, whole or as "
                    "*nnx.split((model, optimizer))."
                )
        # Fresh optimizer states may have other shapes than the saved ones.
        renewed = set() if parts is None else set(jax.tree.leaves(parts.opt_state))
        check_same(step, notes["state"], own, renewed)
        shapes = [entry[2] for entry in notes["state"] if len(entry) == 3]
        # Every process reads the state of other workers in full.
        place = self._workers.replicated if reset else self._workers.sharding
        leaves = self._read(self._folder / name, leaves, shapes, sizes, place)
        if parts is not None:
            logger.warning(
                "the checkpoint of step %d has workers %s, but this run has %s: all "
                "workers start from its evaluated model with fresh optimizer states",
                step,
                sizes,
                self._workers.sizes,
            )
            leaves = start_anew(self._workers, leaves, parts, sizes, own)
        state = structure.unflatten(leaves)
        if parts is None:
            check_constants(step, state, like)
        # From now on, this object continues the run of the checkpoint.
        self._run = notes["run"]
        return Restored(
            step, state[0] if len(like) == 1 else state, notes["data"], reset
        )

    def wait(self) -> None:
        """Waits until the checkpoint being saved is complete.

        Raises:
          RuntimeError: If the checkpoint could not be saved.
        """
        if self._sealing is not None:
            self._sealing.join()
        self._sealing = None
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(
                f"the last checkpoint in {self._folder} was not saved: {error!r}. "
                "Earlier checkpoints are kept; free space or repair the folder, and "
                "save again."
            ) from error

    def close(self) -> None:
        """Waits for the checkpoint being saved, and ends the background threads.

        Raises:
          RuntimeError: If the checkpoint could not be saved.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _on_first(self, fn: Callable[..., Any], *args: Any) -> PyTree:
        """Runs `fn` in process 0, and returns its result in all processes.

        If `fn` raises an error, all processes raise it.
        """
        if jax.process_count() == 1:
            return fn(*args)
        # Process 0 sends the result and the error message as JSON: first the size, then
        # the bytes.
        result, error, answer = None, None, b""
        if jax.process_index() == 0:
            try:
                result = fn(*args)
            except Exception as caught:
                error = caught
            message = None if error is None else str(error)
            answer = json.dumps([result, message]).encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
        content = np.zeros(size, np.uint8)
        content[: len(answer)] = np.frombuffer(answer, np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
        if error is not None:
            raise error
        result, message = json.loads(content.astype(np.uint8).tobytes())
        if message is not None:
            raise ValueError(f"process 0: {message}")
        return result

    def _claim(self, step: int, notes: dict[str, Any]) -> str:
        """Creates a new folder for a checkpoint, after all others of its step.

        Args:
          step: The step.
          notes: The notes, written to the folder together with the identity of the run.

        Returns:
          The name of the folder.

        Raises:
          ValueError: If the folder holds a complete checkpoint of a later step.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # Find the next free attempt, and refuse to save before a later step.
        attempt = 0
        for order, folder in attempts(self._folder):
            if order[0] == step:
                attempt = order[1] + 1
            later = order[0] > step and folder.name not in self._damaged
            # `restore` prefers only complete checkpoints.
            if later and self._whole(folder) is not None:
                raise ValueError(
                    f"{self._folder} holds a checkpoint of step {order[0]}, which "
                    f"restore prefers over step {step}: restore it before you "
                    "continue, pass another folder to start a new run, or remove it."
                )
        while True:
            folder = self._folder / (f"{step}.{attempt}" if attempt else str(step))
            try:
                folder.mkdir()
                break
            except FileExistsError:  # Another program has just created it.
                attempt += 1
        (folder / NOTES).write_text(json.dumps({**notes, "run": self._run}))
        return folder.name

    def _seal(self, folder: Path) -> None:
        """Completes a checkpoint, and deletes the checkpoints that it supersedes.

        The background thread runs this function.
        """
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                # All files must be on disk before the digests.
                digests = {
                    str(file.relative_to(folder)): digest_of(file, sync=True)
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
                # Renaming is atomic: the file of digests appears only when complete.
                partial = folder / f"{DIGESTS}.partial"
                with partial.open("w") as file:
                    json.dump(digests, file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(folder / DIGESTS)
                self._delete_superseded(folder)
        except BaseException as error:
            # `wait` raises it in the main thread.
            self._error = error

    def _delete_superseded(self, sealed: Path) -> None:
        """Deletes this run's checkpoints before `sealed`, except the latest ones.

        Args:
          sealed: Folder of the checkpoint just completed, which counts toward `keep`.
        """
        # Earlier checkpoints of this run, in order.
        before = []
        for _, folder in attempts(self._folder):
            if folder == sealed:
                break
            try:
                if json.loads((folder / NOTES).read_text())["run"] == self._run:
                    before.append(folder)
            except (OSError, ValueError, TypeError, LookupError):
                continue  # Not a checkpoint of this library.
        # From the latest to the earliest, keep one complete checkpoint per step until
        # there are `keep` of them, and delete all others.
        kept = {rank(sealed)[0]}
        for folder in reversed(before):
            step = rank(folder)[0]
            complete = (folder / DIGESTS).is_file()
            if not complete or folder.name in self._damaged or step in kept:
                delete(folder)
            elif self._keep is None or len(kept) < self._keep:
                kept.add(step)
            else:
                delete(folder)

    def _latest(self) -> tuple[str, dict[str, Any]] | None:
        """Returns the name and the notes of the latest complete checkpoint, if any."""
        for _, folder in reversed(attempts(self._folder)):
            notes = self._whole(folder)
            if notes is not None:
                return folder.name, notes
        return None

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """Returns the notes of a checkpoint, or None if it is not complete.

        Warns if the checkpoint is not complete.
        """
        try:
            self._damaged.discard(folder.name)
            return verified(folder)
        except (OSError, Damage) as problem:
            self._damaged.add(folder.name)
            logger.warning("the checkpoint %s is skipped: %s", folder, problem)
            return None

    def _read(
        self,
        folder: Path,
        like: list[jax.typing.ArrayLike],
        shapes: list[list[int]],
        sizes: dict[str, int],
        place: jax.sharding.Sharding,
    ) -> list[jax.Array]:
        """Reads all leaves of a checkpoint.

        Args:
          folder: Folder of the checkpoint.
          like: Leaves with the dtypes of the saved leaves.
          shapes: Shapes of the saved leaves, without the worker axes.
          sizes: Sizes of the saved worker axes.
          place: Sharding of the arrays to return.

        Returns:
          The leaves, with the saved worker axes.
        """
        axes = tuple(sizes.values())
        # The types of the arrays in the file: keys and small dtypes are stored as
        # unsigned integers.
        plain = [
            jax.eval_shape(
                writable, jax.ShapeDtypeStruct((*axes, *shape), jnp.result_type(x))
            )
            for x, shape in zip(like, shapes, strict=True)
        ]
        abstract = {
            str(i): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for i, x in enumerate(plain)
            if x.size
        }
        arrays = self._orbax.restore(folder / STATE, abstract) if abstract else {}
        # Create the arrays without entries, which `save` leaves out.
        for i, x in enumerate(plain):
            if not x.size:
                zeros = np.zeros(x.shape, x.dtype)
                arrays[str(i)] = jax.make_array_from_callback(
                    x.shape, place, zeros.__getitem__
                )
        return [as_before(arrays[str(i)], x) for i, x in enumerate(like)]


def _part(state: PyTree, name: str, position: int) -> PyTree:
    """Returns a part of a restored state.

    Args:
      state: The state.
      name: Name of the key or attribute.
      position: Position of the part if the state consists of several trees.

    Raises:
      AttributeError: If the state has no such part.
    """
    part = get(state, name)
    if part is None and type(state) is tuple and len(state) > position:
        part = state[position]
    if part is None:
        raise AttributeError(f"the restored state has no {name}: use .state.")
    return part
