"""Example orders equal a plain order server's, index by index, in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import decentral_jax as dj
from decentral_jax import collectives
from tests.layouts import LAYOUTS
from tests.reference import ordering

DIMENSION = {"bias": (3,), "kernel": (2, 4)}
SIZE = 11

METHODS = {
    "grab": (lambda n, m: dj.grab(n), "grab"),
    "pair_balance": (lambda n, m: dj.pair_balance(n), "pair_balance"),
    "pair_balance, odd": (lambda n, m: dj.pair_balance(n, True), "pair_balance"),
    "independent_grab": (lambda n, m: dj.independent_grab(n), "grab"),
    "independent pairs": (
        lambda n, m: dj.independent_grab(n, "pair"),
        "pair_balance",
    ),
    "d_grab": (lambda n, m: dj.d_grab(n, m), "d_grab"),
    "d_grab, odd": (lambda n, m: dj.d_grab(n, m, True), "d_grab"),
}


@functools.cache
def gradients(epochs, workers, examples):
    """Fixed vectors and a drift from epoch to epoch."""
    rng = np.random.default_rng(0)
    fixed = rng.normal(size=(workers, examples, SIZE))
    return fixed + 0.3 * rng.normal(size=(epochs, workers, examples, SIZE))


def unflatten(x):
    return {"bias": x[..., :3], "kernel": x[..., 3:].reshape(*x.shape[:-1], 2, 4)}


def orders(tx, batch, examples):
    """One worker's orders, those of each epoch and the one that would come next."""

    def worker(vectors):
        def step(state, vectors):
            chosen = dj.next_examples(state, batch)
            return tx.update(unflatten(vectors[chosen]), state)[1], None

        def epoch(state, vectors):
            def again(state, _):
                return step(state, vectors)

            state, _ = lax.scan(again, state, length=-(-examples // batch))
            return state, state.order

        state = tx.init(unflatten(jnp.zeros_like(vectors[0, 0])))
        state = jax.tree.map(lambda x: collectives.varying(x, "workers"), state)
        _, found = lax.scan(epoch, state, vectors)
        return jnp.concatenate([state.order[None], found])

    return worker


def expected(method, epochs, workers, examples):
    vectors = gradients(epochs, workers, examples)
    return ordering.run(
        method, lambda e, w, i: vectors[e, w, i], examples, workers, epochs
    )


CASES = [
    (name, layout, workers, batch, examples)
    for name in METHODS
    for layout, workers, batch, examples in (
        ("vmap", 8, 2, 10),
        ("vmap", 4, 4, 11),
        ("shard_map", 8, 2, 11),
        ("folded_4", 8, 4, 10),
        ("folded_2", 4, 2, 7),
        ("vmap", 1, 2, 9),
        ("vmap", 2, 18, 18),
    )
    if name in ("grab", "pair_balance", "d_grab") or (layout, batch) == ("vmap", 2)
]
CASES += [
    (name, layout, workers, batch, examples)
    for name in ("pair_balance, odd", "d_grab, odd", "grab")
    for layout, workers, batch, examples in (
        ("vmap", 4, 1, 7),
        ("vmap", 4, 3, 10),
        ("shard_map", 8, 1, 6),
        ("folded_4", 8, 5, 11),
        ("vmap", 3, 4, 9),
    )
]


@pytest.mark.parametrize(("name", "layout", "workers", "batch", "examples"), CASES)
def test_orders_equal_the_server(name, layout, workers, batch, examples, x64):
    make, method = METHODS[name]
    epochs = 4
    run = orders(make(examples, workers), batch, examples)
    vectors = np.moveaxis(gradients(epochs, workers, examples), 1, 0)
    found = LAYOUTS[layout](run, workers)(jnp.asarray(vectors))
    reference = np.moveaxis(expected(method, epochs, workers, examples), 1, 0)
    np.testing.assert_array_equal(found, reference)
