"""Static topologies: common communication graphs and their weights.

Each function returns a `Topology`. Undirected graphs have Metropolis-Hastings weights
by default, which are symmetric and doubly stochastic on every graph.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from decentral_jax._validation import check_choice, check_int, check_interval
from decentral_jax.topology.core import Topology, check_topology

if TYPE_CHECKING:
    import networkx as nx

Weights = Literal["metropolis", "max_degree", "given", "push"]


def ring(n: int) -> Topology:
    """Returns a ring: each worker has two neighbors, and all weights are 1/3.

    `ring(n).lazy(0.75)` has the weights (1/4, 1/2, 1/4) of the DeTAG paper.

    Args:
      n: Number of workers.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.ring(8)
      Topology(ring(8): 8 workers, degree 2, spectral gap 0.195)
    """
    n = check_int("n", n, 1)
    edges = [(i, (i + 1) % n) for i in range(n) if n > 1]
    return _metropolis(n, edges, f"ring({n})")


def path(n: int) -> Topology:
    """Returns a path: `n` workers in a line, each joined to the next one.

    Args:
      n: Number of workers.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.path(8).diameter
      7
    """
    n = check_int("n", n, 1)
    return _metropolis(n, [(i, i + 1) for i in range(n - 1)], f"path({n})")


def grid(rows: int, columns: int) -> Topology:
    """Returns a rectangular grid.

    Args:
      rows: Number of rows.
      columns: Number of columns.

    Returns:
      The topology. Worker `r * columns + c` is at row `r` and column `c`.

    Raises:
      TypeError: If `rows` or `columns` is not an integer.
      ValueError: If `rows` or `columns` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.grid(2, 3).num_workers
      6
    """
    return _lattice(rows, columns, "grid", periodic=False)


def torus(rows: int, columns: int) -> Topology:
    """Returns a torus: a grid with joined borders and four neighbors per worker.

    Args:
      rows: Number of rows.
      columns: Number of columns.

    Returns:
      The topology. Worker `r * columns + c` is at row `r` and column `c`.

    Raises:
      TypeError: If `rows` or `columns` is not an integer.
      ValueError: If `rows` or `columns` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.torus(3, 4)
      Topology(torus(3, 4): 12 workers, degree 4, spectral gap 0.4)
    """
    return _lattice(rows, columns, "torus", periodic=True)


def hypercube(dimension: int) -> Topology:
    """Returns a hypercube, which joins workers whose indices differ in one bit.

    Args:
      dimension: Base-2 logarithm of the number of workers.

    Returns:
      The topology, with `2**dimension` workers.

    Raises:
      TypeError: If `dimension` is not an integer.
      ValueError: If `dimension` is negative.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.hypercube(3)
      Topology(hypercube(3): 8 workers, degree 3, spectral gap 0.5)
    """
    dimension = check_int("dimension", dimension, 0)
    n = 2**dimension
    edges = [(i, i ^ (1 << b)) for i in range(n) for b in range(dimension)]
    return _metropolis(n, edges, f"hypercube({dimension})")


def complete(n: int) -> Topology:
    """Returns the complete graph with weights 1/n: one round is an exact average.

    Args:
      n: Number of workers.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.complete(8).averages_exactly
      True
    """
    n = check_int("n", n, 1)
    return Topology(np.full((n, n), 1 / n), f"complete({n})")


def star(n: int) -> Topology:
    """Returns a star: worker 0 is the only neighbor of every other worker.

    Args:
      n: Number of workers.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.star(8).max_degree
      7
    """
    n = check_int("n", n, 1)
    return _metropolis(n, [(0, i) for i in range(1, n)], f"star({n})")


def exponential(n: int) -> Topology:
    """Returns the static exponential graph: worker `i` sends to `(i + 2^k) mod n`.

    The graph is directed with equal weights. It is doubly stochastic with degree
    `ceil(log2 n)` and a spectral gap of order `1/log n` (Ying et al., "Exponential
    Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021).

    Args:
      n: Number of workers.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` is not an integer.
      ValueError: If `n` is below 1.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.exponential(8)
      Topology(exponential(8): 8 workers, degree 3, spectral gap 0.5)
    """
    n = check_int("n", n, 1)
    offsets = [2**k for k in range((n - 1).bit_length())]
    matrix = np.eye(n)
    for offset in offsets:
        # Column i has an entry in row i + offset: worker i sends there.
        matrix += np.roll(np.eye(n), offset, axis=0)
    return Topology(matrix / (1 + len(offsets)), f"exponential({n})")


def erdos_renyi(n: int, p: float, seed: int) -> Topology:
    """Returns a random graph that joins each pair of workers with probability `p`.

    Args:
      n: Number of workers.
      p: Probability of an edge, in (0, 1].
      seed: Seed for the random edges; the same seed gives the same graph.

    Returns:
      The topology.

    Raises:
      TypeError: If `n` or `seed` is not an integer, or `p` is not a number.
      ValueError: If any argument is out of range, or the random graph is not connected.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.erdos_renyi(8, 0.5, seed=1).is_connected
      True
    """
    import networkx as nx

    n = check_int("n", n, 1)
    check_interval("p", p, 0.0, 1.0, closed="right")
    graph = nx.gnp_random_graph(n, p, seed=check_int("seed", seed, 0))
    if not nx.is_connected(graph):
        raise ValueError(
            f"erdos_renyi(n={n}, p={p}, seed={seed}) is not connected: raise p (random "
            "graphs are likely to be connected above about "
            f"p = {np.log(max(n, 2)) / n:.2g}) or pass another seed."
        )
    return _metropolis(n, graph.edges, f"erdos_renyi({n}, {p:g})")


def from_graph(graph: "nx.Graph", *, weights: Weights = "metropolis") -> Topology:
    r"""Returns the topology of a networkx graph; workers are numbered in node order.

    With :math:`d_i` as the degree of worker `i`, the weights of an edge are

    - "metropolis": :math:`1 / (1 + \max(d_i, d_j))` (Metropolis-Hastings),
    - "max_degree": :math:`1 / (1 + \max_k d_k)`,
    - "given": the edge attribute "weight"; in a directed graph, the edge `(j, i)` holds
      the weight that worker `i` applies to the value of worker `j`;
    - "push": :math:`1 / (1 + d_j)`, where :math:`d_j` is the out-degree of the sender:
      each worker splits its value evenly between itself and its receivers. The columns
      sum to one, but the rows need not. Use these weights with `dj.sgp`.

    Except for "push", the remaining weight goes on the diagonal.

    Args:
      graph: A connected networkx graph. A directed graph needs the weights "given" or
        "push".
      weights: "metropolis", "max_degree", "given", or "push".

    Returns:
      The topology.

    Raises:
      TypeError: If `graph` is not a networkx graph.
      ValueError: If the graph is empty, a multigraph, or not connected, or if any
        weight is missing or negative.

    Example:
      >>> import decentral_jax as dj, networkx as nx
      >>> dj.topology.from_graph(nx.petersen_graph()).max_degree
      3
    """
    import networkx as nx

    check_choice("weights", weights, get_args(Weights))
    if not isinstance(graph, nx.Graph):
        raise TypeError(
            f"graph must be a networkx graph, got {type(graph).__name__}: for a "
            "matrix, use dj.topology.from_matrix."
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
    # Edges between worker indices, without self-loops.
    number = {node: index for index, node in enumerate(graph)}
    edges = [(number[u], number[v]) for u, v in graph.edges if u != v]
    name = graph.name or "graph"
    if weights == "metropolis":
        topology = _metropolis(len(graph), edges, name)
    elif weights == "push":
        # sends[i, j]: whether worker j sends to worker i, itself included.
        sends = np.eye(len(graph), dtype=bool)
        for sender, receiver in edges:
            sends[receiver, sender] = True
            sends[sender, receiver] |= not graph.is_directed()
        topology = Topology(sends / sends.sum(0), name)
    else:
        topology = _weighted(graph, number, weights, name)
    return _connected(topology)


def from_matrix(matrix: ArrayLike) -> Topology:
    """Returns the topology of a custom mixing matrix of a connected graph.

    Args:
      matrix: Mixing matrix of shape `[n, n]`. Row `i` holds the weights that worker `i`
        applies to each worker's value. Rows or columns must sum to one.

    Returns:
      The topology.

    Raises:
      TypeError: If the matrix does not hold real numbers.
      ValueError: If the matrix is not square, not finite, or not stochastic, has
        negative weights, or its graph is not connected.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.from_matrix([[0.5, 0.5], [0.5, 0.5]]).spectral_gap
      1.0
    """
    # `Topology` converts the matrix and reports what is wrong with it.
    topology = Topology(cast(np.ndarray, matrix), "from_matrix")
    if (topology.matrix < 0).any():
        raise ValueError(
            f"matrix must not have negative weights, got {topology.matrix.min():.6g}: "
            "compute the weights with dj.topology.from_graph."
        )
    return _connected(topology)


def reweighted(topology: Topology, shares: ArrayLike) -> Topology:
    r"""Returns a topology on the same edges that preserves a weighted mean.

    With shares :math:`b` and the symmetric matrix :math:`W`

    .. math:: H_{ij} = W_{ij} \min(1, b_j / b_i) \quad (j \ne i),

    and the diagonal completes each row to one. Then :math:`H 1 = 1` and
    :math:`b^T H = b^T`, so mixing preserves :math:`\sum_i b_i x_i` and moves all values
    toward it (Metropolis et al., 1953; Hastings, 1970). For a topology that averages
    exactly, :math:`H = 1 b^T` also averages exactly.

    Args:
      topology: A static, symmetric, doubly stochastic topology.
      shares: Weights :math:`b` of the workers, positive, shape `[n]`, such as each
        worker's number of examples. They are scaled to sum to one.

    Returns:
      The topology. It is doubly stochastic only if all shares are equal.

    Raises:
      TypeError: If the topology is a schedule.
      ValueError: If the topology is not symmetric or not doubly stochastic, or any
        share is not positive.

    Example:
      >>> import decentral_jax as dj, numpy as np
      >>> hubs = dj.topology.reweighted(dj.topology.ring(4), [4, 1, 1, 2])
      >>> np.round(np.array([4, 1, 1, 2]) @ hubs.matrix, 6)
      array([4., 1., 1., 2.])
    """
    # The scale of `b` does not matter: only ratios of its entries are used.
    b = np.asarray(shares, np.float64)
    if b.shape != (topology.num_workers,) or not (np.isfinite(b) & (b > 0)).all():
        raise ValueError(
            f"shares must be {topology.num_workers} positive numbers, one per worker "
            f"of {topology!r}, got {shares!r}."
        )
    if np.allclose(b, b[0], rtol=1e-9):
        return topology
    check_topology(topology, symmetric=True, static=True)
    name = f"{topology.name}.reweighted"
    if topology.averages_exactly:
        return Topology(np.tile(b / b.sum(), (len(b), 1)), name)
    # Off the diagonal, H_ij = W_ij min(1, b_j / b_i); the diagonal completes the rows.
    matrix = topology.matrix * np.minimum(1, b[None, :] / b[:, None])
    np.fill_diagonal(matrix, 0)
    return Topology(_fill_diagonal(matrix), name)


def _connected(topology: Topology) -> Topology:
    """Returns the topology; raises `ValueError` if it is not connected."""
    import networkx as nx

    if not topology.is_connected:
        parts = nx.number_strongly_connected_components(topology.graph)
        raise ValueError(
            f"{topology.name} must be connected, got {parts} parts that do not "
            "communicate with each other: add edges between them."
        )
    return topology


def _lattice(rows: int, columns: int, name: str, periodic: bool) -> Topology:
    """Returns a grid in row-major order, or a torus if `periodic`."""
    import networkx as nx

    rows, columns = check_int("rows", rows, 1), check_int("columns", columns, 1)
    graph = nx.grid_2d_graph(rows, columns, periodic=periodic)
    edges = [(a * columns + b, c * columns + d) for (a, b), (c, d) in graph.edges]
    return _metropolis(rows * columns, edges, f"{name}({rows}, {columns})")


def _metropolis(n: int, edges: Iterable[tuple[int, int]], name: str) -> Topology:
    """Returns the topology of undirected edges with Metropolis-Hastings weights."""
    adjacency = np.zeros((n, n), bool)
    for i, j in edges:
        if i != j:
            adjacency[i, j] = adjacency[j, i] = True
    degree = adjacency.sum(1)
    matrix = adjacency / (1.0 + np.maximum.outer(degree, degree))
    return Topology(_fill_diagonal(matrix), name)


def _weighted(
    graph: "nx.Graph", number: Mapping[Hashable, int], weights: Weights, name: str
) -> Topology:
    """Returns the topology of a graph with the weights "max_degree" or "given".

    Args:
      graph: The graph.
      number: Worker index of each node.
      weights: "max_degree" or "given".
      name: Name of the topology.
    """
    matrix = np.zeros((len(graph), len(graph)))
    # The maximum degree, without self-loops.
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
            "the weights of each worker's neighbors must sum to at most 1, got "
            f"{matrix.sum(1).max():.6g} for worker {worst}: scale them down."
        )
    return Topology(_fill_diagonal(matrix), name)


def _fill_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Adds the weight that each row lacks to the diagonal, so that rows sum to one."""
    return matrix + np.diag(1.0 - matrix.sum(1))
