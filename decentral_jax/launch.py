"""Starts several processes of one script on this machine.

`python -m decentral_jax.launch --processes 4 train.py --rate 0.1` runs four processes
that find each other by `dj.initialize()`. Each line they print comes with the number of
its process; when one fails, the others are ended, and its exit code is passed on.
Clusters have launchers of their own, see docs/cluster.md.
"""

import argparse
import codecs
import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from decentral_jax.processes import NUM_PROCESSES, PROCESS_ID

__all__ = ["main", "run"]

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
    code = run([*command, *options.arguments], options.processes, options.devices)
    if code == 128 + signal.SIGPIPE:
        # Python would fail once more when it flushes its output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run(command: Sequence[str], processes: int, devices: int = 1) -> int:
    """Runs a command in several processes that can find each other.

    Ctrl-C, SIGTERM and SIGHUP end all processes, and their children, within `GRACE`
    seconds; a second signal kills them at once.

    Args:
      command: Program and arguments.
      processes: Number of processes.
      devices: Number of CPU devices, or of GPUs, of each process.

    Returns:
      0 if all processes end with 0, else the exit code of the first that does not: 128
      plus the signal's number for a process ended by a signal. 130 after Ctrl-C, 143
      after SIGTERM, 129 after SIGHUP, 141 if nobody reads the output any longer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members: list[subprocess.Popen] = []
    relay = _Relay()
    with _signals() as received, _guard() as guard:
        try:
            for rank in range(processes):
                if received:
                    break
                # In a session of its own, so that all of its children can be ended.
                member = subprocess.Popen(
                    command,
                    env=_environment(address, processes, rank, devices),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
                members.append(member)
                guard(member.pid)
                relay.add(member.stdout, sys.stdout, rank)
                relay.add(member.stderr, sys.stderr, rank)
            relay.start()
            return _wait(members, received, relay)
        finally:
            _end(members, received)
            relay.stop()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that end the job instead of raising somewhere.

    SIGINT is taken even where it is ignored, as in what a shell runs with `&`, since
    whoever sends it means it. An ignored SIGHUP is `nohup`'s and stays ignored.
    """
    received: list[int] = []
    before = {}
    # Only the main thread may set handlers; elsewhere, its owner ends the job.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            old = signal.getsignal(number)
            if number == signal.SIGHUP and old == signal.SIG_IGN:
                continue
            before[number] = old
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


# Reads process groups until its input ends. The launcher closes it with an empty line;
# if it is killed instead, nobody else would end its members.
_GUARD = """
import os, signal, sys, time
groups = []
for line in sys.stdin:
    if not line.strip():
        sys.exit()
    groups.append(int(line))
for number, seconds in ((signal.SIGTERM, {grace}), (signal.SIGKILL, 0)):
    for group in list(groups):
        try:
            os.killpg(group, number)
        except OSError:
            groups.remove(group)
    time.sleep(seconds * bool(groups))
"""


@contextlib.contextmanager
def _guard() -> Iterator[Callable[[int], None]]:
    """A small process that ends the members if the launcher itself is killed."""
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD.format(grace=GRACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        # Not ended together with the launcher by the terminal.
        start_new_session=True,
    )
    pipe = guard.stdin
    assert pipe is not None

    def tell(line):
        with contextlib.suppress(BrokenPipeError):
            pipe.write(f"{line}\n")
            pipe.flush()

    try:
        yield tell
    finally:
        tell("")
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        guard.wait()


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


# Gloo prints one such line per process group and process, dozens for large jobs; they
# tell nothing, since a process that does not connect is an error.
_NOISE = re.compile(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\.")

# What ends a piece of output: lines, and the carriage returns of progress bars.
_END = re.compile(r"\n|\r(?!\n|\Z)")


class _Stream:
    """One member's output or errors: what came, and what is still to be printed."""

    def __init__(self, source: IO[bytes], sink: IO[str], rank: int):
        self.source, self.sink, self.rank = source, sink, rank
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.rest = ""
        self.since = 0.0
        # Whether the last piece went back to the beginning of its line.
        self.returned = False


class _Relay(threading.Thread):
    """Prints what the members print, with the process's number before each line.

    It passes on whole lines, and what ends with a carriage return, so that members do
    not mix. A line that stays incomplete, such as a prompt, follows after `HOLD`.
    """

    HOLD = 0.5

    def __init__(self):
        super().__init__(name="decentral_jax output")
        self.broken = False
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        # The stream that left a sink in the middle of a line.
        self._open: dict[IO[str], _Stream] = {}

    def add(self, source: IO[bytes] | None, sink: IO[str], rank: int) -> None:
        assert source is not None
        stream = _Stream(source, sink, rank)
        self._selector.register(source, selectors.EVENT_READ, stream)

    def stop(self) -> None:
        """Prints what is there, and stops even if a stray child keeps a pipe open."""
        self._stopped.set()
        if self.is_alive():
            self.join()
        for key in list(self._selector.get_map().values()):
            self._close(key)
        self._selector.close()

    def run(self) -> None:
        while self._selector.get_map():
            # After the end, only what the pipes still hold.
            stopped = self._stopped.is_set()
            ready = self._selector.select(0 if stopped else 0.1)
            for key, _ in ready:
                self._read(key)
            for key in self._selector.get_map().values():
                stream = key.data
                held = time.monotonic() - stream.since
                if stream.rest and (
                    stopped or held > self.HOLD or len(stream.rest) > 65536
                ):
                    self._print(stream, stream.rest)
                    stream.rest = ""
            if stopped and not ready:
                break
        for sink in list(self._open):
            self._close_line(sink)

    def _read(self, key: selectors.SelectorKey) -> None:
        stream = key.data
        data = os.read(key.fd, 65536)
        text = stream.rest + stream.decode(data, final=not data)
        end = 0
        for found in _END.finditer(text):
            self._print(stream, text[end : found.end()])
            end = found.end()
        if end or not stream.rest:
            stream.since = time.monotonic()
        stream.rest = text[end:]
        if not data:
            if stream.rest:
                self._print(stream, stream.rest)
            self._close(key)

    def _close(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fileobj)
        key.data.source.close()

    def _print(self, stream: _Stream, piece: str) -> None:
        sink, text = stream.sink, piece.rstrip("\r\n")
        before = self._open.get(sink)
        if _NOISE.match(text) or (not text and piece == "\r"):
            return
        if before not in (None, stream):
            self._close_line(sink)
        goes_on = before is stream and not stream.returned
        self._write(sink, piece if goes_on else f"[{stream.rank}] {piece}")
        stream.returned = piece.endswith("\r")
        if piece.endswith("\n"):
            self._open.pop(sink, None)
        else:
            self._open[sink] = stream

    def _close_line(self, sink: IO[str]) -> None:
        del self._open[sink]
        self._write(sink, "\n")

    def _write(self, sink: IO[str], text: str) -> None:
        # If nobody reads any longer, the members are ended; until then, their pipes
        # must not fill up.
        if self.broken:
            return
        try:
            sink.write(text)
            sink.flush()
        except (OSError, ValueError):
            self.broken = True


def _code(member: subprocess.Popen) -> int | None:
    """The exit code as a shell gives it, or None while the member runs."""
    code = member.returncode
    if code is None and hasattr(os, "waitid"):
        # Not waited for: while it is a zombie, its process group's number is not given
        # to another process, so that its children can be ended safely.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        found = os.waitid(os.P_PID, member.pid, flags)
        if found is None:
            return None
        code = found.si_status * (1 if found.si_code == os.CLD_EXITED else -1)
    elif code is None:
        code = member.poll()
    return 128 - code if code is not None and code < 0 else code


def _wait(members: list[subprocess.Popen], received: list[int], relay: _Relay) -> int:
    """The exit code of the first to fail, or 0 when all have ended."""
    while True:
        if received:
            return 128 + received[0]
        if relay.broken:
            return 128 + signal.SIGPIPE
        codes = [_code(member) for member in members]
        for rank, code in enumerate(codes):
            if code:
                if None in codes:
                    print(
                        f"process {rank} ended with {code}: ending the others",
                        file=sys.stderr,
                    )
                return code
        if None not in codes:
            return 0
        time.sleep(0.05)


def _end(members: list[subprocess.Popen], received: list[int]) -> None:
    """Asks members and their children to end, then kills those still running."""
    enough = min(len(received), 1)
    for member in members:
        _signal(member, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    left = list(members)
    while left and time.monotonic() < deadline:
        # One more signal than brought us here: somebody is in a hurry.
        if len(received) > enough:
            break
        time.sleep(0.02)
        left = [m for m in left if m.poll() is None or _signal(m, 0)]
    for member in left:
        _signal(member, signal.SIGKILL)
    for member in members:
        member.wait()


def _signal(member: subprocess.Popen, number: int) -> bool:
    """Signals a member's process group; returns whether there is one."""
    try:
        os.killpg(member.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
