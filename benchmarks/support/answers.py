"""Process side of `benchmarks.support.group`; import it before anything is printed.

Answers go to standard output. All other printed text is redirected to standard error.
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
    """Executes commands until standard input ends.

    A command is a name with arguments. The name of a maker constructs a new current
    object. Any other name is a method of the current object, whose result is the
    answer.

    Args:
      makers: Dictionary from names to functions that construct the current object.
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
    """Connects this process to the other JAX processes; call it before using JAX."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        *(SIZE, RANK),
        local_device_ids=[0],
    )
