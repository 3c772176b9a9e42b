"""Gossip over another transport: only `WorkerAxis.deliver` has to be replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.axis import WorkerAxis
from tests.support.layouts import LAYOUTS, primitives
from tests.support.registry import ALGORITHMS

N, STEPS, RATE = 8, 6, 0.1
TARGETS = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)


def by_all_gather(axis, message, block):
    """A transport that keeps, from all devices' blocks, the rows of its sender."""
    sender = np.zeros(axis.num_devices, np.int32)
    sent = np.zeros(axis.num_devices, bool)
    for source, destination in message.pairs:
        sender[destination], sent[destination] = source, True
    device = lax.axis_index(axis.mesh)
    source = jnp.asarray(sender)[device]
    rows = jnp.asarray(message.rows)[source]

    def deliver(x):
        received = lax.all_gather(x, axis.mesh)[source][rows]
        # What a device without a sender returns must not matter.
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        other = jnp.full_like(received, jnp.nan if inexact else 1)
        return jnp.where(jnp.asarray(sent)[device], received, other)

    return jax.tree.map(deliver, block)


def train(layout, algorithm):
    """Returns all workers' parameters after a few steps, and the traced program."""
    tx = algorithm.make(algorithm.optimizer(RATE), axis_name="workers")

    def run(x, target):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x - target, state, x)
            return (x + updates, state), None

        return lax.scan(step, (x, tx.init(x)), None, STEPS)[0][0]

    run = LAYOUTS[layout](run, N)
    x = jnp.zeros_like(TARGETS)
    return np.asarray(run(x, TARGETS)), primitives(run, x, TARGETS)


@pytest.mark.parametrize("layout", ["folded_4", "folded_2", "one_per_device"])
@pytest.mark.parametrize(
    "name", ["d_psgd", "d2", "detag", "sgp", "d_psgd_one_peer", "choco_sgd_top_k"]
)
def test_another_transport_gives_the_same_trajectory(monkeypatch, name, layout):
    algorithm = ALGORITHMS[name]
    monkeypatch.setitem(LAYOUTS, "one_per_device", lambda fn, n: dj.Workers(n).spmd(fn))
    usual, program = train(layout, algorithm)
    assert program["ppermute"]
    monkeypatch.setattr(WorkerAxis, "deliver", by_all_gather)
    other, program = train(layout, algorithm)
    assert not program["ppermute"]
    # Another program may round differently, in the last place.
    np.testing.assert_allclose(other, usual, rtol=0, atol=1e-6)
