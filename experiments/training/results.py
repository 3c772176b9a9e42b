"""Train the algorithms of a comparison, and what came of each."""

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
    """An algorithm's curves and traffic."""

    name: str
    curves: Curves
    megabytes: np.ndarray  # shape=[E]: sent by a worker up to each evaluation
    seconds: np.ndarray  # shape=[E]: simulated, when the last worker is there
    rates: tuple[float, ...]

    @property
    def best(self) -> int:
        """The rate with the lowest final train loss, as a mean over seeds."""
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
    """Trains algorithms one after the other behind a progress bar.

    Those that the memory of an interrupted run holds are not trained again.

    Raises:
      UsageError: If an algorithm cannot be constructed from the options.
    """
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
    """One row an algorithm, rate, seed and evaluation."""
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
