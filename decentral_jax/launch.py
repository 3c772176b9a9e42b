"""Starts several processes of one script on this machine.

`python -m decentral_jax.launch --processes 4 train.py --rate 0.1` runs four processes
that find each other by `dj.initialize()`. Each line they print comes with the number of
its process; when one fails, the others are ended, and its exit code is passed on.
Clusters have launchers of their own, see docs/cluster.md.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from decentral_jax.processes import NUM_PROCESSES, PROCESS_ID

# Seconds that processes get to end by themselves before they are killed.
GRACE = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the processes; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m decentral_jax.launch",
        description="Run several processes of one script on this machine.",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices", type=int, default=1, help="CPU devices or GPUs of each process"
    )
    parser.add_argument("-m", action="store_true", help="the script is a module")
    parser.add_argument("script", help="Python file, or module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(arguments)
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    command = [sys.executable, "-u", *["-m"] * options.m, options.script]
    return run([*command, *options.arguments], options.processes, options.devices)


def run(command: Sequence[str], processes: int, devices: int = 1) -> int:
    """Runs a command in several processes that can find each other.

    Args:
      command: Program and arguments.
      processes: How many.
      devices: CPU devices of each, or the GPUs that each sees.

    Returns:
      0 if all ended well, else the exit code of the first that did not: 128 and the
      signal's number if it was ended by one; 130 after Ctrl-C.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []

    def end(*_):
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        for rank in range(processes):
            environment = _environment(address, processes, rank, devices)
            # In a session of its own, so that all of its children can be ended.
            member = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            members.append(member)
            for source, sink in (
                (member.stdout, sys.stdout),
                (member.stderr, sys.stderr),
            ):
                reader = threading.Thread(target=_copy, args=(source, sink, rank))
                reader.start()
                readers.append(reader)
        return _wait(members)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        _end(members)
        for reader in readers:
            reader.join(GRACE)
        signal.signal(signal.SIGTERM, before)


def _environment(address, processes, rank, devices):
    ids = range(rank * devices, (rank + 1) * devices)
    # This flag asks for a number of devices, too.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "xla_force_host_platform_device_count" not in f]
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        # Not on all of the machine's addresses, which is JAX's default.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids)),
        "XLA_FLAGS": " ".join(flags),
        NUM_PROCESSES: str(processes),
        PROCESS_ID: str(rank),
    }


def _copy(source: IO[bytes], sink: IO[str], rank: int) -> None:
    """Passes on lines, whole ones, with the process's number in front."""
    with source:
        for line in source:
            text = line.decode(errors="replace")
            sink.write(f"[{rank}] {text}" + "\n" * (not text.endswith("\n")))
            sink.flush()


def _wait(members: list[subprocess.Popen]) -> int:
    """The exit code of the first to fail, or 0 when all have ended."""
    while True:
        codes = [member.poll() for member in members]
        for rank, code in enumerate(codes):
            if code:
                code = 128 - code if code < 0 else code
                if None in codes:
                    print(
                        f"process {rank} ended with {code}: ending the others",
                        file=sys.stderr,
                    )
                return code
        if None not in codes:
            return 0
        time.sleep(0.05)


def _end(members: list[subprocess.Popen]) -> None:
    """Asks those still running to end, then kills them and their children."""
    for member in members:
        if member.poll() is None:
            os.killpg(member.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for member in members:
        try:
            member.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(member.pid, signal.SIGKILL)
            member.wait()


if __name__ == "__main__":
    sys.exit(main())
