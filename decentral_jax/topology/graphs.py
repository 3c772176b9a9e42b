"""Static topologies: the graphs of the field and how they get their weights.

Each function returns a `Topology`. Undirected graphs have Metropolis-Hastings weights
unless told otherwise: symmetric and doubly stochastic on every graph.
"""

from typing import Any, Literal, get_args

import networkx as nx
import numpy as np

from decentral_jax.topology.core import Topology, check_topology
from decentral_jax.validation import check_choice, check_int, check_interval

Weights = Literal["metropolis", "max_degree", "given", "push"]


def ring(n: int) -> Topology:
    """A cycle: each worker talks to its two neighbours, weights 1/3 each.

    `ring(n).lazy(0.75)` has the weights (1/4, 1/2, 1/4) that DeTAG's paper uses.

    Args:
      n: Number of workers.

    Returns:
      The topology.
    """
    n = check_int("n", n, 1)
    edges = [(i, (i + 1) % n) for i in range(n) if n > 1]
    return _metropolis(n, edges, f"ring({n})")


def path(n: int) -> Topology:
    """A line of `n` workers."""
    n = check_int("n", n, 1)
    return _metropolis(n, [(i, i + 1) for i in range(n - 1)], f"path({n})")


def grid(rows: int, columns: int) -> Topology:
    """A rectangular grid; worker `r * columns + c` sits at row `r`, column `c`."""
    return _lattice(rows, columns, "grid", periodic=False)


def torus(rows: int, columns: int) -> Topology:
    """A grid whose borders are joined: four neighbours each."""
    return _lattice(rows, columns, "torus", periodic=True)


def hypercube(dimension: int) -> Topology:
    """`2**dimension` workers, joined where their indices differ in one bit."""
    dimension = check_int("dimension", dimension, 0)
    n = 2**dimension
    edges = [(i, i ^ (1 << b)) for i in range(n) for b in range(dimension)]
    return _metropolis(n, edges, f"hypercube({dimension})")


def complete(n: int) -> Topology:
    """Everyone talks to everyone, weights 1/n: one round is an exact average."""
    n = check_int("n", n, 1)
    return Topology(np.full((n, n), 1 / n), f"complete({n})")


def star(n: int) -> Topology:
    """Worker 0 talks to all others, who talk to no one else."""
    n = check_int("n", n, 1)
    return _metropolis(n, [(0, i) for i in range(1, n)], f"star({n})")


def exponential(n: int) -> Topology:
    """Static exponential graph: worker `i` sends to `i + 2^k`; directed, equal weights.

    Doubly stochastic with degree `ceil(log2 n)` and spectral gap of order `1/log n`
    (Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep
    Training", NeurIPS 2021).

    Args:
      n: Number of workers.

    Returns:
      The topology.
    """
    n = check_int("n", n, 1)
    offsets = [2**k for k in range((n - 1).bit_length())]
    matrix = np.eye(n)
    for offset in offsets:
        matrix += np.roll(np.eye(n), offset, axis=0)
    return Topology(matrix / (1 + len(offsets)), f"exponential({n})")


def erdos_renyi(n: int, p: float, seed: int) -> Topology:
    """A random graph in which each pair of workers is joined with probability `p`.

    Args:
      n: Number of workers.
      p: Probability of an edge, in (0, 1].
      seed: Seed of the draw; the same seed gives the same graph.

    Returns:
      The topology.

    Raises:
      ValueError: If the drawn graph is not connected.
    """
    n = check_int("n", n, 1)
    check_interval("p", p, 0.0, 1.0, closed="right")
    graph = nx.gnp_random_graph(n, p, seed=check_int("seed", seed, 0))
    if not nx.is_connected(graph):
        raise ValueError(
            f"erdos_renyi(n={n}, p={p}, seed={seed}) is not connected: raise p (a "
            f"random graph is connected from about p = {np.log(max(n, 2)) / n:.2g} on) "
            "or pass another seed."
        )
    return _metropolis(n, graph.edges, f"erdos_renyi({n}, {p:g})")


def from_graph(graph: Any, *, weights: Weights = "metropolis") -> Topology:
    r"""Any networkx graph, its nodes in the graph's own order.

    With neighbours' degrees :math:`d_i` the weights of an edge are

    - "metropolis": :math:`1 / (1 + \max(d_i, d_j))` (Metropolis-Hastings),
    - "max_degree": :math:`1 / (1 + \max_k d_k)`,
    - "given": the edge attribute "weight"; for a directed graph the edge `(j, i)` says
      what worker `i` gives to the value of `j`;
    - "push": each worker splits its value evenly between itself and the :math:`d_j`
      workers that it sends to, :math:`1 / (1 + d_j)` each. Columns sum to one and rows
      need not: for `dj.sgp`.

    But with "push", what is left to one goes to oneself.

    Args:
      graph: A connected networkx graph; a directed one needs weights "given" or "push".
      weights: "metropolis", "max_degree", "given" or "push".

    Returns:
      The topology.

    Raises:
      TypeError: If `graph` is no networkx graph.
      ValueError: If the graph is empty, a multigraph or not connected, or its weights
        are missing or negative.

    Example:
      >>> import decentral_jax as dj, networkx as nx
      >>> dj.topology.from_graph(nx.petersen_graph()).max_degree
      3
    """
    check_choice("weights", weights, get_args(Weights))
    if not isinstance(graph, nx.Graph):
        raise TypeError(
            f"graph must be a networkx graph, got {type(graph).__name__}: for a matrix "
            "use dj.topology.from_matrix."
        )
    if not len(graph) or graph.is_multigraph():
        raise ValueError(
            f"graph must be a simple graph with at least one node, got {graph}: "
            "convert a multigraph with nx.Graph(graph)."
        )
    if graph.is_directed() and weights not in ("given", "push"):
        raise ValueError(
            f"weights={weights!r} needs an undirected graph, got {graph}: pass "
            'weights="push", weights="given" with an edge attribute "weight", or '
            "graph.to_undirected()."
        )
    number = {node: index for index, node in enumerate(graph)}
    edges = [(number[u], number[v]) for u, v in graph.edges if u != v]
    name = graph.name or "graph"
    if weights == "metropolis":
        topology = _metropolis(len(graph), edges, name)
    elif weights == "push":
        sends = np.eye(len(graph), dtype=bool)
        for sender, receiver in edges:
            sends[receiver, sender] = True
            sends[sender, receiver] |= not graph.is_directed()
        topology = Topology(sends / sends.sum(0), name)
    else:
        topology = _weighted(graph, number, weights, name)
    return _connected(topology)


def from_matrix(matrix: Any) -> Topology:
    """Any mixing matrix of a connected graph.

    Args:
      matrix: Array of shape `[n, n]`; row `i` holds what worker `i` gives to each
        worker's value. Rows or columns must sum to one.

    Returns:
      The topology.

    Raises:
      TypeError: If the matrix does not hold real numbers.
      ValueError: If it is not square, not finite, not stochastic, has negative weights
        or belongs to a graph that is not connected.
    """
    topology = Topology(matrix, "from_matrix")
    if (topology.matrix < 0).any():
        raise ValueError(
            f"matrix must not have negative weights, got {topology.matrix.min():.6g}: "
            "take weights from dj.topology.from_graph."
        )
    return _connected(topology)


def reweighted(topology: Topology, shares: Any) -> Topology:
    r"""The matrix on a topology's edges that keeps a weighted mean.

    With shares :math:`b` and the symmetric matrix :math:`W`

    .. math:: H_{ij} = W_{ij} \min(1, b_j / b_i) \quad (j \ne i),

    and what is left of each row on the diagonal: :math:`H 1 = 1` and
    :math:`b^T H = b^T`, so that :math:`\sum_i b_i x_i` stays what it is and all values
    move towards it (Metropolis et al., 1953; Hastings, 1970). A matrix that averages
    exactly keeps doing so: :math:`H = 1 b^T`.

    Args:
      topology: A static, symmetric, doubly stochastic topology.
      shares: :math:`b`, positive, shape `[n]`, such as the workers' numbers of
        examples; scaled to sum to one.

    Returns:
      The topology; it is doubly stochastic only if all shares are equal.

    Raises:
      ValueError: If the topology lacks a property, or a share is not positive.

    Example:
      >>> import decentral_jax as dj, numpy as np
      >>> hubs = dj.topology.reweighted(dj.topology.ring(4), [4, 1, 1, 2])
      >>> np.round(np.array([4, 1, 1, 2]) @ hubs.matrix, 6)
      array([4., 1., 1., 2.])
    """
    b = np.asarray(shares, np.float64)
    if b.shape != (topology.num_workers,) or not (np.isfinite(b) & (b > 0)).all():
        raise ValueError(
            f"shares must be {topology.num_workers} positive numbers, one a worker of "
            f"{topology!r}, got {shares!r}."
        )
    if np.allclose(b, b[0], rtol=1e-9):
        return topology
    check_topology(topology, symmetric=True, static=True)
    name = f"{topology.name}.reweighted"
    if topology.averages_exactly:
        return Topology(np.tile(b / b.sum(), (len(b), 1)), name)
    matrix = topology.matrix * np.minimum(1, b[None, :] / b[:, None])
    np.fill_diagonal(matrix, 0)
    return Topology(_fill_diagonal(matrix), name)


def _connected(topology: Topology) -> Topology:
    if not topology.is_connected:
        parts = nx.number_strongly_connected_components(topology.graph)
        raise ValueError(
            f"{topology.name} must be connected, got {parts} parts that never hear of "
            "each other: add edges between them."
        )
    return topology


def _lattice(rows: int, columns: int, name: str, periodic: bool) -> Topology:
    rows, columns = check_int("rows", rows, 1), check_int("columns", columns, 1)
    graph = nx.grid_2d_graph(rows, columns, periodic=periodic)
    edges = [(a * columns + b, c * columns + d) for (a, b), (c, d) in graph.edges]
    return _metropolis(rows * columns, edges, f"{name}({rows}, {columns})")


def _metropolis(n: int, edges: Any, name: str) -> Topology:
    adjacency = np.zeros((n, n), bool)
    for i, j in edges:
        if i != j:
            adjacency[i, j] = adjacency[j, i] = True
    degree = adjacency.sum(1)
    matrix = adjacency / (1.0 + np.maximum.outer(degree, degree))
    return Topology(_fill_diagonal(matrix), name)


def _weighted(graph: nx.Graph, number: dict, weights: str, name: str) -> Topology:
    matrix = np.zeros((len(graph), len(graph)))
    most = max(len(set(graph[node]) - {node}) for node in graph)
    for sender, receiver, attributes in graph.edges(data=True):
        if sender == receiver:
            continue
        weight = 1 / (1 + most) if weights == "max_degree" else attributes.get("weight")
        if weight is None or not 0 <= weight <= 1:
            raise ValueError(
                f"the edge ({sender}, {receiver}) must have a weight in [0, 1], got "
                f'{weight}: set the edge attribute "weight", or use '
                'weights="metropolis".'
            )
        matrix[number[receiver], number[sender]] = weight
        if not graph.is_directed():
            matrix[number[sender], number[receiver]] = weight
    if (matrix.sum(1) > 1 + 1e-9).any():
        worst = int(matrix.sum(1).argmax())
        raise ValueError(
            "the weights of each worker's neighbours must sum to at most 1, got "
            f"{matrix.sum(1).max():.6g} for worker {worst}: scale them down."
        )
    return Topology(_fill_diagonal(matrix), name)


def _fill_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix + np.diag(1.0 - matrix.sum(1))
