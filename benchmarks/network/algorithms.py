"""Algorithms of the network benchmark, and the number of steps that each one needs.

The number of steps to the target does not depend on the network. Therefore, this module
tunes the learning rates with all workers on one device, and each algorithm runs on the
network only once, with its best rate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decentral_jax as dj
from benchmarks.network import tasks

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
MOST_STEPS = 240
LOCAL_STEPS = 16


def algorithms(n: int) -> dict[str, Callable]:
    """Returns a dictionary from names to functions of the rate, for n workers."""
    ring, one_peer = dj.topology.ring(n), dj.topology.one_peer_exponential(n)

    def sgd(rate):
        return optax.sgd(rate, tasks.MOMENTUM)

    block = dj.compression.random_block(64)
    return {
        "all-reduce": lambda rate: dj.all_reduce_sgd(sgd(rate)),
        "D-PSGD ring": lambda rate: dj.d_psgd(sgd(rate), ring),
        "D-PSGD one-peer": lambda rate: dj.d_psgd(sgd(rate), one_peer),
        "DeTAG": lambda rate: dj.detag(sgd(rate), ring, rounds=2),
        "DEF, ratio 64": lambda rate: dj.def_sgd(
            optax.sgd(rate, momentum=tasks.MOMENTUM), block
        ),
        "Local SGD, tau 16": lambda rate: dj.local_sgd(sgd(rate), period=LOCAL_STEPS),
    }


def exchanges(n: int, entries: int) -> dict[str, tuple[Callable, Any]]:
    """Returns a dictionary of exchanges without training.

    Args:
      n: Number of workers.
      entries: Number of float32 entries per message.

    Returns:
      A dictionary from names to pairs of a function of one worker and its argument.
    """
    ring = np.roll(np.eye(n), 1, axis=1)
    around = dj.topology.from_matrix(ring)
    order = dj.d_grab(1000, n)
    x = np.zeros(entries, np.float32)
    grads = np.zeros((4, entries), np.float32)

    def orders(state):
        grads, _, order_state = state
        mean, order_state = order.update(grads, order_state)
        return grads, mean, order_state

    return {
        "message": (lambda x: dj.mix(x, around), x),
        "all-reduce": (dj.average, x),
        "D-GraB": (orders, (grads, x, order.init(x))),
    }


def costs(name: str, n: int) -> dj.CommunicationCosts:
    """Counts the bytes sent per worker in each step of one period, by tracing."""
    tx = algorithms(n)[name](0.1)
    sizes = {"workers": n}
    return dj.communication_costs(tx, tasks.initial_params(), axis_sizes=sizes)


def predicted_exchange(kind: str, n: int, entries: int) -> float:
    """Returns the predicted number of bytes sent per worker per exchange."""
    fn, tree = exchanges(n, entries)[kind]
    return float(dj.communication_cost(fn, tree, axis_sizes={"workers": n}).bytes_sent)


def logits_fn(params, x):
    """Computes the logits of the MLP."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def train_step(tx: optax.GradientTransformation) -> Callable:
    """Returns the training step of one worker.

    The step maps parameters, optimizer state, and batch to new parameters and state.
    """

    def loss_fn(params, batch):
        x, y = batch
        logits = logits_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def accuracy(x, y) -> Callable:
    """Returns a function of one worker that measures the averaged model's accuracy."""

    def measure(opt_state, params):
        model = dj.eval_params(opt_state, params)
        return (logits_fn(model, x).argmax(-1) == y).mean()

    return measure


def steps_to(target: float, n: int, every: int) -> dict[str, tuple[float, int | None]]:
    """Finds the best rate of each algorithm, and its number of steps to the target.

    Args:
      target: Target test accuracy of the averaged model.
      n: Number of workers.
      every: Number of steps between evaluations.

    Returns:
      A dictionary from names to pairs of rate and number of steps. The number is None
      if no rate reaches the target within `MOST_STEPS` steps.
    """
    workers = dj.Workers(n, devices=jax.devices()[:1])
    found = {}
    for name, make in algorithms(n).items():
        steps = {rate: _steps(make(rate), workers, target, every) for rate in RATES}
        best = min(RATES, key=lambda rate: steps[rate] or np.inf)
        found[name] = best, steps[best]
    return found


def _steps(tx, workers, target, every):
    """Returns the number of steps to the target, or None if it is not reached."""
    x, y, x_test, y_test = tasks.load()
    step = workers.spmd(train_step(tx), donate_argnums=(0, 1))
    measure = workers.spmd(accuracy(jnp.asarray(x_test), jnp.asarray(y_test)))
    params = workers.replicate(tasks.initial_params())
    opt_state = workers.spmd(tx.init)(params)
    drawn = tasks.batches(workers.num_workers)
    for t in range(1, MOST_STEPS + 1):
        chosen = next(drawn)
        params, opt_state = step(params, opt_state, (x[chosen], y[chosen]))
        if t % every == 0 and measure(opt_state, params)[0] >= target:
            return t
    return None
