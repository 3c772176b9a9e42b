"""A master and workers that run asynchronously, on one host or on several."""

from decentral_jax.engine._master import Run
from decentral_jax.engine._progress import Progress, progress_line
from decentral_jax.engine._running import run

__all__ = ["Progress", "Run", "progress_line", "run"]
