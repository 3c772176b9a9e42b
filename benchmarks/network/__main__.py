"""Algorithms on a network of known bandwidth: time, bytes, use of the link.

`python -m benchmarks.network` as root makes eight hosts (network namespaces on a
bridge, links limited by `tc tbf`), one JAX process each, and per bandwidth

1. trains a model of a million parameters on digits to a test accuracy, with each
   algorithm at its best rate: seconds, against dense all-reduce through JAX and through
   PyTorch DDP (`--torch-python`, an interpreter with torch);
2. compares the kernel's counters of bytes with `communication_cost`;
3. sends messages alone: how much of the link do they use?

All hosts share this machine's cores, so that computing is slower than on real ones: it
is the same for all rows. Steps to the target do not depend on the network; where a run
would take longer than `--longest`, its time is computed from its steps and the time of
the first ones, and marked with "~".
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.group import ENVIRONMENT, Group
from benchmarks.multi_process import modules
from benchmarks.network import algorithms, tasks
from benchmarks.network.namespaces import Hosts
from benchmarks.timing import machine

HERE = Path(__file__).parent
PORT = 29_777
FEW = 16  # steps that are always timed
REPEATS = 3  # exchanges of a message alone
DDP = "PyTorch DDP"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=[10, 100, 1000, 0], help="0: no limit"
    )
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy")
    parser.add_argument("--every", type=int, default=8, help="steps to an evaluation")
    parser.add_argument("--longest", type=float, default=120.0, help="seconds a run")
    parser.add_argument("--messages", type=float, nargs="+", default=[1e6, 4e6])
    parser.add_argument("--torch-python", default=sys.executable)
    options = parser.parse_args()
    # So that the network is removed in this case, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(machine())
    print(
        f"\nSteps to {100 * options.target:g} % at the best rate, {options.hosts} "
        "workers (tuned on one device)"
    )
    steps = algorithms.steps_to(options.target, options.hosts, options.every)
    for name, (rate, count) in steps.items():
        print(f"  {name:<20} rate {rate:<5g} {count or 'never'} steps")
    has_torch = modules(options.torch_python, "torch")["torch"]
    if not has_torch:
        print(f"torch is not installed in {options.torch_python}: rows left out.")
    with Hosts(options.hosts) as hosts, tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/data.npz", **dict(zip("abcd", tasks.load(), strict=True)))
        for mbit in options.mbit:
            hosts.limit(None)
            print(f"\n== {f'{mbit:g} Mbit/s' if mbit else 'no limit'}", flush=True)
            group = _start(hosts, sys.executable, "jax_host.py")
            try:
                baseline = _train(group, hosts, steps, mbit, options)
                _wire(group, hosts, mbit, options)
            finally:
                group.close()
            if has_torch:
                group = _start(
                    hosts, options.torch_python, "torch_host.py", f"{folder}/data.npz"
                )
                try:
                    same = {DDP: steps["all-reduce"]}
                    _train(group, hosts, same, mbit, options, baseline)
                finally:
                    group.close()


def _start(hosts: Hosts, python: str, script: str, *arguments: str) -> Group:
    def command(rank):
        return hosts.inside(rank, python, str(HERE / script), *arguments)

    address = hosts.address(0), PORT
    return Group(command, hosts.number, address, "eth0", ENVIRONMENT)


def _limited(hosts, mbit, measure):
    """Measures with the limit on, so that all else goes fast."""
    hosts.limit(mbit or None)
    before = np.array(hosts.bytes_sent())
    seconds = measure()
    sent = (np.array(hosts.bytes_sent()) - before).mean()
    hosts.limit(None)
    return seconds, sent


def _train(group, hosts, steps, mbit, options, baseline=None) -> float:
    """Prints a row an algorithm; returns dense all-reduce's seconds to the target."""
    print(
        f"  {'':<20} ms/step  s to target  all-reduce's/its  MB/step sent  computed  "
        "ratio  link"
    )
    for name, (rate, count) in steps.items():
        group.ask("training", name, rate)

        def run(number):
            return max(group.ask("run", number))

        few, sent = _limited(hosts, mbit, lambda: run(FEW))
        sent /= FEW
        each, mark = few / FEW, " "
        if count is None:
            total = np.nan
        elif each * count > options.longest:
            total, mark = each * count, "~"
        else:
            group.ask("restart")
            total = 0.0
            for _ in range(count // options.every):
                seconds, _ = _limited(hosts, mbit, lambda: run(options.every))
                total += seconds
            reached = group.ask("accuracy")[0]
            mark = " " if reached >= options.target - 0.01 else "!"
        baseline = total if name == "all-reduce" else baseline
        predicted = algorithms.predicted(
            name if name != DDP else "all-reduce", hosts.number
        )
        link = f"{100 * sent * 8 / (mbit * 1e6) / each:3.0f} %" if mbit else ""
        print(
            f"  {name:<20} {1e3 * each:7.1f}  {total:10.2f}{mark}  "
            f"{(baseline or np.nan) / total:16.2f}  {sent / 1e6:12.3f}  "
            f"{predicted / 1e6:8.3f}  {sent / predicted:5.3f}  {link}",
            flush=True,
        )
    return baseline or np.nan


def _wire(group, hosts, mbit, options) -> None:
    """Prints what messages alone take."""
    print("  messages alone       MB       ms       MB sent  computed  ratio  link")
    for entries in options.messages:
        for kind in ("message", "all-reduce", "D-GraB"):
            entries = int(entries)
            group.ask("exchange", kind, entries)
            seconds, sent = _limited(
                hosts, mbit, lambda: max(group.ask("run", REPEATS))
            )
            seconds, sent = seconds / REPEATS, sent / REPEATS
            predicted = algorithms.predicted_exchange(kind, hosts.number, entries)
            link = f"{100 * sent * 8 / (mbit * 1e6) / seconds:3.0f} %" if mbit else ""
            print(
                f"  {kind:<15} {4 * entries / 1e6:7.1f}  {1e3 * seconds:7.1f}  "
                f"{sent / 1e6:8.3f}  {predicted / 1e6:8.3f}  {sent / predicted:5.3f}  "
                f"{link}",
                flush=True,
            )


if __name__ == "__main__":
    main()
