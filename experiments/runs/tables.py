"""Generates the tables and pictures of the documentation.

On a page of the documentation, each generated table is between two comments,

    <!-- table: faults/summary -->
    <!-- end of table -->

which name a run in `RUNS` and a table that the run writes. `python -m experiments
tables` executes the runs with missing or stale tables, one after the other. With
`--write docs`, it also writes the tables and their pictures into the pages. After an
interruption, the same command continues where it stopped.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console

from experiments.errors import UsageError, check_among
from experiments.training.provenance import ROOT, code

# Placeholder for the folder of --data-dir in the commands below.
FOLDER = "FOLDER"


class Run(NamedTuple):
    """A command, with the tables and pictures that the documentation shows."""

    page: str
    command: str  # arguments after `python -m experiments`
    tables: tuple[str, ...]
    pictures: tuple[tuple[str, str], ...] = ()  # file in docs/images, file of the run

    @property
    def shown_command(self) -> str:
        """The complete command, as shown to readers."""
        return f"python -m experiments {self.command}"


_TRAINING = "d-grab --parts training --tasks"
_DELAY = "apam --parts delay --models"

RUNS = {
    "compare": Run(
        "algorithms.md", "compare", ("compare",), (("compare.png", "compare.png"),)
    ),
    "detag": Run("algorithms.md", "detag", ("summary",)),
    "synthetic": Run("algorithms.md", "synthetic", ("synthetic",)),
    "def-mnist": Run(
        "compression.md",
        f"def --dataset mnist --data-dir {FOLDER} --examples 9600 --ratios 64 "
        "--evaluations 48 --rates 0.001 0.002 0.005 0.02 0.05 0.1 0.2 0.4 0.8",
        ("ratio_64",),
        (("def_mnist.png", "ratio_64.png"),),
    ),
    "def-digits": Run("compression.md", "def", ("ratio_16", "ratio_64", "ratio_256")),
    "faults": Run("faults.md", "faults", ("summary",), (("faults.png", "faults.png"),)),
    "mll-mnist": Run(
        "local_updates.md",
        f"mll-sgd --dataset mnist --data-dir {FOLDER} --parts hierarchy rates "
        "--steps-per-tick 2 --batch-size 40 --evaluations 200",
        ("hierarchy", "rates"),
    ),
    "mll-digits": Run(
        "local_updates.md", "mll-sgd", ("hierarchy", "rates", "shapes", "slots")
    ),
    "herding": Run("ordering.md", "d-grab --parts herding --draws 5", ("herding",)),
    "order-logistic-digits": Run(
        "ordering.md",
        f"{_TRAINING} logistic --workers 4 16 64 --epochs 30",
        ("logistic_digits",),
        (("d_grab_logistic_digits.png", "logistic_digits.png"),),
    ),
    "order-logistic-a9a": Run(
        "ordering.md",
        f"{_TRAINING} logistic --source a9a --data-dir {FOLDER} --workers 4 16 64 "
        "--epochs 10 --rates 0.025 0.05 0.1 0.2 0.4 0.8 1.6 3.2",
        ("logistic_a9a",),
    ),
    "order-forecast": Run(
        "ordering.md",
        f"{_TRAINING} forecast --data-dir {FOLDER} --workers 4 16 64 --epochs 20 "
        "--rates 0.04 0.08 0.16 0.32 0.64 1.28",
        ("forecast_m4",),
        (("d_grab_forecast_m4.png", "forecast_m4.png"),),
    ),
    "order-lstm": Run(
        "ordering.md",
        f"{_TRAINING} lstm --examples 640 --epochs 8 --rates 0.5 1 2 4 8 --workers 4",
        ("lstm_python",),
    ),
    "order-lenet": Run(
        "ordering.md",
        f"{_TRAINING} lenet --workers 4 16 --epochs 12 "
        "--rates 0.01 0.02 0.05 0.1 0.2 0.4",
        ("lenet_digits",),
    ),
    "delay-logistic": Run(
        "asynchronous.md",
        f"{_DELAY} logistic --rate 0.01",
        ("delay_logistic_digits",),
        (("apam_delay_logistic_digits.png", "delay_logistic_digits.png"),),
    ),
    "delay-lenet": Run(
        "asynchronous.md",
        f"{_DELAY} lenet --rate 0.001 --iterations 6000 --evaluations 30",
        ("delay_lenet_digits",),
        (("apam_delay_lenet_digits.png", "delay_lenet_digits.png"),),
    ),
    "time": Run(
        "asynchronous.md",
        "apam --parts time speedup",
        ("time_logistic_digits", "time_lenet_digits", "speedup_logistic_digits"),
        (
            ("apam_time_lenet_digits.png", "time_lenet_digits.png"),
            ("apam_speedup_logistic_digits.png", "speedup_logistic_digits.png"),
        ),
    ),
}

_QUIET = "measures step times: needs a machine without other load"

# Benchmarks whose numbers are copied into the documentation by hand, with date and
# commit, between the comments "by hand: NAME" and "end of by hand". The values are the
# reasons.
BY_HAND = {
    "benchmarks.examples": _QUIET,
    "benchmarks.one_device.asynchronous": _QUIET,
    "benchmarks.one_device.compression": _QUIET,
    "benchmarks.one_device.gossip_step": "needs the oldest and the newest JAX",
    "benchmarks.one_device.local_updates": _QUIET,
    "benchmarks.one_device.many_workers": _QUIET,
    "benchmarks.processes.multi_process": "needs PyTorch DDP and Decent-DP",
    "benchmarks.network": "needs root for network namespaces, and PyTorch DDP",
    "benchmarks.one_device.ordering": _QUIET,
    "benchmarks.one_device.precision": "the page summarizes all rows in one sentence",
    "benchmarks.one_device.steps_alone": _QUIET,
}


@dataclasses.dataclass
class Tables:
    """Runs the commands whose tables in the documentation are missing or stale."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the runs to execute, as shown by --list; all if not given."""
    list: bool = False
    """Only list the runs: which are up to date, and their commands."""
    write: Path | None = None
    """Documentation folder, such as "docs", to write tables and pictures into."""
    data_dir: Path | None = None
    """Folder with the data sets; without it, commands that need it are skipped."""
    out: Path = Path("results/tables")
    """Folder for the results, with one subfolder per command and code."""


def run(options: Tables) -> None:
    """Executes the stale runs; exits with status 1 if any command fails."""
    check_among("NAMES", options.names, RUNS)
    # Without --write, compare with the pages of this repository.
    console, docs = Console(highlight=False), options.write or ROOT / "docs"
    failed = []
    for name in options.names or RUNS:
        run = RUNS[name]
        is_fresh = fresh(name, docs)
        if options.list:
            state = "up to date" if is_fresh else "stale"
            console.print(f"{name:<22} {state:<11} {run.shown_command}", soft_wrap=True)
        elif is_fresh:
            console.print(f"{name}: up to date")
        elif FOLDER in run.command and options.data_dir is None:
            console.print(f"{name}: skipped, needs --data-dir")
        else:
            console.print(f"{name}: {run.shown_command}", soft_wrap=True)
            folder = options.out.resolve() / f"{name}-{_digest(run)}"
            ended = subprocess.run(_argv(run, folder, options), cwd=ROOT).returncode
            if ended:
                console.print(f"{name}: failed with exit status {ended}")
                failed.append(name)
            elif options.write:
                write(name, folder, options.write)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


def _digest(run: Run) -> str:
    """Returns a digest of the command and the code, on which the results depend."""
    return hashlib.sha256(f"{code()} {run.command}".encode()).hexdigest()[:8]


def _argv(run: Run, folder: Path, options: Tables) -> list[str]:
    words = shlex.split(run.command)
    if options.data_dir is not None:
        data_dir = str(options.data_dir.resolve())
        words = [data_dir if word == FOLDER else word for word in words]
    words += ["--resume", "--out", str(folder)]
    return [sys.executable, "-m", "experiments", *words]


def block(name: str, table: str) -> re.Pattern:
    """Returns a pattern for a table on its page; group 2 is the generated text."""
    marker = re.escape(f"<!-- table: {name}/{table} -->")
    return re.compile(rf"({marker}\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fresh(name: str, docs: Path) -> bool:
    """Returns whether a run's tables come from its command and the current code."""
    run = RUNS[name]
    text = (docs / run.page).read_text(encoding="utf-8")
    for table in run.tables:
        found = block(name, table).search(text)
        if found is None:
            raise UsageError(
                f"{run.page} has no comments for the table {name}/{table}: add them."
            )
        # The small print below each table names the command and the code.
        command, digest = f"`{run.shown_command}`", f"code {code()},"
        if command not in found[2] or digest not in found[2]:
            return False
    return all((docs / "images" / picture).exists() for picture, _ in run.pictures)


def write(name: str, folder: Path, docs: Path) -> None:
    """Writes a run's tables and pictures into the documentation.

    Args:
      name: Name of the run.
      folder: Folder with the results of the run.
      docs: Folder of the documentation.
    """
    run = RUNS[name]
    page = docs / run.page
    text = page.read_text(encoding="utf-8")
    for table in run.tables:
        written = (folder / f"{table}.md").read_text(encoding="utf-8")
        # Replace the comment with the origin of the table by one line of small print.
        shown, _, origin = written.partition("\n<!--\n")
        new = f"{shown}\n{_small_print(run, origin)}\n\n"
        text, count = block(name, table).subn(
            lambda m, new=new: m[1] + new + m[3], text
        )
        if count != 1:
            raise UsageError(
                f"{run.page} has {count} places for the table {name}/{table}: keep "
                "exactly one."
            )
    page.write_text(text, encoding="utf-8")
    for picture, file in run.pictures:
        shutil.copyfile(folder / file, docs / "images" / picture)


def _small_print(run: Run, origin: str) -> str:
    """Formats the origin of a table as one line."""
    lines = origin.removesuffix("\n-->\n").splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    minutes, seconds = divmod(int(found["seconds"]), 60)
    parts = [
        f"`{run.shown_command}`",
        found["date"],
        f"commit {found['commit']}",
        f"code {found['code']}",
        found["packages"],
        f"{minutes} min {seconds} s on {os.cpu_count()} cores",
    ]
    return f"<small>{', '.join(parts)}.</small>"
