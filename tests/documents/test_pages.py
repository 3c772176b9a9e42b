"""What a reader meets on the way: links that lead somewhere, and examples."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import decentral_jax as dj

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", ".github/**/*.md", "docs/**/*.md")
    for page in ROOT.glob(pattern)
    if "_build" not in page.parts
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULES = (
    *(dj, dj.topology, dj.compression, dj.traces, dj.engine, dj.checkpoints),
    *(dj.data, dj.metrics),
)
# Where no example can run inside of a test, the docstring names one that a test runs.
ELSEWHERE = {"initialize": "docs/recipes/train.py"}


def anchors(page):
    """Returns the anchors of a page's headings, as code hosts derive them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    named = re.findall(r"^\(([\w-]+)\)=$", page.read_text("utf-8"), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words} | set(named)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.S)
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        # MyST resolves an anchor alone on all pages.
        target = (ROOT / page).parent / path if path else None
        if target is None:
            everywhere = set().union(*(anchors(ROOT / p) for p in PAGES))
            assert anchor in everywhere, link
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def functions():
    for module in MODULES:
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                yield pytest.param(getattr(module, name), id=name)


@pytest.mark.parametrize("function", list(functions()))
def test_every_public_function_has_an_example(function):
    doc = inspect.getdoc(function)
    elsewhere = ELSEWHERE.get(function.__name__)
    if elsewhere is not None:
        assert elsewhere in doc
        assert (ROOT / elsewhere).exists()
    else:
        assert ">>>" in doc


def test_pictures_are_drawn_and_used(tmp_path, monkeypatch):
    """The repository has the pictures that `python docs/generate.py` draws."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module("generate").draw_all(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images/drawn").iterdir()}
    pages = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    assert drawn == set(re.findall(r"images/drawn/([\w.]+)", pages))
