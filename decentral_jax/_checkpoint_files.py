"""Folders of checkpoints: their order, and whether every byte is as it was written."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger("decentral_jax.checkpoints")

DIGESTS, NOTES, STATE = "digests.json", "notes.json", "state"
FORMAT = 1  # of notes.json


class Damage(Exception):
    """A checkpoint that is unfinished, damaged, or none of ours."""


def rank(folder: Path) -> tuple[int, int]:
    """The step and the attempt that a folder is named after; (-1, 0) if neither."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?", folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def attempts(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """All that is named like a checkpoint, the earliest first."""
    if not folder.is_dir():
        return []
    named = [(rank(path), path) for path in folder.iterdir()]
    return sorted(x for x in named if x[0][0] >= 0)


def verified(folder: Path) -> dict:
    """The notes of a complete checkpoint.

    Raises:
      Damage: If it is unfinished, damaged, or not a checkpoint of this library.
      OSError: If it cannot be read.
    """
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
    """Deletes a folder, or warns if it cannot."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("the superseded checkpoint %s is not deleted: %s", folder, error)


def digest_of(file: Path, sync: bool = False) -> str:
    """The SHA-256 of a file, after it has reached the disk if `sync`."""
    with file.open("rb") as content:
        if sync:
            os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()
