"""Draws the figure of the network benchmark from its CSV file.

`python -m benchmarks.network.figure network.csv network.png`
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments import report


def draw(rows: list[dict], path: str | Path) -> None:
    """Draws seconds to the target against bandwidth, one line per algorithm.

    Args:
      rows: Rows of `network.csv`.
      path: File to write.
    """
    figure = plt.figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    bandwidths = sorted({float(row["mbit"]) for row in rows if float(row["mbit"])})
    # Equidistant positions on the horizontal axis, with "no limit" at the right end.
    place = {mbit: i for i, mbit in enumerate([*bandwidths, 0.0])}
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted(
            (place[float(row["mbit"])], float(row["seconds"]))
            for row in rows
            if row["name"] == name and row["seconds"] != "nan"
        )
        style = "--" if name.startswith(("PyTorch", "Decent")) else "-"
        if points:
            ax.semilogy(*zip(*points, strict=True), "o" + style, label=name)
    labels = [f"{mbit:g}" for mbit in bandwidths] + ["no limit"]
    ax.set_xticks(range(len(place)), labels)
    ax.set_xlabel("Mbit/s of each host's link")
    ax.set_ylabel("seconds to the target accuracy")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw(report.read_csv(Path(sys.argv[1])), sys.argv[2])
