"""Writes the files of a data set."""

import gzip
from pathlib import Path


def write_files(folder: Path, files: dict[str, str], zipped: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / name).write_text(content)
