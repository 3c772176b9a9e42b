"""The main comparison: every algorithm on the same data, model, network, and seeds."""

import dataclasses

import matplotlib.pyplot as plt

import decentral_jax as dj
from experiments import catalog, report, settings
from experiments.errors import check_among, from_options
from experiments.training import results, resuming


@dataclasses.dataclass
class Compare(settings.ComparisonOptions):
    """Compares every algorithm on a ring of workers whose data differ."""

    shuffled: float = 0.0
    """Percentage of the label-sorted examples to shuffle; with 0, classes differ."""
    kappa: float = 0.05
    """Sparsity of the ring: kappa W + (1 - kappa) I, with weights 1/3 in W."""
    rounds: int = 4
    """DeTAG's rounds per phase; 4 was best of 4, 6, and 11 in the default setting."""
    algorithms: tuple[str, ...] = ()
    """Names of the algorithms to run, as in the table; all if not given."""
    network: settings.Network = dataclasses.field(default_factory=settings.Network)
    """Machines and links that determine the simulated seconds."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        self.network.check()


def run(options: Compare, output: report.Output) -> None:
    """Trains, prints the table, and writes `compare.png`, `.csv`, and `.md`."""
    setting = options.setting(options.shuffled)
    with from_options():
        topology = dj.topology.ring(options.workers).lazy(options.kappa)
    network = options.network
    entries = catalog.everything(topology, options.rounds, network.slow)
    check_among("algorithms", options.algorithms, entries)
    if options.algorithms:
        entries = {name: entries[name] for name in options.algorithms}
    output.console.print(
        f"{options.dataset}, {options.shuffled:g}% shuffled, {options.model}, "
        f"{topology}, DeTAG R={options.rounds}; {len(options.rates)} rates x "
        f"{options.seeds} seeds in one program per algorithm"
    )
    found = results.run_all(
        entries, setting, output.progress, "compare", resuming.memory(options), network
    )
    title = f"After {setting.iterations} iterations, at the best rate"
    output.table("compare", report.comparison(found, title))
    output.csv("compare", results.rows(found))
    figure = plt.figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, name in zip(axes, ("train_loss", "test_accuracy"), strict=True):
        for ax, against in zip(row, report.AGAINST, strict=True):
            report.plot_curves(ax, found, against, name)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.suptitle(
        f"{options.dataset}, {options.shuffled:g}% shuffled, {topology.name}, "
        f"{options.seeds} seeds, tuned rates"
    )
    output.figure("compare", figure)


@dataclasses.dataclass
class Algorithms:
    """Lists the names of the algorithms that `compare --algorithms` accepts."""


def list_algorithms(options: Algorithms) -> None:
    """Prints one name per line."""
    for name in catalog.everything(dj.topology.ring(8), rounds=1):
        print(name)
