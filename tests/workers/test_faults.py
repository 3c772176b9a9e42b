"""Missing workers and non-finite gradients do not harm other workers."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import decentral_jax as dj
from tests.support import registry
from tests.support.layouts import LAYOUTS, named, nested_vmap

RING = dj.topology.ring(8)
SCHEDULE = dj.topology.schedule([RING, dj.topology.star(8), dj.topology.complete(8)])
TOPOLOGIES = {
    "ring": [RING],
    "complete": [dj.topology.complete(8)],
    "star": [dj.topology.star(8)],
    "grid": [dj.topology.grid(2, 4).lazy(0.7)],
    "schedule": list(SCHEDULE),
}


def without(matrix, active):
    """Moves off-diagonal weights of missing workers to the diagonal."""
    w = np.where(np.outer(active, active), matrix, 0.0)
    np.fill_diagonal(w, 0)
    return w + np.diag(1 - w.sum(1))


def trees(rng, rounds=1):
    return {
        "a": rng.normal(size=(8, rounds, 3)),
        "b": rng.normal(size=(8, rounds, 2, 2)),
    }


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_4", "folded_2"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_mix_without_the_missing(name, layout, x64):
    """Mixing equals the product with the corrected, doubly stochastic matrix."""
    rng = np.random.default_rng(0)
    active = rng.random((8, 12)) < 0.7
    active[:, 0], active[:, 1] = False, True
    tree = trees(rng, 12)
    matrices = [one.matrix for one in TOPOLOGIES[name]]
    topology = SCHEDULE if name == "schedule" else TOPOLOGIES[name][0]

    def worker(tree, active):
        def one(args):
            t, tree, active = args
            return dj.mix(tree, topology, step=t, active=active)

        return lax.map(one, (jnp.arange(12, dtype=jnp.int32), tree, active))

    found = LAYOUTS[layout](worker)(tree, active)
    for t in range(12):
        w = without(matrices[t % len(matrices)], active[:, t])
        np.testing.assert_allclose(w.sum(0), 1, atol=1e-14)
        for key in tree:
            mixed = np.tensordot(w, tree[key][:, t], 1)
            np.testing.assert_allclose(found[key][:, t], mixed, rtol=0, atol=1e-14)
            np.testing.assert_array_equal(
                found[key][~active[:, t], t], tree[key][~active[:, t], t]
            )


@pytest.mark.parametrize("layout", [None, "vmap", "shard_map", "folded_4"])
def test_values_of_missing_workers_do_not_propagate(layout):
    """Also without compilation, which could turn a masked product into a select."""
    x = np.ones(8, np.float32)
    x[3] = np.nan
    active = np.arange(8) != 3

    def mix(x, active):
        return dj.mix(x, RING, active=active)

    mapped = LAYOUTS[layout](mix) if layout else jax.vmap(mix, axis_name="workers")
    np.testing.assert_array_equal(mapped(x, active), x)


def test_half_precision_keeps_its_dtype():
    x = jnp.arange(8, dtype=jnp.bfloat16)
    active = jnp.arange(8, dtype=jnp.int32) != 3
    mixed = LAYOUTS["vmap"](lambda x, a: dj.mix(x, RING, active=a))(x, active)
    assert mixed.dtype == jnp.bfloat16
    expected = without(RING.matrix, np.asarray(active)) @ np.arange(8)
    np.testing.assert_allclose(np.asarray(mixed, np.float32), expected, rtol=1e-2)


def test_a_full_mask_changes_nothing():
    """Equal up to the rounding of sums."""
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    with_mask = LAYOUTS["vmap"](lambda x: dj.mix(x, RING, active=True))(x)
    without_mask = LAYOUTS["vmap"](lambda x: dj.mix(x, RING))(x)
    np.testing.assert_allclose(with_mask, without_mask, rtol=1e-6)


def test_sample_active():
    """Exactly 3 workers are missing, which depend on the round and the seed."""

    def rounds(seed, layout):
        def worker(_):
            steps = jnp.arange(200, dtype=jnp.int32)
            return lax.map(lambda t: dj.sample_active(t, 3, seed=seed), steps)

        return np.asarray(LAYOUTS[layout](worker)(np.zeros(8)))

    found = rounds(0, "vmap")
    np.testing.assert_array_equal((~found).sum(0), 3)
    share = (~found).mean(1)
    assert (np.abs(share - 3 / 8) < 0.15).all()
    assert len(np.unique(found, axis=1).T) > 30
    np.testing.assert_array_equal(rounds(0, "folded_2"), found)
    assert (rounds(1, "vmap") != found).any()


ALGORITHMS = {
    "d_psgd": lambda rate: dj.d_psgd(rate, RING),
    "d_psgd, before": lambda rate: dj.d_psgd(rate, RING, order="combine_then_adapt"),
    "dsgt": lambda rate: dj.dsgt(rate, RING),
    "dsgt, before": lambda rate: dj.dsgt(rate, RING, order="combine_then_adapt"),
    "detag": lambda rate: dj.detag(rate, RING, rounds=3),
    "detag, at the end": lambda rate: dj.detag(rate, RING, rounds=3, when="phase_end"),
    "choco": lambda rate: dj.choco_sgd(
        rate, RING, dj.compression.top_k(2), consensus_rate=0.2
    ),
    "choco, linear": lambda rate: dj.choco_sgd(
        rate, RING, dj.compression.random_block(2), consensus_rate=0.1
    ),
}


def run(tx, steps, missing, gradient, x):
    """All workers' parameters after each step, `[8, steps, d]`."""

    def worker(x, noise):
        def iteration(carry, args):
            x, state = carry
            t, noise = args
            active = dj.sample_active(t, missing, seed=1)
            updates, state = tx.update(gradient(x, noise), state, x, active=active)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        steps_ = jnp.arange(steps, dtype=jnp.int32)
        return lax.scan(iteration, (x, tx.init(x)), (steps_, noise))[1]

    noise = np.random.default_rng(1).normal(size=(8, steps, x.shape[-1]))
    return np.asarray(LAYOUTS["vmap"](worker)(x, jnp.asarray(noise, x.dtype)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_is_preserved(name, x64):
    """Only the mean gradient moves the mean, regardless of missing workers."""
    x = np.random.default_rng(0).normal(size=(8, 6))
    kept = run(ALGORITHMS[name](0.1), 60, 2, lambda x, noise: 0 * x, x)
    np.testing.assert_allclose(
        kept.mean(0), np.tile(x.mean(0), (60, 1)), rtol=0, atol=1e-13
    )
    # Workers approach consensus.
    assert kept[:, -1].std(0).max() < 0.6 * x.std(0).max()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_missing_workers_change_the_run(name, x64):
    x = np.random.default_rng(0).normal(size=(8, 6))

    def gradient(x, noise):
        return x + 0.1 * noise

    full, broken = (run(ALGORITHMS[name](0.1), 12, m, gradient, x) for m in (0, 3))
    assert np.abs(full - broken).max() > 1e-3


@pytest.mark.parametrize("name", ["d_psgd", "detag", "choco", "choco, linear"])
def test_runs_converge_with_missing_workers(name, x64):
    """They reach the optimum of the mean loss as closely as with all workers."""
    optimum = np.random.default_rng(0).normal(size=(8, 6))
    wide = jnp.asarray(optimum)

    def gradient(x, noise):
        me = dj.worker_index()
        return x - wide[me] + 0.1 * noise

    ends = {}
    for missing in (0, 2):
        path = run(ALGORITHMS[name](0.02), 600, missing, gradient, 3 + 0 * optimum)
        ends[missing] = np.abs(path[:, -50:].mean((0, 1)) - optimum.mean(0)).max()
    assert ends[2] < max(2 * ends[0], 0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_guard(bad):
    tx = optax.chain(dj.zero_nonfinite_updates(), optax.sgd(1.0))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([1.0, bad, 2.0]), "b": jnp.ones(2)}
    updates, state = tx.update(grads, tx.init(params))
    for leaf in updates.values():
        np.testing.assert_array_equal(leaf, 0)
    updates, state = tx.update({"a": jnp.ones(3), "b": jnp.ones(2)}, state)
    np.testing.assert_array_equal(updates["a"], -1)
    assert optax.tree.get(state, "refused") == 1


NETWORKS = {
    **ALGORITHMS,
    "all_reduce": dj.all_reduce_sgd,
    "def": lambda rate: dj.def_sgd(
        optax.sgd(rate, momentum=0.9), dj.compression.random_block(2)
    ),
    "local": lambda rate: dj.local_sgd(rate, period=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_thousand_steps_with_nans(name):
    """One worker's gradient is NaN in every third step."""
    tx = optax.chain(dj.zero_nonfinite_updates(), NETWORKS[name](0.05))

    def worker(x):
        me = dj.worker_index()

        def iteration(carry, t):
            x, state = carry
            broken = (me == 2) & (t % 3 == 0)
            grads = x - me.astype(x.dtype) + jnp.where(broken, jnp.nan, 0.0)
            updates, state = tx.update(grads, state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, state), _ = lax.scan(
            iteration, (x, tx.init(x)), jnp.arange(1000, dtype=jnp.int32)
        )
        return x, optax.tree.get(state, "refused"), state

    x, refused, state = LAYOUTS["vmap"](worker)(np.zeros((8, 4), np.float32))
    for leaf in jax.tree.leaves((x, state)):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(refused, np.where(np.arange(8) == 2, 334, 0))
    # Without one third of worker 2's gradients, the others have a larger influence.
    np.testing.assert_allclose(np.mean(x), 3.5, atol=0.6)


DIRECTED = dj.topology.one_peer_exponential(8)
BAD = {
    "a directed topology": (
        lambda x: dj.mix(x, DIRECTED, step=0, active=True),
        ValueError,
        "topology must be symmetric",
    ),
    "all workers' mask": (
        lambda x: dj.mix(x, RING, active=jnp.ones(8, bool)),
        TypeError,
        r"active must be one boolean per worker, got shape \(8,\)",
    ),
    "a number": (
        lambda x: dj.mix(x, RING, active=1.0),
        TypeError,
        "active must be one boolean per worker, got .* float32",
    ),
    "all missing": (
        lambda x: dj.sample_active(0, 8),
        ValueError,
        "missing=8 must be fewer than the 8 workers",
    ),
    "negative number": (
        lambda x: dj.sample_active(0, -1),
        ValueError,
        "missing must be at least 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    fn, error, message = BAD[name]
    mapped = jax.vmap(fn, axis_name="workers", axis_size=8)
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(mapped), jax.ShapeDtypeStruct((8,), "float32"))


SUPPORTS_ACTIVE = ("d_psgd", "dsgt", "detag", "choco_sgd")


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_no_algorithm_ignores_who_is_missing(name):
    """An algorithm leaves missing workers out or raises an error."""
    algorithm = registry.ALGORITHMS[name]
    tx = optax.with_extra_args_support(algorithm.make(0.1))
    sizes = tuple(named(algorithm.shape).values())
    x = {k: jax.ShapeDtypeStruct((*sizes, k), jnp.float32) for k in (2, 3)}

    def step(active):
        def worker(x):
            return tx.update(x, tx.init(x), x, active=active)[0]

        return jax.eval_shape(nested_vmap(worker, algorithm.shape), x)

    assert step(None) == x
    topology = algorithm.arguments.get("topology")
    if not name.startswith(SUPPORTS_ACTIVE):
        expected = pytest.raises(ValueError, match="cannot leave workers out")
    elif any((w.matrix != w.matrix.T).any() for w in registry.rounds(topology)):
        expected = pytest.raises(ValueError, match="must be symmetric")
    else:
        expected = contextlib.nullcontext()
    with expected:
        assert step(False) == x


def test_an_order_of_all_workers_needs_all():
    tx = dj.d_grab(4, num_workers=2)

    def worker(gradients):
        return tx.update(gradients, tx.init(gradients[0]), active=True)[0]

    with pytest.raises(ValueError, match="d_grab cannot leave workers out"):
        jax.eval_shape(jax.vmap(worker, axis_name="workers"), jnp.ones((2, 2, 3)))


def test_zero_nonfinite_updates_of_no_leaves():
    """For example, if `optax.masked` excludes all leaves."""
    tx = dj.zero_nonfinite_updates()
    gradients = {"a": jnp.ones(2)}
    masked = optax.masked(tx, {"a": False})
    updates, _ = masked.update(gradients, masked.init(gradients))
    np.testing.assert_array_equal(updates["a"], 1)
    state = tx.init({})
    assert tx.update({}, state) == ({}, state)
