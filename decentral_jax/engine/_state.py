"""State of a run: what its checkpoints hold, and what a resumed run starts from."""

import dataclasses
import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decentral_jax.checkpoints import Checkpoints
from decentral_jax.engine._programs import Device, Model
from decentral_jax.workers import Workers

logger = logging.getLogger(__name__)


class Applied(NamedTuple):
    """Record of an applied gradient."""

    worker: int
    staleness: int
    batch_index: int  # index of the batch on its worker


@dataclasses.dataclass
class State:
    """State of the master between two steps."""

    model: Model
    opt_state: optax.OptState
    next_batches: list[int]  # per worker: number of batches not to draw again
    applied: list[Applied] = dataclasses.field(default_factory=list)
    # One NumPy array per applied gradient and metric.
    metrics: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    refused: int = 0  # number of non-finite gradients
    replaced: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # duration of training up to the last checkpoint
    master_seconds: float = 0.0  # part of it in which the master applied gradients


class Saver:
    """Saves and restores the state of a run with `Checkpoints`.

    Args:
      folder: Folder of the checkpoints.
      device: Device of the master.
      synchronous: Whether the run is synchronous.

    Raises:
      ImportError: If Orbax is not installed.
      NotADirectoryError: If `folder` is a file.
      ValueError: If `folder` is a URL.
    """

    def __init__(self, folder: str | os.PathLike, device: Device, synchronous: bool):
        # The master's state is that of one worker.
        try:
            self._checkpoints = Checkpoints(folder, Workers(1, devices=[device]))
        except (NotADirectoryError, ValueError) as error:
            raise type(error)(f"checkpoints must be a folder: {error}") from error
        self._folder = str(folder)
        self._device = device
        self._synchronous = synchronous

    def __enter__(self) -> "Saver":
        self._checkpoints.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpoints.__exit__(*error)

    def save(self, state: State) -> None:
        """Saves in the background; the arrays may be donated after this call."""
        data = {
            "engine": {"synchronous": self._synchronous},
            "next_batches": state.next_batches,
            "applied": [list(column) for column in zip(*state.applied, strict=True)],
            # JSON has no dtypes.
            "metrics": {
                name: [str(values[0].dtype), np.stack(values)]
                for name, values in state.metrics.items()
            },
            "refused": state.refused,
            "replaced": state.replaced,
            "seconds": state.seconds,
            "master_seconds": state.master_seconds,
        }
        self._checkpoints.save(len(state.applied), *_stacked(state), data=data)

    def restore(self, state: State) -> State:
        """Returns the state of the latest complete checkpoint.

        Args:
          state: The initial state, which is returned if there is no checkpoint.

        Raises:
          ValueError: If the checkpoint belongs to a run with another model, optimizer,
            number of workers, or mode.
        """
        found = self._checkpoints.restore(*_stacked(state))
        if found is None:
            return state
        data: Any = found.data
        if not isinstance(data, dict) or "engine" not in data:
            raise ValueError(
                f"checkpoints={self._folder!r} holds a checkpoint of step {found.step} "
                "that engine.run has not written: pass another folder."
            )
        # What the history records must mean the same before and after.
        for name, saved, own in (
            ("num_workers", len(data["next_batches"]), len(state.next_batches)),
            ("synchronous", data["engine"]["synchronous"], self._synchronous),
        ):
            if saved != own:
                raise ValueError(
                    f"{name} must be {saved}, as in the checkpoint of {found.step} "
                    f"gradients in {self._folder!r}, got {own}. To start a new run, "
                    "pass another folder."
                )
        logger.info("continues from the checkpoint of %d gradients", found.step)
        params, opt_state, model_state = jax.device_put(
            jax.tree.map(lambda x: x[0], found.state), self._device
        )
        return State(
            # Without a model state, an empty tuple has been saved.
            Model(params, None if state.model.state is None else model_state),
            opt_state,
            next_batches=data["next_batches"],
            applied=[Applied(*row) for row in zip(*data["applied"], strict=True)],
            metrics={
                name: list(np.asarray(values, jnp.dtype(dtype)))
                for name, (dtype, values) in data["metrics"].items()
            },
            refused=data["refused"],
            replaced=[(worker, tick) for worker, tick in data["replaced"]],
            seconds=data["seconds"],
            master_seconds=data["master_seconds"],
        )


def _stacked(state: State) -> tuple[Any, Any, Any]:
    """Returns the trees to save, with the leading axis of one worker."""
    params, model_state = state.model
    trees = params, state.opt_state, () if model_state is None else model_state
    return jax.tree.map(lambda x: x[None], trees)
