"""What every algorithm must do, driven by the one registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

import decentral_jax as dj
from tests.layouts import named, nested_vmap
from tests.registry import ALGORITHMS

WORKERS = 8
# Each worker's optimum; their mean is the optimum of the mean loss.
TARGETS = np.random.default_rng(1).normal(size=(WORKERS, 5))


COMMON = {name: a for name, a in ALGORITHMS.items() if not a.variant}


@pytest.fixture(params=COMMON)
def algorithm(request):
    return COMMON[request.param]


def targets_of(algorithm, dtype=jnp.float32):
    sizes = tuple(named(algorithm.shape).values())
    return jnp.asarray(TARGETS.reshape(*sizes, 5), dtype)


def start(tx, workers, dtype=jnp.float32):
    params = {"a": jnp.zeros(2, dtype), "b": jnp.zeros(3, dtype)}
    return workers.replicate((params, tx.init(params)))


def train_step(tx, carry, target):
    """One worker's step on 0.5 ||x - target||^2."""
    params, state = carry
    grads = {"a": params["a"] - target[:2], "b": params["b"] - target[2:]}
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def stacked(params):
    leaves = [np.asarray(x, np.float64) for x in params.values()]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in leaves], 1)


@pytest.mark.parametrize("name", [n for n, a in COMMON.items() if a.finds_optimum])
def test_converges_on_a_quadratic(name):
    """The workers' mean reaches the optimum of the mean loss; they stay together.

    On average over the last steps: at a constant rate some compressors keep moving, but
    no gradient is lost on the way.
    """
    algorithm = COMMON[name]
    tx = algorithm.make(0.03)
    targets = targets_of(algorithm)

    def run(carry, target):
        def body(carry, _):
            carry = train_step(tx, carry, target)
            return carry, carry[0]

        carry, path = lax.scan(body, carry, length=4000)
        return carry[0], jax.tree.map(lambda x: x[2000:].mean(0), path)

    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:1])
    params, average = workers.spmd(run)(start(tx, workers), targets)
    optimum = TARGETS.mean(0)
    np.testing.assert_allclose(stacked(average).mean(0), optimum, atol=1e-3)
    spread = np.abs(stacked(params) - optimum).max()
    assert spread < np.abs(TARGETS - optimum).max() / 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_shapes_and_weak_types_are_kept(algorithm, dtype):
    """State and parameters leave a step as they entered: no second compilation."""
    tx = algorithm.make(0.1)
    params = {"a": jnp.zeros(2, dtype), "b": jnp.zeros(3, dtype)}
    carry = (params, tx.init(params))
    step = functools.partial(train_step, tx)
    mapped = nested_vmap(step, algorithm.shape, in_axes=(None, 0))
    targets = targets_of(algorithm, dtype)
    after = jax.eval_shape(mapped, carry, targets)

    def same(before, after):
        assert (*targets.shape[:-1], *jnp.shape(before)) == after.shape
        assert jnp.asarray(before).dtype == after.dtype
        assert not after.weak_type

    jax.tree.map(same, carry, after)
    for leaf in jax.tree.leaves(carry):
        # Counters; and the weight of push-sum, which needs more digits.
        assert leaf.dtype in ((dtype,) if leaf.ndim else (jnp.int32, jnp.float32))


def test_one_compilation_and_donation(algorithm):
    workers = dj.Workers(algorithm.shape)
    tx = algorithm.make(0.1)
    step = workers.spmd(functools.partial(train_step, tx), donate_argnums=0)
    targets = workers.shard(targets_of(algorithm))
    carry = start(tx, workers)
    for _ in range(3):
        before = carry
        carry = step(carry, targets)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert step._cache_size() == 1


def test_inject_hyperparams(algorithm):
    """A rate injected as a traced value gives what a constant rate gives."""
    inject = optax.inject_hyperparams(algorithm.build, static_args=algorithm.static)
    injected = inject(learning_rate=0.05, **algorithm.arguments)
    plain = algorithm.make(0.05)
    targets = targets_of(algorithm)
    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:1])
    ends = []
    for tx in (injected, plain):
        step = workers.spmd(functools.partial(train_step, tx))
        carry = start(tx, workers)
        for _ in range(9):
            carry = step(carry, targets)
        ends.append(stacked(carry[0]))
    assert np.abs(ends[1]).max() > 0
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def test_multi_steps(algorithm, standard_promotion):
    """Two half-gradients through MultiSteps are one step, also across devices."""
    targets = targets_of(algorithm)
    many = optax.MultiSteps(algorithm.make(0.1), every_k_schedule=2)
    workers = dj.Workers(algorithm.shape)
    carry = start(many, workers)
    step = workers.spmd(functools.partial(train_step, many))
    for _ in range(16):
        # Waiting keeps JAX 0.10's fake devices from running into each other.
        carry = jax.block_until_ready(step(carry, targets))
    once = algorithm.make(0.1)
    expected = start(once, workers)
    step = workers.spmd(functools.partial(train_step, once))
    for _ in range(8):
        expected = jax.block_until_ready(step(expected, targets))
    np.testing.assert_allclose(stacked(carry[0]), stacked(expected[0]), atol=1e-5)


def test_extra_arguments_are_accepted_and_passed_on(algorithm):
    """An argument for one transformation of a chain does not trouble the others."""
    tx = optax.chain(algorithm.make(0.1), _needs_value())
    targets = targets_of(algorithm)

    def step(target):
        params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        grads = {"a": target[:2], "b": target[2:]}
        return tx.update(grads, tx.init(params), params, value=jnp.float32(3.0))[1][-1]

    seen = nested_vmap(step, algorithm.shape)(targets)
    np.testing.assert_array_equal(seen.ravel(), np.full(WORKERS, 3.0))


def _needs_value():
    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return updates, value

    return optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)


def test_worker_axes_may_have_other_names(algorithm):
    """A name that is dropped on the way would not be bound."""
    sizes = named(algorithm.shape).values()
    words = ("axis_name",) if len(sizes) == 1 else ("hub_axis", "worker_axis")
    axes = {word: word.upper() for word in words}
    tx = algorithm.make(0.1, **axes)
    x = {
        "a": jax.ShapeDtypeStruct((*sizes, 2), jnp.float32),
        "b": jax.ShapeDtypeStruct((*sizes, 3), jnp.float32),
    }

    def step(x):
        return tx.update(x, tx.init(x), x)[0]

    shape = dict(zip(axes.values(), sizes, strict=True))
    assert jax.eval_shape(nested_vmap(step, shape), x) == x


def test_apply_if_finite_and_masked_compose(algorithm):
    """Under finite gradients `apply_if_finite` changes nothing; masks leave out."""
    targets = targets_of(algorithm)
    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:1])
    plain = algorithm.make(0.1)
    guarded = optax.apply_if_finite(algorithm.make(0.1), 3)
    masked = optax.masked(algorithm.make(0.1), {"a": True, "b": False})
    ends = {}
    for name, tx in (("plain", plain), ("guarded", guarded), ("masked", masked)):
        step = workers.spmd(functools.partial(train_step, tx))
        carry = start(tx, workers)
        for _ in range(9):
            carry = step(carry, targets)
        ends[name] = carry[0]
    np.testing.assert_allclose(
        stacked(ends["guarded"]), stacked(ends["plain"]), atol=1e-6
    )
    np.testing.assert_allclose(ends["masked"]["a"], ends["plain"]["a"], atol=1e-6)


def test_checkpoint_round_trip(algorithm, tmp_path):
    """Saved half-way with Orbax and restored, a run ends where it would have."""
    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:1])
    tx = algorithm.make(0.1)
    step = workers.spmd(functools.partial(train_step, tx))
    targets = targets_of(algorithm)
    carry = start(tx, workers)
    for _ in range(5):
        carry = step(carry, targets)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", carry)
    for _ in range(5):
        carry, restored = step(carry, targets), step(restored, targets)
    jax.tree.map(np.testing.assert_array_equal, carry, restored)
