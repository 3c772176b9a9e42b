"""The experiments of "Optimal Complexity in Decentralized Training" (ICML 2021).

Two figures: how the algorithms bear workers whose data differ (a fraction of the
label-sorted examples is shuffled), and how they bear sparse networks (lazier rings).
"""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

import decentral_jax as dj
from experiments import report, resuming, settings


@dataclasses.dataclass
class DeTAG(settings.Options):
    """DeTAG against D-PSGD, D2 and DSGT: shuffled fractions, and sparser rings."""

    fractions: tuple[float, ...] = (0.0, 50.0, 100.0)
    """Percentages of shuffled examples, at the first kappa."""
    kappas: tuple[float, ...] = (0.05, 1.0, 0.1, 0.01)
    """Sparsities of the ring with weights (1/4, 1/2, 1/4), at the first fraction."""
    rounds: int | None = None
    """DeTAG's rounds a phase; from the spectral gap if not given."""
    out: Path = Path("results/detag")
    """Folder for the figures (.png) and the numbers (.csv)."""


def main(options: DeTAG) -> None:
    """Trains, prints tables, writes `fractions.png`, `kappas.png` and CSV files."""
    console = Console()
    figures = {
        "fractions": [(options.kappas[0], f) for f in options.fractions],
        "kappas": [(kappa, options.fractions[0]) for kappa in options.kappas],
    }
    done = {}
    for figure_name, cells in figures.items():
        for cell in cells:
            if cell not in done:
                done[cell] = _run(options, *cell, console)
        rows = [
            row
            for kappa, fraction in cells
            for row in report.rows(
                done[kappa, fraction], kappa=kappa, shuffled=fraction
            )
        ]
        report.write_csv(options.out / f"{figure_name}.csv", rows)
        figure = plt.figure(figsize=(3.4 * len(cells), 3.6), layout="constrained")
        axes = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for ax, (kappa, fraction) in zip(axes, cells, strict=True):
            report.plot_curves(ax, done[kappa, fraction], "iterations", "train_loss")
            ax.set_title(f"kappa {kappa:g}, {fraction:g}% shuffled", fontsize=9)
        axes[0].legend(fontsize=8)
        report.save(figure, options.out / f"{figure_name}.png")
    console.print(f"Wrote figures and CSV files to {options.out}.")


def _run(
    options: DeTAG, kappa: float, fraction: float, console: Console
) -> list[report.Result]:
    ring = dj.topology.ring(options.workers).lazy(0.75)
    topology = ring if kappa == 1 else ring.lazy(kappa)
    rounds = options.rounds or settings.phase_length(topology)
    results = report.run_all(
        settings.decentralized(topology, rounds),
        options.setting(fraction),
        console,
        f"kappa {kappa:g}, {fraction:g}%",
        resuming.memory(options),
    )
    title = f"{topology.name}, {fraction:g}% shuffled, DeTAG R={rounds}"
    report.print_table(results, console, title)
    return results
