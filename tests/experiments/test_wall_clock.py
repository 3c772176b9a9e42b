"""The wall-clock model equals sums computed by hand."""

import numpy as np
import pytest

import decentral_jax as dj
from experiments.training.wall_clock import Link, finish_times, slots_a_step


def cost(*collectives):
    return dj.CommunicationCost(collectives, True)


ALL = dj.Collective("all-reduce", "workers", 1, 100.0)
NOTHING = cost()
FLAT = {"workers": 3}
SPEEDS = np.array([1.0, 2.0, 4.0])


def test_without_communication_no_worker_waits():
    found = finish_times(np.tile(SPEEDS, (3, 1)), [NOTHING], FLAT)
    np.testing.assert_allclose(found, np.arange(4)[:, None] * SPEEDS)


def test_an_all_reduce_waits_for_the_slowest():
    links = {"workers": Link(latency=0.5, bandwidth=200.0)}
    found = finish_times(np.tile(SPEEDS, (4, 1)), [NOTHING, cost(ALL)], FLAT, links)
    # Two steps of the slowest worker, 0.5 s of latency, and 0.5 s of transfer.
    np.testing.assert_allclose(found[1], SPEEDS)
    np.testing.assert_allclose(found[2], 9)
    np.testing.assert_allclose(found[3], 9 + SPEEDS)
    np.testing.assert_allclose(found[4], 18)


def test_gossip_waits_for_the_senders():
    """On a path 0 - 1 - 2, a delay travels one hop per step."""
    pairs = frozenset({(0, 1), (1, 0), (1, 2), (2, 1)})
    gossip = cost(dj.Collective("ppermute", "workers", 2, 0.0, pairs))
    compute = np.ones((3, 3))
    compute[0, 2] = 10
    links = {"workers": Link(latency=0.25)}
    found = finish_times(compute, [gossip], FLAT, links)
    np.testing.assert_allclose(found[1], [1.5, 10.5, 10.5])
    np.testing.assert_allclose(found[2], [12, 12, 12])
    one_way = cost(dj.Collective("ppermute", "workers", 1, 0.0, frozenset({(2, 0)})))
    np.testing.assert_allclose(finish_times(compute, [one_way], FLAT)[1], [10, 1, 10])


def test_workers_wait_within_their_level():
    """Workers wait within their hub, or for the same worker of other hubs."""
    levels = {"hub": 2, "worker": 2}
    compute = np.array([[1.0, 2.0, 3.0, 4.0]])
    inside = cost(dj.Collective("all-reduce", "worker", 1, 0.0))
    found = finish_times(compute, [inside], levels)
    np.testing.assert_allclose(found[1], [2, 2, 4, 4])
    across = dj.Collective("ppermute", "hub", 1, 8.0, frozenset({(0, 1), (1, 0)}))
    links = {"hub": Link(bandwidth=4.0), "worker": Link(latency=7.0)}
    found = finish_times(compute, [cost(across)], levels, links)
    np.testing.assert_allclose(found[1], [5, 6, 5, 6])
    both = dj.Collective("all-reduce", "hub,worker", 1, 8.0)
    found = finish_times(compute, [cost(both)], levels, links)
    np.testing.assert_allclose(found[1], 4 + 7 + 2)


def test_steps_take_slots_by_their_rates():
    rates = np.array([1.0, 0.5, 0.1])
    slots = slots_a_step(rates, 20_000)
    assert slots.shape == (20_000, 3)
    assert slots.min() == 1
    np.testing.assert_allclose(slots.mean(0), 1 / rates, rtol=0.05)
    np.testing.assert_array_equal(slots[:, 0], 1)


def test_the_clock_of_a_real_algorithm():
    """Local SGD with period 2: all workers synchronize in every second step."""
    tx = dj.local_sgd(0.1, period=2)
    params = np.zeros(10, np.float32)
    log = dj.communication_costs(tx, params, axis_sizes=FLAT)
    assert log.period == 2
    found = finish_times(np.tile(SPEEDS, (4, 1)), log, FLAT)
    np.testing.assert_allclose(found[[2, 4]], [[8] * 3, [16] * 3])
    assert found[3].tolist() == pytest.approx((8 + SPEEDS).tolist())
