"""Algorithms on a network of known bandwidth: time, bytes, use of the link.

`python -m benchmarks.network` as root makes eight hosts (network namespaces on a
bridge, links limited by `tc tbf`), one JAX process each, and per bandwidth

1. trains a model of a million parameters on digits to a test accuracy, with each
   algorithm at its best rate: seconds, against dense all-reduce through JAX, through
   PyTorch DDP and against Decent-DP (`--torch-python`, an interpreter with torch, and
   decent-dp), at the rates and steps of what they do in JAX;
2. compares the kernel's counters with `communication_cost`: bytes with all headers,
   and "payload", without 66 bytes of headers a packet but with what gloo and the
   coordinator add;
3. sends messages alone: how much of the link do they use, and how much of it do plain
   sockets use, without JAX?

All hosts share this machine's cores, so that computing is slower than on real ones: it
is the same for all rows. Steps to the target do not depend on the network; where a run
would take longer than `--longest`, its time is computed from its steps and the time of
the first ones, and marked with "~".
"""

import contextlib
import itertools
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.network import algorithms, figure, tasks
from benchmarks.network.namespaces import FRAME, HEADERS, Hosts, burst
from benchmarks.processes.multi_process import modules
from benchmarks.support import command
from benchmarks.support.group import ENVIRONMENT, Group
from benchmarks.support.timing import machine
from experiments import folders, report

HERE = Path(__file__).parent
PORT = 29_777
FEW = 6  # steps that are always timed, or as many as messages take to repeat
REPEATS = 3  # exchanges of a message alone
# Others' programs: the module they need, and what they send and train like.
PEERS = {
    "PyTorch DDP": ("torch", "all-reduce"),
    "Decent-DP ring": ("decent_dp", "D-PSGD one-peer"),
    "Decent-DP one-peer-exp": ("decent_dp", "D-PSGD one-peer"),
}


def main() -> None:
    """Measures and prints."""
    parser = command.parser(__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=[100, 1000, 0, 10], help="0: no limit"
    )
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy")
    parser.add_argument("--every", type=int, default=8, help="steps to an evaluation")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds a run")
    parser.add_argument(
        "--messages", type=float, nargs="+", default=[1e6, 4e6], help="entries"
    )
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--out", type=Path, help="new folder for the results")
    options = parser.parse_args()
    options.out = folders.claim("network", options)
    signal.signal(signal.SIGTERM, _end)
    print(machine())
    print(
        f"\nSteps to {100 * options.target:g} % at the best rate, {options.hosts} "
        "workers (tuned on one device)"
    )
    steps = algorithms.steps_to(options.target, options.hosts, options.every)
    for name, (rate, count) in steps.items():
        print(f"  {name:<20} rate {rate:<5g} {count or 'never'} steps")
    found = modules(options.torch_python, "torch", "decent_dp")
    for module, there in found.items():
        if not there:
            print(f"{module} is not installed in {options.torch_python}: rows left out")
    peers = {
        name: steps[like]
        for name, (module, like) in PEERS.items()
        if found["torch"] and found[module]
    }
    output = report.Output(options)
    rows, messages = [], []
    with Hosts(options.hosts) as hosts, tempfile.TemporaryDirectory() as folder:
        x, y, x_test, y_test = tasks.load()
        np.savez(f"{folder}/data.npz", a=x, b=y, c=x_test, d=y_test)
        for mbit in options.mbit:
            print(f"\n== {f'{mbit:g} Mbit/s' if mbit else 'no limit'}", flush=True)
            with _started(hosts, sys.executable, "jax_host.py") as group:
                rows += _train(group, hosts, steps, mbit, options)
                kinds = {kind: kind for kind in ("message", "all-reduce", "D-GraB")}
                messages += _wire(group, hosts, kinds, mbit, options)
            addresses = map(hosts.address, range(hosts.number))
            with _started(hosts, sys.executable, "tcp_host.py", *addresses) as group:
                plain = {"plain sockets": "message"}
                messages += _wire(group, hosts, plain, mbit, options)
            seconds = rows[-len(steps)]["seconds"]  # of the first, all-reduce
            torch = options.torch_python, "torch_host.py", f"{folder}/data.npz"
            if peers:
                with _started(hosts, *torch) as group:
                    rows += _train(group, hosts, peers, mbit, options, seconds)
            output.csv("network", rows)
            output.csv("messages", messages)
    figure.draw(rows, options.out / "network.png")
    print(f"\nWrote network.csv, messages.csv and network.png to {options.out}.")


def _end(*_) -> None:
    """Ends by an exception, so that the network is removed; once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


@contextlib.contextmanager
def _started(
    hosts: Hosts, python: str, script: str, *arguments: str
) -> Iterator[Group]:
    """One process a host."""

    def command(rank):
        return hosts.inside(rank, python, str(HERE / script), *arguments)

    address = hosts.address(0), PORT
    hosts.limit(None)
    # Decent-DP logs every start.
    variables = {**ENVIRONMENT, "LOGURU_LEVEL": "WARNING"}
    group = Group(command, hosts.number, address, "eth0", variables, a_host=1)
    try:
        yield group
    finally:
        group.close()


class Measured(NamedTuple):
    """What a number of steps took, a step."""

    seconds: float
    sent: float  # bytes of a host, on average, with all headers
    payload: float  # bytes without headers of packets
    use: float  # part of what the link would have let pass; nan without a limit

    def columns(self, predicted: float) -> str:
        """Bytes sent, computed, payload to computed, and the use of the link."""
        return (
            f"{self.sent / 1e6:8.3f}  {predicted / 1e6:8.3f}  "
            f"{self.payload / predicted:7.3f}  "
            + (f"{100 * self.use:3.0f} %" if self.use == self.use else "")
        )


def _limited(hosts, mbit, number, measure) -> Measured:
    """Measures with the limit on, so that all else goes fast."""
    hosts.limit(mbit or None)
    before = hosts.sent()
    seconds = measure(number)
    sent, packets = (hosts.sent() - before).mean(1) / number
    hosts.limit(None)
    payload, use = sent - HEADERS * packets, np.nan
    if mbit:
        frames = number * payload * (FRAME + HEADERS) / FRAME
        use = frames / (mbit * 1e6 / 8 * seconds + burst(mbit))
    return Measured(seconds / number, sent, payload, use)


def _train(group, hosts, steps, mbit, options, baseline=np.nan) -> list[dict]:
    """Prints a row an algorithm, and returns them."""
    print(
        f"  {'':<22} ms/step  s to target  all-reduce's/its   MB sent  computed  "
        "payload/computed  link"
    )
    rows = []
    for name, (rate, count) in steps.items():
        group.ask("training", name, rate)

        def run(number):
            return max(group.ask("run", number))

        _, like = PEERS.get(name, (None, name))
        costs = algorithms.costs(like, hosts.number)
        number, predicted = max(FEW, len(costs)), costs.bytes_per_step
        few = _limited(hosts, mbit, number, run)
        total, mark = few.seconds * (count or np.nan), "~"
        if total <= options.longest:
            group.ask("restart")
            total = sum(
                options.every * _limited(hosts, mbit, options.every, run).seconds
                for _ in range(count // options.every)
            )
            reached = group.ask("accuracy")[0]
            mark = " " if reached >= options.target - 0.01 else "!"
        if name == "all-reduce":
            baseline = total
        print(
            f"  {name:<22} {1e3 * few.seconds:7.1f}  {total:10.2f}{mark}  "
            f"{baseline / total:16.2f}  {few.columns(predicted)}",
            flush=True,
        )
        rows.append(
            {
                "mbit": mbit,
                "name": name,
                "rate": rate,
                "steps": count,
                "seconds_a_step": few.seconds,
                "seconds": total,
                "bytes_sent": few.sent,
                "payload": few.payload,
                "computed": predicted,
                "use": few.use,
            }
        )
    return rows


def _wire(group, hosts, kinds, mbit, options) -> list[dict]:
    """Prints a row a message alone, and returns them.

    Args:
      group: The hosts' processes.
      hosts: The network.
      kinds: From what is printed to a name in `algorithms.exchanges`.
      mbit: The links' rate.
      options: The command line's. What would take longer than `longest` is left out.
    """
    print(
        "  messages alone       MB       ms   MB sent  computed  payload/computed  link"
    )
    rows = []
    for entries, name in itertools.product(map(int, options.messages), kinds):
        kind = kinds[name]
        predicted = algorithms.predicted_exchange(kind, hosts.number, entries)
        if mbit and REPEATS * 8 * predicted / (mbit * 1e6) > options.longest:
            continue
        group.ask("exchange", kind, entries)
        measured = _limited(
            hosts, mbit, REPEATS, lambda number: max(group.ask("run", number))
        )
        megabytes, milliseconds = 4 * entries / 1e6, 1e3 * measured.seconds
        print(
            f"  {name:<15} {megabytes:7.1f}  {milliseconds:7.1f}  "
            f"{measured.columns(predicted)}",
            flush=True,
        )
        rows.append(
            {
                "mbit": mbit,
                "name": name,
                "megabytes": megabytes,
                "milliseconds": milliseconds,
                "payload": measured.payload,
                "computed": predicted,
                "use": measured.use,
            }
        )
    return rows


if __name__ == "__main__":
    command.run(main)
