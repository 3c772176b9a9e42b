"""The translations of docs/coming_from.md, against other programs' rules in NumPy."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest

import decentral_jax as dj

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RATE, MU, DECAY, STEPS, SIZE, WORKERS = 0.1, 0.9, 0.05, 12, 6, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CURVATURES = np.random.default_rng(1).uniform(0.5, 1.5, (WORKERS, SIZE))
OPTIMA = np.random.default_rng(2).normal(size=(WORKERS, SIZE))


def gradient(x, worker=0):
    return CURVATURES[worker] * (x - OPTIMA[worker])


def schedule(step):
    return RATE / (step + 1)


def trajectory(tx):
    """Iterates of one worker, `[STEPS + 1, SIZE]`."""
    x = jnp.zeros(SIZE)
    state = tx.init(x)
    found = [x]
    for _ in range(STEPS):
        updates, state = tx.update(jnp.asarray(gradient(x)), state, x)
        x = optax.apply_updates(x, updates)
        found.append(x)
    return np.array(found)


def torch_sgd(rate, *, momentum=MU, dampening=0.0, weight_decay=0.0, nesterov=False):
    """The rule of `torch.optim.SGD`, whose first buffer is the gradient undamped."""
    x, buffer = np.zeros(SIZE), None
    found = [x]
    for step in range(STEPS):
        g = gradient(x) + weight_decay * x
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        x = x - rate(step) * (g + momentum * buffer if nesterov else buffer)
        found.append(x)
    return np.array(found)


def constant(step):
    return RATE


@pytest.mark.parametrize("nesterov", [False, True])
def test_weight_decay_comes_before_momentum(nesterov):
    sgd = optax.sgd(schedule, momentum=MU, nesterov=nesterov)
    found = trajectory(optax.chain(optax.add_decayed_weights(DECAY), sgd))
    expected = torch_sgd(schedule, weight_decay=DECAY, nesterov=nesterov)
    np.testing.assert_allclose(found, expected, **CLOSE)
    # After momentum, it decays at another rate.
    after = optax.chain(optax.trace(MU, nesterov), optax.add_decayed_weights(DECAY))
    other = trajectory(optax.chain(after, optax.scale_by_learning_rate(schedule)))
    assert abs(other - expected).max() > 1e-3


def test_rate_outside_and_inside_of_the_momentum():
    def inside(rate):
        x, velocity = np.zeros(SIZE), np.zeros(SIZE)
        found = [x]
        for step in range(STEPS):
            velocity = MU * velocity + rate(step) * gradient(x)
            x = x - velocity
            found.append(x)
        return np.array(found)

    outside = trajectory(optax.sgd(schedule, momentum=MU))
    np.testing.assert_allclose(outside, torch_sgd(schedule), **CLOSE)
    tx = optax.chain(optax.scale_by_learning_rate(schedule), optax.trace(MU))
    np.testing.assert_allclose(trajectory(tx), inside(schedule), **CLOSE)
    assert abs(outside - inside(schedule)).max() > 1e-3
    same = trajectory(optax.sgd(RATE, momentum=MU))
    np.testing.assert_allclose(same, inside(constant), **CLOSE)


def test_dampening_is_a_smaller_rate_after_the_first_step():
    dampening = 0.4
    x, extra, buffer = np.zeros(SIZE), 1 / (1 - dampening), np.zeros(SIZE)
    found = [x]
    for _ in range(STEPS):  # the rate of the translation, and a larger first gradient
        buffer = MU * buffer + extra * gradient(x)
        x, extra = x - RATE * (1 - dampening) * buffer, 1.0
        found.append(x)
    expected = torch_sgd(constant, dampening=dampening)
    np.testing.assert_allclose(found, expected, **CLOSE)
    tx = optax.sgd(RATE * (1 - dampening), momentum=MU)
    first = np.array([1 / (1 - dampening)] + [1.0] * STEPS)
    boosted = optax.chain(optax.scale_by_schedule(lambda t: jnp.asarray(first)[t]), tx)
    np.testing.assert_allclose(trajectory(boosted), expected, **CLOSE)


def gradient_plus_momentum(decay):
    """The direction of PowerSGD's program, as in docs/coming_from.md."""
    momentum = optax.trace(decay)

    def update(gradients, state, params=None):
        buffers, state = momentum.update(gradients, state, params)
        return jax.tree.map(jnp.add, gradients, buffers), state

    return optax.GradientTransformation(momentum.init, update)


def test_power_sgd_steps_by_gradient_plus_momentum():
    x, buffer = np.zeros(SIZE), np.zeros(SIZE)
    expected = [x]
    for step in range(STEPS):
        g = gradient(x)
        buffer = MU * buffer + g
        x = x - schedule(step) * (g + buffer)
        expected.append(x)
    rate = optax.scale_by_learning_rate(schedule)
    found = trajectory(optax.chain(gradient_plus_momentum(MU), rate))
    np.testing.assert_allclose(found, expected, **CLOSE)
    nesterov = trajectory(optax.sgd(schedule, momentum=MU, nesterov=True))
    assert abs(nesterov - expected).max() > 1e-3


def test_accumulated_gradients_are_averaged():
    """PyTorch adds them up: there, the loss is divided by their number."""
    every = 3
    x, total = np.zeros(SIZE), np.zeros(SIZE)
    for step in range(STEPS):
        total = total + gradient(x)
        if (step + 1) % every == 0:
            x, total = x - RATE / every * total, np.zeros(SIZE)
    found = trajectory(optax.MultiSteps(optax.sgd(RATE), every))[-1]
    # optax takes the mean with factors in float32.
    np.testing.assert_allclose(found, x, rtol=1e-6)


def keep_largest(x, k):
    kept = np.zeros_like(x)
    largest = np.argsort(-abs(x))[:k]
    kept[largest] = x[largest]
    return kept


@pytest.mark.parametrize("period", [1, 3])
def test_the_option_def_is_def_a(period):
    """`-o DEF --coeff C -p PERIOD -m MU -wd DECAY`, with top-k in place of a block."""
    coefficient, k = 0.4, 2
    shared = np.zeros(SIZE)
    X, M, total, E = np.zeros((4, WORKERS, SIZE))
    for step in range(STEPS):
        G = np.array([gradient(x, i) for i, x in enumerate(X)])
        M = MU * M + G + DECAY * X
        X, total = X - RATE * M, total + RATE * M
        if (step + 1) % period == 0:
            sent = np.array([keep_largest(one, k) for one in total])
            E = total - sent
            shared = shared - sent.mean(0)
            X, total = shared - coefficient * E, E
    sgd = optax.sgd(RATE, momentum=MU)
    local = optax.chain(optax.add_decayed_weights(DECAY), sgd)
    compressor = dj.compression.top_k(k=k)
    options = {"detach": coefficient, "period": period}

    def run(algorithm, curvatures, optimum):
        tx = algorithm(local, compressor, **options)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(curvatures * (x - optimum), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(SIZE)
        (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=STEPS)
        return x, dj.eval_params(state, x)

    for algorithm, evaluated in (
        (dj.def_a_sgd, shared - E.mean(0)),
        (dj.def_sgd, shared),
    ):
        x, model = jax.vmap(
            lambda a, b, algorithm=algorithm: run(algorithm, a, b), axis_name="workers"
        )(CURVATURES, OPTIMA)
        np.testing.assert_allclose(x, X, **CLOSE)
        np.testing.assert_allclose(model, [evaluated] * WORKERS, **CLOSE)


def test_blocks_and_shares_round_up():
    """The programs of DEF and ChocoSGD round down, and send at least one entry."""
    x, key = jnp.zeros(1000), jax.random.key(0)
    assert dj.compression.random_block(64).compress(key, x).shape == (16,)
    assert int(1 / 64 * 1000) == 15
    assert dj.compression.top_k(ratio=100).compress(key, x)[0].shape == (10,)
    assert int(1000 * (1 - 0.99)) == 10
    # 1 / (1 - 0.99) is slightly below 100, and meant to be 100.
    assert dj.compression.top_k(ratio=1 / (1 - 0.99)).compress(key, x)[0].shape == (10,)


def test_delays_of_the_program_are_below_max_delay():
    """There, `randint(min(max_delay, step + 1))` chooses among the last models."""
    trace = dj.traces.uniform_delay(11 - 1, 5000)
    steps = np.arange(5000)
    assert (trace.staleness < np.minimum(11, steps + 1)).all()
    assert set(trace.staleness) == set(range(11))


def pairs(n, distance):
    """One round of Decent-DP: workers in pairs, each with half of the weight."""
    matrix, free = np.zeros((n, n)), set(range(n))
    for i in range(n):
        if i in free:
            both = [i, (i + distance) % n]
            free -= set(both)
            matrix[np.ix_(both, both)] = 0.5
    return matrix


def test_graphs_of_other_libraries():
    for t, topology in enumerate(dj.topology.base_graph(8, 1)):
        np.testing.assert_array_equal(topology.matrix, pairs(8, 2**t))
    first = next(iter(dj.topology.one_peer_exponential(8)))
    assert abs(first.matrix - pairs(8, 1)).max() == 0.5
    # BlueFog's graphs hold the weight from i to j on the edge (i, j).
    weights = np.zeros(12)
    weights[[0, 1, 2, 4, 8]] = 1 / 5
    graph = nx.from_numpy_array(
        np.array([np.roll(weights, i) for i in range(12)]), create_using=nx.DiGraph
    )
    received = nx.to_numpy_array(graph).T
    np.testing.assert_array_equal(dj.topology.exponential(12).matrix, received)


def test_momentum_multiplies_quasi_global_steps():
    """On one worker, quasi-global momentum 0.9 moves ten times as far in the end."""
    tx = dj.qg_dsgdm(RATE, dj.topology.complete(1), momentum=MU)

    def moves(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jnp.ones(()), state, x)
            return (optax.apply_updates(x, updates), state), updates

        return jax.lax.scan(step, (x, tx.init(x)), length=400)[1]

    found = jax.vmap(moves, axis_name="workers")(jnp.zeros(1))[0]
    np.testing.assert_allclose(found[0], -RATE, rtol=1e-6)
    np.testing.assert_allclose(found[-1], -RATE / (1 - MU), rtol=0.02)


def test_the_outer_gradient_points_from_the_mean_to_the_old_model():
    """As in MaxText and torchft, an outer rate of 1 is the mean of the models."""

    def run(tx, target):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x - target, state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(SIZE)
        return jax.lax.scan(step, (x, tx.init(x)), length=8)[0][0]

    outer = dj.diloco(RATE, period=4, outer=optax.sgd(1.0))
    mean = dj.local_sgd(RATE, period=4)
    found, expected = (
        jax.vmap(lambda target, tx=tx: run(tx, target), axis_name="workers")(OPTIMA)
        for tx in (outer, mean)
    )
    np.testing.assert_allclose(found, expected, **CLOSE)
