"""The documentation's tables come from the commands that they name.

The tests train only one run of a few steps. To find stale tables, run
`python -m experiments tables --list`.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from experiments import commands as cli
from experiments.runs import tables
from experiments.training import provenance

DOCS = provenance.ROOT / "docs"
PAGES = {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
PAGES["README.md"] = (provenance.ROOT / "README.md").read_text("utf-8")
COMMAND = re.compile(r"python -m ((?:experiments|benchmarks)\b[^`\n]*)")
TABLES = re.compile(r"<!-- table: (\S+)/(\S+) -->\n(.*?)<!-- end of table -->", re.S)
BY_HAND = re.compile(r"<!-- by hand: (\S+) -->\n(.*?)<!-- end of by hand -->", re.S)
WHEN = r"\d{4}-\d\d-\d\d, commit [0-9a-f]{7,}(?: with changes)?"
SMALL_PRINT = re.compile(
    rf"<small>`(python -m experiments [^`]*)`, {WHEN}, "
    r"code (?:not recorded|([0-9a-f]{16}), Python (.*) on \d+ cores)\.[^<]*</small>"
)


def test_comments_in_pages_match_the_entries_of_runs():
    found = [
        (page, name, table)
        for page, text in PAGES.items()
        for name, table, _ in TABLES.findall(text)
    ]
    expected = [
        (run.page, name, table)
        for name, run in tables.RUNS.items()
        for table in run.tables
    ]
    assert sorted(found) == sorted(expected)
    for text in PAGES.values():
        assert len(re.findall("<!-- table: ", text)) == len(TABLES.findall(text))
        assert len(re.findall("<!-- by hand: ", text)) == len(BY_HAND.findall(text))


def test_every_picture_of_a_run_is_on_its_page():
    for run in tables.RUNS.values():
        for picture, _ in run.pictures:
            assert (DOCS / "images" / picture).exists()
    shown = {
        name for text in PAGES.values() for name in re.findall(r"images/(\S+?)\)", text)
    }
    # Other pictures are drawn by docs/generate.py.
    shown = {name for name in shown if not name.startswith("drawn/")}
    made = {picture for run in tables.RUNS.values() for picture, _ in run.pictures}
    assert made | {"network.png"} == shown | {"apam_delay_logistic_digits.png"}


def test_the_gallery_shows_every_picture_below_its_command():
    for run in tables.RUNS.values():
        for picture, _ in run.pictures:
            above, found, _ = PAGES["gallery.md"].partition(f"images/{picture})")
            assert found
            assert COMMAND.findall(above)[-1] == f"experiments {run.command}"


@pytest.mark.parametrize("page", PAGES)
def test_measurements_are_in_dated_blocks(page):
    """Blocks enclose all tables after a page's first command, and all benchmarks."""
    text = PAGES[page].replace("Benchmarks run one by one: `python -m benchmarks.", "")
    inside = [m.span() for blocks in (TABLES, BY_HAND) for m in blocks.finditer(text)]

    def assert_inside(pattern, start=0):
        for match in re.compile(pattern, re.MULTILINE).finditer(text, start):
            position = match.start()
            line = text[position:].splitlines()[0]
            assert any(low < position < high for low, high in inside), line

    assert_inside(r"python -m benchmarks\.")
    if (first := COMMAND.search(text)) and page != "README.md":
        assert_inside(r"^\|", first.start())
    for name, body in BY_HAND.findall(text):
        assert name in tables.BY_HAND
        assert re.search(rf"<small>{WHEN}\.</small>", body)


def test_registered_hand_written_blocks_exist():
    used = {name for text in PAGES.values() for name, _ in BY_HAND.findall(text)}
    assert used == set(tables.BY_HAND)


@pytest.mark.parametrize("name", tables.RUNS)
def test_small_print(name):
    """The small print has command, date, commit, and, for recorded code, versions."""
    run = tables.RUNS[name]
    found = [b for n, _, b in TABLES.findall(PAGES[run.page]) if n == name]
    prints = [SMALL_PRINT.findall(body) for body in found]
    assert [len(lines) for lines in prints] == [1] * len(run.tables)
    for ((command, code, versions),) in prints:
        if code:
            assert command == run.shown_command
            for package in ("jax", "jaxlib", "optax"):
                assert re.search(rf" {package} \d", versions)


@pytest.mark.parametrize("name", tables.RUNS)
def test_tables_have_a_header_and_mark_edges(name):
    """A star marks a best rate if and only if it is at the edge of its grid."""
    run = tables.RUNS[name]
    for owner, _, body in TABLES.findall(PAGES[run.page]):
        if owner != name:
            continue
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in body.splitlines()
            if line.startswith("|")
        ]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert set("".join(rows[1])) == {"-"}
        assert len(rows) > 2
        ((command, _, _),) = SMALL_PRINT.findall(body)
        words = shlex.split(command)[3:]
        grid = getattr(cli.parse(words), "rates", None)
        if grid is None or len(grid) < 2 or "*" in "".join(rows[0]):
            continue
        ends = {f"{min(grid):g}", f"{max(grid):g}"}
        column = rows[0].index("best rate") if "best rate" in rows[0] else None
        for row in rows[2:]:
            rates = re.findall(r"\(([\d.e-]+(?:\\\*)?)\)$", " ".join(row))
            if column is not None:
                rates = [row[column]]
            for rate in rates:
                assert rate.endswith("\\*") == (rate.removesuffix("\\*") in ends)


def commands():
    for page, text in PAGES.items():
        for found in COMMAND.findall(text):
            yield page, found.partition("   ")[0].partition(" && ")[0].strip()


def options_of(command):
    """Returns the parsed options of a command and its help text, without running it."""
    module, *words = shlex.split(command)
    parse = cli.parse if module == "experiments" else parser_of(module)
    found = parse(words)
    shown = io.StringIO()
    helped = words[:1] if module == "experiments" else []
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse([*helped, "--help"])
    return found, shown.getvalue()


class Parsed(Exception):
    """Ends a benchmark's main after its arguments are parsed."""


def parser_of(module):
    def parse(words):
        real = argparse.ArgumentParser.parse_args

        def parse_args(self, args=None, namespace=None):
            raise Parsed(real(self, words, namespace))

        # Benchmarks set environment variables for their devices.
        with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
            found = importlib.import_module(module)
            if hasattr(found, "__path__"):
                found = importlib.import_module(f"{module}.__main__")
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            with pytest.raises(Parsed) as parsed:
                found.main()
            return parsed.value.args[0]

    return parse


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_every_documented_command_parses(page, command):
    options_of(command)


def test_every_option_named_beside_a_command_exists():
    for text in PAGES.values():
        for paragraph in text.split("\n\n"):
            named = COMMAND.findall(paragraph)
            if not named:
                continue
            helps = " ".join(options_of(command)[1] for command in named)
            for option in re.findall(r"`(--[a-z][\w.-]*)", paragraph):
                assert re.search(rf"{re.escape(option)}\b", helps), option


def test_wrong_options_do_not_parse():
    with pytest.raises(SystemExit):
        options_of("experiments compare --network.slow 2")
    with pytest.raises(SystemExit):
        options_of("benchmarks.one_device.many_workers --batchsize 2")


PAGE = "Before.\n\n<!-- table: quick/synthetic -->\n<!-- end of table -->\n\nAfter.\n"
QUICK = tables.Run("page.md", "synthetic --iterations 20 --seeds 1", ("synthetic",))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Returns a function that calls `tables` on a page with one short run."""
    monkeypatch.setattr(tables, "RUNS", {"quick": QUICK})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text(PAGE)

    def run(*arguments):
        out = str(tmp_path / "out")
        words = [
            "experiments",
            "tables",
            "--write",
            str(docs),
            "--out",
            out,
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", words)
        cli.main()
        return (docs / "page.md").read_text()

    return run


def test_writes_tables_and_detects_stale_ones(quick, monkeypatch, capsys):
    text = quick()
    assert text.startswith("Before.\n\n<!-- table: quick/synthetic -->\n")
    assert text.endswith("<!-- end of table -->\n\nAfter.\n")
    ((name, table, body),) = TABLES.findall(text)
    assert (name, table) == ("quick", "synthetic")
    assert "| DeTAG | " in body
    ((command, code, _),) = SMALL_PRINT.findall(body)
    assert command == QUICK.shown_command
    assert code == provenance.code()
    capsys.readouterr()
    assert quick() == text
    assert capsys.readouterr().out == "quick: up to date\n"
    quick("--list")
    assert "quick" in (listed := capsys.readouterr().out)
    assert "up to date" in listed
    # Changed code, a changed command, or a missing picture makes a table stale.
    changes = [
        lambda patch: patch.setattr(tables, "code", lambda: "0" * 16),
        lambda patch: patch.setitem(
            tables.RUNS, "quick", QUICK._replace(command="synthetic --seeds 2")
        ),
        lambda patch: patch.setitem(
            tables.RUNS, "quick", QUICK._replace(pictures=(("x.png", "x.png"),))
        ),
    ]
    for change in changes:
        with monkeypatch.context() as patch:
            change(patch)
            quick("--list")
        assert "stale" in capsys.readouterr().out


def test_skips_and_failures(quick, monkeypatch, capsys):
    with_data = QUICK._replace(command=f"def --data-dir {tables.FOLDER}")
    monkeypatch.setitem(tables.RUNS, "quick", with_data)
    assert quick() == PAGE
    assert "skipped, needs --data-dir" in capsys.readouterr().out
    commands = []

    def run(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(tables.subprocess, "run", run)
    with pytest.raises(SystemExit, match="error: failed: quick"):
        quick("--data-dir", "data")
    assert "quick: failed with exit status 1" in capsys.readouterr().out
    assert commands[0][4:6] == ["--data-dir", str(Path("data").resolve())]
    assert "--resume" in commands[0]
    with pytest.raises(SystemExit) as stop:
        quick("slow")
    assert stop.value.code == 2
    assert (
        "error: NAMES='slow' is unknown. Pass one of 'quick'."
        in capsys.readouterr().err
    )
