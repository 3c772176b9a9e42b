"""Training whose examples come in the order of an optimizer's state.

`experiments.training.loop` draws batches at random on the host; here each worker asks
`dj.next_examples`. All rates and seeds of a method are one compiled program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from experiments.training.tasks import Task

# Examples a worker and step: one pair.
BATCH = 2
# The loss of all examples is measured in parts of at most so many.
AT_ONCE = 2000


def methods(examples: int, workers: int) -> dict[str, optax.GradientTransformation]:
    """Orders to compare; each passes on the mean gradient of all workers."""

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
    """Trains at every rate and seed.

    The initial model and who holds which examples depend on the seed alone. If the
    examples cannot be dealt out evenly, the last ones of the seed's draw are left out
    of training, but not of the loss.

    Args:
      order: What gives the next examples and the mean gradient, see `methods`.
      task: What is trained.
      workers: How many.
      rates: Learning rates.
      seeds: Of the runs.
      on_epoch: Called after every epoch.

    Returns:
      The loss over all examples after each epoch, shape `[rates, seeds, epochs + 1]`,
      before the first one in front.
    """
    x, y = jnp.asarray(task.x), jnp.asarray(task.y)
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

        # Workers have one model, and each its own order.
        mapped = jax.vmap(worker, (None, None, 0, 0), axis_name="workers")
        params, momentum, orders = state
        *shared, orders = mapped(params, momentum, orders, parts)
        params, momentum = jax.tree.map(lambda x: x[0], shared)
        return (params, momentum, orders), measure(params, x, y)

    def measure(params, x, y):
        # In parts, for the memory.
        size = next(size for size in range(AT_ONCE, 0, -1) if len(x) % size == 0)
        x, y = (z.reshape(-1, size, *z.shape[1:]) for z in (x, y))
        return lax.map(lambda part: loss_fn(params, *part), (x, y)).mean()

    # Runs one after the other: a map over them would shuffle in every step, since which
    # branch is taken could differ between runs.
    runs = [(rate, i) for rate in rates for i in range(len(seeds))]
    rate = jnp.asarray([rate for rate, _ in runs], jnp.float32)
    seed = jnp.asarray([i for _, i in runs], jnp.int32)
    state = jax.jit(jax.vmap(start))(rate, keys[seed])
    losses = [jax.jit(jax.vmap(measure, (0, None, None)))(state[0], x, y)]

    def epochs(state, parts, x, y):
        def one(run):
            rate, seed, state = run
            return epoch(rate, state, parts[seed], x, y)

        return lax.map(one, (rate, seed, state))

    step = jax.jit(epochs, donate_argnums=0)
    for _ in range(task.epochs):
        state, loss = step(state, parts, x, y)
        losses.append(jax.block_until_ready(loss))
        on_epoch()
    shape = (len(rates), len(seeds), task.epochs + 1)
    return np.stack(losses, -1).reshape(shape)
