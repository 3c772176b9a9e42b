"""Command-line options that the experiments share, with their validation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import decentral_jax as dj
from experiments.catalog import Entry
from experiments.data import images
from experiments.errors import UsageError, check_among, renamed
from experiments.training import models, wall_clock
from experiments.training.loop import Setting, worker_axes


@dataclasses.dataclass
class Network:
    """Simulated machines and links of a run; see `experiments.training.wall_clock`."""

    step_ms: float = 10.0
    """Compute time per gradient, in milliseconds."""
    slow: float = 2.0
    """Slowdown of the first worker: its compute time relative to the other workers."""
    latency_ms: float = 1.0
    """Latency per exchange, in milliseconds."""
    bandwidth: float = 10.0
    """Megabytes that each worker sends per second; 12.5 is 100 Mbit/s."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        check_positive(self, "step_ms", "bandwidth")
        check_at_least(self, 1, "slow")
        check_at_least(self, 0, "latency_ms")

    def seconds(
        self,
        entry: Entry,
        log: Sequence[dj.CommunicationCost],
        num_workers: int,
        iterations: int,
    ) -> np.ndarray:
        """Returns when the last worker finishes each iteration, `[iterations + 1]`."""
        compute = np.full((iterations, num_workers), self.step_ms / 1e3)
        if entry.waits:
            compute[:, 0] *= self.slow
        levels = worker_axes(entry.levels, num_workers)
        link = wall_clock.Link(self.latency_ms / 1e3, 1e6 * self.bandwidth)
        links = dict.fromkeys(levels, link)
        return wall_clock.finish_times(compute, log, levels, links).max(1)


def check_positive(options: Any, *names: str) -> None:
    """Raises UsageError if any option, or any of its values, is not positive."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (not np.size(value) or np.less_equal(value, 0).any()):
            raise UsageError(f"{name} must be positive, got {value}.")


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Raises UsageError if any option is less than a bound."""
    for name in names:
        value = getattr(options, name)
        if not value >= least:
            raise UsageError(f"{name} must be at least {least}, got {value}.")


def check_evaluations(options: Any) -> None:
    """Raises UsageError if `evaluations` does not divide `iterations`."""
    if options.iterations % options.evaluations:
        raise UsageError(
            f"evaluations={options.evaluations} must divide "
            f"iterations={options.iterations}."
        )


@dataclasses.dataclass
class RunOptions:
    """Options of all commands that train."""

    seeds: int = 5
    """Number of seeds; each seed sets the initial model and the order of the data."""
    out: Path | None = None
    """New folder for the results; results/COMMAND/NUMBER if not given."""
    resume: bool = False
    """Continue the latest run with these options, or the one in --out."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        check_at_least(self, 1, "seeds")


@dataclasses.dataclass
class ComparisonOptions(RunOptions):
    """Options of all commands that tune and compare synchronous algorithms."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """Data set; "mnist" and "cifar10" are read from --data-dir."""
    data_dir: Path | None = None
    """Folder with the files of MNIST (idx or .gz) or CIFAR-10 (.npz or batches)."""
    examples: int | None = None
    """Number of training examples to use, from the first on; all if not given."""
    model: str = "small_mlp"
    """Model: small_mlp, mlp, logistic, small_cnn, emnist_cnn, or resnet20."""
    workers: int = 8
    """Number of workers on the ring."""
    batch_size: int = 1
    """Number of examples per worker per iteration."""
    iterations: int = 4000
    """Number of gradients per worker."""
    evaluations: int = 10
    """Number of points on each curve; must divide the iterations."""
    rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    """Learning rates to tune over; results show the best rate of each algorithm."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        super().check()
        check_at_least(self, 1, "workers", "batch_size", "iterations", "evaluations")
        check_evaluations(self)
        check_positive(self, "rates", "examples")
        check_among("model", [self.model], models.MODELS)

    def setting(self, shuffled: float) -> Setting:
        """Loads the data and partitions it among the workers.

        Args:
          shuffled: Percentage of the label-sorted examples to shuffle.

        Returns:
          The setting of a training run.

        Raises:
          UsageError: If any option is out of range, or a file is missing or broken.
        """
        with renamed(name="dataset"):
            dataset = images.load(self.dataset, self.data_dir)
        if self.examples is not None:
            dataset = dataset._replace(
                x_train=dataset.x_train[: self.examples],
                y_train=dataset.y_train[: self.examples],
            )
        with renamed(num_workers="workers"):
            parts = images.partition(dataset.y_train, self.workers, shuffled)
        return Setting(
            dataset=dataset,
            parts=parts,
            model=models.get_model(self.model, dataset.num_classes),
            batch_size=self.batch_size,
            iterations=self.iterations,
            evaluations=self.evaluations,
            rates=tuple(self.rates),
            seeds=tuple(range(self.seeds)),
        )
