"""Properties of single algorithms beyond their trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.axis import WorkerAxis
from tests.support.layouts import LAYOUTS
from tests.support.registry import ALGORITHMS, RING

GRADIENTS = np.random.default_rng(2).normal(size=(8, 12, 3)).astype(np.float32)


def run(tx, gradients=GRADIENTS, layout="vmap"):
    """Applies the given gradients; returns stacked (params, state) after each step."""

    def worker(gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return ((optax.apply_updates(params, updates), state),) * 2

        params = jnp.zeros(gradients.shape[-1], gradients.dtype)
        # A scan's carry needs one type throughout: varying over workers.
        start = jax.tree.map(
            lambda x: WorkerAxis.bind("workers").varying(x), (params, tx.init(params))
        )
        return lax.scan(step, start, gradients)[1]

    return LAYOUTS[layout](worker)(gradients)


@pytest.mark.parametrize("order", ["combine_then_adapt", "adapt_then_combine"])
def test_tracker_mean_is_gradient_mean(order):
    _, state = run(dj.track_gradients(RING, order=order))
    tracked = np.asarray(state.tracker).mean(0)
    np.testing.assert_allclose(tracked, GRADIENTS.mean(0), atol=1e-6)


def test_detag_tracker_mean_is_phase_gradient_mean():
    _, state = run(dj.detag(0.1, RING, rounds=4))
    phases = GRADIENTS.reshape(8, 3, 4, 3).mean(2).mean(0)
    tracked = np.asarray(state.tracker).mean(0)[3::4]
    np.testing.assert_allclose(tracked, phases, atol=1e-6)


def test_detag_at_phase_end_is_the_same():
    spread, _ = run(dj.detag(optax.sgd(0.1, momentum=0.9), RING, rounds=4))
    at_end, state = run(
        dj.detag(optax.sgd(0.1, momentum=0.9), RING, rounds=4, when="phase_end")
    )
    assert state.now is None
    np.testing.assert_allclose(spread, at_end, atol=1e-6)


def test_schedules_of_detags_optimizer_count_phases(standard_promotion):
    def schedule(count):
        return 0.1 / (1.0 + count.astype(jnp.float32))

    by_base, _ = run(dj.detag(optax.sgd(schedule), RING, rounds=4))
    by_rate, _ = run(
        dj.detag(lambda iteration: schedule(iteration // 4), RING, rounds=4)
    )
    np.testing.assert_array_equal(by_base, by_rate)
    _, state = run(dj.detag(optax.adam(0.1), RING, rounds=4))
    counts = optax.tree.get(state.inner, "count")
    np.testing.assert_array_equal(counts[0], np.repeat([0, 1, 2, 3], 4)[1:13])


@pytest.mark.parametrize("name", ["d_psgd_atc", "d2", "dsgt_atc", "detag", "defacto"])
def test_complete_graph_follows_the_mean_gradient(name):
    """On a complete graph, one round averages, so workers agree up to rounding."""
    arguments = {**ALGORITHMS[name].arguments, "topology": dj.topology.complete(8)}
    params, _ = run(ALGORITHMS[name].build(0.1, **arguments))
    np.testing.assert_allclose(
        params, np.broadcast_to(params[:1], params.shape), atol=1e-6
    )


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_4"])
def test_all_reduce_is_bitwise_equal_on_all_workers(layout, standard_promotion):
    tx = dj.all_reduce_sgd(optax.adam(0.1))
    for dtype in (jnp.float32, jnp.bfloat16):
        params, _ = run(tx, jnp.asarray(GRADIENTS, dtype), layout)
        params = np.asarray(params)
        np.testing.assert_array_equal(params, np.broadcast_to(params[:1], params.shape))


@pytest.mark.parametrize("curvature", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_defacto_stays_together_for_many_phases(dtype, bound, curvature):
    """Workers' averages differ by rounding only, which must not accumulate."""
    tx = dj.defacto(0.05, dj.topology.ring(8))
    start = jnp.full(30, 3, dtype)

    def worker(seed):
        def step(carry, t):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), t), 30)
            gradient = noise + curvature * (params.astype(jnp.float32) - 3)
            updates, state = tx.update(gradient.astype(dtype), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = lax.scan(step, (start, tx.init(start)), jnp.arange(20_000))
        return params

    params = jax.jit(jax.vmap(worker, axis_name="workers"))(jnp.arange(8))
    params = np.asarray(params, np.float64)
    assert np.abs(params - params.mean(0)).max() < bound


def test_gossip_keeps_consensus_in_bfloat16():
    """Workers in bfloat16 agree despite the rounding of `x + (Wx - x)`."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 50)), jnp.bfloat16)
    tx = dj.gossip(RING)

    def worker(x):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(jnp.zeros_like(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(body, (x, tx.init(x)), length=100)
        return x, dj.consensus_distance(x)

    mixed, distance = jax.vmap(worker, axis_name="workers")(x)
    before = np.asarray(x, np.float32)
    # Two units in the last place of bfloat16 around values of order one half.
    assert np.abs(np.asarray(mixed, np.float32) - before.mean(0)).max() < 2**-6
    assert distance[0] < 50**0.5 * 2**-7


def test_eval_params_averages_and_finds_a_hidden_model_through_chains():
    class Hidden(tuple):
        def evaluation_params(self, params):
            return params + self[0]

    jax.tree_util.register_pytree_node(
        Hidden, lambda h: (h, None), lambda _, c: Hidden(c)
    )
    params = jnp.arange(8.0)
    states = (optax.EmptyState(), (Hidden((10 * jnp.arange(8.0),)),))
    evaluate = jax.vmap(dj.eval_params, axis_name="workers")
    np.testing.assert_allclose(evaluate(states[:1], params), 3.5)
    np.testing.assert_allclose(evaluate(states, params), 38.5)
    with pytest.raises(
        ValueError, match=r"at most one hidden model of each leaf, got 2"
    ):
        evaluate((states, states), params)


def test_consensus_distance():
    x = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    measure = jax.vmap(dj.consensus_distance, axis_name="workers")
    expected = np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    np.testing.assert_allclose(
        measure({"a": x[:, :2], "b": x[:, 2:]}), expected, rtol=1e-5
    )
    np.testing.assert_array_equal(measure(np.ones((8, 2), np.float32)), 0)


def test_two_worker_axes():
    """Gossip between hubs, all-reduce within each hub."""
    workers = dj.Workers({"hub": 4, "worker": 2})
    tx = optax.chain(
        dj.average_gradients(axis_name="worker"),
        optax.sgd(1.0),
        dj.gossip(dj.topology.ring(4), order="adapt_then_combine", axis_name="hub"),
    )

    def step(gradient):
        params = jnp.zeros_like(gradient)
        return tx.update(gradient, tx.init(params), params)[0]

    gradients = np.random.default_rng(6).normal(size=(4, 2, 3)).astype(np.float32)
    got = workers.gather(workers.spmd(step)(workers.shard(gradients)))
    means = gradients.mean(1)
    expected = -np.einsum("ij,jk->ik", dj.topology.ring(4).matrix, means)
    for worker in range(2):
        np.testing.assert_allclose(got[:, worker], expected, atol=1e-6)
