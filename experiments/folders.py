"""Folders of results: each run has its own, so that no run overwrites another's.

Without `--out`, a run writes into `results/COMMAND/NUMBER`, where the number is the
next free one. With `--out`, it writes into that folder, which must be new or empty.
With `--resume`, a run continues in the folder of the latest run with the same options
and code. The file `run.json` in each folder records the command, all options, the code,
the versions of Python and of packages, and the devices.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.errors import UsageError
from experiments.training import resuming
from experiments.training.provenance import provenance

ROOT = Path("results")
RECORD = "run.json"


def claim(name: str, options: Any) -> Path:
    """Chooses the folder of a run, creates it, and records the run in it.

    Args:
      name: Name of the command.
      options: Options of the run with the folder `out`, or None to choose one. If they
        have `resume`, the folder of an earlier run with equal options is allowed.

    Returns:
      The folder.

    Raises:
      UsageError: If the folder has files of anything other than this run.
    """
    resume = getattr(options, "resume", None)
    run = None if resume is None else resuming.identity(options)
    if options.out is not None:
        folder = Path(options.out)
        _check_given(folder, run, bool(resume))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        parent = ROOT / name
        folder = (resume and _latest(parent, run)) or _new(parent)
    if not (folder / RECORD).exists():
        values = dataclasses.asdict(options) if run else vars(options)
        record = {"run": run, **provenance(), "options": values}
        text = json.dumps(record, indent=2, default=str)
        (folder / RECORD).write_text(f"{text}\n", encoding="utf-8")
    return folder


def discard(folder: Path) -> None:
    """Removes the folder of a run that has written nothing but its record."""
    if [path.name for path in folder.iterdir()] == [RECORD]:
        (folder / RECORD).unlink()
        folder.rmdir()
        # The folders above a numbered one exist only for such folders.
        if folder.parent.parent == ROOT:
            with contextlib.suppress(OSError):  # not empty
                folder.parent.rmdir()
                ROOT.rmdir()


def _check_given(folder: Path, run: str | None, resume: bool) -> None:
    """Raises UsageError if a folder from `--out` holds anything other than this run."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder} is a file: pass a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise UsageError(
            f"out={folder} is not empty: pass a new folder, or pass --resume to "
            "continue the run in it."
        )
    if _run_in(folder) != run:
        raise UsageError(
            f"out={folder} has the results of other options or of other code, which "
            "--resume cannot continue: pass a new folder."
        )


def _latest(parent: Path, run: str | None) -> Path | None:
    """Returns the folder with the highest number that belongs to a run, if any."""
    return next((f for f in reversed(_numbered(parent)) if _run_in(f) == run), None)


def _new(parent: Path) -> Path:
    """Creates the folder with the next free number."""
    number = max((int(folder.name) for folder in _numbered(parent)), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir(parents=True)
        except FileExistsError:  # another run was faster
            continue
        return parent / str(number)


def _numbered(parent: Path) -> list[Path]:
    """Returns the folders whose names are numbers, in the order of the numbers."""
    found = [path for path in parent.glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _run_in(folder: Path) -> str | None:
    """Returns the identity of the run that a folder records, if it records one."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
