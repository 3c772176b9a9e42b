"""Programs that mixing traces to: messages, control flow, an outer vmap over runs."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.packing import BUCKET_BYTES
from decentral_jax.communication import KINDS
from decentral_jax.topology import Topology
from tests.support.layouts import LAYOUTS, equations, primitives
from tests.support.registry import ALGORITHMS

N = 8
RING, STAR = dj.topology.ring(N), dj.topology.star(N)
RANDOM = dj.topology.erdos_renyi(N, 0.4, seed=2)
COMPLETE = dj.topology.complete(N)
ONE_PEER = dj.topology.one_peer_exponential(N)
BASE = dj.topology.base_graph(N, 2)
VARIED = dj.topology.schedule([STAR, dj.topology.exponential(N)])
# Each worker receives from all workers of higher index; the last also from the first.
_weights = np.triu(np.ones((N, N))) + np.outer(np.eye(N)[-1], np.eye(N)[0])
DIRECTED = Topology(_weights / _weights.sum(0), "directed")
DATA = np.random.default_rng(0).normal(size=(N, 3))


def messages(topology, tree, layout="shard_map", n=N):
    """Dtype and size of the operand of each `ppermute` in the traced program."""
    fn = LAYOUTS[layout](lambda x: dj.mix(x, topology, step=0), n)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), tree)
    jaxpr = jax.make_jaxpr(fn)(stacked)
    operands = [
        equation.invars[0].aval
        for equation in equations(jaxpr)
        if equation.primitive.name == "ppermute"
    ]
    return sorted((operand.dtype.name, operand.size) for operand in operands)


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


TREE = {
    "kernel": struct((2, 3), jnp.float32),
    "bias": struct((4,), jnp.float32),
    "half": struct((5,), jnp.bfloat16),
}


@pytest.mark.parametrize(
    "topology",
    [RING, STAR, RANDOM, dj.topology.path(N), DIRECTED, dj.topology.exponential(N)],
    ids=lambda topology: topology.name,
)
def test_max_degree_messages_per_dtype(topology):
    degree = topology.max_degree
    expected = [("bfloat16", 5)] * degree + [("float32", 10)] * degree
    assert messages(topology, TREE) == expected


@pytest.mark.parametrize("schedule", [ONE_PEER, BASE, VARIED])
def test_each_branch_of_a_schedule_sends_its_own_round(schedule):
    step = LAYOUTS["shard_map"](lambda x, t: dj.mix(x, schedule, step=t))
    arguments = jnp.ones((N, 3)), jnp.zeros(N, jnp.int32)
    jaxpr = jax.make_jaxpr(step)(*arguments)
    switches = [
        [
            Counter(one.primitive.name for one in equations(branch))["ppermute"]
            for branch in switch.params["branches"]
        ]
        for switch in equations(jaxpr)
        if switch.primitive.name == "cond"
    ]
    degrees = [one.max_degree for one in schedule]
    # A second switch may apply the weights; it sends nothing.
    assert [messages for messages in switches if any(messages)] == [degrees]
    assert primitives(step, *arguments)["ppermute"] == sum(degrees)


def test_big_leaves_get_their_own_messages():
    full = BUCKET_BYTES // 4
    tree = {
        "big": struct((full,), jnp.float32),
        "nearly": struct((full - 1,), jnp.float32),
        "small": struct((7,), jnp.float32),
    }
    assert messages(RING, tree) == [("float32", full)] * 2 + [("float32", full + 6)] * 2


def test_folding_sends_only_the_rows_needed():
    assert (
        messages(RING, TREE, "folded_4")
        == [("bfloat16", 5)] * 2 + [("float32", 10)] * 2
    )
    assert messages(RING, TREE, "folded_2") == [("bfloat16", 10), ("float32", 20)]
    assert messages(RING, TREE, "one_device") == []


def stacked_ones(dtypes=("float32",)):
    return [jnp.ones((N, 3), dtype) for dtype in dtypes]


def test_complete_graph_is_one_all_reduce_per_dtype():
    fn = LAYOUTS["shard_map"](lambda x: dj.mix(x, COMPLETE))
    counts = primitives(fn, stacked_ones(("float32", "float32", "bfloat16")))
    all_reduces = sum(counts[name] for name, kind in KINDS.items() if "psum" in name)
    assert all_reduces == 2
    assert not counts["ppermute"]


@pytest.mark.parametrize("name", ["detagm_phase_end", "defacto"])
def test_cond_on_the_counter_stays_a_cond_under_vmap(name):
    tx = ALGORITHMS[name].make(0.1)
    state = jax.vmap(tx.init)(jnp.ones((N, 3)))
    counts = primitives(
        jax.vmap(lambda g, s, p: tx.update(g, s, p), axis_name="workers"),
        jnp.ones((N, 3)),
        state,
        jnp.ones((N, 3)),
    )
    assert counts["cond"] == {"detagm_phase_end": 1, "defacto": 2}[name]


def exchanges(t):
    return [
        lambda x: dj.mix(x, RING),
        lambda x: dj.mix(x, COMPLETE),
        dj.average,
        lambda x: dj.accelerated_mix(x, RING, 2),
        lambda x: dj.average_by_factors(x, STAR),
        lambda x: dj.mix(x, VARIED, step=t),
        lambda x: x,
    ]


def test_no_collective_under_vmap():
    program = LAYOUTS["vmap"](lambda x: [fn(x) for fn in exchanges(0)])
    jaxpr = jax.make_jaxpr(program)(*stacked_ones())
    for equation in equations(jaxpr):
        axes = equation.params.get("axes", equation.params.get("axis_name", ()))
        assert not any(isinstance(axis, str) for axis in np.atleast_1d(axes))
    text = program.lower(*stacked_ones()).as_text()
    assert "stablehlo.reduce" in text
    assert not any(op in text for op in ("collective", "all_reduce", "all_gather"))


def control_flow(x, flag, t):
    """A user's own control flow around every kind of exchange."""
    every = exchanges(t)
    return {
        "cond": [lax.cond(flag, fn, lambda x: 0 * x, x) for fn in every],
        "scan": [lax.scan(lambda c, _, f=f: (f(c), 0), x, None, 2)[0] for f in every],
        "scan steps": lax.scan(
            lambda c, i: (dj.mix(c, ONE_PEER, step=i), 0), x, jnp.arange(3)
        )[0],
        "switch": lax.switch(t, every, x),
        # A value that is equal on all workers, packed with one that varies.
        "constant": dj.mix((jnp.ones(2), x), RING),
        "constant mean": dj.average((jnp.ones(2), x)),
    }


def straight(x, t):
    """The results of `control_flow`, computed without control flow."""
    functions = exchanges(t)
    once = [fn(x) for fn in functions]
    return {
        "cond": once,
        "scan": [fn(y) for fn, y in zip(functions, once, strict=True)],
        "scan steps": once[1],
        "switch": once[3],
        "constant": (jnp.ones(2), once[0]),
        "constant mean": (jnp.ones(2), once[1]),
    }


def test_in_a_users_control_flow(x64):
    """`shard_map(check_vma=True)` checks that the types of branches agree."""
    x, t = jnp.asarray(DATA), jnp.full(N, 3)
    got = LAYOUTS["shard_map"](control_flow)(x, jnp.full(N, True), t)
    want = LAYOUTS["vmap"](straight)(x, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)


STATEFUL = ("d_psgd_one_peer", "detagm_phase_end", "defacto")


@functools.cache
def several_algorithms():
    optimizers = {name: ALGORITHMS[name].make(0.1) for name in STATEFUL}

    def init(params):
        return {name: tx.init(params) for name, tx in optimizers.items()}

    def step(states, params, shift):
        states, params = dict(states), dict(params)
        for name, tx in optimizers.items():
            gradient = params[name] - shift
            updates, states[name] = tx.update(gradient, states[name], params[name])
            params[name] += updates
        return states, params

    return init, step


@functools.cache
def runs_one_by_one():
    """Parameters of two runs after 8 steps: shape [2, N, 3] per algorithm."""
    init, step = several_algorithms()
    step = LAYOUTS["vmap"](step)
    finals = []
    for shift in run_data():
        params = dict.fromkeys(STATEFUL, jnp.zeros((N, 3)))
        states = jax.vmap(init)(params[STATEFUL[0]])
        for _ in range(8):
            states, params = step(states, params, shift)
        finals.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *finals)


def run_data():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, N, 3)))


@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
def test_an_outer_vmap_over_runs(layout, x64):
    """Batches the step counter too; each run equals the same run alone."""
    init, step = several_algorithms()
    params = dict.fromkeys(STATEFUL, jnp.zeros((2, N, 3)))
    states = jax.vmap(jax.vmap(init))(params[STATEFUL[0]])
    step = jax.jit(jax.vmap(LAYOUTS[layout](step)))
    for _ in range(8):
        states, params = step(states, params, run_data())
    for name, expected in runs_one_by_one().items():
        assert np.abs(expected).max() > 0.01, name
        assert np.abs(expected[0] - expected[1]).max() > 0.01, name
        np.testing.assert_allclose(params[name], expected, atol=1e-12, err_msg=name)


# JAX turns a cond on a batched counter into a select over its operands. They include
# the constant arrays of a branch, which then vary; marking them as varying fails.
FAILS_IN_JAX = (
    "d_psgd_atc_schedule",
    "dsgt_schedule",
    "defacto_tree",
    "qg_dsgdm_schedule",
    "mll_sgd",
    "mll_sgd_uneven",
    "mll_sgd_two_hubs",
    "hl_sgd_uneven",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=ValueError))
        if name in FAILS_IN_JAX
        else name
        for name in ALGORITHMS
    ],
)
def test_every_algorithm_traces_under_an_outer_vmap(name):
    tx = ALGORITHMS[name].make(0.1)
    step = LAYOUTS["shard_map"](tx.update, ALGORITHMS[name].shape)
    params = {leaf: struct((3, N, 2), jnp.float32) for leaf in ("a", "b")}
    state = jax.eval_shape(jax.vmap(jax.vmap(tx.init)), params)
    updates, new = jax.eval_shape(jax.vmap(step), params, state, params)
    assert updates == params
    assert new == state
