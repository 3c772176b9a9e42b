"""Groups of processes that execute commands, for benchmarks across processes."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# One compute thread per process, and an allocator that retains memory: XLA's CPU
# backend requests all of its scratch memory at every step, and glibc by default returns
# blocks of 32 MiB or more to the system each time, which costs a page fault per 4 KiB.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PJRT_NPROC": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


class Group:
    """Processes of one script that read commands and write answers as JSON lines.

    Args:
      command: Function from the rank of a process to its command line.
      processes: Number of processes.
      address: Host and port at which process 0 listens.
      interface: Network interface for messages.
      variables: Additional environment variables.
      a_host: Number of processes per host.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        processes: int,
        address: tuple[str, int],
        interface: str,
        variables: dict[str, str],
        a_host: int,
    ):
        environment = {
            **os.environ,
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(a_host),
            "GLOO_SOCKET_IFNAME": interface,
            "JAX_COORDINATOR_BIND_ADDRESS": f"{address[0]}:{address[1]}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        self.members = [
            subprocess.Popen(
                command(rank),
                env={
                    **environment,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % a_host),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if rank else None,
                text=True,
            )
            for rank in range(processes)
        ]

    def ask(self, *command: Any) -> list:
        """Sends a command to all members, and returns their answers by rank."""
        for member in self.members:
            assert member.stdin
            member.stdin.write(json.dumps(command) + "\n")
            member.stdin.flush()
        answers = [m.stdout.readline() if m.stdout else "" for m in self.members]
        if not all(answers):
            raise RuntimeError(
                f"a process ended during {command}: see its message above."
            )
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        """Ends the members."""
        for member in self.members:
            member.kill()
            member.wait()
