"""Colors, markers, and dashes of the algorithms, the same in every figure and report.

The colors are the palette of Okabe and Ito without yellow, which is too light for lines
on white, and with wine red. They differ for readers with any color vision. Algorithms
of one family differ in color and marker, and families differ in dash.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a curve is drawn; markers and dashes have the names that plotly uses."""

    color: str  # on a light background
    dark: str  # on a dark background
    marker: str
    dash: str

    def matplotlib(self) -> dict[str, Any]:
        """Returns the keyword arguments of `matplotlib.axes.Axes.plot`."""
        return {
            "color": self.color,
            "marker": MARKERS[self.marker],
            "linestyle": DASHES[self.dash],
            "linewidth": 1.6,
            "markersize": 4.5,
        }


BLACK = "#000000", "#ffffff"
# Each color on a light background, and on a dark one. The first four differ most.
COLORS = (
    ("#0072b2", "#0c86cc"),  # blue
    ("#d55e00", "#d55e00"),  # vermilion
    ("#009e73", "#009e73"),  # green
    ("#56b4e9", "#8ccdf2"),  # sky blue
    ("#e69f00", "#e6ab2e"),  # orange
    ("#882255", "#ad3f78"),  # wine red
    ("#cc79a7", "#e39ac3"),  # purple
)
# Names in plotly, and in matplotlib.
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "x": "X",
    "cross": "P",
    "star": "*",
    "pentagon": "p",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}

# Baselines are black, and appear in the panels of every family.
BASELINE = "baseline"
BASELINES = ("all-reduce SGD", "dense SGD", "distributed SGD", "D-RR")
FAMILIES: dict[str, tuple[str, ...]] = {
    "gossip": ("D-PSGD", "D-PSGD one-peer", "SGP one-peer", "QG-DSGDm"),
    "gossip with bias correction": ("D2", "DSGT", "DeTAG", "DeFacto"),
    "compression": (
        *("EF-SGD", "DEF", "DEF-A", "SGD-IA", "CSER", "PowerSGD", "CHOCO-SGD"),
    ),
    "local updates": ("Local SGD", "SlowMo", "DiLoCo", "HL-SGD", "MLL-SGD"),
    "example orders": ("D-GraB", "ID-GraB, pairs", "ID-GraB, mean"),
    "asynchronous": ("asynchronous AMSGrad", "asynchronous SGD", "synchronous AMSGrad"),
}


def _styles() -> dict[str, Style]:
    markers, dashes = list(MARKERS), itertools.cycle(DASHES)
    styles = {name: Style(*BLACK, "circle", "solid") for name in BASELINES}
    for shift, (names, dash) in enumerate(zip(FAMILIES.values(), dashes, strict=False)):
        for i, name in enumerate(names):
            # The shift makes each pair of color and marker unique among all families.
            marker = markers[(i + 1 + 2 * shift) % len(markers)]
            styles[name] = Style(*COLORS[i], marker, dash)
    return styles


STYLES = _styles()


def algorithm(name: str) -> str:
    """Returns the algorithm of a curve, without what its name says of the setting."""
    return name.removesuffix(", waiting")


def family(name: str) -> str:
    """Returns the family of an algorithm, or an empty string for other names."""
    families = {BASELINE: BASELINES, **FAMILIES}.items()
    return next((group for group, names in families if algorithm(name) in names), "")


def assign(names: Iterable[str]) -> dict[str, Style]:
    """Returns a style for each curve of a figure.

    Args:
      names: Names of the curves. Algorithms have their own styles. Other names, such as
        delays or numbers of hubs, take the remaining colors in order.

    Returns:
      A dictionary from names to styles.
    """
    names = list(names)
    own = {n: STYLES[algorithm(n)] for n in names if algorithm(n) in STYLES}
    taken = {style.color for style in own.values()}
    free = itertools.cycle(c for c in (BLACK, *COLORS) if c[0] not in taken)
    looks = zip(free, itertools.cycle(MARKERS), strict=False)
    rest = [name for name in names if name not in own]
    others = {
        name: Style(*color, marker, "solid")
        for name, (color, marker) in zip(rest, looks, strict=False)
    }
    return {name: (own | others)[name] for name in names}
