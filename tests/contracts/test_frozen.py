"""Frozen leaves, as of a model with LoRA: they do not travel, and they are not lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from tests.support.layouts import LAYOUTS
from tests.support.registry import ALGORITHMS

N, AXES = 8, {"workers": 8}
COMMON = {n: a for n, a in ALGORITHMS.items() if not a.variant and a.shape == N}
TRAINED = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
FROZEN = {"base": "frozen", "lora": "trained"}


def with_frozen(tx):
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, FROZEN)


def sent(tx, params):
    return dj.communication_costs(tx, params, axis_sizes=AXES).bytes_sent


@pytest.mark.parametrize("name", COMMON)
def test_only_trained_leaves_travel(name):
    tx = COMMON[name].make(0.1)
    model = {"base": {"kernel": jnp.ones((3, 3))}, "lora": TRAINED}
    np.testing.assert_array_equal(sent(with_frozen(tx), model), sent(tx, TRAINED))


def train(tx, params, target, part):
    """Returns the parameters after six steps towards each worker's own target."""

    def step(carry, _):
        params, state = carry
        distance = jax.tree.map(lambda x: x - target, part(params))
        grads = jax.tree.map(jnp.zeros_like, params)
        grads = (
            distance if grads.keys() == TRAINED.keys() else grads | {"lora": distance}
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = lax.scan(step, (params, tx.init(params)), length=6)
    return params, dj.eval_params(state, params)


@pytest.mark.parametrize("layout", ["vmap", "folded_2"])
@pytest.mark.parametrize(
    "name", ["d_psgd", "def_sgd_block", "detag", "diloco", "choco_sgd_top_k"]
)
def test_trained_leaves_move_as_they_do_alone(name, layout):
    tx = COMMON[name].make(0.1)
    target = np.linspace(-1, 1, N, dtype=np.float32)

    def run(tx, params, part):
        fn = functools.partial(train, tx, params, part=part)
        return LAYOUTS[layout](fn, N)(target)

    alone, evaluated = run(tx, TRAINED, lambda params: params)
    model = {"base": {"kernel": jnp.ones((3, 3))}, "lora": TRAINED}
    params, means = run(with_frozen(tx), model, lambda params: params["lora"])
    jax.tree.map(np.testing.assert_array_equal, params["lora"], alone)
    jax.tree.map(np.testing.assert_array_equal, means["lora"], evaluated)
    for tree in (params, means):
        np.testing.assert_array_equal(tree["base"]["kernel"], np.ones((N, 3, 3)))
