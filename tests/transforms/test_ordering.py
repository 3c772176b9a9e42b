"""Example orders equal those of a plain order server in every layout."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import decentral_jax as dj
from decentral_jax._exchange.axis import WorkerAxis
from decentral_jax.transforms import _balancing as balancing
from tests.reference import ordering
from tests.support.layouts import LAYOUTS

DIMENSION = {"bias": (3,), "kernel": (2, 4)}
SIZE = 11

METHODS = {
    "grab": (lambda n, m: dj.grab(n), "grab"),
    "pair_balance": (lambda n, m: dj.pair_balance(n), "pair_balance"),
    "pair_balance, odd": (
        lambda n, m: dj.pair_balance(n, odd_batches=True),
        "pair_balance",
    ),
    "d_grab": (lambda n, m: dj.d_grab(n, m), "d_grab"),
    "d_grab, odd": (lambda n, m: dj.d_grab(n, m, odd_batches=True), "d_grab"),
    "d_grab, gathered": (lambda n, m: dj.d_grab(n, m, gathered=True), "d_grab"),
}


@functools.cache
def gradients(epochs, workers, examples):
    """Fixed vectors plus changes between epochs."""
    rng = np.random.default_rng(0)
    fixed = rng.normal(size=(workers, examples, SIZE))
    return fixed + 0.3 * rng.normal(size=(epochs, workers, examples, SIZE))


def unflatten(x):
    return {"bias": x[..., :3], "kernel": x[..., 3:].reshape(*x.shape[:-1], 2, 4)}


def orders(tx, batch, examples):
    """One worker's orders: one per epoch, and the one after the last epoch."""

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
        state = jax.tree.map(lambda x: WorkerAxis.bind("workers").varying(x), state)
        _, found = lax.scan(epoch, state, vectors)
        return jnp.concatenate([state.order[None], found])

    return worker


def expected(method, epochs, workers, examples):
    vectors = gradients(epochs, workers, examples)
    return ordering.run(
        method, lambda e, w, i: vectors[e, w, i], examples, workers, epochs
    )


IN_ALL_LAYOUTS = ("grab", "pair_balance", "d_grab", "d_grab, gathered")
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
    if name in IN_ALL_LAYOUTS or (layout, batch) == ("vmap", 2)
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
    assert_orders_equal(name, layout, workers, batch, examples)


def assert_orders_equal(name, layout, workers, batch, examples):
    make, method = METHODS[name]
    epochs = 4
    run = orders(make(examples, workers), batch, examples)
    vectors = np.moveaxis(gradients(epochs, workers, examples), 1, 0)
    found = LAYOUTS[layout](run, workers)(jnp.asarray(vectors))
    reference = np.moveaxis(expected(method, epochs, workers, examples), 1, 0)
    np.testing.assert_array_equal(found, reference)


@pytest.mark.parametrize("name", ["grab", "pair_balance", "d_grab", "d_grab, gathered"])
@pytest.mark.parametrize("small", [0, 5])
def test_large_leaves_are_read_in_place(name, small, monkeypatch, x64):
    """With none or one of the two leaves below the limit for small leaves."""
    monkeypatch.setattr(balancing, "SMALL", small)
    assert_orders_equal(name, "vmap", 3, 4, 9)
    if name == "d_grab":
        assert_orders_equal(name, "folded_4", 8, 2, 6)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    examples=st.integers(2, 9),
    workers=st.integers(1, 4),
    batch=st.integers(1, 10),
    name=st.sampled_from([*METHODS, "random", "sketch"]),
)
def test_orders_are_always_permutations(examples, workers, batch, name):
    """For sizes that do not divide each other, and with non-finite gradients."""
    odd = {
        "random": lambda: dj.random_reshuffling(examples),
        "sketch": lambda: dj.d_grab(examples, workers, odd_batches=True, sketch=3),
        "d_grab, gathered": lambda: dj.d_grab(
            examples, workers, odd_batches=True, gathered=True
        ),
        "pair_balance": lambda: dj.pair_balance(examples, odd_batches=True),
        "d_grab": lambda: dj.d_grab(examples, workers, odd_batches=True),
    }
    tx = odd[name]() if name in odd else METHODS[name][0](examples, workers)
    vectors = np.moveaxis(gradients(3, workers, examples), 1, 0).astype(np.float32)
    vectors[0, 1] = np.nan
    found = LAYOUTS["vmap"](orders(tx, batch, examples), workers)(jnp.asarray(vectors))
    all_examples = np.broadcast_to(np.arange(examples), found.shape)
    np.testing.assert_array_equal(np.sort(found, axis=-1), all_examples)


def test_random_orders_differ_between_workers_and_epochs():
    tx = dj.random_reshuffling(20)
    vectors = jnp.zeros((4, 3, 20, SIZE))
    found = LAYOUTS["vmap"](orders(tx, 5, 20), 4)(vectors)
    later = np.asarray(found)[:, 1:].reshape(-1, 20)
    assert len({tuple(order) for order in later}) == len(later)


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_4"])
@pytest.mark.parametrize("name", ["d_grab", "d_grab, odd"])
def test_d_grab_passes_on_the_mean_over_workers(name, layout):
    tx = METHODS[name][0](6, 8)
    vectors = np.random.default_rng(1).normal(size=(8, 4, SIZE)).astype(np.float32)

    def worker(grads):
        grads = unflatten(grads)
        return tx.update(grads, tx.init(jax.tree.map(lambda g: g[0], grads)))[0]

    found = LAYOUTS[layout](worker)(jnp.asarray(vectors))
    mean = unflatten(vectors.mean((0, 1)))
    for key in DIMENSION:
        expected = np.broadcast_to(mean[key], found[key].shape)
        np.testing.assert_allclose(found[key], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["grab", "pair_balance", "random"])
def test_other_orders_pass_on_each_workers_mean(name):
    tx = dj.random_reshuffling(6) if name == "random" else METHODS[name][0](6, 8)
    grads = jnp.arange(8.0)[:, None] * jnp.array([1.0, 3.0])

    def worker(grads):
        return tx.update(grads, tx.init(grads[0]))[0]

    found = jax.vmap(worker, axis_name="workers")(grads)
    np.testing.assert_allclose(found, 2.0 * np.arange(8))


def test_d_grab_sends_slices():
    """Sends (P + 2) b (n - 1) / n bytes plus the products; keeps b / n bytes."""
    n, batch = 8, 4
    params = {"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(40)}
    tx = dj.d_grab(12, n)
    grads = {k: jnp.zeros((batch, *x.shape)) for k, x in params.items()}
    state = tx.init(params)
    cost = dj.communication_cost(tx.update, grads, state, axis_sizes={"workers": n})
    sent = {c.kind: (c.count, c.bytes_sent) for c in cost.collectives}
    share = 4 * 640 * (n - 1) / n
    pairs = batch // 2
    products = (pairs * n) * (pairs * n + 1)
    assert sent["all-to-all"] == (1, pairs * share)
    # Bytes for the mean gradient and for the products.
    both = 2 * share + 2 * 4 * products * (n - 1) / n
    assert sent["all-reduce"] == (2, pytest.approx(both))
    assert len(sent) == 2
    assert state.balance.running.size == 640 / n
    assert not state.balance.pending


@pytest.mark.parametrize(
    ("options", "kept"), [({"sketch": 16}, 16), ({"gathered": True}, 640)]
)
def test_all_workers_receive_sketches_or_differences(options, kept):
    n, pairs = 8, 2
    params = {"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(40)}
    tx = dj.d_grab(12, n, **options)
    grads = {k: jnp.zeros((2 * pairs, *x.shape)) for k, x in params.items()}
    state = tx.init(params)
    cost = dj.communication_cost(tx.update, grads, state, axis_sizes={"workers": n})
    sent = {c.kind: (c.count, c.bytes_sent) for c in cost.collectives}
    assert sent["all-gather"] == (1, 4 * kept * pairs * (n - 1))
    assert sent["all-reduce"] == (1, pytest.approx(2 * 4 * 640 * (n - 1) / n))
    assert len(sent) == 2
    assert state.balance.running.shape == (kept,)


@pytest.mark.parametrize("layout", ["shard_map", "folded_4"])
def test_sketched_orders_are_the_same_in_every_layout(layout, x64):
    vectors = jnp.asarray(np.moveaxis(gradients(3, 8, 10), 1, 0))
    run = orders(dj.d_grab(10, 8, sketch=4), 2, 10)
    found, expected = (LAYOUTS[name](run, 8)(vectors) for name in (layout, "vmap"))
    np.testing.assert_array_equal(found, expected)
    whole = LAYOUTS["vmap"](orders(dj.d_grab(10, 8), 2, 10), 8)(vectors)
    assert not np.array_equal(expected, whole)


def test_a_sketch_keeps_inner_products_on_average():
    """The error decreases with the square root of k and has no bias."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400, 1, 1000)).astype(np.float32)
    y += x
    exact = (x * y).sum((1, 2))

    def error(k):
        leaves = [
            [jnp.asarray(z[:, 0, :400]), jnp.asarray(z[:, 0, 400:])] for z in (x, y)
        ]
        sketch = [balancing.sketched(z, k) for z in leaves]
        return np.asarray((sketch[0] * sketch[1]).sum(-1)) - exact

    for k in (10, 100, 250):
        found = error(k)
        assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found)), k
        # The standard deviation for 1,000 pairs of normal entries, folded to k.
        assert 0.7 < found.std() / (1000 * np.sqrt(3 / k)) < 1.4, k


def test_next_examples_through_a_chain():
    """The first examples of an epoch fill up its last batch."""
    tx = optax.chain(optax.chain(dj.grab(5)), optax.sgd(0.1))
    state, seen = tx.init(jnp.zeros(2)), []

    def step(state):
        grads = jnp.ones((2, 2))
        return dj.next_examples(state, 2), tx.update(grads, state, jnp.zeros(2))[1]

    step = jax.jit(jax.vmap(step, axis_name="workers"))
    state = jax.tree.map(lambda x: x[None], state)
    for _ in range(4):
        chosen, state = step(state)
        seen.append(chosen[0].tolist())
    assert seen[:3] == [[0, 1], [2, 3], [4, 0]]
    assert state[0][0].epoch.tolist() == [1]
    assert state[0][0].position.tolist() == [2]
    # A host's data loader reads the same order.
    assert seen[3] == np.asarray(state[0][0].order)[0, :2].tolist()


def test_microbatches_are_composed_with_multi_steps():
    """Four micro-batches of two examples equal one batch, with less memory."""
    small = optax.chain(dj.pair_balance(8), optax.MultiSteps(optax.sgd(0.5), 4))
    whole = optax.chain(dj.pair_balance(8), optax.sgd(0.5))
    vectors = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)), jnp.float32)

    def worker(vectors):
        state, params = small.init(vectors[0]), jnp.zeros(3)

        def chunk(carry, _):
            params, state = carry
            grads = vectors[dj.next_examples(state, 2)] + params
            updates, state = small.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = lax.scan(chunk, (params, state), length=4)
        at_once = whole.init(vectors[0])
        grads = vectors[dj.next_examples(at_once, 8)]
        updates, at_once = whole.update(grads, at_once, jnp.zeros(3))
        return params, updates, state[0].order, at_once[0].order

    with jax.numpy_dtype_promotion("standard"):
        params, updates, order, expected = jax.vmap(worker, axis_name="workers")(
            vectors[None]
        )
    np.testing.assert_allclose(params, updates, atol=1e-6)
    np.testing.assert_array_equal(order, expected)
    assert order.tolist() != [list(range(8))]
