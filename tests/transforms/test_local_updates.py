"""Local updates: special cases, traffic, outer optimizers, half precision."""

from functools import partial

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.numbers import weighted
from tests.support.layouts import LAYOUTS, equations, named, nested_vmap
from tests.support.small_runs import BYTES, HUBS, PARAMS, TARGETS, exchanges, run


def mll(hubs, tau, q, shape, **options):
    axes = tuple(shape)
    tx = dj.mll_sgd(
        0.1, hubs, tau=tau, q=q, hub_axis=axes[0], worker_axis=axes[1], **options
    )
    return run(tx, shape)


ONE_HUB = {"hub": 1, "worker": 8}
SPECIAL_CASES = {
    "one hub, tau 1: distributed SGD": (
        lambda: mll(dj.topology.complete(1), 1, 1, ONE_HUB),
        lambda: run(dj.all_reduce_sgd(0.1)),
    ),
    "one hub: Local SGD": (
        lambda: mll(dj.topology.complete(1), 4, 1, ONE_HUB),
        lambda: run(dj.local_sgd(0.1, period=4)),
    ),
    "hubs of one worker: gossip every tau": (
        lambda: mll(dj.topology.ring(8), 1, 1, {"hub": 8, "worker": 1}),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), order="adapt_then_combine")),
    ),
    "complete hub graph, rate 1: HL-SGD": (
        lambda: mll(dj.topology.complete(4), 2, 3, HUBS),
        lambda: run(dj.hl_sgd(0.1, 4, tau=2, q=3), HUBS),
    ),
    "HL-SGD, q 1: Local SGD": (
        lambda: run(dj.hl_sgd(0.1, 4, tau=3, q=1), HUBS),
        lambda: run(dj.local_sgd(0.1, period=3)),
    ),
    "DiLoCo, outer rate 1, no momentum: Local SGD": (
        lambda: run(dj.diloco(0.1, period=3, outer=optax.sgd(1.0, nesterov=True))),
        lambda: run(dj.local_sgd(0.1, period=3)),
    ),
    "SlowMo, slow rate 1, no slow momentum: Local SGD": (
        lambda: run(
            dj.slowmo(lambda t: 0.1, period=3, slow_momentum=0.0, slow_rate=1.0)
        ),
        lambda: run(dj.local_sgd(0.1, period=3)),
    ),
    "push-sum, doubly stochastic: gossip": (
        lambda: run(dj.sgp(0.1, dj.topology.ring(8))),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), order="adapt_then_combine")),
    ),
    "quasi-global factor 0: gossip": (
        lambda: run(dj.qg_dsgdm(0.1, dj.topology.ring(8), factor=0.0)),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), order="adapt_then_combine")),
    ),
    "quasi-global momentum 0: gossip": (
        lambda: run(dj.qg_dsgdm(0.1, dj.topology.ring(8), momentum=0.0)),
        lambda: run(dj.d_psgd(0.1, dj.topology.ring(8), order="adapt_then_combine")),
    ),
}


@pytest.mark.parametrize("case", SPECIAL_CASES)
def test_special_cases_coincide(case, x64):
    """Equal up to the last digits of float64, because the order of sums differs."""
    special, plain = (fn() for fn in SPECIAL_CASES[case])
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(special, plain, rtol=0, atol=2e-15)


def test_traffic_of_periodic_averaging():
    all_reduce = {("all-reduce", "workers"): pytest.approx(2 * BYTES * 7 / 8)}
    for tx in (
        dj.local_sgd(0.1, period=4),
        dj.slowmo(optax.sgd(0.1, momentum=0.9), period=4),
    ):
        found = exchanges(tx, {"workers": 8}, 8)
        assert found == [{}, {}, {}, all_reduce] * 2


def test_fragments_take_turns():
    """Each leaf is sent once per period, the larger one first, in different steps."""
    found = exchanges(
        dj.diloco(optax.sgd(0.1), period=4, fragments=2), {"workers": 8}, 8
    )
    kernel, bias = (
        {("all-reduce", "workers"): pytest.approx(2 * 4 * size * 7 / 8)}
        for size in (600, 20)
    )
    assert found == [{}, kernel, {}, bias] * 2


ALONE = {
    "local_sgd": (dj.local_sgd(0.1, period=4), 8),
    "slowmo": (dj.slowmo(optax.sgd(0.1, momentum=0.9), period=4), 8),
    "diloco": (dj.diloco(optax.adamw(0.1), period=4, fragments=2), 8),
    "mll_sgd": (dj.mll_sgd(0.1, dj.topology.ring(4), tau=2, q=3, rates=0.5), HUBS),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
def test_local_steps_communicate_nothing(name, layout, standard_promotion):
    """Every collective on arrays is inside a cond with an unbatched index."""
    tx, shape = ALONE[name]
    state = jax.tree.map(jnp.asarray, tx.init(PARAMS))
    args = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (8, *x.shape)), (PARAMS, state, PARAMS)
    )

    def step(grads, state, params):
        return tx.update(grads, state, params)

    if layout == "shard_map":
        # This layout takes one leading worker axis, even for several levels.
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


def test_workers_agree_bitwise_after_many_periods():
    """The outer model and momentum are bitwise equal after 250 bfloat16 exchanges."""
    tx = dj.diloco(optax.sgd(0.05), period=4)

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
    """SlowMo and quasi-global momentum divide by the rate, which warm-up sets to 0."""

    def warm_up(t):
        return jnp.where((t == 0) | (when == "all"), 0.0, 0.1)

    for tx in (
        dj.slowmo(optax.sgd(warm_up, momentum=0.9), period=1),
        dj.qg_dsgdm(warm_up, dj.topology.ring(8)),
    ):
        path = run(tx, dtype=jnp.float32)
        assert np.isfinite(path).all()
        assert (np.abs(path[:, -1]).max() > 0) == (when == "first")


def test_push_sum_evaluates_at_the_preserved_mean():
    """With gossip only, models become equal and the mean is preserved."""
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (3, 0)])
    tx = dj.push_sum(dj.topology.from_graph(graph, weights="push"))
    start = jnp.array([4.0, 0.0, 1.0, -1.0])

    def worker(z):
        def step(_, carry):
            z, state = carry
            updates, state = tx.update(jnp.zeros_like(z), state, z)
            return z + updates, state

        z, state = lax.fori_loop(0, 60, step, (z, tx.init(z)))
        return z, dj.eval_params(state, z)

    z, evaluated = jax.vmap(worker, axis_name="workers")(start)
    np.testing.assert_allclose(z, np.ones(4), atol=1e-5)
    np.testing.assert_allclose(evaluated, np.ones(4), atol=1e-5)


LAST = {
    "average_parameters": (dj.average_parameters(period=2), 8),
    "average_parameters, outer": (
        dj.average_parameters(period=2, outer=optax.sgd(0.5)),
        8,
    ),
    "multi_level": (dj.multi_level(dj.topology.ring(4), tau=2, q=2), HUBS),
    "push_sum": (dj.push_sum(dj.topology.ring(8)), 8),
    "quasi_global_momentum": (dj.quasi_global_momentum(0.1, dj.topology.ring(8)), 8),
    "error_feedback": (dj.error_feedback(dj.compression.random_block(2)), 8),
    "error_feedback, detached": (
        dj.error_feedback(dj.compression.random_block(2), detach=0.3),
        8,
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_updates_take_the_dtype_of_the_parameters(name, standard_promotion):
    """Float32 gradients of bfloat16 parameters do not widen state or updates."""
    tx, shape = LAST[name]
    sizes = tuple(named(shape).values())
    params = jax.ShapeDtypeStruct((*sizes, 3), jnp.bfloat16)
    grads = jax.ShapeDtypeStruct((*sizes, 3), jnp.float32)

    def step(grads, params):
        state = tx.init(params)
        updates, new = tx.update(grads, state, params)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, new)
        return updates

    assert jax.eval_shape(nested_vmap(step, shape), grads, params) == params


def test_the_outer_optimizer_sees_the_common_model():
    """The outer optimizer's weight decay uses z, not the workers' mean."""
    outer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    tx = dj.average_parameters(period=1, outer=outer)

    def worker(update):
        z = jnp.float32(2.0)
        return z + tx.update(update, tx.init(z), z)[0]

    found = jax.vmap(worker, axis_name="workers")(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(found, [4.0 - 0.5 * 2.0] * 2)


def test_the_common_model_is_a_copy():
    """Parameters may be donated together with the state."""
    params = jnp.ones(3)
    state = dj.average_parameters(period=2, outer=optax.sgd(1.0)).init(params)
    params.delete()
    assert not state.start.is_deleted()


def test_fragments_are_of_similar_size():
    """The largest of four leaves forms one fragment, the other three form another."""
    params = [jnp.zeros(size) for size in (2, 9, 4, 3)]
    tx = dj.average_parameters(period=2, fragments=2)
    state = tx.init(params)._replace(count=np.int32(0))
    cost = dj.communication_cost(
        tx.update, params, state, params, axis_sizes={"workers": 8}
    )
    assert cost.bytes_sent == pytest.approx(2 * 4 * 9 * 7 / 8)


TAKES_OPTIMIZER = {
    "local_sgd": (partial(dj.local_sgd, period=3), 8),
    "slowmo": (partial(dj.slowmo, period=3), 8),
    "mll_sgd": (
        partial(dj.mll_sgd, hub_topology=dj.topology.path(4), tau=2, q=2, rates=0.7),
        HUBS,
    ),
    "hl_sgd": (partial(dj.hl_sgd, num_hubs=4, tau=2, q=2), HUBS),
    "sgp": (partial(dj.sgp, topology=dj.topology.ring(8)), 8),
}


@pytest.mark.parametrize("name", TAKES_OPTIMIZER)
def test_a_rate_is_that_of_sgd(name, x64):
    """A rate equals SGD behind zero weight decay, which needs params."""
    make, shape = TAKES_OPTIMIZER[name]
    optimizer = optax.chain(optax.add_decayed_weights(0.0), optax.sgd(0.1))
    plain = run(make(0.1), shape)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_array_equal(run(make(optimizer), shape), plain)


def test_momentum_is_kept_if_the_rate_is_zero():
    tx = dj.qg_dsgdm(lambda t: jnp.where(t == 1, 0.0, 0.1), dj.topology.ring(8))

    def worker(target):
        params = jnp.zeros(3)
        state = [tx.init(params)]
        for _ in range(2):
            updates, new = tx.update(params - target, state[-1], params)
            params = optax.apply_updates(params, updates)
            state.append(new)
        return [s.momentum for s in state]

    _, first, second = LAYOUTS["vmap"](worker)(jnp.asarray(TARGETS, jnp.float32))
    assert np.abs(first).max() > 0.1
    np.testing.assert_array_equal(first, second)


def test_push_sum_evaluates_at_the_preserved_mean_before_consensus():
    """The evaluated model is the mean even while models differ."""
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (3, 0)])
    tx = dj.push_sum(dj.topology.from_graph(graph, weights="push"))

    def worker(z):
        state = tx.init(z)
        for _ in range(2):
            updates, state = tx.update(jnp.zeros_like(z), state, z)
            z = z + updates
        return z, dj.eval_params(state, z)

    start = jnp.array([4.0, 0.0, 1.0, -1.0])
    z, evaluated = jax.vmap(worker, axis_name="workers")(start)
    assert abs(z.mean() - 1) > 1e-3
    np.testing.assert_allclose(evaluated, np.ones(4), atol=1e-6)


def test_half_precision_is_weighted_in_float32():
    """Only the product is rounded."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=200), jnp.bfloat16)
    weight = jnp.float32(0.3456789)
    expected = (x.astype(jnp.float32) * weight).astype(jnp.bfloat16)
    np.testing.assert_array_equal(weighted(x, weight), expected)
    tx = dj.push_sum(dj.topology.ring(4))
    state = tx.init(x)._replace(weight=weight)
    np.testing.assert_array_equal(state.evaluation_params(x), expected)


def test_state_may_start_inside():
    """`shard_map(check_vma=True)` types a state from `init` inside as not varying."""
    tx = dj.slowmo(optax.sgd(0.1, momentum=0.9), period=4)
    expected = run(tx, dtype=jnp.float32)
    found = run(tx, layout="shard_map", dtype=jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_defaults_of_the_papers():
    found = run(dj.slowmo(optax.sgd(0.1, momentum=0.9), period=3), dtype=jnp.float32)
    expected = run(
        dj.slowmo(
            optax.sgd(0.1, momentum=0.9), period=3, slow_momentum=0.5, slow_rate=1.0
        ),
        dtype=jnp.float32,
    )
    np.testing.assert_array_equal(found, expected)
    ring = dj.topology.ring(8)
    found = run(dj.qg_dsgdm(0.1, ring), dtype=jnp.float32)
    expected = run(dj.qg_dsgdm(0.1, ring, momentum=0.9), dtype=jnp.float32)
    np.testing.assert_array_equal(found, expected)


def test_slowmo_with_injected_schedule_equals_direct_schedule():
    schedule = optax.exponential_decay(0.2, 1, 0.7)
    injected = optax.inject_hyperparams(dj.slowmo, static_args=("period", "fragments"))
    targets = jnp.arange(4.0)

    def train(tx):
        def run(target):
            p = jnp.zeros(2)
            state = tx.init(p)
            for _ in range(12):
                updates, state = tx.update(p - target, state, p)
                p = optax.apply_updates(p, updates)
            return p

        return jax.vmap(run, axis_name="workers")(targets)

    direct = train(dj.slowmo(schedule, period=4))
    found = train(injected(schedule, period=4))
    np.testing.assert_allclose(found, direct, rtol=1e-5)
    given = train(dj.slowmo(optax.sgd(schedule), period=4, learning_rate=schedule))
    np.testing.assert_array_equal(given, direct)
    constant = train(dj.slowmo(optax.sgd(schedule), period=4))
    assert not np.allclose(constant, direct, rtol=1e-2)


def test_each_fragment_has_the_mean_rate_of_its_own_period():
    """Steps 1 and 5 exchange the first fragment, step 3 the second."""
    rates = np.array([4.0, 1.0, 2.0, 0.5, 8.0])
    tx = dj.slowmo(
        lambda t: jnp.asarray(rates)[t],
        period=4,
        fragments=2,
    )
    params, seen = {"a": jnp.zeros(2), "b": jnp.zeros(1)}, []

    def run(_):
        state, x = tx.init(params), params
        for _ in range(5):
            updates, state = tx.update(params, state, x)
            x = optax.apply_updates(x, updates)
            seen.append([outer.rate for outer in state[-1].outer])
        return jax.tree.leaves(seen)

    found = np.array(jax.vmap(run, axis_name="workers")(jnp.zeros(8)))[:, 0]
    first = [4.0, 2.5, 2.0, 1.25, 3.5]
    second = [4.0, 2.5, 7 / 3, 7.5 / 4, 8.0]
    np.testing.assert_allclose(found.reshape(5, 2), np.transpose([first, second]))


def test_multisteps_itself_is_refused_with_a_remedy():
    wrapped = optax.MultiSteps(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"optimizer .*gradient_transformation\(\)"):
        dj.local_sgd(wrapped, period=2)  # pyright: ignore
    dj.local_sgd(wrapped.gradient_transformation(), period=2)
