"""What a topology is: a mixing matrix and the facts that follow from it.

NumPy and networkx only; nothing here is traced. A topology answers who talks to whom
with which weight, how fast values spread, and what it may be used for. How its
exchange becomes collectives is the business of `decentral_jax.plans`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx
import numpy as np

from decentral_jax.validation import check_interval

# Weights are compared in float64; matrices typed by hand or computed in float32 pass.
# Their sums are then corrected to float64 rounding.
TOLERANCE = 1e-6

# Scalings of a nearly doubly stochastic matrix before it is refused.
SCALINGS = 10_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Topology:
    r"""A static communication graph with its mixing matrix.

    One gossip round replaces each worker's value by
    :math:`x_i \leftarrow \sum_j W_{ij} x_j`.

    Attributes:
      matrix: The mixing matrix `W`, float64 of shape `[n, n]`, read-only. Row `i` holds
        what worker `i` gives to each worker's value. Sums of rows or columns that are
        one within 1e-6 are corrected to one in float64 rounding.
      name: What `repr`, tables and plots call it.

    Raises:
      TypeError: If the matrix does not hold real numbers.
      ValueError: If the matrix is not square, has an entry that is not finite, or has
        neither rows nor columns that sum to one.

    Example:
      >>> import decentral_jax as dj
      >>> ring = dj.topology.ring(8)
      >>> ring.max_degree, ring.diameter, round(ring.spectral_gap, 4)
      (2, 4, 0.1953)
    """

    matrix: np.ndarray
    name: str = "topology"

    def __post_init__(self):
        object.__setattr__(self, "matrix", _as_mixing_matrix(self.matrix))

    def __repr__(self) -> str:
        return (
            f"Topology({self.name}: {self.num_workers} workers, "
            f"degree {self.max_degree}, spectral gap {self.spectral_gap:.3g})"
        )

    @property
    def num_workers(self) -> int:
        """The number of workers `n`."""
        return self.matrix.shape[0]

    @functools.cached_property
    def is_symmetric(self) -> bool:
        """Whether `W` equals its transpose."""
        return bool(np.allclose(self.matrix, self.matrix.T, rtol=0, atol=TOLERANCE))

    @functools.cached_property
    def is_row_stochastic(self) -> bool:
        """Whether rows sum to one: a constant stays what it is."""
        return bool(np.allclose(self.matrix.sum(1), 1, rtol=0, atol=TOLERANCE))

    @functools.cached_property
    def is_column_stochastic(self) -> bool:
        """Whether columns sum to one: the mean over workers is preserved."""
        return bool(np.allclose(self.matrix.sum(0), 1, rtol=0, atol=TOLERANCE))

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether weights are not negative and rows and columns sum to one."""
        nonnegative = bool((self.matrix >= 0).all())
        return nonnegative and self.is_row_stochastic and self.is_column_stochastic

    @property
    def period(self) -> int:
        """The number of rounds after which the weights repeat: one, as they stay."""
        return 1

    @property
    def averages_exactly(self) -> bool:
        """Whether one round gives everyone the mean: all weights are equal."""
        return bool(np.allclose(self.matrix, 1 / self.num_workers, rtol=0, atol=1e-12))

    @functools.cached_property
    def is_connected(self) -> bool:
        """Whether every worker's value reaches every other one in the end."""
        return nx.is_strongly_connected(self.graph)

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """Eigenvalues of `W`, shape `[n]`, by falling modulus (real if symmetric)."""
        if self.is_symmetric:
            values = np.linalg.eigvalsh(self.matrix)
        else:
            values = np.linalg.eigvals(self.matrix)
        return values[np.argsort(-np.abs(values), kind="stable")]

    @functools.cached_property
    def second_eigenvalue(self) -> float:
        r"""Second largest modulus :math:`\lambda` of an eigenvalue of `W`.

        Plain gossip contracts the distance to consensus by this factor a round.
        """
        if self.num_workers == 1:
            return 0.0
        return float(np.clip(np.abs(self.eigenvalues[1]), 0.0, 1.0))

    @property
    def spectral_gap(self) -> float:
        r""":math:`1 - \lambda`: between 0 (nothing spreads) and 1 (exact average)."""
        return 1.0 - self.second_eigenvalue

    @functools.cached_property
    def graph(self) -> nx.DiGraph:
        """The directed graph of who sends to whom, self-loops left out."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(self.num_workers))
        receivers, senders = np.nonzero(self.matrix)
        pairs = zip(senders.tolist(), receivers.tolist(), strict=True)
        graph.add_edges_from((s, r) for s, r in pairs if s != r)
        return graph

    @functools.cached_property
    def max_degree(self) -> int:
        """The most messages any worker sends or receives in a round."""
        off_diagonal = (self.matrix != 0) & ~np.eye(self.num_workers, dtype=bool)
        return int(max(off_diagonal.sum(0).max(), off_diagonal.sum(1).max()))

    @functools.cached_property
    def diameter(self) -> int:
        """The most hops between two workers.

        Raises:
          ValueError: If the graph is not connected.
        """
        if not self.is_connected:
            raise ValueError(f"{self.name} is not connected, so it has no diameter.")
        return nx.diameter(self.graph) if self.num_workers > 1 else 0

    def lazy(self, kappa: float) -> "Topology":
        r"""The sparser, slower mixing :math:`\kappa W + (1 - \kappa) I`.

        Args:
          kappa: Share of the original mixing, in (0, 1].

        Returns:
          The topology on the same graph with more weight on oneself.
        """
        check_interval("kappa", kappa, 0.0, 1.0, closed="right")
        matrix = kappa * self.matrix + (1 - kappa) * np.eye(self.num_workers)
        return Topology(matrix, f"{self.name}.lazy({kappa:g})")

    def plot(self, ax: Any = None) -> Any:
        """Draws the graph with workers on a circle; needs matplotlib.

        Args:
          ax: The matplotlib axes to draw on; a new figure if None.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.figure(figsize=(4, 4), layout="constrained").subplots()
        graph = self.graph.to_undirected() if self.is_symmetric else self.graph
        nx.draw_networkx(
            graph,
            nx.circular_layout(graph),
            ax=ax,
            node_color="#dce9f7",
            edgecolors="#1f4e79",
            edge_color="#7f8c9a",
            font_size=8,
        )
        gap = f"gap {self.spectral_gap:.3g}"
        ax.set_title(f"{self.name}\ndegree {self.max_degree}, {gap}", fontsize=9)
        ax.set_axis_off()
        return ax


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TopologySchedule:
    """A time-varying topology: round `t` uses `topologies[t % period]`.

    Single rounds need not be connected; all rounds of a period together must be.

    Attributes:
      topologies: One topology a round.
      name: What `repr`, tables and plots call it.

    Raises:
      TypeError: If an entry is not a `Topology`.
      ValueError: If there is no round, or rounds differ in their number of workers.

    Example:
      >>> import decentral_jax as dj
      >>> schedule = dj.topology.one_peer_exponential(8)
      >>> schedule.period, schedule.max_degree, round(schedule.spectral_gap, 6)
      (3, 1, 1.0)
    """

    topologies: tuple[Topology, ...]
    name: str = "schedule"

    def __post_init__(self):
        object.__setattr__(self, "topologies", tuple(self.topologies))
        if not self.topologies:
            raise ValueError("topologies must name at least one round, got none.")
        for topology in self.topologies:
            if not isinstance(topology, Topology):
                raise TypeError(f"topologies must hold Topology, got {topology!r}.")
        sizes = {topology.num_workers for topology in self.topologies}
        if len(sizes) > 1:
            raise ValueError(
                "topologies must all have the same number of workers, got "
                f"{sorted(sizes)}."
            )

    def __repr__(self) -> str:
        return (
            f"TopologySchedule({self.name}: {self.num_workers} workers, period "
            f"{self.period}, degree {self.max_degree})"
        )

    def __len__(self) -> int:
        return len(self.topologies)

    def __iter__(self) -> Iterator[Topology]:
        return iter(self.topologies)

    def __getitem__(self, step: int) -> Topology:
        return self.topologies[step % self.period]

    @property
    def period(self) -> int:
        """The number of rounds after which the schedule repeats."""
        return len(self.topologies)

    @property
    def num_workers(self) -> int:
        """The number of workers `n`."""
        return self.topologies[0].num_workers

    @property
    def max_degree(self) -> int:
        """The most messages any worker sends or receives in any round."""
        return max(topology.max_degree for topology in self.topologies)

    @property
    def is_symmetric(self) -> bool:
        """Whether every round's matrix is symmetric."""
        return all(topology.is_symmetric for topology in self.topologies)

    @property
    def is_row_stochastic(self) -> bool:
        """Whether every round's rows sum to one."""
        return all(topology.is_row_stochastic for topology in self.topologies)

    @property
    def is_column_stochastic(self) -> bool:
        """Whether every round's columns sum to one."""
        return all(topology.is_column_stochastic for topology in self.topologies)

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether every round's matrix is doubly stochastic."""
        return all(topology.is_doubly_stochastic for topology in self.topologies)

    @functools.cached_property
    def is_connected(self) -> bool:
        """Whether the graph of all rounds together is connected."""
        graphs = [topology.graph for topology in self.topologies]
        return nx.is_strongly_connected(nx.compose_all(graphs))

    @functools.cached_property
    def second_eigenvalue(self) -> float:
        r"""Contraction a round, as the geometric mean over one period.

        :math:`\|W_P \cdots W_1 - 11^T/n\|_2^{1/P}`; 0 if a period averages exactly.
        """
        product = np.linalg.multi_dot(
            [np.eye(self.num_workers)] + [t.matrix for t in reversed(self.topologies)]
        )
        error = np.linalg.norm(product - 1 / self.num_workers, 2)
        return 0.0 if error < 1e-12 else float(error ** (1 / self.period))

    @property
    def spectral_gap(self) -> float:
        """One minus `second_eigenvalue`."""
        return 1.0 - self.second_eigenvalue

    def lazy(self, kappa: float) -> "TopologySchedule":
        """The schedule of `topology.lazy(kappa)`."""
        rounds = tuple(topology.lazy(kappa) for topology in self.topologies)
        return TopologySchedule(rounds, f"{self.name}.lazy({kappa:g})")

    def plot(self, axes: Sequence[Any] | None = None) -> Sequence[Any]:
        """Draws every round beside the others; needs matplotlib.

        Args:
          axes: One matplotlib axes a round; a new figure if None.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            figure = plt.figure(figsize=(3 * self.period, 3), layout="constrained")
            axes = list(figure.subplots(1, self.period, squeeze=False)[0])
        pairs = zip(self.topologies, axes, strict=True)
        return [topology.plot(ax) for topology, ax in pairs]


#: A static topology or a schedule.
AnyTopology = Topology | TopologySchedule


def check_topology(
    topology: Any,
    *,
    doubly_stochastic: bool = True,
    symmetric: bool = False,
    static: bool = False,
) -> None:
    """Checks that a topology is one, connected, and has what an algorithm needs.

    Args:
      topology: What the user passed.
      doubly_stochastic: Whether mixing must preserve the mean and constants.
      symmetric: Whether the analysis needs symmetric weights.
      static: Whether the topology must not vary in time.

    Raises:
      TypeError: If it is no topology, or a schedule where a static one is needed.
      ValueError: If it lacks a property, with the remedy.
    """
    if not isinstance(topology, (Topology, TopologySchedule)):
        raise TypeError(
            f"topology must come from dj.topology, got {topology!r}: for example "
            "dj.topology.ring(8), or dj.topology.from_matrix(W) for your own matrix."
        )
    if static and isinstance(topology, TopologySchedule):
        raise TypeError(
            f"topology must be static here, got the schedule {topology!r}: pass one "
            "Topology, such as dj.topology.ring(n)."
        )
    if doubly_stochastic and not topology.is_doubly_stochastic:
        raise ValueError(
            f"topology must be doubly stochastic, got {topology!r} that has negative "
            "weights, or rows or columns that do not sum to one: use "
            "Metropolis-Hastings weights (dj.topology.from_graph)."
        )
    if symmetric and not topology.is_symmetric:
        raise ValueError(
            f"topology must be symmetric, got {topology!r}: use an undirected graph "
            "with Metropolis-Hastings weights, such as dj.topology.ring(n)."
        )
    if not topology.is_connected:
        raise ValueError(
            f"topology must be connected, got {topology!r}: some workers would never "
            "hear of some others; add edges."
        )


def _as_mixing_matrix(matrix: Any) -> np.ndarray:
    """Returns a checked, read-only float64 copy of a mixing matrix."""
    try:
        array = np.asarray(matrix)
    except ValueError:
        raise ValueError(
            f"matrix must be square, got rows of different lengths in {matrix!r}: pass "
            "an array of shape [n, n] with one row and one column a worker."
        ) from None
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"matrix must hold real numbers, got dtype {array.dtype}: pass a float "
            "array of shape [n, n]."
        )
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(
            f"matrix must be square, got shape {array.shape}: pass an array of shape "
            "[n, n] with one row and one column a worker."
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        i, j = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(
            f"matrix must be finite, got {array[i, j]} at [{i}, {j}]: pass finite "
            "weights."
        )
    rows, columns = array.sum(1), array.sum(0)
    if np.abs(rows - 1).max() > TOLERANCE < np.abs(columns - 1).max():
        raise ValueError(
            "matrix must be stochastic: rows or columns must sum to 1, got row sums "
            f"from {rows.min():.6g} to {rows.max():.6g}: divide each row by its sum."
        )
    array = _normalized(array)
    array.setflags(write=False)
    return array


def _normalized(matrix: np.ndarray) -> np.ndarray:
    """Corrects sums that are one within the tolerance to one in float64 rounding.

    Else the mean over workers would grow or shrink by their error in every round. Zeros
    stay zero, weights stay nonnegative, and a symmetric matrix stays symmetric.
    """

    def is_one(sums, tolerance=TOLERANCE):
        return bool((np.abs(sums - 1) <= tolerance).all())

    rounding = 2.0**-52 * max(4, len(matrix))
    by_rows, by_columns = is_one(matrix.sum(1)), is_one(matrix.sum(0))
    if (not by_rows or is_one(matrix.sum(1), rounding)) and (
        not by_columns or is_one(matrix.sum(0), rounding)
    ):
        return matrix
    if not (by_rows and by_columns):
        # The diagonal takes no correction here: it may be zero.
        return matrix / matrix.sum(1 if by_rows else 0, keepdims=True)
    symmetric = np.allclose(matrix, matrix.T, rtol=0, atol=TOLERANCE)
    if symmetric:
        # Entries that are zero on one side only are zero.
        both = (matrix != 0) & (matrix.T != 0)
        matrix = np.where(both, (matrix + matrix.T) / 2, 0)
    # Scale rows and columns (Sinkhorn & Knopp, 1967), or both at once to keep symmetry.
    for _ in range(SCALINGS):
        rows, columns = matrix.sum(1), matrix.sum(0)
        if is_one(rows, rounding) and is_one(columns, rounding):
            return matrix
        if symmetric:
            scale = 1 / np.sqrt(rows)
            matrix = matrix * np.multiply.outer(scale, scale)
        else:
            matrix = matrix / rows[:, None]
            matrix = matrix / matrix.sum(0)
    # Where scaling is slow, the diagonal takes the rest if it can.
    rest = 1 - matrix.sum(1)
    diagonal = np.diag(matrix) + rest
    if symmetric and ((diagonal > 0) | (rest == 0)).all():
        matrix = matrix + np.diag(rest)
        if is_one(matrix.sum(1), rounding):
            return matrix
    raise ValueError(
        "matrix must be stochastic, but its rows and columns sum to 1 only within "
        f"{TOLERANCE:g} and no weights on its edges make them sum to 1: pass weights "
        "that are doubly stochastic in float64."
    )
