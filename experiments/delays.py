"""Accuracy against artificial delay: one worker whose gradients are of old iterates.

As in the APAM paper's study: each gradient is taken at one of the last D iterates. How
far does the accuracy fall behind, and does it catch up?
"""

from pathlib import Path

import flax.linen as nn
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
from experiments import data, report


def accuracies(
    model: nn.Module,
    dataset: data.Dataset,
    delay: int,
    rate: float,
    seeds: int,
    iterations: int,
    evaluations: int,
    batch_size: int,
) -> np.ndarray:
    """Trains once a seed with delays uniform from 0 to `delay`.

    Returns:
      The master's test accuracy at each evaluation, shape `[seeds, evaluations]`.
    """
    x_train, y_train, x_test, y_test = map(jnp.asarray, dataset[:4])

    def loss_fn(params, x, y):
        logits = jnp.asarray(model.apply({"params": params}, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(seed):
        trace = dj.traces.uniform_delay(delay, iterations, seed=seed)
        tx = dj.apam(rate, trace)

        def worker(batches):
            params = model.init(jax.random.key(seed), x_train[:1])["params"]

            def iteration(carry, batch):
                params, state = carry
                grads = jax.grad(loss_fn)(params, x_train[batch], y_train[batch])
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            def stretch(carry, batches):
                carry, _ = lax.scan(iteration, carry, batches)
                master = dj.eval_params(carry[1], carry[0])
                logits = jnp.asarray(model.apply({"params": master}, x_test))
                return carry, (logits.argmax(-1) == y_test).mean()

            return lax.scan(stretch, (params, tx.init(params)), batches)[1]

        shape = (1, evaluations, iterations // evaluations, batch_size)
        rng = np.random.default_rng(seed)
        batches = rng.integers(len(x_train), size=shape).astype(np.int32)
        run = jax.jit(jax.vmap(worker, axis_name="workers"))
        return np.asarray(run(batches))[0]

    return np.stack([one(seed) for seed in range(seeds)])


def show(
    found: dict[int, np.ndarray],
    iterations: int,
    title: str,
    path: Path,
    console: Console,
) -> None:
    """Prints a table, writes a figure and numbers.

    Args:
      found: From a delay to what `accuracies` returns.
      iterations: Of the whole runs.
      title: What was trained.
      path: Of the figure and, with `.csv`, the numbers.
      console: Where to print.
    """
    evaluations = next(iter(found.values())).shape[1]
    early, each = max(1, evaluations // 10), iterations // evaluations
    at = np.arange(1, evaluations + 1) * each
    table = Table(
        title=f"{title}: test accuracy %", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("largest delay", justify="right")
    table.add_column(f"after {early * each} gradients", justify="right")
    table.add_column(f"after {iterations}", justify="right")
    table.add_column("less than no delay", justify="right")
    figure = plt.figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    rows = []
    for delay, of_delay in found.items():
        shown = [of_delay[:, early - 1], of_delay[:, -1]]
        if 0 in found and delay:
            shown.append(found[0][:, -1] - of_delay[:, -1])
        table.add_row(
            str(delay), *(f"{100 * x.mean():.1f} ± {100 * x.std():.1f}" for x in shown)
        )
        report.plot_seeds(ax, at, 100 * of_delay, f"D = {delay}")
        rows += [
            {"delay": delay, "seed": seed, "gradients": k, "test_accuracy": accuracy}
            for seed, of_seed in enumerate(of_delay)
            for k, accuracy in zip(at, of_seed, strict=True)
        ]
    console.print(table)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("gradients applied")
    ax.set_ylabel("test accuracy %")
    ax.legend(fontsize=8)
    report.save(figure, path)
    report.write_csv(path.with_suffix(".csv"), rows)
    console.print(f"Wrote {path.name} and .csv to {path.parent}.")
