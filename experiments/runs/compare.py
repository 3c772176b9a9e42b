"""The main comparison: every algorithm on the same data, model, network, and seeds."""

import dataclasses

import decentral_jax as dj
from experiments import catalog, figures, report, settings
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
    # The models are a thousand times smaller than those of users, and so is the link.
    network: settings.Network = dataclasses.field(
        default_factory=lambda: settings.Network(bandwidth=0.1)
    )
    """Machines and links that determine the simulated seconds."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        self.network.check()


def run(options: Compare, output: report.Output) -> None:
    """Trains, prints the table, and writes it, the numbers, and figures by family."""
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
    title = (
        f"{options.dataset}, {options.shuffled:g}% shuffled, {topology.name}, "
        f"{options.seeds} seeds, tuned rates"
    )
    for file, name in (
        ("compare", "train_loss"),
        ("compare_accuracy", "test_accuracy"),
    ):
        output.figure(file, figures.by_family(found, name, title))
    output.chart(figures.chart(found, title))
    output.html("compare")


@dataclasses.dataclass
class Algorithms:
    """Lists the names of the algorithms that `compare --algorithms` accepts."""


def list_algorithms(options: Algorithms) -> None:
    """Prints one name per line."""
    for name in catalog.everything(dj.topology.ring(8), rounds=1):
        print(name)
