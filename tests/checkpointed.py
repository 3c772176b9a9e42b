"""A run of several processes that saves, dies when told, and goes on when started anew.

Usage: tests/checkpointed.py ALGORITHM FOLDER RESULT [VICTIM STEP]
"""

import logging
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decentral_jax as dj
from decentral_jax.checkpoints import Checkpoints
from tests.layouts import named
from tests.registry import ALGORITHMS
from tests.test_trajectories import flatten, problem, schedule, unflatten

STEPS, SAVE_EVERY = 24, 4


def main(name: str, folder: str, result: str, victim: int = -1, at: int = -1) -> None:
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    dj.initialize(timeout=60)
    algorithm = ALGORITHMS[name]
    sizes = named(algorithm.shape)
    workers = dj.Workers(sizes)
    tx = algorithm.make(schedule)

    def each(x):
        return x.reshape(*sizes.values(), *x.shape[1:]).astype(np.float32)

    curvature, optimum, _ = (each(x) for x in problem())

    def train_step(params, opt_state, curvature, optimum, noise):
        grads = unflatten(curvature * (flatten(params) - optimum) + noise)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = workers.spmd(train_step, donate_argnums=(0, 1))
    params = workers.replicate(unflatten(jnp.zeros(10)))
    opt_state = workers.spmd(tx.init)(params)
    problem_ = workers.shard((curvature, optimum))
    rng, start = np.random.default_rng(0), 0
    with Checkpoints(folder, workers, keep=2) as checkpoints:
        found = checkpoints.restore(params, opt_state)
        if found is not None:
            start, params, opt_state = found.step, found.params, found.opt_state
            rng.bit_generator.state = found.data
            print(f"goes on after step {start}")
        for t in range(start, STEPS):
            noise = rng.normal(size=(8, 10))
            batch = workers.shard(each(noise))
            params, opt_state = step(params, opt_state, *problem_, batch)
            if (t + 1) % SAVE_EVERY == 0:
                state = rng.bit_generator.state
                checkpoints.save(t + 1, params, opt_state, data=state)
            if (t + 1, jax.process_index()) == (at, victim):
                os.kill(os.getpid(), signal.SIGKILL)
    ends = workers.gather(params)
    if jax.process_index() == 0:
        np.savez(result, **ends)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
