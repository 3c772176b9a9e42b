"""A run of several processes that saves, can be killed, and resumes when restarted.

Usage: tests/support/checkpointed.py ALGORITHM FOLDER RESULT [VICTIM STEP]
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
from tests.contracts.test_trajectories import flatten, problem, schedule, unflatten
from tests.support.layouts import named
from tests.support.registry import ALGORITHMS

STEPS, SAVE_EVERY = 24, 4
EXAMPLES = 10  # examples per worker for D-GraB: five steps per epoch


def main(name: str, folder: str, result: str, victim: int = -1, at: int = -1) -> None:
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    dj.initialize(timeout=60)
    if name == "d_grab":
        sizes, tx = named(8), optax.chain(dj.d_grab(EXAMPLES, 8), optax.sgd(schedule))
    else:
        algorithm = ALGORITHMS[name]
        sizes, tx = named(algorithm.shape), algorithm.make(schedule)
    workers = dj.Workers(sizes)

    def each(x):
        return x.reshape(*sizes.values(), *x.shape[1:]).astype(np.float32)

    curvature, optimum, _ = (each(x) for x in problem())

    def gradients(params, opt_state, curvature, optimum, noise):
        gradient = curvature * (flatten(params) - optimum) + noise
        if name != "d_grab":
            return unflatten(gradient)
        chosen = dj.next_examples(opt_state, 2)
        k = chosen.astype(optimum.dtype)
        return jax.vmap(lambda k: unflatten(gradient + jnp.cos(k + optimum)))(k)

    def train_step(params, opt_state, *batch):
        grads = gradients(params, opt_state, *batch)
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
            print(f"resumes after step {start}")
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
