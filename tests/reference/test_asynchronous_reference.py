"""The asynchronous reference against results by hand, closed forms, brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import asynchronous

D, K = 3, 12  # dimension, ticks
X0 = [1, -2, 3]  # integers: the references must compute in float64
# The trace of two workers that take 2 and 3 seconds; any staleness up to k is valid.
WORKERS = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
STALENESS = [0, 1, 1, 0, 2, 1, 1, 1, 0, 2, 1, 1]
OPTIMIZERS = {
    "sgd": asynchronous.sgd(0.1),
    "momentum_sgd": asynchronous.momentum_sgd(0.1, 0.8),
    "adam": asynchronous.adam(0.1, 0.8, 0.7, 1e-3),
    "amsgrad": asynchronous.amsgrad(0.1, 0.8, 0.7, 1e-3, 0.2, asynchronous.ball(3)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
few = settings(max_examples=60, deadline=None)


def gradient(w, x, k):
    noise = np.random.default_rng((w, k)).normal(size=np.shape(x))
    return (w + 1) * x**3 / 9 + noise


def from_table(values):
    """Gradients that depend on k only."""
    return lambda w, x, k: values[k]


def recorder(gradient):
    """Returns the same function and a list that records the arguments of its calls."""
    calls = []

    def recording(w, x, k):
        calls.append((w, tuple(x), k))
        return gradient(w, x, k)

    return recording, calls


def alone(optimizer, gradients, x0=0.0):
    """The iterates of an optimizer with the given gradients, [K + 1]."""
    x0 = np.reshape(x0, -1)
    zeros = [0] * len(gradients)
    return asynchronous.replay(x0, from_table(gradients), zeros, zeros, optimizer)[:, 0]


def close(actual, expected, rtol=1e-12, atol=1e-13):
    expected = np.broadcast_to(expected, actual.shape)
    np.testing.assert_allclose(actual, expected, rtol, atol, equal_nan=False)


# Arrivals


def test_arrivals_by_hand():
    """Arrivals at 2, 3, 4, 6, 6, 8, 9 seconds."""
    arrivals = asynchronous.arrivals_from_speeds([[2], [3]], 7)
    assert arrivals == [(0, 0), (1, 1), (0, 1), (0, 0), (1, 2), (0, 1), (1, 1)]
    assert asynchronous.arrivals_from_speeds([[2], [3]], 12) == list(
        zip(WORKERS, STALENESS, strict=True)
    )
    assert asynchronous.arrivals_from_speeds([[3], [2]], 1) == [(1, 0)]
    assert asynchronous.arrivals_from_speeds([[3], [2]], 0) == []


def test_arrivals_of_changing_durations():
    """Arrivals of worker 0 at 1, 5, 6, 7, 11 and of worker 1 at 2, 4, 6, 8, 10 s."""
    assert asynchronous.arrivals_from_speeds([[1, 4, 1], [2, 2, 2]], 10) == [
        (0, 0),
        (1, 1),
        (1, 0),
        (0, 2),
        (0, 0),
        (1, 2),
        (0, 1),
        (1, 1),
        (1, 0),
        (0, 2),
    ]


def test_simultaneous_arrivals():
    """Arrivals of worker 0 at 2 and 2 and of worker 1 at 1, 2, 3 seconds."""
    arrivals = asynchronous.arrivals_from_speeds([[2, 0, 9], [1, 1, 1]], 5)
    assert arrivals == [(1, 0), (0, 1), (0, 0), (1, 2), (1, 0)]


def test_the_clock_is_a_float64_sum():
    """In float64, 0.1 + 0.1 + 0.1 > 0.3, and 2^24 + 1 > 2^24, unlike in float32."""
    arrivals = asynchronous.arrivals_from_speeds([[0.1], [0.3]], 4)
    assert arrivals == [(0, 0), (0, 0), (1, 2), (0, 1)]
    seconds = np.array([[2**24, 1], [2**24, 2**24]], dtype=np.float32)
    arrivals = asynchronous.arrivals_from_speeds(seconds, 3)
    assert arrivals == [(0, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_workers_take_turns(n):
    arrivals = asynchronous.arrivals_from_speeds(np.full((n, 1), 0.7), 4 * n)
    assert arrivals == [(k % n, min(k, n - 1)) for k in range(4 * n)]


def test_a_worker_three_times_slower():
    """In 3 seconds, 9 gradients of the other workers and 1 of the slow one arrive."""
    arrivals = asynchronous.arrivals_from_speeds([[1], [3], [1], [1]], 1000)
    staleness = [tau for w, tau in arrivals if w == 1]
    assert len(staleness) == 100
    assert staleness == [7] + 99 * [9]
    assert {tau for w, tau in arrivals[10:] if w != 1} == {2, 3}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
@few
def test_arrivals_by_sorting(n, gradients, seed):
    """Sorts the arrivals of all workers by time, then by worker."""
    seconds = np.random.default_rng(seed).integers(0, 4, (n, gradients))
    arrivals = asynchronous.arrivals_from_speeds(seconds, 20)
    assert len(arrivals) == 20
    times = np.cumsum(np.tile(seconds, 20), axis=1)[:, :20]
    events = sorted((times[w, i], w, i) for w in range(n) for i in range(20))
    workers = [w for _, w, _ in events[:20]]
    assert [w for w, _ in arrivals] == workers
    for k, (w, tau) in enumerate(arrivals):
        assert w not in workers[k - tau : k]
        assert tau == k or workers[k - tau - 1] == w


# Replays


def test_replay_by_hand():
    """x - g / 2 with g the previous x: 1, 1/2, 0, -1/4, -1/4, -1/8, 0."""
    iterates = asynchronous.replay(
        [1], lambda w, x, k: x, [0] * 6, [0] + [1] * 5, asynchronous.sgd(0.5)
    )
    np.testing.assert_array_equal(
        iterates, [[1], [0.5], [0], [-0.25], [-0.25], [-0.125], [0]]
    )


def test_delayed_by_hand():
    """x - g_j / 2 with g_j = x_j + j, for j = 0, 0, 1, 1, 0: g_0 = 1, g_1 = 3/2."""
    iterates = asynchronous.delayed(
        [1], lambda w, x, k: x + k, [0, 1, 1, 2, 9], asynchronous.sgd(0.5)
    )
    np.testing.assert_array_equal(iterates, [[1], [0.5], [0], [-0.75], [-1.5], [-2]])


def test_synchronous_by_hand():
    """x - g / 2 with g = 3, 5/2, 9/4, the means of x + k, x + k + 2, x + k + 4."""
    iterates = asynchronous.synchronous(
        [1], lambda w, x, k: x + k + 2 * w, 3, 3, asynchronous.sgd(0.5)
    )
    np.testing.assert_array_equal(iterates, [[1], [-0.5], [-1.75], [-2.875]])


@every_optimizer
def test_calls_of_the_gradient(name):
    """One call per tick, for its worker, at the iterate that the worker received."""
    optimizer = OPTIMIZERS[name]
    recording, calls = recorder(gradient)
    iterates = asynchronous.replay(X0, recording, WORKERS, STALENESS, optimizer)
    assert iterates.shape == (K + 1, D)
    assert calls == [
        (WORKERS[k], tuple(iterates[k - STALENESS[k]]), k) for k in range(K)
    ]
    recording, calls = recorder(gradient)
    iterates = asynchronous.delayed(X0, recording, STALENESS, optimizer)
    assert iterates.shape == (K + 1, D)
    assert calls == [(0, tuple(iterates[k]), k) for k in range(K)]
    recording, calls = recorder(gradient)
    iterates = asynchronous.synchronous(X0, recording, 2, K, optimizer)
    assert iterates.shape == (K + 1, D)
    assert calls == [(w, tuple(iterates[k]), k) for k in range(K) for w in (0, 1)]


@every_optimizer
def test_gradients_that_the_optimizer_receives(name):
    """Gradients computed in advance give the same iterates."""
    optimizer = OPTIMIZERS[name]
    zeros = [0] * K
    x = asynchronous.replay(X0, gradient, WORKERS, STALENESS, optimizer)
    G = [gradient(WORKERS[k], x[k - STALENESS[k]], k) for k in range(K)]
    y = asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
    np.testing.assert_array_equal(x, y)
    delays = [3, 0, 5, 1, 2, 3, 4, 0, 1, 20, 3, 2]
    x = asynchronous.delayed(X0, gradient, delays, optimizer)
    of = [0, 1, 0, 2, 2, 2, 2, 7, 7, 0, 7, 9]
    G = [gradient(0, x[j], j) for j in of]
    y = asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
    np.testing.assert_array_equal(x, y)
    x = asynchronous.synchronous(X0, gradient, 3, K, optimizer)
    G = [np.mean([gradient(w, x[k], k) for w in range(3)], axis=0) for k in range(K)]
    y = asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
    close(x, y)


@every_optimizer
def test_without_staleness_all_methods_are_equal(name):
    """All methods equal a plain loop."""
    optimizer = OPTIMIZERS[name]
    step, x = optimizer(), np.array(X0, dtype=np.float64)
    expected = [x]
    for k in range(K):
        x = step(x, gradient(0, x, k))
        expected.append(x)
    zeros = [0] * K
    for iterates in [
        asynchronous.replay(X0, gradient, zeros, zeros, optimizer),
        asynchronous.delayed(X0, gradient, zeros, optimizer),
        asynchronous.synchronous(X0, gradient, 1, K, optimizer),
    ]:
        np.testing.assert_array_equal(iterates, expected)


def test_replay_and_delayed_differ_in_the_sample():
    """They are equal if and only if the gradient depends on x only."""
    tau = [0, 1, 2, 1, 0, 3, 2, 2, 8, 5, 1, 4]
    optimizer = OPTIMIZERS["sgd"]

    def both(gradient):
        return (
            asynchronous.replay(X0, gradient, [0] * K, tau, optimizer),
            asynchronous.delayed(X0, gradient, tau, optimizer),
        )

    np.testing.assert_array_equal(*both(lambda w, x, k: x**3 / 9))
    x, y = both(gradient)
    np.testing.assert_array_equal(x[:2], y[:2])
    assert not np.isclose(x[2:], y[2:]).all(axis=1).any()


@every_optimizer
@pytest.mark.parametrize("bound", [0, 1])
def test_refused_gradients_leave_everything_unchanged(name, bound):
    """Iterates and optimizer state are as if the refused ticks had not occurred."""
    optimizer = OPTIMIZERS[name]
    G = np.random.default_rng(0).normal(size=(K, D))
    recording, calls = recorder(from_table(G))
    iterates = asynchronous.replay(
        X0, recording, WORKERS, STALENESS, optimizer, max_staleness=bound
    )
    assert [k for _, _, k in calls] == list(range(K))
    taken = [k for k in range(K) if STALENESS[k] <= bound]
    zeros = [0] * len(taken)
    expected = asynchronous.replay(X0, from_table(G[taken]), zeros, zeros, optimizer)
    steps = np.cumsum([0] + [k in taken for k in range(K)])
    np.testing.assert_array_equal(iterates, expected[steps])


def test_no_gradient_is_refused_within_the_bound():
    for bound in (None, 2):
        iterates = asynchronous.replay(
            X0, gradient, WORKERS, STALENESS, OPTIMIZERS["adam"], bound
        )
        expected = asynchronous.replay(
            X0, gradient, WORKERS, STALENESS, OPTIMIZERS["adam"]
        )
        np.testing.assert_array_equal(iterates, expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        asynchronous.sgd(0.6),
        asynchronous.momentum_sgd(0.6, 0.0),
        asynchronous.adam(0.6, 0.5, 0.5, 0.0),
        asynchronous.amsgrad(0.6, 0.5, 0.5, 0.0),
    ],
)
def test_staleness_aware_by_hand(optimizer):
    """Steps for g = 1 are 0.6, times 1, 1, 1/2, 1/3 for tau = 0, 1, 2, 3."""
    iterates = asynchronous.replay(
        [0],
        lambda w, x, k: np.ones(1),
        [0] * 4,
        [0, 1, 2, 3],
        optimizer,
        staleness_aware=True,
    )
    close(iterates[:, 0], [0, -0.6, -1.2, -1.5, -1.7])
    iterates = asynchronous.replay(
        [0], lambda w, x, k: np.ones(1), [0] * 4, [0, 1, 2, 3], optimizer
    )
    close(iterates[:, 0], [0, -0.6, -1.2, -1.8, -2.4])


@every_optimizer
def test_staleness_does_not_affect_the_moments(name):
    """Without weight decay, staleness shortens one step and leaves the others."""
    optimizer = OPTIMIZERS[name]
    if name == "amsgrad":
        optimizer = asynchronous.amsgrad(0.1, 0.8, 0.7, 1e-3)
    G = np.random.default_rng(1).normal(size=(K, D))
    tau = [0, 0, 2] + [0] * (K - 3)
    steps = [
        np.diff(
            asynchronous.replay(
                X0, from_table(G), [0] * K, tau, optimizer, staleness_aware=aware
            ),
            axis=0,
        )
        for aware in (False, True)
    ]
    steps[0][2] /= 2
    close(steps[1], steps[0])


def test_the_divisor_comes_before_the_projection():
    """From 0, a step of 6 / 2 into a box with upper limit 2 ends at 2, not at 1."""
    optimizer = asynchronous.amsgrad(6, 0, 0, 0, projection=asynchronous.box(-9, 2))
    x = asynchronous.replay(
        [0],
        from_table(np.array([[1], [-1], [-1]])),
        [0] * 3,
        [0, 1, 2],
        optimizer,
        staleness_aware=True,
    )
    np.testing.assert_array_equal(x[:, 0], [0, -6, 0, 2])


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ([0, 2], "staleness 2 at tick 1, expected 0 to 1"),
        ([0, -1], "staleness -1 at tick 1, expected 0 to 1"),
        ([1, 0], "staleness 1 at tick 0, expected 0 to 0"),
    ],
)
def test_staleness_must_lie_between_0_and_k(tau, message):
    with pytest.raises(ValueError, match=message):
        asynchronous.replay(X0, gradient, [0, 0], tau, OPTIMIZERS["sgd"])


def test_workers_and_staleness_must_have_equal_lengths():
    with pytest.raises(ValueError, match="shorter"):
        asynchronous.replay(X0, gradient, [0, 0], [0], OPTIMIZERS["sgd"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_computes_in_float64_and_keeps_its_iterates(dtype):
    """Gradients may be float32, write to x, or return the same array each time."""
    shared = np.zeros(D, dtype)

    def writing(w, x, k):
        shared[:] = gradient(w, x, k)
        x[:] = np.nan
        return shared

    def pure(w, x, k):
        return np.float64(dtype(gradient(w, x, k)))

    x0 = np.array(X0)
    optimizer = OPTIMIZERS["momentum_sgd"]
    for x, y in [
        [
            asynchronous.replay(x0, g, WORKERS, STALENESS, optimizer, 1)
            for g in (writing, pure)
        ],
        [asynchronous.delayed(x0, g, STALENESS, optimizer) for g in (writing, pure)],
        [asynchronous.synchronous(x0, g, 3, K, optimizer) for g in (writing, pure)],
    ]:
        assert x.dtype == np.float64
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(x0, X0)


# Optimizers


def test_sgd_by_hand():
    np.testing.assert_array_equal(
        alone(asynchronous.sgd(2), [1, -3, 0.5], 1), [1, -1, 5, 4]
    )


def test_momentum_sgd_by_hand():
    """The momentum is m = 2, 2, -1, -1/2."""
    optimizer = asynchronous.momentum_sgd(2, 0.5)
    np.testing.assert_array_equal(
        alone(optimizer, [2, 1, -2, 0], 1), [1, -3, -7, -5, -4]
    )


def test_adam_by_hand():
    """With bias correction, m = 1, 7/3 and v = 1, 39/7."""
    x = alone(asynchronous.adam(2, 0.5, 0.75, 3), [1, 3])
    close(np.diff(x), [-2 / 4, -2 * (7 / 3) / (np.sqrt(39 / 7) + 3)])


def test_amsgrad_by_hand():
    """m = 2, 2, 1; v = 4, 4, 3; vhat = 4, 4, 4; alpha_k as written below."""
    x = alone(asynchronous.amsgrad(2, 0.5, 0.75, 3), [4, 2, 0])
    alphas = [2, 2 * np.sqrt(7 / 16) / (3 / 4), 2 * np.sqrt(37 / 64) / (7 / 8)]
    close(np.diff(x), -np.array(alphas) * [2 / 5, 2 / 5, 1 / 5])


@pytest.mark.parametrize("g", [-3.0, 1e-3, 70.0])
def test_first_steps(g):
    """lr g / (|g| + e) with e = eps for Adam, e = eps / sqrt(1 - b2) for AMSGrad."""
    for eps in (0.0, 0.1):
        x = alone(asynchronous.adam(0.3, 0.9, 0.96, eps), [g])
        close(x, [0, -0.3 * g / (abs(g) + eps)])
        x = alone(asynchronous.amsgrad(0.3, 0.9, 0.96, eps), [g])
        close(x, [0, -0.3 * g / (abs(g) + 5 * eps)])


def weighted_means(b, values):
    """sum_j b^{k-j} v_j / sum_j b^{k-j} over j = 1..k for each k = 1..K."""
    return np.array(
        [
            np.average(values[: k + 1], axis=0, weights=b ** np.arange(k, -1.0, -1))
            for k in range(len(values))
        ]
    )


def random_gradients(factor):
    """Gradients of K steps, whose entries differ in sign and magnitude."""
    G = np.random.default_rng(2).normal(size=(K, D)) * [1, 1e-2, 10]
    return G * factor ** np.arange(K)[:, None]


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_adam_in_closed_form(factor):
    G, zeros = random_gradients(factor), [0] * K
    optimizer = asynchronous.adam(0.2, 0.6, 0.8, 0.05)
    x = asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
    m, v = weighted_means(0.6, G), weighted_means(0.8, G**2)
    close(np.diff(x, axis=0), -0.2 * m / (np.sqrt(v) + 0.05), 1e-10)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_amsgrad_in_closed_form(factor):
    """vhat is the elementwise maximum over all steps."""
    G, zeros = random_gradients(factor), [0] * K
    optimizer = asynchronous.amsgrad(0.2, 0.6, 0.8, 0.05)
    x = asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
    corrections = 1 - 0.8 ** np.arange(1, K + 1)[:, None]
    v = weighted_means(0.8, G**2) * corrections
    v_max = np.array([v[: k + 1].max(axis=0) for k in range(K)])
    m = weighted_means(0.6, G)
    expected = -0.2 * np.sqrt(corrections) * m / (np.sqrt(v_max) + 0.05)
    close(np.diff(x, axis=0), expected, 1e-10)


def test_amsgrad_is_adam_while_v_grows():
    zeros = [0] * K
    for factor, same in [(3.0, True), (0.3, False)]:
        G = np.ones((K, D)) * factor ** np.arange(K)[:, None]
        x, y = (
            asynchronous.replay(X0, from_table(G), zeros, zeros, optimizer)
            for optimizer in (
                asynchronous.adam(0.1, 0.8, 0.7, 0.0),
                asynchronous.amsgrad(0.1, 0.8, 0.7, 0.0),
            )
        )
        assert np.allclose(x, y, rtol=1e-12) == same


def test_default_parameters():
    """b1 = 0.9, b2 = 0.999, eps = 1e-8, as published."""
    for optimizer in (asynchronous.adam, asynchronous.amsgrad):
        for scale in (1, 1e-7):
            gradients = scale * np.array([1, -2, 3, 0.5])
            np.testing.assert_array_equal(
                alone(optimizer(0.1), gradients),
                alone(optimizer(0.1, 0.9, 0.999, 1e-8), gradients),
            )


def test_weight_decay_by_hand():
    """With g = x / 2 and vhat = 4, steps of 3 g / (2 + 1) go from 4 to 2, 1, and 1/2.

    The staleness of 2 does not matter, because the master's iterate decays.
    """
    optimizer = asynchronous.amsgrad(3, 0, 0, 1, weight_decay=0.5)
    x = asynchronous.replay(
        [4], lambda w, x, k: np.zeros(1), [0] * 3, [0, 1, 2], optimizer
    )
    np.testing.assert_array_equal(x[:, 0], [4, 2, 1, 0.5])


def test_weight_decay_affects_the_moments():
    """Without staleness, weight decay equals an additional term of the gradient."""
    x, y = (
        asynchronous.replay(X0, g, [0] * K, [0] * K, optimizer)
        for g, optimizer in [
            (gradient, asynchronous.amsgrad(0.1, 0.8, 0.7, 1e-3, 0.3)),
            (
                lambda w, x, k: gradient(w, x, k) + 0.3 * x,
                asynchronous.amsgrad(0.1, 0.8, 0.7, 1e-3),
            ),
        ]
    )
    close(x, y)


@every_optimizer
def test_every_run_starts_with_a_new_state(name):
    runs = [
        asynchronous.replay(X0, gradient, WORKERS, STALENESS, OPTIMIZERS[name])
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*runs)


def test_amsgrad_projects_every_iterate():
    """Each step starts at the projected iterate; x_0 itself is not projected."""
    signs = [-1, -1, 1, 1, 1, -1]
    for projection, expected in [
        (None, [5, 7, 9, 7, 5, 3, 5]),
        (asynchronous.box(2.5, 6), [5, 6, 6, 4, 2.5, 2.5, 4.5]),
        (asynchronous.ball(3), [5, 3, 3, 1, -1, -3, -1]),
    ]:
        optimizer = asynchronous.amsgrad(2, 0, 0, 0, projection=projection)
        np.testing.assert_array_equal(alone(optimizer, signs, 5), expected)


# Projections

SETS = {
    "box": (asynchronous.box(-0.5, 1), lambda y: np.all((y >= -0.5) & (y <= 1))),
    "ball": (asynchronous.ball(1.5), lambda y: np.linalg.norm(y) <= 1.5 + 1e-12),
    "simplex": (
        asynchronous.simplex(1.5),
        lambda y: np.all(y >= 0) and abs(y.sum() - 1.5) < 1e-12,
    ),
}
every_set = pytest.mark.parametrize("name", SETS)
points = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=1, max_size=5)


def test_box_by_hand():
    np.testing.assert_array_equal(
        asynchronous.box(-1, 2)(np.array([-3.0, -1.0, 0.5, 2.0, 7.0])),
        [-1, -1, 0.5, 2, 2],
    )
    np.testing.assert_array_equal(
        asynchronous.box(np.array([-1, 0]), np.array([1, 5]))(np.array([3.0, -3.0])),
        [1, 0],
    )


def test_ball_by_hand():
    """The vector (3, -4) has norm 5."""
    x = np.array([3.0, -4.0])
    close(asynchronous.ball(1)(x), [0.6, -0.8])
    np.testing.assert_array_equal(asynchronous.ball(5)(x), x)
    np.testing.assert_array_equal(asynchronous.ball(6)(x), x)
    np.testing.assert_array_equal(asynchronous.ball(0)(0 * x), [0, 0])


def test_simplex_by_hand():
    for x, total, expected in [
        ([0.5, 0.5], 1, [0.5, 0.5]),
        ([3, 1], 1, [1, 0]),
        ([1, 3], 1, [0, 1]),
        ([2, 1.5], 1, [0.75, 0.25]),
        ([-1, 0, -1], 3, [2 / 3, 5 / 3, 2 / 3]),
        ([1, 0, -5], 2, [1.5, 0.5, 0]),
        ([2, 1, 1], 1, [1, 0, 0]),
        ([7], 2, [2]),
        ([-7], 2, [2]),
    ]:
        p = asynchronous.simplex(total)(np.array(x, dtype=np.float64))
        close(p, expected)


@every_set
@given(points, st.integers(0, 999))
@few
def test_projections_are_nearest_points(name, x, seed):
    """<x - p, y - p> <= 0 for the point y of the set with the largest <x - p, y>.

    Projections are also idempotent, nonexpansive, and the identity on the set.
    """
    project, contains = SETS[name]
    x = np.array(x)
    before = x.copy()
    p = project(x)
    np.testing.assert_array_equal(x, before)
    assert p.shape == x.shape
    assert contains(p)
    if name == "box":
        extreme = np.where(x > p, 1, -0.5)
    elif name == "ball":
        extreme = 1.5 * (x - p) / max(np.linalg.norm(x - p), 1e-300)
    else:
        extreme = 1.5 * (np.arange(len(x)) == np.argmax(x - p))
    assert contains(extreme)
    assert (x - p) @ (extreme - p) <= 1e-12
    close(project(p), p)
    if contains(x):
        close(p, x)
    other = x + np.random.default_rng(seed).normal(size=len(x))
    moved = np.linalg.norm(project(other) - p)
    assert moved <= np.linalg.norm(other - x) + 1e-12


@given(points, st.sampled_from([0.25, 1, 3]))
@few
def test_simplex_by_brute_force(x, total):
    """The nearest feasible point among projections onto the planes of all supports."""
    x = np.array(x)
    nearest, best = None, np.inf
    for r in range(1, len(x) + 1):
        for support in itertools.combinations(range(len(x)), r):
            p, on = np.zeros(len(x)), list(support)
            p[on] = x[on] + (total - x[on].sum()) / r
            if p.min() >= 0 and np.linalg.norm(p - x) < best:
                nearest, best = p, np.linalg.norm(p - x)
    close(asynchronous.simplex(total)(x), nearest)
