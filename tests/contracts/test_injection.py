"""Hyperparameters that `optax.inject_hyperparams` turns into arrays act like numbers.

The tests read the hyperparameters from the signatures of all factories. A new argument
needs a value in one of the tables.
"""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from tests.support.injection import FLOATS, inject
from tests.support.layouts import LAYOUTS, Shape, named

# Arguments that determine the structure of the program. With `period` 2, the layout of
# error feedback's state does not depend on `detach`.
SHAPING = {
    "delay": 1,
    "fragments": 2,
    "num_examples": 8,
    "num_hubs": 4,
    "num_workers": 8,
    "period": 2,
    "q": 2,
    "rank": 1,
    "rounds": 2,
    "seed": 3,
    "shares": np.full((4, 2), 1 / 8),
    "sketch": 4,
    "steps": 2,
    "tau": 1,
}
# Arguments that are not tested here. Other tests cover schedules of the learning rate.
OTHERS: dict[str, Any] = {
    "learning_rate": 0.125,
    "compressor": dj.compression.random_block(2),
    "hub_topology": dj.topology.ring(4),
    "optimizer": optax.sgd(0.125),
    "projection": functools.partial(jax.tree.map, lambda x: jnp.clip(x, -0.5, 0.5)),
    "topology": dj.topology.ring(8).lazy(0.75),
    "trace": dj.traces.uniform_delay(3, 100, num_workers=8),
}
# Extra arguments that `asynchronous` passes to its inner optimizer.
PASSED = {"scale_by_staleness": {"staleness": 3}}
STEPS = 6


def _factories():
    for name in dj.__all__:
        value = getattr(dj, name)
        if inspect.isfunction(value):
            returned = inspect.signature(value).return_annotation
            if inspect.isclass(returned) and issubclass(
                returned, optax.GradientTransformation
            ):
                yield name


def numbers(name):
    """The names of a factory's arguments that are, or may be, numbers."""
    arguments = inspect.signature(getattr(dj, name)).parameters.values()
    return [
        a.name
        for a in arguments
        if a.name not in OTHERS
        and (a.annotation is Any or re.search(r"\b(int|float)\b", str(a.annotation)))
    ]


FACTORIES = list(_factories())
FLOATING = [n for n in FACTORIES if any(a in FLOATS for a in numbers(n))]
SHAPED = [(n, a) for n in FACTORIES for a in numbers(n) if a in SHAPING]


def arguments(name, which=0):
    """Values for all arguments that are numbers or have no default."""
    values = OTHERS | SHAPING | {a: pair[which] for a, pair in FLOATS.items()}
    taken = inspect.signature(getattr(dj, name)).parameters
    return {a: value for a, value in values.items() if a in taken}


def build(name, which=0):
    return getattr(dj, name)(**arguments(name, which))


def injected(name, **changed):
    given = arguments(name) | changed
    return inject(getattr(dj, name), **given)


def shape_of(name) -> Shape:
    hubs = "hub_axis" in inspect.signature(getattr(dj, name)).parameters
    return {"hub": 4, "worker": 2} if hubs else 8


@pytest.fixture
def promotion(request):
    """Strict dtype promotion, except where optax receives several dtypes."""
    mixed = request.node.callspec.params.get("dtype") == "mixed"
    with jax.numpy_dtype_promotion("standard" if mixed else "strict"):
        yield


def start(dtype=jnp.float32):
    """Parameters, and one optimum per worker."""
    first, second = (jnp.float32, jnp.bfloat16) if dtype == "mixed" else [dtype] * 2
    params = {"a": jnp.zeros(2, first), "b": jnp.ones((2, 3), second)}
    rng = np.random.default_rng(0)
    optima = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(8, *x.shape)), x.dtype), params
    )
    return params, optima


def step(name, tx, params, state, optimum):
    grads = jax.tree.map(jnp.subtract, params, optimum)
    updates, state = tx.update(grads, state, params, **PASSED.get(name, {}))
    params = optax.apply_updates(params, updates)
    return params, state


def scanned(name, tx, dtype=jnp.float32, layout="vmap"):
    """Runs one scan; returns the path and the final models from `eval_params`."""
    params, optima = start(dtype)

    def run(optimum):
        def body(carry, _):
            carry = step(name, tx, *carry, optimum)
            return carry, carry[0]

        carry, path = lax.scan(body, (params, tx.init(params)), length=STEPS)
        return path, evaluated(*carry)

    def evaluated(params, state):
        return dj.eval_params(state, params, axis_name=tuple(named(shape_of(name))))

    return LAYOUTS[layout](run, shape_of(name))(optima)


def one_by_one(name, steps, change=lambda t, state: state):
    """The path of one transformation per step; `change` edits the state before each."""
    params, optima = start()
    states = steps[0].init(params)
    carry = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), (params, states)
    )
    path = []
    compiled = {
        tx: LAYOUTS["vmap"](functools.partial(step, name, tx), shape_of(name))
        for tx in steps
    }
    for t, tx in enumerate(steps):
        params, state = carry
        carry = compiled[tx](params, change(t, state), optima)
        path.append(carry[0])
    return path


def assert_close(found, expected):
    # A few units in the last place.
    def compare(x, y):
        assert x.dtype == y.dtype
        tolerance = 2.0 ** (-20 if x.dtype == jnp.float32 else -5)
        x, y = (np.asarray(leaf, np.float64) for leaf in (x, y))
        assert np.abs(x - y).max() <= tolerance * max(1, np.abs(y).max())

    jax.tree.map(compare, found, expected)


def value_index(t):
    """Index of the value that step t uses; exchanges use both values."""
    return 0 if t % 3 == 0 else 1


@pytest.mark.parametrize("name", FACTORIES)
def test_every_number_has_a_value_here(name):
    assert set(numbers(name)) <= FLOATS.keys() | SHAPING.keys()


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("name", FLOATING)
def test_injected_arrays_act_like_numbers(name, dtype):
    expected = scanned(name, build(name), dtype)
    layout = "folded_2" if dtype == "float32" else "vmap"
    assert_close(scanned(name, injected(name), dtype, layout), expected)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("name", FLOATING)
def test_a_sweep_of_numbers(name):
    """Hyperparameters may be traced and batched arrays."""
    names = [a for a in numbers(name) if a in FLOATS]

    def run(values):
        tx = getattr(dj, name)(**arguments(name) | values)
        return scanned(name, tx)

    pairs = {a: jnp.asarray(FLOATS[a], jnp.float32) for a in names}
    found = jax.vmap(run)(pairs)
    parts = [jax.tree.map(lambda x, i=which: x[i], found) for which in (0, 1)]
    for which, part in enumerate(parts):
        assert_close(part, scanned(name, build(name, which)))
    differences = jax.tree.map(lambda x, y: np.abs(x - y).max(), *parts)
    assert max(jax.tree.leaves(differences)) > 1e-2


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("name", FLOATING)
def test_numbers_that_change_from_step_to_step(name):
    """A schedule, or an edit of the state, equals one transformation per value."""
    names = [a for a in numbers(name) if a in FLOATS]
    direct = [build(name, which) for which in (0, 1)]
    expected = one_by_one(name, [direct[value_index(t)] for t in range(STEPS)])

    def schedule(pair):
        return lambda count: jnp.where(count % 3 == 0, *map(jnp.float32, pair))

    scheduled = injected(name, **{a: schedule(FLOATS[a]) for a in names})
    assert_close(one_by_one(name, [scheduled] * STEPS), expected)

    def change(t, state):
        for a in names:
            old = state.hyperparams[a]
            state.hyperparams[a] = jnp.full_like(old, FLOATS[a][value_index(t)])
        return state

    assert_close(one_by_one(name, [injected(name)] * STEPS, change), expected)


@pytest.mark.parametrize(("name", "argument"), SHAPED)
def test_numbers_that_shape_the_program_are_refused(name, argument):
    given = arguments(name)
    static = [a for a in given if a != argument and a not in FLOATS]
    inject = optax.inject_hyperparams(getattr(dj, name), static_args=static)
    tx = inject(**given)
    with pytest.raises(
        TypeError, match=f"^{argument} must .*known before tracing"
    ) as e:
        jax.eval_shape(tx.init, start()[0])
    assert f"static_args=('{argument}',)" in str(e.value)


@pytest.mark.parametrize("name", ["apam", "amsgrad", "project"])
def test_a_function_that_is_not_a_schedule_is_refused(name, standard_promotion):
    """optax would take it for a schedule and replace it with an array."""
    given = arguments(name)
    static = [a for a in given if a != "projection"]
    tx = optax.inject_hyperparams(getattr(dj, name), static_args=static)(**given)
    with pytest.raises(TypeError, match=r"projection must .*static_args"):
        tx.init(start()[0])


def test_a_number_out_of_range_is_refused_where_it_is_known():
    inject = optax.inject_hyperparams(dj.iterate_averaging)
    with pytest.raises(ValueError, match="detach must lie in"):
        inject(delta=0.5, detach=1.5).init(jnp.zeros(2))
    with pytest.raises(TypeError, match="detach must be a number"):
        dj.iterate_averaging(0.5, detach=jnp.zeros(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("name", ["detag", "defacto"])
def test_a_wider_number_in_the_optimizer(name, dtype, standard_promotion):
    """A float32 rate may widen the state in `init`, but no step changes its dtypes."""
    inject = optax.inject_hyperparams(optax.sgd, hyperparam_dtype=jnp.float32)
    optimizer = inject(0.125, momentum=0.5)
    tx = getattr(dj, name)(optimizer, OTHERS["topology"], rounds=2)
    params, _ = start(dtype)
    carry = params, tx.init(params)

    def run(_):
        return step(name, tx, *carry, params)

    after = jax.eval_shape(jax.vmap(run, axis_name="workers"), jnp.zeros(8))
    before = jax.tree.map(lambda x: jnp.result_type(x), carry)
    assert jax.tree.map(lambda x: x.dtype, after) == before


def test_numbers_in_half_precision_are_computed_with_in_float32():
    """Values derived from them, here 1 / 3, are not rounded to half precision."""
    tx = dj.sgd_ia(1.0, ratio=jnp.bfloat16(3.0), detach=0.0)

    def run(x):
        return tx.update(jnp.ones(()), tx.init(x), x)[0]

    found = jax.vmap(run, axis_name="workers")(jnp.zeros(2))
    np.testing.assert_allclose(found, -1 / 3, rtol=1e-6)
