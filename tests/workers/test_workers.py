"""Workers: placement, round trips of data, compilation, and donation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import decentral_jax as dj
from tests.support import kinds_of_leaves
from tests.support.layouts import compilations


def workers_on(num_devices, shape=8):
    return dj.Workers(shape, devices=jax.devices()[:num_devices])


def key_data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def one_workers_tree():
    return {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": jnp.ones(2, jnp.bfloat16),
        "count": jnp.array(7, jnp.int32),
        "flag": np.array([True, False]),
        "key": jax.random.key(3),
        "number": 2.5,
        "nothing": None,
    }


@pytest.mark.parametrize(
    ("n", "num_devices", "used"),
    [(8, 8, 8), (8, 4, 4), (8, 1, 1), (3, 8, 3), (6, 3, 3), (1, 8, 1), (24, 8, 8)],
)
def test_layouts(n, num_devices, used):
    workers = workers_on(num_devices, n)
    assert (workers.num_workers, workers.num_devices) == (n, used)
    assert (workers.shape, workers.axis_name) == ((n,), "workers")
    assert repr(workers) == f"Workers({n} on {used} devices)"
    stacked = workers.shard(np.arange(2 * n).reshape(n, 2))
    parts = stacked.addressable_shards
    assert len({part.device for part in parts}) == used
    assert {part.data.shape for part in parts} == {(n // used, 2)}
    for device, part in zip(jax.devices(), parts, strict=False):
        assert part.device == device


def test_explicit_devices():
    devices = jax.devices()[5:7]
    stacked = dj.Workers(4, devices=devices).replicate(1.0)
    assert stacked.sharding.device_set == set(devices)
    assert dj.Workers(4, axis_name="replicas").axis_name == "replicas"


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_replicate_copies_to_all_workers(num_devices):
    workers = workers_on(num_devices)
    tree = one_workers_tree()
    stacked = workers.replicate(tree)
    assert jax.tree.structure(stacked) == jax.tree.structure(tree)
    assert stacked["key"].dtype == tree["key"].dtype
    assert (stacked["count"].dtype, stacked["half"].dtype) == (jnp.int32, jnp.bfloat16)
    for value, leaf in zip(
        jax.tree.leaves(workers.gather(stacked)), jax.tree.leaves(tree), strict=True
    ):
        assert isinstance(value, np.ndarray)
        leaf = np.asarray(key_data(jnp.asarray(leaf)))
        np.testing.assert_array_equal(value, np.stack([leaf] * 8))
    for leaf in jax.tree.leaves(stacked):
        assert leaf.sharding.is_equivalent_to(workers.sharding, leaf.ndim)


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_replicate_from_other_devices(num_devices):
    """Checkpoints and results of other `Workers` may be on other devices."""
    on_another_device = jax.device_put(np.float32(3), jax.devices()[6])
    others = workers_on(4).replicate(np.float32(3))
    workers = workers_on(num_devices)
    np.testing.assert_array_equal(workers.replicate(on_another_device), np.full(8, 3))
    np.testing.assert_array_equal(workers.replicate(others), np.full((8, 8), 3))
    np.testing.assert_array_equal(workers.shard(others), np.full(8, 3))


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_shard_and_gather_are_inverse(num_devices):
    workers = workers_on(num_devices)
    rng = np.random.default_rng(0)
    tree = {
        "float": rng.normal(size=(8, 2)).astype(np.float32),
        "int": rng.integers(0, 9, 8, dtype=np.int32),
        "bool": rng.random((8, 1)) < 0.5,
        "empty": np.zeros((8, 0), np.float32),
        "none": None,
        "key": jax.random.split(jax.random.key(0), 8),
    }
    stacked = workers.shard(tree)
    assert stacked["key"].dtype == tree["key"].dtype
    back = workers.gather(stacked)
    tree["key"] = np.asarray(jax.random.key_data(tree["key"]))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for value, leaf in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert isinstance(value, np.ndarray)
        assert value.dtype == leaf.dtype
        np.testing.assert_array_equal(value, leaf)
    again = workers.shard(stacked)
    assert again["int"].sharding == stacked["int"].sharding


def test_keys_give_the_same_draws_everywhere():
    def draw(key, count):
        key = jax.random.fold_in(key, count)
        return {"draw": jax.random.normal(key, (2,)), "key": jax.random.split(key)[0]}

    keys = jax.random.split(jax.random.key(0), 8)
    results = []
    for num_devices in (8, 4, 1):
        workers = workers_on(num_devices)
        out = workers.spmd(draw)(workers.shard(keys), workers.replicate(np.int32(4)))
        assert out["key"].shape == (8,)
        results.append(workers.gather(out))
    assert len(np.unique(results[0]["draw"])) == 16
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_spmd_outputs_live_with_their_workers(num_devices):
    """Also constants, which shard_map types as equal on all devices."""
    workers = workers_on(num_devices)

    def step(x, tree):
        return {
            "x": x + 1,
            "mean": dj.average(x),
            "constant": jnp.zeros(3),
            "number": 1.5,
            "none": None,
            "tree": tree,
        }

    x = workers.shard(np.arange(8.0, dtype=np.float32))
    out = workers.spmd(step)(x, workers.shard({"a": [np.arange(8)]}))
    for leaf in jax.tree.leaves(out):
        assert leaf.sharding.is_equivalent_to(workers.sharding, leaf.ndim)
        shards = leaf.addressable_shards
        assert [part.device for part in shards] == jax.devices()[:num_devices]
        assert {part.data.shape[0] for part in shards} == {8 // num_devices}
    out = workers.gather(out)
    np.testing.assert_array_equal(out["mean"], np.full(8, 3.5))
    np.testing.assert_array_equal(out["constant"], np.zeros((8, 3)))
    np.testing.assert_array_equal(out["number"], np.full(8, 1.5))
    np.testing.assert_array_equal(out["tree"]["a"][0], np.arange(8))
    assert out["none"] is None


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_donation_reuses_the_memory(num_devices):
    workers = workers_on(num_devices)

    def step(state, x):
        return {"params": state["params"] + x, "count": state["count"] + 1}

    step = workers.spmd(step, donate_argnums=0)
    x = workers.replicate(np.ones(100, np.float32))
    state = workers.replicate({"params": np.zeros(100, np.float32), "count": 0})
    pointers = {part.data.unsafe_buffer_pointer() for part in shards(state)}
    new = step(state, x)
    assert state["params"].is_deleted()
    assert state["count"].is_deleted()
    assert not x.is_deleted()
    assert {part.data.unsafe_buffer_pointer() for part in shards(new)} == pointers
    np.testing.assert_array_equal(new["params"], np.ones((8, 100)))


def shards(state):
    return state["params"].addressable_shards


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_no_recompilation(num_devices):
    """Neither new values nor results as arguments cause recompilation."""
    workers = workers_on(num_devices)
    traced = []

    def step(x, batch):
        traced.append(None)
        return dj.mix(x, dj.topology.ring(8)) + batch

    step = workers.spmd(step)
    x = workers.replicate(np.ones(2, np.float32))
    batch = np.ones((8, 2), np.float32)
    x = step(x, workers.shard(batch))
    with compilations() as compiled:
        for _ in range(3):
            x = step(x, workers.shard(batch))
    # One trace for the lock-step check, one for compilation.
    assert len(traced) == 2
    assert not compiled
    with compilations() as compiled:
        step(workers.shard(np.ones((8, 3), np.float32)), np.ones((8, 3), np.float32))
    assert len(traced) == 4
    assert len(compiled) == 1


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_an_epoch_in_one_scan(num_devices):
    workers = workers_on(num_devices)
    step = workers.spmd(lambda x: dj.mix(x, dj.topology.ring(8)))

    @jax.jit
    def epoch(x):
        return lax.scan(lambda x, _: (step(x), None), x, length=3)[0]

    x = np.eye(8, dtype=np.float32)
    want = np.linalg.matrix_power(dj.topology.ring(8).matrix, 3)
    np.testing.assert_allclose(epoch(workers.shard(x)), want, atol=1e-6)


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_a_function_of_no_arguments(num_devices):
    workers = workers_on(num_devices, {"hub": 4, "worker": 2})
    numbers = workers.spmd(lambda: dj.worker_index(("hub", "worker")))
    np.testing.assert_array_equal(numbers(), np.arange(8).reshape(4, 2))


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_a_users_own_collective_is_never_partial(num_devices):
    """A folded axis name is unbound: an error is better than a partial mean."""
    workers = workers_on(num_devices)
    mean = workers.spmd(lambda x: lax.pmean(x, "workers"))
    x = workers.shard(np.arange(8, dtype=np.float32))
    if num_devices == 4:
        with pytest.raises(NameError, match="unbound axis name: workers"):
            mean(x)
    else:
        np.testing.assert_array_equal(mean(x), np.full(8, 3.5))


def test_spmd_keeps_the_functions_name():
    def train_step(state):
        """One step."""
        return state

    step = workers_on(1).spmd(train_step)
    assert (step.__name__, step.__doc__) == ("train_step", "One step.")


NAMED = [
    # sizes, devices, how each axis is laid out on the mesh
    ({"hub": 4, "worker": 2}, 8, ("hub", "worker")),
    ({"hub": 4, "worker": 2}, 4, ("hub", None)),
    ({"hub": 4, "worker": 2}, 2, ("hub.devices", None)),
    ({"hub": 4, "worker": 2}, 1, None),
    ({"hub": 2, "worker": 4}, 4, ("hub", "worker.devices")),
    ({"hub": 1, "worker": 8}, 4, ("hub", "worker.devices")),
    ({"hub": 4, "worker": 1}, 8, ("hub", "worker")),
    ({"a": 2, "b": 2, "c": 4}, 8, ("a", "b", "c.devices")),
    ({"a": 2, "b": 1, "c": 2}, 2, ("a", "b", None)),
]


@pytest.mark.parametrize(("sizes", "num_devices", "spec"), NAMED)
def test_named_axes(sizes, num_devices, spec):
    """Worker indices over all axes are in row-major order in every layout."""
    workers = workers_on(num_devices, sizes)
    names, shape = tuple(sizes), tuple(sizes.values())
    assert (workers.axis_name, workers.shape) == (names, shape)
    if spec is not None:
        assert workers.sharding.spec == PartitionSpec(*spec)

    @workers.spmd
    def numbers(x):
        numbers = {name: dj.worker_index(name) for name in names}
        return numbers | {"all": dj.worker_index(names), "same": x}

    x = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    got = workers.gather(numbers(workers.shard(x)))
    np.testing.assert_array_equal(got["same"], x)
    all_indices = np.arange(workers.num_workers).reshape(shape)
    np.testing.assert_array_equal(got["all"], all_indices)
    for axis, name in enumerate(names):
        np.testing.assert_array_equal(got[name], np.indices(shape)[axis])


def test_a_mesh_axis_inside_a_vmap_axis():
    """Means and single axes work; joint mixing needs consecutive worker indices."""
    workers = workers_on(4, {"hub": 6, "worker": 2})
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)

    @workers.spmd
    def step(x):
        hubs = dj.mix(x, dj.topology.path(6), axis_name="hub")
        return dj.average(x, axis_name=("hub", "worker")), hubs

    mean, hubs = workers.gather(step(workers.shard(x)))
    np.testing.assert_allclose(mean, np.full((6, 2), x.mean()), atol=1e-6)
    np.testing.assert_allclose(hubs, dj.topology.path(6).matrix @ x, atol=1e-6)


@pytest.mark.parametrize("num_devices", [8, 2, 1])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("sizes", [{"data": 4, "model": 2}, {"workers": 8}])
def test_under_the_callers_own_mesh(sizes, kind, num_devices):
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )
    workers = workers_on(num_devices)
    with jax.set_mesh(mesh):
        x = workers.replicate(jnp.ones(3))
        mixed = workers.spmd(lambda x: dj.mix(x, dj.topology.ring(8)))(x)
        mean = workers.spmd(dj.average)(workers.shard(np.arange(8.0, dtype=np.float32)))
    np.testing.assert_allclose(workers.gather(mixed), np.ones((8, 3)), rtol=1e-6)
    np.testing.assert_array_equal(workers.gather(mean), np.full(8, 3.5))


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_usual_calls_compile_once(num_devices):
    """As in the docs, each call passes new functions with the same names."""
    workers, tx = workers_on(num_devices), dj.d_psgd(0.1, dj.topology.ring(8))
    params = {"a": np.ones(3, np.float32), "b": jnp.zeros((2, 2))}

    def calls():
        p, s = workers.replicate((params, tx.init(params)))
        return workers.spmd(dj.eval_params)(s, p), workers.spmd(tx.init)(p)

    jax.block_until_ready(calls())
    with compilations() as compiled:
        jax.block_until_ready(calls())
    assert not compiled


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_keywords_are_arguments_like_others(num_devices):
    workers = workers_on(num_devices)
    step = workers.spmd(lambda x, *, scale: dj.average(x) * scale["by"])
    found = step(jnp.arange(8.0), scale={"by": jnp.arange(8.0)})
    np.testing.assert_array_equal(found, 3.5 * np.arange(8))
    with pytest.raises(ValueError, match=r"leading axes \(8,\).*scale"):
        step(jnp.arange(8.0), scale={"by": jnp.arange(3.0)})


def test_a_callable_object_may_be_unhashable():
    class Step:
        __hash__ = None

        def __call__(self, x):
            return dj.average(x)

    found = workers_on(8).spmd(Step())(jnp.arange(8.0))
    np.testing.assert_array_equal(found, np.full(8, 3.5))


@pytest.mark.parametrize("num_devices", [4, 2, 1])
def test_kinds_of_leaves(tmp_path, num_devices):
    workers = dj.Workers(kinds_of_leaves.N, devices=jax.devices()[:num_devices])
    kinds_of_leaves.check(workers)
    kinds_of_leaves.check_checkpoints(workers, tmp_path)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_replicated_python_numbers_have_a_type_of_their_own(num_devices):
    """A weak type would differ from the step's results: a second compilation."""
    workers = workers_on(num_devices)
    state = workers.replicate({"rate": 0.5, "count": 3})
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    step = workers.spmd(lambda s: jax.tree.map(lambda x: x * x, s))
    for _ in range(3):
        state = step(state)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "variable", ["DECENTRAL_JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"]
)
def test_one_process_of_several_does_not_train_alone(monkeypatch, variable):
    """Without `dj.initialize`, each process of a launcher would train on its own."""
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RuntimeError, match=r"one of 2.*dj\.initialize\(\)"):
        dj.Workers(8)
    assert dj.Workers(8, devices=jax.local_devices()).num_workers == 8
    monkeypatch.setenv(variable, "1")
    assert dj.Workers(8).num_workers == 8
