"""Accuracy against artificial delay: one worker computes gradients at old iterates.

The setup follows the study in the APAM paper: each gradient is evaluated at one of the
last D iterates. The experiment measures how far the accuracy falls behind, and whether
it catches up.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from experiments import report, styles
from experiments.data import images
from experiments.html_report import Chart, Series


def accuracies(
    model: nn.Module,
    dataset: images.Dataset,
    delay: int,
    rate: float,
    seeds: int,
    iterations: int,
    evaluations: int,
    batch_size: int,
) -> np.ndarray:
    """Trains once per seed with delays uniform from 0 to `delay`.

    Returns:
      The master's test accuracy at each evaluation, shape `[seeds, evaluations]`.
    """
    x_train, y_train, x_test, y_test = map(jnp.asarray, dataset[:4])

    def loss_fn(params, x, y):
        logits = jnp.asarray(model.apply({"params": params}, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def run_seed(seed):
        trace = dj.traces.uniform_delay(delay, iterations, seed=seed)
        tx = dj.apam(rate, trace)

        def worker(batches):
            params = model.init(jax.random.key(seed), x_train[:1])["params"]

            def iteration(carry, batch):
                params, state = carry
                grads = jax.grad(loss_fn)(params, x_train[batch], y_train[batch])
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            def until_evaluation(carry, batches):
                carry, _ = lax.scan(iteration, carry, batches)
                master = dj.eval_params(carry[1], carry[0])
                logits = jnp.asarray(model.apply({"params": master}, x_test))
                return carry, (logits.argmax(-1) == y_test).mean()

            return lax.scan(until_evaluation, (params, tx.init(params)), batches)[1]

        # The worker axis has size 1: one worker computes all gradients.
        shape = (1, evaluations, iterations // evaluations, batch_size)
        rng = np.random.default_rng(seed)
        batches = rng.integers(len(x_train), size=shape).astype(np.int32)
        run = jax.jit(jax.vmap(worker, axis_name="workers"))
        return np.asarray(run(batches))[0]

    return np.stack([run_seed(seed) for seed in range(seeds)])


def show(
    found: dict[int, np.ndarray],
    iterations: int,
    title: str,
    name: str,
    output: report.Output,
) -> None:
    """Prints a table, and writes a figure and the numbers.

    Args:
      found: The return value of `accuracies` for each largest delay.
      iterations: Number of iterations of each run.
      title: Model and data set, for titles.
      name: Name of the files, without the suffix.
      output: Output of the experiment.
    """
    # The table shows an early evaluation, after a tenth of the run, and the last one.
    evaluations = next(iter(found.values())).shape[1]
    early, each = max(1, evaluations // 10), iterations // evaluations
    at = np.arange(1, evaluations + 1) * each
    figure = plt.figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    rows, lines, series = [], [], []
    looks = styles.assign(f"D = {delay}" for delay in found)
    for delay, of_delay in found.items():
        shown = [of_delay[:, early - 1], of_delay[:, -1]]
        if 0 in found and delay:
            shown.append(found[0][:, -1] - of_delay[:, -1])
        cells = [report.spread(100 * x, 1) for x in shown]
        lines.append((str(delay), *cells, *[""] * (3 - len(cells))))
        label = f"D = {delay}"
        report.plot_seeds(ax, at, 100 * of_delay, label, looks[label])
        measured = {"test accuracy %": 100 * of_delay}
        series.append(Series(label, {"gradients applied": at}, measured))
        rows += [
            {"delay": delay, "seed": seed, "gradients": k, "test_accuracy": accuracy}
            for seed, of_seed in enumerate(of_delay)
            for k, accuracy in zip(at, of_seed, strict=True)
        ]
    columns = (
        "largest delay",
        f"after {early * each} gradients",
        f"after {iterations}",
        "reduction from no delay, per seed",
    )
    output.table(name, report.Table(f"{title}: test accuracy %", columns, lines))
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("gradients applied")
    ax.set_ylabel("test accuracy %")
    ax.legend(fontsize=8)
    output.figure(name, figure)
    output.chart(Chart(f"{title}, by largest delay D", series))
    output.csv(name, rows)
