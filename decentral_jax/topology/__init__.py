"""Communication topologies: graphs, mixing matrices, and their spectral properties."""

from decentral_jax.topology.core import (
    AnyTopology,
    Topology,
    TopologySchedule,
    check_topology,
)
from decentral_jax.topology.factors import exact_factors
from decentral_jax.topology.graphs import (
    complete,
    erdos_renyi,
    exponential,
    from_graph,
    from_matrix,
    grid,
    hypercube,
    path,
    reweighted,
    ring,
    star,
    torus,
)
from decentral_jax.topology.time_varying import (
    base_graph,
    one_peer_exponential,
    one_peer_ring,
    schedule,
)

__all__ = [
    "AnyTopology",
    "Topology",
    "TopologySchedule",
    "base_graph",
    "check_topology",
    "complete",
    "erdos_renyi",
    "exact_factors",
    "exponential",
    "from_graph",
    "from_matrix",
    "grid",
    "hypercube",
    "one_peer_exponential",
    "one_peer_ring",
    "path",
    "reweighted",
    "ring",
    "schedule",
    "star",
    "torus",
]
