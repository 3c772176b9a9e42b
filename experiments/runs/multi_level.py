"""The experiments of "Multi-Level Local SGD" (ICLR 2021).

100 workers in hubs learn to distinguish digits 0-4 from 5-9, or all classes with a CNN.
The four parts answer the following questions:

- hierarchy: How close does a hierarchy come to distributed SGD?
- rates: Does the result depend only on the mean of the workers' operating rates?
- shapes: What is the cost of more hubs?
- slots: Which algorithm is fastest if some workers are slow?
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np

import decentral_jax as dj
from experiments import figures, report
from experiments.catalog import Entry
from experiments.data import images
from experiments.errors import UsageError, renamed
from experiments.progress import Progress
from experiments.settings import RunOptions, check_at_least, check_positive
from experiments.training import models, results, resuming, wall_clock
from experiments.training.loop import (
    Curves,
    Setting,
    bytes_sent,
    step_log,
    train,
    worker_axes,
)

PARTS = ("hierarchy", "rates", "shapes", "slots")

# Train losses that the authors of the paper published for MNIST, after 1, 11, 100, and
# 200 rounds (the first loss is after the first average inside hubs of round 1).
QUOTED = {
    "distributed SGD": (0.62473, 0.36443, 0.33186, 0.32772),
    "MLL-SGD": (0.49555, 0.36435, 0.33203, 0.32786),
    "Local SGD": (0.42500, 0.36406, 0.33230, 0.32829),
    "all .55": (0.5371, 0.3763, 0.3376, 0.3312),
}


@dataclasses.dataclass
class MultiLevel(RunOptions):
    """Compares Multi-Level Local SGD with Local SGD, HL-SGD, and distributed SGD."""

    dataset: Literal["digits", "mnist"] = "digits"
    """Data set; "mnist" is read from --data-dir."""
    data_dir: Path | None = None
    """Folder with the files of MNIST (idx, optionally .gz)."""
    model: Literal["logistic", "cnn"] = "logistic"
    """Logistic regression of digits 0-4 against 5-9, or a CNN for all ten digits."""
    parts: tuple[Literal["hierarchy", "rates", "shapes", "slots"], ...] = PARTS
    """Which of the four experiments to run."""
    hubs: int = 10
    """Number of hubs on the path."""
    workers: int = 10
    """Number of workers per hub."""
    tau: int = 8
    """Number of ticks between two averages inside hubs."""
    q: int = 4
    """Number of averages inside hubs between two exchanges among hubs."""
    steps_per_tick: int = 1
    """Number of gradient steps per tick; the authors' program takes 2 on MNIST."""
    rounds: int = 200
    """Number of exchanges among hubs, one per q * tau ticks."""
    evaluations: int = 100
    """Number of points on each curve; must divide the rounds."""
    batch_size: int = 10
    """Number of examples per worker per gradient step."""
    learning_rate: float | None = None
    """Learning rate; 0.2 for logistic regression and 0.01 for the CNN if not given."""
    seeds: int = 3
    """Number of seeds; each seed sets the initial model and the batches."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        check_at_least(self, 1, "hubs", "workers", "tau", "q", "steps_per_tick")
        check_at_least(self, 1, "rounds", "evaluations", "batch_size")
        check_positive(self, "learning_rate")
        if self.rounds % self.evaluations:
            raise UsageError(
                f"evaluations={self.evaluations} must divide rounds={self.rounds}."
            )

    def setting(self) -> Setting:
        """Loads the data and partitions it among the workers.

        Raises:
          UsageError: If a folder or file is missing or broken.
        """
        with renamed(name="dataset"):
            dataset = images.load(self.dataset, self.data_dir)
        rate = self.learning_rate
        if self.model == "logistic":
            dataset = dataset._replace(
                y_train=(dataset.y_train >= 5).astype(np.int32),
                y_test=(dataset.y_test >= 5).astype(np.int32),
                num_classes=2,
            )
            model, rate = models.BinaryLogistic(), rate or 0.2
        else:
            name = "emnist_cnn" if self.dataset == "mnist" else "small_cnn"
            model, rate = models.get_model(name, dataset.num_classes), rate or 0.01
        n = self.hubs * self.workers
        return Setting(
            dataset=dataset,
            parts=images.partition(dataset.y_train, n, shuffled=100.0),
            model=model,
            batch_size=self.batch_size,
            iterations=self.rounds * self.q * self.tau * self.steps_per_tick,
            evaluations=self.evaluations,
            rates=(rate,),
            seeds=tuple(range(self.seeds)),
            sequential=self.dataset == "mnist" or self.model == "cnn",
        )


def distributions(num_workers: int) -> dict[str, np.ndarray]:
    """Returns the operating rates in the paper; all except "all 1" have mean 0.55."""
    tenth = num_workers // 10
    ones = np.ones(num_workers)
    few_slow, few_fast = 0.6 * ones, 0.5 * ones
    few_slow[:tenth], few_fast[:tenth] = 0.1, 1.0
    rates = {
        "all 1": ones,
        "all .55": 0.55 * ones,
        "uniform .1 to 1": np.linspace(0.1, 1.0, num_workers),
        "10% .1, rest .6": few_slow,
        "10% 1, rest .5": few_fast,
    }
    # Spread workers over the hubs, so that no hub has all slow workers.
    order = np.random.default_rng(0).permutation(num_workers)
    return {name: values[order] for name, values in rates.items()}


class Runs:
    """Trains algorithms in one setting and stores the results."""

    def __init__(self, options: MultiLevel, progress: Progress):
        self.options, self.progress = options, progress
        self.setting = options.setting()
        self.memory = resuming.memory(options)
        self.results: dict[str, results.Result] = {}
        self.rates = distributions(self.setting.num_workers)

    def __call__(self, name: str, entry: Entry, slots: np.ndarray | None = None):
        """Returns the result of an algorithm, and trains it if there is none yet.

        Args:
          name: Name of the algorithm.
          entry: The algorithm.
          slots: Number of time slots per step and worker, `[steps, n]`. If None, each
            step takes one slot.
        """
        setting = self.setting

        def trained():
            return train(entry.make, setting, levels=entry.levels)._asdict()

        if name not in self.results:
            with self.progress.status(f"training {name}"):
                curves = Curves(**self.memory.recall(name, trained))
            log = step_log(entry.make, setting, entry.levels)
            shape = setting.iterations, setting.num_workers
            # Time slots until the last worker finishes; communication takes no time.
            clock = wall_clock.finish_times(
                np.ones(shape) if slots is None else slots,
                log,
                worker_axes(entry.levels, setting.num_workers),
            ).max(1)
            at = curves.iteration
            sent = bytes_sent(log, setting.iterations)[at] / 1e6
            self.results[name] = results.Result(
                name, curves, sent, clock[at], setting.rates
            )
        return self.results[name]

    def mll(self, rates, hubs=None, name="MLL-SGD"):
        """Trains Multi-Level Local SGD on a path of hubs."""
        options = self.options
        hubs = hubs or options.hubs
        per_hub = self.setting.num_workers // hubs
        tau, q = options.tau * options.steps_per_tick, options.q
        path = dj.topology.path(hubs)
        table = np.reshape(rates, (hubs, per_hub))
        return self(
            name,
            Entry(
                lambda rate: dj.mll_sgd(rate, path, tau=tau, q=q, rates=table),
                levels={"hub": hubs, "worker": per_hub},
            ),
        )

    def local(self, period, name, slots=None):
        """Trains Local SGD; with a period of one tick, it is distributed SGD."""
        steps = period * self.options.steps_per_tick
        entry = Entry(lambda rate: dj.local_sgd(rate, period=steps))
        return self(name, entry, slots)

    def hl(self, name, slots=None):
        """Trains Hierarchical Local SGD."""
        options = self.options
        tau = options.tau * options.steps_per_tick

        def make(rate):
            return dj.hl_sgd(rate, options.hubs, tau=tau, q=options.q)

        levels = {"hub": options.hubs, "worker": options.workers}
        return self(name, Entry(make, levels), slots)


def run(options: MultiLevel, output: report.Output) -> dict[str, list[results.Result]]:
    """Trains, prints one table and writes one figure per part, and `mll_sgd.csv`."""
    runs = Runs(options, output.progress)
    round_ticks = options.q * options.tau
    ones = runs.rates["all 1"]
    found: dict[str, list[results.Result]] = {}
    for part in options.parts:
        if part == "hierarchy":
            found[part] = [
                runs.local(1, "distributed SGD"),
                runs.mll(ones),
                runs.hl("HL-SGD"),
                runs.local(round_ticks, "Local SGD"),
            ]
        elif part == "rates":
            found[part] = [
                runs.mll(rates, name="MLL-SGD" if name == "all 1" else name)
                for name, rates in runs.rates.items()
            ]
        elif part == "shapes":
            n = runs.setting.num_workers
            shapes = [h for h in (1, 2, 5, 10, 20, 50, 100) if n % h == 0]
            found[part] = [
                runs.mll(ones, hubs=h, name=f"{h} hubs x {n // h} workers")
                for h in shapes
            ]
        else:
            found[part] = _slots(runs, round_ticks)
    # Write one table and one figure per part, and all numbers to one file.
    rows = []
    for part, of_part in found.items():
        output.table(part, _table(part, of_part, options))
        title = f"{options.dataset}, {options.model}: {part}"
        against = "seconds" if part == "slots" else "iterations"
        chart = figures.chart(of_part, title, against=against, seconds="time slots")
        output.chart(chart)
        rows += results.rows(of_part, part=part)
        figure = plt.figure(figsize=(10, 3.8), layout="constrained")
        for ax, name in zip(
            figure.subplots(1, 2), ("train_loss", "test_accuracy"), strict=True
        ):
            report.plot_curves(ax, of_part, against, name)
            ax.set_xscale("log")
            if part == "slots":
                ax.set_xlabel("time slots")
        figure.axes[0].legend(fontsize=8)
        figure.suptitle(f"{title}; {options.seeds} seeds")
        output.figure(part, figure)
    output.csv("mll_sgd", rows)
    output.html("mll_sgd")
    return found


def _slots(runs: Runs, round_ticks: int) -> list[results.Result]:
    """Runs the part "slots": 10% of the workers have the rate 0.1, the rest 0.6.

    In MLL-SGD, a tick is a time slot, and slow workers skip steps. In the other
    algorithms, every worker takes every step, and each average waits for the slowest
    worker.
    """
    rates = runs.rates["10% .1, rest .6"]
    slots = wall_clock.slots_a_step(rates, runs.setting.iterations)
    return [
        runs.mll(rates, name="10% .1, rest .6")._replace(name="MLL-SGD"),
        runs.local(round_ticks, "Local SGD, waiting", slots),
        runs.hl("HL-SGD, waiting", slots),
        runs.local(1, "distributed SGD, waiting", slots),
    ]


def _table(part: str, found: list[results.Result], options: MultiLevel):
    """Tabulates the train loss during training and the final accuracy."""
    # For each round in `marks`, show the first evaluation at or after that round.
    marks = [m for m in (1, 11, 100, 200, 1000) if m <= options.rounds]
    every = options.rounds // options.evaluations
    last = len(found[0].curves.iteration)
    at = list(dict.fromkeys(min(last, math.ceil(m / every)) for m in marks))
    # For the part "slots": time slots that the first algorithm, MLL-SGD, has taken.
    slots = [found[0].seconds[index - 1] for index in at]
    columns = ["algorithm", *(f"round {index * every}" for index in at), "accuracy %"]
    if part == "slots":
        columns[1:-1] = [f"slots {slot:.0f}" for slot in slots]
    published = options.dataset == "mnist" and options.model == "logistic"
    if published:
        columns.append("published: rounds 1, 11, 100, 200")
    lines, deviations = [], []
    # One line per algorithm, with the mean loss at each mark.
    for result in found:
        loss = result.at_best("train_loss")
        accuracy = 100 * result.at_best("test_accuracy")
        cells = []
        for index, slot in zip(at, slots, strict=True):
            column = index - 1
            if part == "slots":
                # The last evaluation of this algorithm within the same time slots.
                column = np.searchsorted(result.seconds, slot, side="right") - 1
            values = loss[:, max(column, 0)]
            deviations.append(values.std())
            cells.append("not yet" if column < 0 else f"{values.mean():.4f}")
        line = [result.name, *cells, report.spread(accuracy[:, -1], 1)]
        if published:
            quoted = QUOTED.get(result.name, ()) if part != "slots" else ()
            line.append(" ".join(f"{x:.4f}" for x in quoted))
        lines.append(line)
    notes = [
        f"Train loss, mean of {options.seeds} seeds; standard deviations at most "
        f"{max(deviations):.4f}."
    ]
    return report.Table(f"{options.dataset}, {part}", columns, lines, notes)
