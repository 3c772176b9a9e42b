"""The ordering reference against results by hand, invariants, and herding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ordering

METHODS = ("grab", "pair_balance", "d_grab")
SIZES = {
    "N": st.integers(1, 12),
    "m": st.integers(1, 5),
    "d": st.integers(1, 3),
    "batch_size": st.integers(1, 15),
    "seed": st.integers(0, 999),
}
few = settings(max_examples=40, deadline=None)


def table(values):
    """Gradients that do not change between epochs, from [m, N] or [m, N, d]."""
    values = np.array(values).reshape(*np.shape(values)[:2], -1)
    return lambda epoch, worker, example: values[worker, example]


def random_gradients(N, m, d, seed, scale=1, shift=0):
    """Gradients of small integers, so that ties occur and sums are exact."""
    values = np.random.default_rng(seed).integers(-3, 4, (4, m, N, d))
    return lambda epoch, worker, example: scale * values[epoch, worker, example] + shift


def random_starts(N, m, seed):
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(N) for _ in range(m)])


# Invariants


@pytest.mark.parametrize("method", METHODS)
@given(**SIZES)
@few
def test_every_order_is_a_permutation(method, N, m, d, batch_size, seed):
    start = random_starts(N, m, seed)
    gradient_of = random_gradients(N, m, d, seed)
    orders = ordering.run(method, gradient_of, N, m, 4, batch_size, start)
    assert orders.shape == (5, m, N)
    assert np.issubdtype(orders.dtype, np.integer)
    np.testing.assert_array_equal(orders[0], start)
    expected = np.broadcast_to(np.arange(N), orders.shape)
    np.testing.assert_array_equal(np.sort(orders, axis=-1), expected)


@pytest.mark.parametrize("method", METHODS)
@given(**SIZES)
@few
def test_every_gradient_is_evaluated_once(method, N, m, d, batch_size, seed):
    """The batch size does not affect this or the orders, which start at 0..N-1."""
    known = random_gradients(N, m, d, seed)
    calls = []

    def gradient_of(*which):
        calls.append(which)
        return known(*which)

    orders = ordering.run(method, gradient_of, N, m, 3, batch_size)
    assert sorted(calls) == list(itertools.product(range(3), range(m), range(N)))
    np.testing.assert_array_equal(orders[0], np.tile(np.arange(N), (m, 1)))
    np.testing.assert_array_equal(orders, ordering.run(method, known, N, m, 3))


@given(N=SIZES["N"], d=SIZES["d"], seed=SIZES["seed"])
@few
def test_d_grab_of_one_worker_is_pair_balance(N, d, seed):
    gradient_of = random_gradients(N, 1, d, seed)
    start = random_starts(N, 1, seed)
    np.testing.assert_array_equal(
        ordering.run("d_grab", gradient_of, N, 1, 4, start=start),
        ordering.run("pair_balance", gradient_of, N, 1, 4, start=start),
    )


@pytest.mark.parametrize("method", ["grab", "pair_balance"])
def test_workers_are_independent(method):
    gradient_of = random_gradients(9, 3, 2, seed=0)
    start = random_starts(9, 3, seed=0)
    orders = ordering.run(method, gradient_of, 9, 3, 4, start=start)
    for j in range(3):
        alone = ordering.run(
            method, lambda k, _, e, j=j: gradient_of(k, j, e), 9, 1, 4, start=start[[j]]
        )
        np.testing.assert_array_equal(orders[:, j], alone[:, 0])


@pytest.mark.parametrize("method", METHODS)
@given(N=SIZES["N"], m=SIZES["m"], d=SIZES["d"], seed=SIZES["seed"])
@few
def test_symmetries(method, N, m, d, seed):
    """Scaling the gradients changes no order; shifting them changes no pair's order."""
    orders = ordering.run(method, random_gradients(N, m, d, seed), N, m, 4)
    others = [{"scale": -1}, {"scale": 4}]
    if method != "grab":
        others.append({"shift": 7})
    for other in others:
        gradient_of = random_gradients(N, m, d, seed, **other)
        np.testing.assert_array_equal(
            ordering.run(method, gradient_of, N, m, 4), orders
        )


# Hand results


def test_grab_by_hand():
    """Signs by position. In both cases, mu = 1 in the second epoch.

    N = 4: r = 0, c = 1 (tie) +; 1, 1 -; 0, -4 (tie) +; -4, 5 +.
      Then c = 0 (tie) +; 0, -5 (tie) +; -5, 4 +; -1, 0 (tie) +.
    N = 5: r = 0, c = 1 (tie) +; 1, 2 -; -1, -4 -; 3, 3 -; 0, 3 (tie) +.
      Then c = 0 (tie) +; 0, 2 (tie) +; 2, 2 -; 0, -5 (tie) +; -5, 1 +.
    """
    orders = ordering.run("grab", table([[1, 1, -4, 6]]), 4, 1, 2)
    expected = [[0, 1, 2, 3], [0, 2, 3, 1], [0, 2, 3, 1]]
    np.testing.assert_array_equal(orders[:, 0], expected)
    orders = ordering.run("grab", table([[1, 2, -4, 3, 3]]), 5, 1, 2)
    expected = [[0, 1, 2, 3, 4], [0, 4, 3, 2, 1], [0, 4, 2, 1, 3]]
    np.testing.assert_array_equal(orders[:, 0], expected)


def test_pair_balance_by_hand():
    """r = 0, d = 2 (tie) +; 2, -3 +. Then r = 0, d = 1 (tie) +; 1, 4 - or 1, 2 -."""
    orders = ordering.run("pair_balance", table([[3, 1, 2, 5]]), 4, 1, 2)
    expected = [[0, 1, 2, 3], [0, 2, 3, 1], [0, 1, 3, 2]]
    np.testing.assert_array_equal(orders[:, 0], expected)
    orders = ordering.run("pair_balance", table([[3, 1, 2, 5, 7]]), 5, 1, 2)
    expected = [[0, 1, 2, 3, 4], [0, 2, 4, 3, 1], [0, 3, 1, 4, 2]]
    np.testing.assert_array_equal(orders[:, 0], expected)


def test_d_grab_by_hand():
    """Two workers, A and B, take turns.

    First epoch, by pairs: r = 0, A's d = 2 (tie) +; 2, B's 1 -; 1, A's -3 +;
    -2, B's -3 -. Second epoch: r = 0, A's d = 1 (tie) +; 1, B's -3 +; then
      N = 4: r = -2, A's d = 4 +; 2, B's -1 +.
      N = 5: r = -2, A's d = 2 +; 0, B's 5 (tie) +.
    """
    orders = ordering.run("d_grab", table([[3, 1, 2, 5], [2, 1, 1, 4]]), 4, 2, 2)
    np.testing.assert_array_equal(orders[1], [[0, 2, 3, 1], [1, 3, 2, 0]])
    np.testing.assert_array_equal(orders[2], [[0, 3, 1, 2], [1, 2, 0, 3]])
    gradient_of = table([[3, 1, 2, 5, 7], [2, 1, 1, 4, 6]])
    orders = ordering.run("d_grab", gradient_of, 5, 2, 2)
    np.testing.assert_array_equal(orders[1], [[0, 2, 4, 3, 1], [1, 3, 4, 2, 0]])
    np.testing.assert_array_equal(orders[2], [[0, 4, 1, 3, 2], [1, 4, 0, 2, 3]])


@pytest.mark.parametrize("gradients", [np.zeros((5, 1)), np.eye(5)])
def test_ties_go_to_the_first_branch(gradients):
    """Ties occur with r = 0 and with r orthogonal to all later gradients."""
    for method, after in [
        ("grab", [0, 1, 2, 3, 4]),
        ("pair_balance", [0, 2, 4, 3, 1]),
        ("d_grab", [0, 2, 4, 3, 1]),
    ]:
        orders = ordering.run(method, table(gradients[None]), 5, 1, 1)
        np.testing.assert_array_equal(orders[1, 0], after)


def test_mu_is_the_mean_of_the_previous_epoch():
    """mu = 0, 2, 4. The mean of both epochs would be 3, the third epoch's mean 4.25.

    Signs: c = 2 +, 2 -, 2 +, 2 -; then 1 +, -1 +, 1 (tie) +, 7 -; then 1 +,
    -0.5 +, 0.5 -, 0 (tie) +.
    """
    values = [[2, 2, 2, 2], [3, 9, 1, 3], [5, 4, 3.5, 4.5]]
    orders = ordering.run("grab", lambda k, j, e: np.array([values[k][e]]), 4, 1, 3)
    expected = [[0, 1, 2, 3], [0, 2, 3, 1], [0, 2, 3, 1], [0, 2, 1, 3]]
    np.testing.assert_array_equal(orders[:, 0], expected)


@pytest.mark.parametrize("method", ["pair_balance", "d_grab"])
def test_computes_in_float64(method):
    """r = 0, d = 1 +; 1, -1 - 1e-9 +; -1e-9, -1 -. Losing 1e-9 would make a tie."""
    values = np.array([[1, 0, -1, 1e-9, -1, 0]], dtype=np.float32)
    orders = ordering.run(method, table(values), 6, 1, 1)
    np.testing.assert_array_equal(orders[1, 0], [0, 2, 5, 4, 3, 1])


def test_the_last_batch_repeats_the_first_examples():
    order = np.array([4, 2, 0, 1, 3])
    for batch_size, expected in [
        (1, [[4], [2], [0], [1], [3]]),
        (2, [[4, 2], [0, 1], [3, 4]]),
        (4, [[4, 2, 0, 1], [3, 4, 2, 0]]),
        (5, [[4, 2, 0, 1, 3]]),
        (12, [[4, 2, 0, 1, 3, 4, 2, 0, 1, 3, 4, 2]]),
    ]:
        assert ordering.examples(order, batch_size) == expected


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'other'"):
        ordering.run("other", table([[1]]), 1, 1, 1)


# Herding


def test_herding_bound_by_brute_force():
    rng = np.random.default_rng(0)
    for m, N, d in [(1, 1, 1), (1, 6, 2), (3, 5, 4)]:
        vectors = rng.normal(size=(m, N, d))
        orders = random_starts(N, m, seed=N)
        norms = [
            np.linalg.norm(
                sum(vectors[j, orders[j, :t]].sum(0) for j in range(m)), ord=np.inf
            )
            for t in range(1, N + 1)
        ]
        bound = ordering.herding_bound(vectors, orders)
        np.testing.assert_allclose(bound, max(norms), rtol=1e-14)


def test_herding_bound_by_hand():
    """The prefix sums are -3, -4, 1."""
    vectors = np.array([[[1], [-2], [4]], [[-1], [1], [-2]]])
    assert ordering.herding_bound(vectors, [[1, 0, 2], [0, 2, 1]]) == 4


@pytest.mark.parametrize("seed", range(3))
def test_herding(seed):
    """Bounds for 8 workers of 64 vectors: 15 random, 5 separate, 2 coordinated."""
    rng = np.random.default_rng(seed)
    vectors = rng.uniform(-1, 1, (8, 64, 4))
    vectors -= vectors.mean((0, 1))

    def after(method):
        orders = ordering.run(method, table(vectors), 64, 8, 10)
        return np.mean([ordering.herding_bound(vectors, o) for o in orders[-3:]])

    at_random = np.mean(
        [ordering.herding_bound(vectors, random_starts(64, 8, s)) for s in range(10)]
    )
    assert after("d_grab") < 0.2 * at_random
    for method in ("grab", "pair_balance"):
        assert 1.5 * after("d_grab") < after(method) < 0.6 * at_random
