"""Compressors: payloads, traffic, and the bitwise-equal states of error feedback."""

import dataclasses
import functools
import math
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.axis import WorkerAxis
from decentral_jax.communication import Collective
from tests.support.layouts import LAYOUTS, primitives

N = 8
C = dj.compression
RING = dj.topology.ring(N)
KEY = jax.random.key(0)
# Entries: 108, 60 and 7.
SHAPES = {"matrix": (12, 9), "tensor": (3, 5, 4), "vector": (7,)}
PARAMS = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}


def selections(key, x, other, ratio):
    """Applies every operation of the selections and of `top_k` to two arrays."""
    positions = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
    found = {}
    for compressor in (C.random_block(ratio), C.random_k(ratio)):
        payload = compressor.compress(key, x)
        found[type(compressor).__name__] = (
            payload,
            compressor.compress(key, positions),
            compressor.decompress(key, payload, x),
            compressor.replace(key, other, payload),
            jnp.where(
                compressor.mask(key, x),
                compressor.decompress(key, payload, x),
                other,
            ),
        )
    top = C.top_k(ratio)
    payload = top.compress(key, x)
    found["TopK"] = (*payload, top.decompress(key, payload, x))
    return found


# Compilation for each shape dominates the run time: disable optimization.
SELECT = jax.jit(
    selections,
    static_argnums=3,
    compiler_options={"xla_backend_optimization_level": "0"},
)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.sampled_from([(1,), (7,), (3, 4), (2, 1, 5)]),
    ratio=st.sampled_from([1.0, 1.5, 4.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_selected_and_remaining_entries_sum_to_input(shape, ratio, seed):
    rng = np.random.default_rng(seed)
    x, other = rng.normal(size=(2, *shape)).astype(np.float32)
    found = jax.device_get(SELECT(jax.random.key(seed), x, other, ratio))
    size = max(1, math.ceil(x.size / ratio))
    for name, (payload, positions, dense, *replaced) in found.items():
        assert payload.shape == positions.shape == (size,), name
        assert len(set(positions.tolist())) == size, name
        np.testing.assert_array_equal(payload, x.reshape(-1)[positions], name)
        np.testing.assert_array_equal(dense + (x - dense), x, name)
        for base, got in zip((0 * x, *[other] * 2), (dense, *replaced), strict=False):
            expected = base.copy()
            expected.reshape(-1)[positions] = payload
            np.testing.assert_array_equal(got, expected, name)
    start, *_ = block = found["RandomBlock"][1]
    np.testing.assert_array_equal(block, (start + np.arange(size)) % x.size)
    left = np.delete(x.reshape(-1), found["TopK"][1])
    assert np.abs(found["TopK"][0]).min() >= np.abs(left).max(initial=0)


@pytest.mark.parametrize("over_keys", [None, 0])
def test_blocks_are_replaced_under_maps(over_keys):
    """With one shared key or one key per run, and with mapped and unmapped arrays."""
    block = C.random_block(4)
    keys = jax.random.split(KEY, 3)
    key = KEY if over_keys is None else keys
    x = jnp.arange(3 * 5 * 10.0).reshape(3, 5, 10)
    payload = -jnp.ones((5, 3))

    def workers(key, x):
        by_worker = jax.vmap(block.replace, (None, 0, 0))(key, x, payload)
        return by_worker, jax.vmap(block.replace, (None, None, 0))(key, x[0], payload)

    found = jax.jit(jax.vmap(workers, (over_keys, 0)))(key, x)
    for run in range(3):
        k = KEY if over_keys is None else keys[run]
        for worker in range(5):
            expected = block.replace(k, x[run, worker], payload[worker])
            assert (expected == -1).sum() == 3
            np.testing.assert_array_equal(found[0][run, worker], expected)
            expected = block.replace(k, x[run, 0], payload[worker])
            np.testing.assert_array_equal(found[1][run, worker], expected)


def test_blocks_start_anywhere():
    """Every start is equally likely, including those whose block wraps around.

    The blocks hold 2 and 7 of 10 entries. `random_k` selects each entry equally often.
    """
    x = jnp.arange(10)

    def blocks(key):
        compressors = (C.random_block(5), C.random_block(1.5), C.random_k(2.5))
        return [compressor.compress(key, x) for compressor in compressors]

    keys = jax.random.split(KEY, 2000)
    *found, chosen = jax.device_get(jax.jit(jax.vmap(blocks))(keys))
    for size, block in zip((2, 7), found, strict=True):
        start = block[:, :1]
        np.testing.assert_array_equal(block, (start + np.arange(size)) % 10)
        counts = np.bincount(start[:, 0], minlength=10)
        assert np.abs(counts - 200).max() < 5 * np.sqrt(180)
    counts = np.bincount(chosen.ravel(), minlength=10)
    assert np.abs(counts - 800).max() < 5 * np.sqrt(480)


def test_sign():
    x = jnp.array([3.0, -1.0, 2.0, 0.0, -4.0, 1.0, -1.0, 5.0, -2.0])
    payload = bits, scale = C.sign().compress(KEY, x)
    assert (bits.dtype, bits.shape, scale.dtype) == (jnp.uint8, (2,), jnp.float32)
    np.testing.assert_allclose(scale, 19 / 9, rtol=1e-6)
    signs = [1, -1, 1, 1, -1, 1, -1, 1, -1]
    for like in (x, jax.ShapeDtypeStruct((3, 3), jnp.bfloat16)):
        got = C.sign().decompress(KEY, payload, like)
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
        expected = np.reshape(np.float32(scale) * np.float32(signs), like.shape)
        np.testing.assert_array_equal(got, expected.astype(like.dtype))
    nothing = C.sign().compress(KEY, jnp.zeros(3))
    assert not C.sign().decompress(KEY, nothing, jnp.zeros(3)).any()


def test_quantize():
    x = jnp.array([[2.0, -2.0, 0.3], [-1.7, 0.0, 1e-3], [0.5, 1.9, -0.61]])
    codecs = [C.quantize(bits) for bits in range(1, 9)]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def compress_and_decompress(key, x):
        payloads = [codec.compress(key, x) for codec in codecs]
        zipped = zip(codecs, payloads, strict=True)
        return payloads, [codec.decompress(key, p, x) for codec, p in zipped]

    num = 2000
    keys = jax.random.split(KEY, num)
    payloads, arrived = jax.device_get(compress_and_decompress(keys, x))
    for bits, (packed, scale), got in zip(range(1, 9), payloads, arrived, strict=True):
        assert (packed.dtype, packed[0].size) == (np.uint8, bits * 2)
        np.testing.assert_array_equal(scale, np.full(num, 2, np.float32))
        step = 4 / (2**bits - 1)
        assert np.abs(got - x).max() < step * (1 + 1e-4)
        # Each entry lies on one of the levels, the outer ones to rounding.
        level = (got + 2) / step
        np.testing.assert_allclose(level, level.round(), atol=1e-3)
        ends = np.tile([2.0, -2.0], (num, 1))
        np.testing.assert_allclose(got[:, 0, :2], ends, rtol=2.4e-7)  # two ulps
        error = got.mean(0, dtype=np.float64) - x
        assert np.abs(error).max() < 5 * (step / 2) / np.sqrt(num)
    zeros = compress_and_decompress(keys, 0 * x)[1]
    assert not np.any(zeros)


def test_cast_and_identity():
    x = jnp.array([1.0, 1 / 3, -1e-30])
    payload = C.cast("bfloat16").compress(KEY, x)
    assert payload.dtype == jnp.bfloat16
    got = C.cast("bfloat16").decompress(KEY, payload, x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, np.asarray(payload).astype(np.float32))
    np.testing.assert_allclose(got, x, rtol=2**-8)
    same = C.identity().decompress(KEY, C.identity().compress(KEY, x), x)
    np.testing.assert_array_equal(same, x)


# Bytes sent per worker for 108 + 60 + 7 entries: (all-reduced, gathered).
PAYLOADS = {
    C.random_block(64): (4 * (2 + 1 + 1), 0),
    C.random_k(10): (4 * (11 + 6 + 1), 0),
    C.identity(): (4 * 175, 0),
    C.nothing(): (0, 0),
    C.cast("bfloat16"): (2 * 175, 0),
    C.low_rank(2): (4 * (2 * (12 + 9) + 2 * (15 + 4) + 7), 0),
    # At rank 4 the tensor's factors, 4 * (15 + 4), would be larger than it is.
    C.low_rank(4): (4 * (4 * (12 + 9) + 60 + 7), 0),
    C.sign(): (0, (14 + 8 + 1) + 3 * 4),
    C.quantize(4): (0, 4 * (14 + 8 + 1) + 3 * 4),
    C.top_k(10): (0, 8 * (11 + 6 + 1)),
    C.top_k(k=3): (0, 8 * 3 * 3),
    C.top_k(10, whole_model=True): (0, 8 * 18),
}


CODECS = [compressor for compressor in PAYLOADS if isinstance(compressor, C.Codec)]


def cost(tx, count: Any = None):
    state = jax.eval_shape(tx.init, PARAMS)
    if count is not None:
        state = state._replace(count=np.int32(count))
    sizes = {"workers": N}
    return dj.communication_cost(tx.update, PARAMS, state, PARAMS, axis_sizes=sizes)


@pytest.mark.parametrize("compressor", PAYLOADS, ids=str)
def test_error_feedback_sends_the_payloads_and_nothing_else(compressor):
    reduced, gathered = PAYLOADS[compressor]
    for detach in (0.0, 0.3, 1.0):
        result = cost(dj.error_feedback(compressor, detach=detach))
        assert result.is_exact
        sent = {entry.kind: entry.bytes_sent for entry in result.collectives}
        expected = {"all-reduce": 2 * 7 / 8 * reduced, "all-gather": 7 * gathered}
        assert sent == {kind: size for kind, size in expected.items() if size}


COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast)(?:-start)?\("
)


@pytest.mark.parametrize(
    ("compressor", "elements"),
    [
        (C.random_block(64), {("all-reduce", "f32"): 2 + 1 + 1}),
        (C.sign(), {("all-gather", "u8"): 14 + 8 + 1, ("all-gather", "f32"): 3}),
    ],
    ids=str,
)
def test_compiled_program_sends_only_the_payloads(compressor, elements):
    tx, workers = dj.error_feedback(compressor, detach=0.3), dj.Workers(N)
    params = {k: np.zeros(shape, np.float32) for k, shape in SHAPES.items()}
    params, state = workers.replicate((params, tx.init(params)))
    text = workers.spmd(tx.update).lower(params, state, params).compile().as_text()
    found: dict[tuple[str, str], int] = {}
    for result, kind in COLLECTIVE.findall(text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size = math.prod(int(dim) for dim in dims.split(",") if dim)
            size //= N if kind == "all-gather" else 1
            found[kind, dtype] = found.get((kind, dtype), 0) + size
    assert found == elements


@pytest.mark.parametrize(
    "compressor", [c for c in PAYLOADS if not isinstance(c, C.LowRank)], ids=str
)
def test_compressed_gossip_sends_a_payload_to_each_neighbor(compressor):
    result = cost(dj.compressed_gossip(RING, compressor, consensus_rate=0.5))
    sends = ["ppermute"] if any(PAYLOADS[compressor]) else []
    assert [entry.kind for entry in result.collectives] == sends
    assert result.bytes_sent == 2 * sum(PAYLOADS[compressor])


@pytest.mark.parametrize("compressor", [C.random_block(64), C.sign()], ids=str)
def test_sends_once_per_period(compressor):
    for detach in (0.0, 0.3):
        once = cost(dj.error_feedback(compressor, detach=detach)).collectives
        tx = dj.error_feedback(compressor, detach=detach, period=3)
        for count in range(7):
            result = cost(tx, count)
            assert result.collectives == (once if count % 3 == 2 else ())
            assert result.is_exact
        assert not cost(tx).is_exact  # the step count is unknown


def train(layout, tx, steps, params, targets, curvatures, evaluate=True):
    """Trains on quadratics; returns params, state, and evaluated model per worker."""

    def run(params, state, target, curvature):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda h, y, c: h * (y - c), curvature, params, target)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params, state = lax.scan(step, (params, state), length=steps)[0]
        return params, state, dj.eval_params(state, params) if evaluate else None

    stacked = jax.tree.map(
        lambda x: np.broadcast_to(x, (N, *x.shape)), (params, tx.init(params))
    )
    return jax.device_get(layout(run)(*stacked, targets, curvatures))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_rows_bitwise_equal(tree):
    for leaf in jax.tree.leaves(tree):
        assert all(row.tobytes() == leaf[0].tobytes() for row in leaf)


@pytest.mark.parametrize("num_devices", [8, 2])
def test_the_shared_model_stays_bitwise_equal(num_devices):
    """1,000 steps of DEF-SGD on one half of the model and of EF-SGD on the other."""
    shapes = {"float32": (3, 11), "bfloat16": (40,)}

    def tree(fn):
        return {
            name: {k: fn(s).astype(k) for k, s in shapes.items()}
            for name in ("def", "ef")
        }

    params = tree(normal)
    targets = tree(lambda s: normal((N, *s), 1))
    curvatures = tree(lambda s: 0.5 + abs(normal((N, *s), 2)) / 4)
    block = C.random_block(8)
    one, two = (
        dj.def_sgd(optax.sgd(0.004, momentum=0.9), block),
        dj.ef_sgd(optax.sgd(0.004, momentum=0.9), block),
    )

    def init(params):
        return one.init(params["def"]), two.init(params["ef"])

    def update(grads, state, params):
        u, s = one.update(grads["def"], state[0], params["def"])
        v, t = two.update(grads["ef"], state[1], params["ef"])
        return {"def": u, "ef": v}, (s, t)

    tx = optax.GradientTransformation(init, update)
    workers = dj.Workers(N, devices=jax.devices()[:num_devices])
    # Skip `eval_params`: it would find two hidden models and raise an error.
    end, states, _ = train(
        workers.spmd, tx, 1000, params, targets, curvatures, evaluate=False
    )
    detached, plain = states[0][-1], states[1][-1]
    assert isinstance(detached, dj.DetachedState)
    assert isinstance(plain, dj.ResidualState)
    np.testing.assert_array_equal(detached.count, np.full(N, 1000))
    assert_rows_bitwise_equal(detached.shared)
    assert_rows_bitwise_equal(end["ef"])
    # Other states differ between workers, and training approaches the optimum.
    for leaf in (*end["def"].values(), *plain.residual.values()):
        assert not np.array_equal(leaf[0], leaf[1])
    for got in (detached.shared["float32"], end["ef"]["float32"]):
        h, c = curvatures["def"]["float32"], targets["def"]["float32"]
        optimum = (h * c).sum(0) / h.sum(0)
        assert np.abs(got[0] - optimum).max() < 0.2


def train_small(tx, steps=5):
    """Trains on heterogeneous quadratics of equal curvature, under `vmap`."""
    params, curvature = normal(12), 0.5 + abs(normal(12, 2))
    curvature = np.broadcast_to(curvature, (N, 12))
    return train(LAYOUTS["vmap"], tx, steps, params, normal((N, 12), 1), curvature)


def test_eval_params():
    block = C.random_block(4)
    params, state, evaluated = train_small(
        dj.def_sgd(optax.sgd(0.1, momentum=0.9), block, detach=0.25)
    )
    x = state[-1].shared
    assert_rows_bitwise_equal(x)
    np.testing.assert_allclose(evaluated, x, rtol=1e-6)
    assert np.abs(params - x).max() > 0.01
    again, _, averaged = train_small(
        dj.def_a_sgd(optax.sgd(0.1, momentum=0.9), block, detach=0.25)
    )
    np.testing.assert_array_equal(again, params)
    expected = np.mean(x + (params - x) / 0.25, axis=0)
    np.testing.assert_allclose(averaged, [expected] * N, rtol=1e-5, atol=1e-6)
    assert np.abs(averaged - evaluated).max() > 0.01
    # Without detaching, EF-SGD evaluates the parameters; DEF-A adds the mean residual.
    params, state, evaluated = train_small(
        dj.ef_sgd(optax.sgd(0.1, momentum=0.9), block)
    )
    np.testing.assert_allclose(evaluated, params, rtol=1e-6)
    params, state, averaged = train_small(
        dj.def_a_sgd(optax.sgd(0.1, momentum=0.9), block, detach=0.0)
    )
    expected = np.mean(params + state[-1].residual, axis=0)
    np.testing.assert_allclose(averaged, [expected] * N, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Share(C.Codec):
    """Scales every entry by `delta`."""

    delta: float
    linear = True

    def compress(self, key, x):
        del key
        return self.delta * x

    def decompress(self, key, payload, like):
        del key, like
        return payload


@pytest.mark.parametrize("detach", [0.3, 1.0])
def test_iterate_averaging_is_the_mean_of_error_feedback(detach):
    params, state, evaluated = train_small(
        dj.def_sgd(optax.sgd(0.02, momentum=0.9), Share(1 / 8), detach=detach), steps=40
    )
    mean, averages, average = train_small(
        dj.sgd_ia(optax.sgd(0.02, momentum=0.9), ratio=8, detach=detach), steps=40
    )
    np.testing.assert_allclose(params.mean(0), mean[0], atol=1e-5)
    np.testing.assert_allclose(state[-1].shared, average, atol=1e-5)
    np.testing.assert_allclose(evaluated, average, atol=1e-5)
    np.testing.assert_allclose(averages[-1].average, average, rtol=1e-6)
    assert np.abs(params - mean).max() > 0.01
    assert np.abs(mean - average).max() > 0.01


@pytest.mark.parametrize("layout", ["vmap", "eight devices"])
def test_average_every(layout):
    workers = dj.Workers(N)
    make = LAYOUTS["vmap"] if layout == "vmap" else workers.spmd

    def every_third(x, t):
        return dj.average_every(x, 3, t)

    fn, x = make(every_third), normal((N, 5))
    for step in range(7):
        sends = step % 3 == 2
        expected = np.tile(x.mean(0), (N, 1)) if sends else x
        got = fn(x, np.full(N, step, np.int32))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * sends)
        result = dj.communication_cost(
            every_third, x[0], np.int32(step), axis_sizes={"workers": N}
        )
        once = (Collective("all-reduce", "workers", 1, 2 * 20 * 7 / 8),)
        assert result.collectives == (once if sends else ())
        assert result.is_exact
    # One branch runs, not both.
    assert primitives(fn, x, np.zeros(N, np.int32))["cond"] == 1


def test_another_seed_selects_other_entries():
    def sent(seed):
        tx = dj.error_feedback(C.random_block(8), seed=seed)

        def worker(u):
            return tx.update(u, tx.init(u))[0]

        return jax.vmap(worker, axis_name="workers")(jnp.ones((2, 80)))

    np.testing.assert_array_equal(sent(3), sent(3))
    assert not np.array_equal(sent(3), sent(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codecs_restore_shape_and_dtype(codec, shape, dtype):
    """For leaves with and without entries."""
    x = jnp.ones(shape, dtype)
    if isinstance(codec, C.TopK) and codec.k is not None and 0 < x.size < codec.k:
        with pytest.raises(ValueError, match="at most the leaf's size"):
            codec.compress(KEY, x)
        return
    payload = codec.compress(KEY, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(payload))
    for like in (x, jax.ShapeDtypeStruct(shape, x.dtype)):
        back = codec.decompress(KEY, payload, like)
        assert (back.shape, back.dtype) == (shape, x.dtype)
    if isinstance(codec, C.Selection):
        assert codec.mask(KEY, x).shape == shape
        assert codec.replace(KEY, x, payload).shape == shape


@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
@pytest.mark.parametrize("compressor", PAYLOADS, ids=str)
def test_averages_are_equal_on_all_workers(compressor, layout):
    """The mean of the decompressed values is bitwise equal on all workers."""
    leaves = [normal((N, *shape), i) for i, shape in enumerate(SHAPES.values())]

    def worker(*leaves):
        axis, memory = WorkerAxis.bind("workers"), compressor.init(list(leaves))
        return compressor.average(KEY, list(leaves), memory, axis)[:2]

    own, mean = jax.device_get(LAYOUTS[layout](worker)(*leaves))
    assert_rows_bitwise_equal(mean)
    # `cast` averages in the dtype of its payload.
    atol = 1e-2 if isinstance(compressor, C.Cast) else 1e-5
    for one, replicated in zip(own, mean, strict=True):
        np.testing.assert_allclose(one.mean(0), replicated[0], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.999])
def test_a_ratio_meant_to_be_whole_keeps_a_whole_share(sparsity):
    """1 / (1 - 0.99) is slightly below 100, which must not round up to 11 of 1,000."""
    values, _ = C.top_k(ratio=1 / (1 - sparsity)).compress(None, jnp.ones(1000))
    assert values.size == round(1000 * (1 - sparsity))
