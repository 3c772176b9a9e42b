"""Mixing equals the dense matrix product in every layout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.gossip import mix_differences, momentum
from decentral_jax.topology import Topology
from tests.support.layouts import LAYOUTS, primitives

N = 8
RING, STAR = dj.topology.ring(N), dj.topology.star(N)
RANDOM = dj.topology.erdos_renyi(N, 0.4, seed=2)
COMPLETE = dj.topology.complete(N)
VARIED = dj.topology.schedule([STAR, dj.topology.exponential(N)])
# Columns sum to one, rows do not; some weights are negative, as in exact factors.
_weights = np.random.default_rng(1).normal(size=(N, N)) * (RANDOM.matrix > 0)
DIRECTED = Topology(_weights / _weights.sum(0), "directed")


def accelerated(topology, rounds):
    """The matrix of accelerated gossip, from its recursion."""
    eta = momentum(topology)
    now = before = np.eye(N)
    for _ in range(rounds):
        now, before = (1 + eta) * topology.matrix @ now - eta * before, now
    return now


# name -> (one worker's function, the equivalent matrix at a step)
CASES = {
    "ring": (lambda x, t: dj.mix(x, RING), lambda t: RING.matrix),
    "directed": (lambda x, t: dj.mix(x, DIRECTED), lambda t: DIRECTED.matrix),
    "varied": (lambda x, t: dj.mix(x, VARIED, step=t), lambda t: VARIED[t].matrix),
    "complete": (lambda x, t: dj.mix(x, COMPLETE), lambda t: COMPLETE.matrix),
    "accelerated": (
        lambda x, t: dj.accelerated_mix(x, RING, 4),
        lambda t: accelerated(RING, 4),
    ),
    "factors": (
        lambda x, t: dj.average_by_factors(x, dj.topology.hypercube(3)),
        lambda t: COMPLETE.matrix,
    ),
    "tree factors": (
        lambda x, t: dj.average_by_factors(x, STAR),
        lambda t: COMPLETE.matrix,
    ),
    # The gradient of the sum of all workers' losses, in every layout.
    "gradient": (
        lambda x, t: jax.grad(lambda x: jnp.sum(dj.mix(x, DIRECTED) ** 2))(x),
        lambda t: 2 * DIRECTED.matrix.T @ DIRECTED.matrix,
    ),
    "gradient of the mean": (
        lambda x, t: jax.grad(lambda x: jnp.sum(dj.average(x) ** 2))(x),
        lambda t: 2 * COMPLETE.matrix,
    ),
}
DATA = np.random.default_rng(0).normal(size=(N, 3))


@functools.cache
def mixed_by(layout):
    """All cases as one program, which compiles once."""

    def every_case(x, t):
        return {name: case[0](x, t) for name, case in CASES.items()}

    return LAYOUTS[layout](every_case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_matrix_product(layout, x64):
    for step in (0, 2, 7):
        results = mixed_by(layout)(jnp.asarray(DATA), jnp.full(N, step))
        for name, (_, matrix) in CASES.items():
            np.testing.assert_allclose(
                results[name],
                matrix(step) @ DATA,
                rtol=0,
                atol=1e-12,
                err_msg=f"{name}, step {step}",
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_with_the_neighbors(layout, x64):
    # Message slots that a worker does not use refer to worker 0.
    step, faulty = 3, 0
    faulty_data = jnp.asarray(DATA).at[faulty].set(jnp.nan)
    results = mixed_by(layout)(faulty_data, jnp.full(N, step))
    for name in ("ring", "directed", "varied"):
        neighbors = CASES[name][1](step)[:, faulty] != 0
        assert 1 < neighbors.sum() < N
        is_nan = np.isnan(results[name]).any(1)
        np.testing.assert_array_equal(is_nan, neighbors, err_msg=name)


# Relative and absolute tolerances. Half precision is rounded once, to 8 bits.
ACCURACY = {"float64": (0, 1e-12), "float32": (0, 1e-6), "bfloat16": (2**-8, 1e-6)}


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_2"])
def test_trees_of_several_dtypes(layout, x64):
    """Dtypes, shapes and structure stay; sums are in at least float32."""
    rng = np.random.default_rng(0)
    shapes = {
        "float64": [(N,)],
        "float32": {"none": None, "a": (N, 2, 2), "b": (N,)},
        "bfloat16": ((N, 5), (N, 0)),
        "nothing": {},
    }
    tree = {
        dtype: jax.tree.map(
            lambda shape, dtype=dtype: jnp.asarray(rng.uniform(-1, 1, shape), dtype),
            part,
            is_leaf=lambda x: isinstance(x, tuple) and N in x,
        )
        for dtype, part in shapes.items()
    }
    mixed, mean = LAYOUTS[layout](lambda x: (dj.mix(x, RING), dj.average(x)))(tree)
    for got, matrix in ((mixed, RING.matrix), (mean, COMPLETE.matrix)):
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        for y, x in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            want = np.tensordot(matrix, np.asarray(x, np.float64), 1)
            rtol, atol = ACCURACY[x.dtype.name]
            if got is mean:  # an all-reduce rounds half precision after each addition
                rtol, atol = 0, max(N * rtol, atol)
            np.testing.assert_allclose(np.asarray(y, float), want, rtol, atol)


def test_many_neighbors(x64):
    """More neighbors than `DENSE_FROM`: a matrix product on one device."""
    dense = dj.topology.erdos_renyi(32, 0.95, seed=0)
    rounds = [dense, dj.topology.erdos_renyi(32, 0.9, seed=1)]
    schedule = dj.topology.schedule(rounds)
    x = np.random.default_rng(0).normal(size=(32, 3))

    def fn(x, t):
        return dj.mix(x, dense), dj.mix(x, schedule, step=t)

    counts = primitives(LAYOUTS["vmap"](fn, 32), x, np.full(32, 3))
    assert counts["dot_general"] == 2
    static, varying = LAYOUTS["vmap"](fn, 32)(jnp.asarray(x), jnp.full(32, 3))
    np.testing.assert_allclose(static, dense.matrix @ x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(varying, rounds[1].matrix @ x, rtol=0, atol=1e-12)


LOPSIDED = Topology(np.array([[0.7, 0.3], [0.1, 0.9]]), "lopsided")


@pytest.mark.parametrize(
    ("shape", "num_devices"),
    [((4, 2), 8), ((4, 2), 4), ((4, 2), 2), ((4, 2), 1), ((2, 4), 4), ((1, 8), 4)],
)
def test_nested_axes(shape, num_devices, x64):
    workers = dj.Workers(
        dict(zip(("hub", "worker"), shape, strict=True)),
        devices=jax.devices()[:num_devices],
    )
    hubs = dj.topology.star(shape[0])
    inner = LOPSIDED if shape[1] == 2 else dj.topology.path(shape[1])

    @workers.spmd
    def every_axis(x):
        return {
            "hub": dj.mix(x, hubs, axis_name="hub"),
            "worker": dj.mix(x, inner, axis_name="worker"),
            "all": dj.mix(x, DIRECTED, axis_name=("hub", "worker")),
            "mean": dj.average(x, axis_name=("hub", "worker")),
            "hub mean": dj.average(x, axis_name="hub"),
            "worker mean": dj.average(x, axis_name="worker"),
        }

    x = np.random.default_rng(0).normal(size=(*shape, 3))
    got = workers.gather(every_axis(workers.shard(jnp.asarray(x))))
    want = {
        "hub": np.einsum("ab,bwd->awd", hubs.matrix, x),
        "worker": np.einsum("vw,hwd->hvd", inner.matrix, x),
        "all": (DIRECTED.matrix @ x.reshape(N, 3)).reshape(x.shape),
        "mean": np.broadcast_to(x.mean((0, 1)), x.shape),
        "hub mean": np.broadcast_to(x.mean(0), x.shape),
        "worker mean": np.broadcast_to(x.mean(1, keepdims=True), x.shape),
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-12, err_msg=name)


def over_workers(fn, *args):
    return jax.jit(jax.vmap(fn, axis_name="workers"))(*args)


def residual(x):
    return np.linalg.norm(x - x.mean(0))


def test_contraction_is_the_spectral_prediction(x64):
    """Factor per round of the slowest mode: lambda, or sqrt(eta) when accelerated."""
    rounds, second, eta = 20, RING.second_eigenvalue, momentum(RING)
    slowest = jnp.asarray(np.cos(2 * np.pi * np.arange(N) / N))

    def both(x):
        plain = lax.fori_loop(0, rounds, lambda _, x: dj.mix(x, RING), x)
        return plain, dj.accelerated_mix(x, RING, rounds)

    plain, fast = over_workers(both, slowest)
    np.testing.assert_allclose(plain, second**rounds * slowest, atol=1e-13)
    # lambda is a double root of z^2 - (1 + eta) lambda z + eta, with z_{-1} = z_0.
    root = math.sqrt(eta)
    shrink = (1 + rounds * (1 - root)) * root**rounds
    np.testing.assert_allclose(fast, shrink * slowest, atol=1e-13)


def test_residual_after_ten_rounds(x64):
    """Storing a mixed z_{r-1} instead would give 2.4e-2."""

    def both(x):
        plain = lax.fori_loop(0, 10, lambda _, x: dj.mix(x, RING), x)
        return plain, dj.accelerated_mix(x, RING, 10)

    start = jnp.eye(N)[0]
    plain, fast = over_workers(both, start)
    assert residual(plain) / residual(start) == pytest.approx(6.1e-2, rel=0.01)
    assert residual(fast) / residual(start) == pytest.approx(3.5e-3, rel=0.02)
    np.testing.assert_allclose([plain.mean(), fast.mean()], 1 / N, atol=1e-14)


def test_one_worker():
    x = jnp.array([3.0])
    for topology in (dj.topology.ring(1), dj.topology.complete(1)):
        assert over_workers(lambda x, t=topology: dj.mix(x, t), x) == x
        assert over_workers(lambda x, t=topology: dj.accelerated_mix(x, t, 3), x) == x
        assert over_workers(lambda x, t=topology: dj.average_by_factors(x, t), x) == x
    one_peer = dj.topology.one_peer_ring(1)
    assert over_workers(lambda x: dj.mix(x, one_peer, step=3), x) == x


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_do_not_overflow(layout, dtype):
    """The mean of representable values is representable, even if their sum is not."""
    large = float(jnp.finfo(dtype).max) / 4
    x = jnp.full((8, 4), large, dtype)
    means = {
        "average": dj.average,
        "complete": lambda x: dj.mix(x, dj.topology.complete(8)),
        "ring": lambda x: dj.mix(x, dj.topology.ring(8)),
    }
    if dtype == jnp.float32:
        x = x / 4  # the sum of eight is still finite: float32 is summed first
    for name, mean in means.items():
        found = np.asarray(LAYOUTS[layout](mean)(x), np.float32)
        expected = np.asarray(x, np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-2, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_nonfinite_values_reach_only_neighbors(num_devices, bad):
    """Also with dense topologies, for which a matrix product computes the sums."""
    n = 32
    workers = dj.Workers(n, devices=jax.devices()[:num_devices])
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    x[5, 1] = bad
    for topology in (dj.topology.star(n), dj.topology.erdos_renyi(n, 0.9, seed=1)):
        found = workers.gather(workers.spmd(lambda x, t=topology: dj.mix(x, t))(x))
        reached = topology.matrix[:, 5] != 0
        np.testing.assert_array_equal(np.isfinite(found[:, 1]), ~reached)
        others = np.delete(np.arange(3), 1)
        np.testing.assert_allclose(
            found[:, others], (topology.matrix @ x[:, others]), atol=1e-6
        )
        good = np.where(np.isfinite(x), x, 0)
        np.testing.assert_allclose(
            found[~reached, 1], (topology.matrix @ good)[~reached, 1], atol=1e-6
        )


@pytest.mark.parametrize(
    ("layout", "n"),
    [("vmap", 8), ("folded_2", 8), ("shard_map", 8), ("vmap", 32), ("folded_4", 32)],
)
def test_differences_sum_to_zero(layout, n):
    """The sum of all differences is zero up to their own rounding, not the values'."""
    topologies = [dj.topology.ring(n), dj.topology.star(n)]
    topologies.append(dj.topology.erdos_renyi(n, 0.4, seed=2))
    sent_as = [jnp.float32, jnp.bfloat16]

    def differences(x):
        return [
            mix_differences(x, topology, like=x.astype(dtype))
            for topology in topologies
            for dtype in sent_as
        ]

    x = 1000 + 20 * np.random.default_rng(3).normal(size=(n, 5)).astype(np.float32)
    found = iter(LAYOUTS[layout](differences, n)(x))
    for topology in topologies:
        for dtype in sent_as:
            change = np.asarray(next(found), np.float64)
            # On one device, a dense topology uses one product, which casts nothing.
            whole = layout == "vmap" and topology.max_degree > 24
            sent = np.asarray(x if whole else x.astype(dtype), np.float64)
            expected = topology.matrix @ sent - sent
            np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-5)
            rounding = np.finfo(np.float32).eps * np.abs(expected).max()
            assert np.abs(change.sum(0)).max() < 8 * rounding


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_mean_of_integers_and_booleans(layout, wide):
    """The mean of integer and Boolean metrics is a float in every layout."""
    with jax.enable_x64(wide):
        counts, right = np.arange(8, dtype=np.int32), np.arange(8) % 4 == 0
        tree = {"count": counts, "right": right, "unsigned": counts.astype(np.uint8)}
        means = layout(dj.average)(tree)
        for name, mean in {"count": 3.5, "right": 0.25, "unsigned": 3.5}.items():
            assert means[name].dtype == (jnp.float64 if wide else jnp.float32)
            np.testing.assert_array_equal(means[name], mean)
