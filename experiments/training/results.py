"""Trains the algorithms of a comparison, and stores the result of each."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.catalog import Entry
from experiments.errors import from_options
from experiments.progress import Progress
from experiments.settings import Network
from experiments.training.loop import Curves, Setting, bytes_sent, step_log, train
from experiments.training.resuming import Memory


class Result(NamedTuple):
    """Curves, traffic, and simulated time of an algorithm."""

    name: str
    curves: Curves
    megabytes: np.ndarray  # shape=[E]: sent per worker until each evaluation
    seconds: np.ndarray  # shape=[E]: simulated, of the last worker
    rates: tuple[float, ...]

    @property
    def best(self) -> int:
        """Index of the rate with the lowest final train loss, averaged over seeds."""
        final = self.curves.train_loss[..., -1].mean(1)
        return int(np.argmin(np.where(np.isfinite(final), final, np.inf)))

    def at_best(self, name: str) -> np.ndarray:
        """A measurement at the best rate, shape `[seeds, E]`."""
        return getattr(self.curves, name)[self.best]


def run_all(
    entries: dict[str, Entry],
    setting: Setting,
    progress: Progress,
    title: str,
    memory: Memory,
    network: Network | None = None,
) -> list[Result]:
    """Trains algorithms one after the other, and shows a progress bar.

    Algorithms that an interrupted run has finished are not trained again.

    Args:
      entries: The algorithms by name.
      setting: Data, model, and schedule.
      progress: What shows the progress bar.
      title: Title of the progress bar, also part of the names in `memory`.
      memory: Storage of finished runs.
      network: Machines and links that determine the simulated seconds; the default
        `Network()` if None.

    Returns:
      One result per algorithm.

    Raises:
      UsageError: If an algorithm cannot be constructed from the options.
    """
    # Report options that an algorithm refuses before training starts.
    with from_options():
        for entry in entries.values():
            entry.make(setting.rates[0])
    network = network or Network()
    results = []
    with progress.bar(title, len(entries)) as bar:
        for name, entry in entries.items():
            bar.update(f"{title}: {name}", len(results))

            def run(entry=entry):
                return train(entry.make, setting, bar.advance, entry.levels)._asdict()

            curves = Curves(**memory.recall(f"{title}: {name}", run))
            log = step_log(entry.make, setting, entry.levels)
            sent = bytes_sent(log, setting.iterations)
            at = curves.iteration
            seconds = network.seconds(
                entry, log, setting.num_workers, setting.iterations
            )
            results.append(
                Result(name, curves, sent[at] / 1e6, seconds[at], setting.rates)
            )
        bar.update(title, len(entries))
    return results


def rows(results: Sequence[Result], **columns: Any) -> Iterable[dict[str, Any]]:
    """Yields one row per algorithm, rate, seed, and evaluation.

    Args:
      results: Results of the algorithms.
      **columns: Additional columns, which precede the others and have the same value in
        all rows.
    """
    for result in results:
        curves = result.curves
        for r, rate in enumerate(result.rates):
            for seed in range(curves.train_loss.shape[1]):
                for e, iteration in enumerate(curves.iteration):
                    yield {
                        **columns,
                        "algorithm": result.name,
                        "rate": rate,
                        "is_best_rate": r == result.best,
                        "seed": seed,
                        "iteration": int(iteration),
                        "megabytes_sent": round(float(result.megabytes[e]), 6),
                        "simulated_seconds": round(float(result.seconds[e]), 6),
                        "train_loss": float(curves.train_loss[r, seed, e]),
                        "test_accuracy": float(curves.test_accuracy[r, seed, e]),
                        "consensus_distance": float(curves.consensus[r, seed, e]),
                    }
