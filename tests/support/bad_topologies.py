"""Bad inputs of topologies; see `test_bad_inputs`."""

from functools import partial, update_wrapper

import networkx as nx
import numpy as np

import decentral_jax as dj

T = dj.topology
RING, ONE_PEER = T.ring(8), T.one_peer_ring(8)
HALVES = T.Topology(np.kron(np.eye(2), np.full((4, 4), 0.25)), "halves")
CYCLE = nx.cycle_graph(4)
DIRECTED_CYCLE = nx.DiGraph([(0, 1), (1, 2), (2, 0)])


def partial_named(fn, **kwargs):
    return update_wrapper(partial(fn, **kwargs), fn)


def weighted(*weights):
    graph = nx.Graph()
    graph.add_weighted_edges_from((0, i + 1, w) for i, w in enumerate(weights))
    return graph


MATRIX = {
    "not square": (np.ones((2, 3)) / 3, r"ValueError: matrix | \(2, 3\) | \[n, n\]"),
    "vector": (np.ones(3) / 3, r"ValueError: matrix | \(3,\) | \[n, n\]"),
    "ragged": ([[1, 0], [1]], r"ValueError: matrix | \[1, 0\], \[1\] | \[n, n\]"),
    "empty": (np.zeros((0, 0)), r"ValueError: matrix | \(0, 0\) | \[n, n\]"),
    "sums": (np.full((2, 2), 0.7), "ValueError: matrix | 1.4 to 1.4 | divide each row"),
    "negative": ([[1.5, -0.5], [-0.5, 1.5]], "ValueError: matrix | -0.5 | from_graph"),
    "nan": ([[0, 1], [np.nan, 1]], r"ValueError: matrix | nan at \[1, 0\] | finite"),
    "complex": (np.eye(2) * 1j, "TypeError: matrix | complex128 | float array"),
    "expected": ([["a"]], "TypeError: matrix | <U1 | float array"),
    "disconnected": (np.eye(3), "ValueError: from_matrix | 3 parts | add edges"),
}
COUNTS = (
    T.ring,
    T.path,
    T.star,
    T.complete,
    T.exponential,
    T.one_peer_exponential,
    T.one_peer_ring,
    partial_named(T.base_graph, k=2),
    partial_named(T.erdos_renyi, p=0.5, seed=1),
)
GRAPHS = {
    "weights word": (
        lambda: T.from_graph(CYCLE, weights="uniform"),
        "ValueError: weights | 'uniform' | 'metropolis', 'max_degree', 'given'",
    ),
    "no graph": (
        lambda: T.from_graph(np.eye(3)),
        "TypeError: graph | ndarray | from_matrix",
    ),
    "multigraph": (
        lambda: T.from_graph(nx.MultiGraph([(0, 1), (0, 1)])),
        r"ValueError: graph | MultiGraph | nx\.Graph\(graph\)",
    ),
    "empty graph": (
        lambda: T.from_graph(nx.Graph()),
        "ValueError: graph | 0 nodes | at least one",
    ),
    "disconnected graph": (
        lambda: T.from_graph(nx.Graph([(0, 1), (2, 3)])),
        "ValueError: graph | 2 parts | add edges",
    ),
    "directed graph": (
        lambda: T.from_graph(DIRECTED_CYCLE),
        "ValueError: weights='metropolis' | DiGraph | to_undirected",
    ),
    "weight missing": (
        lambda: T.from_graph(CYCLE, weights="given"),
        r'ValueError: edge \(0, 1\) | None | edge attribute "weight"',
    ),
    "weight above 1": (
        lambda: T.from_graph(weighted(1.5), weights="given"),
        r'ValueError: edge \(0, 1\) | 1.5 | edge attribute "weight"',
    ),
    "weight nan": (
        lambda: T.from_graph(weighted(np.nan), weights="given"),
        r'ValueError: edge \(0, 1\) | nan | edge attribute "weight"',
    ),
    "weights' sum": (
        lambda: T.from_graph(weighted(0.75, 0.5), weights="given"),
        "ValueError: weights | 1.25 for worker 0 | scale them down",
    ),
    "rows": (lambda: T.grid(0, 3), "ValueError: rows | 0 | >= 1"),
    "columns": (lambda: T.torus(3, 1.5), "TypeError: columns | 1.5 | >= 1"),
    "dimension": (lambda: T.hypercube(-1), "ValueError: dimension | -1 | >= 0"),
    "k": (lambda: T.base_graph(8, 0), "ValueError: k must | got 0 | >= 1"),
    "p zero": (
        lambda: T.erdos_renyi(8, 0, 1),
        r"ValueError: p must | 0.0 | \(0.0, 1.0\]",
    ),
    "p nan": (lambda: T.erdos_renyi(8, np.nan, 1), "ValueError: p must | nan | range"),
    "seed": (lambda: T.erdos_renyi(8, 0.5, -1), "ValueError: seed | -1 | >= 0"),
    "disconnected erdos_renyi": (
        lambda: T.erdos_renyi(16, 0.05, 0),
        "ValueError: p=0.05 | n=16 | raise p",
    ),
    "kappa zero": (lambda: RING.lazy(0), r"ValueError: kappa | 0.0 | \(0.0, 1.0\]"),
    "kappa above 1": (lambda: RING.lazy(1.1), "ValueError: kappa | 1.1 | range"),
    "kappa word": (lambda: ONE_PEER.lazy("half"), "TypeError: kappa | 'half' | float"),
    "no rounds": (lambda: T.schedule([]), "ValueError: topologies | none | one"),
    "matrices": (
        lambda: T.schedule([np.eye(2)]),
        "TypeError: topologies | array | Topology",
    ),
    "sizes differ": (
        lambda: T.schedule([T.ring(3), T.ring(4)]),
        r"ValueError: topologies | \[3, 4\] | same number of workers",
    ),
    "disconnected schedule": (
        lambda: T.schedule([HALVES, HALVES]),
        "ValueError: topologies | period 2 | add a round",
    ),
    "schedule of one": (
        lambda: T.schedule(RING),
        r"TypeError: topologies | ring\(8\) | list",
    ),
    "factors of a schedule": (
        lambda: T.exact_factors(ONE_PEER),
        r"TypeError: topology | one_peer_ring | topology\.ring\(n\)",
    ),
    "factors of a disconnected graph": (
        lambda: T.exact_factors(HALVES),
        "ValueError: topology | halves | add edges",
    ),
    "factors of a directed graph": (
        lambda: T.exact_factors(T.exponential(8)),
        r"ValueError: topology | exponential\(8\) | undirected",
    ),
}


def rows():
    """Yields (id, call, expected error)."""
    yield from ((name, *row) for name, row in GRAPHS.items())
    for name, (matrix, expected) in MATRIX.items():
        yield f"matrix {name}", partial(T.from_matrix, matrix), expected
    for make in COUNTS:
        name = make.__name__
        yield f"{name}(0)", partial(make, 0), "ValueError: n must | 0 | >= 1"
        yield f"{name}(2.5)", partial(make, 2.5), "TypeError: n must | 2.5 | >= 1"
