"""Computes the pages' pictures and tables from the library.

A build writes the tables. `python docs/generate.py` draws the pictures.
"""

import inspect
import math
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np

import decentral_jax as dj
from decentral_jax._exchange.gossip import accelerated_round, momentum
from decentral_jax._exchange.plans import make_plan

BLUE, ORANGE, GREEN, RED, GREY = "#1f4e79", "#d9822b", "#3a7d44", "#b03a48", "#7f8c9a"
LIGHT = "#dce9f7"

# Name in the pages -> topology.
STATIC = {
    "path(16)": dj.topology.path(16),
    "ring(16)": dj.topology.ring(16),
    "grid(4, 4)": dj.topology.grid(4, 4),
    "torus(4, 4)": dj.topology.torus(4, 4),
    "hypercube(4)": dj.topology.hypercube(4),
    "exponential(16)": dj.topology.exponential(16),
    "erdos_renyi(16, 0.3, 6)": dj.topology.erdos_renyi(16, 0.3, 6),
    "star(16)": dj.topology.star(16),
    "complete(16)": dj.topology.complete(16),
}
SCHEDULES = {
    "one_peer_ring(16)": dj.topology.one_peer_ring(16),
    "one_peer_exponential(16)": dj.topology.one_peer_exponential(16),
    "base_graph(16, 1)": dj.topology.base_graph(16, 1),
    "base_graph(12, 1)": dj.topology.base_graph(12, 1),
    "base_graph(12, 2)": dj.topology.base_graph(12, 2),
}
DRAWN_SCHEDULES = {
    "one_peer_exponential": dj.topology.one_peer_exponential(8),
    "base_graph": dj.topology.base_graph(6, 1),
}


def write_tables(folder: Path) -> None:
    """Writes the tables and the API pages, which every build needs, into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "topologies.md").write_text(topology_table())
    (folder / "algorithms.md").write_text(algorithm_table())
    packages = dj.algorithms, dj.compression, dj.topology, dj.transforms
    for package in (*packages, dj.data, dj.metrics):
        name = package.__name__.rpartition(".")[2]
        (folder / f"api_{name}.md").write_text(api_page(package))


def draw_all(folder: Path) -> None:
    """Draws the pictures of the pages into `folder`.

    They are part of the repository, so that code hosts show them, too.
    """
    folder.mkdir(exist_ok=True)
    settings = {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "svg.hashsalt": "decentral_jax",
    }
    with matplotlib.rc_context(settings):
        for name, topology in STATIC.items():
            figure, ax = plt.subplots(figsize=(2.8, 3))
            topology.plot(ax, positions=positions(name, topology))
            ax.margins(0.1)
            _save(figure, folder / f"{name.partition('(')[0]}.svg")
        for name, schedule in DRAWN_SCHEDULES.items():
            _save(schedule.plot()[0].figure, folder / f"{name}.svg")
        _save(draw_sent_to_agree(), folder / "sent_to_agree.svg")
        _save(draw_rounds(), folder / "rounds.svg")
        _save(draw_folding(), folder / "folding.svg")
        _save(draw_contraction(), folder / "contraction.svg")


def positions(
    name: str, topology: dj.topology.Topology
) -> dict[int, tuple[float, float]] | None:
    """Coordinates that show a graph of 16 workers as what it is; None for a circle."""
    kind = name.partition("(")[0]
    workers = range(topology.num_workers)
    if kind == "path":  # to and fro in four rows
        return {
            i: (i % 4 if i // 4 % 2 == 0 else 3 - i % 4, -(i // 4)) for i in workers
        }
    if kind == "grid":
        return {i: (i % 4, -(i // 4)) for i in workers}
    if kind == "torus":  # rows and columns are arcs, whose chords close the rings
        bend = [0.0, 0.35, 0.35, 0.0]
        return {i: (i % 4 + bend[i // 4], bend[i % 4] - i // 4) for i in workers}
    if kind == "hypercube":  # each bit of a worker's number moves in a direction
        ways = np.exp(1j * np.pi * (np.arange(4) / 4 + 1 / 8))
        places = {i: sum(ways[b] for b in range(4) if i >> b & 1) for i in workers}
        return {i: (complex(z).real, complex(z).imag) for i, z in places.items()}
    if kind == "star":
        return nx.shell_layout(topology.graph, [[0], [*workers[1:]]])
    if kind == "erdos_renyi":
        return nx.spring_layout(topology.graph, weight=None, k=0.7, seed=7)
    return None


def api_page(package: ModuleType) -> str:
    """Lists the public functions and classes of a package, grouped by module."""
    # Show algorithms and transformations by their names in `dj`.
    shown_as = dj if package in (dj.algorithms, dj.transforms) else package
    modules: dict[str, list[str]] = {}
    for name in package.__all__:
        if not callable(getattr(package, name)) or name == "AnyTopology":
            continue
        modules.setdefault(getattr(package, name).__module__, []).append(name)
    lines = ["```{eval-rst}", f".. automodule:: {package.__name__}", "   :no-members:"]
    lines += ["```", ""]
    for module, names in modules.items():
        # A module's own description is above already.
        if module != package.__name__:
            first = inspect.getdoc(sys.modules[module]).splitlines()[0].rstrip(".")
            lines += [f"## {first}", ""]
        lines += ["```{eval-rst}"]
        # Functions come before the classes that they return.
        for name in sorted(names, key=lambda n: inspect.isclass(getattr(package, n))):
            kind = "class" if inspect.isclass(getattr(package, name)) else "function"
            lines.append(f".. auto{kind}:: {shown_as.__name__}.{name}")
            if kind == "class":
                lines.append("   :members:")
        lines += ["```", ""]
    return "\n".join(lines)


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def sent_to_agree(topology) -> float:
    """Parameter copies that the busiest worker sends to reduce disagreement tenfold."""
    n, factor = topology.num_workers, topology.second_eigenvalue
    if topology.max_degree == n - 1 and factor < 1e-9:
        return 2 * (n - 1) / n  # one all-reduce
    rounds = (
        topology.period if factor == 0 else max(math.log(0.1) / math.log(factor), 1)
    )
    return rounds * topology.max_degree


def topology_table() -> str:
    """A Markdown table of the cost and the spectral gap of each topology."""
    lines = [
        "| topology | degree | diameter | spectral gap | period | sent |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, topology in {**STATIC, **SCHEDULES}.items():
        period = getattr(topology, "period", 1)
        diameter = getattr(topology, "diameter", "–")  # noqa: RUF001
        lines.append(
            f"| `{name}` | {topology.max_degree} | {diameter} "
            f"| {topology.spectral_gap:.3f} | {period} "
            f"| {sent_to_agree(topology):.3g} |"
        )
    return "\n".join(lines) + "\n"


def algorithm_table(size: int = 1000, rounds: int = 4) -> str:
    """A Markdown table of traffic and memory, on a ring of 16 workers."""
    ring = dj.topology.ring(16)
    # name -> (transformation, iterations between two changes of the model)
    algorithms = {
        "all_reduce_sgd": (dj.all_reduce_sgd(0.1), 1),
        "d_psgd": (dj.d_psgd(0.1, ring), 1),
        "d2": (dj.d2(0.1, ring.lazy(0.9)), 1),
        "dsgt": (dj.dsgt(0.1, ring), 1),
        "detag": (dj.detag(0.1, ring, rounds=rounds), rounds),
        'detag(when="phase_end")': (
            dj.detag(0.1, ring, rounds=rounds, when="phase_end"),
            rounds,
        ),
        "defacto": (dj.defacto(0.1, ring), 2 * len(dj.topology.exact_factors(ring))),
    }
    params = jnp.zeros(size)
    lines = ["| algorithm | sent | state | moves |", "|---|--:|--:|---|"]
    for name, (tx, interval) in algorithms.items():
        copies = sum(x.size for x in jax.tree.leaves(tx.init(params))) // size
        costs = dj.communication_costs(tx, params, axis_sizes={"workers": 16})
        sent = costs.bytes_per_step / (4 * size)
        moves = "every iteration" if interval == 1 else f"every {interval} iterations"
        lines.append(f"| `dj.{name}` | {sent:.3g} | {copies} | {moves} |")
    return "\n".join(lines) + "\n"


def draw_sent_to_agree():
    """Cost of reducing disagreement tenfold, versus the number of workers."""
    families = {
        "ring": (dj.topology.ring, [4, 8, 16, 32, 64, 128], BLUE),
        "torus": (
            lambda n: dj.topology.torus(math.isqrt(n), math.isqrt(n)),
            [9, 16, 36, 64, 121],
            GREEN,
        ),
        "exponential": (dj.topology.exponential, [4, 8, 16, 32, 64, 128], ORANGE),
        "complete": (dj.topology.complete, [4, 8, 16, 32, 64, 128], GREY),
        "one-peer exponential": (
            dj.topology.one_peer_exponential,
            [4, 8, 16, 32, 64, 128],
            RED,
        ),
    }
    figure, ax = plt.subplots(figsize=(6, 3.2))
    for name, (make, sizes, color) in families.items():
        made = [make(n) for n in sizes]
        sent = [sent_to_agree(t) for t in made]
        ax.loglog(sizes, sent, "o-", color=color, label=name, markersize=4)
    ax.set_xlabel("workers")
    ax.set_ylabel("parameter copies sent")
    ax.set_xticks([4, 8, 16, 32, 64, 128], [4, 8, 16, 32, 64, 128])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_rounds():
    """The messages of one gossip round, split into partial permutations."""
    topology = dj.topology.from_graph(
        nx.Graph([(0, 1), (0, 2), (0, 3), (1, 2), (2, 4), (3, 4), (4, 5)])
    )
    rounds = make_plan(topology.matrix, 6).rounds
    figure, axes = plt.subplots(
        1, 1 + len(rounds), figsize=(2.1 * (1 + len(rounds)), 2.3)
    )
    places = nx.circular_layout(range(6))
    style = {"node_color": LIGHT, "edgecolors": BLUE, "node_size": 220, "font_size": 8}
    nx.draw_networkx(
        topology.graph.to_undirected(),
        places,
        ax=axes[0],
        edge_color=GREY,
        **style,
    )
    axes[0].set_title(f"graph of degree {topology.max_degree}", fontsize=9)
    for k, (ax, one) in enumerate(zip(axes[1:], rounds, strict=True)):
        graph = nx.DiGraph(one.pairs)
        graph.add_nodes_from(range(6))
        nx.draw_networkx(
            graph,
            places,
            ax=ax,
            edge_color=ORANGE,
            width=1.5,
            connectionstyle="arc3,rad=0.12",
            **style,
        )
        ax.set_title(f"ppermute {k + 1}", fontsize=9)
    for ax in axes:
        ax.set_axis_off()
        ax.margins(0.2)
    return figure


def draw_folding():
    """Eight workers of a ring on eight, two and one device."""
    figure, axes = plt.subplots(3, 1, figsize=(6.4, 3.3))
    for ax, devices in zip(axes, (8, 2, 1), strict=True):
        per_device = 8 // devices
        pitch = 10.5 / (7 + 0.5 * (devices - 1))
        positions = [pitch * (i + 0.5 * (i // per_device)) for i in range(8)]
        for d in range(devices):
            left = positions[d * per_device] - 0.42
            ax.add_patch(
                plt.Rectangle(
                    (left, -0.42),
                    pitch * (per_device - 1) + 0.84,
                    0.84,
                    facecolor="#f4f6f8",
                    edgecolor=GREY,
                )
            )
        for i in range(8):
            j = (i + 1) % 8
            inside = i // per_device == j // per_device
            ends = [(positions[i], 0), (positions[j], 0)]
            ax.annotate(
                "",
                *ends,
                arrowprops={
                    "arrowstyle": "-",
                    "color": GREY if inside else ORANGE,
                    "linewidth": 1 if inside else 1.8,
                    "connectionstyle": f"arc3,rad={0.14 if j == 0 else 0}",
                },
            )
        ax.scatter(positions, [0] * 8, s=190, color=LIGHT, edgecolor=BLUE, zorder=3)
        for i in range(8):
            ax.text(positions[i], 0, i, ha="center", va="center", fontsize=8, zorder=4)
        label = "8 devices\nshard_map", "2 devices\nshard_map, vmap", "1 device\nvmap"
        ax.text(-0.7, 0, label[(8, 2, 1).index(devices)], ha="right", va="center")
        ax.set_xlim(-3.4, positions[-1] + 0.6)
        ax.set_ylim(-1, 0.6)
        ax.set_axis_off()
    return figure


def draw_contraction(n: int = 32, rounds: int = 80):
    """Distance to consensus versus gossip rounds on a ring, plain and accelerated."""
    ring = dj.topology.ring(n)
    start = np.random.default_rng(0).standard_normal((n, 50))
    start -= start.mean(0)
    with jax.enable_x64(True):
        plain_round = jax.jit(jax.vmap(lambda z: dj.mix(z, ring), axis_name="workers"))
        fast_round = jax.jit(
            jax.vmap(accelerated_round(ring, "workers"), axis_name="workers")
        )
        plain, now, before = [start], start, start
        fast = [start]
        for _ in range(rounds):
            plain.append(plain_round(plain[-1]))
            now, before = fast_round(now, before), now
            fast.append(now)
    r = np.arange(rounds + 1)
    figure, ax = plt.subplots(figsize=(6, 3))
    root = math.sqrt(momentum(ring))
    for values, factor, name, symbol, color in (
        (plain, ring.second_eigenvalue, "plain", r"$\lambda^r$", BLUE),
        (fast, root, "accelerated", r"$\eta^{r/2}$", ORANGE),
    ):
        distance = np.array([np.linalg.norm(value) for value in values])
        ax.semilogy(r, distance / distance[0], color=color, label=f"{name}, measured")
        ax.semilogy(r, factor**r, ":", color=color, label=f"{name}, {symbol}")
    ax.set_xlabel("gossip rounds $r$")
    ax.set_ylabel("distance to the mean")
    ax.set_title(f"ring({n})", fontsize=9)
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    draw_all(Path(__file__).resolve().parent / "images" / "drawn")
