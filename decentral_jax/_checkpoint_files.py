"""Checkpoint folders: their order, and the verification of their files."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger("decentral_jax.checkpoints")

DIGESTS, NOTES, STATE = "digests.json", "notes.json", "state"
FORMAT = 1  # version of the format of notes.json


class Damage(Exception):
    """A checkpoint is unfinished, damaged, or not written by this library."""


def rank(folder: Path) -> tuple[int, int]:
    """Returns the step and the attempt in a folder's name.

    Returns (-1, 0) if the name is not that of a checkpoint.
    """
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def attempts(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Returns all folders with the name of a checkpoint, the earliest first.

    Args:
      folder: Folder that holds the checkpoints; it need not exist.

    Returns:
      Pairs of (step, attempt) and the path.
    """
    if not folder.is_dir():
        return []
    named = [(rank(path), path) for path in folder.iterdir()]
    return sorted(x for x in named if x[0][0] >= 0)


def verified(folder: Path) -> dict[str, Any]:
    """Verifies all files of a checkpoint, and returns its notes.

    Args:
      folder: Folder of the checkpoint.

    Returns:
      The content of `notes.json`.

    Raises:
      Damage: If the checkpoint is unfinished, damaged, or not written by this library.
      OSError: If any file cannot be read.
    """
    # The notes are written first, the digests last.
    if not (folder / NOTES).exists():
        raise Damage(f"{NOTES} is missing, so this library has not written it")
    if not (folder / DIGESTS).exists():
        raise Damage("it is unfinished")
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except ValueError:
        digests = None
    if not isinstance(digests, dict) or NOTES not in digests:
        raise Damage(f"{DIGESTS} is damaged")
    # Every file with a digest must exist and be unchanged. Other files do no harm.
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    for name, digest in digests.items():
        if name not in files:
            raise Damage(f"{name} is missing")
        if digest_of(folder / name) != digest:
            raise Damage(f"{name} is damaged")
    notes = json.loads((folder / NOTES).read_text())
    if notes["format"] != FORMAT:
        raise Damage(f"its format is {notes['format']}, this version reads {FORMAT}")
    return notes


def delete(folder: Path) -> None:
    """Deletes a folder, or logs a warning if that fails."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("the superseded checkpoint %s is not deleted: %s", folder, error)


def digest_of(file: Path, sync: bool = False) -> str:
    """Returns the SHA-256 digest of a file.

    Args:
      file: Path of the file.
      sync: Whether to wait first until the file's content is on disk.
    """
    with file.open("rb") as content:
        if sync:
            os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()
