"""Short runs on quadratics, and their traffic, for tests of local updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.axis import WorkerAxis
from tests.support.layouts import LAYOUTS, named

HUBS = {"hub": 4, "worker": 2}
STEPS = 13
TARGETS = np.random.default_rng(2).normal(size=(8, 3))


def path(tx, gradient, params, steps, shape=8):
    """One worker's parameters after each step, as one scan: `[steps, ...]` per leaf."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    # A scan's carry needs one type throughout: varying over workers.
    start = jax.tree.map(
        lambda x: WorkerAxis.bind(tuple(named(shape))).varying(x),
        (params, tx.init(params)),
    )
    return lax.scan(step, start, length=steps)[1]


def run(tx, shape=8, layout="vmap", dtype=jnp.float64):
    """Parameters after each step of 0.5 ||x - target||^2, `[8, STEPS, 3]`."""

    def worker(target):
        return path(tx, lambda x: x - target, jnp.zeros(3, dtype), STEPS, shape)

    return np.asarray(LAYOUTS[layout](worker, shape)(jnp.asarray(TARGETS, dtype)))


PARAMS = {"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(20)}
BYTES = 4 * 620


def exchanges(tx, sizes, steps):
    """The traffic of each step: `{(kind, axis): bytes}`."""
    costs = dj.communication_costs(tx, PARAMS, steps, axis_sizes=sizes)
    assert costs.is_exact
    return [
        {(c.kind, c.axis): c.bytes_sent for c in cost.collectives} for cost in costs
    ]
