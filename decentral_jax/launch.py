"""Starts several processes of one script on this machine.

`python -m decentral_jax.launch --processes 4 train.py --rate 0.1` runs four processes
that find each other with `dj.initialize()`. The launcher prefixes each line of output
with the number of its process. If one process fails, the launcher ends the others and
returns the exit code of the first one that failed. Clusters have their own launchers;
see docs/cluster.md.
"""

import argparse
import codecs
import contextlib
import importlib.metadata
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

# Seconds that processes have to end on their own before they are killed.
GRACE = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the processes.

    Args:
      arguments: Command-line arguments. If None, uses `sys.argv[1:]`.

    Returns:
      The exit code; see `run`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m decentral_jax.launch",
        description="Run several processes of one script on this machine.",
    )
    version = f"decentral_jax {importlib.metadata.version('decentral_jax')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--processes", type=int, required=True, help="number of processes"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="number of CPU devices or GPUs per process",
    )
    parser.add_argument("-m", action="store_true", help="run the script as a module")
    parser.add_argument("script", help="Python file, or module name with -m")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the script"
    )
    options = parser.parse_args(arguments)
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    command = [sys.executable, "-u", *["-m"] * options.m, options.script]
    code = run([*command, *options.arguments], options.processes, options.devices)
    if code == 128 + signal.SIGPIPE:
        # Redirect the broken output; flushing it at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run(command: Sequence[str], processes: int, devices: int = 1) -> int:
    """Runs a command in several processes that can find each other.

    Ctrl-C, SIGTERM, and SIGHUP end all processes and their children within `GRACE`
    seconds. A second signal kills them immediately.

    Args:
      command: Program and its arguments.
      processes: Number of processes.
      devices: Number of CPU devices or GPUs per process.

    Returns:
      0 if all processes exit with 0. Otherwise, the exit code of the first process that
      fails, or 128 plus the number of the signal that ended it. 130 after Ctrl-C, 143
      after SIGTERM, 129 after SIGHUP, and 141 if the reader of the output has closed
      it.
    """
    # Pick a free port for the coordinator, which is process 0.
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
                # Start each member in its own session, so that one signal to its
                # process group also reaches its children.
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
    """Collects signals that end the job in a list instead of raising exceptions.

    Handles SIGINT even if it is ignored, as in commands that a shell runs with `&`:
    someone who sends it wants the job to end. SIGHUP stays ignored if it is ignored,
    because `nohup` does so.
    """
    received: list[int] = []
    before = {}
    # Only the main thread may set signal handlers. In other threads, the caller handles
    # signals.
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


# Program of the guard process. It reads the numbers of process groups until its input
# ends. An empty line from the launcher tells it to exit. If its input ends without one,
# the launcher has been killed, and the guard ends the process groups.
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
    """Runs a small process that ends the members if the launcher is killed.

    Yields:
      A function that tells the guard process the number of a process group to end.
    """
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD.format(grace=GRACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        # In its own session, so that the terminal does not end it with the launcher.
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


def _environment(
    address: str, processes: int, rank: int, devices: int
) -> dict[str, str]:
    """Returns the environment variables of one process."""
    ids = range(rank * devices, (rank + 1) * devices)
    # Remove this flag, because it also sets a number of CPU devices.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "xla_force_host_platform_device_count" not in f]
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        # By default, JAX would listen on all addresses of the machine.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids)),
        "XLA_FLAGS": " ".join(flags),
        NUM_PROCESSES: str(processes),
        PROCESS_ID: str(rank),
    }


# Gloo prints such a line per process group and process, dozens of lines for large jobs.
# They carry no information, because a process that fails to connect raises an error.
_NOISE = re.compile(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\.")

# The end of a piece of output: a newline, or a carriage return of a progress bar.
_END = re.compile(r"\n|\r(?!\n|\Z)")


class _Stream:
    """Standard output or standard error of one member, with its unprinted text."""

    def __init__(self, source: IO[bytes], sink: IO[str], rank: int):
        self.source, self.sink, self.rank = source, sink, rank
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.rest = ""
        self.since = 0.0
        # Whether the last piece ended with a carriage return.
        self.returned = False


class _Relay(threading.Thread):
    """Thread that prints the members' output, prefixed with the process's number.

    It prints complete lines, and pieces that end with a carriage return, so that the
    output of different members does not mix within a line. It prints an incomplete
    line, such as a prompt, after `HOLD` seconds.
    """

    HOLD = 0.5  # seconds

    def __init__(self):
        super().__init__(name="decentral_jax output")
        self.broken = False
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        # For each sink in the middle of a line: the stream that wrote its last piece.
        self._open: dict[IO[str], _Stream] = {}

    def add(self, source: IO[bytes] | None, sink: IO[str], rank: int) -> None:
        """Adds a member's output to be printed to `sink`. Call it before `start`."""
        assert source is not None
        stream = _Stream(source, sink, rank)
        self._selector.register(source, selectors.EVENT_READ, stream)

    def stop(self) -> None:
        """Prints the remaining output and stops, even if a child holds a pipe open."""
        self._stopped.set()
        if self.is_alive():
            self.join()
        for key in list(self._selector.get_map().values()):
            self._close(key)
        self._selector.close()

    def run(self) -> None:
        """Prints output until all pipes are closed or `stop` is called."""
        while self._selector.get_map():
            # After `stop`, read only what is still in the pipes.
            stopped = self._stopped.is_set()
            ready = self._selector.select(0 if stopped else 0.1)
            for key, _ in ready:
                self._read(key)
            # Print incomplete lines that have waited long enough or are too long.
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
        """Reads from a pipe and prints all complete pieces."""
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
        # No data means that the pipe is closed.
        if not data:
            if stream.rest:
                self._print(stream, stream.rest)
            self._close(key)

    def _close(self, key: selectors.SelectorKey) -> None:
        """Closes a pipe and stops watching it."""
        self._selector.unregister(key.fileobj)
        key.data.source.close()

    def _print(self, stream: _Stream, piece: str) -> None:
        """Prints one piece of output, with the prefix where a line begins."""
        sink, text = stream.sink, piece.rstrip("\r\n")
        before = self._open.get(sink)
        if _NOISE.match(text) or (not text and piece == "\r"):
            return
        # End the open line of another member first.
        if before not in (None, stream):
            self._close_line(sink)
        # The piece needs no prefix if it continues this member's own open line.
        goes_on = before is stream and not stream.returned
        self._write(sink, piece if goes_on else f"[{stream.rank}] {piece}")
        stream.returned = piece.endswith("\r")
        if piece.endswith("\n"):
            self._open.pop(sink, None)
        else:
            self._open[sink] = stream

    def _close_line(self, sink: IO[str]) -> None:
        """Ends the open line of a sink."""
        del self._open[sink]
        self._write(sink, "\n")

    def _write(self, sink: IO[str], text: str) -> None:
        """Writes text to a sink, and drops it if the sink is closed."""
        # If the reader of the output has closed it, `_wait` ends the members. Until
        # then, keep reading, so that their pipes do not fill up.
        if self.broken:
            return
        try:
            sink.write(text)
            sink.flush()
        except (OSError, ValueError):
            self.broken = True


def _code(member: subprocess.Popen) -> int | None:
    """Returns the exit code in a shell's convention, or None while the member runs.

    The exit code of a process that a signal ended is 128 plus the signal's number.
    """
    code = member.returncode
    if code is None and hasattr(os, "waitid"):
        # WNOWAIT leaves the process as a zombie. The system then does not reuse the
        # number of its process group, so it is safe to signal its children.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        found = os.waitid(os.P_PID, member.pid, flags)
        if found is None:
            return None
        code = found.si_status * (1 if found.si_code == os.CLD_EXITED else -1)
    elif code is None:
        code = member.poll()
    return 128 - code if code is not None and code < 0 else code


def _wait(members: list[subprocess.Popen], received: list[int], relay: _Relay) -> int:
    """Waits for the members or a signal, and returns the job's exit code.

    Args:
      members: The processes.
      received: Signals that the launcher has received.
      relay: The thread that prints the output.

    Returns:
      The exit code of the first member that fails, or 0 after all have ended.
    """
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
    """Sends SIGTERM to all members and their children, and later SIGKILL.

    Args:
      members: The processes.
      received: Signals that the launcher has received. If another one arrives, the
        members are killed immediately.
    """
    enough = min(len(received), 1)
    for member in members:
        _signal(member, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    left = list(members)
    while left and time.monotonic() < deadline:
        # Another signal, in addition to the one that ended the job: do not wait.
        if len(received) > enough:
            break
        time.sleep(0.02)
        left = [m for m in left if m.poll() is None or _signal(m, 0)]
    for member in left:
        _signal(member, signal.SIGKILL)
    for member in members:
        member.wait()


def _signal(member: subprocess.Popen, number: int) -> bool:
    """Signals a member's process group, and returns whether the group exists."""
    try:
        os.killpg(member.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
