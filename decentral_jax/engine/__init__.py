"""A master and workers that run asynchronously, on one host or on several."""

from decentral_jax.engine.master import Run
from decentral_jax.engine.progress import Progress, progress_line
from decentral_jax.engine.running import run

__all__ = ["Progress", "Run", "progress_line", "run"]
