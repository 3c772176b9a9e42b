"""Algorithms by the names their papers gave them: short chains, no mathematics.

The first argument is always the optimizer that each worker runs: a learning rate or
schedule for plain SGD, or any optax optimizer. The equations are documented at the
transformations that are chained.
"""

from decentral_jax.algorithms.asynchronous import apam
from decentral_jax.algorithms.compressed import (
    choco_sgd,
    cser,
    def_a_sgd,
    def_sgd,
    ef_sgd,
    powersgd,
    sgd_ia,
)
from decentral_jax.algorithms.decentralized import (
    all_reduce_sgd,
    d2,
    d_psgd,
    defacto,
    detag,
    dsgt,
)
from decentral_jax.algorithms.local_updates import (
    diloco,
    hl_sgd,
    local_sgd,
    mll_sgd,
    qg_dsgdm,
    sgp,
    slowmo,
)

__all__ = [
    "all_reduce_sgd",
    "apam",
    "choco_sgd",
    "cser",
    "d2",
    "d_psgd",
    "def_a_sgd",
    "def_sgd",
    "defacto",
    "detag",
    "diloco",
    "dsgt",
    "ef_sgd",
    "hl_sgd",
    "local_sgd",
    "mll_sgd",
    "powersgd",
    "qg_dsgdm",
    "sgd_ia",
    "sgp",
    "slowmo",
]
