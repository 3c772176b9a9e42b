"""Interactive reports: one HTML file per run, which needs no network and no server.

A report contains its charts, tables, settings, and origin. The charts are drawn by
plotly.js, which is part of the file, compressed. A content security policy forbids the
page to load anything.
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from experiments import styles

if TYPE_CHECKING:
    from experiments.report import Table

CODE = Path(__file__).with_name("html_report.js")
STYLE_SHEET = Path(__file__).with_name("html_report.css")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)
# Markers in the legend, within a square from -5 to 5.
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "square": "M-4-4H4V4H-4z",
    "diamond": "M0-5 5 0 0 5-5 0z",
    "triangle-up": "M0-5 5 4H-5z",
    "triangle-down": "M0 5 5-4H-5z",
    "x": "M-5-3-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z",
    "cross": "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6z",
    "star": "M0-5.5 1.3-1.7 5.3-1.7 2.1.7 3.3 4.5 0 2.2-3.3 4.5-2.1.7-5.3-1.7-1.3-1.7z",
    "pentagon": "M0-5 4.9-1.4 3 4.2H-3L-4.9-1.4z",
}
# Charts with more curves begin without bands, which would cover each other.
MOST_BANDS = 8
LINES = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}


class Series(NamedTuple):
    """A curve: measurements of one algorithm or setting, for all seeds."""

    name: str
    x: Mapping[str, Any]  # shape=[E] each: quantities for the horizontal axis
    y: Mapping[str, Any]  # shape=[seeds, E] each: measurements
    note: str = ""  # shown with the values, such as the learning rate


class Chart(NamedTuple):
    """Curves in one pair of axes; readers choose what the axes show."""

    title: str
    series: Sequence[Series]
    log: Collection[str] = ()  # quantities whose axes are logarithmic at first


def page(
    title: str,
    charts: Sequence[Chart],
    tables: Sequence["Table"],
    options: Any,
    origin: Mapping[str, str],
) -> str:
    """Returns a report as a self-contained HTML document.

    Args:
      title: Title of the document.
      charts: Charts, in the order of the page.
      tables: Tables below the charts.
      options: Options of the experiment, a dataclass.
      origin: Command, versions, and commit, as `provenance` returns them.

    Returns:
      The text of the file.
    """
    data = json.dumps([_data(chart) for chart in charts], separators=(",", ":"))
    # "<" could end the script element that holds the data.
    data = data.replace("<", "\\u003c")
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0))
    shown = {name: text for name, text in origin.items() if name != "options"}
    shown["charts"] = f"plotly.js {get_plotlyjs_version()} (MIT license)"
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="{escape(origin["command"])}">
<title>{escape(title)}, {escape(origin["version"])}</title>
<style>
{STYLE_SHEET.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p><code>{escape(origin["command"])}</code></p>
</header>
<main>
<noscript><p>The charts need JavaScript. The tables below do not.</p></noscript>
{"".join(_chart(i, chart) for i, chart in enumerate(charts))}
{"".join(map(_table, tables))}
<section class="columns">
{_list("Settings", _settings(options))}
{_list("Origin", shown.items())}
</section>
</main>
<script type="application/json" id="data">{data}</script>
<script type="text/plain" id="plotly">{library.decode()}</script>
<script>
{CODE.read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _data(chart: Chart) -> dict[str, Any]:
    """Returns what the script of the page reads: numbers and styles of the curves."""
    looks = styles.assign(series.name for series in chart.series)
    return {
        "series": [
            {
                "name": series.name,
                "note": series.note,
                **looks[series.name]._asdict(),
                "x": {name: _numbers(x) for name, x in series.x.items()},
                "y": {
                    name: [_numbers(f(np.asarray(y), 0)) for f in (np.mean, *_RANGE)]
                    for name, y in series.y.items()
                },
            }
            for series in chart.series
        ]
    }


_RANGE = np.min, np.max


def _numbers(values: Any) -> list[float | None]:
    """Rounds to six digits. JSON has no NaN and no infinity: they become null."""
    values = np.asarray(values, float).tolist()
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in values]


def _chart(index: int, chart: Chart) -> str:
    """Returns the controls, the legend, and the place of a chart."""
    first = chart.series[0]
    names = list(dict.fromkeys(name for s in chart.series for name in s.y))
    seeds = max(len(np.asarray(y)) for s in chart.series for y in s.y.values())
    band = f"the lowest to the highest of {seeds} seeds" if seeds > 1 else ""
    log = dict.fromkeys(chart.log, " data-log")
    return f"""
<section class="chart" data-chart="{index}" aria-labelledby="chart-{index}">
<h2 id="chart-{index}">{escape(chart.title)}</h2>
<div class="controls">
{_choice("y", "Vertical", names, log)}
{_box("log-y", "Log")}
{_choice("x", "Horizontal", first.x, log)}
{_box("log-x", "Log")}
{_box("band", "Range over seeds", len(chart.series) <= MOST_BANDS) if band else ""}
<span><button type="button" data-all="true">Show all</button>
<button type="button" data-all="false">Hide all</button></span>
</div>
<div class="legend">
{"".join(_legend(chart))}
</div>
<div class="plot" role="img" aria-label="{escape(chart.title)}"></div>
<p class="note">Lines are means over seeds{f"; bands span {band}" if band else ""}.
<span class="hint">To show or hide a curve, click its name.
<span class="zoom">To zoom, drag; to zoom out, double-click.</span></span></p>
</section>
"""


def _choice(name: str, label: str, of: Iterable[str], log: Mapping[str, str]) -> str:
    options = "".join(
        f'<option value="{escape(o)}"{log.get(o, "")}>{escape(o)}</option>' for o in of
    )
    return f'<label>{label} <select name="{name}">{options}</select></label>'


def _box(name: str, label: str, checked: bool = False) -> str:
    state = " checked" if checked else ""
    return f'<label><input type="checkbox" name="{name}"{state}> {label}</label>'


def _legend(chart: Chart) -> Iterator[str]:
    """Yields one group of buttons per family, with one button per curve."""
    looks = styles.assign(series.name for series in chart.series)
    groups: dict[str, list[str]] = {}
    # Charts of one algorithm's settings have no families.
    grouped = all(styles.family(series.name) for series in chart.series)
    for index, series in enumerate(chart.series):
        style = looks[series.name]
        button = (
            f'<button type="button" aria-pressed="true" data-series="{index}" '
            f'style="--light:{style.color};--dark:{style.dark}">'
            '<svg viewBox="0 0 36 12" aria-hidden="true">'
            f'<path class="line" d="M0 6H36" stroke-dasharray="{LINES[style.dash]}"/>'
            f'<path d="{SHAPES[style.marker]}" transform="translate(18 6)"/></svg>'
            f"{escape(series.name)}</button>"
        )
        family = styles.family(series.name) if grouped else ""
        groups.setdefault(family, []).append(button)
    for family, buttons in groups.items():
        name = escape(family)
        toggle = f'<button type="button" class="family">{name}</button>'
        head = toggle if family and len(groups) > 1 else ""
        label = name or "curves"
        yield f'<div role="group" aria-label="{label}">{head}{"".join(buttons)}</div>\n'


def _table(table: "Table") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{row(rest, "td")}</tr>\n'
        for first, *rest in table.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in table.all_notes)
    title = escape(table.title)
    return f"""
<section>
<h2>{title}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="{title}">
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table>
</div>
{notes}</section>
"""


def _settings(options: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields names and values of all options, including nested ones."""
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{name}.")
        elif isinstance(value, tuple):
            yield name, " ".join(map(str, value)) or "not given"
        else:
            yield name, "not given" if value is None else str(value)


def _list(title: str, entries: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in entries
    )
    return f"<div><h2>{title}</h2>\n<dl>{lines}</dl></div>"
