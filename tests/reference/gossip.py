"""One gossip round per iteration without gradient tracking: D-PSGD and D2."""

import numpy as np

from .basics import check_order, gradients, mix, rate, same_start


def d_psgd(grad_fn, x0, matrices, learning_rate, steps, order="combine_then_adapt"):
    """D-PSGD, Lian et al., NeurIPS 2017, Algorithm 1 (combine-then-adapt).

    combine_then_adapt: X_{t+1} = W_t X_t - gamma_t G_t(X_t).
    adapt_then_combine: X_{t+1} = W_t (X_t - gamma_t G_t(X_t)), the diffusion order
    of Chen and Sayed, IEEE Trans. Signal Processing 2012.

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
    trajectory = [X]
    for t in range(steps):
        W = matrices[t % len(matrices)]
        G = gradients(grad_fn, t, X)
        gamma = rate(learning_rate, t)
        if order == "combine_then_adapt":
            X = mix(W, X) - gamma * G
        else:
            X = mix(W, X - gamma * G)
        trajectory.append(X)
    return np.array(trajectory)


def d2(grad_fn, x0, matrices, learning_rate, steps):
    """D2, Tang et al., ICML 2018, Algorithm 1.

    X_1 = W_0 (X_0 + U_0), X_{t+1} = W_t (2 X_t - X_{t-1} + U_t - U_{t-1}), where
    U_t = -gamma_t G_t(X_t). Arguments and result as in `d_psgd`.
    """
    X = same_start(x0, len(matrices[0]))
    X_previous, U_previous = X, np.zeros_like(X)  # makes X_1 = W_0 (X_0 + U_0)
    trajectory = [X]
    for t in range(steps):
        W = matrices[t % len(matrices)]
        U = -rate(learning_rate, t) * gradients(grad_fn, t, X)
        X_next = mix(W, 2 * X - X_previous + U - U_previous)
        X, X_previous, U_previous = X_next, X, U
        trajectory.append(X)
    return np.array(trajectory)
