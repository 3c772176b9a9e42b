"""Compressed communication: compressors as the receiver sees them, and methods."""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from .basics import gradients, rate, same_start

# Compressors: C(v) of one vector v, [d], as the receiver reconstructs it.


def random_block(v, ratio, start):
    """Random block sparsification, Xu and Huang, ICML 2022, without rescaling.

    Keeps k = ceil(d / ratio) entries at start, start + 1, ... (mod d).
    """
    kept = np.zeros_like(v)
    for j in range(math.ceil(len(v) / ratio)):
        kept[(start + j) % len(v)] = v[(start + j) % len(v)]
    return kept


def random_k(v, indices):
    """Random-k, Stich et al., NeurIPS 2018, Definition 2.2, without rescaling."""
    kept = np.zeros_like(v)
    for j in indices:
        kept[j] = v[j]
    return kept


def top_k(v, k):
    """Top-k, Stich et al., NeurIPS 2018, Definition 2.2; ties to the lower index."""
    kept = np.zeros_like(v)
    for j in sorted(range(len(v)), key=lambda j: (-abs(v[j]), j))[:k]:
        kept[j] = v[j]
    return kept


def sign(v):
    """Scaled sign, Karimireddy et al., ICML 2019, Algorithm 1; sign(0) = +1.

    C(v) = (||v||_1 / d) sign(v).
    """
    return np.mean(np.abs(v)) * np.where(v >= 0, 1.0, -1.0)


def quantize(v, bits, uniform):
    """Stochastic uniform quantizer, as QSGD (Alistarh et al., NeurIPS 2017, eq. 3).

    Unlike QSGD: the scale is max|v|, and the L + 1 = 2^bits levels are spread evenly
    over [-scale, scale], so that zero is not a level.

    Args:
      v: the vector, [d].
      bits: bits per entry.
      uniform: samples from [0, 1), [d]. If they are uniform, E C(v) = v.
    """
    scale = np.max(np.abs(v))
    if scale == 0:
        return np.zeros_like(v)
    levels = 2**bits - 1
    q = np.floor((v / scale + 1) / 2 * levels + uniform)
    q = np.clip(q, 0, levels)  # levels + uniform can round up to levels + 1
    return (2 * q / levels - 1) * scale


def cast_bfloat16(v):
    """Rounds to the nearest bfloat16, ties to even."""
    return v.astype(ml_dtypes.bfloat16).astype(np.float64)


# Methods: `params` hold the point where each worker takes its gradient.


class DetachedRun(NamedTuple):
    """Trajectories of EF-SGD, DEF and PEF."""

    params: np.ndarray  # y_i, shape=(steps + 1, n, d)
    shared: np.ndarray  # x, shape=(steps + 1, d)
    errors: np.ndarray  # e_i plus steps since the exchange, shape=(steps + 1, n, d)


class AveragedRun(NamedTuple):
    """Trajectories of SGD-IA."""

    params: np.ndarray  # y, all rows equal, shape=(steps + 1, n, d)
    shared: np.ndarray  # x, shape=(steps + 1, d)
    z: np.ndarray  # shape=(steps + 1, d)


class ResetRun(NamedTuple):
    """Trajectories of CSER."""

    params: np.ndarray  # x_i, shape=(steps + 1, n, d)
    errors: np.ndarray  # e_i, shape=(steps + 1, n, d)


class ChocoRun(NamedTuple):
    """Trajectories of CHOCO-SGD."""

    params: np.ndarray  # x_i, shape=(steps + 1, n, d)
    copies: np.ndarray  # xh_i, which the neighbors hold, shape=(steps + 1, n, d)


class PowerRun(NamedTuple):
    """Trajectories of PowerSGD."""

    params: np.ndarray  # x, all workers equal, shape=(steps + 1, n, a, b)
    errors: np.ndarray  # e_i, shape=(steps + 1, n, a, b)


def def_sgd(
    grad_fn, x0, n, learning_rate, steps, compress, detach, momentum=0.0, period=1
):
    """Detached error feedback, Xu and Huang, ICML 2022, Algorithm 1 (DEF).

    y_i = x - lambda_d e_i, m_i <- beta m_i + g_i(y_i), p_i = e_i + gamma_t m_i,
    x <- x - mean_i C(p_i), e_i <- p_i - C(p_i); lambda_d = 0 is EF-SGD (Karimireddy
    et al., ICML 2019, Algorithm 2), lambda_d = 1 the step-ahead variant.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      n: number of workers.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      compress: (t, i, v) -> C(v), worker i's compressor of iteration t.
      detach: lambda_d.
      momentum: beta.
      period: iterations per exchange. As in the authors' program, if period does not
        divide t + 1, a worker takes a local step, y_i <- y_i - gamma_t m_i. In an
        exchange, p_i includes all of its steps since the last exchange.

    Returns:
      A DetachedRun with the values before each iteration and after the last.
    """
    return pef_sgd(
        grad_fn, x0, n, learning_rate, steps, compress, detach, 1.0, momentum, period
    )


def pef_sgd(
    grad_fn,
    x0,
    n,
    learning_rate,
    steps,
    compress,
    detach,
    feedback,
    momentum=0.0,
    period=1,
):
    """Partial error feedback, Abdi and Fekri, AAAI 2020, a baseline of DEF's paper.

    p_i = feedback e_i + gamma_t m_i. All else, arguments, and result: see `def_sgd`.
    """
    x = np.array(x0, dtype=np.float64)
    E = same_start(np.zeros_like(x), n)
    M, S = np.zeros_like(E), np.zeros_like(E)
    Y = x - detach * E
    run = [(Y, x, E)]
    for t in range(steps):
        M = momentum * M + gradients(grad_fn, t, Y)
        S = S + rate(learning_rate, t) * M
        Y = Y - rate(learning_rate, t) * M
        if (t + 1) % period == 0:
            P = feedback * E + S
            C = np.array([compress(t, i, P[i].copy()) for i in range(n)])
            E, S = P - C, np.zeros_like(S)
            x = x - C.mean(0)
            Y = x - detach * E
        pending = E if (t + 1) % period == 0 else feedback * E + S
        run.append((Y, x, pending))
    return DetachedRun(*map(np.array, zip(*run, strict=True)))


def def_a_model(run):
    """The model that DEF-A evaluates, x - mean_i e_i, [steps + 1, d].

    Xu and Huang, ICML 2022, DEF-A. `run` is the result of `def_sgd`.
    """
    return run.shared - run.errors.mean(1)


def sgd_ia(grad_fn, x0, n, learning_rate, steps, delta, detach, momentum=0.0):
    """SGD with iterate averaging, Xu and Huang, ICML 2022 (SGD-IA).

    y = (1 - lambda_d) x + lambda_d z, m <- beta m + mean_i g_i(y),
    z <- z - gamma_t m, x <- (1 - delta) x + delta z with the new z: the mean dynamics
    of DEF with delta = 1 / ratio. Other arguments as in `def_sgd`.

    Returns:
      An AveragedRun with the values before each iteration and after the last.
    """
    x = z = np.array(x0, dtype=np.float64)
    m = np.zeros_like(x)
    run = [(same_start(x, n), x, z)]
    for t in range(steps):
        Y = same_start((1 - detach) * x + detach * z, n)
        m = momentum * m + gradients(grad_fn, t, Y).mean(0)
        z = z - rate(learning_rate, t) * m
        x = (1 - delta) * x + delta * z
        run.append((same_start((1 - detach) * x + detach * z, n), x, z))
    return AveragedRun(*map(np.array, zip(*run, strict=True)))


def partial_sync(t, V, compress):
    """PSync, Xie et al., NeurIPS 2020 (CSER), Algorithm 1.

    Returns v'_i = mean_j C(v_j) + r_i and the residuals r_i = v_i - C(v_i).
    """
    C = np.zeros_like(V)
    for i in range(len(V)):
        C[i] = compress(t, i, V[i].copy())
    R = V - C
    return C.mean(0) + R, R


def cser(
    grad_fn,
    x0,
    n,
    learning_rate,
    steps,
    compress,
    reset_compress,
    period,
    momentum=0.0,
):
    """CSER, Xie et al., NeurIPS 2020, Algorithm 2.

    With p_i = gamma_t m_i, m_i <- beta m_i + g_i(x_i):
    p'_i, r_i = PSync(p_i, C2); x_i <- x_i - p'_i; e_i <- e_i - r_i; and, if the
    period divides t + 1, e'_i, r_i = PSync(e_i, C1); x_i <- x_i - e_i + e'_i;
    e_i <- r_i.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      n: number of workers.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      compress: (t, i, v) -> C2(v), the compressor of the updates.
      reset_compress: (t, i, v) -> C1(v), the compressor of the errors.
      period: H, iterations per error reset.
      momentum: beta.

    Returns:
      A ResetRun with the values before each iteration and after the last.
    """
    X = same_start(x0, n)
    E, M = np.zeros_like(X), np.zeros_like(X)
    run = [(X, E)]
    for t in range(steps):
        M = momentum * M + gradients(grad_fn, t, X)
        P, R = partial_sync(t, rate(learning_rate, t) * M, compress)
        X = X - P
        E = E - R
        if (t + 1) % period == 0:
            E_synced, R = partial_sync(t, E, reset_compress)
            X = X - E + E_synced
            E = R
        run.append((X, E))
    return ResetRun(*map(np.array, zip(*run, strict=True)))


def choco_sgd(
    grad_fn, x0, matrix, learning_rate, steps, compress, consensus_rate, momentum=0.0
):
    """CHOCO-SGD, Koloskova, Stich and Jaggi, ICML 2019, Algorithm 2.

    With m_i <- beta m_i + g_i(x_i), from xh_i = 0:
    h_i = x_i - gamma_t m_i; xh_i <- xh_i + Q(h_i - xh_i);
    x_i <- h_i + zeta sum_j W_ij (xh_j - xh_i) with the new xh.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      matrix: the mixing matrix W, [n, n].
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      compress: (t, i, v) -> Q(v), worker i's compressor of iteration t.
      consensus_rate: zeta.
      momentum: beta.

    Returns:
      A ChocoRun with the values before each iteration and after the last.
    """
    n = len(matrix)
    X = same_start(x0, n)
    copies, M = np.zeros_like(X), np.zeros_like(X)
    run = [(X, copies)]
    for t in range(steps):
        M = momentum * M + gradients(grad_fn, t, X)
        half = X - rate(learning_rate, t) * M
        sent = np.zeros_like(X)
        for i in range(n):
            sent[i] = compress(t, i, half[i] - copies[i])
        copies = copies + sent
        X = half
        for i in range(n):
            for j in range(n):
                X[i] += consensus_rate * matrix[i, j] * (copies[j] - copies[i])
        run.append((X, copies))
    return ChocoRun(*map(np.array, zip(*run, strict=True)))


def powersgd(grad_fn, x0, n, learning_rate, steps, rank, q0, momentum=0.0):
    """PowerSGD, Vogels et al., NeurIPS 2019, Algorithms 1 and 2.

    M_i = g_i(x) + e_i; P = orthonormal columns of mean_i M_i Q; Q_i = M_i^T P;
    e_i <- M_i - P Q_i^T; Q <- mean_i Q_i; m <- beta m + P Q^T; x <- x - gamma_t m.
    The momentum is heavy-ball momentum; the paper steps by P Q^T + m instead.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [a, b].
      n: number of workers.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      rank: number of columns of P and Q.
      q0: the first Q, [b, rank].
      momentum: beta.

    Returns:
      A PowerRun with the values before each iteration and after the last.

    Raises:
      ValueError: if q0 is not [b, rank].
    """
    X = same_start(x0, n)
    if q0.shape != (X.shape[2], rank):
        raise ValueError(f"q0 has shape {q0.shape}, not {(X.shape[2], rank)}")
    Q = np.array(q0, dtype=np.float64)
    E = np.zeros_like(X)
    m = np.zeros_like(X[0])
    run = [(X, E)]
    for t in range(steps):
        M = gradients(grad_fn, t, X) + E
        P = np.linalg.qr(np.mean([M[i] @ Q for i in range(n)], axis=0))[0]
        own_Q = [M[i].T @ P for i in range(n)]
        E = np.array([M[i] - P @ own_Q[i].T for i in range(n)])
        Q = np.mean(own_Q, axis=0)
        m = momentum * m + P @ Q.T
        X = X - rate(learning_rate, t) * m
        run.append((X, E))
    return PowerRun(*map(np.array, zip(*run, strict=True)))
