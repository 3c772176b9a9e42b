"""Communication plans: which rows each device sends in each round.

A plan splits the exchange `X <- W X` for `n` workers on `D` devices (`n / D` virtual
workers per device) into rounds. In each round, each device sends to at most one other
device and receives from at most one, so that a round is one `ppermute`. The module uses
only NumPy. A plan is computed once per matrix and number of devices.

By Koenig's theorem, the edges of a bipartite graph (senders, receivers) split into
exactly max-degree partial permutations, which is the minimum.
"""

import functools
from typing import NamedTuple

import numpy as np

# A (sender, receiver) pair.
Edge = tuple[int, int]


class Source(NamedTuple):
    """Rows of one block that each worker combines, and their weights.

    The block is the device's own one, or one received in a round.
    """

    index: np.ndarray  # shape=[n, m], int32: rows of the block that worker i uses
    weight: np.ndarray  # shape=[n, m], float64: weights of the rows, 0 if unused


class Round(NamedTuple):
    """One `ppermute` between devices."""

    pairs: tuple[Edge, ...]  # (sender, receiver) devices
    rows: np.ndarray  # shape=[D, k], int32: virtual workers whose rows a device sends
    source: Source  # how workers combine the received rows


class Plan(NamedTuple):
    """A complete exchange: the local part, and the rounds between devices."""

    matrix: np.ndarray  # shape=[n, n], float64
    num_devices: int
    local: Source  # how workers combine the rows of their own device
    rounds: tuple[Round, ...]


def make_plan(matrix: np.ndarray, num_devices: int) -> Plan:
    """Splits the exchange `X <- W X` into rounds between devices.

    Args:
      matrix: Any real matrix of shape `[n, n]`.
      num_devices: Number of devices `D`, a divisor of `n`. Device `d` holds the workers
        from `d n / D` to `(d + 1) n / D - 1`.

    Returns:
      The plan. The number of rounds is the maximum degree of the device graph, the
      minimum possible.
    """
    n = matrix.shape[0]
    per_device = n // num_devices
    # The device graph: an edge wherever a receiver needs any row of a sender.
    blocks = matrix.reshape(num_devices, per_device, num_devices, per_device)
    needed = (blocks != 0).any(axis=(1, 3))  # [receiver, sender]
    edges = [(int(s), int(r)) for r, s in np.argwhere(needed) if s != r]
    # Each worker combines the rows of its own device.
    all_rows = np.arange(per_device)
    local = _source(
        [(matrix, w, w // per_device, all_rows) for w in range(n)], per_device
    )
    rounds = []
    for pairs in partial_permutations(edges, num_devices):
        # Each sender sends only the rows that some worker of its receiver uses.
        sender_of = {receiver: sender for sender, receiver in pairs}
        used = {
            sender: np.flatnonzero((blocks[receiver, :, sender] != 0).any(axis=0))
            for sender, receiver in pairs
        }
        # All devices send arrays of one shape: pad shorter lists with row 0, which the
        # receiver ignores.
        most = max(map(len, used.values()))
        rows = np.zeros((num_devices, most), np.int32)
        for sender, chosen in used.items():
            rows[sender, : len(chosen)] = chosen
        # What each worker combines; nothing if its device receives nothing.
        workers = []
        for worker in range(n):
            sender = sender_of.get(worker // per_device)
            chosen = np.array([], int) if sender is None else used[sender]
            workers.append((matrix, worker, sender or 0, chosen))
        rounds.append(Round(tuple(pairs), rows, _source(workers, per_device)))
    return Plan(matrix, num_devices, local, tuple(rounds))


def partial_permutations(edges: list[Edge], size: int) -> list[list[Edge]]:
    """Splits directed edges into the minimum number of partial permutations.

    Groups the edges by offset if that reaches the minimum, as on rings, tori, and
    exponential graphs. Each round is then a shift, which suits physical rings of
    devices. Otherwise, colors the edges.

    Args:
      edges: Distinct (sender, receiver) pairs.
      size: Number of nodes.

    Returns:
      One list of edges per round. The number of lists is the maximum in- or out-degree.
    """
    if not edges:
        return []
    # The maximum degree is a lower bound on the number of rounds.
    senders, receivers = np.array(edges).T
    degree = max(np.bincount(senders).max(), np.bincount(receivers).max())
    # All edges of one offset form a partial permutation.
    shifts: dict[int, list[Edge]] = {}
    for sender, receiver in edges:
        shifts.setdefault((receiver - sender) % size, []).append((sender, receiver))
    if len(shifts) == degree:
        return list(shifts.values())
    return _color(edges, size, int(degree))


def _color(edges: list[Edge], size: int, degree: int) -> list[list[Edge]]:
    """Colors the edges of a bipartite graph with `degree` colors.

    Adds one edge at a time. If no color is free at both of its ends, an exchange of two
    colors along an alternating path frees one (the proof of Koenig's theorem).

    Args:
      edges: Distinct (sender, receiver) pairs.
      size: Number of nodes.
      degree: Maximum in- or out-degree.

    Returns:
      The edges of each color.
    """
    # sent[u, c]: receiver of the edge of color c that leaves u, or -1 if there is none.
    # received[v, c]: sender of the edge of color c that enters v, or -1.
    sent = np.full((size, degree), -1)
    received = np.full((size, degree), -1)
    for sender, receiver in edges:
        # The first color that is free at the sender, and at the receiver. Both exist,
        # because each node has at most `degree` edges.
        free = int(np.argmin(sent[sender] >= 0))
        other = int(np.argmin(received[receiver] >= 0))
        if received[receiver, free] >= 0:
            # `free` is taken at the receiver: collect the path that starts there and
            # alternates between the colors `free` and `other`. It cannot reach the
            # sender, where `free` is unused.
            path, node, color, at_receiver = [], receiver, free, True
            while (nxt := (received if at_receiver else sent)[node, color]) >= 0:
                path.append((nxt, node) if at_receiver else (node, nxt))
                node, at_receiver = int(nxt), not at_receiver
                color = other if color == free else free
            # Exchange the two colors along the path: first clear the old colors, then
            # set the new ones. Afterward, `free` is free at the receiver, too.
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


def _source(
    workers: list[tuple[np.ndarray, int, int, np.ndarray]], per_device: int
) -> Source:
    """Packs the rows with a nonzero weight for each worker.

    Args:
      workers: For each worker: the matrix, the worker's index, the device that holds
        the block, and the rows of that device that the block consists of.
      per_device: Number of virtual workers per device.

    Returns:
      The source, padded with zero weights to the largest number of rows.
    """
    # Positions in the block and weights of the rows that each worker uses.
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


# The bytes of the matrix are the key, because arrays are not hashable.
@functools.lru_cache(maxsize=256)
def _cached(buffer: bytes, n: int, num_devices: int) -> Plan:
    return make_plan(np.frombuffer(buffer).reshape(n, n), num_devices)


def cached_plan(matrix: np.ndarray, num_devices: int) -> Plan:
    """Returns `make_plan(matrix, num_devices)`, cached by the matrix's values."""
    matrix = np.ascontiguousarray(matrix, np.float64)
    return _cached(matrix.tobytes(), matrix.shape[0], num_devices)
