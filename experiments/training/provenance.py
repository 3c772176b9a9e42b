"""Where results come from: the command, the code and the packages that made them.

Every table and figure carries this, so that a number can be traced to the options and
the code that computed it, and what an interrupted run has finished counts only for the
same code.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import decentral_jax as dj

ROOT = Path(__file__).parents[2]
EXPERIMENTS = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
CODE = ("decentral_jax", "experiments", "benchmarks", "pyproject.toml")
# What only starts experiments and shows their results, but computes none.
SHOWING = (
    "__main__.py",
    "commands.py",
    "folders.py",
    "progress.py",
    "report.py",
    "runs/tables.py",
    "training/provenance.py",
)


@functools.cache
def code() -> str:
    """A digest of the packages' versions and of all sources that compute results."""
    digest = hashlib.sha256()
    for folder in (Path(dj.__file__).parent, EXPERIMENTS):
        for file in sorted(folder.rglob("*.py")):
            name = file.relative_to(folder).as_posix()
            if folder != EXPERIMENTS or name not in SHOWING:
                digest.update(name.encode())
                digest.update(file.read_bytes())
    digest.update(packages().encode())
    return digest.hexdigest()[:16]


@functools.cache
def packages() -> str:
    """The versions of Python and of the packages that results depend on."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {sys.version.split()[0]}", *versions])


@functools.cache
def commit() -> str:
    """The commit that is checked out, and whether its code was changed after it."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name, changed = (
            git("rev-parse", "--short", "HEAD"),
            git("status", "--short", *CODE),
        )
    except FileNotFoundError:  # no git
        name, changed = "", ""
    return f"{name} with changes" if name and changed else name or "unknown"


def versions() -> str:
    """The version and commit of decentral_jax, and the versions of packages."""
    return f"decentral_jax {dj.__version__}, commit {commit()}, {packages()}"


@functools.cache
def device() -> str:
    """The devices that JAX uses, and the machine."""
    kinds = Counter(device.device_kind for device in jax.devices())
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    machine = f"{platform.system()} {platform.machine()}"
    return f"{devices}, {os.cpu_count()} cores, {machine}"


def _program() -> str:
    """The module that `python -m` runs: the experiments, or a benchmark."""
    spec = sys.modules["__main__"].__spec__
    name = "" if spec is None else spec.name.removesuffix(".__main__")
    return name if name.startswith("benchmarks") else "experiments"


def provenance(options: Any = None) -> dict[str, str]:
    """The command, options, date, version, commit, packages and code of this run.

    Args:
      options: All options of the experiment, those left at their defaults too.
    """
    return {
        "command": shlex.join(["python", "-m", _program(), *sys.argv[1:]]),
        "options": repr(options),
        "date": datetime.date.today().isoformat(),
        "version": f"decentral_jax {dj.__version__}",
        "commit": commit(),
        "packages": packages(),
        "device": device(),
        "code": code(),
    }
