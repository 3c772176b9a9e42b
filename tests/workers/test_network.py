"""The benchmark's network: hosts, rate limits, counters, and cleanup."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.network import namespaces

RECEIVE = """
import socket, time
with socket.create_server(("10.213.87.2", 7000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    begin, received = time.perf_counter(), 0
    while data := connection.recv(65536):
        received += len(data)
    print(received, time.perf_counter() - begin)
"""
SEND = """
import socket
with socket.create_connection(("10.213.87.2", 7000), 5) as connection:
    connection.sendall(bytes(2_000_000))
"""


def test_needs_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="need root"):
        namespaces.Hosts(2)


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))),
    reason="needs root, ip and tc",
)
def test_a_limited_link():
    with namespaces.Hosts(2) as hosts:
        hosts.limit(80)
        receiver = subprocess.Popen(
            hosts.inside(1, sys.executable, "-c", RECEIVE),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
            before = hosts.sent()
            subprocess.run(hosts.inside(0, sys.executable, "-c", SEND), check=True)
            out, _ = receiver.communicate(timeout=20)
        finally:
            receiver.kill()
        sent, packets = (hosts.sent() - before)[:, 0]
    received, seconds = out.split()
    assert received == "2000000"
    # The transfer takes 0.2 s at 80 Mbit/s, and a hundredth of that without a limit.
    assert float(seconds) > 0.15
    payload = sent - namespaces.HEADERS * packets
    assert 0.99 < payload / 2e6 < 1.05
    links = subprocess.run(["ip", "link"], capture_output=True, text=True).stdout
    assert "djx" not in links
    assert not list(Path("/etc/netns").glob("djx*"))
