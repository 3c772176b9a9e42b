"""Arguments of a step that all workers share, and arguments that are not arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decentral_jax as dj
from tests.support.layouts import compilations

N = 8
X = np.arange(N, dtype=np.float32)
ONE_PEER = dj.topology.one_peer_exponential(N)


def workers_on(num_devices, shape=N):
    return dj.Workers(shape, devices=jax.devices()[:num_devices])


def affine(x, weights, kind="sum", *, offset=0.0):
    y = x * weights["scale"] + offset
    return dj.average(y) if kind == "mean" else y


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_shared_and_static_arguments(num_devices):
    workers = workers_on(num_devices)
    step = workers.spmd(
        affine, shared_argnames=("weights", "offset"), static_argnames="kind"
    )
    weights = {"scale": jnp.float32(2.0)}
    by_position = step(X, weights, "mean")
    np.testing.assert_array_equal(by_position, np.full(N, 7.0))
    assert by_position.sharding.device_set == workers.sharding.device_set
    by_name = step(x=workers.shard(X), kind="sum", weights=weights, offset=1.0)
    np.testing.assert_array_equal(by_name, 2 * X + 1)
    # A default need not be passed.
    np.testing.assert_array_equal(step(X, weights), 2 * X)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_shared_arrays_are_held_once_per_device(num_devices):
    workers = workers_on(num_devices)
    step = workers.spmd(affine, shared_argnames="weights")
    weights = jax.device_put({"scale": jnp.float32(3.0)}, workers.replicated)
    np.testing.assert_array_equal(step(X, weights), 3 * X)

    def shape_inside(x, table):
        assert table.shape == (4, 5)
        return x + table.sum()

    table = jnp.ones((4, 5))
    step = workers.spmd(shape_inside, shared_argnames="table")
    np.testing.assert_array_equal(step(X, table), X + 20)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_nested_axes(num_devices):
    workers = workers_on(num_devices, {"hub": 4, "worker": 2})
    step = workers.spmd(lambda x, y: x + y, shared_argnames="y")
    x = X.reshape(4, 2)
    np.testing.assert_array_equal(step(x, jnp.float32(1.0)), x + 1)


def test_one_program_per_static_value():
    step = workers_on(2).spmd(affine, shared_argnames="weights", static_argnames="kind")
    with compilations() as seen:
        for kind in ("sum", "mean", "sum", "mean"):
            step(X, {"scale": jnp.float32(len(kind))}, kind=kind)
    assert step._cache_size() == 2
    del seen


def test_donation_beside_shared_arguments():
    workers = workers_on(8)
    step = workers.spmd(
        lambda x, weights: x * weights, donate_argnums=0, shared_argnames="weights"
    )
    x, weights = workers.replicate(jnp.ones(3)), jnp.float32(2.0)
    y = step(x, weights)
    assert x.is_deleted()
    assert not weights.is_deleted()
    np.testing.assert_array_equal(y, np.full((N, 3), 2.0))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_shared_step_number_chooses_one_branch(num_devices):
    """A round number that all workers share is no worker's own data."""
    workers = workers_on(num_devices)

    def step(x, count):
        return jax.lax.cond(
            count % 2 == 0, lambda x: dj.mix(x, ONE_PEER, step=count), lambda x: x, x
        )

    run = workers.spmd(step, shared_argnames="count")
    np.testing.assert_array_equal(run(X, jnp.int32(1)), X)
    mixed = np.asarray(run(X, jnp.int32(2)))
    np.testing.assert_allclose(mixed, ONE_PEER[2].matrix @ X)

    # A float is equal on all workers if it is shared, and else is not.
    def by_float(x, rate):
        return jax.lax.cond(rate > 0, dj.average, lambda x: x, x)

    shared = workers.spmd(by_float, shared_argnames="rate")
    np.testing.assert_array_equal(shared(X, jnp.float32(1.0)), np.full(N, X.mean()))
    with pytest.raises(ValueError, match="own data"):
        workers.spmd(by_float)(X, X)


def test_the_cost_is_counted():
    step = workers_on(2).spmd(affine, shared_argnames="weights", static_argnames="kind")
    weights = {"scale": jnp.float32(2.0)}
    assert dj.communication_cost(step, X, weights, kind="sum").count == 0
    assert dj.communication_cost(step, X, weights, "mean").count == 1
    # Keyword arguments of a function of one worker, too.
    cost = dj.communication_cost(
        affine, 1.0, weights={"scale": 1.0}, offset=2.0, axis_sizes={"workers": N}
    )
    assert cost.count == 0


BAD_NAMES = {
    "no parameter": ({"shared_argnames": "weight"}, ValueError, "'weight'.*'weights'"),
    "twice": (
        {"shared_argnames": "kind", "static_argnames": ["kind"]},
        ValueError,
        "both name",
    ),
    "numbers": ({"static_argnames": [1]}, TypeError, "static_argnames.*1.*strings"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_names_are_checked(case):
    options, kind, message = BAD_NAMES[case]
    with pytest.raises(kind, match=message):
        workers_on(1).spmd(affine, **options)


def test_a_function_without_names_is_refused():
    with pytest.raises(ValueError, match=r"wrap it in a def"):
        workers_on(1).spmd(max, shared_argnames="x")


def test_wrong_values_are_named():
    step = workers_on(2).spmd(affine, shared_argnames="weights")
    with pytest.raises(TypeError, match="shared arguments"):
        step(X, {"scale": "two"})
    with pytest.raises(ValueError, match="leading axes"):
        step(X[:3], {"scale": jnp.float32(1.0)})
