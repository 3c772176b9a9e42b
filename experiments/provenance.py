"""Where results come from: the command, the code and the packages that made them.

Every table and figure carries this, so that a number can be traced to the code that
computed it, and what an interrupted run has finished counts only for the same code.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import decentral_jax as dj

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn")


@functools.cache
def code() -> str:
    """A digest of the library's and the experiments' sources and of the packages."""
    digest = hashlib.sha256()
    for folder in (Path(dj.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode())
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
    """The commit that is checked out, and whether files were changed after it."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name, changed = git("rev-parse", "--short", "HEAD"), git("status", "--short")
    except FileNotFoundError:  # no git
        name, changed = "", ""
    return f"{name} with changes" if name and changed else name or "unknown"


def provenance() -> dict[str, str]:
    """The command, date, version, commit, packages and code of this run."""
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "version": f"decentral_jax {dj.__version__}",
        "commit": commit(),
        "packages": packages(),
        "code": code(),
    }
