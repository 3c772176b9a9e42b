"""Local updates and hierarchies: special cases, what is sent when, who operates."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest

import decentral_jax as dj
from tests.layouts import LAYOUTS, equations, nested_vmap

HUBS = {"hub": 4, "worker": 2}
STEPS = 13
TARGETS = np.random.default_rng(2).normal(size=(8, 3))


def run(tx, shape=8, layout="vmap", dtype=jnp.float64):
    """Parameters after each step of 0.5 ||x - target||^2, `[8, STEPS, 3]`."""

    def worker(target):
        params = jnp.zeros(3, dtype)
        state, path = tx.init(params), []
        for _ in range(STEPS):
            updates, state = tx.update(params - target, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
        return jnp.stack(path)

    return np.asarray(LAYOUTS[layout](worker, shape)(jnp.asarray(TARGETS, dtype)))


def mll(hubs, tau, q, shape, **options):
    axes = tuple(shape)
    tx = dj.mll_sgd(0.1, hubs, tau, q, hub_axis=axes[0], worker_axis=axes[1], **options)
    return run(tx, shape)


ONE_HUB = {"hub": 1, "worker": 8}
SPECIAL_CASES = {
    "one hub, tau 1: distributed SGD": (
        lambda: mll(dj.topology.complete(1), 1, 1, ONE_HUB),
        lambda: run(dj.all_reduce_sgd(0.1)),
    ),
    "one hub: Local SGD": (
        lambda: mll(dj.topology.complete(1), 4, 1, ONE_HUB),
        lambda: run(dj.local_sgd(0.1, 4)),
    ),
    "hubs of one worker: gossip every tau": (
        lambda: mll(dj.topology.ring(8), 1, 1, {"hub": 8, "worker": 1}),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), "adapt_then_combine")),
    ),
    "complete hub graph, rate 1: HL-SGD": (
        lambda: mll(dj.topology.complete(4), 2, 3, HUBS),
        lambda: run(dj.hl_sgd(0.1, 4, 2, 3), HUBS),
    ),
    "HL-SGD, q 1: Local SGD": (
        lambda: run(dj.hl_sgd(0.1, 4, 3, 1), HUBS),
        lambda: run(dj.local_sgd(0.1, 3)),
    ),
    "DiLoCo, outer rate 1, no momentum: Local SGD": (
        lambda: run(
            dj.diloco(
                *(None, 3),
                outer_rate=1.0,
                outer_momentum=0.0,
                base=optax.sgd(0.1),
            )
        ),
        lambda: run(dj.local_sgd(0.1, 3)),
    ),
    "SlowMo, slow rate 1, no slow momentum: Local SGD": (
        lambda: run(
            dj.slowmo(lambda t: 0.1, 3, slow_momentum=0.0, slow_rate=1.0, momentum=None)
        ),
        lambda: run(dj.local_sgd(0.1, 3)),
    ),
    "push-sum, doubly stochastic: gossip": (
        lambda: run(dj.sgp(0.1, dj.topology.ring(8))),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), "adapt_then_combine")),
    ),
    "quasi-global momentum 0: gossip": (
        lambda: run(dj.qg_dsgdm(0.1, dj.topology.ring(8), momentum=0.0)),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), "adapt_then_combine")),
    ),
}


@pytest.mark.parametrize("case", SPECIAL_CASES)
def test_special_cases_coincide(case, x64):
    """To the last digits of float64: sums are added in another order."""
    special, plain = (fn() for fn in SPECIAL_CASES[case])
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(special, plain, rtol=0, atol=2e-15)


PARAMS = {"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(20)}
BYTES = 4 * 620


def exchanges(tx, sizes, steps):
    """What each of so many steps sends: `{(kind, axis): bytes}`."""
    state = jax.eval_shape(tx.init, PARAMS)
    found = []
    for t in range(steps):
        cost = dj.communication_cost(
            tx.update,
            *(PARAMS, optax.tree.set(state, count=np.int32(t)), PARAMS),
            axis_sizes=sizes,
        )
        assert cost.is_exact
        found.append({(c.kind, c.axis): c.bytes_sent for c in cost.collectives})
    return found


def test_traffic_of_hubs_and_workers():
    """Over q tau ticks, each level sends what its formula says, and no more."""
    tau, q, n = 3, 4, 5
    tx = dj.mll_sgd(0.1, dj.topology.ring(6), tau, q)
    found = exchanges(tx, {"hub": 6, "worker": n}, 2 * q * tau)
    inside = 2 * BYTES * (n - 1) / n
    for t, sent in enumerate(found, start=1):
        if t % (q * tau) == 0:
            # Two neighbours; each of the hub's workers carries a part of the model.
            assert sent.pop(("ppermute", "hub")) == 2 * BYTES / n
            assert sum(sent.values()) == pytest.approx(inside)
            assert {axis for _, axis in sent} == {"worker"}
        elif t % tau == 0:
            assert sent == {("all-reduce", "worker"): pytest.approx(inside)}
        else:
            assert sent == {}


def test_traffic_of_periodic_averaging():
    all_reduce = {("all-reduce", "workers"): pytest.approx(2 * BYTES * 7 / 8)}
    for tx in (dj.local_sgd(0.1, 4), dj.slowmo(0.1, 4)):
        found = exchanges(tx, {"workers": 8}, 8)
        assert found == [{}, {}, {}, all_reduce] * 2


def test_fragments_take_turns():
    """Each leaf once a period, never both in one step: the larger one first."""
    found = exchanges(
        dj.diloco(None, 4, fragments=2, base=optax.sgd(0.1)), {"workers": 8}, 8
    )
    kernel, bias = (
        {("all-reduce", "workers"): pytest.approx(2 * 4 * size * 7 / 8)}
        for size in (600, 20)
    )
    assert found == [{}, kernel, {}, bias] * 2


ALONE = {
    "local_sgd": (dj.local_sgd(0.1, 4), 8),
    "slowmo": (dj.slowmo(0.1, 4), 8),
    "diloco": (dj.diloco(0.1, 4, fragments=2, base=None), 8),
    "mll_sgd": (dj.mll_sgd(0.1, dj.topology.ring(4), 2, 3, rates=0.5), HUBS),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
def test_steps_alone_communicate_nothing(name, layout, standard_promotion):
    """Every collective on arrays stands inside a cond, whose index is one number."""
    tx, shape = ALONE[name]
    state = jax.tree.map(jnp.asarray, tx.init(PARAMS))
    args = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (8, *x.shape)), (PARAMS, state, PARAMS)
    )

    def step(grads, state, params):
        return tx.update(grads, state, params)

    if layout == "shard_map":
        # As arrays with one axis of workers in front, also of several levels.
        traced = jax.make_jaxpr(LAYOUTS[layout](step, shape))(*args)
    else:
        sizes = (8,) if shape == 8 else tuple(shape.values())
        args = jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), args)
        traced = jax.make_jaxpr(nested_vmap(step, shape))(*args)
    conds = [e for e in equations(traced.jaxpr) if e.primitive.name == "cond"]
    assert conds
    assert all(e.invars[0].aval.shape == () for e in conds)
    outside = list(_outside_conds(traced.jaxpr))
    sums = (
        "psum",
        "psum2",
        "psum_invariant",
        "reduce_scatter",
        "ppermute",
        "dot_general",
    )
    assert not [e for e in outside if e.primitive.name in sums]
    sizes_summed = [
        e.outvars[0].aval.size for e in outside if e.primitive.name == "reduce_sum"
    ]
    assert max(sizes_summed, default=0) <= 8


def _outside_conds(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "cond":
            continue
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _outside_conds(inner)


def test_workers_operate_at_their_rates():
    """Each worker's share of steps is its rate; without one its state stays."""
    rates = np.array([[0.1, 0.9], [0.5, 1.0]])
    tx = dj.operating_rates(
        optax.sgd(1.0, momentum=0.5), rates, axis_name=("hub", "worker")
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
    # Of a constant gradient, momentum moves in every step until it has settled.
    np.testing.assert_array_equal(rested[..., :20], kept[..., :20])
    # Draws are independent of each other.
    moves = ~np.asarray(rested).reshape(4, -1)[:3]
    assert np.abs(np.corrcoef(moves) - np.eye(3)).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_operates_is_the_same_everywhere(layout):
    shape = {"hub": 2, "worker": 4}
    tx = dj.operating_rates(optax.sgd(1.0), 0.5, axis_name=tuple(shape))

    def worker(g):
        state, moved = tx.init(g), []
        for _ in range(20):
            updates, state = tx.update(g, state, g)
            moved.append(updates)
        return jnp.stack(moved)

    ones = jnp.ones(8)
    here = LAYOUTS[layout](worker, shape)(ones)
    np.testing.assert_array_equal(here, LAYOUTS["vmap"](worker, shape)(ones))
    assert 0.3 < -here.mean() < 0.7


def test_absent_workers_count_for_nothing():
    """A sub-network of one worker beside one of two: the third of four is filled in."""
    shares = [[0.2, 0.3], [0.5]]
    tx = dj.mll_sgd(
        *(0.1, dj.topology.path(2), 1, 1),
        rates=[[1.0, 1.0], [1.0]],
        shares=shares,
    )

    def worker(x):
        updates, _ = tx.update(jnp.zeros(()), tx.init(x), x)
        return x + updates

    mapped = nested_vmap(worker, {"hub": 2, "worker": 2})
    found = mapped(jnp.array([[1.0, 2.0], [4.0, jnp.nan]]))
    assert np.isnan(found[1, 1])  # only by adding the way to the common model
    inside = np.array([(0.2 * 1 + 0.3 * 2) / 0.5, 4.0])
    np.testing.assert_allclose(found[:, 0], [inside.mean()] * 2, rtol=1e-6)


def test_the_weighted_mean_is_kept(x64):
    """Gossip between hubs preserves the mean that is weighted with shares."""
    shares = np.random.default_rng(0).dirichlet(np.ones(8)).reshape(4, 2)
    tx = dj.multi_level(dj.topology.path(4), 1, 1, shares)

    def worker(x):
        state = tx.init(x)
        for _ in range(60):
            updates, state = tx.update(jnp.zeros_like(x), state, x)
            x = x + updates
        return x

    found = nested_vmap(worker, HUBS)(jnp.asarray(TARGETS.reshape(4, 2, 3)))
    mean = np.einsum("hw,hwd->d", shares, TARGETS.reshape(4, 2, 3))
    np.testing.assert_allclose(np.einsum("hw,hwd->d", shares, found), mean, atol=1e-14)
    hubs = dj.topology.reweighted(dj.topology.path(4), shares.sum(1)).matrix
    inside = np.einsum("hw,hwd->hd", shares, TARGETS.reshape(4, 2, 3))
    inside /= shares.sum(1, keepdims=True)
    expected = np.linalg.matrix_power(hubs, 60) @ inside
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-14)
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-14)


def test_workers_agree_bitwise_after_many_periods():
    """The outer model and its momentum, after 250 exchanges in bfloat16."""
    tx = dj.diloco(None, 4, base=optax.sgd(0.05))

    def worker(target):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params - target, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.zeros(3, jnp.bfloat16)
        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=1000)
        return state[-1].start, state[-1].outer

    run = dj.Workers(8, devices=jax.devices()[:4]).spmd(worker)
    for leaf in jax.tree.leaves(run(jnp.asarray(TARGETS, jnp.bfloat16))):
        assert np.abs(np.asarray(leaf, np.float32)).max() > 0
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@pytest.mark.parametrize("when", ["first", "all"])
def test_a_learning_rate_of_zero_is_harmless(when):
    """Warm-up from 0: no division by it in SlowMo and quasi-global momentum."""

    def warm_up(t):
        return jnp.where((t == 0) | (when == "all"), 0.0, 0.1)

    for tx in (
        dj.slowmo(warm_up, 1),
        dj.qg_dsgdm(warm_up, dj.topology.ring(8)),
    ):
        path = run(tx, dtype=jnp.float32)
        assert np.isfinite(path).all()
        assert (np.abs(path[:, -1]).max() > 0) == (when == "first")


def test_push_sum_evaluates_at_the_preserved_mean():
    """Gossip alone: models become equal, and the mean stays where it was."""
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (3, 0)])
    tx = dj.push_sum(dj.topology.from_graph(graph, weights="push"))
    start = jnp.array([4.0, 0.0, 1.0, -1.0])

    def worker(z):
        state = tx.init(z)
        for _ in range(60):
            updates, state = tx.update(jnp.zeros_like(z), state, z)
            z = z + updates
        return z, dj.eval_params(state, z)

    z, evaluated = jax.vmap(worker, axis_name="workers")(start)
    np.testing.assert_allclose(z, np.ones(4), atol=1e-5)
    np.testing.assert_allclose(evaluated, np.ones(4), atol=1e-5)
