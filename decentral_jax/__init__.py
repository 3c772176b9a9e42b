"""Decentralized and communication-efficient optimization for JAX.

Write the training step for one worker, name the axis, run it under any map.
"""

from decentral_jax import compression, topology, traces
from decentral_jax.algorithms import (
    all_reduce_sgd,
    apam,
    choco_sgd,
    cser,
    d2,
    d_psgd,
    def_a_sgd,
    def_sgd,
    defacto,
    detag,
    diloco,
    dsgt,
    ef_sgd,
    hl_sgd,
    local_sgd,
    mll_sgd,
    powersgd,
    qg_dsgdm,
    sgd_ia,
    sgp,
    slowmo,
)
from decentral_jax.communication import (
    Collective,
    CommunicationCost,
    communication_cost,
)
from decentral_jax.evaluation import consensus_distance, eval_params
from decentral_jax.faults import guard_gradients, takes_part
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
from decentral_jax.transforms.amsgrad import amsgrad, project
from decentral_jax.transforms.asynchronous import (
    asynchronous,
    delay_gradients,
    scale_by_staleness,
)
from decentral_jax.transforms.averaging import average_gradients, average_parameters
from decentral_jax.transforms.compressed_gossip import compressed_gossip
from decentral_jax.transforms.error_feedback import error_feedback
from decentral_jax.transforms.error_reset import error_reset
from decentral_jax.transforms.gossip import exact_diffusion, gossip
from decentral_jax.transforms.grab import d_grab, grab, independent_grab, pair_balance
from decentral_jax.transforms.iterate_averaging import iterate_averaging
from decentral_jax.transforms.multi_level import multi_level
from decentral_jax.transforms.operating import operating_rates
from decentral_jax.transforms.ordering import next_examples, random_reshuffling
from decentral_jax.transforms.push_sum import push_sum
from decentral_jax.transforms.quasi_global import quasi_global_momentum
from decentral_jax.transforms.tracking import (
    accelerated_tracking,
    exact_phases,
    track_gradients,
)
from decentral_jax.workers import Workers

__version__ = "0.1.0"

__all__ = [
    "Collective",
    "CommunicationCost",
    "CommunicationCosts",
    "Workers",
    "accelerated_mix",
    "accelerated_tracking",
    "all_reduce_sgd",
    "amsgrad",
    "apam",
    "asynchronous",
    "average",
    "average_by_factors",
    "average_every",
    "average_gradients",
    "average_parameters",
    "choco_sgd",
    "communication_cost",
    "communication_costs",
    "compressed_gossip",
    "compression",
    "consensus_distance",
    "cser",
    "d2",
    "d_grab",
    "d_psgd",
    "def_a_sgd",
    "def_sgd",
    "defacto",
    "delay_gradients",
    "detag",
    "diloco",
    "dsgt",
    "ef_sgd",
    "error_feedback",
    "error_reset",
    "eval_params",
    "exact_diffusion",
    "exact_phases",
    "gossip",
    "grab",
    "guard_gradients",
    "hl_sgd",
    "independent_grab",
    "initialize",
    "iterate_averaging",
    "local_sgd",
    "mix",
    "mll_sgd",
    "multi_level",
    "next_examples",
    "operating_rates",
    "pair_balance",
    "powersgd",
    "project",
    "push_sum",
    "qg_dsgdm",
    "quasi_global_momentum",
    "random_reshuffling",
    "scale_by_staleness",
    "sgd_ia",
    "sgp",
    "slowmo",
    "takes_part",
    "topology",
    "traces",
    "track_gradients",
    "worker_index",
]
