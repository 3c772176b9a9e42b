"""Cases of the fuzz test: topologies, algorithms with their options, and wrappers.

Hypothesis regards the first item of a list as the simplest and tries it first. Here, it
is the most informative one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import networkx as nx
import numpy as np
import optax
from hypothesis import strategies as st

import decentral_jax as dj
from tests.reference import (
    asynchronous,
    averaging,
    compression,
    gossip,
    local_updates,
    tracking,
)
from tests.support import registry
from tests.support.dense_compressors import dense

C = dj.compression
# Injectable numbers are exactly representable in bfloat16.
STEPS, RATE = 10, 2**-4
SHAPES = [(3, 4), (3,), (2, 3), (), (1,), (4, 1), (0,)]
DTYPES = ["bfloat16", "mixed", "float16", "float32", "float64"]
AXES = ("hub", "worker")

# Topologies, grouped by the requirements of algorithms.


def permutations(n, seed):
    """A random symmetric, doubly stochastic matrix that contains a ring."""
    rng = np.random.default_rng(seed)
    shift = np.roll(np.eye(n), 1, axis=0)
    parts = [np.eye(n), shift, *(np.eye(n)[rng.permutation(n)] for _ in range(2))]
    matrix = np.tensordot(rng.dirichlet(np.ones(4)), parts, 1)
    return dj.topology.from_matrix((matrix + matrix.T) / 2)


def connected(n, seed):
    """A connected random graph: tries seeds from `seed` on."""
    while not nx.is_connected(nx.gnp_random_graph(n, 0.7, seed=seed)):
        seed += 100
    return dj.topology.erdos_renyi(n, 0.7, seed=seed)


def pushing(n, seed):
    """A random directed graph that contains a ring; only its columns sum to one."""
    graph = nx.gnp_random_graph(n, 0.3, seed=seed, directed=True)
    graph.add_edges_from((i, (i + 1) % n) for i in range(n))
    return dj.topology.from_graph(graph, weights="push")


SYMMETRIC = {
    "permutations": permutations,
    "erdos_renyi": connected,
    "ring": lambda n, seed: dj.topology.ring(n),
    "path": lambda n, seed: dj.topology.path(n),
    "star": lambda n, seed: dj.topology.star(n),
    "complete": lambda n, seed: dj.topology.complete(n),
}
STATIC = SYMMETRIC | {"exponential": lambda n, seed: dj.topology.exponential(n)}
SCHEDULES = {
    "mixed": lambda n, seed: dj.topology.schedule(
        [permutations(n, seed), dj.topology.star(n)]
    ),
    # One-peer rounds exist for even numbers of workers only.
    "one_peer": lambda n, seed: (
        dj.topology.one_peer_ring(n) if n % 2 == 0 and n > 2 else dj.topology.ring(n)
    ),
}
STOCHASTIC = SCHEDULES | STATIC
PUSHING = STOCHASTIC | {"push": pushing}
TOPOLOGIES = PUSHING


def matrices(topology):
    one = isinstance(topology, dj.topology.Topology)
    return [t.matrix for t in ([topology] if one else topology)]


# Algorithms


class Setting(NamedTuple):
    """The inputs of an algorithm's arguments and reference."""

    n: int
    hubs: int  # size of the first of two axes
    topology: Any
    shapes: tuple[tuple[int, ...], ...]  # the leaves that the algorithm sees
    seed: int

    @property
    def sizes(self):
        return tuple(map(math.prod, self.shapes))

    def compress(self, compressor, of_step=lambda key: key):
        return dense(compressor, of_step, leaves=self.sizes)


def sgd(rate, momentum=None):
    return rate if momentum is None else optax.sgd(rate, momentum=momentum)


class Algorithm(NamedTuple):
    # option -> strategy
    options: dict[str, st.SearchStrategy]
    # (gradient, x0, setting, **options) -> trajectory [STEPS + 1, n, d]
    reference: Callable[..., np.ndarray]
    # (setting, **options) -> further arguments of the constructor
    arguments: Callable[..., dict] = lambda s, **options: {}
    topologies: dict[str, Callable] = SYMMETRIC
    # Whether rounding may change discrete choices: then only float64 is compared.
    has_choices: bool = False
    # Dtypes in which rounding errors stay within the tolerances.
    dtypes: tuple[str, ...] = tuple(DTYPES)
    # Largest error, in units in the last place of max(1, largest entry of the leaf's
    # path): the accumulated rounding of all operations in ten steps. In half precision,
    # only the parameters are rounded.
    units: float = 16
    half_units: float = 4
    # (rate, momentum) -> the first argument. None if it must be a rate.
    optimizer: Callable[..., Any] | None = sgd
    two_axes: bool = False  # whether it needs axes for hubs and workers
    workers: int | None = None  # None means any number
    # Whether the reference evaluates each worker's gradient once per iteration.
    one_gradient: bool = True


def only(*values):
    return st.sampled_from(values)


def _with_topology(s, **options):
    return {"topology": s.topology}


def _lazy(s, **options):
    return {"topology": s.topology.lazy(0.5)}


MOMENTUM = only(None, 0.0, 0.5)
PERIOD = st.integers(1, 4)
DETACH = only(0.125, 0.5, 1.0)
ORDER = only("combine_then_adapt", "adapt_then_combine")
SENT = only(C.random_block(2), C.random_block(3), C.random_k(2), C.identity())
CHOSEN = only(C.top_k(ratio=2), C.top_k(ratio=3, whole_model=True), C.sign())
QUANTIZED = only(C.quantize(4), C.quantize(1))


def _feedback(detach, sent, **more):
    """EF or DEF. The papers subtract updates; the library adds them."""

    def reference(g, x, s, compressor, momentum=None, period=1, detach=0.0):
        compress = s.compress(compressor)
        return compression.def_sgd(
            *(g, x, s.n, RATE, STEPS, lambda t, i, v: -compress(t, i, -v)),
            *(detach, momentum or 0.0, period),
        ).params

    options = {"compressor": sent, "momentum": MOMENTUM, "period": PERIOD}
    if detach:
        options["detach"] = DETACH
    return Algorithm(options, reference, **more)


def _ordered(reference):
    """An algorithm with the option to gossip before or after the step."""
    return Algorithm(
        {"order": ORDER},
        lambda g, x, s, order: reference(
            g, x, matrices(s.topology), RATE, STEPS, order=order
        ),
        _with_topology,
        STOCHASTIC,
    )


def _cser(g, x, s, compressor, reset_compressor, period, momentum):
    first = s.compress(compressor, lambda key: jax.random.split(key)[0])
    second = s.compress(
        reset_compressor or compressor, lambda key: jax.random.split(key)[1]
    )
    return compression.cser(
        g, x, s.n, RATE, STEPS, first, second, period, momentum or 0.0
    ).params


def _choco(sent, **more):
    return Algorithm(
        {"compressor": sent, "consensus_rate": only(0.25, 0.375), "momentum": MOMENTUM},
        lambda g, x, s, compressor, consensus_rate, momentum: (
            compression.choco_sgd(
                *(g, x, s.topology.matrix, RATE, STEPS, s.compress(compressor)),
                *(consensus_rate, momentum or 0.0),
            ).params
        ),
        _with_topology,
        STATIC,
        **more,
    )


def _powersgd(g, x, s, rank, momentum):
    """Low-rank factors for matrices that are large enough, and whole other leaves."""
    low, parts, start = C.low_rank(rank), [], 0
    for shape, size in zip(s.shapes, s.sizes, strict=True):
        part, start = slice(start, start + size), start + size
        leaf, thin = np.zeros(shape), low.applies_to(np.zeros(shape))

        def gradient(t, i, y, part=part, shape=shape):
            full = np.zeros(x.size)
            full[part] = y.ravel()
            return g(t, i, full)[part].reshape(shape)

        run = gradient, leaf, s.n, RATE, STEPS
        if thin:
            with jax.enable_x64(True):
                q0 = np.asarray(low.start(leaf))
            path = compression.powersgd(*run, rank, q0, momentum or 0.0).params
        else:
            path = compression.def_sgd(
                *run, lambda t, i, v: v, 0.0, momentum or 0.0
            ).params
        parts.append(path.reshape(STEPS + 1, s.n, size))
    return np.concatenate(parts, -1)


def _slowmo(g, x, s, period, slow_momentum, slow_rate, momentum):
    return local_updates.slowmo(
        *(g, x, s.n, RATE, STEPS, period, slow_rate, slow_momentum, momentum or 0.0)
    )


def _diloco(g, x, s, period, outer_rate, outer_momentum):
    return local_updates.diloco(
        *(g, x, s.n, RATE, STEPS, period, outer_rate, outer_momentum),
        [np.arange(x.size)],
    )


def _shares(s):
    table = np.random.default_rng(s.seed).uniform(0.5, 1.5, (s.hubs, s.n // s.hubs))
    return table / table.sum()


def _multi_level(g, x, s, W, shares, operates, tau, q):
    table = np.full((s.hubs, s.n // s.hubs), 1 / s.n) if shares is None else shares
    b = table.sum(1)
    # A matrix that averages exactly becomes one that averages exactly with shares b.
    exact = np.allclose(W, 1 / s.hubs)
    H = np.tile(b, (s.hubs, 1)) if exact else local_updates.hub_matrix(W, b)
    return local_updates.multi_level(g, x, H, table, operates, RATE, STEPS, tau, q)


def _mll_arguments(s, unequal, **options):
    hubs = dj.topology.path(s.hubs)
    return {"hub_topology": hubs, "shares": _shares(s) if unequal else None}


def _mll(g, x, s, unequal, tau, q, rates, seed):
    sizes = (s.hubs, s.n // s.hubs)

    def operates(t, i):
        key = jax.random.fold_in(jax.random.key(seed), t)
        return np.asarray(jax.random.uniform(key, sizes, np.float32)).ravel()[i] < rates

    W = dj.topology.path(s.hubs).matrix
    return _multi_level(g, x, s, W, _shares(s) if unequal else None, operates, tau, q)


def _hl(g, x, s, unequal, tau, q):
    W = dj.topology.complete(s.hubs).matrix
    shares = _shares(s) if unequal else None
    return _multi_level(g, x, s, W, shares, lambda t, i: True, tau, q)


def _trace(s):
    if s.seed % 2:
        return dj.traces.uniform_delay(4, 3 * STEPS, num_workers=s.n, seed=s.seed)
    speeds = np.random.default_rng(s.seed).uniform(1, 3, s.n)
    return dj.traces.from_speeds(speeds, 3 * STEPS)


def _apam(g, x, s, b1, b2, eps, weight_decay):
    trace = _trace(s)
    path = asynchronous.replay(
        *(x, lambda w, x, k: g(k, w, x)),
        *(trace.workers[:STEPS], trace.staleness[:STEPS]),
        asynchronous.amsgrad(RATE, b1, b2, eps, weight_decay or 0.0),
    )
    return asynchronous.held(path, trace.workers, trace.staleness, s.n)


ADAPTIVE = ("float32", "float64")
HUB_OPTIONS = {"unequal": st.booleans(), "tau": PERIOD, "q": PERIOD}
ALGORITHMS = {
    "all_reduce_sgd": Algorithm(
        {}, lambda g, x, s: averaging.all_reduce_sgd(g, x, s.n, RATE, STEPS)
    ),
    "d_psgd": _ordered(gossip.d_psgd),
    "d2": Algorithm(
        {},
        lambda g, x, s: gossip.d2(g, x, [s.topology.lazy(0.5).matrix], RATE, STEPS),
        _lazy,
    ),
    "dsgt": _ordered(tracking.dsgt),
    "detag": Algorithm(
        {
            "rounds": PERIOD,
            "momentum": MOMENTUM,
            "when": only("every_step", "phase_end"),
        },
        lambda g, x, s, rounds, momentum, when: tracking.detag(
            *(g, x, s.topology.lazy(0.5).matrix, RATE, STEPS, rounds, momentum or 0.0)
        ),
        _lazy,
    ),
    "defacto": Algorithm(
        {"rounds": only(None, 1, 2)},
        lambda g, x, s, rounds: tracking.defacto(
            *(g, x, dj.topology.exact_factors(s.topology), RATE, STEPS),
            rounds or len(dj.topology.exact_factors(s.topology)),
        ),
        _with_topology,
        one_gradient=False,
    ),
    "ef_sgd": _feedback(False, SENT),
    "ef_sgd_choosing": _feedback(False, CHOSEN, has_choices=True),
    "def_sgd": _feedback(True, SENT),
    "def_sgd_choosing": _feedback(True, CHOSEN | QUANTIZED, has_choices=True),
    "def_a_sgd": _feedback(True, SENT),
    "sgd_ia": Algorithm(
        {"ratio": only(1.0, 4.0), "detach": only(0.0, 0.25, 1.0), "momentum": MOMENTUM},
        lambda g, x, s, ratio, detach, momentum: (
            compression.sgd_ia(
                g, x, s.n, RATE, STEPS, 1 / ratio, detach, momentum or 0.0
            ).params
        ),
    ),
    "cser": Algorithm(
        {
            "compressor": SENT,
            "reset_compressor": only(None, C.random_block(2), C.identity()),
            "period": PERIOD,
            "momentum": MOMENTUM,
        },
        _cser,
    ),
    "choco_sgd": _choco(SENT),
    "choco_sgd_choosing": _choco(only(C.top_k(ratio=2), C.sign()), has_choices=True),
    "powersgd": Algorithm(
        {"rank": only(1, 2), "momentum": MOMENTUM},
        _powersgd,
        has_choices=True,
        one_gradient=False,
    ),
    "local_sgd": Algorithm(
        {"period": PERIOD},
        lambda g, x, s, period: local_updates.local_sgd(g, x, s.n, RATE, STEPS, period),
    ),
    "slowmo": Algorithm(
        {
            "period": PERIOD,
            "slow_momentum": only(0.0, 0.5),
            "slow_rate": only(0.5, 1.0),
            "momentum": MOMENTUM,
        },
        _slowmo,
    ),
    "diloco": Algorithm(
        {
            "period": PERIOD,
            "outer_rate": only(0.5, 1.0),
            "outer_momentum": only(0.0, 0.5),
        },
        _diloco,
        lambda s, outer_rate, outer_momentum, **options: {
            "outer": optax.sgd(outer_rate, momentum=outer_momentum, nesterov=True)
        },
        dtypes=ADAPTIVE,
        units=64,  # Small second moments magnify rounding.
        optimizer=optax.adamw,
    ),
    "mll_sgd": Algorithm(
        HUB_OPTIONS | {"rates": only(0.5, 1.0), "seed": only(0, 5)},
        _mll,
        _mll_arguments,
        two_axes=True,
        one_gradient=False,
    ),
    "hl_sgd": Algorithm(
        HUB_OPTIONS,
        _hl,
        lambda s, unequal, **options: {
            "num_hubs": s.hubs,
            "shares": _shares(s) if unequal else None,
        },
        two_axes=True,
    ),
    "sgp": Algorithm(
        {"momentum": MOMENTUM},
        lambda g, x, s, momentum: local_updates.sgp(
            g, x, matrices(s.topology), RATE, STEPS, momentum or 0.0
        ),
        _with_topology,
        PUSHING,
    ),
    "apam": Algorithm(
        {
            "b1": only(0.5, 0.875),
            "b2": only(0.5, 0.96875),
            "eps": only(2**-10, 2**-7),
            "weight_decay": only(None, 0.125),
        },
        _apam,
        lambda s, **options: {"trace": _trace(s)},
        dtypes=ADAPTIVE,
        units=64,  # Small second moments magnify rounding.
        optimizer=None,
        one_gradient=False,
    ),
    "qg_dsgdm": Algorithm(
        {"momentum": only(0.0, 0.5), "factor": only(None, 0.25)},
        lambda g, x, s, momentum, factor: local_updates.qg_dsgdm(
            *(g, x, matrices(s.topology), RATE, STEPS, momentum),
            1 - momentum if factor is None else factor,
        ),
        _with_topology,
        STOCHASTIC,
        optimizer=None,
    ),
}


def from_registry(setting):
    """An algorithm without fuzz options: one setting of the registry with 8 workers."""
    return Algorithm(
        {},
        lambda g, x, s: setting.reference(g, x, RATE, STEPS),
        lambda s: setting.arguments,
        {"ring": SYMMETRIC["ring"]},  # not used
        optimizer=setting.local or sgd,
        workers=8,
    )


_drawn = {name.removesuffix("_choosing") for name in ALGORITHMS}
for _setting in registry.ALGORITHMS.values():
    _name = _setting.build.__name__
    if _name in set(dj.algorithms.__all__) - _drawn:
        ALGORITHMS[_name] = from_registry(_setting)

# Options of the tests, which are not arguments of the constructor.
OWN = {"unequal", "outer_rate", "outer_momentum"}


def constructor(name):
    return getattr(dj, name.removesuffix("_choosing"))


# Transformations before the algorithm: name -> (optax form, NumPy form for one worker)


def _heavy_ball():
    state = 0.0

    def run(g, x):
        nonlocal state
        state = 0.5 * state + g
        return state

    return run


WRAPPERS = {
    "scale": (lambda: optax.scale(0.5), lambda: lambda g, x: 0.5 * g),
    "clip": (lambda: optax.clip(0.75), lambda: lambda g, x: np.clip(g, -0.75, 0.75)),
    "decay": (
        lambda: optax.add_decayed_weights(0.125),
        lambda: lambda g, x: g + 0.125 * x,
    ),
    "guard": (dj.zero_nonfinite_updates, lambda: lambda g, x: g),
    "trace": (lambda: optax.trace(0.5), _heavy_ball),
}
# Wrappers with a state that every gradient changes.
STATEFUL = {"trace"}


class Case(NamedTuple):
    n: int
    hubs: int  # size of the first of two axes; 0 for one axis
    layout: str
    scan: bool  # False means one program call per step
    topology: str
    algorithm: str
    options: dict[str, Any]
    wrappers: tuple[str, ...]
    injected: str  # "no", "optimizer" or "algorithm"
    split: str  # how the first leaf is excluded: "no", "masked" or "partition"
    multi_steps: bool
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    seed: int

    @property
    def axis_sizes(self):
        if self.hubs:
            return dict(zip(AXES, (self.hubs, self.n // self.hubs), strict=True))
        return {"workers": self.n}


@st.composite
def cases(draw, name, algorithm=None):
    algorithm = algorithm or ALGORITHMS[name]
    n = algorithm.workers or draw(only(8, 6, 4, 3, 2, 5, 7))
    pairs = [h for h in range(2, n) if n % h == 0]
    if algorithm.two_axes and not pairs:
        n, pairs = 8, [2, 4]
    two = algorithm.two_axes or (bool(pairs) and draw(st.booleans()))
    hubs = draw(st.sampled_from(pairs[::-1])) if two else 0
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    if all(math.prod(shape) == 0 for shape in shapes):
        shapes.append((3,))
    split = draw(only("no", "masked", "partition")) if len(shapes) > 1 else "no"
    # The algorithm needs at least one leaf with entries.
    if all(math.prod(shape) == 0 for shape in shapes[1:]):
        split = "no"
    options = {key: draw(value) for key, value in algorithm.options.items()}
    dtypes = ("float64",) if algorithm.has_choices else algorithm.dtypes
    dtype = draw(st.sampled_from(dtypes))
    if getattr(options.get("compressor"), "whole_model", False) and dtype == "mixed":
        dtype = "float32"
    before = [
        w for w in sorted(WRAPPERS) if algorithm.one_gradient or w not in STATEFUL
    ]

    def fits(devices):
        """Whether two joint axes lie contiguously on the devices."""
        together = hubs and not algorithm.two_axes
        return not together or hubs % devices == 0 or devices % hubs == 0

    injections = ["no", "algorithm"] + ["optimizer"] * (algorithm.optimizer is not None)
    folds = [d for d in range(1, n + 1) if n % d == 0 and fits(d)]
    # Prefer several workers on each of several devices.
    folds.sort(key=lambda d: (d in (1, n), d))
    layouts = [*(f"devices_{d}" for d in folds), "vmap", "shard_map"]
    return Case(
        n=n,
        hubs=hubs,
        layout=draw(st.sampled_from(layouts)),
        scan=draw(st.booleans()),
        topology=draw(st.sampled_from(list(algorithm.topologies))),
        algorithm=name,
        options=options,
        wrappers=tuple(
            draw(st.lists(st.sampled_from(before), max_size=2, unique=True))
        ),
        injected=draw(st.sampled_from(injections)),
        split=split,
        multi_steps=draw(st.booleans()),
        shapes=tuple(shapes),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
