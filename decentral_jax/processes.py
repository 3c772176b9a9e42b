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

from decentral_jax import _watch

__all__ = ["initialize"]

# What `decentral_jax.launch` sets for each process, beside JAX_COORDINATOR_ADDRESS.
NUM_PROCESSES = "DECENTRAL_JAX_NUM_PROCESSES"
PROCESS_ID = "DECENTRAL_JAX_PROCESS_ID"
TIMEOUT = "DECENTRAL_JAX_TIMEOUT"
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"

_numbers = itertools.count()


def initialize(timeout: float | None = None, **options: Any) -> None:
    """Joins this process to the other processes of its job, if there are any.

    Call it before anything else of JAX. It finds the other processes in the environment
    as `python -m decentral_jax.launch` sets it, or else as `jax.distributed.initialize`
    does (SLURM, Open MPI, Cloud TPU, Kubernetes). A process that was started by itself
    goes on by itself, so that one script serves a laptop and a cluster.

    To start processes by hand, such as over ssh, set `JAX_COORDINATOR_ADDRESS` (host
    and port of process 0), `DECENTRAL_JAX_NUM_PROCESSES` and `DECENTRAL_JAX_PROCESS_ID`
    for each process.

    From then on the processes watch each other. If one raises an uncaught exception or
    is killed, the others end within seconds with exit code 1 and a message that names
    the process and the reason. The same happens if one waits for another in a program
    of `Workers.spmd` or in `Workers.gather` for longer than the timeout, or for 30
    seconds if the other has ended.

    Args:
      timeout: Seconds to wait for the other processes, here and whenever this process
        needs them; by default `DECENTRAL_JAX_TIMEOUT`, or 300. Set it to more than any
        process computes by itself while the others wait.
      **options: Passed on to `jax.distributed.initialize`.

    Raises:
      ValueError: If this process knows its number but not where process 0 is, or if the
        processes have different versions of JAX or of this library.
      TimeoutError: If a process does not come.
      RuntimeError: If JAX has computed something before, or this is the second call.

    `docs/recipes/train.py` is an example, which the tests run on two processes.
    """
    if timeout is not None:
        os.environ[TIMEOUT] = str(timeout)
    if jax.distributed.is_initialized():
        raise RuntimeError("initialize must be called once, but JAX is initialized.")
    options = _found({**_numbers_given(), **options})
    if not options:
        return
    seconds = _timeout()
    processes, rank = options["num_processes"], options["process_id"]
    if processes > 1:
        _watch.begin(
            _watch.meet(
                options["coordinator_address"],
                options.get("coordinator_bind_address")
                or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"),
                processes,
                rank,
                options.get("initialization_timeout", seconds),
                seconds,
            )
        )
    # At the end processes wait for each other, too.
    rounded = max(1, round(seconds))
    waits = {"initialization_timeout": rounded, "shutdown_timeout_seconds": rounded}
    jax.distributed.initialize(**{**waits, **options})
    from decentral_jax import __version__

    agree("versions", {"jax": jax.__version__, "decentral_jax": __version__})


# What each option of `initialize` is set with, for processes started by hand.
_BY_HAND = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS (host and port of process 0)",
    "num_processes": NUM_PROCESSES,
    "process_id": PROCESS_ID,
}


def _found(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the address and the numbers of processes; empty if alone."""
    # JAX detects them only inside its own `initialize`; the watch needs them before.
    from jax._src.clusters import ClusterEnv

    names = (*_BY_HAND, "local_device_ids")
    found = {name: options.get(name) for name in names}
    found["coordinator_address"] = found["coordinator_address"] or os.environ.get(
        "JAX_COORDINATOR_ADDRESS"
    )
    method = options.get("cluster_detection_method")
    if method != "deactivate" and None in found.values():
        wait: Any = options.get("initialization_timeout", round(_timeout()))
        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
        found = dict(zip(names, detect(*found.values(), method, wait), strict=True))
    given: dict[str, Any] = {
        name: found[name] for name in _BY_HAND if found[name] is not None
    }
    if not given or given == {"num_processes": 1, "process_id": 0}:
        return {}
    missing = [_BY_HAND[name] for name in _BY_HAND if name not in given]
    if missing:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"this process belongs to a job ({said}), but cannot find the other "
            f"processes: also set {' and '.join(missing)}, or start it by python -m "
            "decentral_jax.launch. To run it alone, set none of them."
        )
    processes, rank = given["num_processes"], given["process_id"]
    if not 0 <= rank < processes:
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1 = {processes - 1}, got "
            f"{rank}."
        )
    return {**options, **found, "cluster_detection_method": "deactivate"}


def _numbers_given() -> dict[str, Any]:
    """The number of processes and this one's own, if the environment says."""
    if {NUM_PROCESSES, PROCESS_ID} & os.environ.keys():
        numbers = {
            "num_processes": _integer(NUM_PROCESSES),
            "process_id": _integer(PROCESS_ID),
        }
        return {**numbers, "cluster_detection_method": "deactivate"}
    if OPEN_MPI in os.environ:
        # JAX finds the address for some versions of Open MPI.
        return {
            "num_processes": _integer(OPEN_MPI),
            "process_id": _integer("OMPI_COMM_WORLD_RANK"),
            "local_device_ids": [_integer("OMPI_COMM_WORLD_LOCAL_RANK")],
        }
    return {}


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None


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
                f"{me} waits for it with {own}. See why it is late or gone, or set "
                f"{TIMEOUT} to more seconds."
            ) from None

    if me == 0:
        client.key_value_set(key(0), own)
        verdict = _verdict(own, get)
        client.key_value_set(key("verdict"), verdict)
        # All have come here, so all have read what was said before.
        if number and not verdict:
            client.key_value_delete(f"decentral_jax/{number - 1}/")
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
