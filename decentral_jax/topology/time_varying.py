"""Time-varying topologies: sparse rounds that mix as fast as denser static graphs.

Each function returns a `TopologySchedule`.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from decentral_jax._validation import check_int
from decentral_jax.topology.core import Topology, TopologySchedule

# Disjoint groups of workers; in one round, each group averages its own values.
Groups = list[list[int]]

# One round: the weight of each undirected edge.
Edges = dict[tuple[int, int], float]


def one_peer_exponential(n: int) -> TopologySchedule:
    """Returns the one-peer exponential graph, with one message per worker per round.

    In round `t`, worker `i` sends to worker `(i + 2^(t mod K)) mod n` only, where
    `K = ceil(log2 n)`. All weights are 1/2. If `n` is a power of two, `K` rounds
    compute the exact average (Assran et al., ICML 2019; Ying et al., NeurIPS 2021).

    Args:
      n: Number of workers.

    Returns:
      The schedule, with period `K`.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.one_peer_exponential(8)
      TopologySchedule(one_peer_exponential(8): 8 workers, period 3, degree 1)
    """
    n = check_int("n", n, 1)
    rounds = max((n - 1).bit_length(), 1)
    shifts = [_shift(n, 2**k) for k in range(rounds)]
    return TopologySchedule(tuple(shifts), f"one_peer_exponential({n})")


def one_peer_ring(n: int) -> TopologySchedule:
    """Returns a ring whose rounds alternate between its two directions.

    Each worker sends one message per round, and all weights are 1/2.

    Args:
      n: Number of workers.

    Returns:
      The schedule, with period 2.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.one_peer_ring(8)
      TopologySchedule(one_peer_ring(8): 8 workers, period 2, degree 1)
    """
    n = check_int("n", n, 1)
    return TopologySchedule((_shift(n, 1), _shift(n, -1)), f"one_peer_ring({n})")


def base_graph(n: int, k: int) -> TopologySchedule:
    """Returns the Base-(k+1) graph: an exact average in few rounds for every `n`.

    Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies for
    Decentralized Learning via Finite-time Convergence", NeurIPS 2023, Algorithms 1-3.

    Args:
      n: Number of workers.
      k: Maximum number of neighbors per worker per round.

    Returns:
      The schedule. The product of the matrices of one period is `11^T / n`.

    Raises:
      TypeError: If `n` or `k` is not an integer.
      ValueError: If `n` or `k` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> schedule = dj.topology.base_graph(6, 1)
      >>> schedule.max_degree, schedule.spectral_gap
      (1, 1.0)
    """
    n, k = check_int("n", n, 1), check_int("k", k, 1)
    workers = list(range(n))
    simple = _simple_base(workers, k)
    smooth = _smooth_part(n, k)
    # The alternative schedule has `smooth` groups of n / smooth workers. The groups
    # average internally, in parallel. Then the means are averaged across groups, whose
    # number has only prime factors up to k + 1.
    size = n // smooth
    groups = [workers[g * size : (g + 1) * size] for g in range(smooth)]
    within = [_simple_base(group, k) for group in groups]
    columns = [_averaging_rounds(list(column), k) for column in zip(*groups)]  # noqa: B905
    split = _parallel(within) + _parallel(columns)
    # Take the shorter schedule; a single worker needs one empty round.
    rounds = min(simple, split, key=len) or [{}]
    topologies = [
        Topology(_edges_to_matrix(n, edges), f"base_graph({n}, {k})[{t}]")
        for t, edges in enumerate(rounds)
    ]
    return TopologySchedule(tuple(topologies), f"base_graph({n}, {k})")


def schedule(topologies: Sequence[Topology]) -> TopologySchedule:
    """Returns a custom time-varying topology: round `t` uses `topologies[t % period]`.

    Args:
      topologies: One topology per round. `Topology(matrix)` makes one from any
        stochastic matrix. The union of their graphs must be connected.

    Returns:
      The schedule.

    Raises:
      TypeError: If `topologies` is a single topology, or any entry is not a `Topology`.
      ValueError: If `topologies` is empty, its entries have different numbers of
        workers, or the union of their graphs is not connected.

    Example:
      >>> import decentral_jax as dj
      >>> pair = dj.topology.ring(4), dj.topology.star(4)
      >>> dj.topology.schedule(pair).period
      2
    """
    if isinstance(topologies, Topology):
        raise TypeError(
            f"topologies must be a sequence of Topology, got {topologies!r}: pass a "
            "list with one topology per round."
        )
    made = TopologySchedule(tuple(topologies))
    if not made.is_connected:
        raise ValueError(
            f"topologies must be connected over one period, got {made!r}: some workers "
            "would never receive the values of some others; add a round."
        )
    return made


def _shift(n: int, offset: int) -> Topology:
    """Returns the topology in which worker `i` sends to worker `i + offset` only."""
    matrix = (np.eye(n) + np.roll(np.eye(n), offset, axis=0)) / 2
    return Topology(matrix, f"shift({n}, {offset:+d})")


def _edges_to_matrix(n: int, edges: Edges) -> np.ndarray:
    """Returns the symmetric mixing matrix of one round, shape `[n, n]`."""
    matrix = np.zeros((n, n))
    for (i, j), weight in edges.items():
        matrix[i, j] = matrix[j, i] = weight
    return matrix + np.diag(1.0 - matrix.sum(1))


def _average_groups(groups: Iterable[Sequence[int]]) -> Edges:
    """Returns the round in which each group averages its own values."""
    return {
        (group[a], group[b]): 1 / len(group)
        for group in groups
        for a in range(len(group))
        for b in range(a)
    }


def _parallel(schedules: Sequence[list[Edges]]) -> list[Edges]:
    """Merges schedules on disjoint workers, so that they run in parallel."""
    length = max(map(len, schedules), default=0)
    merged: list[Edges] = [{} for _ in range(length)]
    for one in schedules:
        for target, edges in zip(merged, one, strict=False):
            target.update(edges)
    return merged


def _averaging_rounds(workers: list[int], k: int) -> list[Edges]:
    """Returns the rounds of a k-peer hyper-hypercube graph, an exact average.

    The number of workers must not have a prime factor above k + 1. Algorithm 1 of the
    paper.
    """
    # In the round of factor f, each group holds f workers that are `stride` apart.
    rounds, stride = [], 1
    for factor in _factors(len(workers), k):
        span = stride * factor
        groups = [
            [workers[start + low + stride * j] for j in range(factor)]
            for start in range(0, len(workers), span)
            for low in range(stride)
        ]
        rounds.append(_average_groups(groups))
        stride = span
    return rounds


def _simple_base(workers: list[int], k: int) -> list[Edges]:
    """Returns the rounds of the Simple Base-(k+1) graph, Algorithm 2 of the paper.

    The graph splits the number of workers into its digits in base k + 1.
    """
    if _smooth_part(len(workers), k) == len(workers):
        return _averaging_rounds(workers, k)
    # `power` starts at the largest power of k + 1 that fits.
    parts: list[Groups] = []
    rest, power = list(workers), 1
    while power * (k + 1) <= len(workers):
        power *= k + 1
    # One part per nonzero digit, the largest blocks first.
    while rest:
        digit = len(rest) // power
        if digit:
            parts.append([rest[b * power : (b + 1) * power] for b in range(digit)])
            rest = rest[digit * power :]
        power //= k + 1
    # First, every part averages internally, all parts in parallel.
    first = _parallel(
        [_averaging_rounds(list(itertools.chain(*part)), k) for part in parts]
    )
    # Then, in round start + l, part l exchanges with all later parts: each worker of a
    # later part meets one worker of every block of part l. The weight is chosen such
    # that the mean of the later workers and the mean of each block become the global
    # mean. Afterward, the blocks of part l average internally while the later parts
    # continue with the next level.
    rounds: list[list[Edges]] = [[edges] for edges in first]
    start = len(first)
    for level, part in enumerate(parts[:-1]):
        # The workers of all later parts, in order.
        later = [
            worker
            for other in parts[level + 1 :]
            for block in other
            for worker in block
        ]
        size = sum(map(len, part))
        weight = size / (len(part) * (size + len(later)))
        meeting = {
            (worker, block[index]): weight
            for index, worker in enumerate(later)
            for block in part
        }
        # Schedule the exchange, and the internal rounds after it, in parallel with the
        # rounds of the other levels.
        inside = _parallel([_averaging_rounds(block, k) for block in part])
        for offset, edges in enumerate([meeting, *inside]):
            while len(rounds) <= start + level + offset:
                rounds.append([])
            rounds[start + level + offset].append(edges)
    # The edges within one round are disjoint: merge them.
    return [{key: w for edges in one for key, w in edges.items()} for one in rounds]


def _smooth_part(n: int, k: int) -> int:
    """Returns the largest divisor of `n` whose prime factors are at most `k + 1`."""
    smooth, rest = 1, n
    for prime in range(2, k + 2):
        while rest % prime == 0:
            rest //= prime
            smooth *= prime
    return smooth


def _factors(n: int, k: int) -> list[int]:
    """Returns the shortest factorization of `n` into factors of at most `k + 1`."""
    if n == 1:
        return []
    options = [f for f in range(min(n, k + 1), 1, -1) if n % f == 0]
    return min(([f, *_factors(n // f, k)] for f in options), key=len)
