"""Asynchronous against synchronous workers in wall-clock time, with the real engine.

Threads, queues, gradients, and steps of the master are real. A sleep before each
gradient emulates additional compute time, because the workers share the cores of this
machine. The titles of the figures state the sleep.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import decentral_jax as dj
from decentral_jax import engine
from experiments import report, styles
from experiments.data import images
from experiments.errors import UsageError
from experiments.html_report import Chart, Series
from experiments.settings import check_positive
from experiments.training.resuming import Memory


@dataclasses.dataclass
class Timing:
    """Options of the parts "time" and "speedup"."""

    workers: int = 4
    """Number of workers in the part "time"."""
    slow: float = 3.0
    """Slowdown of the last worker in the runs with unequal speeds."""
    sleep_ms: float = 20.0
    """Milliseconds of sleep before each gradient."""
    gradients: int = 600
    """Number of gradients per run; synchronous steps take one from every worker."""
    points: int = 20
    """Number of points on each curve; must divide the gradients."""
    adaptive_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of AMSGrad to tune over."""
    sgd_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of SGD to tune over."""
    goal: float = 90.0
    """Target test accuracy in percent; tables give the time to reach it."""
    speedup_workers: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of workers in the part "speedup"; must contain 1."""

    def check(self) -> None:
        """Raises UsageError if any option is out of range."""
        check_positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.gradients % self.points:
            raise UsageError(
                f"points={self.points} must divide gradients={self.gradients}."
            )
        if 1 not in self.speedup_workers:
            raise UsageError(
                "speedup_workers must contain 1, which is the baseline, got "
                f"{self.speedup_workers}."
            )


class Method(NamedTuple):
    """An optimizer with its mode of synchronization and its grid of learning rates."""

    make: Callable[[float], optax.GradientTransformation]
    synchronous: bool
    rates: tuple[float, ...]


class Curve(NamedTuple):
    """Measurements of the master during a run."""

    seconds: np.ndarray  # shape=[points]
    test_accuracy: np.ndarray  # shape=[points]
    train_loss: float  # final value


def methods(options: Timing) -> dict[str, Method]:
    """Returns the methods to compare."""
    adaptive, plain = options.adaptive_rates, options.sgd_rates
    return {
        "asynchronous AMSGrad": Method(dj.amsgrad, False, adaptive),
        "asynchronous SGD": Method(optax.sgd, False, plain),
        "synchronous AMSGrad": Method(dj.amsgrad, True, adaptive),
    }


class Trainer:
    """Trains one model on one data set.

    Args:
      model: Model to train.
      dataset: Data set. Every worker draws from all of its examples.
      batch_size: Number of examples per gradient.
      options: Numbers of gradients and points.
      memory: Storage of finished runs.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: images.Dataset,
        batch_size: int,
        options: Timing,
        memory: Memory,
    ):
        self._model = repr(model)
        self._memory = memory
        self._curves: dict[tuple, Curve] = {}
        self._dataset = dataset
        self._batch_size = batch_size
        self._options = options
        x_train, y_train, x_test, y_test = map(jnp.asarray, dataset[:4])

        def loss_fn(params, batch):
            x, y = batch
            logits = jnp.asarray(model.apply({"params": params}, x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def accuracy(params):
            logits = jnp.asarray(model.apply({"params": params}, x_test))
            return (logits.argmax(-1) == y_test).mean()

        self._gradient = jax.grad(loss_fn)
        self._accuracies = jax.jit(lambda many: jax.lax.map(accuracy, many))
        self._loss = jax.jit(lambda params: loss_fn(params, (x_train, y_train)))
        self._init = jax.jit(lambda key: model.init(key, x_train[:1])["params"])

    def run(self, method: Method, rate: float, sleeps: np.ndarray, seed: int) -> Curve:
        """Trains with one worker per sleep in seconds; runs equal calls only once."""
        key = method.make.__name__, method.synchronous, rate, *sleeps, seed
        if key not in self._curves:
            recalled = self._memory.recall(
                f"{self._model} {key}",
                lambda: self._train(method, rate, sleeps, seed)._asdict(),
            )
            self._curves[key] = Curve(**recalled)
        return self._curves[key]

    def _train(self, method, rate, sleeps, seed) -> Curve:
        x, y = self._dataset.x_train, self._dataset.y_train
        options, kept = self._options, []

        def batches(worker):
            rng = np.random.default_rng((seed, worker))
            while True:
                chosen = rng.integers(len(x), size=self._batch_size)
                time.sleep(sleeps[worker])
                yield x[chosen], y[chosen]

        # Store the master at evenly spaced numbers of gradients, and evaluate it after
        # the run, so that evaluation does not slow down the workers.
        def keep(progress):
            due = (len(kept) + 1) * options.gradients // options.points
            if progress.applied >= due:
                kept.append((progress.seconds, progress.params))

        engine.run(
            self._gradient,
            self._init(jax.random.key(seed)),
            batches,
            method.make(rate),
            options.gradients,
            num_workers=len(sleeps),
            synchronous=method.synchronous,
            on_progress=keep,
        )
        seconds, params = zip(*kept, strict=True)
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        last = jax.tree.map(lambda x: x[-1], params)
        accuracy = np.asarray(self._accuracies(params))
        return Curve(np.array(seconds), accuracy, float(self._loss(last)))

    def best_rate(self, method: Method, sleeps: np.ndarray) -> float:
        """Returns the learning rate with the lowest final train loss on seed 0."""
        if len(method.rates) == 1:
            return method.rates[0]
        losses = [self.run(method, rate, sleeps, 0).train_loss for rate in method.rates]
        return method.rates[int(np.nanargmin(losses))]


def setting(sleep_ms: float) -> str:
    """Describes the emulation, for the title of a figure."""
    return (
        f"emulated compute: {sleep_ms:g} ms sleep per gradient, {os.cpu_count()} cores"
    )


def compare(
    trainer: Trainer,
    options: Timing,
    seeds: int,
    title: str,
    name: str,
    output: report.Output,
) -> dict[tuple[str, str], list[Curve]]:
    """Compares accuracy against time, for workers of equal and of unequal speed.

    Returns:
      A dictionary from (speeds, method) to the curves of all seeds.
    """
    unit = options.sleep_ms / 1e3
    equal = np.full(options.workers, unit)
    unequal = equal * np.r_[np.ones(options.workers - 1), options.slow]
    figure = plt.figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    # One panel per distribution of speeds, one curve per method at its best rate.
    found, rows, lines = {}, [], []
    speeds = {"equal": equal, f"one {options.slow:g}x slower": unequal}
    for ax, (speed, sleeps) in zip(axes, speeds.items(), strict=True):
        series = []
        for method_name, method in methods(options).items():
            with output.progress.status(f"{title}: {method_name}, {speed}"):
                rate = trainer.best_rate(method, sleeps)
                curves = [trainer.run(method, rate, sleeps, i) for i in range(seeds)]
            found[speed, method_name] = curves
            seconds = np.array([curve.seconds for curve in curves])
            accuracy = 100 * np.array([curve.test_accuracy for curve in curves])
            lines.append(
                (
                    f"{method_name}, {speed}",
                    _first_time(seconds, accuracy >= options.goal),
                    report.spread(seconds[:, -1], 2),
                    report.spread(accuracy[:, -1], 1),
                    report.rate(method.rates, method.rates.index(rate)),
                )
            )
            style = styles.STYLES[method_name]
            report.plot_seeds(ax, seconds.mean(0), accuracy, method_name, style)
            x, y = {"seconds": seconds.mean(0)}, {"test accuracy %": accuracy}
            series.append(Series(method_name, x, y, f"rate {rate:g}"))
            rows += [
                {
                    "speeds": speed,
                    "method": method_name,
                    "rate": rate,
                    "seed": seed,
                    "seconds": s,
                    "test_accuracy": a,
                }
                for seed, curve in enumerate(curves)
                for s, a in zip(curve.seconds, curve.test_accuracy, strict=True)
            ]
        ax.set_title(f"{options.workers} workers, {speed}", fontsize=9)
        output.chart(Chart(f"{title}, {options.workers} workers, {speed}", series))
        ax.set_xlabel("seconds")
    columns = "method", f"seconds to {options.goal:g} %", "total seconds", "accuracy %"
    heading = f"{title}, {options.workers} workers"
    output.table(name, report.Table(heading, (*columns, "best rate"), lines))
    axes[0].set_ylabel("test accuracy %")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{title}; {setting(options.sleep_ms)}", fontsize=9)
    output.figure(name, figure)
    output.csv(name, rows)
    return found


def _first_time(seconds: np.ndarray, reached: np.ndarray) -> str:
    """Formats when runs, `[seeds, points]`, first reach the target: mean, deviation."""
    if not reached.any(1).all():
        return f"{reached.any(1).sum()} of {len(reached)} runs"
    first = seconds[np.arange(len(reached)), reached.argmax(1)]
    return report.spread(first, 2)


def speedup(
    trainer: Trainer,
    options: Timing,
    seeds: int,
    title: str,
    name: str,
    output: report.Output,
) -> dict[tuple[str, int], list[Curve]]:
    """Measures how much faster more workers apply the same number of gradients.

    The learning rate is the best one with `options.workers` workers.

    Returns:
      A dictionary from (method, number of workers) to the curves of all seeds.
    """
    unit = options.sleep_ms / 1e3
    figure = plt.figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    found, rows, lines, series = {}, [], [], []
    for method_name, method in methods(options).items():
        if method.make is not dj.amsgrad:
            continue
        # Train with each number of workers at one rate, then divide the run times.
        rate = trainer.best_rate(method, np.full(options.workers, unit))
        for n in sorted(options.speedup_workers):
            with output.progress.status(f"{title}: {method_name}, {n} workers"):
                found[method_name, n] = [
                    trainer.run(method, rate, np.full(n, unit), i) for i in range(seeds)
                ]
        seconds = {
            n: np.array([curve.seconds[-1] for curve in found[method_name, n]])
            for n in sorted(options.speedup_workers)
        }
        factors = {n: seconds[1] / seconds[n] for n in seconds}
        for n in seconds:
            accuracy = 100 * np.array(
                [c.test_accuracy[-1] for c in found[method_name, n]]
            )
            lines.append(
                (
                    f"{method_name}, {n} workers",
                    f"{seconds[n].mean():.2f}",
                    report.spread(factors[n], 2),
                    f"{100 * factors[n].mean() / n:.0f} %",
                    report.spread(accuracy, 1),
                    report.rate(method.rates, method.rates.index(rate)),
                )
            )
            rows += [
                {
                    "method": method_name,
                    "workers": n,
                    "seed": seed,
                    "seconds": s,
                    "speedup": f,
                }
                for seed, (s, f) in enumerate(zip(seconds[n], factors[n], strict=True))
            ]
        y = np.stack(list(factors.values()), 1)
        style = styles.STYLES[method_name]
        report.plot_seeds(ax, list(factors), y, method_name, style)
        x = {"workers": list(factors)}
        series.append(Series(method_name, x, {"speedup": y}, f"rate {rate:g}"))
    columns = "method", "seconds", "speedup", "of ideal", "accuracy %", "best rate"
    output.table(name, report.Table(f"{title}, speedup", columns, lines))
    output.chart(Chart(f"{title}, speedup", series))
    ax.axline((1, 1), slope=1, color="gray", lw=0.8, ls=":", label="ideal")
    ax.set_xlabel("workers")
    ax.set_ylabel("speedup")
    ax.legend(fontsize=8)
    ax.set_title(f"{title}\n{setting(options.sleep_ms)}", fontsize=8)
    output.figure(name, figure)
    output.csv(name, rows)
    return found
