"""Go on after what an interrupted experiment has finished: one file a part of it.

A part is what is computed at once: an algorithm at all its rates and seeds, say. Its
file's name is made of the experiment's options and of the code, so that a run with
other options, or after the code has changed, does not find it.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.provenance import code


class Memory(NamedTuple):
    """Where an experiment keeps what it has finished."""

    folder: Path
    options: str  # all that a part depends on beside its name
    resume: bool  # whether to use what is there

    def recall(self, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
        """A part's arrays: of an earlier run if there are any, else computed.

        Args:
          name: The part, different from all others of the experiment.
          compute: Makes its arrays and numbers.

        Returns:
          The arrays by name.
        """
        text = f"{code()} {self.options} {name}"
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        if not (self.resume and path.exists()):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **compute())
            partial.rename(path)
        with np.load(path) as file:
            return dict(file)


def memory(options: Any) -> Memory:
    """What an experiment with these options keeps, beside its figures.

    Args:
      options: A dataclass, with `resume` and the folder `out`.
    """
    same = dataclasses.replace(options, resume=False, out=Path())
    return Memory(options.out / "finished", repr(same), options.resume)
