"""The same trajectories on several processes, talking over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = ["all_reduce_sgd", "d_psgd_one_peer", "d2", "dsgt_schedule", "detagm"]
NAMES += ["mll_sgd_two_hubs", "diloco", "sgp"]


@pytest.mark.parametrize("processes", [2])
def test_trajectories_on_several_processes(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    environment["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    members = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "one_process.py"),
                *map(str, (rank, processes, port)),
                *NAMES,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        results = [member.communicate(timeout=240) for member in members]
    finally:
        for member in members:
            member.kill()
    for member, (out, error) in zip(members, results, strict=True):
        assert member.returncode == 0, error[-3000:]
        assert out.strip().endswith("equal")
