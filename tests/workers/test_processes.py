"""Several processes on loopback: start, equality with one process, error reports.

To test all algorithms with one worker per process (minutes): `PYTHONPATH=. python -m
decentral_jax.launch --processes 8 tests/support/one_process.py float32`. With two
workers per process: `--processes 4 --devices 2`.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import decentral_jax as dj
from decentral_jax import launch

HERE = Path(__file__).parent.parent / "support"
ROOT = HERE.parent.parent
NAMES = ["all_reduce_sgd", "d_psgd_one_peer", "d2", "dsgt_schedule", "detagm"]
NAMES += ["mll_sgd_two_hubs", "diloco", "sgp"]


def code(text, *arguments):
    return [sys.executable, "-u", "-c", text, *arguments]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_trajectories(capfd):
    command = [sys.executable, str(HERE / "one_process.py"), "float64", *NAMES]
    ended = launch.run(command, processes=4, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    lines = sorted(line for line in out.splitlines() if "equal" in line)
    assert lines == [f"[{i}] {len(NAMES)} equal on 4 processes" for i in range(4)]


def test_kinds_of_leaves(capfd, tmp_path):
    program = str(HERE / "kinds_of_leaves.py")
    ended = launch.run([sys.executable, program, str(tmp_path)], processes=2, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    lines = sorted(line for line in out.splitlines() if "kinds" in line)
    assert lines == [f"[{i}] all kinds equal on 2 processes" for i in range(2)]
    # The thread that watches the other processes has not failed.
    assert "Traceback" not in error, error[-3000:]


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
    # The other processes ignore SIGTERM, as JAX's processes do.
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


def processes_with(what):
    return subprocess.run(["pgrep", "-f", what], capture_output=True, text=True).stdout


def has_ended(what, seconds=10.0):
    """Waits until no process with this command line runs; returns whether none does."""
    deadline = time.monotonic() + seconds
    while processes_with(what) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_with(what)


@contextlib.contextmanager
def launcher(member, ignored=None):
    """Starts a launcher of two members in its own process; waits until both print.

    The launcher handles signals like a foreground program, even if pytest ignores some
    because of `nohup` or `&`. `ignored` is a signal to ignore.
    """
    program = f"""
import signal, sys
from decentral_jax import launch
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if {ignored}:
    signal.signal({ignored}, signal.SIG_IGN)
launch.GRACE = 30.0
sys.exit(launch.run({code(member)!r}, 2))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(code(program), **pipes) as process:
        assert process.stdout is not None
        try:
            lines = {process.stdout.readline() for _ in range(2)}
            assert lines == {"[0] up\n", "[1] up\n"}
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "seconds", "ignored"),
    [
        (signal.SIGINT, "61.21", None),
        # As for a command that a shell starts with `&`.
        (signal.SIGINT, "61.22", int(signal.SIGINT)),
        (signal.SIGTERM, "61.23", None),
        (signal.SIGHUP, "61.24", None),
    ],
)
def test_signals_end_all(number, seconds, ignored):
    """Signals also end the members' children."""
    wait = f"import subprocess; print('up'); subprocess.run(['sleep', '{seconds}'])"
    with launcher(wait, ignored) as process:
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert processes_with(f"sleep {seconds}") == ""


def test_nohup():
    wait = "import time; print('up'); time.sleep(2)"
    with launcher(wait, ignored=int(signal.SIGHUP)) as process:
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=20)
    assert process.returncode == 0


IGNORES_SIGTERM = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up")
subprocess.run(["sleep", "%s"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_at_once(number):
    seconds = f"62.{int(number)}"
    with launcher(IGNORES_SIGTERM % seconds) as process:
        time.sleep(0.2)
        begin = time.monotonic()
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=20)
    assert time.monotonic() - begin < 15
    assert process.returncode == 128 + number
    assert processes_with(f"sleep {seconds}") == ""


def test_a_killed_launcher_leaves_nothing():
    wait = "import subprocess; print('up'); subprocess.run(['sleep', '63.25'])"
    with launcher(wait) as process:
        time.sleep(0.2)
        process.kill()
        process.communicate(timeout=20)
    assert has_ended("sleep 63.25")


@pytest.mark.parametrize("own_session", [False, True])
def test_children_left_behind(capfd, own_session):
    """Children keep the pipes open; those in their own session survive."""
    leave = f"""
import subprocess
print(subprocess.Popen(["sleep", "64.125"], start_new_session={own_session}).pid)
"""
    begin = time.monotonic()
    assert launch.run(code(leave), processes=2) == 0
    assert time.monotonic() - begin < 40
    children = [int(line.split()[1]) for line in capfd.readouterr().out.splitlines()]
    assert len(children) == 2
    if own_session:
        for child in children:
            os.kill(child, signal.SIGKILL)
    else:
        assert processes_with("sleep 64.125") == ""


def test_children_that_ignore_sigterm(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    leave = """
import subprocess, time
subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 65.125"])
time.sleep(1)
"""
    assert launch.run(code(leave), processes=2) == 0
    assert processes_with("sleep 65.125") == ""


def test_output_comes_in_pieces(tmp_path):
    """Output appears before a line ends, lines stay whole, and Gloo's log is hidden."""
    member = """
import sys, time
print("up")
for text in ("\\r10%", "\\r20%", "\\r30%\\nask: "):
    sys.stdout.write(text); sys.stdout.flush()
    time.sleep(0.1)
time.sleep(2)
print("yes")
print("[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected "
    "peer ranks is : 1")
print("[Gloo] failed")
sys.stdout.write("a" * 200000)
"""
    program = f"""
import sys
from decentral_jax import launch
sys.exit(launch.run({code(member)!r}, 1))
"""
    arrived = []
    with subprocess.Popen(code(program), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            arrived.append((time.monotonic(), data))
    assert process.returncode == 0
    text = b"".join(data for _, data in arrived).decode()
    start = "[0] up\n[0] 10%\r[0] 20%\r[0] 30%\n[0] ask: yes\n[0] [Gloo] failed\n[0] a"
    assert text.startswith(start)
    assert text.endswith("a\n")
    assert text.count("a") == 200002
    when = {
        word: next(t for t, data in arrived if word in data)
        for word in (b"10%\r", b"ask: ", b"yes")
    }
    assert when[b"yes"] - when[b"10%\r"] > 1.0
    assert when[b"yes"] - when[b"ask: "] > 0.3


def test_members_do_not_mix(capfd):
    """The rest of a line that another member interrupts gets the number again."""
    member = """
import os, time
rank = int(os.environ["DECENTRAL_JAX_PROCESS_ID"])
time.sleep(1.5 * rank)
print("begin", end="")
time.sleep(3)
print("end")
"""
    assert launch.run(code(member), processes=2) == 0
    out = capfd.readouterr().out
    assert out == "[0] begin\n[1] begin\n[0] end\n[1] end\n"


def test_closed_output_ends_the_launcher():
    wait = "import time; print('up'); time.sleep(1)"
    with launcher(wait + "\nwhile True: print('more')") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(20) == 141


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
        r"ValueError: all processes must agree: process 0 has the program of "
        r".*, process 1 has the program of",
    ),
    "numbers of workers": (
        "dj.initialize(); run(dj.topology.ring(2 + 2 * rank), 2 + 2 * rank)",
        r'process 0 has workers: {"workers": 2}, process 1 has workers: '
        r'{"workers": 4}',
    ),
    "gathered trees": (
        """
dj.initialize()
workers = dj.Workers(2)
workers.gather((workers.shard(jnp.arange(2.0)),) * (rank + 1))
""",
        r'process 0 has gather: {"arrays": 1, .*, process 1 has gather: {"arrays": 2, ',
    ),
    "versions": (
        "dj.__version__ += '.1' * rank; dj.initialize()",
        r'process 0 has versions: {"decentral_jax": "([\d.]+)", .*, process 1 has '
        r'versions: {"decentral_jax": "\1\.1"',
    ),
    "process 1 does not arrive": (
        """
dj.initialize(timeout=3, initialization_timeout=60)
if rank:
    time.sleep(15)
else:
    dj.Workers(2)
""",
        r"\[0\] TimeoutError: process 1 did not arrive within 3 seconds; process 0 "
        r'waits for it with workers: {"workers": 2}',
    ),
    "process 0 does not arrive": (
        """
dj.initialize(timeout=3, initialization_timeout=60)
if rank:
    dj.Workers(2)
else:
    time.sleep(15)
""",
        r"\[1\] TimeoutError: process 0 did not arrive within 3 seconds",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_differences_are_told(capfd, name):
    text, message = DIFFERENT[name]
    begin = time.monotonic()
    assert launch.run(code(START + text), processes=2) != 0
    assert time.monotonic() - begin < 100
    assert re.search(message, capfd.readouterr().err)


def output_of_two_processes(capfd, text, **options):
    """The output of two processes, which must succeed."""
    ended = launch.run(code(START + text), processes=2, **options)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    return out


def test_data_of_each_process(capfd):
    """Each process passes the data of its own workers, also with several levels."""
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
    out = output_of_two_processes(capfd, text, devices=2)
    assert {"[0] equal", "[1] equal"} <= set(out.splitlines())
    assert out.count("tree must have the leading axes") == 6


def test_equal_processes_are_not_stopped(capfd):
    text = "dj.initialize(); print(run(dj.topology.ring(2))); run(dj.topology.ring(2))"
    out = output_of_two_processes(capfd, text)
    assert {"[0] [0.5 0.5]", "[1] [0.5 0.5]"} <= set(out.splitlines())


# Failures: every process ends in time and names the failed process and the reason


def started(text, processes=2, timeout=4.0, ranks=None, numbers=None):
    """Exit codes and outputs of processes that end by themselves.

    `ranks` lists the processes to start. `numbers` maps a rank to the
    (num_processes, process_id) that the process uses instead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members = []
    for rank in range(processes) if ranks is None else ranks:
        count, number = (numbers or {}).get(rank, (processes, rank))
        environment = launch._environment(address, count, number, 1)
        environment["DECENTRAL_JAX_TIMEOUT"] = str(timeout)
        members.append(
            subprocess.Popen(
                code(text),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [member.communicate(timeout=100)[0] for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    return [member.returncode for member in members], outputs


TRAIN = """
import os, signal, sys, time
import jax, numpy as np
import decentral_jax as dj
dj.initialize(initialization_timeout=60)
rank, n = jax.process_index(), jax.process_count()
workers = dj.Workers(n)
def mixed(x):
    return dj.mix(x, dj.topology.ring(n))
step, x = workers.spmd(mixed), workers.shard(np.arange(float(n)))
for t in range(%d):
    x = jax.block_until_ready(step(x))
    if t == 4 and rank == %d:
        %s
        break
print(workers.gather(x))
"""
MISSED = "process {0} did not reach call 6 (mixed) within 4 seconds, but process"
FAILURES = {
    "raises": (
        "raise ValueError('bad\\nrecord')",
        1,
        "process {0} raised ValueError: bad record.",
    ),
    "is interrupted": (
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(1)",
        -2,
        "process {0} raised KeyboardInterrupt.",
    ),
    "is killed": (
        "os.kill(os.getpid(), 9)",
        -9,
        "process {0} ended without an exception, as if it was killed",
    ),
    "ends early": ("sys.exit(3)", 3, MISSED),
    "raises while another thread goes on": (
        "import threading as t; t.Thread(target=time.sleep, args=[3]).start(); 1 / 0",
        1,
        "process {0} raised ZeroDivisionError: division by zero.",
    ),
    "is elsewhere": ("time.sleep(60)", 1, MISSED),
}


@pytest.mark.parametrize(
    ("name", "who"),
    [*((name, 1) for name in FAILURES), ("raises", 0), ("is killed", 0)],
)
def test_a_process_that(name, who):
    what, ends, reason = FAILURES[name]
    begin = time.monotonic()
    codes, outputs = started(TRAIN % (10**9, who, what), processes=3)
    assert time.monotonic() - begin < 50
    expected = [1, 1, 1]
    expected[who] = ends
    assert codes == expected, outputs
    for rank in {0, 1, 2} - {who}:
        message = f"decentral_jax: process {rank} ends because {reason.format(who)}"
        assert message in outputs[rank], outputs[rank][-3000:]


@pytest.mark.parametrize("who", [0, 1])
def test_one_batch_less(who):
    """This process gathers while the other one waits in a step."""
    codes, outputs = started(TRAIN % (6, who, "pass"))
    assert codes == [1, 1]
    for output in outputs:
        assert re.search(
            r"process \d did not (arrive|reach call .*) within 4 seconds", output
        ), output


def test_gather_alone():
    """The wait for a process that has ended is shorter than for a slow one."""
    ends = """
from decentral_jax import _watch
_watch.ENDED = 3.0
"""
    codes, outputs = started(ends + TRAIN % (5, 1, "sys.exit(3)"), timeout=60.0)
    assert codes == [1, 3], outputs
    assert re.search(
        r"process 1 did not reach call \d+ \(gather\) within 3 seconds, but process 0 "
        "waits in it; process 1 ended after call",
        outputs[0],
    ), outputs[0]


STOP = """import subprocess
        wake = "import os, sys, time; time.sleep(9); os.kill(int(sys.argv[1]), 18)"
        wake = [sys.executable, "-c", wake, str(os.getpid())]
        subprocess.Popen(wake, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)"""


def test_a_stopped_process():
    """A stopped process is alive but silent, as after a network failure."""
    text = f"""
import os, signal, sys, time
import decentral_jax as dj
dj.initialize(initialization_timeout=60)
if os.environ["DECENTRAL_JAX_PROCESS_ID"] == "1":
    if True:
        {STOP}
time.sleep(30)
"""
    codes, outputs = started(text)
    assert codes == [1, 1], outputs
    reason = "process 0 ends because process 1 has not been heard from for"
    assert reason in outputs[0], outputs[0]
    assert "process 1 ends because" in outputs[1], outputs[1]


def test_all_processes_stopped():
    """Like a job that a scheduler suspends: the run continues afterwards."""
    text = TRAIN % (5, 9, STOP)
    codes, outputs = started(text.replace("and rank == 9", ""))
    assert codes == [0, 0], outputs


@pytest.mark.parametrize(
    ("end", "expected"),
    [("1 / 0", 1), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(3)", 3)],
)
def test_the_exit_code_is_passed_on(capfd, monkeypatch, end, expected):
    """Even if the process takes seconds to end, the others end after it."""
    monkeypatch.setenv("DECENTRAL_JAX_TIMEOUT", "4")
    slowly = "import atexit, time; atexit.register(time.sleep, 2)\n"
    begin = time.monotonic()
    ended = launch.run(code(slowly + TRAIN % (10**9, 1, end)), processes=2)
    assert ended == expected
    assert time.monotonic() - begin < 50
    assert "process 1 ended with" in capfd.readouterr().err


def test_later_than_the_timeout():
    """A process may compute longer than the timeout if no other waits for it."""
    codes, outputs = started(
        TRAIN % (6, 9, "pass") + "if rank == 0: time.sleep(7)", timeout=3.0
    )
    assert codes == [0, 0], outputs
    assert "ends because" not in "".join(outputs)


# Starting


MEET = """
import decentral_jax as dj
try:
    dj.initialize()
except (TimeoutError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("ranks", "numbers", "message"),
    [
        ([0, 2], {}, "TimeoutError process 1 did not connect within 4 seconds"),
        ([2], {}, "TimeoutError process 0 did not answer within 4 seconds"),
        ([0, 1, 2], {2: (3, 1)}, "ValueError two processes have the number 1"),
        (
            [0, 1],
            {1: (4, 1)},
            "ValueError process 0 expects 3 processes, process 1 expects 4",
        ),
    ],
)
def test_who_is_missing(ranks, numbers, message):
    codes, outputs = started(MEET, 3, timeout=4.0, ranks=ranks, numbers=numbers)
    assert codes == [0] * len(ranks), outputs
    for output in outputs:
        assert message in output


ADDRESS = "JAX_COORDINATOR_ADDRESS"


@pytest.mark.parametrize(
    ("given", "options", "missing"),
    [
        ({launch.NUM_PROCESSES: "2", launch.PROCESS_ID: "1"}, {}, ADDRESS),
        ({}, {"num_processes": 2, "process_id": 1}, ADDRESS),
        ({launch.PROCESS_ID: "1", ADDRESS: "127.0.0.1:1"}, {}, launch.NUM_PROCESSES),
        ({launch.NUM_PROCESSES: "2", ADDRESS: "127.0.0.1:1"}, {}, launch.PROCESS_ID),
        ({ADDRESS: "127.0.0.1:1"}, {}, launch.NUM_PROCESSES),
        ({launch.NUM_PROCESSES: "two"}, {}, "NUM_PROCESSES must be an integer"),
        (
            {launch.NUM_PROCESSES: "2", launch.PROCESS_ID: "2", ADDRESS: "127.0.0.1:1"},
            {},
            "process_id must be from 0 to num_processes - 1 = 1, got 2",
        ),
    ],
)
def test_incomplete_settings_are_refused(monkeypatch, given, options, missing):
    for name in (launch.NUM_PROCESSES, launch.PROCESS_ID, ADDRESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=missing):
        dj.initialize(**options)
