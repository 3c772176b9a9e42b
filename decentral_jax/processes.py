"""Multiple processes: joins them, and reports differences between them early.

JAX runs the same program in every process. If one process has a different topology,
number of workers, or version, the collectives do not match and the job hangs.
Therefore, before the processes run something together, they compare it through the
coordinator's key-value store. If a process differs or does not arrive, every process
raises an error that names it.
"""

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import jax

from decentral_jax import _watch

__all__ = ["initialize"]

# Environment variables that `decentral_jax.launch` sets for each process, in addition
# to JAX_COORDINATOR_ADDRESS.
NUM_PROCESSES = "DECENTRAL_JAX_NUM_PROCESSES"
PROCESS_ID = "DECENTRAL_JAX_PROCESS_ID"
TIMEOUT = "DECENTRAL_JAX_TIMEOUT"
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"

# Numbers the calls of `agree`, which are the same in all processes.
_call_numbers = itertools.count()


def check_initialized() -> None:
    """Checks that a process that was started as one of several has joined the others.

    Raises:
      RuntimeError: If it has not: each process would train alone.
    """
    started = _given_numbers().get("num_processes") or 1
    if started > 1 and not jax.distributed.is_initialized():
        raise RuntimeError(
            f"this process was started as one of {started}, but would train alone: "
            "call dj.initialize() before dj.Workers, or pass "
            "devices=jax.local_devices() to train alone."
        )


def initialize(timeout: float | None = None, **options: Any) -> None:
    """Connects this process to the other processes of its job, if there are any.

    Call it before any other JAX function. It finds the other processes through the
    environment variables that `python -m decentral_jax.launch` sets. Otherwise, it
    detects the cluster like `jax.distributed.initialize` (SLURM, Open MPI, Cloud TPU,
    Kubernetes). Without any of them, the process runs alone, so one script works on a
    laptop and on a cluster.

    To start processes manually, for example over ssh, set `JAX_COORDINATOR_ADDRESS`
    (host and port of process 0), `DECENTRAL_JAX_NUM_PROCESSES`, and
    `DECENTRAL_JAX_PROCESS_ID` for each process.

    After this call, the processes monitor each other. If one process raises an uncaught
    exception or is killed, the others exit within seconds with exit code 1 and a
    message that names the process and the reason. The same happens if one process waits
    for another one in a program of `Workers.spmd` or in `Workers.gather` for longer
    than the timeout, or for 30 seconds if the other process has ended.

    Args:
      timeout: Seconds to wait for other processes, in this call and later. Defaults to
        `DECENTRAL_JAX_TIMEOUT`, or 300. It must exceed the longest time that one
        process computes alone while the others wait.
      **options: Options for `jax.distributed.initialize`.

    Raises:
      ValueError: If this process knows its number but not the address of process 0, or
        the processes have different versions of JAX or of this library.
      TimeoutError: If a process does not arrive in time.
      RuntimeError: If JAX has already computed something, or this function has already
        been called.

    For an example, see `docs/recipes/train.py`. The tests run it with two processes.
    """
    if timeout is not None:
        os.environ[TIMEOUT] = str(timeout)
    if jax.distributed.is_initialized():
        raise RuntimeError(
            "initialize must be called only once, but jax.distributed is already "
            "initialized: remove this call."
        )
    options = _found({**_given_numbers(), **options})
    if not options:
        return  # A single process.
    seconds = _timeout()
    # The watch connects the processes first, on the address that JAX uses afterward.
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
    # JAX takes whole seconds. The processes also wait for each other at shutdown.
    rounded = max(1, round(seconds))
    waits = {"initialization_timeout": rounded, "shutdown_timeout_seconds": rounded}
    jax.distributed.initialize(**{**waits, **options})
    from decentral_jax import __version__

    agree("versions", {"jax": jax.__version__, "decentral_jax": __version__})


# How to set each option of `initialize` for processes that are started manually.
_BY_HAND = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS (host and port of process 0)",
    "num_processes": NUM_PROCESSES,
    "process_id": PROCESS_ID,
}


def _found(options: dict[str, Any]) -> dict[str, Any]:
    """Completes the options with the address and the numbers of the processes.

    Args:
      options: The options of `jax.distributed.initialize` that are known.

    Returns:
      The complete options, or an empty dictionary if this process runs alone.

    Raises:
      ValueError: If only some of the required options are known, or `process_id` is out
        of range.
    """
    # JAX detects the cluster only inside its own `initialize`, but the watch needs the
    # result earlier.
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
    # A job of one process needs no coordinator.
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
            f"processes: also set {' and '.join(missing)}, or start it with python -m "
            "decentral_jax.launch. To run it alone, set none of them."
        )
    processes, rank = given["num_processes"], given["process_id"]
    if not 0 <= rank < processes:
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1 = {processes - 1}, got "
            f"{rank}."
        )
    return {**options, **found, "cluster_detection_method": "deactivate"}


def _given_numbers() -> dict[str, Any]:
    """Returns the number of processes and this process's own from the environment.

    Returns:
      Options for `jax.distributed.initialize`, or an empty dictionary if the
      environment variables are not set.
    """
    if {NUM_PROCESSES, PROCESS_ID} & os.environ.keys():
        numbers = {
            "num_processes": _integer(NUM_PROCESSES),
            "process_id": _integer(PROCESS_ID),
        }
        return {**numbers, "cluster_detection_method": "deactivate"}
    if OPEN_MPI in os.environ:
        # JAX detects the address only for some versions of Open MPI.
        return {
            "num_processes": _integer(OPEN_MPI),
            "process_id": _integer("OMPI_COMM_WORLD_RANK"),
            "local_device_ids": [_integer("OMPI_COMM_WORLD_LOCAL_RANK")],
        }
    return {}


def _integer(name: str) -> int | None:
    """Returns an environment variable as an integer, or None if it is not set."""
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None


def agree(what: str, value: object) -> None:
    """Checks that all processes pass the same value.

    All processes must make the same calls in the same order.

    Args:
      what: Name of the value, for messages.
      value: The value, serializable as JSON.

    Raises:
      ValueError: If the values differ. Every process raises it.
      TimeoutError: If a process does not reach this call in time.
    """
    if jax.process_count() == 1:
        return
    # The coordinator's store supports timeouts, but JAX has no public access to it.
    from jax._src.distributed import global_state

    client: Any = global_state.client
    me, number = jax.process_index(), next(_call_numbers)
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
                f"process {process} did not arrive within {seconds:g} seconds; process "
                f"{me} waits for it with {own}. Check whether it is slow or has ended, "
                f"or set {TIMEOUT} to a larger number."
            ) from None

    # Process 0 compares all values and publishes the verdict.
    if me == 0:
        client.key_value_set(key(0), own)
        verdict = _verdict(own, get)
        client.key_value_set(key("verdict"), verdict)
        # All processes have reached this call, so nobody needs the last call's entries.
        if number and not verdict:
            client.key_value_delete(f"decentral_jax/{number - 1}/")
    else:
        client.key_value_set(key(me), own)
        # Process 0 may itself wait for the others for one timeout before its verdict.
        get(0, _timeout())
        verdict = get("verdict", 2 * _timeout())
    if verdict:
        raise ValueError(verdict)


def _verdict(own: str, get: Callable[[int, float], str]) -> str:
    """Compares all processes' values in process 0.

    Args:
      own: The value of process 0.
      get: Function of a process's number and a timeout that returns its value.

    Returns:
      The error message if any value differs, else an empty string.
    """
    for process in range(1, jax.process_count()):
        other = get(process, _timeout())
        if other != own:
            return (
                f"all processes must agree: process 0 has {own}, process "
                f"{process} has {other}."
            )
    return ""


def _timeout() -> float:
    """Returns the seconds to wait for another process."""
    return float(os.environ.get(TIMEOUT, "300"))
