"""From a matrix to messages: which rows a device sends in which round.

A plan splits the exchange `X <- W X` for `n` workers on `D` devices (`n / D` virtual
workers each) into rounds; in a round each device sends to at most one other device and
receives from at most one, so that a round is one `ppermute`. NumPy only; computed once
for each matrix and number of devices.

Koenig's theorem: the edges of a bipartite graph (senders, receivers) split into exactly
max-degree partial permutations, the fewest possible.
"""

import functools
from typing import NamedTuple

import numpy as np

Edge = tuple[int, int]


class Source(NamedTuple):
    """Rows a worker may combine, and how: its own device's block or a received one."""

    index: np.ndarray  # shape=[n, m], int32: rows of this source worker i uses
    weight: np.ndarray  # shape=[n, m], float64: their weights, 0 where unused


class Round(NamedTuple):
    """One `ppermute` between devices."""

    pairs: tuple[Edge, ...]  # (sender, receiver) devices
    rows: np.ndarray  # shape=[D, k], int32: virtual workers whose rows a device sends
    source: Source  # how the received rows are combined


class Plan(NamedTuple):
    """The whole exchange: what stays on the device and what the rounds bring."""

    matrix: np.ndarray  # shape=[n, n], float64
    num_devices: int
    local: Source
    rounds: tuple[Round, ...]


def make_plan(matrix: np.ndarray, num_devices: int) -> Plan:
    """Splits `X <- W X` into rounds for workers laid out in order over devices.

    Args:
      matrix: Any real matrix of shape `[n, n]`.
      num_devices: `D`, a divisor of `n`; device `d` holds workers `d n / D` and on.

    Returns:
      The plan; its rounds are as few as the device graph's largest degree.
    """
    n = matrix.shape[0]
    per_device = n // num_devices
    blocks = matrix.reshape(num_devices, per_device, num_devices, per_device)
    needed = (blocks != 0).any(axis=(1, 3))  # [receiver, sender]
    edges = [(int(s), int(r)) for r, s in np.argwhere(needed) if s != r]
    everything = np.arange(per_device)
    local = _source(
        [(matrix, w, w // per_device, everything) for w in range(n)], per_device
    )
    rounds = []
    for pairs in partial_permutations(edges, num_devices):
        sender_of = {receiver: sender for sender, receiver in pairs}
        used = {
            sender: np.flatnonzero((blocks[receiver, :, sender] != 0).any(axis=0))
            for sender, receiver in pairs
        }
        most = max(map(len, used.values()))
        rows = np.zeros((num_devices, most), np.int32)
        for sender, chosen in used.items():
            rows[sender, : len(chosen)] = chosen
        workers = []
        for worker in range(n):
            sender = sender_of.get(worker // per_device)
            chosen = np.array([], int) if sender is None else used[sender]
            workers.append((matrix, worker, sender or 0, chosen))
        rounds.append(Round(tuple(pairs), rows, _source(workers, per_device)))
    return Plan(matrix, num_devices, local, tuple(rounds))


def partial_permutations(edges: list[Edge], size: int) -> list[list[Edge]]:
    """Splits directed edges into the fewest partial permutations.

    By offset where that is already the fewest (rings, tori, exponential graphs: every
    round is a shift, which suits a physical ring); by edge coloring otherwise.

    Args:
      edges: Different (sender, receiver) pairs.
      size: The number of nodes.

    Returns:
      As many lists as the largest in- or out-degree.
    """
    if not edges:
        return []
    senders, receivers = np.array(edges).T
    degree = max(np.bincount(senders).max(), np.bincount(receivers).max())
    shifts: dict[int, list[Edge]] = {}
    for sender, receiver in edges:
        shifts.setdefault((receiver - sender) % size, []).append((sender, receiver))
    if len(shifts) == degree:
        return list(shifts.values())
    return _color(edges, size, int(degree))


def _color(edges: list[Edge], size: int, degree: int) -> list[list[Edge]]:
    """Bipartite edge coloring by alternating paths."""
    # sent[u, c] is the receiver of u's message of color c, -1 if none; received alike.
    sent = np.full((size, degree), -1)
    received = np.full((size, degree), -1)
    for sender, receiver in edges:
        free = int(np.argmin(sent[sender] >= 0))
        other = int(np.argmin(received[receiver] >= 0))
        if received[receiver, free] >= 0:
            # Swap the two colors along the path that starts at the receiver.
            path, node, color, at_receiver = [], receiver, free, True
            while (nxt := (received if at_receiver else sent)[node, color]) >= 0:
                path.append((nxt, node) if at_receiver else (node, nxt))
                node, at_receiver = int(nxt), not at_receiver
                color = other if color == free else free
            colors = [free if k % 2 == 0 else other for k in range(len(path))]
            for (u, v), c in zip(path, colors, strict=True):
                sent[u, c] = received[v, c] = -1
            for (u, v), c in zip(path, colors, strict=True):
                swapped = other if c == free else free
                sent[u, swapped], received[v, swapped] = v, u
        sent[sender, free], received[receiver, free] = receiver, sender
    return [
        [(u, int(sent[u, c])) for u in range(size) if sent[u, c] >= 0]
        for c in range(degree)
    ]


def _source(workers: list, per_device: int) -> Source:
    """Packs, for each worker, the rows with a weight other than 0."""
    picked = []
    for matrix, worker, device, rows in workers:
        weights = matrix[worker, device * per_device + rows]
        keep = np.flatnonzero(weights)
        picked.append((keep, weights[keep]))
    most = max(len(keep) for keep, _ in picked)
    index = np.zeros((len(workers), most), np.int32)
    weight = np.zeros((len(workers), most))
    for worker, (keep, weights) in enumerate(picked):
        index[worker, : len(keep)], weight[worker, : len(keep)] = keep, weights
    return Source(index, weight)


@functools.lru_cache(maxsize=256)
def _cached(buffer: bytes, n: int, num_devices: int) -> Plan:
    return make_plan(np.frombuffer(buffer).reshape(n, n), num_devices)


def cached_plan(matrix: np.ndarray, num_devices: int) -> Plan:
    """`make_plan`, remembered for matrices seen before."""
    matrix = np.ascontiguousarray(matrix, np.float64)
    return _cached(matrix.tobytes(), matrix.shape[0], num_devices)
