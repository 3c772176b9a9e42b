"""Hosts as network namespaces on a bridge, with links limited by `tc tbf`.

This module requires root. All names of devices and namespaces begin with "djx", and all
of them are removed at the end.
"""

import os
import subprocess
from pathlib import Path

import numpy as np

BRIDGE = "djxbr"
SUBNET = "10.213.87"
# Maximum time that packets wait for a link, as in the queue of a switch. With 100 ms,
# acknowledgments waited behind data, and TCP lost a quarter of the bandwidth.
QUEUE = "20ms"
# Bytes of headers per packet: Ethernet 14, IP 20, and TCP 32 with timestamps.
HEADERS = 66
# Bytes of a frame without its headers. The kernel passes on several frames together if
# possible, and counts their headers only once, whereas the rate limit counts the
# headers of every frame.
FRAME = 1448


def burst(megabits: float) -> int:
    """Returns the number of bytes that an idle link transmits without delay.

    If the kernel is late with a packet because the cores are busy, the burst makes up
    for the lost time, up to this size. With a burst of 2 ms at full rate, eight hosts
    on two cores reached 74 % of 100 Mbit/s through plain sockets, and 90 % with 10 ms.
    """
    return int(np.clip(megabits * 1e6 / 8 * 0.01, 16_384, 262_144))


class Hosts:
    """Context manager of hosts on one switch.

    Args:
      number: Number of hosts, at most 200.

    Raises:
      PermissionError: If the process does not run as root.
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
            # Inside the namespace, the name of the machine resolves to this host.
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(
                f"127.0.0.1 localhost\n{self.address(i)} {os.uname().nodename}\n"
            )

    def __exit__(self, *_: object) -> None:
        for i in range(self.number):
            # Delete the link too: a namespace exists as long as a process is in it.
            _run("ip link del", f"djxv{i}", check=False)
            _run("ip netns del", f"djx{i}", check=False)
            hosts = Path("/etc/netns") / f"djx{i}" / "hosts"
            hosts.unlink(missing_ok=True)
            if hosts.parent.is_dir():
                hosts.parent.rmdir()
        _run("ip link del", BRIDGE, check=False)

    def address(self, i: int) -> str:
        """Returns the IP address of host i."""
        return f"{SUBNET}.{i + 1}"

    def inside(self, i: int, *command: str) -> list[str]:
        """Returns a command line that runs a command on host i."""
        return ["ip", "netns", "exec", f"djx{i}", *command]

    def limit(self, megabits: float | None) -> None:
        """Limits each link in both directions, in Mbit/s; None removes the limit."""
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
        """Reads the kernel's counters of bytes and packets sent, `[2, hosts]`.

        The bytes include `HEADERS` bytes of Ethernet, IP, and TCP headers per packet.
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
