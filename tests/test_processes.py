"""Several processes, over loopback: started, equal to one, told when they differ.

All algorithms, one worker and two a process (minutes): `PYTHONPATH=. python -m
decentral_jax.launch --processes 8 tests/one_process.py float32`, and the same with
`--processes 4 --devices 2`.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decentral_jax import launch

HERE = Path(__file__).parent
NAMES = ["all_reduce_sgd", "d_psgd_one_peer", "d2", "dsgt_schedule", "detagm"]
NAMES += ["mll_sgd_two_hubs", "diloco", "sgp"]


def code(text, *arguments):
    return [sys.executable, "-u", "-c", text, *arguments]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))


def test_trajectories(capfd):
    command = [sys.executable, str(HERE / "one_process.py"), "float64", *NAMES]
    ended = launch.run(command, processes=4, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    lines = sorted(line for line in out.splitlines() if "equal" in line)
    assert lines == [f"[{i}] {len(NAMES)} equal on 4 processes" for i in range(4)]


# Starting


def test_output_and_environment(capfd):
    show = """
import os, sys
names = "DECENTRAL_JAX_NUM_PROCESSES", "DECENTRAL_JAX_PROCESS_ID"
print(*map(os.environ.get, names), sys.argv[1:])
print(os.environ["JAX_LOCAL_DEVICE_IDS"], end="", file=sys.stderr)
"""
    assert launch.run(code(show, "--rate", "1"), processes=3, devices=2) == 0
    out, error = capfd.readouterr()
    assert sorted(out.splitlines()) == [
        f"[{i}] 3 {i} ['--rate', '1']" for i in range(3)
    ]
    assert sorted(error.splitlines()) == ["[0] 0,1", "[1] 2,3", "[2] 4,5"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("1 / 0", 1)],
)
def test_one_failing_process_ends_all(capfd, end, expected):
    # The others do not listen to SIGTERM, as JAX's do not.
    wait = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["DECENTRAL_JAX_PROCESS_ID"] == "1":
    time.sleep(0.3)
    {end}
time.sleep(60)
"""
    begin = time.monotonic()
    assert launch.run(code(wait), processes=3) == expected
    assert time.monotonic() - begin < 50
    assert f"process 1 ended with {expected}: ending" in capfd.readouterr().err


def test_ctrl_c_ends_all():
    """Of a process that has a child of its own."""
    wait = "import subprocess; print('up'); subprocess.run(['sleep', '61.25'])"
    program = f"""
import sys
from decentral_jax import launch
sys.exit(launch.run({code(wait)!r}, 2))
"""
    launcher = subprocess.Popen(code(program), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert {launcher.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
    time.sleep(0.2)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    left = subprocess.run(["pgrep", "-f", "sleep 61.25"], capture_output=True)
    assert left.stdout == b""


def test_command_line(capfd, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert launch.main(["--processes", "1", str(script), "--processes", "7"]) == 0
    assert launch.main(["--processes", "1", "-m", "this"]) == 0
    out = capfd.readouterr().out
    assert "[0] ['--processes', '7']" in out
    assert "Beautiful is better" in out
    for bad in (["--processes", "0", "x"], ["--processes", "1", "--devices", "0", "x"]):
        with pytest.raises(SystemExit):
            launch.main(bad)
        assert "must be at least 1, got 0" in capfd.readouterr().err


# Differences

START = """
import os, sys, time
import jax, jax.numpy as jnp
import decentral_jax as dj
rank = int(os.environ["DECENTRAL_JAX_PROCESS_ID"])
def run(topology, n=2):
    workers = dj.Workers(n)
    step = workers.spmd(lambda x: dj.mix(x, topology))
    return workers.gather(step(workers.shard(jnp.arange(float(n)))))
"""
DIFFERENT = {
    "topologies": (
        """
dj.initialize()
ring = dj.topology.ring(4)
run(ring if rank else ring.lazy(0.75), 4)
""",
        r"ValueError: all processes must run the same: process 0 has the program of "
        r".*, process 1 has the program of",
    ),
    "numbers of workers": (
        "dj.initialize(); run(dj.topology.ring(2 + 2 * rank), 2 + 2 * rank)",
        r'process 0 has workers: {"workers": 2}, process 1 has workers: '
        r'{"workers": 4}',
    ),
    "versions": (
        "dj.__version__ += '.1' * rank; dj.initialize()",
        r'process 0 has versions: {"decentral_jax": "([\d.]+)", .*, process 1 has '
        r'versions: {"decentral_jax": "\1\.1"',
    ),
    "a process that comes no more": (
        """
dj.initialize(timeout=4)
if rank:
    time.sleep(15)
else:
    dj.Workers(2)
""",
        r"\[0\] TimeoutError: process 1 did not come within 4 seconds; process 0 waits "
        r'for it with its workers: {"workers": 2}',
    ),
    "the first process comes no more": (
        """
dj.initialize(timeout=4)
if rank:
    dj.Workers(2)
else:
    time.sleep(15)
""",
        r"\[1\] TimeoutError: process 0 did not come within 4 seconds",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_differences_are_told(capfd, name):
    text, message = DIFFERENT[name]
    begin = time.monotonic()
    assert launch.run(code(START + text), processes=2) != 0
    assert time.monotonic() - begin < 100
    assert re.search(message, capfd.readouterr().err)


def of_two_processes(capfd, text, **options):
    """What they print, both ending well."""
    ended = launch.run(code(START + text), processes=2, **options)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    return out


def test_data_of_each_process(capfd):
    """Each passes what belongs to its own workers, also of several levels."""
    text = """
import numpy as np
dj.initialize()
for shape in (4, {"hub": 2, "worker": 4}, {"hub": 4, "worker": 2}):
    workers = dj.Workers(shape)
    n = workers.num_workers
    x = np.arange(3.0 * n).reshape(*workers.shape, 3)
    local = workers.local
    assert local.size == n // 2 and local.flat[0] == rank * n // 2, local
    mine = x.reshape(n, 3)[local]
    both = workers.shard(mine, local=True), workers.shard(x)
    for a, b in zip(*(array.addressable_shards for array in both)):
        assert a.device == b.device and (a.data == b.data).all()
    np.testing.assert_array_equal(workers.gather(both[0]), x)
    try:
        workers.shard(x, local=True)
    except ValueError as error:
        print(error)
print("equal")
"""
    out = of_two_processes(capfd, text, devices=2)
    assert {"[0] equal", "[1] equal"} <= set(out.splitlines())
    assert out.count("tree must have the leading axes") == 6


def test_equal_processes_are_not_stopped(capfd):
    text = "dj.initialize(); print(run(dj.topology.ring(2))); run(dj.topology.ring(2))"
    out = of_two_processes(capfd, text)
    assert {"[0] [0.5 0.5]", "[1] [0.5 0.5]"} <= set(out.splitlines())
