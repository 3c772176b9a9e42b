"""Checkpoints of whole runs: all workers' state, and where each is in its data.

Orbax saves and restores; what is added here is that a run may go on with its workers
folded otherwise, or with more or fewer of them, and that a checkpoint counts only if
every byte of it is as it was written.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from decentral_jax.evaluation import eval_params
from decentral_jax.workers import Workers

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    params: Any
    opt_state: Any
    data: Any  # as it was passed to `save`
    reset: bool  # whether the number of workers differs, and all started anew


class Checkpoints:
    """Saves and restores the training state of workers, in a folder of its own.

    A checkpoint is written in the background and gets its name when it is complete;
    with it goes a digest of each of its files. A process may be killed at any moment.

    Args:
      folder: Where to; made if it does not exist. All processes must see the same.
      workers: The workers whose state it is.
      keep: How many checkpoints to keep, the latest ones.

    Raises:
      ImportError: Without Orbax: `pip install decentral_jax[checkpoint]`.

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

    def __init__(self, folder: str | os.PathLike, workers: Workers, keep: int = 3):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoints need Orbax: pip install decentral_jax[checkpoint]."
            ) from error
        self._ocp: Any = ocp
        self._folder = Path(folder).absolute()
        self._workers = workers
        self._manager: Any = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )
        self._sealing: threading.Thread | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, params: Any, opt_state: Any, data: Any = None) -> None:
        """Saves in the background; the arrays may be donated as soon as it returns.

        Args:
          step: The number of steps done.
          params: All workers' parameters, with leading worker axes. With whatever else
            is to be kept beside the optimizer's state, such as BatchNorm's statistics.
          opt_state: All workers' optimizer states.
          data: The position in the data and such, the same in all processes, which
            JSON can hold: an epoch, the state of NumPy's generators.
        """
        self.wait()
        leaves, names = _leaves(params, opt_state)
        leaves = [_plain(x) for x in leaves]
        notes = {
            "workers": self._workers.sizes,
            "leaves": [
                [name, list(jnp.shape(x)), str(jnp.result_type(x))]
                for name, x in zip(names, leaves, strict=True)
            ],
            "data": data,
        }
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave({str(i): x for i, x in enumerate(leaves)}),
                notes=args.JsonSave(notes),
            ),
        )
        self._sealing = threading.Thread(target=self._seal, args=(step,))
        self._sealing.start()

    def restore(
        self,
        params: Any,
        opt_state: Any,
        init: Callable[[Any], Any] | None = None,
    ) -> Restored | None:
        """The latest checkpoint that is whole.

        Args:
          params: Parameters as at the start, for structure, shapes and dtypes.
          opt_state: Optimizer states as at the start.
          init: The optimizer's `init`, for checkpoints of another number of workers:
            all then start from the evaluated model, with fresh states. What residuals,
            trackers and momenta knew is lost, as a warning says.

        Returns:
          What it held, on the devices of these workers; None if there is none.

        Raises:
          ValueError: If the checkpoint is of another model or optimizer, or of another
            number of workers and there is no `init`.
        """
        self.wait()
        step = self._latest()
        if step is None:
            return None
        args = self._ocp.args
        notes = self._manager.restore(
            step, args=args.Composite(notes=args.JsonRestore())
        )["notes"]
        sizes, saved = notes["workers"], notes["leaves"]
        reset = sizes != self._workers.sizes
        if reset and init is None:
            raise ValueError(
                f"the checkpoint of step {step} is of workers {sizes}, these are "
                f"{self._workers.sizes}: pass init=tx.init to start them all from its "
                "evaluated model, with fresh optimizer states."
            )
        leaves, names = _leaves(params, opt_state)
        plain = [jax.eval_shape(_plain, x) for x in leaves]
        _check(step, saved, plain, names, reset)
        # Of other workers, whole in each process.
        place = self._workers.everywhere if reset else self._workers.sharding
        abstract = {
            str(i): jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
            for i, (_, shape, dtype) in enumerate(saved)
        }
        state = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(abstract))
        )["state"]
        structure = jax.tree.structure((params, opt_state))
        found = [_as_before(state[str(i)], x) for i, x in enumerate(leaves)]
        params, opt_state = structure.unflatten(found)
        if reset:
            assert init is not None
            logger.warning(
                "the checkpoint of step %d is of workers %s, these are %s: all start "
                "from its evaluated model, optimizer states are fresh",
                *(step, sizes, self._workers.sizes),
            )
            params = self._workers.replicate(_evaluated(params, opt_state, sizes))
            opt_state = self._workers.spmd(init)(params)
        return Restored(step, params, opt_state, notes["data"], reset)

    def wait(self) -> None:
        """Waits until what is being saved is on disk."""
        if self._sealing is not None:
            self._sealing.join()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self.wait()
        self._manager.close()

    def _seal(self, step: int) -> None:
        """Writes the digests of a checkpoint when it is complete."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            folder = self._folder / str(step)
            digests = {
                str(file.relative_to(folder)): _digest(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            partial = folder / f"{DIGESTS}.partial"
            partial.write_text(json.dumps(digests))
            partial.rename(folder / DIGESTS)

    def _latest(self) -> int | None:
        """The latest step whose checkpoint is whole; later ones are removed."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        found = -1
        if jax.process_index() == 0:
            for step in steps:
                problem = _problem(self._folder / str(step))
                if problem is None:
                    found = step
                    break
                logger.warning(
                    "the checkpoint of step %d is torn and is removed: %s; the one "
                    "before is used",
                    *(step, problem),
                )
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        for step in steps:
            if step > found:
                self._manager.delete(step)
        return None if found < 0 else found


def _leaves(params: Any, opt_state: Any) -> tuple[list, list[str]]:
    """All leaves, and what they are called."""
    tree = {"params": params, "opt_state": opt_state}
    flat = [
        (jax.tree_util.keystr(path), x)
        for name in ("params", "opt_state")
        for path, x in jax.tree_util.tree_flatten_with_path({name: tree[name]})[0]
    ]
    return [x for _, x in flat], [name for name, _ in flat]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    """Random keys as the numbers they are made of, which can be written."""
    return jax.random.key_data(x) if _is_key(x) else x


def _as_before(x: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_plain`."""
    if not _is_key(like):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))


def _check(step: int, saved: list, leaves: list, names: list[str], reset: bool) -> None:
    """Checks that a checkpoint's leaves are those of the trees to be restored."""
    theirs = [name for name, _, _ in saved]
    if theirs != names:
        differ = sorted(set(theirs) ^ set(names)) or ["their order"]
        raise ValueError(
            f"the checkpoint of step {step} is of another model or optimizer: only one "
            f"of both has {', '.join(differ)}."
        )
    for (name, shape, dtype), x in zip(saved, leaves, strict=True):
        own = [list(jnp.shape(x)), str(jnp.result_type(x))]
        # Of other workers, shapes of states may differ, and all but parameters is new.
        if not reset and own != [shape, dtype]:
            raise ValueError(
                f"the checkpoint of step {step} has {name} of shape {tuple(shape)} and "
                f"dtype {dtype}, expected {tuple(own[0])} and {own[1]}: it is of "
                "another model or optimizer."
            )


def _evaluated(params: Any, opt_state: Any, sizes: dict[str, int]) -> Any:
    """The model to evaluate of so many workers, whose trees are whole here."""
    names = tuple(sizes)

    def worker(params, opt_state):
        return eval_params(opt_state, params, names)

    for name in reversed(names):
        worker = jax.vmap(worker, axis_name=name)
    models = jax.jit(worker)(params, opt_state)
    return jax.tree.map(lambda x: x[(0,) * len(names)], models)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return f"{DIGESTS} is damaged"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != digest:
            return f"{name} is damaged"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
