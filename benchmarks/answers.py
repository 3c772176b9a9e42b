"""The other end of `benchmarks.group`: import it before anything is printed.

Answers go to the real standard output; whatever else is printed, to standard error.
"""

import os

ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join() -> None:
    """Joins JAX's processes, before JAX is used."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        *(SIZE, RANK),
        local_device_ids=[0],
    )
