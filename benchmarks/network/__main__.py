"""Measures algorithms on a network of known bandwidth: time, bytes, and link use.

`python -m benchmarks.network`, as root, creates eight hosts (network namespaces on a
bridge, with links limited by `tc tbf`) with one JAX process each. For each bandwidth,
the benchmark

1. trains a model with one million parameters on digits to a target test accuracy, with
   the best learning rate of each algorithm, and compares the seconds with those of
   all-reduce SGD in JAX (column "speedup"). It also runs PyTorch DDP and Decent-DP, if
   `--torch-python` names an interpreter with these packages; they use the learning rate
   and the number of steps of the corresponding algorithm in JAX.
2. compares the kernel's counters with `communication_cost`. The printed bytes include
   all headers. The "payload" excludes 66 bytes of headers per packet, but includes the
   data that gloo and the coordinator add.
3. exchanges messages without training, through JAX and through plain sockets, and
   measures how much of the link's bandwidth they use.

All hosts share the cores of this machine, so that computation is slower than on real
hosts, equally for all rows. The number of steps to the target does not depend on the
network. If a run would take longer than `--longest`, its time is extrapolated from the
first steps and marked with "~". A run that misses the target by more than one
percentage point is marked with "!".
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
FEW = 6  # minimum number of timed steps; at least one period of messages is timed
REPEATS = 3  # number of timed exchanges per message
# Programs of other projects: the module that they need, and the algorithm in JAX whose
# rate, number of steps, and predicted bytes apply to them.
PEERS = {
    "PyTorch DDP": ("torch", "all-reduce"),
    "Decent-DP ring": ("decent_dp", "D-PSGD one-peer"),
    "Decent-DP one-peer-exp": ("decent_dp", "D-PSGD one-peer"),
}


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument(
        "--mbit",
        type=float,
        nargs="+",
        default=[100, 1000, 0, 10],
        help="0 for no limit",
    )
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy")
    parser.add_argument("--every", type=int, default=8, help="steps per evaluation")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds per run")
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
        "workers (rates tuned on one device)"
    )
    steps = algorithms.steps_to(options.target, options.hosts, options.every)
    for name, (rate, count) in steps.items():
        print(f"  {name:<20} rate {rate:<5g} {count or 'never'} steps")
    # Other programs run only if their modules are installed.
    found = modules(options.torch_python, "torch", "decent_dp")
    for module, there in found.items():
        if not there:
            print(f"{module} is not installed in {options.torch_python}: rows omitted")
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
            # The baseline of the PyTorch rows: the first row of JAX, all-reduce.
            seconds = rows[-len(steps)]["seconds"]
            torch = options.torch_python, "torch_host.py", f"{folder}/data.npz"
            if peers:
                with _started(hosts, *torch) as group:
                    rows += _train(group, hosts, peers, mbit, options, seconds)
            output.csv("network", rows)
            output.csv("messages", messages)
    figure.draw(rows, options.out / "network.png")
    print(f"\nWrote network.csv, messages.csv and network.png to {options.out}.")


def _end(*_) -> None:
    """Exits by an exception, so that the network is removed; ignores later signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


@contextlib.contextmanager
def _started(
    hosts: Hosts, python: str, script: str, *arguments: str
) -> Iterator[Group]:
    """Runs one process per host within a `with` block."""

    def command(rank):
        return hosts.inside(rank, python, str(HERE / script), *arguments)

    address = hosts.address(0), PORT
    hosts.limit(None)
    # Decent-DP logs a message at every start.
    variables = {**ENVIRONMENT, "LOGURU_LEVEL": "WARNING"}
    group = Group(command, hosts.number, address, "eth0", variables, a_host=1)
    try:
        yield group
    finally:
        group.close()


class Measured(NamedTuple):
    """Time and traffic per step."""

    seconds: float
    sent: float  # bytes sent per host, averaged over hosts, with all headers
    payload: float  # bytes sent per host without packet headers
    use: float  # fraction of the link's capacity; nan without a limit

    def columns(self, predicted: float) -> str:
        """Formats bytes sent, predicted bytes, their ratio, and the link use."""
        return (
            f"{self.sent / 1e6:8.3f}  {predicted / 1e6:8.3f}  "
            f"{self.payload / predicted:7.3f}  "
            + (f"{100 * self.use:3.0f} %" if self.use == self.use else "")
        )


def _limited(hosts, mbit, number, measure) -> Measured:
    """Limits the links only while it measures, so that all other phases are fast.

    Args:
      hosts: The network.
      mbit: Bandwidth of the links in Mbit/s; 0 for no limit.
      number: Number of steps.
      measure: Function that runs a number of steps and returns the seconds.
    """
    hosts.limit(mbit or None)
    before = hosts.sent()
    seconds = measure(number)
    sent, packets = (hosts.sent() - before).mean(1) / number
    hosts.limit(None)
    # Subtract the packet headers that the kernel counts, add the headers of all frames
    # on the link, and divide by what the link could have transmitted.
    payload, use = sent - HEADERS * packets, np.nan
    if mbit:
        frames = number * payload * (FRAME + HEADERS) / FRAME
        use = frames / (mbit * 1e6 / 8 * seconds + burst(mbit))
    return Measured(seconds / number, sent, payload, use)


def _train(group, hosts, steps, mbit, options, baseline=np.nan) -> list[dict]:
    """Trains each algorithm; prints one row per algorithm and returns the rows."""
    print(
        f"  {'':<22} ms/step  s to target           speedup   MB sent  computed  "
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
        # Train to the target if that does not take too long, else extrapolate.
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
    """Exchanges messages without training; prints one row per message and returns them.

    Args:
      group: Processes of the hosts.
      hosts: The network.
      kinds: Dictionary from printed names to keys of `algorithms.exchanges`.
      mbit: Bandwidth of the links in Mbit/s; 0 for no limit.
      options: Options of the command line. Exchanges that would take longer than
        `longest` are omitted.
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
