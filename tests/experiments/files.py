"""Writes the files of a data set, and reads the charts of a report."""

import gzip
import json
import re
from pathlib import Path


def write_files(folder: Path, files: dict[str, str], zipped: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / name).write_text(content)


def read_charts(path: Path) -> list[dict[str, list[float]]]:
    """Returns the first measurement, its mean over seeds, of each curve per chart."""
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)<', text)
    return [
        {one["name"]: next(iter(one["y"].values()))[0] for one in chart["series"]}
        for chart in json.loads(found)
    ]
