"""Random compositions equal dense NumPy references.

Hypothesis draws an algorithm, a topology, optax wrappers, a tree, a dtype, and a
layout. `DECENTRAL_JAX_FUZZ=1000 python -m pytest -n 0 tests/test_fuzz.py` runs 1,000
random cases instead of the fixed few.
"""

import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import decentral_jax as dj
from tests.dense_compressors import dense
from tests.reference import averaging, compression, gossip, local_updates, tracking

CASES = int(os.environ.get("DECENTRAL_JAX_FUZZ", "0"))
STEPS, RATE = 5, 0.05
# Largest error, relative to the largest entry of the trajectory or to 1. Half precision
# accumulates a rounding error of 2**-9 in each of a step's operations.
TOLERANCES = {"float64": 1e-11, "float32": 3e-5, "bfloat16": 0.1}
SHAPES = [(), (3,), (2, 3), (1,), (4, 1), (0,)]

# optax's optimizers and MultiSteps mix dtypes themselves.
pytestmark = pytest.mark.usefixtures("standard_promotion")


class Case(NamedTuple):
    n: int
    devices: int  # 0 for plain vmap
    topology: str
    algorithm: str
    wrappers: tuple[str, ...]
    injected: bool
    masked: bool
    multi_steps: bool
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    seed: int


# Topologies


def permutations(n, seed):
    """A random symmetric, doubly stochastic matrix that contains a ring."""
    rng = np.random.default_rng(seed)
    shift = np.roll(np.eye(n), 1, axis=0)
    parts = [np.eye(n), shift, *(np.eye(n)[rng.permutation(n)] for _ in range(2))]
    matrix = np.tensordot(rng.dirichlet(np.ones(4)), parts, 1)
    return dj.topology.from_matrix((matrix + matrix.T) / 2)


TOPOLOGIES = {
    "ring": lambda n, seed: dj.topology.ring(n),
    "path": lambda n, seed: dj.topology.path(n),
    "star": lambda n, seed: dj.topology.star(n),
    "complete": lambda n, seed: dj.topology.complete(n),
    "erdos_renyi": lambda n, seed: dj.topology.erdos_renyi(n, 0.7, seed=seed),
    "permutations": permutations,
}
SCHEDULES = {
    "mixed": lambda n, seed: dj.topology.schedule(
        [permutations(n, seed), dj.topology.star(n)]
    ),
    # One-peer rounds exist for even numbers of workers only.
    "one_peer": lambda n, seed: (
        dj.topology.one_peer_ring(n) if n % 2 == 0 and n > 2 else dj.topology.ring(n)
    ),
}


def matrices(topology):
    one = isinstance(topology, dj.topology.Topology)
    return [t.matrix for t in ([topology] if one else topology)]


# Algorithms: (make, reference). `make(topology, **rate)` takes a learning rate or a
# base; `reference(g, x, topology, sizes)` is the trajectory of the parameters.


def _gossip(build, reference, **options):
    return (
        lambda topology, learning_rate, **base: build(
            learning_rate, topology, **options, **base
        ),
        lambda g, x, topology, sizes: reference(
            g, x, matrices(topology), RATE, STEPS, **options
        ),
    )


def _lazy(build, reference):
    make, dense_run = build, reference
    return (
        lambda topology, learning_rate, **base: make(
            learning_rate, topology.lazy(0.5), **base
        ),
        lambda g, x, topology, sizes: dense_run(g, x, topology.lazy(0.5).matrix),
    )


def _feedback(compressor, detach):
    def make(topology, learning_rate, **base):
        momentum = None if base else 0.0
        return dj.def_sgd(
            learning_rate, compressor, detach=detach, momentum=momentum, **base
        )

    def reference(g, x, topology, sizes):
        compress = dense(compressor, leaves=sizes)
        n = len(matrices(topology)[0])
        return compression.def_sgd(
            g, x, n, RATE, STEPS, lambda t, i, v: -compress(t, i, -v), detach
        ).params

    return make, reference


def _choco(compressor):
    return (
        lambda topology, learning_rate, **base: dj.choco_sgd(
            learning_rate, topology, compressor, 0.4, **base
        ),
        lambda g, x, topology, sizes: (
            compression.choco_sgd(
                *(g, x, topology.matrix, RATE, STEPS),
                *(dense(compressor, leaves=sizes), 0.4),
            ).params
        ),
    )


CTA, ATC = "combine_then_adapt", "adapt_then_combine"
TAKES_SCHEDULES = {
    "d_psgd": _gossip(dj.d_psgd, gossip.d_psgd, order=CTA),
    "d_psgd_atc": _gossip(dj.d_psgd, gossip.d_psgd, order=ATC),
    "dsgt": _gossip(dj.dsgt, tracking.dsgt, order=CTA),
    "dsgt_atc": _gossip(dj.dsgt, tracking.dsgt, order=ATC),
    "sgp": _gossip(dj.sgp, local_updates.sgp),
}
ALGORITHMS = TAKES_SCHEDULES | {
    "d2": _lazy(dj.d2, lambda g, x, W: gossip.d2(g, x, [W], RATE, STEPS)),
    "detag": _lazy(
        functools.partial(dj.detag, rounds=2),
        lambda g, x, W: tracking.detag(g, x, W, RATE, STEPS, 2),
    ),
    "all_reduce": (
        lambda topology, learning_rate, **base: dj.all_reduce_sgd(
            learning_rate, **base
        ),
        lambda g, x, topology, sizes: averaging.all_reduce_sgd(
            g, x, len(topology.matrix), RATE, STEPS
        ),
    ),
    "local_sgd": (
        lambda topology, learning_rate, **base: dj.local_sgd(learning_rate, 2, **base),
        lambda g, x, topology, sizes: local_updates.local_sgd(
            g, x, len(topology.matrix), RATE, STEPS, 2
        ),
    ),
    "qg_dsgdm": (
        lambda topology, learning_rate: dj.qg_dsgdm(learning_rate, topology, 0.5),
        lambda g, x, topology, sizes: local_updates.qg_dsgdm(
            g, x, matrices(topology), RATE, STEPS, 0.5, 0.5
        ),
    ),
    "ef_block": _feedback(dj.compression.random_block(2), 0.0),
    "def_block": _feedback(dj.compression.random_block(2), 0.3),
    "def_top_k": _feedback(dj.compression.top_k(ratio=2), 0.3),
    "ef_identity": _feedback(dj.compression.identity(), 0.0),
    "choco_top_k": _choco(dj.compression.top_k(ratio=2)),
    "choco_identity": _choco(dj.compression.identity()),
}
# Rounding could choose other entries than float64 does.
CHOOSES = {"def_top_k", "choco_top_k"}
# Learns its learning rate, so it takes no base.
NO_BASE = {"qg_dsgdm"}

# What stands before the algorithm: name -> (transformation, what it does in NumPy)
WRAPPERS = {
    "scale": (lambda: optax.scale(0.5), lambda g, x: 0.5 * g),
    "clip": (lambda: optax.clip(0.8), lambda g, x: np.clip(g, -0.8, 0.8)),
    "decay": (lambda: optax.add_decayed_weights(0.1), lambda g, x: g + 0.1 * x),
}


@st.composite
def cases(draw):
    n = draw(st.integers(2, 8))
    algorithm = draw(st.sampled_from(sorted(ALGORITHMS)))
    names = sorted(TOPOLOGIES)
    if algorithm in TAKES_SCHEDULES:
        names += sorted(SCHEDULES)
    dtype = draw(st.sampled_from(sorted(TOLERANCES)))
    if algorithm in CHOOSES:
        dtype = "float64"
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    if all(math.prod(shape) == 0 for shape in shapes):
        shapes.append((3,))
    return Case(
        n=n,
        devices=draw(st.sampled_from([0, *(d for d in range(1, 9) if n % d == 0)])),
        topology=draw(st.sampled_from(names)),
        algorithm=algorithm,
        wrappers=tuple(draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2))),
        injected=draw(st.booleans()) and algorithm not in NO_BASE,
        masked=draw(st.booleans()) and len(shapes) > 1,
        multi_steps=draw(st.booleans()),
        shapes=tuple(shapes),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )


def problem(case):
    """Quadratics that differ between workers, with fresh noise each iteration."""
    rng = np.random.default_rng(case.seed)
    size = sum(map(math.prod, case.shapes))
    curvature = rng.uniform(0.5, 1.5, (case.n, size))
    return (
        curvature,
        rng.normal(size=(case.n, size)),
        rng.normal(size=(case.n, STEPS, size)),
    )


def expected(case, topology):
    """The trajectory, [n, STEPS + 1, size]."""
    curvature, optimum, noise = problem(case)
    ends = np.cumsum([0, *map(math.prod, case.shapes)])

    def run(reference, start, stop, sizes):
        part = slice(start, stop)

        def gradient(t, i, x):
            g = curvature[i, part] * (x - optimum[i, part]) + noise[i, t, part]
            for name in case.wrappers:
                g = WRAPPERS[name][1](g, x)
            return g

        return reference(gradient, np.zeros(stop - start), topology, sizes)

    def sgd(g, x, topology, sizes):
        return local_updates.local_sgd(g, x, case.n, RATE, STEPS, STEPS + 1)

    sizes = tuple(map(math.prod, case.shapes))
    reference = ALGORITHMS[case.algorithm][1]
    if case.masked:
        # The first leaf has plain SGD.
        parts = [
            run(sgd, 0, ends[1], sizes[:1]),
            run(reference, ends[1], ends[-1], sizes[1:]),
        ]
    else:
        parts = [run(reference, 0, ends[-1], sizes)]
    return np.swapaxes(np.concatenate(parts, -1), 0, 1)


def transformation(case, topology):
    make = ALGORITHMS[case.algorithm][0]
    if case.injected:
        base = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
        tx = make(topology, None, base=base)
    else:
        tx = make(topology, RATE)
    if case.masked:
        rest = [index > 0 for index in range(len(case.shapes))]
        tx = optax.chain(
            optax.masked(tx, rest),
            optax.masked(optax.sgd(RATE), [not masked for masked in rest]),
        )
    tx = optax.chain(*(WRAPPERS[name][0]() for name in case.wrappers), tx)
    return optax.MultiSteps(tx, 2) if case.multi_steps else tx


def trajectory(case, topology):
    tx = transformation(case, topology)
    ends = np.cumsum([0, *map(math.prod, case.shapes)])

    def tree(x):
        return [
            x[a:b].reshape(shape)
            for a, b, shape in zip(ends[:-1], ends[1:], case.shapes, strict=True)
        ]

    def flat(leaves):
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    def run(data):
        curvature, optimum, noise = data
        params = tree(jnp.zeros_like(optimum))

        def iteration(carry, noise_now):
            params, state = carry
            gradient = curvature * (flat(params) - optimum) + noise_now
            # MultiSteps takes the mean of two parts, which is the gradient.
            for share in (0.5, 1.5) if case.multi_steps else (1,):
                part = tree(gradient * jnp.asarray(share, gradient.dtype))
                updates, state = tx.update(part, state, params)
                params = optax.apply_updates(params, updates)
            return (params, state), flat(params)

        _, rest = lax.scan(iteration, (params, tx.init(params)), noise)
        return jnp.concatenate([flat(params)[None], rest])

    return run


def check(case):
    topology = (TOPOLOGIES | SCHEDULES)[case.topology](case.n, case.seed)
    with jax.enable_x64(case.dtype == "float64"):
        data = jax.tree.map(lambda x: jnp.asarray(x, case.dtype), problem(case))
        run = trajectory(case, topology)
        if case.devices:
            workers = dj.Workers(case.n, devices=jax.devices()[: case.devices])
            path = workers.gather(workers.spmd(run)(workers.shard(data)))
        else:
            path = jax.jit(jax.vmap(run, axis_name="workers"))(data)
        path = np.asarray(path)
    assert path.dtype == jnp.dtype(case.dtype)
    wanted = expected(case, topology)
    error = np.abs(path.astype(np.float64) - wanted).max()
    tolerance = TOLERANCES[case.dtype]
    if case.multi_steps:
        # optax's running mean rounds to float32, whatever the gradients' dtype.
        tolerance = max(tolerance, 1e-7)
    assert error <= tolerance * max(1, np.abs(wanted).max())


@settings(
    max_examples=CASES or 12,
    derandomize=not CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_equals_reference(case):
    check(case)
