"""The other end of `benchmarks.support.group`: import it before anything is printed.

Answers go to the real standard output; whatever else is printed, to standard error.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def obey(makers: Mapping[str, Callable]) -> None:
    """Obeys commands until standard input ends.

    A command that names a maker makes what obeys from then on; another one is a method
    of that, whose result is the answer.
    """
    current: Any = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer = None
        if command in makers:
            current = makers[command](*arguments)
        else:
            answer = getattr(current, command)(*arguments)
        print(json.dumps(answer), file=ANSWERS)


def join() -> None:
    """Joins JAX's processes, before JAX is used."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        *(SIZE, RANK),
        local_device_ids=[0],
    )
