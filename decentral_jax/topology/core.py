"""Topologies: mixing matrices and the properties derived from them.

A topology defines which workers exchange values, with which weights, how fast values
spread, and which algorithms may use it. This module uses only NumPy and networkx, and
JAX traces none of it. `decentral_jax._exchange.plans` turns a topology into
collectives.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from decentral_jax._validation import check_interval

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

# Tolerance for sums and comparisons of weights in float64. It accepts matrices that
# were typed by hand or computed in float32; their sums are then corrected to float64
# rounding error.
TOLERANCE = 1e-6

# Maximum number of Sinkhorn scalings of a nearly doubly stochastic matrix.
MAX_SCALINGS = 10_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Topology:
    r"""A static communication graph with its mixing matrix.

    One gossip round replaces each worker's value by
    :math:`x_i \leftarrow \sum_j W_{ij} x_j`.

    Attributes:
      matrix: The mixing matrix `W`, a read-only float64 array of shape `[n, n]`. Row
        `i` holds the weights that worker `i` applies to each worker's value. Row or
        column sums within 1e-6 of one are corrected to one, up to float64 rounding
        error.
      name: Name of the topology in `repr`, tables, and plots.

    Raises:
      TypeError: If the matrix does not hold real numbers.
      ValueError: If the matrix is not square or not finite, or if neither its rows nor
        its columns sum to one.

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
        """Number of workers `n`."""
        return self.matrix.shape[0]

    @functools.cached_property
    def is_symmetric(self) -> bool:
        """Whether `W` equals its transpose."""
        return bool(np.allclose(self.matrix, self.matrix.T, rtol=0, atol=TOLERANCE))

    @functools.cached_property
    def is_row_stochastic(self) -> bool:
        """Whether every row sums to one, so that mixing preserves constants."""
        return bool(np.allclose(self.matrix.sum(1), 1, rtol=0, atol=TOLERANCE))

    @functools.cached_property
    def is_column_stochastic(self) -> bool:
        """Whether every column sums to one, so that mixing preserves the mean."""
        return bool(np.allclose(self.matrix.sum(0), 1, rtol=0, atol=TOLERANCE))

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether all weights are nonnegative and all rows and columns sum to one."""
        nonnegative = bool((self.matrix >= 0).all())
        return nonnegative and self.is_row_stochastic and self.is_column_stochastic

    @property
    def period(self) -> int:
        """Number of rounds after which the weights repeat; 1 for a static topology."""
        return 1

    @property
    def averages_exactly(self) -> bool:
        """Whether one round computes the exact mean, that is, all weights are 1/n."""
        return bool(np.allclose(self.matrix, 1 / self.num_workers, rtol=0, atol=1e-12))

    @functools.cached_property
    def is_connected(self) -> bool:
        """Whether the graph has a directed path between every pair of workers."""
        import networkx as nx

        return nx.is_strongly_connected(self.graph)

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """Eigenvalues of `W` in order of decreasing modulus, shape `[n]`.

        The eigenvalues are real if `W` is symmetric.
        """
        if self.is_symmetric:
            values = np.linalg.eigvalsh(self.matrix)
        else:
            values = np.linalg.eigvals(self.matrix)
        return values[np.argsort(-np.abs(values), kind="stable")]

    @functools.cached_property
    def second_eigenvalue(self) -> float:
        r"""Second largest eigenvalue modulus :math:`\lambda` of `W`.

        Plain gossip contracts the consensus distance by this factor per round.
        """
        if self.num_workers == 1:
            return 0.0
        return float(np.clip(np.abs(self.eigenvalues[1]), 0.0, 1.0))

    @property
    def spectral_gap(self) -> float:
        r"""Spectral gap :math:`1 - \lambda`: 0 without mixing, 1 for exact averages."""
        return 1.0 - self.second_eigenvalue

    @functools.cached_property
    def graph(self) -> "nx.DiGraph":
        """Directed communication graph; edges point from senders to receivers.

        The graph has no self-loops.
        """
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(range(self.num_workers))
        receivers, senders = np.nonzero(self.matrix)
        pairs = zip(senders.tolist(), receivers.tolist(), strict=True)
        graph.add_edges_from((s, r) for s, r in pairs if s != r)
        return graph

    @functools.cached_property
    def max_degree(self) -> int:
        """Maximum number of messages that any worker sends or receives per round."""
        off_diagonal = (self.matrix != 0) & ~np.eye(self.num_workers, dtype=bool)
        return int(max(off_diagonal.sum(0).max(), off_diagonal.sum(1).max()))

    @functools.cached_property
    def diameter(self) -> int:
        """Graph diameter: the longest shortest path between two workers.

        Raises:
          ValueError: If the graph is not connected.
        """
        import networkx as nx

        if not self.is_connected:
            raise ValueError(f"{self.name} is not connected, so it has no diameter.")
        return nx.diameter(self.graph) if self.num_workers > 1 else 0

    def lazy(self, kappa: float) -> "Topology":
        r"""Returns the lazy topology :math:`\kappa W + (1 - \kappa) I`.

        The lazy topology mixes more slowly than the original one.

        Args:
          kappa: Weight of the original mixing matrix, in (0, 1].

        Returns:
          The topology on the same graph with larger weights on the diagonal.

        Raises:
          TypeError: If `kappa` is not a number.
          ValueError: If `kappa` is not in (0, 1].
        """
        check_interval("kappa", kappa, 0.0, 1.0, closed="right")
        matrix = kappa * self.matrix + (1 - kappa) * np.eye(self.num_workers)
        return Topology(matrix, f"{self.name}.lazy({kappa:g})")

    def plot(
        self,
        ax: "Axes | None" = None,
        *,
        positions: Mapping[int, Collection[float]] | None = None,
    ) -> "Axes":
        """Draws the graph. Requires matplotlib.

        Args:
          ax: Matplotlib axes to draw on. If None, creates a new figure.
          positions: Coordinates of each worker, as the layouts of networkx return
            them. If None, places the workers on a circle.

        Returns:
          The axes with the drawing.

        Example:
          >>> import decentral_jax as dj
          >>> rows = {i: divmod(i, 3) for i in range(6)}
          >>> axes = dj.topology.grid(2, 3).plot(positions=rows)
        """
        # Import here, because matplotlib is an optional dependency.
        import matplotlib.pyplot as plt
        import networkx as nx

        if ax is None:
            ax = plt.figure(figsize=(4, 4), layout="constrained").subplots()
        # Without arrowheads if messages go both ways with equal weights.
        graph = self.graph.to_undirected() if self.is_symmetric else self.graph
        nx.draw_networkx(
            graph,
            nx.circular_layout(graph) if positions is None else positions,
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

    Individual rounds may be disconnected, but algorithms require that the union of all
    rounds in a period is connected.

    Attributes:
      topologies: One topology per round.
      name: Name of the schedule in `repr`, tables, and plots.

    Raises:
      TypeError: If any entry is not a `Topology`.
      ValueError: If `topologies` is empty, or its entries have different numbers of
        workers.

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
            raise ValueError("topologies must hold at least one topology, got none.")
        for topology in self.topologies:
            if not isinstance(topology, Topology):
                raise TypeError(
                    f"topologies must hold Topology objects, got {topology!r}."
                )
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
        """Number of rounds after which the schedule repeats."""
        return len(self.topologies)

    @property
    def num_workers(self) -> int:
        """Number of workers `n`."""
        return self.topologies[0].num_workers

    @property
    def max_degree(self) -> int:
        """Maximum number of messages that any worker sends or receives in a round."""
        return max(topology.max_degree for topology in self.topologies)

    @property
    def is_symmetric(self) -> bool:
        """Whether every round's matrix is symmetric."""
        return all(topology.is_symmetric for topology in self.topologies)

    @property
    def is_row_stochastic(self) -> bool:
        """Whether every round's matrix is row-stochastic."""
        return all(topology.is_row_stochastic for topology in self.topologies)

    @property
    def is_column_stochastic(self) -> bool:
        """Whether every round's matrix is column-stochastic."""
        return all(topology.is_column_stochastic for topology in self.topologies)

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether every round's matrix is doubly stochastic."""
        return all(topology.is_doubly_stochastic for topology in self.topologies)

    @functools.cached_property
    def is_connected(self) -> bool:
        """Whether the union of the graphs of all rounds is strongly connected."""
        import networkx as nx

        graphs = [topology.graph for topology in self.topologies]
        return nx.is_strongly_connected(nx.compose_all(graphs))

    @functools.cached_property
    def second_eigenvalue(self) -> float:
        r"""Contraction factor per round, as the geometric mean over one period.

        .. math:: \|W_P \cdots W_1 - 11^T/n\|_2^{1/P}

        The factor is 0 if one period computes the exact average.
        """
        # The first round is the rightmost factor.
        product = np.linalg.multi_dot(
            [np.eye(self.num_workers)] + [t.matrix for t in reversed(self.topologies)]
        )
        error = np.linalg.norm(product - 1 / self.num_workers, 2)
        return 0.0 if error < 1e-12 else float(error ** (1 / self.period))

    @property
    def spectral_gap(self) -> float:
        """Spectral gap per round: one minus `second_eigenvalue`."""
        return 1.0 - self.second_eigenvalue

    def lazy(self, kappa: float) -> "TopologySchedule":
        """Returns the schedule with every round replaced by `topology.lazy(kappa)`.

        Args:
          kappa: Weight of the original mixing matrices, in (0, 1].

        Returns:
          The schedule on the same graphs with larger weights on the diagonals.

        Raises:
          TypeError: If `kappa` is not a number.
          ValueError: If `kappa` is not in (0, 1].
        """
        rounds = tuple(topology.lazy(kappa) for topology in self.topologies)
        return TopologySchedule(rounds, f"{self.name}.lazy({kappa:g})")

    def plot(self, axes: "Sequence[Axes] | None" = None) -> "Sequence[Axes]":
        """Draws all rounds side by side. Requires matplotlib.

        Args:
          axes: Matplotlib axes to draw on, one per round. If None, creates a new
            figure.

        Returns:
          The axes with the drawings, one per round.
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
    topology: object,
    *,
    doubly_stochastic: bool = True,
    symmetric: bool = False,
    static: bool = False,
) -> None:
    """Checks that a topology is connected and has the properties an algorithm needs.

    Args:
      topology: The user's argument, of any type.
      doubly_stochastic: Whether to require a doubly stochastic matrix, which preserves
        the mean and constants.
      symmetric: Whether to require a symmetric matrix.
      static: Whether to refuse a `TopologySchedule`.

    Raises:
      TypeError: If `topology` is not a `Topology` or `TopologySchedule`, or is a
        schedule although `static` is set.
      ValueError: If the topology lacks a required property. The message names the
        property and the remedy.

    Example:
      >>> import decentral_jax as dj
      >>> dj.topology.check_topology(dj.topology.ring(8), symmetric=True)
    """
    if not isinstance(topology, (Topology, TopologySchedule)):
        raise TypeError(
            f"topology must come from dj.topology, got {topology!r}: pass, for "
            "example, dj.topology.ring(8), or dj.topology.from_matrix(W) for a custom "
            "matrix."
        )
    if static and isinstance(topology, TopologySchedule):
        raise TypeError(
            f"topology must be static here, got the schedule {topology!r}: pass one "
            "Topology, such as dj.topology.ring(n)."
        )
    if doubly_stochastic and not topology.is_doubly_stochastic:
        raise ValueError(
            f"topology must be doubly stochastic, got {topology!r}, which has negative "
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
            "receive the values of some others; add edges."
        )


def _as_mixing_matrix(matrix: ArrayLike) -> np.ndarray:
    """Returns a checked, read-only float64 copy of a mixing matrix."""
    try:
        array = np.asarray(matrix)
    except ValueError:
        raise ValueError(
            f"matrix must be square, got rows of different lengths in {matrix!r}: pass "
            "an array of shape [n, n] with one row and one column per worker."
        ) from None
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"matrix must hold real numbers, got dtype {array.dtype}: pass a float "
            "array of shape [n, n]."
        )
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(
            f"matrix must be square, got shape {array.shape}: pass an array of shape "
            "[n, n] with one row and one column per worker."
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        i, j = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(
            f"matrix must be finite, got {array[i, j]} at [{i}, {j}]: pass finite "
            "weights."
        )
    # It suffices that the rows or the columns sum to one: push-sum needs columns only.
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
    """Corrects row and column sums within the tolerance of one to exactly one.

    Exact means up to float64 rounding error. Without the correction, the mean over
    workers would drift by the error of the sums in every round. The correction keeps
    zeros, nonnegative weights, and symmetry.

    Raises:
      ValueError: If the matrix is nearly doubly stochastic, but its sparsity pattern
        admits no exactly doubly stochastic matrix.
    """

    def is_one(sums, tolerance=TOLERANCE):
        return bool((np.abs(sums - 1) <= tolerance).all())

    # Return the matrix unchanged if its sums are already exact.
    rounding = 2.0**-52 * max(4, len(matrix))
    by_rows, by_columns = is_one(matrix.sum(1)), is_one(matrix.sum(0))
    if (not by_rows or is_one(matrix.sum(1), rounding)) and (
        not by_columns or is_one(matrix.sum(0), rounding)
    ):
        return matrix
    if not (by_rows and by_columns):
        # Only rows or only columns must sum to one: divide by their sums. The diagonal
        # cannot absorb the error, because it may be zero.
        return matrix / matrix.sum(1 if by_rows else 0, keepdims=True)
    symmetric = np.allclose(matrix, matrix.T, rtol=0, atol=TOLERANCE)
    if symmetric:
        # Drop entries that are zero on one side of the diagonal only.
        both = (matrix != 0) & (matrix.T != 0)
        matrix = np.where(both, (matrix + matrix.T) / 2, 0)
    # Scale rows and columns in turn (Sinkhorn & Knopp, 1967); scale a symmetric matrix
    # from both sides at once to keep it symmetric.
    for _ in range(MAX_SCALINGS):
        rows, columns = matrix.sum(1), matrix.sum(0)
        if is_one(rows, rounding) and is_one(columns, rounding):
            return matrix
        if symmetric:
            scale = 1 / np.sqrt(rows)
            matrix = matrix * np.multiply.outer(scale, scale)
        else:
            matrix = matrix / rows[:, None]
            matrix = matrix / matrix.sum(0)
    # If scaling converges too slowly, add the remaining error to the diagonal, provided
    # that every changed entry stays positive.
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
