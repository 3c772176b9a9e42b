"""The algorithms that the experiments compare, by their names in tables and figures."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

import decentral_jax as dj


class Entry(NamedTuple):
    """An algorithm with the settings that an experiment uses."""

    make: Callable[[Any], optax.GradientTransformation]  # from a learning rate
    levels: Mapping[str, int] | None = None  # worker axes, if there are several
    waits: bool = True  # whether it waits for slow workers; otherwise they skip steps


def phase_length(topology: dj.topology.Topology) -> int:
    r"""DeTAG's rounds per phase, :math:`\lceil \log(n) / (4\sqrt{1-\lambda}) \rceil`.

    The paper's choice grows like twice this number. In tuning runs on digits, half of
    the paper's choice and less performed better: a longer phase improves consensus, but
    leaves fewer optimizer steps.
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


# Number of steps between two resets of CSER.
RESET_PERIOD = 8


def compressed(
    ratio: float, detach: float = 0.3, momentum: float | None = None
) -> dict[str, Entry]:
    """The algorithms that send one entry in `ratio`, and SGD-IA, which sends all.

    CSER sends as much as the others: half in its steps, and half in its resets.
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


# Number of steps between two averages in Local SGD and related algorithms.
PERIOD = 8


def local_updates(
    topology: dj.topology.Topology, slow: float = 1.0
) -> dict[str, Entry]:
    """The algorithms that average periodically, and those with modified momentum.

    Hubs are pairs of workers on a ring. In MLL-SGD, the first worker takes a step in
    only one of `slow` iterations, so that it keeps up with the other workers.
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
    """All synchronous algorithms of the library, starting with the centralized one.

    Asynchronous algorithms apply the gradient of a single worker per iteration, whereas
    synchronous algorithms apply one gradient of every worker. `experiments.runs.apam`
    compares the two kinds by gradients and by wall-clock time.
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
