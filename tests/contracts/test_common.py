"""Requirements on every algorithm, driven by the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange import numbers
from tests.support.injection import inject
from tests.support.layouts import named, nested_vmap, primitives
from tests.support.registry import ALGORITHMS

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
    """The workers' mean reaches the optimum of the mean loss, and workers stay close.

    At a constant rate, some compressed algorithms keep moving around the optimum. The
    average over the last steps still reaches it, because no gradient is lost.
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
    """A step preserves the types of state and parameters, so it compiles once."""
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
    for leaf in jax.tree.leaves(carry[0]):
        assert leaf.dtype == dtype

    def is_optax(node):
        return type(node).__module__.startswith("optax")

    # Counters are int32. States that are integrated over steps are float32.
    for node in jax.tree.leaves(carry[1], is_leaf=is_optax):
        assert is_optax(node) or node.dtype in (jnp.int32, jnp.float32)


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


def path(tx, algorithm, workers, steps=9):
    """Parameters after each step, shape `[steps, workers, 5]`."""
    targets = targets_of(algorithm)
    step = workers.spmd(functools.partial(train_step, tx))
    carry, found = start(tx, workers), []
    for _ in range(steps):
        # Wait: JAX 0.10's fake devices can block each other with many steps in flight.
        carry = jax.block_until_ready(step(carry, targets))
        found.append(stacked(carry[0]))
    return np.stack(found)


def on_one_device(algorithm):
    return dj.Workers(algorithm.shape, devices=jax.devices()[:1])


@functools.cache
def plain(name):
    """The path at learning rate 0.1 on one device."""
    algorithm = COMMON[name]
    found = path(algorithm.make(0.1), algorithm, on_one_device(algorithm))
    assert np.abs(found).max() > 0
    return found


def injected(algorithm, rate):
    """Injects all numbers of the algorithm and of its optimizer as arrays."""
    optimizer = algorithm.optimizer(rate, optax.inject_hyperparams)
    return inject(algorithm.build, optimizer, **algorithm.arguments)


@pytest.mark.parametrize("name", COMMON)
def test_inject_hyperparams(name):
    """Injected hyperparameters give the same path as constants."""
    algorithm = COMMON[name]
    found = path(injected(algorithm, 0.1), algorithm, on_one_device(algorithm))
    np.testing.assert_allclose(found, plain(name), atol=1e-6)


def falling(count):
    return 0.1 / (1 + 0.3 * jnp.asarray(count, jnp.float32))


@pytest.mark.parametrize("name", COMMON)
def test_injected_schedule_equals_direct_schedule(name):
    """Both count calls of `update`, even where the optimizer runs less often."""
    algorithm = COMMON[name]
    workers = on_one_device(algorithm)
    txs = injected(algorithm, falling), algorithm.make(falling)
    found, expected = (path(tx, algorithm, workers, 13) for tx in txs)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_injected_outer_schedule_equals_direct_schedule(inside):
    """SlowMo's schedule counts iterations; an outer optimizer's counts exchanges."""
    algorithm = COMMON["local_sgd"]
    workers = on_one_device(algorithm)
    if inside:
        makes = optax.inject_hyperparams(optax.sgd), optax.sgd
        txs = [
            dj.diloco(0.1, period=4, outer=make(falling, momentum=0.9))
            for make in makes
        ]
    else:
        options = {"period": 3, "slow_rate": falling}
        txs = [inject(dj.slowmo, 0.1, **options), dj.slowmo(0.1, **options)]
    found, expected = (path(tx, algorithm, workers, 13) for tx in txs)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", COMMON)
def test_multi_steps(name, standard_promotion):
    """Two micro-steps of MultiSteps equal one step, also across devices."""
    algorithm = COMMON[name]
    many = optax.MultiSteps(algorithm.make(0.1), every_k_schedule=2)
    found = path(many, algorithm, dj.Workers(algorithm.shape), 18)
    np.testing.assert_allclose(found[1::2], plain(name), atol=1e-5)


def test_extra_arguments_are_accepted_and_passed_on(algorithm):
    """Algorithms accept extra arguments of other transformations in a chain."""
    passed_on = []

    def needs_value(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        passed_on.append(value)
        return updates, state

    last = optax.GradientTransformationExtraArgs(lambda _: (), needs_value)
    tx = optax.chain(algorithm.make(0.1), last)

    def step(target):
        params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        grads = {"a": target[:2], "b": target[2:]}
        return tx.update(grads, tx.init(params), params, value="this")[0]

    jax.eval_shape(nested_vmap(step, algorithm.shape), targets_of(algorithm))
    assert passed_on == ["this"]


def test_worker_axes_may_have_other_names(algorithm):
    """An axis name that is not passed on would be unbound and raise an error."""
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


@pytest.mark.parametrize("name", COMMON)
def test_masked_leaves_do_not_affect_the_others(name):
    algorithm = COMMON[name]
    workers = on_one_device(algorithm)
    masked = optax.masked(algorithm.make(0.1), {"a": True, "b": False})
    found = path(masked, algorithm, workers)
    np.testing.assert_allclose(found[..., :2], plain(name)[..., :2], atol=1e-6)


@pytest.mark.parametrize("name", COMMON)
def test_around_an_exchange_apply_if_finite_is_refused(name):
    """A worker with a non-finite gradient would skip the exchange."""
    algorithm = COMMON[name]
    tx = optax.apply_if_finite(algorithm.make(0.1), 3)
    workers = dj.Workers(algorithm.shape)
    step = workers.spmd(functools.partial(train_step, tx))
    with pytest.raises(ValueError, match="must be equal on all workers"):
        step.lower(start(tx, workers), targets_of(algorithm))


@pytest.mark.parametrize("name", COMMON)
def test_counters_wrap_around(name, monkeypatch):
    """Periodic actions keep their rhythm after the counter wraps around."""
    algorithm = COMMON[name]
    workers, targets = on_one_device(algorithm), targets_of(algorithm)

    def moved():
        tx = algorithm.make(0.05)

        def run(carry, target):
            def body(carry, _):
                carry = train_step(tx, carry, target)
                return carry, carry[0]

            return lax.scan(body, carry, length=70)[1]

        run = workers.spmd(run)
        carry = start(tx, workers)
        draws = {"random_bits", "threefry2x32"} & primitives(run, carry, targets).keys()
        return run(carry, targets), draws

    expected, draws = moved()
    monkeypatch.setattr(numbers, "LARGEST_COUNT", 30)
    found, _ = moved()
    # Random numbers repeat after wrapping: compare only the steps before.
    length = 30 - 12 if draws else 70
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.moveaxis(x, -2, 0)[:length], np.moveaxis(y, -2, 0)[:length]
        ),
        *(found, expected),
    )


@pytest.mark.parametrize("period", [1, 3, 4, 1000, 10**6])
def test_advance_preserves_the_remainder(period):
    last = numbers.LARGEST_COUNT // period * period
    for count in (0, 1, last - 1, last):
        following = int(numbers.advance(count, period))
        assert 0 < following <= last
        assert (following - count - 1) % period == 0


@pytest.mark.parametrize("num_devices", [8, 2, 1])
def test_float32_is_kept_under_x64(algorithm, num_devices, x64):
    """Under `jax_enable_x64` index arithmetic must not mix int32 with int64."""
    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:num_devices])
    tx = algorithm.make(0.1)
    # Large enough that a random block is smaller than half of a leaf.
    params = {"a": jnp.zeros(40, jnp.float32), "b": jnp.zeros((5, 7), jnp.float32)}

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    before = workers.replicate((params, tx.init(params)))
    after = jax.eval_shape(workers.spmd(step), *before)
    assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(
        lambda x: x.dtype, after
    )


@pytest.mark.parametrize("name", COMMON)
def test_leaves_without_entries_change_nothing(name):
    """As in plain optax, both between devices, where leaves are packed, and on one."""
    algorithm = COMMON[name]
    workers = dj.Workers(algorithm.shape, devices=jax.devices()[:2])
    tx, targets = algorithm.make(0.1), targets_of(algorithm)
    empty = {"c": jnp.zeros(0), "d": jnp.zeros((0, 3)), "e": jnp.zeros((3, 0))}

    def step(params, state, target):
        grads = {"a": params["a"] - target[:2], "b": params["b"] - target[2:]}
        updates, state = tx.update(grads | empty, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, dj.eval_params(state, params, workers.axis_name)

    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)} | empty
    params, state = workers.replicate((params, tx.init(params)))
    step = workers.spmd(step)
    for _ in range(4):
        params, state, model = jax.block_until_ready(step(params, state, targets))
    full = {key: params[key] for key in ("a", "b")}
    np.testing.assert_allclose(stacked(full), plain(name)[3], atol=1e-5)
    for key, leaf in empty.items():
        assert params[key].shape[-leaf.ndim :] == leaf.shape
        assert model[key].shape[-leaf.ndim :] == leaf.shape


def test_checkpoint_round_trip(algorithm, tmp_path):
    """A run that Orbax saves and restores half-way ends in the same state."""
    workers = on_one_device(algorithm)
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
