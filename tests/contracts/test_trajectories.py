"""Whole trajectories equal plain NumPy references in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from decentral_jax._exchange.axis import WorkerAxis
from tests.support.layouts import LAYOUTS, named
from tests.support.registry import ALGORITHMS

WORKERS, STEPS, SHAPES = 8, 26, {"bias": (4,), "kernel": (2, 3)}
SIZE = 10


@functools.cache
def problem():
    """Quadratics that differ between workers, with fresh noise each iteration."""
    rng = np.random.default_rng(0)
    curvature = rng.uniform(0.5, 1.5, (WORKERS, SIZE))
    optimum = rng.normal(size=(WORKERS, SIZE))
    noise = rng.normal(size=(WORKERS, STEPS, SIZE))
    return curvature, optimum, noise


def numpy_gradient(t, i, x):
    curvature, optimum, noise = problem()
    return curvature[i] * (x - optimum[i]) + noise[i, t]


def learning_rate(t):
    return 0.1 / (1 + 0.05 * t)


def schedule(count):
    return learning_rate(count.astype(jnp.result_type(float)))


def flatten(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def unflatten(x):
    return {"bias": x[:4], "kernel": x[4:].reshape(2, 3)}


def trajectory(tx, axis_name="workers"):
    """One worker's run as one scan: returns the parameters before every iteration."""

    def run(data):
        curvature, optimum, noise = data
        params = unflatten(jnp.zeros_like(optimum))

        def iteration(carry, noise_now):
            params, state = carry
            gradient = curvature * (flatten(params) - optimum) + noise_now
            updates, state = tx.update(unflatten(gradient), state, params)
            new = optax.apply_updates(params, updates)
            return (new, state), flatten(new)

        # A scan's carry needs one type throughout: varying over workers.
        start = jax.tree.map(
            lambda x: WorkerAxis.bind(axis_name).varying(x), (params, tx.init(params))
        )
        _, rest = lax.scan(iteration, start, noise)
        return jnp.concatenate([flatten(params)[None], rest])

    return run


@functools.cache
def expected(name):
    reference = ALGORITHMS[name].reference
    path = reference(numpy_gradient, np.zeros(SIZE), learning_rate, STEPS)
    return np.swapaxes(path, 0, 1)


# test_common.py covers one device: it compares one device with eight.
COMPARED_LAYOUTS = [layout for layout in LAYOUTS if layout != "one_device"]
CASES = [
    (name, layout)
    for name, algorithm in ALGORITHMS.items()
    for layout in (("folded_2",) if algorithm.variant else COMPARED_LAYOUTS)
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_reference_in_float64(name, layout, x64):
    algorithm = ALGORITHMS[name]
    run = trajectory(algorithm.make(schedule), tuple(named(algorithm.shape)))
    data = jax.tree.map(jnp.asarray, problem())
    path = LAYOUTS[layout](run, algorithm.shape)(data)
    assert path.dtype == np.float64
    np.testing.assert_allclose(path, expected(name), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_reference_in_float32(name):
    algorithm = ALGORITHMS[name]
    run = trajectory(algorithm.make(schedule), tuple(named(algorithm.shape)))
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem())
    path = LAYOUTS["shard_map"](run, algorithm.shape)(data)
    assert path.dtype == np.float32
    np.testing.assert_allclose(path, expected(name), rtol=0, atol=1e-5)


def test_references_move():
    """The references move away from zero, so the comparisons are meaningful."""
    for name in ALGORITHMS:
        last = expected(name)[:, -1]
        assert np.abs(last).max() > 0.1
        assert np.isfinite(last).all()
