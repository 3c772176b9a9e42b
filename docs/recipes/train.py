"""Trains on any number of processes and resumes after a failure."""

import sys

import jax
import numpy as np
import optax

import decentral_jax as dj
from decentral_jax.checkpoints import Checkpoints

dj.initialize()  # one process on a laptop, all processes together on a cluster

n = max(4, jax.device_count())
workers = dj.Workers(n)
tx = dj.d_psgd(0.1, dj.topology.ring(n))


def train_step(params, opt_state, batch):
    """One worker's step."""
    x, y = batch
    grads = jax.grad(lambda w: ((x @ w - y) ** 2).mean())(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


step = workers.spmd(train_step)
params = workers.replicate(np.zeros(3, np.float32))
opt_state = workers.spmd(tx.init)(params)
rng, start = np.random.default_rng(0), 0

with Checkpoints(sys.argv[1] if len(sys.argv) > 1 else "run", workers) as checkpoints:
    found = checkpoints.restore(params, opt_state, init=tx.init)
    if found is not None:
        start, params, opt_state = found.step, found.params, found.opt_state
        rng.bit_generator.state = found.data
    for t in range(start, 100):
        x = rng.normal(size=(n, 8, 3)).astype(np.float32)
        batch = workers.shard((x, x @ np.arange(3, dtype=np.float32)))
        params, opt_state = step(params, opt_state, batch)
        if (t + 1) % 20 == 0:
            position = rng.bit_generator.state
            checkpoints.save(t + 1, params, opt_state, data=position)

model = workers.gather(workers.spmd(dj.eval_params)(opt_state, params))[0]
print(f"process {jax.process_index()} of {jax.process_count()}: {model.round(3)}")
