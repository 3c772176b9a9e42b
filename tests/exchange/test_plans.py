"""Plans: the fewest rounds of partial permutations that together compute W X."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decentral_jax as dj
from decentral_jax._exchange.plans import cached_plan, make_plan, partial_permutations

SLOW = [HealthCheck.too_slow]  # a loaded machine is not a failure


def largest_degree(edges):
    senders, receivers = np.array(edges).T
    return max(np.bincount(senders).max(), np.bincount(receivers).max())


def assert_fewest_partial_permutations(edges, size):
    rounds = partial_permutations(edges, size)
    for pairs in rounds:
        senders, receivers = zip(*pairs, strict=True)
        assert len(set(senders)) == len(pairs)
        assert len(set(receivers)) == len(pairs)
    together = [pair for pairs in rounds for pair in pairs]
    assert sorted(together) == sorted(edges)
    assert len(rounds) == largest_degree(edges)


@st.composite
def digraphs(draw):
    size = draw(st.integers(2, 20))
    worker = st.integers(0, size - 1)
    pairs = st.sets(st.tuples(worker, worker), min_size=1, max_size=size * size // 2)
    # The order of the edges decides which paths the coloring swaps.
    return draw(st.permutations(sorted(draw(pairs)))), size


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(digraphs())
def test_random_digraphs_take_as_many_rounds_as_their_degree(case):
    assert_fewest_partial_permutations(*case)


@pytest.mark.parametrize("seed", range(20))
def test_dense_random_digraphs(seed):
    graph = nx.gnp_random_graph(16, 0.6, seed=seed, directed=True)
    assert_fewest_partial_permutations(list(graph.edges), 16)


def test_no_edges_take_no_rounds():
    assert partial_permutations([], 4) == []


def test_erdos_renyi_on_64_workers():
    """A coloring needs 13 rounds; a split by offset would need 63."""
    topology = dj.topology.erdos_renyi(64, 0.1, seed=1)
    edges = list(topology.graph.edges)
    assert_fewest_partial_permutations(edges, 64)
    assert len(make_plan(topology.matrix, 64).rounds) == topology.max_degree == 13
    assert len({(receiver - sender) % 64 for sender, receiver in edges}) == 63


@pytest.mark.parametrize("topology", [dj.topology.ring(8), dj.topology.exponential(8)])
def test_each_round_of_a_circulant_graph_is_a_shift(topology):
    for one in make_plan(topology.matrix, 8).rounds:
        assert len({(receiver - sender) % 8 for sender, receiver in one.pairs}) == 1


def test_each_round_of_a_regular_graph_uses_every_worker():
    plan = make_plan(dj.topology.torus(4, 4).matrix, 16)
    assert [len(one.pairs) for one in plan.rounds] == [16] * 4


def rows_sent(plan):
    """Maps each pair (sender, receiver) to the number of rows that it sends."""
    return {pair: one.rows.shape[1] for one in plan.rounds for pair in one.pairs}


def test_folded_ring_sends_one_row_each_way():
    sent = rows_sent(make_plan(dj.topology.ring(8).matrix, 4))
    assert sent == {(d, (d + s) % 4): 1 for d in range(4) for s in (1, -1)}


def test_folded_plans_send_only_rows_that_are_needed():
    # On two devices, the halves of a ring share two borders: one message carries both.
    assert rows_sent(make_plan(dj.topology.ring(8).matrix, 2)) == {(0, 1): 2, (1, 0): 2}
    # The halves of a path need only the two ends of the middle edge.
    assert rows_sent(make_plan(dj.topology.path(8).matrix, 2)) == {(0, 1): 1, (1, 0): 1}
    # All workers need the center of a star, and the center needs all workers.
    plan = make_plan(dj.topology.star(6).matrix, 3)
    assert set(rows_sent(plan)) == {(0, 1), (0, 2), (1, 0), (2, 0)}
    assert len(plan.rounds) == 2
    # A graph that stays inside devices sends nothing.
    blocks = np.kron(np.eye(4), np.full((2, 2), 0.5))
    assert make_plan(blocks, 4).rounds == ()
    assert make_plan(dj.topology.complete(6).matrix, 1).rounds == ()


def simulate(plan, x):
    """Runs a plan on stacked workers `x` as the devices would."""
    per_device = len(plan.matrix) // plan.num_devices
    blocks = x.reshape(plan.num_devices, per_device, -1)
    of_worker = np.arange(len(plan.matrix)) // per_device
    y = weigh(plan.local, blocks[of_worker])
    for one in plan.rounds:
        received = np.zeros((plan.num_devices, one.rows.shape[1], x.shape[1]))
        for sender, receiver in one.pairs:
            received[receiver] = blocks[sender, one.rows[sender]]
        y += weigh(one.source, received[of_worker])
    return y


def weigh(source, rows):
    picked = np.take_along_axis(rows, source.index[:, :, None], axis=1)
    return (source.weight[:, :, None] * picked).sum(1)


@st.composite
def layouts(draw):
    num_devices = draw(st.integers(1, 6))
    n = num_devices * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = rng.random((n, n)) < draw(st.sampled_from([0.0, 0.1, 0.3, 1.0]))
    return rng.normal(size=(n, n)) * keep, num_devices


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(layouts())
def test_plan_equals_the_matrix_product(case):
    matrix, num_devices = case
    x = np.random.default_rng(0).normal(size=(len(matrix), 3))
    plan = make_plan(matrix, num_devices)
    np.testing.assert_allclose(simulate(plan, x), matrix @ x, rtol=0, atol=1e-12)
    if plan.rounds:
        edges = [pair for one in plan.rounds for pair in one.pairs]
        assert len(plan.rounds) == largest_degree(edges)
        assert all(sender != receiver for sender, receiver in edges)


def test_unused_slots_have_weight_zero():
    plan = make_plan(dj.topology.star(5).matrix, 5)
    for one in plan.rounds:
        receivers = {receiver for _, receiver in one.pairs}
        idle = [worker for worker in range(5) if worker not in receivers]
        assert not one.source.weight[idle].any()


def test_cached_plan_is_computed_once():
    matrix = dj.topology.ring(6).matrix
    assert cached_plan(matrix, 3) is cached_plan(matrix.copy(), 3)
    assert cached_plan(matrix, 3) is not cached_plan(matrix, 2)
    changed = matrix.copy()
    changed[0, 0] += 1e-9
    assert cached_plan(changed, 3) is not cached_plan(matrix, 3)
