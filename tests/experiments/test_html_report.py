"""HTML reports: what they contain, that they load nothing, and how browsers show them.

The browser is Chromium, as packages of Linux distributions install it.
"""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

import decentral_jax as dj
from experiments import catalog, html_report, styles
from experiments.html_report import Chart, Series
from experiments.report import Table
from tests.support import browser

QUICK = ["--iterations", "24", "--evaluations", "4", "--seeds", "2", "--rates", "0.1"]
CHOSEN = ["all-reduce SGD", "D-PSGD", "DeTAG", "DEF-A", "Local SGD"]


@dataclasses.dataclass
class Inner:
    slow: float = 2.0


@dataclasses.dataclass
class Options:
    rates: tuple[float, ...] = (0.1, 0.2)
    folder: str | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


ORIGIN = {
    "command": "python -m experiments x --out 'a <b>'",
    "options": "Options()",
    "version": "decentral_jax 0",
    "commit": "0123abc",
}


def series(name, note="rate 0.1"):
    steps = np.arange(1, 31)
    loss = np.stack([1 / steps, 2 / steps, 3 / steps])
    loss[0, 3] = np.nan
    x = {"iterations": steps, "megabytes": steps / 8}
    return Series(name, x, {"train loss": loss, "accuracy": 1 - loss / 3}, note)


def written(tmp_path, names):
    """Writes a report with two charts of these curves and a table that is wide."""
    charts = [
        Chart(title, [series(name) for name in names], ("train loss",))
        for title in ("First", "Second <i>")
    ]
    columns = ["algorithm", *(f"a long column {i}" for i in range(12))]
    table = Table("Results", columns, [["D2", *["0.123 ± 0.001*"] * 12]], ["A note."])
    path = tmp_path / "x.html"
    text = html_report.page("x", charts, [table], Options(), ORIGIN)
    path.write_text(text, encoding="utf-8")
    return path


def data(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)<', text)
    return json.loads(found)


def assert_self_contained(text):
    """No attribute, style, or script of the page refers to something outside of it."""
    library = re.compile(r'(?<=id="plotly">)[A-Za-z0-9+/=]{100000,}(?=</script>)')
    assert len(library.findall(text)) == 1
    page = library.sub("", text)
    assert not re.findall(r"""\b(?:src|href|srcset|action|poster)\s*=""", page)
    for loads in ("http:", "https:", "//cdn", "@import", "url(", "fetch(", "import("):
        assert loads not in page
    assert not re.findall(r"XMLHttpRequest|WebSocket|sendBeacon|<link|<iframe", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "*" not in policy


def test_report_of_a_run(run):
    out = run("compare", *QUICK, "--algorithms", *CHOSEN)
    text = (out / "compare.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    (chart,) = data(text)
    assert [one["name"] for one in chart["series"]] == CHOSEN
    for one in chart["series"]:
        assert [len(x) for x in one["x"].values()] == [4, 4, 4]
        assert one["x"]["iterations (gradients per worker)"] == [6, 12, 18, 24]
        loss = np.array(one["y"]["train loss"])
        assert loss.shape == (3, 4)
        assert (loss[1] <= loss[0]).all()
        assert (loss[0] <= loss[2]).all()
        assert one["note"] == "rate 0.1"
    for shown in ("compare --iterations 24", dj.__version__, "kappa", "network.slow"):
        assert shown in text
    assert "<title>compare, decentral_jax" in text
    assert '<html lang="en">' in text
    # The table of the terminal, with one row per algorithm.
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>', text)
    assert rows == CHOSEN


def test_page(tmp_path):
    text = written(tmp_path, ["D2", "DEF"]).read_text(encoding="utf-8")
    assert_self_contained(text)
    first, second = data(text)
    assert first == second
    low = first["series"][0]["y"]["train loss"][1]
    # Numbers have six digits, and JSON has no NaN.
    assert low[2:5] == [0.333333, None, 0.2]
    assert [one["marker"] for one in first["series"]] == ["triangle-up", "cross"]
    assert '<h2 id="chart-1">Second &lt;i&gt;</h2>' in text
    assert "x --out &#x27;a &lt;b&gt;&#x27;" in text
    for name, value in (
        ("rates", "0.1 0.2"),
        ("folder", "not given"),
        ("inner.slow", "2.0"),
        ("commit", "0123abc"),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert '<option value="train loss" data-log>' in text
    assert '<option value="accuracy">' in text
    assert '<p class="note">* the best rate is at the edge' in text


def test_text_in_the_data_does_not_end_the_script(tmp_path):
    text = written(tmp_path, ["</script><b>"]).read_text(encoding="utf-8")
    assert data(text)[0]["series"][0]["name"] == "</script><b>"


def test_every_algorithm_has_a_family_and_a_look_of_its_own():
    names = list(catalog.everything(dj.topology.ring(8), rounds=2))
    assert len(names) > 18
    assert all(styles.family(name) for name in names)
    members = [name for names in styles.FAMILIES.values() for name in names]
    assert len(set(members)) == len(members)
    looks = [styles.STYLES[name] for name in members]
    assert len({(look.color, look.marker) for look in looks}) == len(members)
    for names in styles.FAMILIES.values():
        of_family = [styles.STYLES[name] for name in names]
        assert len({look.color for look in of_family}) == len(names)
        assert len({look.marker for look in of_family}) == len(names)
    assert styles.family("DSGT, waiting") == styles.family("DSGT") != ""
    assert styles.family("3 missing") == ""
    assert set(html_report.SHAPES) == set(styles.MARKERS)
    assert set(html_report.LINES) == set(styles.DASHES)


def test_other_names_take_the_remaining_colors():
    looks = styles.assign(["all .55", "MLL-SGD", *map(str, range(6))])
    assert list(looks)[:2] == ["all .55", "MLL-SGD"]
    assert looks["MLL-SGD"] == styles.STYLES["MLL-SGD"]
    assert len({look.color for look in looks.values()}) == 8
    many = styles.assign(map(str, range(40))).values()
    assert len({(look.color, look.marker) for look in many}) == 40


# Colors as dichromats see them: Machado, Oliveira, Fernandes, IEEE TVCG 15 (2009), with
# severity 1, on linear RGB.
VISIONS = {
    "all cones": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)


def linear(color):
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB, in which distances are about as large as they look."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(color, background):
    """The ratio of WCAG 2, from 1 to 21."""
    high, low = sorted(
        (TO_XYZ[1] @ linear(c) for c in (color, background)), reverse=True
    )
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(("which", "background"), [(0, "#ffffff"), (1, "#16181d")])
def test_colors_differ_for_everyone(vision, which, background):
    colors = [pair[which] for pair in (styles.BLACK, *styles.COLORS)]
    seen = [lab(VISIONS[vision] @ linear(color)) for color in colors]
    for count, distance in ((5, 24), (len(colors), 14)):
        pairs = itertools.combinations(seen[:count], 2)
        assert min(np.linalg.norm(a - b) for a, b in pairs) > distance
    assert min(contrast(color, background) for color in colors) > 2


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """One tab of a headless browser for all tests of this file."""
    if browser.command() is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.COMMANDS)} found")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


SIZES = {"desktop": (1280, 800), "phone": (390, 844)}

MEASURE = """(() => {
  const box = (e) => { const r = e.getBoundingClientRect();
    return [r.left, r.right, r.width, r.height]; };
  const all = (q) => [...document.querySelectorAll(q)];
  return {
    width: document.documentElement.clientWidth,
    content: document.documentElement.scrollWidth,
    buttons: all("[data-series]").map(box),
    plots: all(".plot .main-svg").map(box),
    ticks: all(".plot").map((p) => [p.querySelectorAll(".xtick").length,
      p.querySelectorAll(".ytick").length]),
    titles: all(".plot .xtitle, .plot .ytitle").map((e) => e.textContent),
    curves: all(".plot").map((p) => p.data.filter((t) => t.name).length),
    loaded: performance.getEntriesByType("resource").map((e) => e.name),
    labels: all('[role="img"]').map((e) => e.getAttribute("aria-label")),
    ink: getComputedStyle(document.body).color,
    drag: document.querySelector(".plot")._fullLayout.dragmode,
  };
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_browsers_show_it(tab, tmp_path, size, scheme):
    names = list(catalog.everything(dj.topology.ring(8), rounds=2))
    path = written(tmp_path, names)
    tab.errors.clear()
    tab.requests.clear()
    tab.open(path, *SIZES[size], scheme)
    seen = tab.run(MEASURE)
    assert tab.errors == []
    # Nothing but the file itself is asked for.
    assert tab.requests == [path.as_uri()]
    assert seen["loaded"] == []
    assert seen["content"] <= seen["width"] == pytest.approx(SIZES[size][0], abs=20)
    assert len(seen["buttons"]) == 2 * len(names)
    assert len(seen["plots"]) >= 2
    for left, right, width, height in (*seen["buttons"], *seen["plots"]):
        assert left >= 0
        assert right <= seen["width"]
        assert width > 40
        assert height > 20
    assert all(min(ticks) > 2 for ticks in seen["ticks"])
    assert seen["titles"] == ["iterations", "train loss"] * 2
    assert seen["curves"] == [len(names)] * 2
    assert seen["labels"][0].startswith("Line chart of train loss against iterations: ")
    # On phones, dragging scrolls the page.
    assert seen["drag"] == {"desktop": "zoom", "phone": False}[size]
    inks = {"light": "rgb(28, 30, 33)", "dark": "rgb(232, 234, 237)"}
    assert seen["ink"] == inks[scheme]


def test_readers_choose_curves_and_axes(tab, tmp_path):
    path = written(tmp_path, ["all-reduce SGD", "D2", "DSGT", "DEF"])
    tab.open(path, *SIZES["desktop"])
    first = "document.querySelector('.chart')"
    plot = f"{first}.querySelector('.plot')"

    def shown():
        return tab.run(f"{plot}.data.filter((t) => t.name).map((t) => t.name)")

    def axes():
        layout = f"{plot}._fullLayout"
        x, y = f"{layout}.xaxis", f"{layout}.yaxis"
        return tab.run(f"[{x}.title.text, {x}.type, {y}.title.text, {y}.type]")

    def click(what):
        tab.run(f"{first}.querySelector('{what}').click()")

    def choose(name, value):
        select = f"{first}.querySelector('[name={name}]')"
        tab.run(
            f"{select}.value = '{value}';"
            f"{select}.dispatchEvent(new Event('change', {{bubbles: true}}))"
        )

    assert shown() == ["all-reduce SGD", "D2", "DSGT", "DEF"]
    assert axes() == ["iterations", "linear", "train loss", "log"]
    assert tab.run(f"{plot}.data.length") == 8  # a band for each curve
    click('[data-series="3"]')
    assert shown() == ["all-reduce SGD", "D2", "DSGT"]
    click('[aria-label="gossip with bias correction"] .family')
    assert shown() == ["all-reduce SGD"]
    click('[data-all="true"]')
    click("[name=band]")
    assert tab.run(f"{plot}.data.length") == 4
    choose("x", "megabytes")
    click("[name=log-x]")
    choose("y", "accuracy")
    assert axes() == ["megabytes", "log", "accuracy", "linear"]
    x = tab.run(f"{plot}.data[0].x")
    np.testing.assert_allclose(x, np.arange(1, 31) / 8)
    # The other chart has controls of its own.
    other = tab.run("document.querySelectorAll('.plot')[1].data.length")
    assert other == 8
    # Values appear below the pointer.
    click('[data-all="false"]')
    click('[data-series="1"]')
    at = tab.run(
        f"(() => {{ const r = {plot}.querySelector('.points path')"
        ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    tab("Input.dispatchMouseEvent", type="mouseMoved", x=at[0] - 40, y=at[1])
    tab("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    found = tab.wait("document.querySelector('.hoverlayer').textContent")
    assert "D2, rate 0.1" in found
    assert "megabytes: 0.125" in found
    assert tab.errors == []
