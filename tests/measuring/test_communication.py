"""Traffic counted in the traced program equals the formulas in the docstrings."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import decentral_jax as dj
from decentral_jax.communication import Collective
from tests.support.layouts import LAYOUTS, compilations

N = 8
T = dj.topology
RING, STAR, COMPLETE = T.ring(N), T.star(N), T.complete(N)
ONE_PEER, BASE = T.one_peer_exponential(N), T.base_graph(N, 2)
AXES = {"workers": N}
X = jax.ShapeDtypeStruct((10,), jnp.float32)
BYTES = 40
ALL_REDUCE = 2 * BYTES * (N - 1) / N


def cost(fn, *args):
    return dj.communication_cost(fn, *args, axis_sizes=AXES)


def ppermutes(count, sent):
    return (Collective("ppermute", "workers", count, sent),)


@pytest.mark.parametrize(
    "topology",
    [RING, STAR, T.path(8), T.hypercube(3), T.torus(2, 4), T.exponential(8)],
    ids=lambda topology: topology.name,
)
def test_mix_sends_max_degree_times_the_bytes(topology):
    result = cost(lambda x: dj.mix(x, topology), X)
    degree = topology.max_degree
    assert result.collectives == ppermutes(degree, degree * BYTES)
    assert (result.count, result.bytes_sent) == (degree, degree * BYTES)
    assert result.is_exact


def test_averages_are_all_reduces():
    expected = (Collective("all-reduce", "workers", 1, ALL_REDUCE),)
    assert cost(lambda x: dj.mix(x, COMPLETE), X).collectives == expected
    assert cost(dj.average, X).collectives == expected
    assert ALL_REDUCE == 70


@pytest.mark.parametrize("rounds", [1, 5])
def test_accelerated_mix_counts_its_loop(rounds):
    result = cost(lambda x: dj.accelerated_mix(x, RING, rounds), X)
    assert result.collectives == ppermutes(2 * rounds, 2 * rounds * BYTES)
    assert result.is_exact


def test_average_by_factors_counts_each_factor():
    # The center receives from seven leaves in turn, then sends to seven.
    result = cost(lambda x: dj.average_by_factors(x, STAR), X)
    assert result.bytes_sent == 14 * BYTES
    result = cost(lambda x: dj.average_by_factors(x, RING), X)
    assert result.bytes_sent == 4 * 2 * BYTES


@pytest.mark.parametrize("schedule", [ONE_PEER, BASE], ids=["one_peer", "base"])
def test_a_schedule_sends_its_rounds(schedule):
    def fn(x, t):
        return dj.mix(x, schedule, step=t)

    for step in range(2 * schedule.period):
        result = cost(fn, X, np.int32(step))
        assert result.bytes_sent == schedule[step].max_degree * BYTES
        assert result.is_exact
    unknown = cost(fn, X, jax.ShapeDtypeStruct((), jnp.int32))
    assert unknown.bytes_sent == schedule.max_degree * BYTES
    # If all rounds send the same number of bytes, an unknown round is exact.
    assert unknown.is_exact == (len({one.max_degree for one in schedule}) == 1)


def test_half_precision_halves_the_bytes():
    half = jax.ShapeDtypeStruct((10,), jnp.bfloat16)
    for fn in (lambda x: dj.mix(x, RING), dj.average):
        assert cost(fn, half).bytes_sent == cost(fn, X).bytes_sent / 2


def test_buckets_by_dtype():
    tree = {"a": X, "b": X, "c": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    result = cost(lambda x: dj.mix(x, RING), tree)
    assert result.collectives == ppermutes(4, 2 * (2 * BYTES + 6))


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_the_cost_does_not_depend_on_the_layout(num_devices):
    """The cost is as if each worker had its own device. Nothing runs."""
    workers = dj.Workers(N, devices=jax.devices()[:num_devices])
    step = workers.spmd(lambda x, t: dj.mix(dj.mix(x, RING), BASE, step=t))
    x, t = np.zeros((N, 10), np.float32), workers.shard(np.full(N, 1))
    # The first call evaluates scalars, with operations that JAX compiles only once.
    dj.communication_cost(step, x, t)
    with compilations() as compiled:
        result = dj.communication_cost(step, x, t)
    assert not compiled
    assert result.collectives == ppermutes(3, 3 * BYTES)


def test_named_axes():
    for num_devices in (8, 2):
        workers = dj.Workers(
            {"hub": 4, "worker": 2}, devices=jax.devices()[:num_devices]
        )

        @workers.spmd
        def step(x):
            x = dj.mix(x, T.ring(4), axis_name="hub")
            x = dj.average(x, axis_name="worker")
            return dj.average(x, axis_name=("hub", "worker"))

        result = dj.communication_cost(step, np.zeros((4, 2, 10), np.float32))
        assert result.collectives == (
            Collective("all-reduce", "hub,worker", 1, ALL_REDUCE),
            Collective("all-reduce", "worker", 1, BYTES),
            Collective("ppermute", "hub", 2, 2 * BYTES),
        )


@pytest.mark.parametrize("layout", ["shard_map", "pmap"])
def test_maps_written_by_the_user(layout):
    step = LAYOUTS[layout](lambda x: dj.average(dj.mix(x, RING)))
    result = dj.communication_cost(step, jax.ShapeDtypeStruct((N, 10), jnp.float32))
    assert result.collectives == (
        Collective("all-reduce", "workers", 1, ALL_REDUCE),
        Collective("ppermute", "workers", 2, 2 * BYTES),
    )


def test_a_vmap_inside_costs_its_batch():
    result = cost(jax.vmap(lambda x: dj.mix(x, RING)), jnp.zeros((3, 10)))
    assert result.collectives == ppermutes(2, 3 * 2 * BYTES)
    many = jax.vmap(lambda x: dj.mix(x, RING), axis_name="workers")
    assert dj.communication_cost(many, jnp.zeros((N, 10))).collectives == ()


def test_collectives_of_jax_follow_the_convention():
    def fn(x):
        total = lax.psum(x, "workers") + lax.pmax(x, "workers")
        gathered = lax.all_gather(x, "workers")
        exchanged = lax.all_to_all(gathered, "workers", 0, 0)
        scattered = lax.psum_scatter(gathered, "workers")
        return total, exchanged, scattered

    found = {entry.kind: entry for entry in cost(fn, X).collectives}
    assert (found["all-reduce"].count, found["all-reduce"].bytes_sent) == (2, 140)
    assert found["all-gather"].bytes_sent == 7 * BYTES
    assert found["all-to-all"].bytes_sent == 7 * BYTES
    assert found["reduce-scatter"].bytes_sent == 7 * BYTES


def once(x):
    return dj.mix(x, RING)


@jax.custom_vjp
def with_own_gradient(x):
    return once(x)


with_own_gradient.defvjp(lambda x: (once(x), None), lambda _, c: (c,))


def test_nested_programs():
    nested = {
        "jit": jax.jit(jax.jit(once)),
        "remat": jax.checkpoint(once),
        "custom_vjp": with_own_gradient,
        "scan": lambda x: lax.scan(lambda x, _: (once(x), None), x, length=1)[0],
    }
    for name, fn in nested.items():
        result = cost(fn, X)
        assert result.collectives == ppermutes(2, 2 * BYTES), name
        assert result.is_exact
    # The backward pass sends the same number of bytes again.
    loss = jax.grad(lambda x: jnp.sum(once(x) ** 2))
    assert cost(loss, X).bytes_sent == 4 * BYTES


def test_pairs_are_senders_and_receivers():
    (ring,) = cost(once, X).collectives
    assert ring.pairs == {(i, (i + k) % N) for i in range(N) for k in (1, N - 1)}
    (everyone,) = cost(dj.average, X).collectives
    assert everyone.pairs == frozenset()


def test_loops():
    def scans(x):
        def inner(x, _):
            return lax.scan(lambda x, _: (once(x), None), x, length=3)[0], None

        return lax.scan(inner, x, length=2)[0]

    assert cost(scans, X).collectives == ppermutes(12, 12 * BYTES)
    unknown = cost(
        lambda x, n: lax.fori_loop(0, n, lambda _, x: once(x), x), X, np.int32(5)
    )
    assert unknown.bytes_sent == 2 * BYTES
    assert not unknown.is_exact
    until = cost(lambda x: lax.while_loop(lambda x: once(x).sum() > 0, once, x), X)
    assert (until.bytes_sent, until.is_exact) == (4 * BYTES, False)
    silent = cost(
        lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x), X
    )
    assert (silent.bytes_sent, silent.is_exact) == (0, True)


def heavy_or_light(index, x):
    branches = [dj.average, once, lambda x: x]
    return lax.switch(index, branches, x)


def test_branches():
    for index, sent in enumerate([ALL_REDUCE, 2 * BYTES, 0]):
        known = cost(heavy_or_light, np.int32(index), X)
        assert (known.bytes_sent, known.is_exact) == (sent, True)
    # An index out of range is clipped, as in `lax.switch`.
    assert cost(heavy_or_light, np.int32(9), X).bytes_sent == 0
    unknown = cost(heavy_or_light, jax.ShapeDtypeStruct((), jnp.int32), X)
    assert (unknown.bytes_sent, unknown.is_exact) == (2 * BYTES, False)
    same = cost(lambda x: lax.cond(x.sum() > 0, once, lambda x: once(-x), x), X)
    assert (same.bytes_sent, same.is_exact) == (2 * BYTES, True)


def test_predicates_are_followed_through_arithmetic_and_jit():
    def fn(x, count, flag):
        at_end = (count + 1) % 4 == 0
        at_end = jax.jit(jnp.logical_and)(at_end, flag)
        return lax.cond(jnp.where(at_end, True, False), once, lambda x: x, x)

    for count in range(8):
        for flag in (True, False):
            result = cost(fn, X, np.int32(count), np.array(flag))
            assert result.bytes_sent == (2 * BYTES if count % 4 == 3 and flag else 0)
            assert result.is_exact
    assert not cost(fn, X, jax.ShapeDtypeStruct((), jnp.int32), True).is_exact


def test_typed_keys():
    """Random keys are scalars of a dtype that NumPy does not know."""

    def fn(key, x, count):
        noise = jax.random.normal(jax.random.fold_in(key, count), x.shape)
        own = jax.random.uniform(jax.random.key(0)) + jax.random.uniform(
            jax.random.key(count)
        )
        return once(x + noise * own)

    count = np.int32(3)
    assert cost(fn, jax.random.key(0), X, count).bytes_sent == 2 * BYTES
    workers = dj.Workers(N)
    arguments = workers.replicate((jax.random.key(0), np.zeros(10, np.float32), count))
    result = dj.communication_cost(workers.spmd(fn), *arguments)
    assert result.bytes_sent == 2 * BYTES


def test_one_worker_sends_nothing():
    assert dj.communication_cost(dj.average, X, axis_sizes={"workers": 1}).count == 0


def test_more_workers_than_devices():
    sizes = {"workers": 1000}
    result = dj.communication_cost(dj.average, X, axis_sizes=sizes)
    assert result.bytes_sent == 2 * BYTES * 999 / 1000


def test_a_mesh_with_several_axes():
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2),
        ("workers", "model"),
        axis_types=(AxisType.Auto,) * 2,
    )
    spec = PartitionSpec("workers")
    fn = jax.shard_map(
        lambda x: dj.mix(x, T.ring(4)),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={"workers"},
    )
    result = dj.communication_cost(fn, jnp.zeros((4, 10)))
    assert result.collectives == ppermutes(2, 2 * BYTES)


def test_the_table(capsys):
    print(cost(lambda x: dj.average(once(x)), jnp.zeros(10_000)))
    assert capsys.readouterr().out.splitlines() == [
        "collective      axis              count      bytes sent",
        "all-reduce      workers               1          70,000",
        "ppermute        workers               2          80,000",
        "total                                 3         150,000",
    ]
    print(cost(heavy_or_light, jax.ShapeDtypeStruct((), jnp.int32), X))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "(not exact: counts the heavier branch, or one loop iteration)"


def _primitive(name):
    primitive = jax.extend.core.Primitive(name)
    primitive.def_abstract_eval(lambda x, **params: x)
    return primitive


def _ragged(x):
    zero, one = jnp.array([0, 1], jnp.int32), jnp.ones(2, jnp.int32)
    return jax.lax.ragged_all_to_all(
        x, jnp.zeros(2), zero, one, zero, one, axis_name="workers"
    )


UNLISTED = {"ragged_all_to_all": _ragged} | {
    f"by_{key}": lambda x, key=key, axes=axes: _primitive(f"by_{key}").bind(
        x, **{key: axes}
    )
    for key, axes in {"axis_name": "workers", "axes": ("workers",)}.items()
}


@pytest.mark.parametrize("name", UNLISTED)
def test_unlisted_collectives_are_named(name):
    """Collectives of unknown cost make the result inexact, and it names them."""

    def step(x):
        return jax.lax.fori_loop(0, 2, lambda _, x: UNLISTED[name](x), x)

    for fn in (UNLISTED[name], step):
        cost = dj.communication_cost(fn, jnp.zeros(2), axis_sizes={"workers": 2})
        assert not cost.is_exact
        assert cost.unlisted == (name,)
        assert f"not counted: {name}" in str(cost)
        alone = dj.communication_cost(fn, jnp.zeros(2), axis_sizes={"workers": 1})
        assert alone.is_exact


def test_programs_that_send_nothing_are_exact():
    def step(x):
        return x + jax.lax.axis_index("workers").astype(x.dtype) + x.sum(0)

    cost = dj.communication_cost(step, jnp.zeros(2), axis_sizes={"workers": 2})
    assert (cost.is_exact, cost.count, cost.unlisted) == (True, 0, ())


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
def test_wide_arguments_raise_no_warning(dtype):
    """As in an ordinary call, 64-bit arguments raise no warning."""
    workers = dj.Workers(4)
    step = workers.spmd(lambda y: dj.average(y.astype(jnp.float32)))
    labels = np.zeros((4, 6), dtype)
    assert dj.communication_cost(step, labels).bytes_sent == 2 * 24 * 3 / 4
    counts = np.zeros(4, dtype)
    assert dj.communication_cost(step, counts).bytes_sent == 2 * 4 * 3 / 4

    def alone(y):
        return dj.average(y.astype(jnp.float32))

    shape = jax.ShapeDtypeStruct((6,), dtype)
    for arg in (labels[0], shape, dtype(3)):
        cost = dj.communication_cost(alone, arg, axis_sizes={"workers": 4})
        assert cost.bytes_sent == 2 * 4 * np.size(arg) * 3 / 4
