"""Monitors the processes of a job, so that no process waits forever for another one.

JAX notices a lost process only after minutes, and then aborts the others without naming
it. Here, each process keeps one TCP connection to process 0. The processes connect on
the coordinator's own address before JAX uses it. Therefore, no additional port is
necessary, and a process that does not start results in a `TimeoutError` instead of an
abort. Afterward, a thread in each process sends a few bytes per second, which say what
the process runs and how it ends. Process 0 decides whether the job is stuck, and tells
the others.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from typing import Any

import jax

# Seconds for the process that failed to end before the others, so that a launcher sees
# its exit code first.
HEAD_START = 1.0
# Seconds for a process to end after the job has failed.
GRACE = 10.0
# Seconds to wait for a process that has already ended, instead of the full timeout.
ENDED = 30.0


class Calls:
    """Counts this process's calls that all processes make together.

    Attributes:
      count: Number of calls so far.
      name: Name of the latest call.
    """

    def __init__(self):
        self.count = 0
        self.name = ""
        self._depth = 0
        self._last: Any = lambda: None

    @contextlib.contextmanager
    def __call__(self, name: str):
        """Returns a context that counts one call, which lasts until the block ends."""
        self.count, self.name, self._depth = self.count + 1, name, self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1

    def returned(self, results: object) -> None:
        """Keeps a reference to a call's results, which JAX may still be computing."""
        # Arrays of typed PRNG keys have no `is_ready`.
        leaves = [x for x in jax.tree.leaves(results) if hasattr(x, "is_ready")]
        if leaves:
            self._last = weakref.ref(leaves[-1])

    def state(self) -> dict[str, Any]:
        """Returns the number and name of the latest call, and whether it is running."""
        last = self._last()
        with contextlib.suppress(RuntimeError):  # A donated array has been deleted.
            waiting = self._depth > 0 or not (last is None or last.is_ready())
            return {"count": self.count, "name": self.name, "waiting": waiting}
        return {"count": self.count, "name": self.name, "waiting": False}


calls = Calls()


def meet(
    address: str,
    bind: str | None,
    processes: int,
    rank: int,
    wait: float,
    timeout: float,
) -> "Watch":
    """Connects all processes. Must be called before `jax.distributed.initialize`.

    Args:
      address: Host and port of process 0.
      bind: Host and port on which process 0 listens. If None, it listens on all its
        addresses.
      processes: Number of processes.
      rank: This process's number.
      wait: Seconds to wait for the other processes in this call.
      timeout: Seconds after which the watch considers a process lost.

    Returns:
      The watch, not yet started.

    Raises:
      ValueError: If the processes disagree on their number, or two have the same rank.
      TimeoutError: If a process does not connect in time.
    """
    host, port = _split(address)
    if rank:
        sockets = {0: _join(host, port, processes, rank, wait)}
    else:
        bound = _split(bind) if bind else ("::", port)
        sockets = _collect(*bound, processes, wait)
        host, port = bound
    for connection in sockets.values():
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Watch(rank, processes, sockets, timeout, (host, port))


def _split(address: str) -> tuple[str, int]:
    """Splits an address into host and port; the host may be an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _collect(
    host: str, port: int, processes: int, timeout: float
) -> dict[int, socket.socket]:
    """Accepts the connections of all other processes, in process 0.

    Returns:
      The connection to each other process.

    Raises:
      ValueError: If the processes disagree on their number, or two have the same rank.
      TimeoutError: If a process does not connect in time.
    """
    deadline = time.monotonic() + timeout
    found: dict[int, socket.socket] = {}
    try:
        with _server(host, port, processes) as server:
            while len(found) < processes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted({*range(1, processes)} - found.keys())
                    raise TimeoutError(
                        f"{_listed(missing)} did not connect within {timeout:g} "
                        f"seconds; process 0 of {processes} listens on port {port}. "
                        "Check whether the process is slow or has ended, or pass a "
                        "longer timeout."
                    ) from None
                # Close connections that do not follow the protocol, such as those of
                # port scanners.
                hello = _first_line(connection, 5.0)
                if "rank" not in hello:
                    connection.close()
                    continue
                rank = hello["rank"]
                before = found.get(rank)
                found[rank] = connection
                if hello["processes"] != processes:
                    raise ValueError(
                        f"process 0 expects {processes} processes, process {rank} "
                        f"expects {hello['processes']}: pass the same number to all."
                    )
                # A process may reconnect after it has closed its first connection.
                if before is not None and not _closed(before):
                    found[-1] = before
                    raise ValueError(
                        f"two processes have the number {rank}: give each of the "
                        f"{processes} processes its own from 0 to {processes - 1}."
                    )
    except (TimeoutError, ValueError) as error:
        # All connected processes raise the same error.
        for connection in found.values():
            refusal = {"error": type(error).__name__, "message": str(error)}
            with contextlib.suppress(OSError):
                connection.sendall(_line(refusal))
            connection.close()
        raise
    return found


def _join(
    host: str, port: int, processes: int, rank: int, timeout: float
) -> socket.socket:
    """Connects to process 0, and waits until all processes have connected.

    Returns:
      The connection to process 0.

    Raises:
      ValueError: If process 0 reports this error.
      TimeoutError: If process 0 reports this error, or does not answer in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        reason = "it closed the connection"
        try:
            connection = socket.create_connection((host, port), timeout=timeout)
            connection.sendall(_line({"rank": rank, "processes": processes}))
            # Process 0 itself waits for the others for up to the timeout, and then
            # reports which processes are missing.
            left = deadline - time.monotonic() + timeout + 5
            answer = _first_line(connection, left)
            if "go" in answer:
                return connection
            connection.close()
            if "message" in answer:
                kinds = {"TimeoutError": TimeoutError, "ValueError": ValueError}
                raise kinds[answer["error"]](answer["message"])
            if "other" in answer:
                reason = "another program answers there"
        except OSError as error:
            if isinstance(error, TimeoutError) and "did not connect" in str(error):
                raise
            reason = str(error)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process 0 did not answer within {timeout:g} seconds; process {rank} "
                f"of {processes} expects it at {host}:{port} ({reason}). Check whether "
                "it runs and the address is correct, or pass a longer timeout."
            )
        time.sleep(0.05)


def _server(host: str, port: int, processes: int) -> socket.socket:
    """Returns a listening socket, for IPv4 and IPv6 if the host means all addresses."""
    if host in ("", "::"):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", port),
                family=socket.AF_INET6,
                dualstack_ipv6=True,
                backlog=processes,
            )
        host = "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=processes)


def _line(message: dict[str, Any]) -> bytes:
    """Encodes a message as one line of JSON."""
    return json.dumps(message).encode() + b"\n"


def _first_line(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """Receives one message.

    Args:
      connection: The connection.
      timeout: Seconds to wait for the message.

    Returns:
      The message; `{"other": True}` if the line is not one; or an empty dictionary if
      nothing arrives.
    """
    # Read byte by byte, because another message may follow.
    deadline, line = time.monotonic() + timeout, b""
    try:
        while not line.endswith(b"\n") and len(line) < 4096:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte:
                break
            line += byte
        message = json.loads(line)
        return message if isinstance(message, dict) else {"other": True}
    except OSError:
        return {}
    except ValueError:
        return {"other": True} if line else {}


def _closed(connection: socket.socket) -> bool:
    """Returns whether the other side has closed a connection, without reading."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _listed(ranks: list[int]) -> str:
    """Lists the numbers of processes in words, at most eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"process{'es' * (len(ranks) > 1)} {shown}"


class Watch:
    """Monitors the other processes from one process.

    Args:
      rank: This process's number.
      processes: Number of processes.
      sockets: Connections: process 0 has one to each other process, and each other
        process has one to process 0.
      timeout: Seconds after which a process is considered lost.
      coordinator: Host and port on which JAX's coordinator will listen.

    Attributes:
      reason: Why the job has failed, or an empty string.
    """

    def __init__(
        self,
        rank: int,
        processes: int,
        sockets: dict[int, socket.socket],
        timeout: float,
        coordinator: tuple[str, int],
    ):
        self.rank, self.processes = rank, processes
        self.timeout = timeout
        self._sockets = sockets
        self._coordinator = coordinator
        self._lock = threading.Lock()
        # The last state of each process, and the time at which it entered this state.
        self._said: dict[int, dict[str, Any]] = {}
        self._since: dict[int, float] = {}
        # The time of each process's last message, to detect processes that are stopped
        # or disconnected.
        self._seen: dict[int, float] = {}
        self._ended = False  # whether this process has reached its end
        self._over = threading.Event()  # set after all processes have ended
        self._heard = threading.Event()  # set after the job has failed
        self._own_failure = self._explained = False
        self.reason = ""
        self._thread = threading.Thread(
            target=self._run, name="decentral_jax watch", daemon=True
        )

    def start(self) -> None:
        """Starts the thread, and installs the hooks that report failures."""
        hook = sys.excepthook

        def excepthook(kind, error, trace):
            # In an interactive session, the process continues after an exception.
            if not hasattr(sys, "ps1"):
                self.fail(kind, error)
            hook(kind, error, trace)
            self._explain()

        sys.excepthook = excepthook
        # A forked child, such as a data loader's worker, must not keep the connections
        # open after this process has died.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        if sys.platform == "linux":
            # When process 0 dies, JAX aborts the other processes immediately, from a
            # thread of its own. The C function `sleep` as the signal handler delays
            # that thread for 6 seconds (SIGABRT's number). In this time, the watch
            # reports what happened.
            libc = ctypes.CDLL(None)
            libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            libc.signal.restype = ctypes.c_void_p
            sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
            libc.signal(int(signal.SIGABRT), sleep)
        self._thread.start()

    def fail(self, kind: type[BaseException], error: BaseException | None) -> None:
        """Reports an uncaught exception of this process to the others.

        Args:
          kind: Type of the exception.
          error: The exception.
        """
        text = " ".join(str(error).split())
        text = text if len(text) < 500 else text[:500] + "..."
        # An exception such as "Gloo: connection closed by peer" may be a consequence of
        # another process's end, which the watch learns about within a moment.
        self._heard.wait(0.5)
        self._own_failure = not self.reason
        self._tell(
            f"process {self.rank} raised {kind.__name__}{': ' * bool(text)}{text}"
        )

    def leave(self) -> None:
        """Waits at exit until all processes have ended, or the job has failed."""
        failed = True
        try:
            if not self.reason and self._thread.is_alive():
                self._ended = True
                if self.rank:
                    self._send(0, {**calls.state(), "ended": True})
                self._over.wait()
            failed = bool(self.reason)
            self._explain()
            if failed:
                self._outlast()
        finally:
            if failed:
                _abandon()

    def _outlast(self) -> None:
        """Delays this process's end until after that of the process that failed.

        A launcher returns the exit code that it sees first. Process 0 also waits for
        all other processes, because the end of its coordinator would abort them.
        """
        deadline = time.monotonic() + GRACE / 2
        while self.rank == 0 and self._sockets and time.monotonic() < deadline:
            for rank, connection in list(self._sockets.items()):
                if _drained(connection):
                    self._sockets.pop(rank, None)
            time.sleep(0.05)
        if not (self._own_failure or self._ended):
            time.sleep(HEAD_START / 2)

    def _close(self) -> None:
        """Closes all connections, in a forked child."""
        for connection in self._sockets.values():
            connection.close()
        self._sockets = {}

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        """Sends a message, or nothing if the connection is closed."""
        with self._lock, contextlib.suppress(OSError, KeyError):
            self._sockets[rank].sendall(_line(message))

    def _tell(self, reason: str) -> None:
        """Tells the other processes that the job has failed.

        Only the first reason counts.

        Args:
          reason: Why the job has failed, as a clause without a period.
        """
        if self.reason:
            return
        self.reason = reason
        self._heard.set()
        for rank in list(self._sockets):
            self._send(rank, {"failed": reason})

    def _run(self) -> None:
        """Sends and receives states until all processes end or the job fails.

        The thread runs this function.
        """
        if self.rank == 0:
            self._await_coordinator()
        beat = min(1.0, self.timeout / 5)  # seconds between two messages
        self._seen = dict.fromkeys(self._sockets, time.monotonic())
        rest = dict.fromkeys(self._sockets, b"")  # incomplete lines
        with selectors.DefaultSelector() as selector:
            for rank, connection in list(self._sockets.items()):
                selector.register(connection, selectors.EVENT_READ, rank)
            due = last = time.monotonic()
            while not self.reason:
                # Send this process's own state at regular intervals.
                if time.monotonic() >= due:
                    due = time.monotonic() + beat
                    own = {**calls.state(), "ended": self._ended}
                    self._note(self.rank, own)
                    for rank in list(self._sockets):
                        self._send(rank, own)
                # Receive the states of other processes.
                for key, _ in selector.select(min(beat, 0.2)):
                    rank = key.data
                    self._seen[rank] = time.monotonic()
                    try:
                        data = self._sockets[rank].recv(65536)
                    except (OSError, KeyError):
                        data = b""
                    # No data means that the process has closed the connection.
                    if not data:
                        selector.unregister(key.fileobj)
                        self._tell(
                            f"process {rank} ended without an exception, as if it was "
                            "killed, ran out of memory or called os._exit"
                        )
                        break
                    *lines, rest[rank] = (rest[rank] + data).split(b"\n")
                    for line in lines:
                        self._note(rank, json.loads(line))
                if self._over.is_set():
                    return
                last, before = time.monotonic(), last
                if last - before > 3 * beat + 1:
                    # This process was stopped, maybe together with the others, so their
                    # silence means nothing: restart all clocks.
                    self._seen = dict.fromkeys(self._seen, last)
                    self._since = dict.fromkeys(self._since, last)
                # Report processes that have been silent for too long.
                for rank, when in self._seen.items():
                    silent = time.monotonic() - when
                    if silent > self.timeout + 2 * beat:
                        self._tell(
                            f"process {rank} has not been heard from for {silent:.0f} "
                            "seconds: it is stopped, or the network to it is down"
                        )
                if self.rank == 0:
                    self._judge()
                if self._over.is_set():
                    # From now on, connections close because processes end.
                    return
        self._end_process()

    def _await_coordinator(self) -> None:
        """Waits for JAX's coordinator, and then lets the other processes continue.

        Only process 0 calls this function. If the others continued earlier, they would
        have to retry their connections to the coordinator.
        """
        host, port = self._coordinator
        host = {"::": "localhost", "0.0.0.0": "127.0.0.1", "": "localhost"}.get(
            host, host
        )
        deadline = time.monotonic() + min(10.0, self.timeout)
        while time.monotonic() < deadline and not self.reason:
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), timeout=1).close()
                break
            time.sleep(0.01)
        for rank in list(self._sockets):
            self._send(rank, {"go": True})

    def _note(self, rank: int, message: dict[str, Any]) -> None:
        """Records a message of a process.

        Args:
          rank: The process.
          message: That the job has failed, that it is over, or the process's state.
        """
        if "failed" in message:
            if self.rank == 0:
                self._tell(message["failed"])
            self.reason = self.reason or message["failed"]
            self._heard.set()
        elif "over" in message:
            self._over.set()
        elif self._said.get(rank) != message:
            self._said[rank] = message
            self._since[rank] = time.monotonic()

    def _judge(self) -> None:
        """Decides whether the job is over or stuck, in process 0.

        The job is stuck if one process waits in a call that another process does not
        make within the timeout.
        """
        said, now = dict(self._said), time.monotonic()
        if len(said) == self.processes and all(s["ended"] for s in said.values()):
            for rank in list(self._sockets):
                self._send(rank, {"over": True})
            self._over.set()
            return
        # Compare each waiting process with every other process.
        for waits, a in said.items():
            if not a["waiting"]:
                continue
            for other, b in said.items():
                # Both processes must have been in their states for the whole time.
                limit = min(self.timeout, ENDED) if b["ended"] else self.timeout
                if min(now - self._since[waits], now - self._since[other]) < limit:
                    continue
                last = f"call {b['count']} ({b['name']})" if b["count"] else "no call"
                late = (
                    f"process {other} did not reach call {a['count']} ({a['name']}) "
                    f"within {limit:g} seconds, but process {waits} waits in it; "
                    f"process {other}"
                )
                # The other process has not reached the call, or is in another one.
                if b["count"] < a["count"] and not b["waiting"]:
                    how = "ended" if b["ended"] else "runs other code"
                    if now - self._seen.get(other, now) > self.timeout / 2:
                        how = "no longer answers"
                    self._tell(f"{late} {how} after {last}")
                elif b["count"] == a["count"] and b["name"] != a["name"]:
                    self._tell(f"{late} waits in {last}")

    def _explain(self) -> None:
        """Prints why this process ends, once, if another process is the reason."""
        with self._lock:
            if self._own_failure or self._explained or not self.reason:
                return
            self._explained = True
        reason = self.reason.removesuffix(".")
        text = f"decentral_jax: process {self.rank} ends because {reason}.\n"
        # Write to the file descriptor: the main thread may hold the lock of
        # `sys.stderr`.
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def _end_process(self) -> None:
        """Ends this process after the job has failed."""
        if self._own_failure:
            time.sleep(GRACE)
            os._exit(1)
        if not self._ended:
            time.sleep(HEAD_START)
            self._outlast()
        self._explain()
        if self._ended:
            # The main thread has reached its end: let it exit with its own code.
            self._over.set()
            time.sleep(GRACE)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(1)


def _drained(connection: socket.socket) -> bool:
    """Reads all pending data, and returns whether the other side has closed."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def _abandon() -> None:
    """Lets this process exit without JAX's shutdown, which waits for all processes."""
    from jax._src import api, dispatch, xla_bridge
    from jax._src.distributed import global_state

    atexit.unregister(api.clean_up)
    atexit.unregister(dispatch.wait_for_tokens)
    # Keep these objects alive forever, because their destructors would wait, too.
    state: Any = global_state
    parts = state.client, state.service, state.preemption_sync_manager
    for kept in (*parts, *getattr(xla_bridge, "_backends", {}).values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    # Exit after GRACE seconds even if Python's own finalization hangs. This timer does
    # not need the interpreter.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    faulthandler.dump_traceback_later(GRACE, exit=True, file=nowhere)
    # glibc passes the exit code to `on_exit` handlers. Register `_exit`, which ends the
    # process before the destructors of C++ libraries, which wait for their threads.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


_watch: Watch | None = None


def begin(watch: Watch) -> None:
    """Starts a watch and makes it the only one of this process."""
    global _watch
    _watch = watch
    watch.start()


@atexit.register
def _leave() -> None:
    # The import of JAX above has registered JAX's own handler. Handlers run in reverse
    # order, so this one runs first.
    if _watch is not None:
        _watch.leave()
