"""Local updates, hubs, slow momentum, quasi-global momentum, and push-sum."""

import numpy as np

from .basics import gradients, mix, rate, same_start


def local_sgd(grad_fn, x0, workers, learning_rate, steps, period):
    """Local SGD, Stich, ICLR 2019, Algorithm 1.

    x_i <- x_i - gamma_t g_i(x_i); after each `period` iterations, x_i <- mean_j x_j.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      workers: number of workers n.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations; an unfinished period ends without an average.
      period: H, iterations between two averages.

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, workers)
    trajectory = [X]
    for t in range(steps):
        X = X - rate(learning_rate, t) * gradients(grad_fn, t, X)
        if (t + 1) % period == 0:
            X = same_start(sum(X) / workers, workers)
        trajectory.append(X)
    return np.array(trajectory)


def hub_matrix(W, hub_shares):
    """Metropolis-Hastings on W: H 1 = 1 and b^T H = b^T.

    H_dj = W_dj min(1, b_j / b_d) for j != d, H_dd = 1 - sum_{j != d} H_dj.

    Args:
      W: symmetric doubly stochastic matrix, [D, D].
      hub_shares: b, each hub's positive share of the data, summing to 1, [D].

    Returns:
      H, [D, D].
    """
    H = np.zeros((len(W), len(W)))
    for d in range(len(W)):
        for j in range(len(W)):
            if j != d:
                H[d, j] = W[d][j] * min(1, hub_shares[j] / hub_shares[d])
        H[d, d] = 1 - sum(H[d])
    return H


def multi_level(
    grad_fn, x0, H, shares, operates, learning_rate, steps, tau, q, momentum=0.0
):
    """Multi-Level Local SGD, Castiglia, Das and Patterson, ICLR 2021, Algorithm 1.

    Tick t, for each worker i = d N + k (worker k of hub d) that operates:
      m_i <- momentum m_i + g_i(x_i),  x_i <- x_i - gamma_t m_i.
    After each tau ticks, for each hub d, with v_dk = share_dk / sum_l share_dl:
      z_d = sum_k v_dk x_dk, and after each q tau ticks, z_d <- sum_j H_dj z_j;
      x_dk <- z_d for each k.
    The paper has no momentum; here, m_i stays with its worker. The step size is a
    schedule over ticks; in the paper, it is constant.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      H: mixing matrix of the hubs, [D, D]. Row d holds the weights of hub d.
      shares: share of the data of worker k of hub d, summing to 1, [D, N]. A share may
        be 0; the sum of a hub may not.
      operates: (t, i) -> whether worker i takes a step in tick t.
      learning_rate: gamma, a float or a callable of t.
      steps: number of ticks.
      tau: ticks between two averages within a hub.
      q: averages within a hub per average between hubs.
      momentum: heavy-ball coefficient of each worker.

    Returns:
      Parameters before each tick and after the last, [steps + 1, D N, d].
    """
    shares = np.array(shares, dtype=np.float64)
    hubs, workers_of_hub = shares.shape
    X = same_start(x0, hubs * workers_of_hub)
    M = np.zeros_like(X)
    trajectory = [X]
    for t in range(steps):
        X = X.copy()
        for i in range(len(X)):
            if operates(t, i):
                M[i] = momentum * M[i] + grad_fn(t, i, X[i].copy())
                X[i] = X[i] - rate(learning_rate, t) * M[i]
        if (t + 1) % tau == 0:
            Z = np.zeros((hubs, X.shape[1]))
            for d in range(hubs):
                for k in range(workers_of_hub):
                    v = shares[d, k] / sum(shares[d])
                    Z[d] += v * X[d * workers_of_hub + k]
            if (t + 1) % (q * tau) == 0:
                Z = mix(H, Z)
            for d in range(hubs):
                for k in range(workers_of_hub):
                    X[d * workers_of_hub + k] = Z[d]
        trajectory.append(X)
    return np.array(trajectory)


def slowmo(
    grad_fn,
    x0,
    workers,
    learning_rate,
    steps,
    period,
    slow_rate,
    slow_momentum,
    momentum=0.0,
):
    """SlowMo, Wang et al., ICLR 2020, Algorithm 1, on local heavy-ball SGD.

    Each iteration: m_i <- momentum m_i + g_i(x_i),  x_i <- x_i - gamma_t m_i.
    After each `period` iterations, with x the common model at the period's start:
      u <- slow_momentum u + (x - mean_i x_i) / gbar,  x <- x - slow_rate gbar u,
      x_i <- x for each i; the m_i are kept (the paper's "maintain").
    gbar is the mean of the period's gamma_t, which are equal in the paper.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      workers: number of workers n.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations; an unfinished period ends without an average.
      period: iterations between two slow steps.
      slow_rate: step size alpha of the slow step.
      slow_momentum: coefficient beta of the slow buffer u.
      momentum: heavy-ball coefficient of each worker.

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, workers)
    M = np.zeros_like(X)
    slow_x = X[0]
    u = np.zeros_like(slow_x)
    gammas = []
    trajectory = [X]
    for t in range(steps):
        gamma = rate(learning_rate, t)
        gammas.append(gamma)
        M = momentum * M + gradients(grad_fn, t, X)
        X = X - gamma * M
        if (t + 1) % period == 0:
            gbar = sum(gammas) / period
            u = slow_momentum * u + (slow_x - sum(X) / workers) / gbar
            slow_x = slow_x - slow_rate * gbar * u
            X = same_start(slow_x, workers)
            gammas = []
        trajectory.append(X)
    return np.array(trajectory)


def diloco(
    grad_fn,
    x0,
    workers,
    learning_rate,
    steps,
    period,
    outer_rate,
    outer_momentum,
    fragments,
    weight_decay=1e-4,
):
    """DiLoCo, Douillard et al., 2023, Algorithm 1, with an exchange in fragments.

    Iteration t, AdamW (Loshchilov and Hutter, ICLR 2019) on each worker, k = t + 1:
      m_i <- .9 m_i + .1 g_i,  v_i <- .999 v_i + .001 g_i^2,
      x_i <- x_i - gamma_t ((m_i / (1 - .9^k)) / (sqrt(v_i / (1 - .999^k)) + 1e-8)
                            + weight_decay x_i).
    Fragment p of P, after each k with k = (p + 1) period // P (mod period), on its
    coordinates, with the outer model theta, initially x0:
      D = mean_i (theta - x_i),  b <- outer_momentum b + D,
      theta <- theta - outer_rate (D + outer_momentum b),  x_i <- theta for each i.
    The fragments are those of Douillard et al., Streaming DiLoCo, 2025, without its
    overlap and quantization; one fragment is DiLoCo.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      workers: number of workers n.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      period: H, iterations between two exchanges of a fragment.
      outer_rate: step size of the outer Nesterov step.
      outer_momentum: momentum coefficient of the outer Nesterov step.
      fragments: P index arrays, a partition of range(d).
      weight_decay: AdamW's decoupled weight decay.

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, workers)
    M = np.zeros_like(X)
    V = np.zeros_like(X)
    theta = X[0].copy()
    b = np.zeros_like(theta)
    trajectory = [X]
    for t in range(steps):
        k = t + 1
        G = gradients(grad_fn, t, X)
        M = 0.9 * M + (1 - 0.9) * G
        V = 0.999 * V + (1 - 0.999) * G**2
        M_hat = M / (1 - 0.9**k)
        V_hat = V / (1 - 0.999**k)
        direction = M_hat / (np.sqrt(V_hat) + 1e-8) + weight_decay * X
        X = X - rate(learning_rate, t) * direction
        for p, fragment in enumerate(fragments):
            if k % period != ((p + 1) * period // len(fragments)) % period:
                continue
            for j in fragment:
                D = sum(theta[j] - X[:, j]) / workers
                b[j] = outer_momentum * b[j] + D
                theta[j] = theta[j] - outer_rate * (D + outer_momentum * b[j])
                X[:, j] = theta[j]
        trajectory.append(X)
    return np.array(trajectory)


def qg_dsgdm(grad_fn, x0, matrices, learning_rate, steps, momentum, factor):
    """QG-DSGDm, Lin et al., ICML 2021, Algorithm 1.

    x_half = x_t - gamma_t (momentum m_t + g_t(x_t)),  x_{t+1} = W_t x_half,
    m_{t+1} = (1 - factor) m_t + factor (x_t - x_{t+1}) / gamma_t,  m_0 = 0.
    The paper's mu is 1 - factor.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      matrices: mixing matrices W_t, [n, n] each, used in turn.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      momentum: coefficient beta of the buffer in the step.
      factor: weight of the newest difference in the buffer.

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, len(matrices[0]))
    M = np.zeros_like(X)
    trajectory = [X]
    for t in range(steps):
        W = matrices[t % len(matrices)]
        gamma = rate(learning_rate, t)
        X_half = X - gamma * (momentum * M + gradients(grad_fn, t, X))
        X_next = mix(W, X_half)
        M = (1 - factor) * M + factor * (X - X_next) / gamma
        X = X_next
        trajectory.append(X)
    return np.array(trajectory)


def sgp(grad_fn, x0, matrices, learning_rate, steps, momentum=0.0):
    """Stochastic Gradient Push, Assran et al., ICML 2019, Algorithm 1.

    z_t = x_t / w_t,  m_t = momentum m_{t-1} + g_t(z_t),
    x_{t+1} = P_t (x_t - gamma_t m_t),  w_{t+1} = P_t w_t,  w_0 = 1.
    Algorithm 1 has no momentum; this adds heavy-ball momentum on each worker.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      matrices: column-stochastic P_t, [n, n] each, used in turn; P_t[i, j] is the
        weight of the message from j to i.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      momentum: heavy-ball coefficient of each worker.

    Returns:
      z before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, len(matrices[0]))
    M = np.zeros_like(X)
    w = np.ones((len(X), 1))
    Z = X
    trajectory = [Z]
    for t in range(steps):
        P = matrices[t % len(matrices)]
        M = momentum * M + gradients(grad_fn, t, Z)
        X = mix(P, X - rate(learning_rate, t) * M)
        w = mix(P, w)
        Z = X / w
        trajectory.append(Z)
    return np.array(trajectory)
