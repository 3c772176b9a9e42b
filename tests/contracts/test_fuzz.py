"""Random compositions equal dense NumPy references.

Hypothesis draws an algorithm and its options, a topology, optax wrappers, a tree,
dtypes and a layout; see `tests/support/fuzz_cases.py`.
`DECENTRAL_JAX_FUZZ=1000 python -m pytest -n 0 tests/contracts/test_fuzz.py` runs 1,000
cases instead of two per algorithm. `DECENTRAL_JAX_FUZZ_SEED=1` draws different cases.
"""

import functools
import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as start_from
from jax import lax

import decentral_jax as dj
from tests.reference import local_updates
from tests.support import registry
from tests.support.fuzz_cases import (
    ALGORITHMS,
    DTYPES,
    OWN,
    RATE,
    SHAPES,
    STEPS,
    TOPOLOGIES,
    WRAPPERS,
    Case,
    Setting,
    cases,
    constructor,
    from_registry,
    sgd,
)
from tests.support.injection import inject
from tests.support.layouts import LAYOUTS, flat, on_devices, shard_map

COUNT = int(os.environ.get("DECENTRAL_JAX_FUZZ", "0"))
SEED = int(os.environ.get("DECENTRAL_JAX_FUZZ_SEED", "0"))
# optax's optimizers mix dtypes themselves.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def dtypes(case: Case):
    if case.dtype == "mixed":
        return [("float32", "bfloat16")[i % 2] for i in range(len(case.shapes))]
    return [case.dtype] * len(case.shapes)


def ends(shapes):
    return np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])


def problem(case):
    """Quadratics that differ between workers, with fresh noise each iteration.

    Returns curvatures, optima and noise as leaves, rounded to the leaves' dtypes.
    """
    rng = np.random.default_rng(case.seed)

    def drawn(draw, *axes):
        return [
            np.asarray(draw((case.n, *axes, *shape)), jnp.dtype(dtype))
            for shape, dtype in zip(case.shapes, dtypes(case), strict=True)
        ]

    return (
        drawn(lambda size: rng.uniform(0.5, 1.5, size)),
        drawn(lambda size: rng.normal(size=size)),
        drawn(lambda size: rng.normal(size=size), STEPS),
    )


def setting(case, shapes):
    topology = TOPOLOGIES[case.topology](case.n, case.seed)
    return Setting(case.n, case.hubs, topology, tuple(shapes), case.seed)


def expected(case, rng=None):
    """The path by the reference: leaves [n, STEPS + 1, ...].

    With `rng`, perturbs each number of the problem by up to one unit in the last place.
    """
    curvature, optimum, noise = (
        np.concatenate([x.reshape(*x.shape[:axes], -1) for x in part], -1).astype(float)
        for part, axes in zip(problem(case), (1, 1, 2), strict=True)
    )
    if rng is not None:
        unit = np.finfo(float).eps
        curvature, optimum, noise = (
            x * (1 + unit * rng.choice([-1, 0, 1], x.shape))
            for x in (curvature, optimum, noise)
        )
    cuts = ends(case.shapes)

    def run(reference, first, last):
        part = slice(cuts[first], cuts[last])
        before = [
            [WRAPPERS[name][1]() for name in case.wrappers] for _ in range(case.n)
        ]

        def gradient(t, i, x):
            g = curvature[i, part] * (x - optimum[i, part]) + noise[i, t, part]
            for wrapper in before[i]:
                g = wrapper(g, x)
            return g

        x0 = np.zeros(cuts[last] - cuts[first])
        return reference(gradient, x0, setting(case, case.shapes[first:last]))

    def sgd(g, x, s):
        return local_updates.local_sgd(g, x, case.n, RATE, STEPS, STEPS + 1)

    def algorithm(g, x, s):
        return ALGORITHMS[case.algorithm].reference(g, x, s, **case.options)

    first = 0 if case.split == "no" else 1
    parts = [run(sgd, 0, 1)] * first + [run(algorithm, first, len(case.shapes))]
    path = np.swapaxes(np.concatenate(parts, -1), 0, 1)
    return [
        path[..., a:b].reshape(case.n, STEPS + 1, *shape)
        for a, b, shape in zip(cuts[:-1], cuts[1:], case.shapes, strict=True)
    ]


def transformation(case):
    build, algorithm = constructor(case.algorithm), ALGORITHMS[case.algorithm]
    shapes = case.shapes[case.split != "no" :]
    given = {k: v for k, v in case.options.items() if k not in OWN}
    given |= algorithm.arguments(setting(case, shapes), **case.options)
    if not algorithm.two_axes and case.hubs:
        given["axis_name"] = tuple(case.axis_sizes)
    first = RATE
    if algorithm.optimizer is not None:
        momentum = {k: given.pop(k) for k in ("momentum",) if k in given}
        make = algorithm.optimizer
        if case.injected == "optimizer":
            # float32 hyperparameters would widen the state of optax's momentum.
            narrow = jnp.bfloat16 if case.dtype == "mixed" else None
            plain = optax.sgd if make is sgd else make
            make = optax.inject_hyperparams(plain, hyperparam_dtype=narrow)
        first = make(RATE, **momentum)
    tx = (
        inject(build, first, **given)
        if case.injected == "algorithm"
        else build(first, **given)
    )
    if case.split == "masked":
        rest = [index > 0 for index in range(len(case.shapes))]
        tx = optax.chain(
            optax.masked(tx, rest),
            optax.masked(optax.sgd(RATE), [not masked for masked in rest]),
        )
    elif case.split == "partition":
        labels = ["sgd", *["algorithm"] * len(shapes)]
        tx = optax.partition({"sgd": optax.sgd(RATE), "algorithm": tx}, labels)
    tx = optax.chain(*(WRAPPERS[name][0]() for name in case.wrappers), tx)
    if case.multi_steps:
        # optax accumulates in float32 unless told otherwise.
        wide = "float64" if case.dtype == "float64" else "float32"
        tx = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.dtype(wide))
    return tx


def mapped(case, fn):
    if case.layout.startswith("devices_"):
        build = flat(on_devices(int(case.layout.removeprefix("devices_"))))
    elif case.layout == "shard_map":
        # A scan whose carry starts from constants, and the branches of MultiSteps, mix
        # types that vary over workers with types that do not.
        check_vma = not (case.scan or case.multi_steps)
        build = flat(functools.partial(shard_map, check_vma=check_vma))
    else:
        build = LAYOUTS[case.layout]
    return build(fn, case.axis_sizes if case.hubs else case.n)


def found(case):
    """The path by the library: leaves [n, STEPS + 1, ...]."""
    tx = transformation(case)

    def iteration(curvature, optimum, params, state, noise):
        gradient = [
            c * (x - o) + e
            for c, x, o, e in zip(curvature, params, optimum, noise, strict=True)
        ]
        # MultiSteps averages the two parts; their mean is the gradient.
        for share in (0.5, 1.5) if case.multi_steps else (1,):
            part = [g * jnp.asarray(share, g.dtype) for g in gradient]
            updates, state = tx.update(part, state, params)
            # optax's own updates take the dtype of an injected rate.
            if case.injected == "no":
                assert [u.dtype for u in updates] == [x.dtype for x in params]
            params = optax.apply_updates(params, updates)
        return params, state

    def start(optimum):
        params = [jnp.zeros_like(o) for o in optimum]
        return params, tx.init(params)

    def run(curvature, optimum, noise):
        def body(carry, noise):
            carry = iteration(curvature, optimum, *carry, noise)
            return carry, carry[0]

        carry = start(optimum)
        _, rest = lax.scan(body, carry, noise)
        return [
            jnp.concatenate([x[None], y]) for x, y in zip(carry[0], rest, strict=True)
        ]

    data = jax.tree.map(jnp.asarray, problem(case))
    if case.scan:
        return mapped(case, run)(*data)
    step, (curvature, optimum, noise) = mapped(case, iteration), data
    params, state = jax.tree.map(np.asarray, mapped(case, start)(optimum))
    path = [params]
    for t in range(STEPS):
        now = [x[:, t] for x in noise]
        # Wait: with many steps in flight, fake devices can block each other.
        params, state = jax.block_until_ready(
            step(curvature, optimum, params, state, now)
        )
        path.append(params)
    return [np.stack(leaf, 1) for leaf in zip(*path, strict=True)]


def errors(case):
    """Yields per leaf: error and largest allowed error, in units in the last place."""
    algorithm = ALGORITHMS[case.algorithm]
    with jax.enable_x64(case.dtype == "float64"):
        paths = jax.tree.map(np.asarray, found(case))
        wanted = expected(case)
    for path, want, dtype in zip(paths, wanted, dtypes(case), strict=True):
        assert path.dtype == jnp.dtype(dtype)
        error = np.abs(path.astype(np.float64) - want).max(initial=0.0)
        size = max(1.0, np.abs(want).max(initial=0.0))
        is_half = path.dtype.itemsize < 4
        allowed = algorithm.half_units if is_half else algorithm.units
        yield error / size / float(jnp.finfo(dtype).eps), allowed


def sensitivity(case):
    """Condition number of the reference: output change per unit of input change.

    A power iteration that starts almost orthogonal to the leading singular vector
    magnifies rounding. Returns the largest change of eight random perturbations.
    """
    rng, wanted = np.random.default_rng(0), expected(case)
    unit = np.finfo(float).eps
    return max(
        np.abs(moved - want).max(initial=0.0)
        / max(1.0, np.abs(want).max(initial=0.0))
        / unit
        for _ in range(8)
        for moved, want in zip(expected(case, rng), wanted, strict=True)
    )


def check(case):
    for error, allowed in errors(case):
        if error > allowed and case.dtype == "float64":
            # An ill-conditioned case magnifies the rounding errors of all operations.
            allowed *= max(1.0, sensitivity(case))
        assert error <= allowed


def each(count, run, **options):
    """Runs `count` cases per algorithm: drawn together, some would be rare."""
    bounded = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    return lambda name: bounded(start_from(SEED)(given(cases(name))(run)))()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_reference(name):
    # Run at least two: the first case that Hypothesis draws is the simplest one.
    each(max(2, COUNT // len(ALGORITHMS)), check)(name)


def test_algorithm_that_only_the_registry_describes(monkeypatch):
    """Algorithms without fuzz options take their options from the registry."""
    monkeypatch.setitem(ALGORITHMS, "sgp", from_registry(registry.ALGORITHMS["sgp"]))
    each(2, check)("sgp")


def test_all_kinds_of_cases_are_drawn():
    """The draws cover every option. The cases themselves do not run here."""
    seen = Counter()

    def count(case):
        for field in case._fields:
            value = getattr(case, field)
            if field == "options":
                parts = [(case.algorithm, key, str(x)) for key, x in value.items()]
            else:
                parts = value if isinstance(value, tuple) else [value]
            seen.update((field, part) for part in parts)

    for name in ALGORITHMS:
        each(40, count, phases=[Phase.generate])(name)
    algorithms = {constructor(name).__name__ for name in ALGORITHMS}
    assert algorithms == set(dj.algorithms.__all__)
    for field, parts in (
        ("topology", TOPOLOGIES),
        ("wrappers", WRAPPERS),
        ("layout", ["vmap", "shard_map", *(f"devices_{d}" for d in range(1, 9))]),
        ("injected", ["no", "optimizer", "algorithm"]),
        ("split", ["no", "masked", "partition"]),
        ("multi_steps", [True, False]),
        ("scan", [True, False]),
        ("n", range(2, 9)),
        ("hubs", [0, 2, 3, 4]),
        ("dtype", DTYPES),
        ("shapes", SHAPES),
    ):
        assert {part for part in parts if not seen[field, part]} == set(), field
    # More than one value of each option.
    for name, algorithm in ALGORITHMS.items():
        for key in algorithm.options:
            drawn = [
                p for field, p in seen if field == "options" and p[:2] == (name, key)
            ]
            assert len(drawn) > 1, (name, key)
