"""What the experiments choose: algorithms, options of the command line, data, model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax

import decentral_jax as dj
from experiments import data, models, wall_clock
from experiments.training import Setting, worker_axes


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
    of every worker: `experiments.apam` compares them by gradients and by the clock.
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


@dataclasses.dataclass
class Network:
    """The machines that a run is imagined on; see `experiments.wall_clock`."""

    step_ms: float = 10.0
    """Milliseconds that a gradient takes a worker."""
    slow: float = 2.0
    """How many times as long the first worker takes."""
    latency_ms: float = 1.0
    """Milliseconds that an exchange takes beside its bytes."""
    bandwidth: float = 10.0
    """Megabytes a second that a worker sends."""

    def seconds(
        self,
        entry: Entry,
        log: Sequence[dj.CommunicationCost],
        num_workers: int,
        iterations: int,
    ) -> np.ndarray:
        """When the last worker has finished each iteration, `[iterations + 1]`."""
        compute = np.full((iterations, num_workers), self.step_ms / 1e3)
        if entry.waits:
            compute[:, 0] *= self.slow
        levels = worker_axes(entry.levels, num_workers)
        link = wall_clock.Link(self.latency_ms / 1e3, 1e6 * self.bandwidth)
        links = dict.fromkeys(levels, link)
        return wall_clock.finish_times(compute, log, levels, links).max(1)


def check_positive(options: Any, *names: str) -> None:
    """Raises ValueError if an option, or one of its values, is not positive."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (not np.size(value) or np.less_equal(value, 0).any()):
            raise ValueError(f"{name} must be positive, got {value}.")


def check_evaluations(options: Any) -> None:
    """Raises ValueError if the evaluations do not divide the iterations."""
    if options.iterations % options.evaluations:
        raise ValueError(
            f"evaluations={options.evaluations} must divide "
            f"iterations={options.iterations}."
        )


@dataclasses.dataclass
class Options:
    """Options that all experiments share."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """Data set; "mnist" and "cifar10" are read from --data-dir."""
    data_dir: Path | None = None
    """Folder with the files of MNIST (idx, .gz or not) or CIFAR-10 (.npz, batches)."""
    examples: int | None = None
    """Use only so many training examples, the first ones; all if not given."""
    model: str = "small_mlp"
    """Model: small_mlp, mlp, logistic, small_cnn, emnist_cnn, resnet20."""
    workers: int = 8
    """Number of workers, on a ring."""
    batch_size: int = 1
    """Examples a worker and iteration."""
    iterations: int = 4000
    """Gradients a worker."""
    evaluations: int = 10
    """Points on each curve; divides the iterations."""
    rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    """Learning rates to tune over; each algorithm is shown at its best."""
    seeds: int = 5
    """Number of seeds: initial model and order of the data."""
    out: Path = Path("results")
    """Folder for the figures (.png) and the numbers (.csv)."""
    resume: bool = False
    """Go on after what an interrupted run with these options has finished; it is kept
    in the folder "finished" beside the figures."""

    def setting(self, shuffled: float) -> Setting:
        """Loads the data and deals them to the workers.

        Args:
          shuffled: Percentage of the label-sorted examples that is shuffled.

        Returns:
          The setting of a training run.

        Raises:
          ValueError: If an option is out of range or a file is broken.
          FileNotFoundError: If a folder or file is missing.
        """
        self._check()
        dataset = data.load(self.dataset, self.data_dir)
        if self.examples is not None:
            dataset = dataset._replace(
                x_train=dataset.x_train[: self.examples],
                y_train=dataset.y_train[: self.examples],
            )
        return Setting(
            dataset=dataset,
            parts=data.partition(dataset.y_train, self.workers, shuffled),
            model=models.get_model(self.model, dataset.num_classes),
            batch_size=self.batch_size,
            iterations=self.iterations,
            evaluations=self.evaluations,
            rates=tuple(self.rates),
            seeds=tuple(range(self.seeds)),
        )

    def _check(self) -> None:
        for name in ("workers", "batch_size", "iterations", "evaluations", "seeds"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        check_evaluations(self)
        check_positive(self, "rates")
