"""Asynchronous AMSGrad (APAM, Math. Prog. Comp. 2023): what staleness costs.

One worker whose gradients are taken at one of the last D iterates, as in the paper's
study of artificial delays: how does the accuracy fall behind, and does it catch up?
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import decentral_jax as dj
from experiments import data, models, report
from experiments.settings import check_evaluations, check_positive


@dataclasses.dataclass
class Apam:
    """Accuracy of asynchronous AMSGrad against the delay of its gradients."""

    delays: tuple[int, ...] = (0, 1, 10, 100, 400)
    """Largest delays D; each gradient's is uniform from 0 to D."""
    models: tuple[Literal["logistic", "lenet"], ...] = ("logistic", "lenet")
    """What to train."""
    dataset: Literal["digits", "mnist"] = "digits"
    """Data set; "mnist" is read from --data-dir."""
    data_dir: Path | None = None
    """Folder with the files of MNIST."""
    batch_size: int = 32
    """Examples of a gradient."""
    iterations: int = 2000
    """Gradients applied."""
    evaluations: int = 20
    """Points on each curve; divides the iterations."""
    rate: float = 1e-3
    """Learning rate, the same for all delays."""
    seeds: int = 5
    """Number of seeds: initial model, batches and delays."""
    out: Path = Path("results/apam")
    """Folder for the figures (.png) and the numbers (.csv)."""


def main(options: Apam) -> dict[tuple[str, int], np.ndarray]:
    """Prints a table, writes one figure and `.csv` a model.

    Returns:
      For each model and delay the test accuracies, shape `[seeds, evaluations]`.
    """
    check_positive(options, "batch_size", "iterations", "evaluations", "rate", "seeds")
    check_evaluations(options)
    if not options.delays or min(options.delays) < 0:
        raise ValueError(f"delays must be at least 0, got {options.delays}.")
    dataset = data.load(options.dataset, options.data_dir)
    console, found = Console(), {}
    for model in options.models:
        for delay in options.delays:
            with console.status(f"{model}, delays up to {delay}"):
                found[model, delay] = accuracies(model, dataset, delay, options)
        _report(model, found, options, console)
    return found


def accuracies(
    model: str, dataset: data.Dataset, delay: int, options: Apam
) -> np.ndarray:
    """Trains once a seed with delays up to a bound.

    Returns:
      The master's test accuracy at each evaluation, shape `[seeds, evaluations]`.
    """
    net = models.get_model(model, dataset.num_classes)
    x_train, y_train, x_test, y_test = map(jnp.asarray, dataset[:4])
    each = options.iterations // options.evaluations

    def loss_fn(params, x, y):
        logits = jnp.asarray(net.apply({"params": params}, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(seed):
        trace = dj.traces.uniform_delay(delay, options.iterations, seed=seed)
        tx = dj.apam(options.rate, trace)

        def worker(batches):
            params = net.init(jax.random.key(seed), x_train[:1])["params"]

            def iteration(carry, batch):
                params, state = carry
                grads = jax.grad(loss_fn)(params, x_train[batch], y_train[batch])
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            def stretch(carry, batches):
                carry, _ = lax.scan(iteration, carry, batches)
                master = dj.eval_params(carry[1], carry[0])
                logits = jnp.asarray(net.apply({"params": master}, x_test))
                return carry, (logits.argmax(-1) == y_test).mean()

            return lax.scan(stretch, (params, tx.init(params)), batches)[1]

        shape = (1, options.evaluations, each, options.batch_size)
        rng = np.random.default_rng(seed)
        batches = rng.integers(len(x_train), size=shape).astype(np.int32)
        run = jax.jit(jax.vmap(worker, axis_name="workers"))
        return np.asarray(run(batches))[0]

    return np.stack([one(seed) for seed in range(options.seeds)])


def _report(
    model: str,
    found: dict[tuple[str, int], np.ndarray],
    options: Apam,
    console: Console,
) -> None:
    title = f"{model}, {options.dataset}: test accuracy %"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    early = max(1, options.evaluations // 10)
    each = options.iterations // options.evaluations
    table.add_column("largest delay", justify="right")
    table.add_column(f"after {early * each} gradients", justify="right")
    table.add_column(f"after {options.iterations}", justify="right")
    figure = plt.figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    at = np.arange(1, options.evaluations + 1) * each
    rows = []
    for delay in options.delays:
        curves = 100 * found[model, delay]
        table.add_row(
            str(delay),
            *(f"{x.mean():.1f} ± {x.std():.1f}" for x in curves[:, [early - 1, -1]].T),
        )
        report.plot_seeds(ax, at, curves, f"D = {delay}")
        rows += [
            {"delay": delay, "seed": seed, "gradients": k, "test_accuracy": accuracy}
            for seed, of_seed in enumerate(found[model, delay])
            for k, accuracy in zip(at, of_seed, strict=True)
        ]
    console.print(table)
    ax.set_xlabel("gradients applied")
    ax.set_ylabel("test accuracy %")
    ax.legend(fontsize=8)
    name = f"{model}_{options.dataset}"
    report.save(figure, options.out / f"{name}.png")
    report.write_csv(options.out / f"{name}.csv", rows)
    console.print(f"Wrote {name}.png and {name}.csv to {options.out}.")
