"""Example orders from gradient balancing: GraB, pair balancing, CD-GraB."""

import numpy as np


def examples(order, batch_size):
    """The batches of one epoch, each of exactly `batch_size` examples.

    If `batch_size` does not divide N, the first examples of the same order fill the
    last batch, repeatedly if `batch_size` > N.

    Args:
      order: the examples in the order of the epoch, [N].
      batch_size: examples per batch.

    Returns:
      ceil(N / batch_size) lists of indices.
    """
    batches = []
    for begin in range(0, len(order), batch_size):
        places = range(begin, begin + batch_size)
        batches.append([int(order[p % len(order)]) for p in places])
    return batches


def grab(order, G, mu):
    """One worker's next order by mean balancing.

    Lu, Guo and De Sa, NeurIPS 2022. r = 0, l = 0, R = N - 1; for each
    position t, with c = G[t] - mu:
      <r, c> <= 0: next[l] = order[t], l += 1, r += c;
      otherwise:   next[R] = order[t], R -= 1, r -= c.

    Args:
      order: the examples in the order of the epoch, [N].
      G: the gradients of the examples, where G[t] belongs to order[t], [N, d].
      mu: the vector that is subtracted from every gradient, [d].

    Returns:
      The order of the next epoch, [N].
    """
    following = np.full(len(order), -1)
    r = np.zeros(len(mu))
    left, right = 0, len(order) - 1
    for t in range(len(order)):
        c = G[t] - mu
        if r @ c <= 0:
            following[left] = order[t]
            left += 1
            r = r + c
        else:
            following[right] = order[t]
            right -= 1
            r = r - c
    return following


def pair_balance(order, G):
    """One worker's next order by pair balancing.

    Cooper et al., NeurIPS 2023, PairBalance. r = 0; for pair p = 0, 1, ... of the
    positions 2p and 2p + 1, with d = G[2p] - G[2p + 1], l = p, R = N - 1 - p:
      <r, d> <= 0: next[l] = order[2p], next[R] = order[2p + 1], r += d;
      otherwise:   next[l] = order[2p + 1], next[R] = order[2p], r -= d.
    If N is odd, the last example goes to the middle position.

    Args and returned value as in `grab`, without `mu`.
    """
    N = len(order)
    following = np.full(N, -1)
    r = np.zeros(len(G[0]))
    for p in range(N // 2):
        d = G[2 * p] - G[2 * p + 1]
        if r @ d <= 0:
            following[p] = order[2 * p]
            following[N - 1 - p] = order[2 * p + 1]
            r = r + d
        else:
            following[p] = order[2 * p + 1]
            following[N - 1 - p] = order[2 * p]
            r = r - d
    if N % 2 == 1:
        following[N // 2] = order[N - 1]
    return following


def d_grab(orders, G):
    """All workers' next orders by CD-GraB, one running sum for all of them.

    Cooper et al., NeurIPS 2023, Algorithms 2 and 3. Like `pair_balance`, but each pair
    of positions processes the workers j = 0..m-1 in sequence with the same r. Every
    worker has its own next order.

    Args:
      orders: the workers' examples in the order of the epoch, [m, N].
      G: the gradients, where G[j, t] belongs to orders[j, t], [m, N, d].

    Returns:
      The orders of the next epoch, [m, N].
    """
    m, N = len(orders), len(orders[0])
    following = np.full((m, N), -1)
    r = np.zeros(len(G[0][0]))
    left, right = 0, N - 1
    for t in range(0, N - 1, 2):
        for j in range(m):
            first, second = orders[j][t], orders[j][t + 1]
            d = G[j][t] - G[j][t + 1]
            if r @ d <= 0:
                following[j, left], following[j, right] = first, second
                r = r + d
            else:
                following[j, left], following[j, right] = second, first
                r = r - d
        left += 1
        right -= 1
    if left == right:
        for j in range(m):
            following[j, left] = orders[j][N - 1]
    return following


def run(
    method, gradient_of, num_examples, num_workers, epochs, batch_size=1, start=None
):
    """The orders of all epochs.

    Each epoch evaluates the gradient once per worker and example. The examples that
    fill the last batch affect neither orders nor means. `grab` uses the mean of the
    same worker's N gradients in the previous epoch, and 0 in the first epoch.

    Args:
      method: "grab" or "pair_balance", on each worker separately, or "d_grab".
      gradient_of: (epoch, worker, example) -> gradient, [d].
      num_examples: N, examples per worker.
      num_workers: m, number of workers.
      epochs: number of epochs.
      batch_size: examples per batch, which does not affect the orders.
      start: orders of the first epoch, [m, N]. The default is 0..N-1 for all workers.

    Returns:
      The order of each epoch and of the one after the last, [epochs + 1, m, N].
    """
    if method not in ("grab", "pair_balance", "d_grab"):
        raise ValueError(f"unknown method {method!r}")
    if start is None:
        start = [range(num_examples) for _ in range(num_workers)]
    orders = np.array([list(order) for order in start])
    history = [orders]
    means = None
    for k in range(epochs):
        G = []
        for j in range(num_workers):
            seen = [e for batch in examples(orders[j], batch_size) for e in batch]
            G.append(
                [
                    np.array(gradient_of(k, j, e), dtype=np.float64)
                    for e in seen[:num_examples]
                ]
            )
        if method == "grab":
            if means is None:
                means = [np.zeros(len(G[0][0])) for _ in range(num_workers)]
            orders = np.array(
                [grab(orders[j], G[j], means[j]) for j in range(num_workers)]
            )
            means = [sum(G[j]) / num_examples for j in range(num_workers)]
        elif method == "pair_balance":
            orders = np.array(
                [pair_balance(orders[j], G[j]) for j in range(num_workers)]
            )
        else:
            orders = d_grab(orders, G)
        history.append(orders)
    return np.array(history)


def herding_bound(vectors, orders):
    """max over t of || sum_{s<=t} sum_j vectors[j, orders[j, s]] ||_inf.

    Args:
      vectors: each worker's vectors, [m, N, d].
      orders: each worker's order, [m, N].

    Returns:
      The largest absolute entry of any prefix sum, a float.
    """
    total = np.zeros(len(vectors[0][0]))
    bound = 0.0
    for s in range(len(orders[0])):
        for j in range(len(orders)):
            total = total + vectors[j][orders[j][s]]
        bound = max(bound, float(np.abs(total).max()))
    return bound
