"""Provenance of results: the command, the code, and the packages that produced them.

Every table and figure records its provenance, so that each number can be traced to the
options and code that computed it. An interrupted run is resumed only with the same
code.
"""

import ast
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
# Files that start experiments or format results, but do not compute any.
DISPLAY_ONLY = (
    "__main__.py",
    "commands.py",
    "figures.py",
    "folders.py",
    "html_report.py",
    "progress.py",
    "report.py",
    "runs/tables.py",
    "styles.py",
    "training/provenance.py",
)


@functools.cache
def code() -> str:
    """Returns a digest of package versions and of all code that computes results.

    Comments, docstrings, and layout do not count.
    """
    digest = hashlib.sha256()
    for folder in (Path(dj.__file__).parent, EXPERIMENTS):
        for file in sorted(folder.rglob("*.py")):
            name = file.relative_to(folder).as_posix()
            if folder != EXPERIMENTS or name not in DISPLAY_ONLY:
                digest.update(name.encode())
                digest.update(_instructions(file.read_text("utf-8")).encode())
    digest.update(packages().encode())
    return digest.hexdigest()[:16]


def _instructions(source: str) -> str:
    """Returns a program without its comments and docstrings, in one layout."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def packages() -> str:
    """Returns the versions of Python and of the packages that affect results."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {sys.version.split()[0]}", *versions])


@functools.cache
def commit() -> str:
    """Returns the current commit, and whether the code has uncommitted changes."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name, changed = (
            git("rev-parse", "--short", "HEAD"),
            git("status", "--short", *CODE),
        )
    except FileNotFoundError:  # git is not installed
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
    """Returns the module that `python -m` runs: `experiments`, or a benchmark."""
    spec = sys.modules["__main__"].__spec__
    name = "" if spec is None else spec.name.removesuffix(".__main__")
    return name if name.startswith("benchmarks") else "experiments"


def provenance(options: Any = None) -> dict[str, str]:
    """Returns command, options, date, version, commit, packages, and code of this run.

    Args:
      options: All options of the experiment, including those with default values.
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
