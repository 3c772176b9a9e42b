"""The local-update references against closed forms and special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from . import averaging, gossip
from . import local_updates as local

N, D, STEPS = 4, 3, 13  # workers, dimension
X0 = [1, -2, 3]  # integers: the references must compute in float64
COMPLETE = np.full((N, N), 1 / N)
RING = np.array([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]]) / 4
# Worker 0 sends to 1 and 2, others send to the next worker: only column-stochastic.
PUSH = np.array([[2, 0, 0, 3], [2, 3, 0, 0], [2, 3, 3, 0], [0, 0, 3, 3]]) / 6
# Two hubs with 1/4 and 3/4 of the data, three workers each, one of them without data.
SHARES = np.array([[0.1, 0.15, 0.0], [0.25, 0.2, 0.3]])
HUB = local.hub_matrix(np.full((2, 2), 0.5), SHARES.sum(1))
RNG = np.random.default_rng(0)
CURVATURES, MINIMIZERS = RNG.uniform(0.5, 1.5, (N, D)), RNG.normal(size=(N, D))


def gamma(t):
    return 0.3 / (t + 2)


def noise(t, i):
    return np.random.default_rng((t, i)).normal(size=D)


def exact_grad_fn(t, i, x):
    return CURVATURES[i] * (x - MINIMIZERS[i])


def grad_fn(t, i, x):
    return exact_grad_fn(t, i, x) + noise(t, i)


def constant(values):
    return lambda t, i, x: np.array(values[i], dtype=np.float64)


def at_first(values):
    return lambda t, i, x: values[i] * (t == 0)


def always(t, i):
    return True


def close(actual, expected, rtol=1e-12, atol=1e-13):
    expected = np.broadcast_to(expected, actual.shape)
    np.testing.assert_allclose(actual, expected, rtol, atol, equal_nan=False)


adapt_then_combine = functools.partial(gossip.d_psgd, order="adapt_then_combine")


def one_hub(g, x, r, s, tau, q=1, momentum=0.0):
    H, shares = np.eye(1), np.full((1, N), 1 / N)
    return local.multi_level(g, x, H, shares, always, r, s, tau, q, momentum)


METHODS = {  # of (grad_fn, x0, learning_rate, steps)
    "local_sgd": lambda g, x, r, s: local.local_sgd(g, x, N, r, s, 3),
    "multi_level": functools.partial(one_hub, tau=3),
    "slowmo": lambda g, x, r, s: local.slowmo(g, x, N, r, s, 3, 0.7, 0.6),
    "diloco": lambda g, x, r, s: local.diloco(g, x, N, r, s, 3, 1, 0, [[1], [0, 2]]),
    "qg_dsgdm": lambda g, x, r, s: local.qg_dsgdm(g, x, [RING], r, s, 0.6, 0.1),
    "sgp": lambda g, x, r, s: local.sgp(g, x, [PUSH], r, s),
}
HEAVY_BALLS = {
    "multi_level": functools.partial(one_hub, tau=3, momentum=0.6),
    "slowmo": lambda g, x, r, s: local.slowmo(g, x, N, r, s, 3, 1.0, 0.0, 0.6),
    "sgp": lambda g, x, r, s: local.sgp(g, x, [RING], r, s, 0.6),
}


@pytest.mark.parametrize("name", METHODS)
def test_trajectories_are_the_points_of_the_gradients(name):
    taken = np.full((STEPS, N, D), np.nan)

    def recording(t, i, x):
        taken[t, i] = x
        return grad_fn(t, i, x)

    trajectory = METHODS[name](recording, X0, gamma, STEPS)
    assert trajectory.shape == (STEPS + 1, N, D)
    assert trajectory.dtype == np.float64
    np.testing.assert_array_equal(trajectory[:-1], taken)
    np.testing.assert_array_equal(taken[0], np.tile(X0, (N, 1)))


@pytest.mark.parametrize("name", HEAVY_BALLS)
def test_heavy_ball_of_constant_gradients(name):
    """m_t = (1 - .6^{t+1}) / (1 - .6) times the gradient; averaging keeps means."""
    gradients = constant([[1], [2], [3], [4]])
    trajectory = HEAVY_BALLS[name](gradients, [0], gamma, STEPS)
    moves = [gamma(t) * (1 - 0.6 ** (t + 1)) / 0.4 for t in range(STEPS)]
    close(trajectory[1:, :, 0].mean(1), -2.5 * np.cumsum(moves))


# Local SGD and Multi-Level Local SGD


def test_local_sgd_on_quadratics():
    """Between two averages, x_i = b_i + (1 - gamma a_i)^r (x - b_i)."""
    trajectory = local.local_sgd(exact_grad_fn, X0, N, 0.2, 12, 4)
    x = np.array(X0)
    for t in range(13):
        local_x = MINIMIZERS + (1 - 0.2 * CURVATURES) ** (t % 4) * (x - MINIMIZERS)
        close(trajectory[t], local_x)
        if t % 4 == 3:
            x = (MINIMIZERS + (1 - 0.2 * CURVATURES) * (local_x - MINIMIZERS)).mean(0)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("tau", [1, 3])
def test_one_hub_is_local_sgd_and_all_reduce_for_period_1(tau, q):
    expected = local.local_sgd(grad_fn, X0, N, gamma, STEPS, tau)
    close(one_hub(grad_fn, X0, gamma, STEPS, tau, q), expected)
    if tau == 1:
        close(expected, averaging.all_reduce_sgd(grad_fn, X0, N, gamma, STEPS))


def test_hubs_of_one_worker_are_gossip():
    """With equal shares, H = W and each tick is adapt-then-combine gossip."""
    H = local.hub_matrix(RING, np.full(N, 1 / N))
    close(H, RING)
    shares = np.full((N, 1), 1 / N)
    trajectory = local.multi_level(grad_fn, X0, H, shares, always, gamma, STEPS, 1, 1)
    close(trajectory, adapt_then_combine(grad_fn, X0, [RING], gamma, STEPS))


def test_hub_matrix():
    close(HUB, [[1 / 2, 1 / 2], [1 / 6, 5 / 6]])  # b = (1/4, 3/4)
    b = np.array([0.4, 0.1, 0.3, 0.2])
    H = local.hub_matrix(RING, b)
    close(H.sum(1), 1)
    close(b @ H, b)
    np.testing.assert_array_equal(H > 0, RING > 0)


def test_averages_within_and_between_hubs():
    """Worker i's first step goes along axis i; tau = 2, q = 4; weights by hand."""
    within = np.array([[0.4, 0.6, 0, 0, 0, 0], [0, 0, 0, 1 / 3, 4 / 15, 0.4]])
    between = np.array([[1 / 2, 1 / 2], [1 / 6, 5 / 6]]) @ within
    trajectory = local.multi_level(
        at_first(-np.eye(6)), np.zeros(6), HUB, SHARES, always, 1.0, 11, 2, 4
    )
    close(trajectory[1], np.eye(6))
    for k in range(2, 12):
        close(trajectory[k], np.repeat(within if k < 8 else between, 3, axis=0))


def test_the_weighted_mean_moves_by_the_weighted_gradients():
    """The active workers' gradients move the weighted mean in each tick."""

    def operates(t, i):
        return (t + i) % 3 != 0

    trajectory = local.multi_level(
        lambda t, i, x: noise(t, i), X0, HUB, SHARES, operates, 0.1, 24, 2, 2
    )
    b = SHARES.ravel()
    expected = [
        -0.1 * sum(b[i] * noise(t, i) for i in range(6) if operates(t, i))
        for t in range(24)
    ]
    close(np.diff(np.einsum("i,tid->td", b, trajectory), axis=0), expected)


def test_operating_every_third_tick_slows_a_worker_down():
    """Momentum counts the worker's steps; step sizes count ticks. No averages."""

    def run(operates, learning_rate):
        return local.multi_level(
            exact_grad_fn,
            X0,
            HUB,
            SHARES[:, :2],
            operates,
            learning_rate,
            STEPS,
            99,
            1,
            0.6,
        )

    slowed = run(lambda t, i: i != 2 or t % 3 == 1, gamma)
    expected = run(always, gamma)
    steps_taken = [(t + 1) // 3 for t in range(STEPS + 1)]
    expected[:, 2] = run(always, lambda step: gamma(3 * step + 1))[steps_taken, 2]
    np.testing.assert_array_equal(slowed, expected)


# SlowMo and DiLoCo


@pytest.mark.parametrize("period", [1, 3])
def test_slowmo_without_slow_momentum_is_local_sgd(period):
    trajectory = local.slowmo(grad_fn, X0, N, gamma, STEPS, period, 1.0, 0.0)
    close(trajectory, local.local_sgd(grad_fn, X0, N, gamma, STEPS, period))


def test_two_periods_of_slowmo():
    """By hand: gradients 0 and 2, gamma 1, 3, 2, 4, slow rate 1/2 and momentum 1/4.

    u_1 = 4 / 2, x_2 = -1/2 * 2 * 2; u_2 = 1/4 * 2 + 6 / 3, x_4 = x_2 - 1/2 * 3 * 5/2.
    """
    gradients, gammas = constant([[0], [2]]), [1, 3, 2, 4].__getitem__
    trajectory = local.slowmo(gradients, [0], 2, gammas, 4, 2, 0.5, 0.25)
    expected = [[0, 0], [0, -2], [-2, -2], [-2, -6], [-5.75, -5.75]]
    close(trajectory[..., 0], expected)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_diloco_of_one_worker_and_period_1_is_adamw(x64, standard_promotion, options):
    fragments = [[2], [0, 1]]
    trajectory = local.diloco(
        grad_fn, X0, 1, gamma, STEPS, 1, 1.0, 0.0, fragments, **options
    )
    optimizer = optax.adamw(gamma, **options)
    x = jnp.array(X0, dtype=jnp.float64)
    state = optimizer.init(x)
    update = jax.jit(optimizer.update)
    for t in range(STEPS):
        updates, state = update(jnp.array(grad_fn(t, 0, np.array(x))), state, x)
        x = x + updates
        assert x.dtype == jnp.float64
        close(trajectory[t + 1, 0], x, rtol=1e-9)


def test_outer_nesterov_steps():
    """By hand: Adam moves worker 0 by -1 per iteration, worker 1 stays; period 4.

    Outer rate 1/2 and momentum 1/4. Workers exchange coordinate 1 after iterations 2
    (D = 1), 6, and 10 (D = 2), and coordinate 0 after 4, 8, and 12 (D = 2).
    """
    gradients, fragments = constant([[1, 1], [0, 0]]), [[1], [0]]
    trajectory = local.diloco(
        gradients, [0, 0], 2, 1.0, 12, 4, 0.5, 0.25, fragments, 0.0
    )
    thetas = [{0: 0, 4: -1.25, 8: -2.5625, 12: -3.890625}]
    thetas += [{0: 0, 2: -0.625, 6: -1.90625, 10: -3.2265625}]
    for j, theta in enumerate(thetas):
        for k in range(13):
            last = max(e for e in theta if e <= k)
            close(trajectory[k, :, j], theta[last] - np.array([k - last, 0]), atol=1e-6)


def test_when_fragments_are_exchanged():
    trajectory = local.diloco(grad_fn, X0, N, gamma, 12, 4, 0.7, 0.9, [[2], [0], [1]])
    agree = np.ptp(trajectory, axis=1) == 0
    for j, expected in enumerate([[0, 2, 6, 10], [0, 4, 8, 12], [0, 1, 5, 9]]):
        np.testing.assert_array_equal(np.flatnonzero(agree[:, j]), expected)


# Quasi-global momentum and push


@pytest.mark.parametrize("name", ["qg_dsgdm", "sgp"])
def test_doubly_stochastic_without_momentum_is_gossip(name):
    matrices = [RING, COMPLETE, np.eye(N)]
    options = {"momentum": 0.0, "factor": 0.1} if name == "qg_dsgdm" else {}
    trajectory = getattr(local, name)(grad_fn, X0, matrices, gamma, STEPS, **options)
    close(trajectory, adapt_then_combine(grad_fn, X0, matrices, gamma, STEPS))


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_qg_dsgdm_on_the_complete_graph(factor):
    """m_t = (1 - r^t) / (1 - .6) with r = 1 - .4 factor: heavy ball if factor = 1."""
    gradients = constant([[-2], [0], [1], [5]])  # their mean is 1
    trajectory = local.qg_dsgdm(gradients, [0], [COMPLETE], gamma, STEPS, 0.6, factor)
    r = 1 - 0.4 * factor
    moves = [gamma(t) * (0.6 * (1 - r**t) / 0.4 + 1) for t in range(STEPS)]
    close(trajectory[1:, :, 0], -np.cumsum(moves)[:, None])


def test_two_steps_of_qg_dsgdm():
    """By hand: W b = (3, 1) / 4, W W b = (5, 3) / 8; gamma 1, 1/2, gradients b.

    m_1 = .1 W b, x_2 = W (x_1 - 1/2 (.6 m_1 + b)).
    """
    b, Wb, WWb = np.array([[1, 0], [3 / 4, 1 / 4], [5 / 8, 3 / 8]])
    W = np.array([[3, 1], [1, 3]]) / 4
    gradients, gammas = constant(b[:, None]), [1, 0.5].__getitem__
    trajectory = local.qg_dsgdm(gradients, [0], [W], gammas, 2, 0.6, 0.1)
    close(trajectory[:, :, 0], [0 * b, -Wb, -1.03 * WWb - 0.5 * Wb])


def test_push_averages_exactly():
    """z_1 = P v / P 1 and z_t -> mean_i v_i, although P is not doubly stochastic."""
    v = RNG.normal(size=(N, D))
    trajectory = local.sgp(at_first(-v), np.zeros(D), [PUSH], 1.0, 99)
    close(trajectory[1], PUSH @ v / PUSH.sum(1)[:, None])
    close(trajectory[-1], v.mean(0))


def test_sgp_reaches_the_optimum_that_plain_gossip_misses():
    optimum = (CURVATURES * MINIMIZERS).sum(0) / CURVATURES.sum(0)
    arguments = (lambda t: 2 / (t + 10), 1500)
    pushed = local.sgp(exact_grad_fn, X0, [PUSH], *arguments)[-1]
    gossiped = gossip.d_psgd(exact_grad_fn, X0, [PUSH.T], *arguments)[-1]
    assert np.abs(pushed - optimum).max() < 0.01
    assert np.abs(gossiped - optimum).max() > 0.1
