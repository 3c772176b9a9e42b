"""The references against closed forms, invariants, and known optima."""

import functools

import numpy as np
import pytest

from . import averaging, gossip, tracking

DIMENSION = 3
ORDERS = ("combine_then_adapt", "adapt_then_combine")
ONE_MATRIX_METHODS = {
    "d_psgd": gossip.d_psgd,
    "d_psgd_atc": functools.partial(gossip.d_psgd, order="adapt_then_combine"),
    "d2": gossip.d2,
    "dsgt": tracking.dsgt,
    "dsgt_atc": functools.partial(tracking.dsgt, order="adapt_then_combine"),
}
EXACT_METHODS = ("d2", "dsgt", "dsgt_atc")


def ring(n):
    """The ring with weights 1/3."""
    W = np.zeros((n, n))
    for i in range(n):
        for j in (i - 1, i, i + 1):
            W[i, j % n] = 1 / 3
    return W


def complete(n):
    return np.full((n, n), 1 / n)


def quadratics(n, noise=0.0):
    """Gradients of f_i(x) = 0.5 (x - b_i)' diag(a_i) (x - b_i), and the optimum.

    Repeated calls for the same iteration t and worker i return the same noise.
    """
    rng = np.random.default_rng(0)
    a = rng.uniform(0.5, 1.5, (n, DIMENSION))
    b = rng.normal(size=(n, DIMENSION))

    def grad_fn(t, i, x):
        gradient = a[i] * (x - b[i])
        if noise:
            xi = np.random.default_rng((t, i)).normal(size=DIMENSION)
            gradient = gradient + noise * xi
        return gradient

    return grad_fn, (a * b).sum(0) / a.sum(0)


def mean_gradients(grad_fn, trajectory):
    """mean_i g_i(x_{t,i}) of each iteration, [steps, d]."""
    return np.array(
        [
            np.mean([grad_fn(t, i, x) for i, x in enumerate(X)], axis=0)
            for t, X in enumerate(trajectory[:-1])
        ]
    )


X0 = np.array([1.0, -2.0, 3.0])


# D-PSGD, D2, DSGT


@pytest.mark.parametrize("method", ONE_MATRIX_METHODS.values(), ids=ONE_MATRIX_METHODS)
def test_mean_moves_by_the_mean_gradient(method):
    grad_fn, _ = quadratics(5, noise=1.0)
    trajectory = method(grad_fn, X0, [ring(5)], lambda t: 0.1 / (t + 1), 12)
    assert trajectory.shape == (13, 5, DIMENSION)
    assert trajectory.dtype == np.float64
    np.testing.assert_array_equal(trajectory[0], np.tile(X0, (5, 1)))
    gammas = 0.1 / np.arange(1, 13)
    expected = -gammas[:, None] * mean_gradients(grad_fn, trajectory)
    np.testing.assert_allclose(
        np.diff(trajectory.mean(1), axis=0), expected, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", [gossip.d_psgd, tracking.dsgt])
def test_first_step(method, order):
    grad_fn, _ = quadratics(5)
    W = ring(5)
    G = np.array([grad_fn(0, i, X0) for i in range(5)])
    moved = {
        "combine_then_adapt": X0 - 0.1 * G,
        "adapt_then_combine": X0 - 0.1 * W @ G,
    }
    trajectory = method(grad_fn, X0, [W], 0.1, 1, order=order)
    np.testing.assert_allclose(trajectory[1], moved[order], rtol=1e-14)


def test_second_step():
    """Two iterations of two workers, worked out by hand.

    g_0 = b and g_1 = 3 b for all x, with b = (1, 0), W = [[3, 1], [1, 3]] / 4,
    gamma = 1, x_0 = 0; W b = (3, 1) / 4 and W W b = (5, 3) / 8.
    """
    b, Wb, WWb = np.array([[1, 0], [3 / 4, 1 / 4], [5 / 8, 3 / 8]])
    expected = {
        "d_psgd": -(Wb + 3 * b),
        "d_psgd_atc": -(WWb + 3 * Wb),
        "d2": -2 * (WWb + Wb),
        "dsgt": -(2 * Wb + 2 * b),  # y_1 = W b + 2 b
        "dsgt_atc": -4 * WWb,  # y_1 = 3 W b
    }
    W = np.array([[3, 1], [1, 3]]) / 4
    for name, method in ONE_MATRIX_METHODS.items():
        trajectory = method(
            lambda t, i, x: (1 + 2 * t) * b[i], np.zeros(1), [W], 1.0, 2
        )
        np.testing.assert_allclose(
            trajectory[2, :, 0], expected[name], rtol=1e-15, err_msg=name
        )


def test_adapt_then_combine_on_the_complete_graph_is_all_reduce():
    grad_fn, _ = quadratics(4, noise=1.0)
    exact = averaging.all_reduce_sgd(grad_fn, X0, 4, 0.1, 20)
    gossiped = gossip.d_psgd(
        grad_fn, X0, [complete(4)], 0.1, 20, order="adapt_then_combine"
    )
    assert np.abs(exact[-1] - X0).max() > 0.5
    np.testing.assert_allclose(gossiped, exact, rtol=0, atol=1e-13)


def test_all_reduce_is_minibatch_sgd():
    grad_fn, _ = quadratics(3, noise=1.0)
    trajectory = averaging.all_reduce_sgd(grad_fn, X0, 3, lambda t: 0.1 / (t + 1), 5)
    x = X0
    for t in range(5):
        np.testing.assert_allclose(trajectory[t], np.tile(x, (3, 1)), rtol=1e-13)
        x = x - 0.1 / (t + 1) * np.mean([grad_fn(t, i, x) for i in range(3)], axis=0)
    np.testing.assert_allclose(trajectory[5, 0], x, rtol=1e-13)


@pytest.mark.parametrize("name", ONE_MATRIX_METHODS)
def test_only_exact_methods_reach_the_optimum_with_a_constant_step(name):
    grad_fn, optimum = quadratics(5)
    trajectory = ONE_MATRIX_METHODS[name](grad_fn, X0, [ring(5)], 0.1, 400)
    error = np.abs(trajectory[-1] - optimum).max()
    if name in EXACT_METHODS:
        assert error < 1e-11
    else:
        assert 1e-2 < error < 1.0


def test_matrices_are_used_in_turn():
    """The one-peer exponential graph of 4 workers averages the first step exactly."""
    one_peer = [np.zeros((4, 4)) for _ in range(2)]
    for k, W in enumerate(one_peer):
        for i in range(4):
            W[i, i] += 0.5
            W[i, (i + 2**k) % 4] += 0.5

    def only_at_first(t, i, x):
        return np.array([float(i)]) if t == 0 else np.zeros(1)

    for matrices, exact in [(one_peer, True), (one_peer[:1], False)]:
        trajectory = gossip.d_psgd(
            only_at_first, np.zeros(1), matrices, 1.0, 2, order="adapt_then_combine"
        )
        assert np.allclose(trajectory[2], -1.5, rtol=0, atol=1e-15) == exact


@pytest.mark.parametrize("method", [gossip.d_psgd, tracking.dsgt])
def test_unknown_order(method):
    grad_fn, _ = quadratics(4)
    with pytest.raises(ValueError, match="unknown order 'other'"):
        method(grad_fn, X0, [ring(4)], 0.1, 1, order="other")


# Accelerated gossip


def test_accelerated_gossip_contracts_faster_than_plain():
    """Ring of 8, 10 rounds: root-mean-square residual 3.5e-3 instead of 6.1e-2."""
    W = ring(8)
    deviation = np.eye(8) - complete(8)  # each worker in turn holds 1, the others 0
    start = np.linalg.norm(deviation)
    accelerated = tracking.accelerated_gossip(W, deviation, 10)
    plain = np.linalg.matrix_power(W, 10) @ deviation
    np.testing.assert_allclose(np.linalg.norm(plain) / start, 6.1e-2, rtol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(accelerated) / start, 3.5e-3, rtol=1e-2)


def test_accelerated_gossip_preserves_the_mean():
    z = np.random.default_rng(1).normal(size=(8, DIMENSION))
    mixed = tracking.accelerated_gossip(ring(8), z, 7)
    assert np.abs(mixed - z).max() > 0.1
    np.testing.assert_allclose(mixed.mean(0), z.mean(0), rtol=0, atol=1e-15)


def test_two_rounds_of_accelerated_gossip():
    """The matrix is (1 + eta)^2 W^2 - eta (1 + eta) W - eta I, with lambda = 1/3."""
    W = ring(4)
    root = np.sqrt(8 / 9)
    eta = (1 - root) / (1 + root)
    expected = (1 + eta) ** 2 * W @ W - eta * (1 + eta) * W - eta * np.eye(4)
    mixed = tracking.accelerated_gossip(W, np.eye(4), 2)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-15)


def test_most_negative_eigenvalue_sets_the_momentum():
    """The eigenvalue -1/2 gives lambda = 1/2; the complete graph gives 0."""
    root = np.sqrt(3 / 4)
    expected = (1 - root) / (1 + root)
    W = (9 * ring(4) - np.eye(4)) / 8  # eigenvalues 1, 1/4, 1/4, -1/2
    np.testing.assert_allclose(tracking.momentum_of_gossip(W), expected, rtol=1e-14)
    W = np.array([[1, 3], [3, 1]]) / 4  # eigenvalues 1, -1/2
    np.testing.assert_allclose(tracking.momentum_of_gossip(W), expected, rtol=1e-14)
    np.testing.assert_allclose(tracking.momentum_of_gossip(complete(4)), 0, atol=1e-15)


# DeTAG


def test_detag_tracker_means_equal_gradient_means():
    grad_fn, _ = quadratics(5, noise=1.0)
    run = tracking.detag_phases(grad_fn, X0, ring(5), 0.1, 10, 3, momentum=0.5)
    assert run.X.shape == run.Y.shape == (11, 5, DIMENSION)
    np.testing.assert_array_equal(run.Y[0], 0.0)
    np.testing.assert_allclose(run.Y[1:].mean(1), run.G.mean(1), rtol=0, atol=1e-13)
    assert np.abs(run.Y[1:] - run.G).max() > 0.1


def test_detag_phases_are_a_linear_recursion():
    """Repeats each phase with the matrix of two accelerated rounds, on a ring of 4."""
    grad_fn, _ = quadratics(4, noise=1.0)
    W = ring(4)
    root = np.sqrt(8 / 9)
    eta = (1 - root) / (1 + root)
    P = (1 + eta) ** 2 * W @ W - eta * (1 + eta) * W - eta * np.eye(4)
    run = tracking.detag_phases(grad_fn, X0, W, lambda t: 0.3 / (t + 1), 5, 2)
    G = [np.zeros((4, DIMENSION))]
    for k in range(5):
        G.append(
            np.array(
                [
                    (grad_fn(2 * k, i, x) + grad_fn(2 * k + 1, i, x)) / 2
                    for i, x in enumerate(run.X[k])
                ]
            )
        )
        np.testing.assert_allclose(run.G[k], G[k + 1], rtol=1e-13)
        X = P @ run.X[k] - 0.3 / (2 * k + 2) * P @ run.Y[k]
        np.testing.assert_allclose(run.X[k + 1], X, rtol=0, atol=1e-14)
        Y = P @ run.Y[k] + G[k + 1] - G[k]
        np.testing.assert_allclose(run.Y[k + 1], Y, rtol=0, atol=1e-14)


def test_detag_on_the_complete_graph_is_delayed_heavy_ball():
    """All workers follow v = .5 v + gbar(x_{k-1}), x_{k+1} = x_k - gamma v."""
    grad_fn, _ = quadratics(4, noise=1.0)
    run = tracking.detag_phases(grad_fn, X0, complete(4), 0.1, 8, 3, momentum=0.5)
    x, v, delayed = X0, np.zeros(DIMENSION), np.zeros(DIMENSION)
    for k in range(9):
        np.testing.assert_allclose(run.X[k], np.tile(x, (4, 1)), rtol=0, atol=1e-13)
        v = 0.5 * v + delayed
        delayed = np.mean(
            [grad_fn(3 * k + r, i, x) for r in range(3) for i in range(4)], axis=0
        )
        x = x - 0.1 * v


def test_detag_changes_parameters_only_after_a_phase():
    grad_fn, _ = quadratics(4, noise=1.0)
    trajectory = tracking.detag(grad_fn, X0, ring(4), 0.1, 14, 4)
    assert trajectory.shape == (15, 4, DIMENSION)
    changed = np.abs(np.diff(trajectory, axis=0)).max((1, 2)) > 1e-3
    # The first phase has no tracker yet, and 14 iterations complete only three phases.
    np.testing.assert_array_equal(np.flatnonzero(changed), [7, 11])


def test_detag_reaches_the_optimum_with_a_constant_step():
    grad_fn, optimum = quadratics(5)
    W = 0.5 * ring(5) + 0.5 * np.eye(5)
    trajectory = tracking.detag(grad_fn, X0, W, 0.2, 600, 4)
    np.testing.assert_allclose(
        trajectory[-1], np.tile(optimum, (5, 1)), rtol=0, atol=1e-11
    )


# DeFacto


def test_defacto_is_minibatch_sgd():
    """Path of 3: the middle worker collects, then sends; phases of 2 + 2 iterations."""
    collect = np.array([[0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]])
    send = np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(send @ collect, complete(3))
    grad_fn, _ = quadratics(3, noise=1.0)
    trajectory = tracking.defacto(
        grad_fn, X0, [collect, send], lambda t: 0.3 / (t + 1), 15, 2
    )
    assert trajectory.shape == (16, 3, DIMENSION)
    x = X0
    for k in range(4):
        held = trajectory[4 * k : 4 * k + 4]
        expected = np.broadcast_to(x, (4, 3, DIMENSION))
        np.testing.assert_allclose(held, expected, rtol=0, atol=1e-14)
        x = x - 0.3 / (4 * k + 4) * np.mean(
            [grad_fn(4 * k + r, i, x) for r in range(2) for i in range(3)], axis=0
        )
