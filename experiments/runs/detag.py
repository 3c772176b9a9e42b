"""The experiments of "Optimal Complexity in Decentralized Training" (ICML 2021).

One figure varies how much the data of the workers differ, by shuffling a fraction of
the label-sorted examples. The other varies the sparsity of the network, with lazier
rings.
"""

import dataclasses

import matplotlib.pyplot as plt

import decentral_jax as dj
from experiments import catalog, figures, report, settings
from experiments.errors import from_options
from experiments.training import results, resuming


@dataclasses.dataclass
class DeTAG(settings.ComparisonOptions):
    """Compares DeTAG with D-PSGD, D2, and DSGT on shuffled data and sparser rings."""

    fractions: tuple[float, ...] = (0.0, 50.0, 100.0)
    """Percentages of shuffled examples, at the first kappa."""
    kappas: tuple[float, ...] = (0.05, 1.0, 0.1, 0.01)
    """Sparsities of the ring with weights (1/4, 1/2, 1/4), at the first fraction."""
    rounds: int | None = None
    """DeTAG's rounds per phase; computed from the spectral gap if not given."""


def run(options: DeTAG, output: report.Output) -> None:
    """Trains, prints tables, and writes `fractions.png`, `kappas.png`, and CSVs."""
    figures = {
        "fractions": [(options.kappas[0], f) for f in options.fractions],
        "kappas": [(kappa, options.fractions[0]) for kappa in options.kappas],
    }
    # The figures share a cell, which is trained only once.
    done = {}
    for figure_name, cells in figures.items():
        for cell in cells:
            if cell not in done:
                done[cell] = _run(options, *cell, output)
        rows = [
            row
            for kappa, fraction in cells
            for row in results.rows(
                done[kappa, fraction], kappa=kappa, shuffled=fraction
            )
        ]
        output.csv(figure_name, rows)
        figure = plt.figure(figsize=(3.4 * len(cells), 3.6), layout="constrained")
        axes = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for ax, (kappa, fraction) in zip(axes, cells, strict=True):
            report.plot_curves(ax, done[kappa, fraction], "iterations", "train_loss")
            ax.set_title(f"kappa {kappa:g}, {fraction:g}% shuffled", fontsize=9)
        axes[0].legend(fontsize=8)
        output.figure(figure_name, figure)
    cells = {
        f"{fraction:g}% shuffled, kappa {kappa:g}, R = {_rounds(options, kappa)}": found
        for (kappa, fraction), found in done.items()
    }
    output.table("summary", report.summary(cells, options.dataset))
    output.html("detag")


def _run(
    options: DeTAG, kappa: float, fraction: float, output: report.Output
) -> list[results.Result]:
    topology, rounds = _topology(options, kappa), _rounds(options, kappa)
    found = results.run_all(
        catalog.decentralized(topology, rounds),
        options.setting(fraction),
        output.progress,
        f"kappa {kappa:g}, {fraction:g}%",
        resuming.memory(options),
    )
    title = f"{topology.name}, {fraction:g}% shuffled, DeTAG R={rounds}"
    name = f"kappa_{kappa:g}_shuffled_{fraction:g}"
    output.table(name, report.comparison(found, title))
    output.chart(figures.chart(found, title))
    return found


def _topology(options: DeTAG, kappa: float) -> dj.topology.Topology:
    ring = dj.topology.ring(options.workers).lazy(0.75)
    with from_options(kappa="kappas"):
        return ring if kappa == 1 else ring.lazy(kappa)


def _rounds(options: DeTAG, kappa: float) -> int:
    return options.rounds or catalog.phase_length(_topology(options, kappa))
