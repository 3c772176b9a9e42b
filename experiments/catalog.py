"""The algorithms that experiments compare, by their names in tables and figures."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

import decentral_jax as dj


class Entry(NamedTuple):
    """An algorithm as an experiment runs it."""

    make: Callable[[Any], optax.GradientTransformation]  # from a learning rate
    levels: Mapping[str, int] | None = None  # worker axes, if they are several
    waits: bool = True  # for slow workers; else they skip iterations


def phase_length(topology: dj.topology.Topology) -> int:
    r"""DeTAG's rounds a phase, :math:`\lceil \log(n) / (4\sqrt{1-\lambda}) \rceil`.

    The paper's choice grows like twice that; tuned on digits, half of it and less were
    better: what a phase gains in consensus, it loses in steps.
    """
    rounds = math.log(topology.num_workers) / (4 * math.sqrt(topology.spectral_gap))
    return max(1, math.ceil(rounds))


def decentralized(topology: dj.topology.Topology, rounds: int) -> dict[str, Entry]:
    """The algorithms of the DeTAG paper on one topology."""
    return {
        "D-PSGD": Entry(lambda rate: dj.d_psgd(rate, topology)),
        "D2": Entry(lambda rate: dj.d2(rate, topology)),
        "DSGT": Entry(lambda rate: dj.dsgt(rate, topology)),
        "DeTAG": Entry(lambda rate: dj.detag(rate, topology, rounds=rounds)),
    }


# CSER's steps from one reset to the next.
RESET_PERIOD = 8


def compressed(
    ratio: float, detach: float = 0.3, momentum: float | None = None
) -> dict[str, Entry]:
    """The algorithms that send one entry in `ratio`, and SGD-IA, which sends all.

    CSER sends as much as the others: half of it in its steps, half in its resets.
    """
    block = dj.compression.random_block
    return {
        "EF-SGD": Entry(
            lambda rate: dj.ef_sgd(optax.sgd(rate, momentum=momentum), block(ratio))
        ),
        "DEF": Entry(
            lambda rate: dj.def_sgd(
                optax.sgd(rate, momentum=momentum), block(ratio), detach=detach
            )
        ),
        "DEF-A": Entry(
            lambda rate: dj.def_a_sgd(
                optax.sgd(rate, momentum=momentum), block(ratio), detach=detach
            )
        ),
        "SGD-IA": Entry(
            lambda rate: dj.sgd_ia(
                optax.sgd(rate, momentum=momentum), ratio=ratio, detach=detach
            )
        ),
        "CSER": Entry(
            lambda rate: dj.cser(
                optax.sgd(rate, momentum=momentum),
                block(2 * ratio),
                reset_compressor=block(max(1.0, 2 * ratio / RESET_PERIOD)),
                period=RESET_PERIOD,
            ),
        ),
    }


# Local SGD's steps from one average to the next, and those of its relatives.
PERIOD = 8


def local_updates(
    topology: dj.topology.Topology, slow: float = 1.0
) -> dict[str, Entry]:
    """The algorithms that average now and then, and those with other momentum.

    Hubs are pairs of workers on a ring; in MLL-SGD the first worker takes a step in one
    of `slow` iterations only, which is how it keeps up with the others.
    """
    n = topology.num_workers
    hubs = {"hub": n // 2, "worker": 2} if n % 2 == 0 else {"hub": n, "worker": 1}
    tau, q = PERIOD // 2, 2
    rates = np.ones(tuple(hubs.values()))
    rates[0, 0] = 1 / slow
    ring = dj.topology.ring(hubs["hub"])
    one_peer = dj.topology.one_peer_exponential(n)

    def slowmo(rate):
        return dj.slowmo(rate, period=PERIOD)

    def diloco(rate):
        return dj.diloco(optax.sgd(rate), period=PERIOD)

    return {
        "Local SGD": Entry(lambda rate: dj.local_sgd(rate, period=PERIOD)),
        "SlowMo": Entry(slowmo),
        "DiLoCo": Entry(diloco),
        "HL-SGD": Entry(lambda rate: dj.hl_sgd(rate, hubs["hub"], tau=tau, q=q), hubs),
        "MLL-SGD": Entry(
            lambda rate: dj.mll_sgd(rate, ring, tau=tau, q=q, rates=rates),
            hubs,
            waits=False,
        ),
        "SGP one-peer": Entry(lambda rate: dj.sgp(rate, one_peer)),
        "QG-DSGDm": Entry(lambda rate: dj.qg_dsgdm(rate, topology)),
    }


def everything(
    topology: dj.topology.Topology, rounds: int, slow: float = 1.0
) -> dict[str, Entry]:
    """All synchronous algorithms of the library, the centralized one first.

    Asynchronous ones apply one worker's gradient per iteration, where these apply one
    of every worker: `experiments.runs.apam` compares them by gradients
    and by the clock.
    """
    n = topology.num_workers
    one_peer = dj.topology.one_peer_exponential(n)
    return {
        "all-reduce SGD": Entry(dj.all_reduce_sgd),
        **decentralized(topology, rounds),
        "DeFacto": Entry(lambda rate: dj.defacto(rate, topology)),
        "D-PSGD one-peer": Entry(lambda rate: dj.d_psgd(rate, one_peer)),
        **compressed(ratio=16),
        "PowerSGD": Entry(lambda rate: dj.powersgd(rate, rank=1)),
        "CHOCO-SGD": Entry(
            lambda rate: dj.choco_sgd(
                rate, topology, dj.compression.sign(), consensus_rate=1.0
            )
        ),
        **local_updates(topology, slow),
    }
