"""Several processes: joining them, and telling them early where they differ.

JAX runs the same program in every process. If one of them has another topology, another
number of workers or another version, their collectives do not match, which shows as a
hang. So here they compare notes, through the coordinator's key-value store, before they
run something together: a difference, or a process that does not come, is an error with
a name in every process.
"""

import itertools
import json
import os
from typing import Any

import jax

# What `decentral_jax.launch` sets for each process, beside JAX_COORDINATOR_ADDRESS.
NUM_PROCESSES = "DECENTRAL_JAX_NUM_PROCESSES"
PROCESS_ID = "DECENTRAL_JAX_PROCESS_ID"
TIMEOUT = "DECENTRAL_JAX_TIMEOUT"
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"

_numbers = itertools.count()


def initialize(timeout: float | None = None, **options: Any) -> None:
    """Joins this process to the others of its job, if there are any.

    Call it before anything else of JAX. It finds the other processes in the environment
    as `python -m decentral_jax.launch` sets it, or else as `jax.distributed.initialize`
    does (SLURM, Open MPI, Cloud TPU, Kubernetes). A process that was started by itself
    goes on by itself, so that one script serves a laptop and a cluster.

    By hand, such as over ssh, set for each process `JAX_COORDINATOR_ADDRESS` (host and
    port of process 0), `DECENTRAL_JAX_NUM_PROCESSES` and `DECENTRAL_JAX_PROCESS_ID`.

    Args:
      timeout: Seconds to wait for the other processes, now and whenever they compare
        what they are about to run; by default `DECENTRAL_JAX_TIMEOUT`, or 300.
      **options: Passed on to `jax.distributed.initialize`.

    Raises:
      ValueError: If processes have different versions of JAX or of this library.
      TimeoutError: If a process does not come.
      RuntimeError: If JAX has computed something before.

    An example which the tests run on two processes is `docs/recipes/train.py`.
    """
    if timeout is not None:
        os.environ[TIMEOUT] = str(timeout)
    seconds = max(1, round(_timeout()))
    # At the end processes wait for each other, too.
    waits = {"initialization_timeout": seconds, "shutdown_timeout_seconds": seconds}
    options = {**waits, **_numbers_given(), **options}
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return
    from decentral_jax import __version__

    agree("versions", {"jax": jax.__version__, "decentral_jax": __version__})


def _numbers_given() -> dict[str, Any]:
    """How many processes there are and which one this is, if the environment says."""
    given = os.environ
    if not {NUM_PROCESSES, PROCESS_ID} <= given.keys():
        # JAX itself knows the variables of older versions of Open MPI only.
        if not {OPEN_MPI, "JAX_COORDINATOR_ADDRESS"} <= given.keys():
            return {}
        return {
            "num_processes": int(given[OPEN_MPI]),
            "process_id": int(given["OMPI_COMM_WORLD_RANK"]),
            "local_device_ids": [int(given["OMPI_COMM_WORLD_LOCAL_RANK"])],
        }
    return {
        "num_processes": int(given[NUM_PROCESSES]),
        "process_id": int(given[PROCESS_ID]),
        "cluster_detection_method": "deactivate",
    }


def agree(what: str, value: Any) -> None:
    """Checks that all processes say the same; each must call this, in the same order.

    Args:
      what: Of what, for messages.
      value: What JSON can hold.

    Raises:
      ValueError: In every process, if values differ.
      TimeoutError: If a process does not come.
    """
    if jax.process_count() == 1:
        return
    # The only store with a timeout; JAX has no public way to it.
    from jax._src.distributed import global_state

    client: Any = global_state.client
    me, number = jax.process_index(), next(_numbers)
    own = f"{what}: {json.dumps(value, sort_keys=True)}"

    def key(process):
        return f"decentral_jax/{number}/{process}"

    def get(process, seconds):
        try:
            return client.blocking_key_value_get(key(process), round(1e3 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(
                f"process {process} did not come within {seconds:g} seconds; process "
                f"{me} waits for it with its {own}. See why it is late or gone, or set "
                f"{TIMEOUT} to more seconds."
            ) from None

    if me == 0:
        client.key_value_set(key(0), own)
        verdict = _verdict(own, get)
        client.key_value_set(key("verdict"), verdict)
    else:
        client.key_value_set(key(me), own)
        # Process 0 waits for the others as long.
        get(0, _timeout())
        verdict = get("verdict", 2 * _timeout())
    if verdict:
        raise ValueError(verdict)


def _verdict(own, get):
    for process in range(1, jax.process_count()):
        other = get(process, _timeout())
        if other != own:
            return (
                f"all processes must run the same: process 0 has {own}, process "
                f"{process} has {other}."
            )
    return ""


def _timeout() -> float:
    return float(os.environ.get(TIMEOUT, "300"))
