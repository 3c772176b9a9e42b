"""Hubs and workers: traffic per level, active workers, uneven sub-networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decentral_jax as dj
from tests.support.layouts import LAYOUTS, equations, nested_vmap, primitives
from tests.support.registry import UNEVEN
from tests.support.small_runs import BYTES, HUBS, TARGETS, exchanges, path


def test_traffic_of_hubs_and_workers():
    """Over q tau ticks, each level sends exactly the bytes of its formula."""
    tau, q, n = 3, 4, 5
    tx = dj.mll_sgd(0.1, dj.topology.ring(6), tau=tau, q=q)
    found = exchanges(tx, {"hub": 6, "worker": n}, 2 * q * tau)
    inside = 2 * BYTES * (n - 1) / n
    for t, sent in enumerate(found, start=1):
        if t % (q * tau) == 0:
            # A hub has two neighbors, and each worker sends a part of the model.
            assert sent.pop(("ppermute", "hub")) == 2 * BYTES / n
            assert sum(sent.values()) == pytest.approx(inside)
            assert {axis for _, axis in sent} == {"worker"}
        elif t % tau == 0:
            assert sent == {("all-reduce", "worker"): pytest.approx(inside)}
        else:
            assert sent == {}


def test_workers_operate_at_their_rates():
    """Workers step with the frequency of their rate; skipped steps keep the state."""
    rates = np.array([[0.1, 0.9], [0.5, 1.0]])
    tx = dj.operating_rates(
        optax.sgd(1.0, momentum=0.5), rates=rates, axis_name=("hub", "worker")
    )

    def worker(g):
        def tick(carry, _):
            params, state = carry
            updates, new = tx.update(g, state, params)
            kept = jnp.array_equal(new.inner[0].trace, state.inner[0].trace)
            return (params + updates, new), (updates == 0, kept)

        start = jnp.float32(0), tx.init(jnp.float32(0))
        return jax.lax.scan(tick, start, length=4000)[1]

    rested, kept = nested_vmap(worker, {"hub": 2, "worker": 2})(jnp.ones((2, 2)))
    deviation = np.sqrt(rates * (1 - rates) / 4000)
    assert (np.abs(np.mean(~np.asarray(rested), -1) - rates) <= 4 * deviation).all()
    # With a constant gradient, momentum changes in every step until it converges.
    np.testing.assert_array_equal(rested[..., :20], kept[..., :20])
    # Draws are independent of each other.
    moves = ~np.asarray(rested).reshape(4, -1)[:3]
    assert np.abs(np.corrcoef(moves) - np.eye(3)).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operating_workers_are_equal_in_all_layouts(layout):
    shape = {"hub": 2, "worker": 4}
    tx = dj.operating_rates(optax.sgd(1.0), rates=0.5, axis_name=tuple(shape))

    def worker(g):
        return path(tx, lambda _: g, jnp.zeros_like(g), 20, shape)

    ones = jnp.ones(8)
    here = LAYOUTS[layout](worker, shape)(ones)
    np.testing.assert_array_equal(here, LAYOUTS["vmap"](worker, shape)(ones))
    assert 0.3 < -here[:, -1].mean() / 20 < 0.7


def test_padding_workers_have_no_influence():
    """Sub-networks of two workers and of one, which a fourth worker pads."""
    shares = [[0.2, 0.3], [0.5]]
    tx = dj.mll_sgd(
        0.1,
        dj.topology.path(2),
        tau=1,
        q=1,
        rates=[[1.0, 1.0], [1.0]],
        shares=shares,
    )

    def worker(x):
        updates, _ = tx.update(jnp.zeros(()), tx.init(x), x)
        return x + updates

    mapped = nested_vmap(worker, {"hub": 2, "worker": 2})
    found = mapped(jnp.array([[1.0, 2.0], [4.0, jnp.nan]]))
    assert np.isnan(found[1, 1])  # because the update is added to its own NaN
    inside = np.array([(0.2 * 1 + 0.3 * 2) / 0.5, 4.0])
    np.testing.assert_allclose(found[:, 0], [inside.mean()] * 2, rtol=1e-6)


def test_the_weighted_mean_is_kept(x64):
    """Gossip between hubs preserves the mean that is weighted with shares."""
    shares = np.random.default_rng(0).dirichlet(np.ones(8)).reshape(4, 2)
    tx = dj.multi_level(dj.topology.path(4), tau=1, q=1, shares=shares)

    def worker(x):
        return path(tx, jnp.zeros_like, x, 60, HUBS)[-1]

    found = nested_vmap(worker, HUBS)(jnp.asarray(TARGETS.reshape(4, 2, 3)))
    mean = np.einsum("hw,hwd->d", shares, TARGETS.reshape(4, 2, 3))
    np.testing.assert_allclose(np.einsum("hw,hwd->d", shares, found), mean, atol=1e-14)
    hubs = dj.topology.reweighted(dj.topology.path(4), shares.sum(1)).matrix
    inside = np.einsum("hw,hwd->hd", shares, TARGETS.reshape(4, 2, 3))
    inside /= shares.sum(1, keepdims=True)
    expected = np.linalg.matrix_power(hubs, 60) @ inside
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-14)
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-14)


@pytest.mark.parametrize("shares", [None, UNEVEN])
def test_hubs_follow_a_schedule(shares, x64):
    """The k-th exchange between hubs is the schedule's k-th round."""
    graphs = dj.topology.ring(4), dj.topology.path(4), dj.topology.star(4)
    tau, q = 2, 2
    tx = dj.multi_level(dj.topology.schedule(graphs), tau=tau, q=q, shares=shares)

    def worker(x):
        return path(tx, jnp.zeros_like, x, 4 * q * tau, HUBS)

    x = TARGETS.reshape(4, 2, 3)
    found = nested_vmap(worker, HUBS)(jnp.asarray(x))
    share = np.full((4, 2), 1 / 8) if shares is None else shares
    z = np.einsum("hw,hwd->hd", share / share.sum(1, keepdims=True), x)
    for tick in range(tau, 4 * q * tau + 1):
        if tick % (q * tau) == 0:
            graph = graphs[(tick // (q * tau) - 1) % 3]
            z = dj.topology.reweighted(graph, share.sum(1)).matrix @ z
        for i in range(2):
            np.testing.assert_allclose(found[:, i, tick - 1], z, atol=1e-14)


def test_traffic_of_complete_hub_graphs():
    """On a complete hub graph, each worker all-reduces its part of the model."""
    found = exchanges(dj.hl_sgd(0.1, 6, tau=1, q=2), {"hub": 6, "worker": 5}, 2)
    assert found[1].pop(("all-reduce", "hub")) == pytest.approx(2 * BYTES / 5 * 5 / 6)
    assert {axis for _, axis in found[1]} == {"worker"}


def test_hubs_pack_small_leaves():
    """Also with one device per hub, each neighbor receives one message."""
    tx = dj.multi_level(dj.topology.ring(4), tau=1, q=1)

    def worker(x):
        return tx.update(x, tx.init(x), x)[0]

    x = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((8, 3))}
    assert primitives(LAYOUTS["folded_4"](worker, HUBS), x)["ppermute"] == 2


def test_another_seed_activates_other_workers():
    def operating(seed):
        tx = dj.mll_sgd(0.1, dj.topology.ring(4), tau=2, q=1, rates=0.5, seed=seed)

        def worker(g):
            return tx.update(g, tx.init(g), g)[0]

        return nested_vmap(worker, {"hub": 4, "worker": 16})(jnp.ones((4, 16)))

    np.testing.assert_array_equal(operating(3), operating(3))
    assert not np.array_equal(operating(3), operating(4))


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return value * updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = dj.operating_rates(inner, rates=1.0)

    def worker(g):
        return tx.update(g, tx.init(g), value=jnp.float32(3.0))[0]

    found = jax.vmap(worker, axis_name="workers")(jnp.ones(2))
    np.testing.assert_array_equal(found, [3.0, 3.0])


def test_operating_workers_are_drawn_once():
    """Under vmap, one draw serves all workers, even with a batched counter."""
    tx = dj.operating_rates(optax.sgd(1.0), rates=0.5)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), tx.init(0.0))
    step = jax.vmap(tx.update, axis_name="workers")
    traced = jax.make_jaxpr(step)(jnp.ones(8), state)
    bits = [e for e in equations(traced.jaxpr) if e.primitive.name == "random_bits"]
    assert [e.outvars[0].aval.shape for e in bits] == [(8,)]


def test_half_precision_of_many_workers_is_added_in_float32():
    tx = dj.multi_level(dj.topology.complete(1), tau=1, q=1)

    def worker(x):
        return x + tx.update(jnp.zeros_like(x), tx.init(x), x)[0]

    ones = jnp.ones((1, 1000), jnp.bfloat16)
    found = nested_vmap(worker, {"hub": 1, "worker": 1000})(ones)
    np.testing.assert_allclose(found.astype(jnp.float32), 1, atol=0.01)
