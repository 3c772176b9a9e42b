"""Resumes interrupted experiments from the parts that they have finished.

A part is a computation whose results are stored together in one file, for example the
training of one algorithm with all rates and seeds. The name of the folder with the
files depends on the options and on the code, so that a run never uses parts that were
computed with other options or other code.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.training.provenance import code


class Memory(NamedTuple):
    """Storage of the finished parts of an experiment."""

    folder: Path
    resume: bool  # whether to use existing files

    def recall(self, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
        """Loads a part from an earlier run, or computes and stores it.

        A part is loaded only if `resume` is true and the part is finished.

        Args:
          name: Name of the part, unique within the experiment.
          compute: Function that computes the arrays and numbers of the part.

        Returns:
          A dictionary from names to arrays.
        """
        path = self.folder / f"{_digest(name)}.npz"
        if not (self.resume and path.exists()):
            self.folder.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            arrays = compute()
            # Rename the complete file, so that an interruption leaves no broken one.
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, part_seconds=time.perf_counter() - begin, **arrays)
            partial.rename(path)
        with np.load(path) as file:
            return {key: file[key] for key in file if key != "part_seconds"}

    def seconds(self) -> float:
        """Returns the compute time of all parts, including interrupted runs."""
        total = 0.0
        for path in self.folder.glob("*.npz"):
            with np.load(path) as file:
                total += float(file["part_seconds"])
        return total


def memory(options: Any) -> Memory:
    """Returns the storage of an experiment, a subfolder "finished/..." of `out`.

    Args:
      options: Options of the experiment, a dataclass with `resume` and the folder
        `out`. These two do not affect the name of the subfolder.
    """
    return Memory(options.out / "finished" / identity(options), options.resume)


def identity(options: Any) -> str:
    """A digest of the options and the code, without the folder `out` and `resume`."""
    same = dataclasses.replace(options, resume=False, out=Path())
    return _digest(f"{code()} {same}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
