"""Go on after what an interrupted experiment has finished: one file an algorithm.

A file holds an algorithm's curves under a name made of the experiment's options, so
that a run with other options does not find it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import decentral_jax as dj
from experiments.training import Curves


class Memory(NamedTuple):
    """Where an experiment keeps what it has finished."""

    folder: Path
    options: str  # all that the curves depend on beside the algorithm
    resume: bool  # whether to use what is there

    def curves(self, algorithm: str, train: Callable[[], Curves]) -> Curves:
        """An algorithm's curves: of an earlier run if there are any, else trained."""
        text = f"{dj.__version__} {self.options} {algorithm}"
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = self.folder / f"{name}.npz"
        if self.resume and path.exists():
            with np.load(path) as file:
                curves = Curves(*(file[field] for field in Curves._fields))
                return curves._replace(seconds=float(curves.seconds))
        curves = train()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **curves._asdict())
        partial.rename(path)
        return curves
