"""Gradient tracking and phases: DSGT, accelerated gossip, DeTAG, DeFacto."""

from typing import NamedTuple

import numpy as np

from .basics import check_order, gradients, mix, rate, same_start


def dsgt(grad_fn, x0, matrices, learning_rate, steps, order="combine_then_adapt"):
    """Stochastic gradient tracking, with Y_0 = G_0 in both orders.

    combine_then_adapt (Nedic, Olshevsky and Shi, SIAM J. Optim. 2017, DIGing):
      X_{t+1} = W_t X_t - gamma_t Y_t,   Y_t = W_t Y_{t-1} + G_t - G_{t-1}.
    adapt_then_combine (Xu et al., CDC 2015, Aug-DGM; Nedic et al., ACC 2017):
      X_{t+1} = W_t (X_t - gamma_t Y_t), Y_t = W_t (Y_{t-1} + G_t - G_{t-1}).

    With stochastic gradients, Pu and Nedic, Mathematical Programming 2021, combine the
    second line's X with the first line's Y. Neither order here is this hybrid.

    Iteration t computes G_t, Y_t and X_{t+1} and mixes all of them with W_t. For a
    sequence of matrices, the papers mix Y_{t-1} with W_{t-1} instead. For a single
    matrix, both are equal.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      matrices: mixing matrices W_t, [n, n] each, used in turn.
      learning_rate: gamma, a float or a callable of t.
      steps: number of iterations.
      order: "combine_then_adapt" or "adapt_then_combine".

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    check_order(order)
    X = same_start(x0, len(matrices[0]))
    Y = G_previous = np.zeros_like(X)
    trajectory = [X]
    for t in range(steps):
        W = matrices[t % len(matrices)]
        G = gradients(grad_fn, t, X)
        gamma = rate(learning_rate, t)
        if t == 0:
            Y = G
        elif order == "combine_then_adapt":
            Y = mix(W, Y) + G - G_previous
        else:
            Y = mix(W, Y + G - G_previous)
        if order == "combine_then_adapt":
            X = mix(W, X) - gamma * Y
        else:
            X = mix(W, X - gamma * Y)
        G_previous = G
        trajectory.append(X)
    return np.array(trajectory)


def momentum_of_gossip(W):
    """eta = (1 - sqrt(1 - lambda^2)) / (1 + sqrt(1 - lambda^2)).

    lambda = max(|lambda_2|, |lambda_n|), for the ordered eigenvalues of W with
    lambda_1 = 1. Lu and De Sa, ICML 2021, Algorithm 3.
    """
    eigenvalues = np.linalg.eigvalsh(W)  # ascending
    lambda_ = max(abs(eigenvalues[-2]), abs(eigenvalues[0]))
    root = np.sqrt(1 - lambda_**2)
    return (1 - root) / (1 + root)


def accelerated_gossip(W, z, rounds):
    """Accelerated gossip, Lu and De Sa, ICML 2021, Algorithm 3 (Liu and Morse 2011).

    z_{r+1} = (1 + eta) W z_r - eta z_{r-1} for r = 0..rounds-1, z_{-1} = z_0.

    Args:
      W: symmetric doubly stochastic matrix, [n, n].
      z: the workers' vectors, [n, d].
      rounds: number of rounds.

    Returns:
      z_rounds, [n, d].
    """
    eta = momentum_of_gossip(W)
    z = np.array(z, dtype=np.float64)
    previous = z
    for _ in range(rounds):
        z, previous = (1 + eta) * mix(W, z) - eta * previous, z
    return z


class Phases(NamedTuple):
    """The state of DeTAG at the boundaries of its phases."""

    X: np.ndarray  # shape=(phases + 1, n, d), parameters x_k
    Y: np.ndarray  # shape=(phases + 1, n, d), trackers y_k
    G: np.ndarray  # shape=(phases, n, d), mean gradients gbar_k


def detag_phases(grad_fn, x0, W, learning_rate, phases, rounds, momentum=0.0):
    """DeTAG, Lu and De Sa, ICML 2021, Algorithm 2, with one entry per phase.

    Phase k, with gbar_{-1} = 0, y_0 = 0, v_{-1} = 0:
      gbar_k  = (1/R) sum_{r<R} g(x_k; iteration kR + r)
      xt, yt  = AG_R(x_k), AG_R(y_k)
      v_k     = momentum v_{k-1} + yt
      x_{k+1} = xt - gamma_t v_k, with t the last iteration of the phase
      y_{k+1} = yt + gbar_k - gbar_{k-1}

    Takes the arguments of `detag`, with `phases` instead of `steps`.
    """
    X = same_start(x0, len(W))
    Y = np.zeros_like(X)
    V = np.zeros_like(X)
    G_previous = np.zeros_like(X)
    Xs, Ys, Gs = [X], [Y], []
    for k in range(phases):
        G = np.zeros_like(X)
        for r in range(rounds):
            G += gradients(grad_fn, k * rounds + r, X) / rounds
        X_mixed = accelerated_gossip(W, X, rounds)
        Y_mixed = accelerated_gossip(W, Y, rounds)
        V = momentum * V + Y_mixed
        X = X_mixed - rate(learning_rate, (k + 1) * rounds - 1) * V
        Y = Y_mixed + G - G_previous
        G_previous = G
        Xs.append(X)
        Ys.append(Y)
        Gs.append(G)
    return Phases(np.array(Xs), np.array(Ys), np.array(Gs))


def detag(grad_fn, x0, W, learning_rate, steps, rounds, momentum=0.0):
    """DeTAG, Lu and De Sa, ICML 2021, Algorithm 2, with one entry per iteration.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      W: symmetric doubly stochastic matrix, [n, n].
      learning_rate: gamma, a float or a callable of the iteration that ends a phase.
      steps: number of iterations; an unfinished phase changes no parameters.
      rounds: R, iterations per phase.
      momentum: heavy-ball coefficient on the mixed tracker (DeTAGM).

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = detag_phases(grad_fn, x0, W, learning_rate, steps // rounds, rounds, momentum).X
    return np.array([X[t // rounds] for t in range(steps + 1)])


def defacto(grad_fn, x0, factors, learning_rate, steps, rounds):
    """DeFacto, Lu and De Sa, ICML 2021, Algorithm 1.

    Phase k: `rounds` iterations average the gradients at x_k. Then len(factors)
    iterations each apply one factor to this average and do not use their gradients.
    Finally, x_{k+1} = x_k - gamma_t (averaged gradient), with t the phase's last
    iteration.

    Args:
      grad_fn: (t, i, x) -> worker i's stochastic gradient of iteration t at x.
      x0: common start, [d].
      factors: matrices that respect the graph, [n, n] each, applied first to last;
        factors[-1] @ ... @ factors[0] = 1 1^T / n.
      learning_rate: gamma, a float or a callable of the iteration that ends a phase.
      steps: number of iterations; an unfinished phase changes no parameters.
      rounds: gradient iterations per phase.

    Returns:
      Parameters before each iteration and after the last, [steps + 1, n, d].
    """
    X = same_start(x0, len(factors[0]))
    A = np.zeros_like(X)
    trajectory = [X]
    for t in range(steps):
        r = t % (rounds + len(factors))
        if r == 0:
            A = np.zeros_like(X)
        if r < rounds:
            A = A + gradients(grad_fn, t, X) / rounds
        else:
            A = mix(factors[r - rounds], A)
        if r == rounds + len(factors) - 1:
            X = X - rate(learning_rate, t) * A
        trajectory.append(X)
    return np.array(trajectory)
