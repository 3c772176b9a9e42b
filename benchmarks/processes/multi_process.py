"""Compares this library, PyTorch DDP, and Decent-DP across processes in one run.

`python -m benchmarks.processes.multi_process [gossip|compression|ordering]` starts four
JAX processes and four PyTorch processes on this machine, which communicate over
loopback. The variants take turns: in each round, every variant trains for a few steps
while the others sleep. A step consists of forward pass, backward pass, and update of a
ReLU MLP in float32, with batch size 16 per process.

All processes have one compute thread and an allocator that retains memory
(`benchmarks.support.group.ENVIRONMENT`), unless `--default-environment` is given.

`--torch-python` is a Python interpreter with torch and decent-dp. If a package is
missing, the benchmark prints a message and omits its rows.

"ordering" trains no model and runs only in JAX: each process exchanges four gradients
with `--params` entries (D-GraB), or averages one such gradient.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.support import command
from benchmarks.support.group import ENVIRONMENT, Group

HERE = Path(__file__).parent
# Hidden widths of the MLP 784-H-H-H-10, by approximate number of parameters.
WIDTHS = {1_000_000: 560, 10_000_000: 2048}

# Variants to time in each part of the benchmark.
GOSSIP_JAX = (
    "none",
    "all_reduce_sgd",
    "d_psgd one-peer ring",
    "d_psgd one-peer exponential",
    "d_psgd ring",
    "by hand ring",
)
GOSSIP_TORCH = ("none", "DDP")
DECENT_DP = ("Decent-DP ring", "Decent-DP exp")
COMPRESSION_JAX = (
    "none, momentum",
    "all_reduce_sgd, momentum",
    "DEF, ratio 64",
    "EF, ratio 64",
    "EF, sign",
    "PowerSGD, rank 4",
)
ORDERING_JAX = ("one all-reduce", "D-GraB", "D-GraB, sketch 4096", "D-GraB, gathered")
COMPRESSION_TORCH = ("none, momentum", "DDP, momentum")

JAX = {"gossip": GOSSIP_JAX, "compression": COMPRESSION_JAX, "ordering": ORDERING_JAX}
TORCH = {
    "gossip": GOSSIP_TORCH,
    "compression": COMPRESSION_TORCH,
}

# Pairs of variants whose ratios of times are printed.
PAIRS = (
    ("jax: d_psgd ring", "jax: by hand ring"),
    ("jax: none", "torch: none"),
    ("jax: all_reduce_sgd", "torch: DDP"),
    ("jax: d_psgd one-peer ring", "torch: Decent-DP ring"),
    ("jax: d_psgd one-peer exponential", "torch: Decent-DP exp"),
    ("jax: d_psgd ring", "torch: DDP"),
    ("jax: DEF, ratio 64", "jax: none, momentum"),
    ("jax: DEF, ratio 64", "jax: all_reduce_sgd, momentum"),
    ("jax: DEF, ratio 64", "torch: DDP, momentum"),
    ("jax: EF, ratio 64", "jax: none, momentum"),
    ("jax: EF, sign", "jax: none, momentum"),
    ("jax: PowerSGD, rank 4", "jax: none, momentum"),
    ("jax: D-GraB", "jax: one all-reduce"),
    ("jax: D-GraB, sketch 4096", "jax: one all-reduce"),
    ("jax: D-GraB, gathered", "jax: one all-reduce"),
)


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=tuple(JAX), nargs="?", default="gossip")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--params", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--default-environment", action="store_true")
    options = parser.parse_args()
    print(f"{options.processes} processes, {os.cpu_count()} cores, batch 16 each")
    for size in options.params:
        _compare(int(size), options)


def _compare(size: int, options: argparse.Namespace) -> None:
    names = TORCH.get(options.what, ())
    width = WIDTHS[size] if names else size
    torch_has = modules(options.torch_python, "torch", "decent_dp") if names else {}
    variables = {} if options.default_environment else ENVIRONMENT

    def start(python, script):
        command = [python, str(HERE / "peers" / script), str(width)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        n = options.processes
        return Group(lambda _: command, n, address, "lo", variables, a_host=n)

    # Start the processes, and list the variants that they can run.
    groups = {"jax": start(sys.executable, "jax_steps.py")}
    variants = [("jax", name) for name in JAX[options.what]]
    if torch_has.get("torch"):
        groups["torch"] = start(options.torch_python, "torch_steps.py")
        if options.what == "gossip" and torch_has["decent_dp"]:
            names += DECENT_DP
        variants += [("torch", name) for name in names]
    for module, found in torch_has.items():
        if not found:
            print(f"{module} is not installed in {options.torch_python}: rows omitted.")
    steps = max(4, options.steps // (1 if size < 5e6 else 4))
    times = {f"{group}: {name}": [] for group, name in variants}
    try:
        # Build and warm up all variants, then time them in turns.
        for group, name in variants:
            groups[group].ask("make", name)
            groups[group].ask("run", name, 4)
        for _, (group, name) in itertools.product(range(options.rounds), variants):
            slowest = max(groups[group].ask("run", name, steps))
            times[f"{group}: {name}"].append(slowest)
    finally:
        for group in groups.values():
            group.close()
    print(f"\n{size:,} parameters: ms per step, median (range) of {options.rounds}")
    for name, measured in times.items():
        middle, low, high = np.median(measured), min(measured), max(measured)
        print(f"  {name:<34} {middle:8.2f}  ({low:.2f} to {high:.2f})")
    for ours, theirs in PAIRS:
        if ours in times and theirs in times:
            pairs = np.array(times[ours]) / np.array(times[theirs])
            low, middle, high = np.percentile(pairs, [25, 50, 75])
            print(f"  {ours} / {theirs}: {middle:.3f} ({low:.3f} to {high:.3f})")


def modules(python: str, *names: str) -> dict[str, bool]:
    """Returns which modules a Python interpreter can import."""
    program = "import importlib.util as u, json; print(json.dumps([*map(bool, map("
    program += f"u.find_spec, {list(names)!r}))]))"
    found = subprocess.run([python, "-c", program], capture_output=True, check=True)
    return dict(zip(names, json.loads(found.stdout), strict=True))


if __name__ == "__main__":
    command.run(main)
