"""JAX process of one host of the network benchmark: trains or exchanges messages."""

import time

import jax

from benchmarks.support.answers import SIZE, join, obey

join()

import jax.numpy as jnp

import decentral_jax as dj
from benchmarks.network import algorithms, tasks

WORKERS = dj.Workers(SIZE)
X, Y, X_TEST, Y_TEST = tasks.load()


class Training:
    """Training of one algorithm with one learning rate."""

    def __init__(self, name: str, rate: float):
        tx = algorithms.algorithms(SIZE)[name](rate)
        step = algorithms.train_step(tx)
        self.step = WORKERS.spmd(step, donate_argnums=(0, 1))
        measure = algorithms.accuracy(jnp.asarray(X_TEST), jnp.asarray(Y_TEST))
        self.measure = WORKERS.spmd(measure)
        self.init = WORKERS.spmd(tx.init)
        self.restart()
        # Compile, and open the connections, before steps are timed.
        self.run(2 * algorithms.LOCAL_STEPS)
        self.accuracy()
        self.restart()

    def restart(self) -> None:
        """Resets parameters, optimizer state, and batches to the initial ones."""
        self.params = WORKERS.replicate(tasks.initial_params())
        self.opt_state = self.init(self.params)
        self.drawn = tasks.batches(SIZE)
        jax.block_until_ready((self.params, self.opt_state))

    def run(self, steps: int) -> float:
        """Runs some training steps, and returns the seconds that they take."""
        batches = [WORKERS.shard((X[c], Y[c])) for c in map(next, [self.drawn] * steps)]
        start = time.perf_counter()
        for batch in batches:
            self.params, self.opt_state = self.step(self.params, self.opt_state, batch)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    def accuracy(self) -> float:
        """Returns the test accuracy of the averaged model."""
        found = self.measure(self.opt_state, self.params)
        return float(found.addressable_shards[0].data[0])


class Exchange:
    """Exchange of one kind with `entries` float32 entries, without training."""

    def __init__(self, kind: str, entries: int):
        fn, tree = algorithms.exchanges(SIZE, entries)[kind]
        self.fn = WORKERS.spmd(fn, donate_argnums=0)
        self.tree = WORKERS.replicate(tree)
        self.run(1)

    def run(self, steps: int) -> float:
        """Runs some exchanges, and returns the seconds that they take."""
        start = time.perf_counter()
        for _ in range(steps):
            self.tree = self.fn(self.tree)
        jax.block_until_ready(self.tree)
        return time.perf_counter() - start


if __name__ == "__main__":
    obey({"training": Training, "exchange": Exchange})
