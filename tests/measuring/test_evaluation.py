"""Evaluation models of algorithms that see only some of the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import decentral_jax as dj
from tests.support.layouts import LAYOUTS, named
from tests.support.registry import ALGORITHMS

N, STEPS = 8, 7
COMMON = {name: a for name, a in ALGORITHMS.items() if not a.variant}
TARGETS = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
BLOCK = dj.compression.random_block(2)


def train(tx, params, layout, shape=N, head="head"):
    """Trains on the head's quadratic; returns the evaluation model and params."""
    axis_name = tuple(named(shape))

    def run(target):
        p = jax.tree.map(lambda x: x + jnp.zeros_like(x), params)
        state = tx.init(p)
        for _ in range(STEPS):
            # Frozen leaves have gradients too, which must not be used.
            grads = jax.tree.map(lambda x: jnp.full_like(x, 7), p)
            grads = {**grads, head: p[head] - target}
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return dj.eval_params(state, p, axis_name), p

    return LAYOUTS[layout](run, shape)(TARGETS)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("name", COMMON)
def test_frozen_leaves_are_kept_and_change_nothing(name, wrapper):
    """A head trains equally with and without a frozen backbone."""
    algorithm = COMMON[name]
    tx = algorithm.make(0.1)
    trained = {"backbone": False, "head": True}
    if wrapper == "masked":
        frozen = {"backbone": True, "head": False}
        with_frozen = optax.chain(
            optax.masked(tx, trained), optax.masked(optax.set_to_zero(), frozen)
        )
    else:
        with_frozen = optax.partition({True: tx, False: optax.set_to_zero()}, trained)
    head, backbone = jnp.zeros(4), jnp.arange(6.0)
    expected, _ = train(tx, {"head": head}, "vmap", algorithm.shape)
    params = {"backbone": backbone, "head": head}
    found, after = train(with_frozen, params, "vmap", algorithm.shape)
    np.testing.assert_array_equal(after["backbone"], np.tile(backbone, (N, 1)))
    np.testing.assert_allclose(found["backbone"], after["backbone"], rtol=1e-6)
    np.testing.assert_allclose(found["head"], expected["head"], atol=1e-6)
    assert np.abs(found["head"]).max() > 0 or np.abs(expected["head"]).max() == 0


@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
@pytest.mark.parametrize("detach", [0.0, 0.3])
def test_models_computed_from_the_parameters(detach, layout):
    """The residual is added to the trained leaves only."""
    feedback = dj.error_feedback(BLOCK, detach=detach, evaluate="averaged")
    tx = optax.chain(optax.sgd(0.1), feedback)
    expected, _ = train(tx, {"head": jnp.zeros(4)}, "vmap")
    masked = optax.chain(
        optax.masked(tx, {"backbone": False, "head": True}),
        optax.masked(optax.set_to_zero(), {"backbone": True, "head": False}),
    )
    params = {"backbone": jnp.arange(6.0), "head": jnp.zeros(4)}
    found, _ = train(masked, params, layout)
    np.testing.assert_allclose(found["head"], expected["head"], atol=1e-6)
    np.testing.assert_allclose(found["backbone"][0], np.arange(6.0), rtol=1e-6)


GROUPS = {
    "one hidden model": (
        dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK),
        dj.all_reduce_sgd(0.1),
    ),
    "two hidden models": (
        dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK),
        dj.sgd_ia(optax.sgd(0.1, momentum=0.9), ratio=4.0),
    ),
}


@pytest.mark.parametrize("layout", ["vmap", "folded_2", "shard_map"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_leaves_have_their_own_models(name, layout):
    """Compressed large leaves and plain small leaves train as if alone."""
    large, small = GROUPS[name]
    tx = optax.partition(
        {"large": large, "small": small}, {"kernel": "large", "head": "small"}
    )
    params = {"head": jnp.zeros(4), "kernel": jnp.zeros((2, 3))}
    found, _ = train(tx, params, layout)

    alone, _ = train(small, {"head": jnp.zeros(4)}, "vmap")
    np.testing.assert_allclose(found["head"], alone["head"], atol=1e-6)

    def kernel(target):
        p = {"kernel": jnp.zeros((2, 3))}
        state = large.init(p)
        for _ in range(STEPS):
            updates, state = large.update({"kernel": jnp.full((2, 3), 7.0)}, state, p)
            p = optax.apply_updates(p, updates)
        return dj.eval_params(state, p)

    alone = LAYOUTS["vmap"](kernel)(TARGETS)
    np.testing.assert_allclose(found["kernel"], alone["kernel"], rtol=1e-5)


def test_frozen_integers_are_passed_on():
    tx = optax.masked(
        dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK), {"steps": False, "head": True}
    )

    def run(target):
        params = {"steps": jnp.int32(3), "head": target}
        return dj.eval_params(tx.init(params), params)

    found = LAYOUTS["vmap"](run)(TARGETS)
    assert found["steps"].dtype == jnp.int32
    np.testing.assert_array_equal(found["steps"], np.full(N, 3))
    expected = np.tile(TARGETS.mean(0), (N, 1))
    np.testing.assert_allclose(found["head"], expected, atol=1e-6)


def test_two_models_of_one_leaf_are_refused():
    tx = optax.chain(
        dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK), dj.iterate_averaging(0.5)
    )

    def run(target):
        return dj.eval_params(tx.init({"head": target}), {"head": target})

    with pytest.raises(ValueError, match=r"at most one hidden model.*2.*head"):
        LAYOUTS["vmap"](run)(TARGETS)


def hides_a_model(algorithm):
    state = jax.eval_shape(algorithm.make(0.1).init, [jnp.zeros(3)] * 2)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "evaluation_params"))
    return any(hasattr(node, "evaluation_params") for node in nodes)


HIDING = [n for n, a in ALGORITHMS.items() if a.shape == N and hides_a_model(a)]


def test_hidden_models_are_known():
    assert {"def_sgd_block", "def_a_sgd", "sgd_ia", "sgp", "apam"} <= set(HIDING)


@pytest.mark.parametrize("name", HIDING)
def test_nnx_optimizers_hide_the_same_model(name, standard_promotion):
    """nnx wraps the state's leaves in other variables than the model's."""
    tx = ALGORITHMS[name].make(0.1)

    class Model(nnx.Module):
        def __init__(self):
            self.head = nnx.Param(jnp.zeros(4))
            self.seen = nnx.BatchStat(jnp.zeros(2))

    def by_nnx(target):
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(STEPS):
            grads = nnx.grad(lambda m: jnp.sum((m.head[...] - target) ** 2) / 2)(model)
            optimizer.update(model, grads)
        params = nnx.state(model, nnx.Param)
        averaged = dj.eval_params(optimizer.opt_state, params)
        nnx.update(model, averaged)
        return model.head[...]

    _, expected = LAYOUTS["vmap"](lambda t: plain(tx, t), N)(TARGETS)
    found = jax.jit(jax.vmap(by_nnx, axis_name="workers"))(TARGETS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def plain(tx, target):
    params = jnp.zeros(4)
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(params - target, state, params)
        params = params + updates
    return params, dj.eval_params(state, params)


def test_orders_are_found_in_an_nnx_optimizer():
    tx = optax.chain(dj.pair_balance(6), optax.sgd(0.1))
    optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    np.testing.assert_array_equal(dj.next_examples(optimizer.opt_state, 2), [0, 1])


@pytest.mark.parametrize("swapped", ["algorithm", "chain"])
def test_swapped_arguments_are_refused(swapped):
    """Checkpoints take params first, so it is easy to swap them."""
    tx = dj.d_psgd(optax.adam(0.1), dj.topology.ring(N))
    tx = {"algorithm": tx, "chain": optax.chain(optax.clip(1.0), tx)}[swapped]
    params = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"eval_params\(opt_state, params\)"):
        jax.vmap(lambda x: dj.eval_params(x, tx.init(x)), axis_name="workers")(
            jnp.stack([params] * N)
        )
