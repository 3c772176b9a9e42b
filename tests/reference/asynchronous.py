"""Asynchronous workers of one master: arrivals, replays, optimizers, projections.

A gradient is a function (w, x, k) -> g, [d]: worker w's stochastic gradient at x in
tick or step k. An optimizer is a function without arguments that returns a stateful
`step`: (x, g, divisor=1) -> next x. `divisor` divides the step size.
"""

import numpy as np

from .basics import rate


def arrivals_from_speeds(seconds, num_ticks):
    """Returns the worker and the staleness of the gradient that arrives at each tick.

    All workers receive x_0 at time 0. Only the computation of gradients takes time. If
    several gradients arrive at the same time, the one of the lowest worker comes first.
    The gradient of tick k turns x_k into x_{k+1}. Its worker receives x_{k+1} at once
    and starts the next gradient. If this takes 0 seconds, the same worker may come next
    at the same time. A worker's clock is the sum of its durations, in float64.

    Args:
      seconds: nonnegative duration of worker w's n-th gradient, [workers, gradients].
        The durations of a row repeat.
      num_ticks: number of arrivals.

    Returns:
      (worker, staleness) of each tick k: the worker has received x_{k - staleness}.
    """
    seconds = np.array(seconds, dtype=np.float64)
    num_workers, num_gradients = seconds.shape
    arrives = [seconds[w, 0] for w in range(num_workers)]
    started = [1] * num_workers
    received = [0] * num_workers
    arrivals = []
    for k in range(num_ticks):
        w = min(range(num_workers), key=lambda worker: (arrives[worker], worker))
        arrivals.append((w, k - received[w]))
        received[w] = k + 1
        arrives[w] = arrives[w] + seconds[w, started[w] % num_gradients]
        started[w] += 1
    return arrivals


def replay(
    x0,
    gradient,
    workers,
    staleness,
    optimizer,
    max_staleness=None,
    staleness_aware=False,
):
    """A master with stale gradients: Xu et al., Math. Prog. Comp. 2023, distributed.

    g_k = gradient(workers[k], x_{k - staleness[k]}, k); x_{k+1} = step(x_k, g_k).
    With one worker, this evaluates tick k's sample at an old iterate; `delayed` applies
    the gradient of an old step's sample at that step's iterate.

    Args:
      x0: start, [d].
      gradient: (w, x, k) -> g; called at each tick, even if its gradient is refused.
      workers: the worker w of each tick, [K].
      staleness: tau of each tick k, from 0 to k, [K].
      optimizer: e.g. `amsgrad(...)`.
      max_staleness: largest tau that is applied. Otherwise, x_{k+1} = x_k and the
        optimizer's state stays; the tick still counts for the staleness of others.
      staleness_aware: divide the step size by max(1, tau), Zhang et al., IJCAI 2016.

    Returns:
      The iterates x_0 .. x_K, [K + 1, d].
    """
    step = optimizer()
    iterates = [np.array(x0, dtype=np.float64)]
    for k, (w, tau) in enumerate(zip(workers, staleness, strict=True)):
        if not 0 <= tau <= k:
            raise ValueError(f"staleness {tau} at tick {k}, expected 0 to {k}")
        g = ask(gradient, w, iterates[k - tau], k)
        if max_staleness is not None and tau > max_staleness:
            iterates.append(iterates[k])
        else:
            divisor = max(1, tau) if staleness_aware else 1
            iterates.append(step(iterates[k], g, divisor))
    return np.array(iterates)


def held(iterates, workers, staleness, num_workers):
    """The iterate that each worker holds once x_t exists, for each t: [., n, d].

    After its gradient of tick k, a worker takes the iterate of its next gradient,
    x_{k' - tau'}, as soon as it exists. If there is no next gradient, the worker takes
    x_{k+1}.
    """
    num_ticks = len(workers)
    result = np.empty((len(iterates), num_workers, iterates.shape[1]))
    for worker in range(num_workers):
        index = 0
        for t in range(len(iterates)):
            later = [k for k in range(t, num_ticks) if workers[k] == worker]
            if later and later[0] - staleness[later[0]] <= t:
                index = later[0] - staleness[later[0]]
            if not later and worker in workers:
                index = max(k for k in range(num_ticks) if workers[k] == worker) + 1
            result[t, worker] = iterates[index]
    return result


def delayed(x0, gradient, delays, optimizer):
    """One worker with delayed gradients.

    g_k = gradient(0, x_k, k);  x_{k+1} = step(x_k, g_{max(k - delays[k], 0)}).
    This applies the gradient of an old step's sample at that step's iterate; `replay`
    evaluates tick k's sample at an old iterate.

    Args:
      x0: start, [d].
      gradient: (w, x, k) -> g; called once per step.
      delays: nonnegative delay of each step, [K].
      optimizer: e.g. `amsgrad(...)`.

    Returns:
      The iterates x_0 .. x_K, [K + 1, d].
    """
    step = optimizer()
    iterates = [np.array(x0, dtype=np.float64)]
    computed = []
    for k, delay in enumerate(delays):
        computed.append(ask(gradient, 0, iterates[k], k))
        iterates.append(step(iterates[k], computed[max(k - delay, 0)]))
    return np.array(iterates)


def synchronous(x0, gradient, num_workers, num_steps, optimizer):
    """Synchronous training with the mean of all workers' gradients.

    x_{k+1} = step(x_k, (1 / n) sum_w gradient(w, x_k, k)).

    Args:
      x0: start, [d].
      gradient: (w, x, k) -> g.
      num_workers: number of workers n.
      num_steps: number of steps K.
      optimizer: e.g. `amsgrad(...)`.

    Returns:
      The iterates x_0 .. x_K, [K + 1, d].
    """
    step = optimizer()
    iterates = [np.array(x0, dtype=np.float64)]
    for k in range(num_steps):
        G = [ask(gradient, w, iterates[k], k) for w in range(num_workers)]
        iterates.append(step(iterates[k], sum(G) / num_workers))
    return np.array(iterates)


def ask(gradient, w, x, k):
    """Worker w's gradient at x in tick or step k, in float64."""
    return np.array(gradient(w, x.copy(), k), dtype=np.float64)


# Optimizers


def sgd(lr):
    """x <- x - lr g."""

    def start():
        def step(x, g, divisor=1):
            return x - lr / divisor * g

        return step

    return start


def momentum_sgd(lr, beta):
    """Heavy ball: m <- beta m + g,  x <- x - lr m,  m = 0 at first.

    The divisor does not affect m.
    """

    def start():
        m = 0.0

        def step(x, g, divisor=1):
            nonlocal m
            m = beta * m + g
            return x - lr / divisor * m

        return step

    return start


def adam(lr, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, Kingma and Ba, ICLR 2015, Algorithm 1.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  m = v = 0 at first;
    x <- x - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps),  k = 1, 2, ...
    """

    def start():
        k = 0
        m = v = 0.0

        def step(x, g, divisor=1):
            nonlocal k, m, v
            k += 1
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat = m / (1 - b1**k)
            v_hat = v / (1 - b2**k)
            return x - lr / divisor * m_hat / (np.sqrt(v_hat) + eps)

        return step

    return start


def amsgrad(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, projection=None):
    """AMSGrad as in the master of APAM, Xu et al., Math. Prog. Comp. 2023.

    g <- g + weight_decay x, where x is the master's iterate even if g is stale;
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  vhat <- max(vhat, v);
    x <- Proj(x - alpha_k m / (sqrt(vhat) + eps)),
    alpha_k = lr sqrt(1 - b2^k) / (1 - b1^k),  k = 1, 2, ...;  m = v = vhat = 0 at
    first. k counts the steps taken, not refused gradients. With eps = 0, this equals
    `adam` as long as no entry of v decreases. The Euclidean projection follows the
    step, which includes the divisor.

    Args:
      lr: step size, or a schedule that maps the number of previous steps to it.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root.
      weight_decay: coefficient of x in the gradient.
      projection: x -> the nearest point of a convex set. None means no projection.
    """

    def start():
        k = 0
        m = v = v_max = 0.0

        def step(x, g, divisor=1):
            nonlocal k, m, v, v_max
            k += 1
            g = g + weight_decay * x
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            v_max = np.maximum(v_max, v)
            alpha = rate(lr, k - 1) * np.sqrt(1 - b2**k) / (1 - b1**k)
            x = x - alpha / divisor * m / (np.sqrt(v_max) + eps)
            return x if projection is None else projection(x)

        return step

    return start


# Projections


def box(lower, upper):
    """The nearest point with lower <= x <= upper; floats or [d]."""
    return lambda x: np.maximum(lower, np.minimum(x, upper))


def ball(radius):
    """The nearest point with ||x||_2 <= radius."""

    def project(x):
        norm = np.sqrt(np.sum(x**2))
        return x if norm <= radius else radius / norm * x

    return project


def simplex(total):
    """The nearest point with x >= 0 and sum x = total, a positive number.

    It is max(x - theta, 0), by the conditions of Karush, Kuhn and Tucker. With
    u_1 >= u_2 >= ... the sorted x and theta_j = (u_1 + ... + u_j - total) / j, theta
    is theta_j of the largest j with u_j > theta_j.
    """

    def project(x):
        u = np.sort(x)[::-1]
        for j in range(1, len(u) + 1):
            theta_j = (sum(u[:j]) - total) / j
            if u[j - 1] > theta_j:
                theta = theta_j
        return np.maximum(x - theta, 0)

    return project
