"""The training loop that most experiments share.

One compiled program trains an algorithm with all learning rates and all seeds: outer
`vmap`s over the runs enclose the worker axes, and a scan runs over iterations.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from experiments.data.images import Dataset

AXIS = "workers"


class Setting(NamedTuple):
    """Data, model, and schedule that all algorithms of a comparison share."""

    dataset: Dataset
    parts: np.ndarray  # shape=[n, m]: indices of each worker's examples
    model: nn.Module
    batch_size: int  # examples per worker per iteration
    iterations: int
    evaluations: int  # evenly spaced over the iterations; must divide them
    rates: tuple[float, ...]  # learning rates
    seeds: tuple[int, ...]
    # Whether to compute the gradients of the workers one after the other. On a CPU,
    # this is faster for convolutions, and if the batch of one worker fills the caches.
    sequential: bool = False

    @property
    def num_workers(self) -> int:
        """The number of workers n."""
        return len(self.parts)


class Curves(NamedTuple):
    """Measurements at each evaluation, for each rate and seed."""

    iteration: np.ndarray  # shape=[E]: completed iterations (gradients per worker)
    train_loss: np.ndarray  # shape=[rates, seeds, E]: averaged model, all examples
    test_accuracy: np.ndarray  # shape=[rates, seeds, E]: averaged model
    consensus: np.ndarray  # shape=[rates, seeds, E]: consensus distance
    seconds: float  # run time of all rates and seeds together, without compilation


def train(
    make: Callable[..., optax.GradientTransformation],
    setting: Setting,
    on_progress: Callable[[float], None] = lambda share: None,
    levels: Mapping[str, int] | None = None,
) -> Curves:
    """Trains one algorithm with every rate and seed of a setting.

    The initial model and the batches depend only on the seed, so that they are the same
    for all rates and all algorithms.

    Args:
      make: Function from a learning rate to the algorithm.
      setting: Data, model, and schedule.
      on_progress: Function that is called after each evaluation with the fraction of
        all iterations completed since the previous call.
      levels: Names and sizes of the worker axes, outermost first. If None, there is a
        single axis.

    Returns:
      The measurements.
    """
    rates = jnp.asarray(setting.rates, jnp.float32)
    keys = jnp.stack([jax.random.key(seed) for seed in setting.seeds])
    # Pass the data as arguments of the program: XLA would try to fold constants.
    x_train, y_train, x_test, y_test = map(jnp.asarray, setting.dataset[:4])
    data = _as_bytes(x_train), y_train, x_test, y_test
    start, advance = _programs(make, setting, levels)
    runs = jax.jit(start)(rates, _initial(setting.model, keys, x_train[:1]))
    batches = _batches(setting)
    batch = next(batches)
    # Compile before the clock starts.
    step = jax.jit(advance, donate_argnums=2)
    step = step.lower(rates, batch, runs, data).compile()
    curves, begin = [], time.perf_counter()
    for _ in range(setting.evaluations):
        runs, measured = step(rates, batch, runs, data)
        batch = next(batches)
        curves.append(jax.block_until_ready(measured))
        on_progress(1 / setting.evaluations)
    seconds = time.perf_counter() - begin
    loss, accuracy, consensus = (np.stack(x, -1) for x in zip(*curves, strict=True))
    each = setting.iterations // setting.evaluations
    iteration = np.arange(1, setting.evaluations + 1) * each
    return Curves(iteration, loss, accuracy, consensus, seconds)


def step_log(
    make: Callable[..., optax.GradientTransformation],
    setting: Setting,
    levels: Mapping[str, int] | None = None,
) -> dj.CommunicationCosts:
    """Counts the bytes sent per worker in each iteration of one period.

    Args:
      make: Function from a learning rate to the algorithm.
      setting: Model and number of workers.
      levels: Names and sizes of the worker axes, outermost first. If None, there is a
        single axis.

    Returns:
      One cost per iteration of the period.
    """
    example = jnp.asarray(setting.dataset.x_train[:1])
    key = jax.random.key(0)
    params = jax.eval_shape(setting.model.init, key, example)["params"]
    sizes = worker_axes(levels, setting.num_workers)
    return dj.communication_costs(make(0.1), params, axis_sizes=sizes)


def bytes_sent(log: dj.CommunicationCosts, iterations: int) -> np.ndarray:
    """Returns cumulative bytes sent per worker, `[iterations + 1]`, starting at 0."""
    each = np.resize(log.bytes_sent, iterations)
    return np.concatenate([[0.0], np.cumsum(each)])


def _as_bytes(x: jax.Array) -> tuple[jax.Array, float]:
    """Returns images and the value to divide them by: as bytes if that is exact.

    Gathering bytes is faster than gathering floats.
    """
    for scale in (255.0, 16.0):
        levels = jnp.round(x * scale)
        if jnp.array_equal(levels / scale, x) and levels.min() >= 0:
            return levels.astype(jnp.uint8), scale
    return x, 1.0


@functools.partial(jax.jit, static_argnums=0)
def _initial(model: nn.Module, keys: jax.Array, example: jax.Array) -> Any:
    """Returns the initial model of every seed, stacked along a leading axis."""
    return jax.vmap(lambda key: model.init(key, example)["params"])(keys)


def _batches(setting: Setting) -> Iterator[jax.Array]:
    """Yields example indices up to the next evaluation, `[seeds, n, T, batch]`.

    The host draws them, because random bits inside the program would take most of its
    compilation time.
    """
    rngs = [np.random.default_rng(seed) for seed in setting.seeds]
    n, m = setting.parts.shape
    each = setting.iterations // setting.evaluations
    shape = (n, each, setting.batch_size)
    workers = np.arange(n)[:, None, None]
    while True:
        drawn = [setting.parts[workers, rng.integers(m, size=shape)] for rng in rngs]
        yield jnp.asarray(np.stack(drawn), jnp.int32)


def worker_axes(levels: Mapping[str, int] | None, num_workers: int) -> dict[str, int]:
    """Returns names and sizes of the worker axes: a single axis if `levels` is None."""
    return dict(levels) if levels else {AXIS: num_workers}


def _programs(
    make: Callable, setting: Setting, levels: Mapping[str, int] | None
) -> tuple[Callable, Callable]:
    """Builds two functions of all runs: initialization, and training until evaluation.

    Both functions map over rates and seeds. The second one runs all iterations up to
    the next evaluation, and returns the new state and the measurements.
    """
    model, n = setting.model, setting.num_workers
    levels = worker_axes(levels, n)
    axes, sizes = tuple(levels), tuple(levels.values())

    def logits_fn(params, x) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, x))

    def loss_fn(params, x, y):
        logits = logits_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def gradient(params, batch, x_train, scale, y_train):
        x = x_train[batch].astype(jnp.float32) / scale
        return jax.grad(loss_fn)(params, x, y_train[batch])

    if setting.sequential:
        gradient = jax.custom_batching.sequential_vmap(gradient)

    def start(rate, params):
        def replicate(x):
            return jnp.broadcast_to(x, (*sizes, *jnp.shape(x)))

        return jax.tree.map(replicate, (params, make(rate).init(params)))

    def advance(rate, batches, run, data):
        (x_train, scale), y_train, x_test, y_test = data
        tx = make(rate)

        def worker(batches, run):
            def iteration(run, batch):
                params, opt_state = run
                grads = gradient(params, batch, x_train, scale, y_train)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            # Train, then measure the average over workers.
            (params, opt_state), _ = lax.scan(iteration, run, batches)
            averaged = dj.eval_params(opt_state, params, axes)
            consensus = dj.consensus_distance(params, axes)
            return (params, opt_state), (averaged, consensus)

        # Map over the worker axes, innermost first; measurements are equal on all
        # workers, and are returned once.
        for axis in reversed(axes):
            worker = jax.vmap(worker, axis_name=axis, out_axes=(0, None))
        batches = batches.reshape(*sizes, *batches.shape[1:])
        run, (averaged, consensus) = worker(batches, run)
        hits = logits_fn(averaged, x_test).argmax(-1) == y_test
        loss = loss_fn(averaged, x_train.astype(jnp.float32) / scale, y_train)
        return run, (loss, hits.mean(), consensus)

    # Map over seeds, then over rates. All rates share initial models and batches.
    start = jax.vmap(jax.vmap(start, (None, 0)), (0, None))
    advance = jax.vmap(jax.vmap(advance, (None, 0, 0, None)), (0, None, 0, None))
    return start, advance
