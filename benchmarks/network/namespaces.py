"""Hosts as network namespaces on a bridge, with links limited by `tc tbf`.

Needs root. All names begin with "djx"; everything is removed at the end.
"""

import os
import subprocess
from pathlib import Path

import numpy as np

BRIDGE = "djxbr"
SUBNET = "10.213.87"
# What may wait for a link, as a switch holds it; with 100 ms, TCP lost a quarter of the
# link to acknowledgements that waited behind data.
QUEUE = "20ms"
# Ethernet 14, IP 20, TCP 32 with time stamps.
HEADERS = 66
# Bytes of a frame beside its headers. The kernel hands on many frames at once where it
# can, and counts their headers once; the limit takes each frame with its headers.
FRAME = 1448


def burst(megabits: float) -> int:
    """Bytes that a link lets pass at once when it has been idle.

    What a link could have sent while the kernel was late with the next packet, as the
    cores had other things to do, is made up for out of these; all else is lost. With
    2 ms of the rate eight hosts on two cores got 74 % of 100 Mbit/s through plain
    sockets, with 10 ms 90 %.
    """
    return int(np.clip(megabits * 1e6 / 8 * 0.01, 16_384, 262_144))


class Hosts:
    """Some hosts on one switch; a context manager.

    Args:
      number: How many, at most 200.

    Raises:
      PermissionError: Without root.
    """

    def __init__(self, number: int):
        if os.geteuid() != 0:
            raise PermissionError(
                "network namespaces need root: run this benchmark as root."
            )
        self.number = number

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        _run("ip link add name", BRIDGE, "type bridge")
        _run("ip link set", BRIDGE, "up")
        for i in range(self.number):
            name, outer = f"djx{i}", f"djxv{i}"
            _run("ip netns add", name)
            _run("ip link add", outer, "type veth peer name eth0 netns", name)
            _run("ip link set", outer, "master", BRIDGE, "up")
            _run("ip -n", name, "addr add", f"{self.address(i)}/24 dev eth0")
            _run("ip -n", name, "link set eth0 up")
            _run("ip -n", name, "link set lo up")
            # Inside, the machine's own name means the host's address.
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(
                f"127.0.0.1 localhost\n{self.address(i)} {os.uname().nodename}\n"
            )

    def __exit__(self, *_: object) -> None:
        for i in range(self.number):
            # Both, since a namespace lasts as long as a process in it.
            _run("ip link del", f"djxv{i}", check=False)
            _run("ip netns del", f"djx{i}", check=False)
            hosts = Path("/etc/netns") / f"djx{i}" / "hosts"
            hosts.unlink(missing_ok=True)
            if hosts.parent.is_dir():
                hosts.parent.rmdir()
        _run("ip link del", BRIDGE, check=False)

    def address(self, i: int) -> str:
        """Host i's address."""
        return f"{SUBNET}.{i + 1}"

    def inside(self, i: int, *command: str) -> list[str]:
        """A command line that runs on host i."""
        return ["ip", "netns", "exec", f"djx{i}", *command]

    def limit(self, megabits: float | None) -> None:
        """Limits each link, both ways, to so many Mbit/s; None for no limit."""
        for i in range(self.number):
            ends = ("eth0", ("-n", f"djx{i}")), (f"djxv{i}", ())
            for device, where in ends:
                at = " ".join(("tc", *where, "qdisc"))
                _run(at, "del dev", device, "root", check=False)
                if megabits is not None:
                    _run(
                        *(at, "add dev", device, "root tbf rate"),
                        f"{megabits}mbit burst {burst(megabits)} latency {QUEUE}",
                    )

    def sent(self) -> np.ndarray:
        """Bytes with all headers, and packets, that each host has sent, `[2, hosts]`.

        By the kernel's counters; a packet has 66 bytes of Ethernet, IP and TCP headers.
        """
        counter = "/sys/class/net/djxv{}/statistics/rx_{}"
        return np.array(
            [
                [
                    int(Path(counter.format(i, what)).read_text())
                    for i in range(self.number)
                ]
                for what in ("bytes", "packets")
            ]
        )


def _run(*words: str, check: bool = True) -> None:
    subprocess.run(" ".join(words).split(), check=check, capture_output=not check)
