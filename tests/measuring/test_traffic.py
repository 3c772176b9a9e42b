"""Traffic over one period: bytes per step, and detection of the period."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from tests.support.layouts import compilations, named
from tests.support.registry import ALGORITHMS
from tests.support.small_runs import HUBS

N = 8
AXES = {"workers": N}
RING, ONE_PEER = dj.topology.ring(N), dj.topology.one_peer_exponential(N)
X = jax.ShapeDtypeStruct((10,), jnp.float32)
BYTES = 40


def all_reduce(size, n=N):
    return 2 * size * (n - 1) / n


ALL = all_reduce(BYTES)

# Bytes sent per worker in each step of one period, with 40 bytes of parameters.
# Rounds of `SCHEDULE`: a ring, a star and a random graph of degree 7.
PER_STEP = {
    "all_reduce_sgd": (ALL,),
    "d_psgd": (2 * BYTES,),
    "d_psgd_atc": (2 * BYTES,),
    "d_psgd_exponential": (3 * BYTES,),
    "d_psgd_complete": (ALL,),
    "d_psgd_one_peer": (BYTES,) * 3,
    "d_psgd_atc_schedule": (2 * BYTES, 7 * BYTES, 7 * BYTES),
    "d2": (2 * BYTES,),
    # Parameters and tracker.
    "dsgt": (4 * BYTES,),
    "dsgt_atc": (4 * BYTES,),
    "dsgt_schedule": (4 * BYTES, 14 * BYTES, 14 * BYTES),
    "dsgt_atc_one_peer": (2 * BYTES,) * 3,
    "detag": (4 * BYTES,),
    "detagm": (4 * BYTES,),
    "detagm_phase_end": (0, 0, 3 * 4 * BYTES),
    "defacto": (0, 0, 0, 0, *[2 * BYTES] * 4),
    "defacto_tree": (0, 0, *[2 * BYTES] * 7),
    # Fractions of the entries, rounded up to whole entries.
    "ef_sgd_block": (all_reduce(BYTES / 2),),
    "ef_sgd_random_k_period": (0, all_reduce(BYTES / 2)),
    # Signs in 2 bytes and a scale in 4 bytes, to all other workers.
    "ef_sgd_sign": ((N - 1) * 6,),
    "def_sgd_block": (all_reduce(4 * 4),),
    "def_a_sgd": (all_reduce(BYTES / 2),),
    # Five values and five indices, to all other workers.
    "def_sgd_top_k_period": (0, 0, (N - 1) * 5 * 8),
    "step_ahead_whole": ((N - 1) * 4 * 8,),
    "partial_feedback": (all_reduce(BYTES / 2),),
    "sgd_ia": (ALL,),
    "cser": (all_reduce(BYTES / 2), all_reduce(BYTES / 2) + ALL),
    "choco_sgd_top_k": (3 * 5 * 8,),
    "choco_sgd_quantize": (2 * 12,),
    "powersgd": (ALL,),
    "local_sgd": (0, 0, 0, ALL),
    "slowmo": (0, 0, ALL),
    "diloco": (0, 0, 0, ALL),
    "mll_sgd": (0, BYTES, 0, BYTES, 0, 2 * BYTES),
    "mll_sgd_uneven": (0, 0, BYTES, 0, 0, 2 * BYTES),
    # Between hubs, each of four workers sends 3 of 12 entries, including 2 for padding.
    "mll_sgd_two_hubs": (all_reduce(40, 4), all_reduce(48, 4) + 12),
    "hl_sgd": (0, all_reduce(40, 4)) * 2 + (0, all_reduce(48, 4) + 12),
    "hl_sgd_uneven": (0, all_reduce(40, 4)) * 2 + (0, all_reduce(48, 4) + 12),
    # Parameters and a weight.
    "sgp": (3 * (BYTES + 4),),
    "sgp_one_peer": (BYTES + 4,) * 3,
    "apam": (ALL,),
    "apam_delayed": (ALL,),
    "qg_dsgdm": (2 * BYTES,),
    "qg_dsgdm_schedule": (2 * BYTES, 7 * BYTES, 7 * BYTES),
}
# Fragments are whole leaves: this needs two leaves, with six and four entries.
TREES = {
    "diloco_fragments": {"kernel": X.update(shape=(6,)), "bias": X.update(shape=(4,))}
}
PER_STEP["diloco_fragments"] = (0, all_reduce(24), 0, 0, all_reduce(16))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_period_of_every_algorithm(name):
    algorithm = ALGORITHMS[name]
    expected = PER_STEP.get(name, algorithm.sent)
    assert expected is not None, f"set `sent` of {name} in the registry"
    costs = dj.communication_costs(
        algorithm.make(0.1), TREES.get(name, X), axis_sizes=named(algorithm.shape)
    )
    assert costs.is_exact
    assert costs.period == len(costs) == len(expected)
    np.testing.assert_allclose(costs.bytes_sent, expected, rtol=1e-12)
    assert costs.bytes_per_step == pytest.approx(np.mean(expected))


STEPS = ("d_psgd_one_peer", "dsgt_atc_one_peer", "detagm_phase_end", "defacto")


@pytest.mark.parametrize("name", [*STEPS, "all_reduce_sgd", "dsgt", "d2", "detag"])
def test_each_step_is_the_cost_of_its_state(name):
    """Setting the counters in the state by hand gives the same costs."""
    tx = ALGORITHMS[name].make(0.1)
    costs = dj.communication_costs(tx, X, axis_sizes=AXES)
    workers = dj.Workers(N)
    step = workers.spmd(lambda grads, state, params: tx.update(grads, state, params))
    state = workers.replicate(tx.init(jnp.zeros(10)))
    stacked = jax.ShapeDtypeStruct((N, 10), jnp.float32)
    for count in range(len(costs) + 1):
        at_count = jax.tree.map(
            lambda x, t=count: np.full_like(x, t) if x.dtype == jnp.int32 else x, state
        )
        cost = dj.communication_cost(step, stacked, at_count, stacked)
        assert cost == costs[count % len(costs)]


def gossip_when(condition):
    """Gossip on a ring in the steps for which `condition(step)` is true."""
    gossip = dj.d_psgd(0.1, RING)

    def init_fn(params):
        return jnp.zeros([], jnp.int32), gossip.init(params)

    def update_fn(updates, state, params=None):
        count, inner = state
        updates, inner = lax.cond(
            condition(lax.pmax(count, "workers")),
            gossip.update,
            lambda updates, inner, params: (updates, inner),
            *(updates, inner, params),
        )
        return updates, (count + 1, inner)

    return optax.GradientTransformation(init_fn, update_fn)


def found(tx, steps=None, params=X, sizes=AXES, **extra_args):
    """Returns the period, and a flag per step that sends more than a counter."""
    costs = dj.communication_costs(tx, params, steps, axis_sizes=sizes, **extra_args)
    return costs.period, [int(cost.bytes_sent >= BYTES) for cost in costs]


CONDITIONS = {
    "remainder": (lambda t: t % 3 == 1, [0, 1, 0]),
    "truncated remainder": (lambda t: lax.rem(t, 3) == 0, [1, 0, 0]),
    "quotient": (lambda t: t // 2 % 2 == 1, [0, 0, 1, 1]),
    "remainder of a quotient": (lambda t: (t + 1) // 3 % 2 == 0, [1, 1, 0, 0, 0, 1]),
    "multiple": (lambda t: 4 * t % 6 == 2, [0, 0, 1]),
    "difference": (lambda t: (7 - t) % 3 == 0, [0, 1, 0]),
    "negative": (lambda t: -t % 4 == 1, [0, 0, 0, 1]),
    "two remainders": (lambda t: (t % 2 == 0) & (t % 3 == 0), [1, 0, 0, 0, 0, 0]),
    "two counters": (lambda t: t - t // 3 * 3 == 0, [1, 0, 0]),
    "float": (lambda t: (t % 3).astype(float) > 1.5, [0, 0, 1]),
    "selected": (lambda t: jnp.where(t % 2 == 0, t, t + 1) % 4 == 0, [1, 0, 0, 1]),
    "far away": (lambda t: t < 2**30, [1]),
    "shorter than its divisor": (lambda t: t % 6 % 2 == 0, [1, 0]),
    "always": (lambda t: t >= 0, [1]),
    "a long period": (lambda t: t % 1000 == 999, [0] * 999 + [1]),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_periods_of_conditions(name):
    condition, expected = CONDITIONS[name]
    tx = gossip_when(condition)
    assert found(tx) == (len(expected), expected)
    # The period is the smallest one: the costs of two periods repeat.
    _, twice = found(tx, 2 * len(expected))
    assert twice == expected * 2


NOT_REPEATING = {
    "after some steps": (lambda t: t >= 3, [0, 0, 0, 1, 1]),
    "the first step": (lambda t: t == 0, [1, 0, 0, 0, 0]),
    "ever rarer": (lambda t: t & (t - 1) == 0, [1, 1, 1, 0, 1, 0, 0, 0, 1]),
    "after some steps, in turns": (
        lambda t: (t > 2) & (t % 2 == 0),
        [0, 0, 0, 0, 1, 0, 1],
    ),
    "too long": (lambda t: t % 10**6 == 0, [1, 0, 0]),
}


@pytest.mark.parametrize("name", NOT_REPEATING)
def test_traffic_that_does_not_repeat_needs_steps(name):
    condition, expected = NOT_REPEATING[name]
    tx = gossip_when(condition)
    with pytest.raises(ValueError, match=r"does not repeat.*pass steps"):
        found(tx)
    assert found(tx, len(expected)) == (None, expected)


def test_unknown_conditions_are_not_exact():
    tx = gossip_when(lambda t: jax.random.bernoulli(jax.random.key(t)))
    costs = dj.communication_costs(tx, X, axis_sizes=AXES)
    assert not costs.is_exact
    assert costs.period == 1
    assert "not exact" in str(costs)


COMPOSED = {
    # The schedule advances once in five steps but sends in every step.
    "MultiSteps": (optax.MultiSteps(dj.d_psgd(0.1, ONE_PEER), 5), AXES, 15),
    "chain": (
        optax.chain(dj.gossip(ONE_PEER), dj.average_parameters(period=4)),
        AXES,
        12,
    ),
    "schedules": (
        dj.sgp(optax.sgd(optax.linear_schedule(0.1, 0.01, 100)), ONE_PEER),
        AXES,
        3,
    ),
    "conditional": (
        optax.conditionally_transform(
            dj.average_gradients(), lambda step: step % 3 == 0
        ),
        AXES,
        3,
    ),
    "injected": (
        optax.inject_hyperparams(dj.local_sgd, static_args=("period", "fragments"))(
            0.1, period=3
        ),
        AXES,
        3,
    ),
    "schedule of hubs": (
        dj.mll_sgd(
            *(0.1, dj.topology.schedule([dj.topology.ring(4), dj.topology.path(4)])),
            tau=2,
            q=2,
            rates=0.5,
        ),
        HUBS,
        8,
    ),
    "one worker": (optax.adam(0.1), AXES, 1),
    "masked": (optax.masked(dj.local_sgd(0.1, period=2), True), AXES, 2),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_periods_of_compositions(name, standard_promotion):
    """The search finds counters anywhere in the state."""
    tx, sizes, period = COMPOSED[name]
    costs = dj.communication_costs(tx, X, axis_sizes=sizes)
    assert costs.period == len(costs) == period


def test_the_period_includes_the_partners_of_messages():
    """One-peer rounds send equally many bytes, but to different workers."""
    costs = dj.communication_costs(dj.d_psgd(0.1, ONE_PEER), X, axis_sizes=AXES)
    assert len(set(costs)) == 1
    assert len({costs[t].collectives[0].pairs for t in range(3)}) == 3


def test_steps_beyond_a_period_repeat():
    costs = dj.communication_costs(dj.local_sgd(0.1, period=3), X, 7, axis_sizes=AXES)
    assert (costs.period, len(costs)) == (3, 7)
    np.testing.assert_array_equal(costs.bytes_sent > 0, [0, 0, 1, 0, 0, 1, 0])
    assert costs[2:4] == (costs[2], costs[3])
    assert list(costs) == list(costs.steps)


def test_nothing_runs_and_shapes_suffice():
    tx = dj.local_sgd(0.1, period=3)
    dj.communication_costs(tx, X, axis_sizes=AXES)
    with compilations() as compiled:
        dj.communication_costs(tx, {"a": X}, axis_sizes=AXES)
    assert not compiled


def test_extra_arguments_reach_the_update(standard_promotion):
    tx = dj.all_reduce_sgd(
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    )
    value = jax.ShapeDtypeStruct((), jnp.float32)
    assert found(tx, value=value) == (1, [1])
