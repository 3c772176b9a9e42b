"""Asynchronous AMSGrad (APAM, Math. Prog. Comp. 2023): cost and benefit of staleness.

Staleness reduces the accuracy early in training (`experiments.runs.delays`). In return,
asynchrony saves time if workers differ in speed or are numerous
(`experiments.runs.real_time`).
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import report
from experiments.data import images, tabular
from experiments.errors import UsageError, renamed
from experiments.runs import delays, real_time
from experiments.settings import RunOptions, check_evaluations, check_positive
from experiments.training import models, resuming


@dataclasses.dataclass
class Apam(RunOptions):
    """Measures the accuracy of asynchronous AMSGrad against delay and against time."""

    parts: tuple[Literal["delay", "time", "speedup"], ...] = (
        "delay",
        "time",
        "speedup",
    )
    """Parts of the experiment to run."""
    models: tuple[Literal["logistic", "lenet"], ...] = ("logistic", "lenet")
    """Models to train."""
    dataset: Literal["digits", "mnist", "a9a"] = "digits"
    """Data set; "mnist" and "a9a" are read from --data-dir."""
    data_dir: Path | None = None
    """Folder with the files of MNIST or a9a."""
    batch_size: int = 32
    """Number of examples per gradient."""
    seeds: int = 5
    """Number of seeds; each seed sets the initial model, batches, and delays."""
    delays: tuple[int, ...] = (0, 1, 10, 100, 400)
    """Largest delays D; the delay of each gradient is uniform from 0 to D."""
    iterations: int = 2000
    """Number of gradients applied in the part "delay"."""
    evaluations: int = 20
    """Number of points on each curve of "delay"; must divide the iterations."""
    rate: float = 1e-3
    """Learning rate in the part "delay", the same for all delays."""
    timing: real_time.Timing = dataclasses.field(default_factory=real_time.Timing)
    """Options of the parts "time" and "speedup"."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        check_positive(self, "batch_size", "iterations", "evaluations", "rate")
        check_evaluations(self)
        if not self.delays or min(self.delays) < 0:
            raise UsageError(f"delays must be at least 0, got {self.delays}.")
        self.timing.check()


def run(options: Apam, output: report.Output) -> None:
    """Prints tables; writes one figure and one `.csv` per part and model."""
    dataset = _load(options)
    for model in options.models:
        _run(model, dataset, options, output)
    output.html("apam")


def _load(options: Apam) -> images.Dataset:
    if options.dataset != "a9a":
        with renamed(name="dataset"):
            return images.load(options.dataset, options.data_dir)
    if "lenet" in options.models:
        raise UsageError(
            "models=lenet needs images, but dataset=a9a has none: pass --models "
            "logistic, or another data set."
        )
    if options.data_dir is None:
        raise UsageError(
            "dataset=a9a is read from files: pass --data-dir with their folder."
        )
    return images.Dataset(*tabular.load_a9a(options.data_dir), num_classes=2)


def _run(
    name: str, dataset: images.Dataset, options: Apam, output: report.Output
) -> None:
    model = models.get_model(name, dataset.num_classes)
    title, file = f"{name}, {options.dataset}", f"{name}_{options.dataset}"
    memory = resuming.memory(options)
    if "delay" in options.parts:
        found = {}
        for delay in options.delays:
            what = f"{title}, delays up to {delay}"

            def accuracies(delay=delay):
                return {
                    "accuracies": delays.accuracies(
                        model,
                        dataset,
                        delay,
                        options.rate,
                        options.seeds,
                        options.iterations,
                        options.evaluations,
                        options.batch_size,
                    )
                }

            with output.progress.status(what):
                found[delay] = memory.recall(what, accuracies)["accuracies"]
        delays.show(found, options.iterations, title, f"delay_{file}", output)
    trainer = real_time.Trainer(
        model, dataset, options.batch_size, options.timing, memory
    )
    for part, run in (("time", real_time.compare), ("speedup", real_time.speedup)):
        if part in options.parts:
            file_name = f"{part}_{file}"
            run(trainer, options.timing, options.seeds, title, file_name, output)
