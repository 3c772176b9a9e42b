"""Training in which an ordering transformation determines the order of the examples.

`experiments.training.loop` draws batches at random on the host. In this module, each
worker calls `dj.next_examples` instead. One compiled program trains a method with all
rates and seeds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from experiments.training.tasks import Task

# Number of examples per worker per step: one pair.
BATCH = 2
# Maximum number of examples per part when measuring the loss of all examples.
LOSS_PART = 2000


def methods(examples: int, workers: int) -> dict[str, optax.GradientTransformation]:
    """Returns the ordering methods to compare.

    Each of them replaces the gradients with the mean gradient of all workers.

    Args:
      examples: Number of examples per worker.
      workers: Number of workers.
    """

    def averaged(order):
        return optax.chain(order, dj.average_gradients())

    return {
        "D-GraB": dj.d_grab(examples, workers),
        "D-RR": averaged(dj.random_reshuffling(examples)),
        "ID-GraB, pairs": averaged(dj.pair_balance(examples)),
        "ID-GraB, mean": averaged(dj.grab(examples)),
    }


def train(
    order: optax.GradientTransformation,
    task: Task,
    workers: int,
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    on_epoch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Trains with every rate and seed.

    The initial model and the examples of each worker depend only on the seed. If the
    number of workers does not divide the number of examples, the seed determines which
    remaining examples are excluded from training. The loss includes all examples.

    Args:
      order: Ordering method, one of `methods`.
      task: Training task.
      workers: Number of workers.
      rates: Learning rates.
      seeds: Seeds of the runs.
      on_epoch: Function that is called after every epoch.

    Returns:
      The loss over all examples, shape `[rates, seeds, epochs + 1]`: before training,
      and after each epoch.
    """
    x, y = jnp.asarray(task.x), jnp.asarray(task.y)
    # Partition the examples among workers at random, for each seed.
    each = len(x) // workers
    parts = jnp.asarray(
        [
            np.random.default_rng(seed).permutation(len(x))[: workers * each]
            for seed in seeds
        ],
        jnp.int32,
    ).reshape(len(seeds), workers, each)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    def loss_fn(params, x, y):
        norm = optax.tree.norm(params, squared=True)
        outputs = task.model.apply({"params": params}, x)
        return task.loss(outputs, y) + task.penalty / 2 * norm

    def gradient(params, x, y):
        return jax.grad(loss_fn)(params, x[None], y[None])

    def start(rate, key):
        params = task.model.init(key, x[:1])["params"]
        orders = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (workers, *jnp.shape(s))), order.init(params)
        )
        return params, optax.sgd(rate, task.momentum).init(params), orders

    def epoch(rate, state, parts, x, y):
        sgd = optax.sgd(rate, task.momentum)

        def worker(params, momentum, orders, part):
            def step(state, _):
                params, momentum, orders = state
                chosen = part[dj.next_examples(orders, BATCH)]
                grads = jax.vmap(gradient, (None, 0, 0))(params, x[chosen], y[chosen])
                mean, orders = order.update(grads, orders)
                updates, momentum = sgd.update(mean, momentum, params)
                return (optax.apply_updates(params, updates), momentum, orders), None

            state = (params, momentum, orders)
            return lax.scan(step, state, length=-(-each // BATCH))[0]

        # All workers share the model and the momentum, and each has its own order.
        mapped = jax.vmap(worker, (None, None, 0, 0), axis_name="workers")
        params, momentum, orders = state
        *shared, orders = mapped(params, momentum, orders, parts)
        params, momentum = jax.tree.map(lambda x: x[0], shared)
        return (params, momentum, orders), measure(params, x, y)

    def measure(params, x, y):
        # Measure parts of equal size one after the other, to save memory.
        size = next(size for size in range(LOSS_PART, 0, -1) if len(x) % size == 0)
        x, y = (z.reshape(-1, size, *z.shape[1:]) for z in (x, y))
        return lax.map(lambda part: loss_fn(params, *part), (x, y)).mean()

    # Train the runs one after the other. Under `vmap`, a condition executes both
    # branches, so that every step would also reshuffle.
    runs = [(rate, i) for rate in rates for i in range(len(seeds))]
    rate = jnp.asarray([rate for rate, _ in runs], jnp.float32)
    seed = jnp.asarray([i for _, i in runs], jnp.int32)
    state = jax.jit(jax.vmap(start))(rate, keys[seed])
    losses = [jax.jit(jax.vmap(measure, (0, None, None)))(state[0], x, y)]

    def epochs(state, parts, x, y):
        def one_run(run):
            rate, seed, state = run
            return epoch(rate, state, parts[seed], x, y)

        return lax.map(one_run, (rate, seed, state))

    step = jax.jit(epochs, donate_argnums=0)
    for _ in range(task.epochs):
        state, loss = step(state, parts, x, y)
        losses.append(jax.block_until_ready(loss))
        on_epoch()
    shape = (len(rates), len(seeds), task.epochs + 1)
    return np.stack(losses, -1).reshape(shape)
