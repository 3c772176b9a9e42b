"""Decentralized and communication-efficient optimization for JAX.

Write the training step for one worker, name the axis, run it under any map.
"""

import importlib
import importlib.metadata
from typing import Any

from decentral_jax import algorithms, compression, topology, traces, transforms
from decentral_jax.algorithms import *
from decentral_jax.communication import (
    Collective,
    CommunicationCost,
    communication_cost,
)
from decentral_jax.evaluation import consensus_distance, eval_params
from decentral_jax.faults import (
    ZeroNonfiniteState,
    sample_active,
    zero_nonfinite_updates,
)
from decentral_jax.mixing import (
    accelerated_mix,
    average,
    average_by_factors,
    average_every,
    mix,
    worker_index,
)
from decentral_jax.processes import initialize
from decentral_jax.traffic import CommunicationCosts, communication_costs
from decentral_jax.transforms import *
from decentral_jax.workers import Workers

__version__ = importlib.metadata.version("decentral_jax")

__all__ = [
    "Collective",
    "CommunicationCost",
    "CommunicationCosts",
    "Workers",
    "ZeroNonfiniteState",
    "accelerated_mix",
    "algorithms",
    "average",
    "average_by_factors",
    "average_every",
    "communication_cost",
    "communication_costs",
    "compression",
    "consensus_distance",
    "eval_params",
    "initialize",
    "mix",
    "sample_active",
    "topology",
    "traces",
    "transforms",
    "worker_index",
    "zero_nonfinite_updates",
]
__all__ += algorithms.__all__
__all__ += transforms.__all__


def __getattr__(name: str) -> Any:
    """Imports modules that many programs do not need at their first use."""
    if name in ("checkpoints", "data", "engine", "metrics"):
        return importlib.import_module(f"decentral_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
