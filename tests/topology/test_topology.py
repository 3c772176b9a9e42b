"""Topologies: weights, spectra against closed forms, and graphs against networkx."""

import math

import jax
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decentral_jax as dj
from decentral_jax.topology import Topology

T = dj.topology
SLOW = [HealthCheck.too_slow]  # a loaded machine is not a failure

# name -> (topology, its undirected networkx graph, or None if it is directed)
STATIC = {
    "ring_1": (T.ring(1), nx.empty_graph(1)),
    "ring_2": (T.ring(2), nx.path_graph(2)),
    "ring_8": (T.ring(8), nx.cycle_graph(8)),
    "ring_9": (T.ring(9), nx.cycle_graph(9)),
    "path_7": (T.path(7), nx.path_graph(7)),
    "grid_3_4": (T.grid(3, 4), nx.grid_2d_graph(3, 4)),
    "torus_3_5": (T.torus(3, 5), nx.grid_2d_graph(3, 5, periodic=True)),
    "torus_2_2": (T.torus(2, 2), nx.cycle_graph(4)),
    "torus_1_1": (T.torus(1, 1), nx.empty_graph(1)),
    "hypercube_0": (T.hypercube(0), nx.empty_graph(1)),
    "hypercube_4": (T.hypercube(4), nx.hypercube_graph(4)),
    "complete_6": (T.complete(6), nx.complete_graph(6)),
    "star_7": (T.star(7), nx.star_graph(6)),
    "erdos_renyi_12": (T.erdos_renyi(12, 0.4, 3), nx.gnp_random_graph(12, 0.4, seed=3)),
    "petersen": (T.from_graph(nx.petersen_graph()), nx.petersen_graph()),
    "exponential_8": (T.exponential(8), None),
    "exponential_11": (T.exponential(11), None),
    "ring_8_lazy": (T.ring(8).lazy(0.3), nx.cycle_graph(8)),
}


def assert_doubly_stochastic(matrix):
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-12)


def product(matrices, n):
    """The product that applies the rounds in order."""
    result = np.eye(n)
    for matrix in matrices:
        result = matrix @ result
    return result


@pytest.mark.parametrize("name", STATIC)
def test_static_graphs(name):
    topology, graph = STATIC[name]
    matrix = topology.matrix
    assert_doubly_stochastic(matrix)
    assert topology.is_doubly_stochastic
    assert topology.is_connected
    assert topology.is_symmetric == (graph is not None)
    assert not matrix.flags.writeable
    if graph is None:
        return
    np.testing.assert_array_equal(matrix, matrix.T)
    assert topology.num_workers == len(graph)
    assert topology.max_degree == max(dict(graph.degree).values())
    assert topology.diameter == (nx.diameter(graph) if len(graph) > 1 else 0)
    assert nx.is_isomorphic(topology.graph.to_undirected(), graph)


@pytest.mark.parametrize("name", STATIC)
def test_spectral_facts_equal_those_of_numpy(name):
    topology, _ = STATIC[name]
    n = topology.num_workers
    # W is doubly stochastic: subtracting 1 / n leaves the other eigenvalues.
    rest = np.abs(np.linalg.eigvals(topology.matrix - 1 / n))
    assert topology.second_eigenvalue == pytest.approx(rest.max(), abs=1e-9)
    assert topology.spectral_gap == pytest.approx(1 - rest.max(), abs=1e-9)
    assert 0 < topology.spectral_gap <= 1


@pytest.mark.parametrize("n", [3, 4, 8, 15])
def test_ring_eigenvalues(n):
    expected = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(n) / n)
    np.testing.assert_allclose(
        np.sort(T.ring(n).eigenvalues), np.sort(expected), atol=1e-12
    )
    second = np.sort(np.abs(expected))[-2]
    assert T.ring(n).second_eigenvalue == pytest.approx(second, abs=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_hypercube_eigenvalues(dimension):
    values = [
        (1 + dimension - 2 * k) / (1 + dimension)
        for k in range(dimension + 1)
        for _ in range(math.comb(dimension, k))
    ]
    np.testing.assert_allclose(
        np.sort(T.hypercube(dimension).eigenvalues), np.sort(values), atol=1e-12
    )


def test_the_rings_of_the_detag_paper():
    ring = T.ring(16).lazy(0.75)
    np.testing.assert_allclose(ring.matrix[0, [15, 0, 1]], [0.25, 0.5, 0.25])
    assert ring.spectral_gap == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 8))
    gaps = [ring.lazy(kappa).spectral_gap for kappa in (1, 0.1, 0.05, 0.01)]
    np.testing.assert_allclose(gaps, [3.8e-2, 3.8e-3, 1.9e-3, 3.8e-4], rtol=2e-2)
    assert ring.lazy(0.1).name == "ring(16).lazy(0.75).lazy(0.1)"


def test_other_closed_forms():
    assert T.complete(9).second_eigenvalue == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(T.complete(4).matrix, np.full((4, 4), 0.25))
    # The slowest modes of a star are differences between leaves.
    assert T.star(6).second_eigenvalue == pytest.approx(1 - 1 / 6)
    # Ying et al. 2021, Proposition 1: for even n the gap is 2 / (1 + ceil(log2 n)).
    for n in (8, 12, 64):
        degree = math.ceil(math.log2(n))
        assert T.exponential(n).spectral_gap == pytest.approx(2 / (1 + degree))
        assert T.exponential(n).max_degree == degree


def test_exponential_sends_ahead():
    assert sorted(T.exponential(8).graph.successors(3)) == [4, 5, 7]


def test_grid_numbers_workers_row_by_row():
    assert sorted(T.grid(3, 4).graph.successors(5)) == [1, 4, 6, 9]
    assert sorted(T.torus(3, 4).graph.successors(0)) == [1, 3, 4, 8]


def test_erdos_renyi_depends_only_on_the_seed():
    one, two = T.erdos_renyi(20, 0.3, 5), T.erdos_renyi(20, 0.3, 6)
    np.testing.assert_array_equal(one.matrix, T.erdos_renyi(20, 0.3, 5).matrix)
    assert (one.matrix != two.matrix).any()
    assert T.erdos_renyi(5, 1.0, 0).max_degree == 4


@pytest.mark.parametrize("n", range(1, 18))
def test_one_peer_exponential_is_exact_iff_power_of_two(n):
    schedule = T.one_peer_exponential(n)
    assert schedule.period == max(math.ceil(math.log2(n)), 1)
    assert schedule.max_degree == min(n - 1, 1)
    for one in schedule:
        assert_doubly_stochastic(one.matrix)
    mixed = product([one.matrix for one in schedule], n)
    is_exact = np.abs(mixed - 1 / n).max() < 1e-12
    assert is_exact == (n & (n - 1) == 0)
    assert (schedule.spectral_gap > 1 - 1e-9) == is_exact


def test_one_peer_ring_turns_around():
    left, right = T.one_peer_ring(5)
    np.testing.assert_array_equal(left.matrix, right.matrix.T)
    assert list(left.graph.successors(1)) == [2]
    assert list(right.graph.successors(1)) == [0]
    assert T.one_peer_ring(5)[4] is not None
    assert 0 < T.one_peer_ring(5).spectral_gap < 1


@pytest.mark.parametrize("k", range(1, 6))
def test_base_graph_averages_exactly(k):
    for n in range(1, 41):
        schedule = T.base_graph(n, k)
        assert schedule.max_degree <= k
        assert schedule.is_symmetric
        for one in schedule:
            assert_doubly_stochastic(one.matrix)
        mixed = product([one.matrix for one in schedule], n)
        np.testing.assert_allclose(mixed, 1 / n, atol=1e-12, err_msg=f"{n}")
        # Takezawa et al. 2023, Theorem 1.
        assert len(schedule) <= 2 * math.log(n, k + 1) + 2


@pytest.mark.parametrize(
    ("n", "k", "rounds"),
    [
        *[((k + 1) ** p, k, p) for k in (1, 2, 3, 5) for p in (1, 2, 3)],
        *[(n, n - 1, 1) for n in (2, 3, 7)],
        (5, 1, 5),
        (6, 1, 4),
        (7, 1, 5),
        (6, 2, 2),
        (12, 2, 3),
        (25, 2, 6),
    ],
)
def test_base_graph_is_short(n, k, rounds):
    assert len(T.base_graph(n, k)) == rounds


def test_schedule():
    rounds = [T.ring(4), T.star(4), T.path(4)]
    schedule = T.schedule(rounds)
    assert (len(schedule), schedule.period, schedule.num_workers) == (3, 3, 4)
    assert schedule[4] is rounds[1]
    assert list(schedule) == rounds
    assert schedule.max_degree == 3
    assert schedule.is_doubly_stochastic
    mixed = product([one.matrix for one in rounds], 4)
    norm = np.linalg.norm(mixed - 0.25, 2)
    assert schedule.second_eigenvalue == pytest.approx(norm ** (1 / 3))
    lazy = schedule.lazy(0.5)
    np.testing.assert_array_equal(lazy[1].matrix, rounds[1].lazy(0.5).matrix)


def test_a_schedule_may_have_disconnected_rounds():
    halves = [np.kron(np.eye(2), np.full((2, 2), 0.5)), np.eye(4)[[2, 1, 0, 3]]]
    schedule = T.schedule([Topology(half) for half in halves])
    assert schedule.is_connected
    assert not schedule[0].is_connected


@pytest.mark.parametrize("name", STATIC)
def test_exact_factors(name):
    topology, _ = STATIC[name]
    if not topology.is_symmetric:
        return
    assert_exact_factors(topology)


def assert_exact_factors(topology):
    n, factors = topology.num_workers, T.exact_factors(topology)
    allowed = (topology.matrix != 0) | np.eye(n, dtype=bool)
    for factor in factors:
        assert not factor[~allowed].any()
    np.testing.assert_allclose(product(factors, n), 1 / n, atol=1e-9 / n)
    radius = nx.radius(topology.graph) if n > 1 else 0
    assert topology.diameter <= max(len(factors), 1) <= max(2 * radius, 1)
    # Training applies the factors in float32.
    single = product([factor.astype(np.float32) for factor in factors], n)
    np.testing.assert_allclose(single, 1 / n, rtol=2e-5)


@pytest.mark.parametrize(
    "topology",
    [
        *[T.ring(n) for n in (2, 3, 5, 8, 16)],
        T.ring(8).lazy(0.1),
        *[T.hypercube(dimension) for dimension in (1, 2, 3, 5)],
        T.complete(7),
        T.path(8),
        T.from_graph(nx.petersen_graph()),
    ],
    ids=lambda topology: topology.name,
)
def test_as_few_factors_as_the_diameter(topology):
    assert len(T.exact_factors(topology)) == topology.diameter


def test_factors_of_graphs_that_are_not_symmetric():
    graph = nx.DiGraph([(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)])
    nx.set_edge_attributes(graph, {e: 0.1 + 0.1 * e[0] for e in graph.edges}, "weight")
    topology = T.from_graph(graph, weights="given")
    assert not topology.is_column_stochastic
    assert_exact_factors(topology)


def test_from_graph_weights():
    graph = nx.Graph(name="kite")
    graph.add_edge("a", ("b", 1), weight=0.5)
    graph.add_edge("a", 2.5, weight=0.2)
    graph.add_edge("a", "a", weight=0.9)  # ignored: the diagonal takes the rest
    metropolis = T.from_graph(graph)
    assert metropolis.name == "kite"
    third = 1 / 3
    expected = [[third, third, third], [third, 2 * third, 0], [third, 0, 2 * third]]
    np.testing.assert_allclose(metropolis.matrix, expected)
    np.testing.assert_allclose(
        T.from_graph(graph, weights="max_degree").matrix, expected
    )
    np.testing.assert_allclose(
        T.from_graph(graph, weights="given").matrix,
        [[0.3, 0.5, 0.2], [0.5, 0.5, 0], [0.2, 0, 0.8]],
        atol=1e-12,
    )


def test_weight_rules_differ():
    path = nx.path_graph(4)
    assert T.from_graph(path).matrix[0, 0] == pytest.approx(2 / 3)
    tailed = nx.Graph([(0, 1), (1, 2), (1, 3), (3, 4)])
    assert T.from_graph(tailed).matrix[3, 4] == pytest.approx(1 / 3)
    max_degree = T.from_graph(tailed, weights="max_degree").matrix
    assert max_degree[3, 4] == max_degree[0, 1] == pytest.approx(1 / 4)


def test_directed_graph_with_given_weights():
    graph = nx.DiGraph()
    graph.add_weighted_edges_from([(0, 1, 0.5), (1, 2, 0.25), (2, 0, 0.75)])
    topology = T.from_graph(graph, weights="given")
    np.testing.assert_allclose(
        topology.matrix, [[0.25, 0, 0.75], [0.5, 0.5, 0], [0, 0.25, 0.75]]
    )
    assert topology.is_row_stochastic
    assert not topology.is_column_stochastic
    assert sorted(topology.graph.edges) == [(0, 1), (1, 2), (2, 0)]


def test_from_matrix_accepts_columns_that_sum_to_one():
    matrix = np.array([[0.5, 0.2, 0.5], [0.5, 0.4, 0.0], [0.0, 0.4, 0.5]])
    topology = T.from_matrix(matrix)
    assert topology.is_column_stochastic
    assert not topology.is_row_stochastic
    assert not topology.is_doubly_stochastic
    matrix[0, 0] = 9  # the topology has its own copy
    assert topology.matrix[0, 0] == 0.5


@pytest.mark.parametrize("as_array", [np.float32, np.array, list])
def test_from_matrix_accepts_float32_lists_and_tables(as_array):
    topology = T.from_matrix(as_array(T.ring(5).matrix.tolist()))
    assert topology.matrix.dtype == np.float64
    assert topology.is_doubly_stochastic
    assert topology.is_symmetric


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "topology",
    [T.ring(2), T.ring(4), T.star(9), T.exponential(6), T.erdos_renyi(40, 0.2, 0)],
    ids=repr,
)
def test_near_sums_are_corrected(topology, dtype):
    """Otherwise the mean would drift: by 9.7% in 1e5 rounds at the tolerance."""
    exact = topology.matrix
    noise = np.random.default_rng(0).uniform(-1e-7, 1e-7, exact.shape)
    for scale in (1, 1 + 9e-7, 1 + (noise + noise.T), 1 + noise):
        found = T.from_matrix((exact * scale).astype(dtype))
        rounding = 2.0**-52 * max(4, len(exact))
        assert abs(found.matrix.sum(0) - 1).max() <= rounding
        assert abs(found.matrix.sum(1) - 1).max() <= rounding
        assert ((found.matrix != 0) == (exact != 0)).all()
        assert (found.matrix >= 0).all()
        np.testing.assert_allclose(found.matrix, exact, atol=1e-6)
        if topology.is_symmetric:
            np.testing.assert_array_equal(found.matrix, found.matrix.T)


def test_near_sums_of_one_side_are_corrected():
    matrix = np.array([[0.5, 0.2, 0.5], [0.5, 0.4, 0.0], [0.0, 0.4, 0.5]])
    for near, axis in ((matrix, 0), (matrix.T, 1)):
        found = T.from_matrix(near * (1 - 9e-7)).matrix
        np.testing.assert_allclose(found.sum(axis), 1, rtol=0, atol=1e-15)
        np.testing.assert_allclose(found, near, rtol=1e-6)


def test_near_sums_that_cannot_be_corrected():
    """The edge of small weight is on no permutation within the graph."""
    matrix = np.array([[4e-7, 1, 0], [0, 0, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="no weights on its edges"):
        T.from_matrix(matrix)


def test_repr():
    assert repr(T.ring(8)) == (
        "Topology(ring(8): 8 workers, degree 2, spectral gap 0.195)"
    )
    assert repr(T.one_peer_ring(4)) == (
        "TopologySchedule(one_peer_ring(4): 4 workers, period 2, degree 1)"
    )


def test_diameter_of_a_disconnected_graph():
    topology = Topology(np.kron(np.eye(2), np.full((2, 2), 0.5)), "two pairs")
    with pytest.raises(ValueError, match=r"two pairs is not connected"):
        _ = topology.diameter


def test_plots_draw():
    ax = T.star(5).plot()
    assert "star(5)" in ax.get_title()
    figure, own = plt.subplots()
    assert T.exponential(5).plot(own) is own
    assert len(T.one_peer_exponential(8).plot()) == 3
    places = {i: (float(i), -1.0) for i in range(4)}
    nodes, *_ = T.path(4).plot(positions=places).collections
    np.testing.assert_array_equal(nodes.get_offsets(), list(places.values()))
    figure.canvas.draw()
    plt.close("all")


def test_topologies_create_no_device_arrays():
    before = len(jax.live_arrays())
    T.base_graph(12, 2)
    T.exact_factors(T.erdos_renyi(10, 0.5, 1))
    assert len(jax.live_arrays()) == before


@st.composite
def connected_graphs(draw, max_workers=14):
    """A random spanning tree plus random edges."""
    n = draw(st.integers(2, max_workers))
    parents = [draw(st.integers(0, node - 1)) for node in range(1, n)]
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    extra = draw(st.lists(pairs, max_size=2 * n))
    graph = nx.Graph(list(enumerate(parents, start=1)))
    graph.add_edges_from((u, v) for u, v in extra if u != v)
    return graph


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(connected_graphs(), st.floats(0.01, 1))
def test_random_connected_graphs(graph, kappa):
    for topology in (T.from_graph(graph), T.from_graph(graph, weights="max_degree")):
        assert_doubly_stochastic(topology.matrix)
        assert topology.is_symmetric
        assert 0 < topology.spectral_gap <= 1
        assert topology.max_degree == max(dict(graph.degree).values())
        gap = topology.lazy(kappa).spectral_gap
        assert 0 < gap <= 1
    assert_exact_factors(T.from_graph(graph))


def test_push_weights_split_evenly():
    """Each column gives equal weights to the worker itself and its successors."""
    directed = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "a"), ("a", "c")])
    matrix = T.from_graph(directed, weights="push").matrix
    expected = [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(matrix, expected)
    path = T.from_graph(nx.path_graph(3), weights="push").matrix
    expected = [[1 / 2, 1 / 3, 0], [1 / 2, 1 / 3, 1 / 2], [0, 1 / 3, 1 / 2]]
    np.testing.assert_allclose(path, expected)


def test_reweighted_keeps_a_weighted_mean():
    shares = np.array([0.4, 0.1, 0.1, 0.3, 0.1])
    for topology in (T.ring(5), T.star(5), T.complete(5)):
        found = T.reweighted(topology, 7 * shares).matrix
        np.testing.assert_allclose(found.sum(1), 1)
        np.testing.assert_allclose(shares @ found, shares, atol=1e-15)
        assert (found >= 0).all()
        edges = topology.matrix > 0
        np.fill_diagonal(edges, val=True)
        assert not found[~edges].any()
    np.testing.assert_allclose(found, np.tile(shares, (5, 1)))  # still exact
    equal = T.exponential(5)
    assert T.reweighted(equal, np.ones(5)) is equal


def test_reweighted_keeps_the_mean_of_nearly_equal_shares():
    shares = np.array([1.0, 1.0, 1.0, 1.005])
    found = T.reweighted(T.ring(4), shares).matrix
    np.testing.assert_allclose(shares @ found, shares, rtol=1e-12)
