"""Exact averaging in finitely many sparse rounds, for any connected graph.

The factors are sparse matrices that respect the graph and whose product is `11^T / n`.
DeFacto (Lu & De Sa, ICML 2021) builds its optimal algorithm on them.
"""

import numpy as np

from decentral_jax.topology.core import Topology, check_topology


def exact_factors(topology: Topology) -> list[np.ndarray]:
    r"""Factors :math:`11^T/n = F_m \cdots F_1` into few matrices on the graph's edges.

    Returns the shorter one of two constructions:

    - Gather along a spanning tree to the graph's center, and broadcast back: twice the
      radius.
    - The minimal polynomial of a symmetric `W`: one factor
      :math:`(W - \mu I)/(1 - \mu)` per distinct eigenvalue :math:`\mu \ne 1`. On a
      ring, hypercube, or complete graph the number of factors is the diameter, which
      is optimal. This construction is used only if the product is accurate in float32.

    Args:
      topology: A static, connected topology.

    Returns:
      The factors in the order of application, float64 arrays of shape `[n, n]`.

    Raises:
      TypeError: If the topology is a schedule.
      ValueError: If the topology is not connected.

    Example:
      >>> import decentral_jax as dj
      >>> len(dj.topology.exact_factors(dj.topology.ring(8)))
      4
      >>> len(dj.topology.exact_factors(dj.topology.path(8)))
      7
    """
    check_topology(topology, doubly_stochastic=False, static=True)
    tree = _tree_factors(topology)
    return _polynomial_factors(topology, fewer_than=len(tree)) or tree


def _tree_factors(topology: Topology) -> list[np.ndarray]:
    """Returns factors that sum along a spanning tree and broadcast the mean back."""
    import networkx as nx

    n = topology.num_workers
    # The tree carries sums up and the mean down, so its edges must go both ways.
    mutual = topology.graph.to_undirected(reciprocal=True)
    if not nx.is_connected(mutual):
        raise ValueError(
            "topology must be connected by bidirectional edges, got "
            f"{topology!r}: use an undirected graph."
        )
    # A breadth-first tree from the center has the smallest possible depth, the radius.
    root = nx.center(mutual)[0] if n > 1 else 0
    depth = nx.single_source_shortest_path_length(mutual, root)
    parent = {v: u for u, v in nx.bfs_edges(mutual, root)}
    levels = [
        [v for v in range(n) if depth[v] == level]
        for level in range(1, max(depth.values()) + 1)
    ]
    # One pair of factors per level, shape [n, n]: `gather` adds the children's values
    # to their parents', `spread` copies the parents' values to their children.
    up, down = [], []
    for level in levels:
        gather, spread = np.eye(n), np.eye(n)
        for child in level:
            gather[parent[child], child] = 1.0
            spread[child] = np.eye(n)[parent[child]]
        up.append(gather)
        down.append(spread)
    # Sum from the deepest level up to the root, then broadcast from the root. The last
    # summing factor also divides by n.
    factors = [*reversed(up), *down] or [np.eye(n)]
    factors[len(up) - 1 if up else 0][root] /= n
    return factors


def _polynomial_factors(topology: Topology, fewer_than: int) -> list[np.ndarray] | None:
    """Returns the factors of the minimal polynomial of `W`.

    Returns None if `W` is not symmetric and stochastic, there are not fewer factors
    than `fewer_than`, or the product is inaccurate in float32.
    """
    n = topology.num_workers
    if n == 1 or not (topology.is_symmetric and topology.is_row_stochastic):
        return None
    # The distinct eigenvalues in ascending order, without the eigenvalue 1.
    values = np.sort(np.real(topology.eigenvalues))[:-1]
    distinct = values[np.append(True, np.diff(values) > 1e-9)]
    if len(distinct) >= fewer_than or 1 - distinct[-1] < 1e-9:
        return None
    # Order the roots greedily (Leja order) so that every partial product stays small.
    # `growth` holds the partial product at each distinct eigenvalue.
    remaining, growth, factors = list(distinct), np.ones(len(distinct)), []
    while remaining:
        products = [growth * (distinct - root) / (1 - root) for root in remaining]
        best = int(np.argmin([np.abs(product).max() for product in products]))
        growth, root = products[best], remaining.pop(best)
        factors.append((topology.matrix - root * np.eye(n)) / (1 - root))
    # Accept the factors only if their product is accurate in float32.
    product = np.eye(n, dtype=np.float32)
    for factor in factors:
        product = factor.astype(np.float32) @ product
    return factors if np.abs(product * n - 1).max() < 1e-5 else None
