"""Gradient accumulation: one step of the algorithm, one exchange, per K gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from tests.support.layouts import LAYOUTS, named, nested_vmap
from tests.support.registry import ALGORITHMS

K, STEPS, RATE = 3, 4, 0.1
RNG = np.random.default_rng(0)
COMMON = {name: a for name, a in ALGORITHMS.items() if not a.variant}


def start(shape):
    """Parameters that differ between workers, and each worker's gradient offsets."""
    sizes = tuple(named(shape).values())
    x = RNG.normal(size=(*sizes, 5)).astype(np.float32)
    noise = RNG.normal(size=(*sizes, STEPS, K, 5)).astype(np.float32)
    return x, noise


def micro_steps(tx, x, noise):
    """Runs every micro-step; each gradient depends on the parameters."""

    def step(carry, noise):
        x, state = carry
        updates, state = tx.update(x + noise, state, x)
        return (x + updates, state), x + updates

    (x, state), path = lax.scan(step, (x, tx.init(x)), noise.reshape(-1, 5))
    return path, dj.eval_params(state, x)


def whole_steps(tx, x, noise):
    """Runs one step per K gradients, with their mean."""

    def step(carry, noise):
        x, state = carry
        updates, state = tx.update(x + noise.mean(0), state, x)
        return (x + updates, state), x + updates

    (x, state), path = lax.scan(step, (x, tx.init(x)), noise)
    return path, dj.eval_params(state, x)


def axis_of(algorithm):
    names = tuple(named(algorithm.shape))
    return names if len(names) > 1 else names[0]


@pytest.mark.parametrize("name", [n for n, a in COMMON.items() if a.shape == 8])
def test_every_algorithm_takes_the_steps_of_the_mean_gradients(name):
    algorithm = COMMON[name]
    tx = algorithm.make(RATE)
    run = LAYOUTS["vmap"]
    x, noise = start(algorithm.shape)
    path, model = run(functools.partial(micro_steps, dj.accumulate(tx, K)))(x, noise)
    expected, evaluated = run(functools.partial(whole_steps, tx))(x, noise)
    # Only the last of K micro-steps moves the parameters.
    np.testing.assert_allclose(path[:, K - 1 :: K], expected, atol=1e-5)
    before = np.concatenate([x[:, None], path[:, K - 1 : -1 : K]], 1)
    for micro_step in range(K - 1):
        np.testing.assert_array_equal(path[:, micro_step::K], before)
    np.testing.assert_allclose(model, evaluated, atol=1e-5)


@pytest.mark.parametrize("layout", ["shard_map", "folded_2", "one_device"])
@pytest.mark.parametrize(
    "name", ["d_psgd_one_peer", "detag", "def_sgd_block", "hl_sgd"]
)
def test_layouts_agree(name, layout):
    algorithm = ALGORITHMS[name]
    axis_name = axis_of(algorithm)
    tx = dj.accumulate(algorithm.make(RATE), K, axis_name=axis_name)
    x, noise = start(algorithm.shape)

    def run(x, noise):
        state = tx.init(x)
        # A loop in Python: under varying-axis checks, a scan's state must vary at once.
        for each in noise.reshape(-1, 5):
            updates, state = tx.update(x + each, state, x)
            x = x + updates
        return x

    expected = jax.jit(nested_vmap(run, algorithm.shape))(x, noise)
    flat = jax.tree.map(lambda a: a.reshape(8, *a.shape[-1:]), expected)
    result = LAYOUTS[layout](run, algorithm.shape)(
        x.reshape(8, 5), noise.reshape(8, STEPS, K, 5)
    )
    np.testing.assert_allclose(result, flat, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_only_steps_that_move_send(num_devices, standard_promotion):
    """Four micro-steps send 64,000 bytes; inside of MultiSteps, they send 256,000."""
    params, axes = jnp.zeros(8000), {"workers": 8}
    tx = dj.d_psgd(0.1, dj.topology.ring(8))

    def sent(tx):
        return dj.communication_costs(tx, params, axis_sizes=axes).bytes_sent

    np.testing.assert_array_equal(sent(tx), [64_000])
    np.testing.assert_array_equal(sent(dj.accumulate(tx, 4)), [0, 0, 0, 64_000])
    multi = optax.MultiSteps(tx, 4).gradient_transformation()
    assert 4 * sent(multi)[0] == 256_000

    # The compiled program has the messages in a conditional, in every layout.
    workers = dj.Workers(8, devices=jax.devices()[:num_devices])
    accumulated = dj.accumulate(tx, 4)

    def step(params, state):
        return accumulated.update(params, state, params)

    args = workers.replicate((params, accumulated.init(params)))
    jaxpr = jax.make_jaxpr(workers.spmd(step))(*args)
    outside, inside = collectives(jaxpr.jaxpr)
    assert not outside
    assert inside or num_devices == 1


def collectives(jaxpr, in_cond=False):
    """Messages outside and inside of conditionals."""
    found = ([], [])
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("ppermute", "all_gather", "psum_invariant"):
            found[in_cond].append(eqn.primitive.name)
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    now = in_cond or eqn.primitive.name == "cond"
                    for mine, theirs in zip(
                        found, collectives(inner, now), strict=True
                    ):
                        mine.extend(theirs)
    return found


def test_half_precision_gradients_are_summed_in_float32():
    steps = 1024
    tx = dj.accumulate(optax.sgd(1.0), steps)
    grads = jnp.ones([1], jnp.bfloat16)

    def run(x):
        def step(state, _):
            updates, state = tx.update(grads, state)
            return state, updates

        return lax.scan(step, tx.init(x), length=steps)[1][-1]

    updates = jax.vmap(run, axis_name="workers")(jnp.zeros([2, 1], jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    # A sum in bfloat16 would stop at 256.
    np.testing.assert_array_equal(updates.astype(np.float32), -np.ones((2, 1)))


def test_an_order_outside_sees_every_micro_step():
    """The orders do not depend on the accumulation if the gradients do not."""
    n, examples, batch = 4, 12, 2
    data = RNG.normal(size=(n, examples, 5)).astype(np.float32)

    def orders(tx):
        def run(data):
            def step(carry, _):
                x, state = carry
                grads = data[dj.next_examples(state, batch)]
                updates, state = tx.update(grads, state, x)
                return (x + updates, state), (state[0].order, x)

            x = jnp.zeros(5)
            return lax.scan(step, (x, tx.init(x)), length=3 * examples // batch)[1]

        return jax.vmap(run, axis_name="workers")(data)

    order = dj.d_grab(examples, n)
    expected, _ = orders(optax.chain(order, optax.sgd(0.1)))
    tx = optax.chain(order, dj.accumulate(optax.sgd(0.1), 3))
    found, path = orders(tx)
    np.testing.assert_array_equal(found, expected)
    assert (np.diff(found[:, ::6], axis=1) != 0).any()
    # The parameters move once in three steps, by the mean of six examples per worker.
    moved = (np.diff(path, axis=1) != 0).any(-1)
    np.testing.assert_array_equal(moved[0], np.arange(1, 18) % 3 == 0)
    np.testing.assert_allclose(path[0, 3], -0.1 * data[:, :6].mean((0, 1)), atol=1e-6)


def test_an_order_inside_is_refused():
    tx = dj.accumulate(optax.chain(dj.pair_balance(8), optax.sgd(0.1)), 2)
    with pytest.raises(ValueError, match=r"chain it before the accumulation"):
        tx.init(jnp.zeros(2))


@pytest.mark.parametrize("steps", [0, 1.5, None])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises((TypeError, ValueError), match="steps"):
        dj.accumulate(optax.sgd(0.1), steps)


def test_gradients_of_other_shapes_are_refused():
    """Per-example gradients would broadcast into the sum without a word."""
    tx = dj.accumulate(optax.sgd(0.1), 2)

    def run(x):
        return tx.update(jnp.ones([4, 3]), tx.init(x), x)

    with pytest.raises(ValueError, match="shapes that init saw"):
        jax.vmap(run, axis_name="workers")(jnp.zeros([2, 3]))


def test_schedules_and_extra_arguments():
    """A schedule counts steps; `value` is that of the micro-step that moves."""
    seen = []

    def update_fn(updates, state, params=None, *, value):
        seen.append(value)
        return jax.tree.map(lambda u: u * value, updates), state

    reads_value = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )

    def rate(count):
        return jnp.where(count == 1, 0.5, 1.0)

    tx = dj.accumulate(
        optax.chain(reads_value, optax.scale_by_schedule(rate)), 2, axis_name="w"
    )

    def run(x):
        state, path = tx.init(x), []
        for value in (5.0, 1.0, 7.0, 2.0):
            updates, state = tx.update(x, state, x, value=jnp.float32(value))
            path.append(updates)
        return jnp.stack(path)

    path = jax.vmap(run, axis_name="w")(jnp.ones(2))
    np.testing.assert_allclose(path[0], [0.0, 1.0, 0.0, 1.0])
    assert seen
