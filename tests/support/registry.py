"""The registry: all algorithms in one table, which drives the common tests.

Tests read an algorithm's requirements from this table and never branch on its name.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import networkx as nx
import numpy as np
import optax

import decentral_jax as dj
from tests.reference import (
    asynchronous,
    averaging,
    compression,
    gossip,
    local_updates,
    tracking,
)
from tests.support.dense_compressors import dense
from tests.support.layouts import Shape

RING = dj.topology.ring(8)
LAZY = RING.lazy(0.75)
ONE_PEER = dj.topology.one_peer_exponential(8)
SCHEDULE = dj.topology.schedule(
    [RING, dj.topology.star(8), dj.topology.erdos_renyi(8, 0.5, seed=1)]
)


class Algorithm(NamedTuple):
    """One algorithm in one setting."""

    # (learning_rate, axis_name) -> transformation
    make: Callable[..., optax.GradientTransformationExtraArgs]
    # (grad_fn, x0, learning_rate, steps) -> trajectory [steps + 1, n, d]
    reference: Callable[..., np.ndarray]
    # The constructor, and its arguments after the optimizer or rate
    build: Callable[..., Any]
    arguments: dict[str, Any]
    # Eight workers on one axis or on several levels
    shape: Shape = 8
    # Whether it finds the optimum of the mean loss at a constant rate, even if the
    # workers' optima differ
    finds_optimum: bool = True
    # Whether another setting shares the code and runs all tests. Only the trajectory of
    # a variant is tested, in the layouts that differ most.
    variant: bool = False
    # rate -> each worker's optimizer. None means plain SGD.
    local: Callable[..., optax.GradientTransformation] | None = None
    # Whether all workers take the same step and nothing else moves the parameters
    alone: bool = False
    # Bytes sent per worker in each step of one period, for ten float32 parameters.
    # tests/measuring/test_traffic.py holds them for most settings.
    sent: tuple[float, ...] | None = None
    # Calls of `update` per step of the optimizer, whose schedules count its own steps
    calls: int = 1

    def optimizer(self, learning_rate, inject=lambda make: make):
        """Each worker's optimizer, from a rate or a schedule over calls of `update`."""
        if self.local is None:
            return learning_rate
        rate = learning_rate
        if callable(learning_rate):

            def rate(step):
                return learning_rate(self.calls * (step + 1) - 1)

        return inject(self.local)(rate)


def momentum_sgd(momentum):
    """Rate -> SGD with momentum. None if a rate alone means the same."""
    if momentum is None:
        return None
    return functools.partial(optax.sgd, momentum=momentum)


def adamw(learning_rate):
    """optax's AdamW, which needs standard dtype promotion."""
    tx = optax.adamw(learning_rate)

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(*args)

    return optax.GradientTransformation(tx.init, update)


def _algorithm(
    build,
    reference,
    shape: Shape = 8,
    finds_optimum=True,
    local=None,
    alone=False,
    calls=1,
    sent=None,
    **arguments,
):
    def make(learning_rate, **axes):
        return build(algorithm.optimizer(learning_rate), **arguments, **axes)

    algorithm = Algorithm(
        make,
        reference,
        build,
        arguments,
        shape,
        finds_optimum,
        local=local,
        alone=alone,
        calls=calls,
        sent=sent,
    )
    return algorithm


def rounds(topology):
    """The topologies of a schedule, or a list of one topology."""
    return [topology] if isinstance(topology, dj.topology.Topology) else list(topology)


def _matrices(topology):
    return [one.matrix for one in rounds(topology)]


def _d_psgd(topology, order):
    return _algorithm(
        dj.d_psgd,
        lambda g, x, lr, steps: gossip.d_psgd(
            g, x, _matrices(topology), lr, steps, order=order
        ),
        topology=topology,
        order=order,
    )


def _dsgt(topology, order):
    return _algorithm(
        dj.dsgt,
        lambda g, x, lr, steps: tracking.dsgt(
            g, x, _matrices(topology), lr, steps, order=order
        ),
        topology=topology,
        order=order,
    )


def _detag(topology, rounds, momentum, when):
    return _algorithm(
        dj.detag,
        lambda g, x, lr, steps: tracking.detag(
            g, x, topology.matrix, lr, steps, rounds, momentum=momentum or 0.0
        ),
        local=momentum_sgd(momentum),
        calls=rounds,
        topology=topology,
        rounds=rounds,
        when=when,
    )


def _defacto(topology, rounds):
    factors = dj.topology.exact_factors(topology)
    return _algorithm(
        dj.defacto,
        lambda g, x, lr, steps: tracking.defacto(
            g, x, factors, lr, steps, rounds or len(factors)
        ),
        alone=True,
        topology=topology,
        rounds=rounds,
    )


C = dj.compression
DIRECTED = dj.topology.exponential(8)


def _negated(compress):
    """Flips signs: the papers subtract updates, the library adds them."""
    return lambda t, i, v: -compress(t, i, -v)


def _feedback(build, compressor, detach, period=1, momentum=0.9):
    """A variant of error feedback."""
    arguments = {"compressor": compressor, "period": period}
    if build is not dj.ef_sgd:
        arguments["detach"] = detach
    return _algorithm(
        build,
        lambda g, x, lr, steps: (
            compression.def_sgd(
                *(g, x, 8, lr, steps, _negated(dense(compressor))),
                *(detach, momentum, period),
            ).params
        ),
        local=momentum_sgd(momentum),
        **arguments,
    )


def _cser(compressor, reset_compressor, period):
    return _algorithm(
        dj.cser,
        lambda g, x, lr, steps: (
            compression.cser(
                *(g, x, 8, lr, steps),
                dense(compressor, lambda key: jax.random.split(key)[0]),
                dense(reset_compressor, lambda key: jax.random.split(key)[1]),
                period,
                0.9,
            ).params
        ),
        local=momentum_sgd(0.9),
        compressor=compressor,
        reset_compressor=reset_compressor,
        period=period,
    )


def _choco(topology, compressor, consensus_rate):
    return _algorithm(
        dj.choco_sgd,
        lambda g, x, lr, steps: (
            compression.choco_sgd(
                *(g, x, topology.matrix, lr, steps, dense(compressor)),
                consensus_rate,
            ).params
        ),
        topology=topology,
        compressor=compressor,
        consensus_rate=consensus_rate,
    )


def _powersgd(g, x, lr, steps):
    """Sends the whole bias, and the kernel, [2, 3], as two factors of rank 1."""

    def only(part, g, shape):
        def gradient(t, i, y):
            full = np.zeros(10)
            full[part] = y.ravel()
            return g(t, i, full)[part].reshape(shape)

        return gradient

    bias, kernel = slice(0, 4), slice(4, 10)
    q0 = np.asarray(C.low_rank(1).start(np.zeros((2, 3), np.float32)), np.float64)
    whole = compression.def_sgd(
        only(bias, g, (4,)), x[bias], 8, lr, steps, lambda t, i, v: v, 0.0, 0.5
    ).params
    thin = compression.powersgd(
        only(kernel, g, (2, 3)), x[kernel].reshape(2, 3), 8, lr, steps, 1, q0, 0.5
    ).params
    return np.concatenate([whole, thin.reshape(*thin.shape[:2], 6)], axis=-1)


def _slowmo(period, slow_rate, slow_momentum):
    return _algorithm(
        dj.slowmo,
        lambda g, x, lr, steps: local_updates.slowmo(
            *(g, x, 8, lr, steps, period, slow_rate, slow_momentum, 0.0)
        ),
        period=period,
        slow_rate=slow_rate,
        slow_momentum=slow_momentum,
    )


def _diloco(period, fragments):
    # The kernel, the larger of the two leaves, is assigned to a fragment first.
    parts = {1: [np.arange(10)], 2: [np.arange(4, 10), np.arange(4)]}[fragments]
    return _algorithm(
        dj.diloco,
        lambda g, x, lr, steps: local_updates.diloco(
            g, x, 8, lr, steps, period, 0.7, 0.9, parts
        ),
        finds_optimum=False,  # Adam's step size does not depend on the distance
        local=adamw,
        period=period,
        fragments=fragments,
    )


def _mll(shape, hubs, shares, rates, tau, q):
    """Hubs and workers. The active workers are drawn as in the library."""
    sizes = tuple(shape.values())
    table = np.full(sizes, 1 / 8) if shares is None else np.array(shares)
    p = np.broadcast_to(np.float32(rates), sizes).ravel()

    def operates(t, i):
        key = jax.random.fold_in(jax.random.key(0), t)
        return np.asarray(jax.random.uniform(key, sizes, np.float32)).ravel()[i] < p[i]

    def reference(g, x, lr, steps):
        matrix = local_updates.hub_matrix(hubs.matrix, table.sum(1))
        return local_updates.multi_level(
            g, x, matrix, table, operates, lr, steps, tau, q
        )

    return _algorithm(
        dj.mll_sgd,
        reference,
        shape=shape,
        finds_optimum=False,  # finds the optimum weighted by shares and rates
        hub_topology=hubs,
        tau=tau,
        q=q,
        rates=rates,
        shares=shares,
    )


def _hl(shares):
    def reference(g, x, lr, steps):
        table = np.full((2, 4), 1 / 8) if shares is None else np.array(shares)
        matrix = np.tile(table.sum(1), (2, 1))
        return local_updates.multi_level(
            g, x, matrix, table, lambda t, i: True, lr, steps, 2, 3
        )

    return _algorithm(
        dj.hl_sgd,
        reference,
        shape={"hub": 2, "worker": 4},
        num_hubs=2,
        tau=2,
        q=3,
        shares=shares,
    )


UNEVEN = np.array([[1, 2], [3, 4], [5, 0], [7, 8]]) / 30
PUSH = dj.topology.from_graph(
    nx.DiGraph([(i, (i + k) % 8) for i in range(8) for k in (1, 2 + i % 3)]),
    weights="push",
)


def _sgp(topology, momentum):
    return _algorithm(
        dj.sgp,
        lambda g, x, lr, steps: local_updates.sgp(
            g, x, _matrices(topology), lr, steps, momentum or 0.0
        ),
        local=momentum_sgd(momentum),
        topology=topology,
    )


def _qg(topology, momentum, factor):
    return _algorithm(
        dj.qg_dsgdm,
        lambda g, x, lr, steps: local_updates.qg_dsgdm(
            *(g, x, _matrices(topology), lr, steps),
            *(momentum, 1 - momentum if factor is None else factor),
        ),
        topology=topology,
        momentum=momentum,
        factor=factor,
    )


# Trajectories cover the start-up of this trace; its length serves the longest tests.
SPEEDS = dj.traces.from_speeds([1, 1, 1.5, 2, 2, 3, 1, 4], 5000, jitter=0.2)


def _apam(trace, **options):
    def reference(g, x, lr, steps):
        ticks = trace.workers[:steps], trace.staleness[:steps]
        path = asynchronous.replay(
            x, lambda w, x, k: g(k, w, x), *ticks, asynchronous.amsgrad(lr, **options)
        )
        return asynchronous.held(path, trace.workers, trace.staleness, 8)

    return _algorithm(
        dj.apam,
        reference,
        finds_optimum=False,
        trace=trace,
        **options,
    )


CTA, ATC = "combine_then_adapt", "adapt_then_combine"

ALGORITHMS = {
    "all_reduce_sgd": _algorithm(
        dj.all_reduce_sgd,
        lambda g, x, lr, steps: averaging.all_reduce_sgd(g, x, 8, lr, steps),
        alone=True,
    ),
    "d_psgd": _d_psgd(RING, CTA),
    "d_psgd_atc": _d_psgd(RING, ATC),
    "d_psgd_exponential": _d_psgd(dj.topology.exponential(8), CTA),
    "d_psgd_complete": _d_psgd(dj.topology.complete(8), ATC),
    "d_psgd_one_peer": _d_psgd(ONE_PEER, CTA),
    "d_psgd_atc_schedule": _d_psgd(SCHEDULE, ATC),
    "d2": _algorithm(
        dj.d2,
        lambda g, x, lr, steps: gossip.d2(g, x, [LAZY.matrix], lr, steps),
        topology=LAZY,
    ),
    "dsgt": _dsgt(RING, CTA),
    "dsgt_atc": _dsgt(RING, ATC),
    "dsgt_schedule": _dsgt(SCHEDULE, CTA),
    "dsgt_atc_one_peer": _dsgt(ONE_PEER, ATC),
    "detag": _detag(RING, 4, None, "every_step"),
    "detagm": _detag(RING, 3, 0.9, "every_step"),
    "detagm_phase_end": _detag(RING, 3, 0.9, "phase_end"),
    "defacto": _defacto(RING, None),
    "defacto_tree": _defacto(dj.topology.path(8), 2),
    "ef_sgd_block": _feedback(dj.ef_sgd, C.random_block(2), 0.0),
    "ef_sgd_random_k_period": _feedback(dj.ef_sgd, C.random_k(2), 0.0, period=2),
    "ef_sgd_sign": _feedback(dj.ef_sgd, C.sign(), 0.0, momentum=0.0),
    "def_sgd_block": _feedback(dj.def_sgd, C.random_block(3), 0.3),
    "def_sgd_top_k_period": _feedback(dj.def_sgd, C.top_k(ratio=2), 0.5, period=3),
    "step_ahead_whole": _feedback(
        dj.def_sgd, C.top_k(ratio=3, whole_model=True), 1.0, momentum=0.5
    ),
    "def_a_sgd": _feedback(dj.def_a_sgd, C.random_block(2), 0.3),
    "partial_feedback": _algorithm(
        dj.def_sgd,
        lambda g, x, lr, steps: (
            compression.pef_sgd(
                g, x, 8, lr, steps, dense(C.random_block(2)), 0.3, 0.9, 0.9
            ).params
        ),
        local=momentum_sgd(0.9),
        compressor=C.random_block(2),
        detach=0.3,
        feedback=0.9,
    ),
    "sgd_ia": _algorithm(
        dj.sgd_ia,
        lambda g, x, lr, steps: (
            compression.sgd_ia(g, x, 8, lr, steps, 0.25, 0.3, 0.9).params
        ),
        local=momentum_sgd(0.9),
        ratio=4.0,
    ),
    "cser": _cser(C.random_block(2), C.identity(), 2),
    "choco_sgd_top_k": _choco(DIRECTED, C.top_k(ratio=2), 0.5),
    "choco_sgd_quantize": _choco(RING, C.quantize(4), 0.3),
    "powersgd": _algorithm(
        dj.powersgd, _powersgd, local=momentum_sgd(0.5), alone=True, rank=1
    ),
    "local_sgd": _algorithm(
        dj.local_sgd,
        lambda g, x, lr, steps: local_updates.local_sgd(g, x, 8, lr, steps, 4),
        period=4,
    ),
    "slowmo": _slowmo(3, 0.8, 0.4),
    "diloco": _diloco(4, 1),
    "diloco_fragments": _diloco(5, 2),
    "mll_sgd": _mll({"hub": 4, "worker": 2}, dj.topology.path(4), None, 0.7, 2, 3),
    "mll_sgd_uneven": _mll(
        *({"hub": 4, "worker": 2}, dj.topology.ring(4), UNEVEN),
        *([[0.5, 1.0], [0.3, 0.8], [0.9, 0.4], [1.0, 0.6]], 3, 2),
    ),
    "mll_sgd_two_hubs": _mll(
        *({"hub": 2, "worker": 4}, dj.topology.path(2).lazy(0.6)),
        *(UNEVEN.reshape(2, 4), 0.6, 1, 2),
    ),
    "hl_sgd": _hl(None),
    "hl_sgd_uneven": _hl(UNEVEN.reshape(2, 4)),
    "sgp": _sgp(PUSH, None),
    "sgp_one_peer": _sgp(ONE_PEER, 0.5),
    "apam": _apam(SPEEDS, b2=0.99),
    "apam_delayed": _apam(
        dj.traces.uniform_delay(9, 5000, num_workers=8), weight_decay=0.1
    ),
    "qg_dsgdm": _qg(RING, 0.9, None),
    "qg_dsgdm_schedule": _qg(SCHEDULE, 0.6, 0.3),
}

VARIANTS = (
    "def_a_sgd",
    "ef_sgd_random_k_period",
    "def_sgd_top_k_period",
    "step_ahead_whole",
    "partial_feedback",
    "choco_sgd_quantize",
    "diloco_fragments",
    "hl_sgd_uneven",
    "apam_delayed",
    "qg_dsgdm_schedule",
)
ALGORITHMS |= {name: ALGORITHMS[name]._replace(variant=True) for name in VARIANTS}
