"""A master and workers that really run asynchronously, on one host."""

from decentral_jax.engine.master import Run
from decentral_jax.engine.running import run

__all__ = ["Run", "run"]
