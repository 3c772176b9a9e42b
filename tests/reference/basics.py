"""Helpers of all references: one gossip round, all gradients, a step size."""

from collections.abc import Callable

import numpy as np


def mix(W, X):
    """One gossip round: row i of WX is sum_j W[i, j] X[j]."""
    mixed = np.zeros_like(X)
    for i in range(len(X)):
        for j in range(len(X)):
            mixed[i] += W[i, j] * X[j]
    return mixed


def gradients(grad_fn, t, X):
    """The gradients of iteration t, evaluated at X[i] for worker i."""
    G = np.zeros_like(X)
    for i in range(len(X)):
        G[i] = grad_fn(t, i, X[i].copy())
    return G


def same_start(x0, n):
    """n copies of x0, one per worker: shape [n, d]."""
    return np.array([np.array(x0, dtype=np.float64) for _ in range(n)])


def rate(learning_rate: float | Callable[[int], float], t: int) -> float:
    """The step size gamma_t of a schedule or of a constant."""
    return learning_rate(t) if callable(learning_rate) else learning_rate


def check_order(order):
    """Raises ValueError unless `order` is one of the two valid orders."""
    if order not in ("combine_then_adapt", "adapt_then_combine"):
        raise ValueError(f"unknown order {order!r}")
