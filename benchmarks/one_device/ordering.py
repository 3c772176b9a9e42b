"""Measures the cost of ordering examples, relative to averaging their gradients.

`python -m benchmarks.one_device.ordering` compares a step of D-GraB, which orders and
averages, with one mean over the same array of gradients. All workers are on one device,
with microbatches of 4, for 4 to 64 workers and 10^4 to 10^6 parameters.

`python -m benchmarks.one_device.ordering training` compares complete training steps of
D-GraB and of random orders with the same gradients, for LeNet on images of 8x8 to 32x32
pixels and for the LSTM.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import decentral_jax as dj
from benchmarks.support import command
from benchmarks.support.timing import in_turn, machine, ratio, table
from experiments.training import models, ordered, tasks

BATCH = 4


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=("alone", "training"), nargs="?")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    print(machine())
    (_training if options.what == "training" else _alone)(options.repeats)


def _alone(repeats):
    """Times ordering without training."""
    for d in (10_000, 100_000, 1_000_000):
        for n in (4, 16, 64):
            calls = max(1, 20_000_000 // (n * BATCH * d))
            times = in_turn(_runs(n, d), repeats, calls)
            print(f"\n{n} workers x {BATCH} gradients of {d:,} entries")
            print(table(times))
            print(ratio(times, "D-GraB", "mean"))
            print(ratio(times, "D-GraB, sketch 1000", "mean"))


def _runs(n, d):
    """Returns functions that average, or order and average, the same gradients."""
    grads = jax.random.normal(jax.random.key(0), (n, BATCH, d))

    def run(tx):
        order = jax.jit(jax.vmap(tx.update, axis_name="workers"), donate_argnums=1)
        box = [jax.vmap(tx.init)(jnp.zeros((n, d)))]

        def step():
            mean, box[0] = order(grads, box[0])
            return mean

        return step

    mean = jax.jit(lambda grads: grads.mean((0, 1)))
    return {
        "mean": lambda: mean(grads),
        "D-GraB": run(dj.d_grab(1000, n)),
        "D-GraB, sketch 1000": run(dj.d_grab(1000, n, sketch=1000)),
    }


def _training(repeats):
    """Times complete training steps."""
    rng = np.random.default_rng(0)

    def lenet(size, channels):
        task = tasks.load("lenet", None, None, None)
        x = rng.uniform(size=(640, size, size, channels)).astype(np.float32)
        return task._replace(x=x, y=task.y[: len(x)], model=models.LeNet(10))

    lstm = tasks.load("lstm", None, None, 640)
    for name, task, workers in (
        ("LeNet, 8x8 images", lenet(8, 1), 8),
        ("LeNet, 28x28 images", lenet(28, 1), 8),
        ("LeNet, 32x32 images of 3 colors", lenet(32, 3), 8),
        ("LSTM, 35 words of 500", lstm, 4),
    ):
        orders = ordered.methods(len(task.x) // workers, workers)
        steps = {name: _step(task, order, workers) for name, order in orders.items()}
        steps["D-RR, no rows"] = _step(task, orders["D-RR"], workers, rows=False)
        times = in_turn(steps, repeats, calls=5)
        print(f"\n{name}, {workers} workers x {BATCH}")
        print(table(times))
        for method in ("D-GraB", "ID-GraB, pairs", "ID-GraB, mean"):
            print(ratio(times, method, "D-RR"))
        print(ratio(times, "D-GraB", "D-RR, no rows"))


def _step(task, order, workers, rows=True):
    """Returns a function that takes a step of SGD with `BATCH` examples per worker.

    Args:
      task: Training task.
      order: Ordering method.
      workers: Number of workers.
      rows: Whether to compute the gradient of every example. If False, the compiler may
        replace the mean of the gradients with the gradient of the mean.
    """
    x, y = jnp.asarray(task.x), jnp.asarray(task.y)
    params = task.model.init(jax.random.key(0), x[:1])["params"]

    def loss_fn(params, x, y):
        return task.loss(task.model.apply({"params": params}, x[None]), y[None])

    def worker(params, state, part, x, y):
        chosen = part[dj.next_examples(state, BATCH)]
        grads = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, x[chosen], y[chosen])
        if rows:
            grads = lax.optimization_barrier(grads)
        mean, state = order.update(grads, state)
        params = jax.tree.map(lambda x, g: x - 0.01 * g, params, mean)
        return params, state

    mapped = jax.vmap(worker, (None, 0, 0, None, None), (None, 0), axis_name="workers")
    step = jax.jit(mapped, donate_argnums=(0, 1))
    each = len(x) // workers
    parts = jnp.arange(workers * each, dtype=jnp.int32).reshape(workers, each)
    box = [params, jax.vmap(lambda _: order.init(params))(parts)]

    def run():
        box[:] = step(*box, parts, x, y)
        # Return a copy, because the next step overwrites the array.
        return jnp.copy(jax.tree.leaves(box[0])[0])

    return run


if __name__ == "__main__":
    command.run(main)
