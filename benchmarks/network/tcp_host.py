"""One host of the network benchmark with plain sockets instead of JAX.

Each host sends to the next one and receives from the previous one, like `dj.mix` on a
directed ring.
"""

import socket
import sys
import threading
import time

from benchmarks.support.answers import RANK, SIZE, obey

ADDRESSES, PORT = sys.argv[1:], 29_778


class Exchange:
    """Exchange of one message of `entries` float32 entries around the ring."""

    def __init__(self, kind: str, entries: int):
        assert kind == "message"
        self.out = bytes(4 * entries)
        self.into = memoryview(bytearray(4 * entries))
        self.run(1)

    def run(self, steps: int) -> float:
        """Runs some exchanges, and returns the seconds that they take."""
        start = time.perf_counter()
        for _ in range(steps):
            sending = threading.Thread(target=NEXT.sendall, args=(self.out,))
            sending.start()
            done = 0
            while done < len(self.into):
                done += BEFORE.recv_into(self.into[done:])
            sending.join()
        return time.perf_counter() - start


def _connected() -> tuple[socket.socket, socket.socket]:
    """Returns sockets to the next host and from the previous host."""
    server = socket.create_server((ADDRESSES[RANK], PORT))
    server.settimeout(60)
    for attempt in range(600):
        try:
            to = socket.create_connection((ADDRESSES[(RANK + 1) % SIZE], PORT))
            break
        except ConnectionRefusedError:
            if attempt == 599:
                raise
            time.sleep(0.1)
    return to, server.accept()[0]


if __name__ == "__main__":
    NEXT, BEFORE = _connected()
    obey({"exchange": Exchange})
