"""Go on after what an interrupted experiment has finished: one file a part of it.

A part is what is computed at once: an algorithm at all its rates and seeds, say. Parts
lie in a folder whose name is made of the experiment's options and of the code, so that
a run with other options, or after the code has changed, does not find them.
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
    """Where an experiment keeps what it has finished."""

    folder: Path
    resume: bool  # whether to use what is there

    def recall(self, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
        """A part's arrays: of an earlier run if there are any, else computed.

        Args:
          name: The part, different from all others of the experiment.
          compute: Makes its arrays and numbers.

        Returns:
          The arrays by name.
        """
        path = self.folder / f"{_digest(name)}.npz"
        if not (self.resume and path.exists()):
            self.folder.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            arrays = compute()
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, part_seconds=time.perf_counter() - begin, **arrays)
            partial.rename(path)
        with np.load(path) as file:
            return {key: file[key] for key in file if key != "part_seconds"}

    def seconds(self) -> float:
        """What all parts took together, those of interrupted runs too."""
        total = 0.0
        for path in self.folder.glob("*.npz"):
            with np.load(path) as file:
                total += float(file["part_seconds"])
        return total


def memory(options: Any) -> Memory:
    """What an experiment with these options keeps, beside its figures.

    Args:
      options: A dataclass, with `resume` and the folder `out`.
    """
    return Memory(options.out / "finished" / identity(options), options.resume)


def identity(options: Any) -> str:
    """A digest of the options and the code, without the folder `out` and `resume`."""
    same = dataclasses.replace(options, resume=False, out=Path())
    return _digest(f"{code()} {same}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
