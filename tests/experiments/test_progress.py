"""Progress in terminals and elsewhere, and tables in narrow terminals."""

import io

import pytest
from rich.console import Console

from experiments import progress, report

LONG = "compare: a long name of an algorithm"
TABLE = report.Table(
    "A title",
    ("algorithm", "accuracy % after 10", "after 20", "train loss"),
    [("all-reduce SGD", "10.0 ± 0.1", "20.0 ± 0.2", "1.000 ± 0.003")],
    ["A note."],
)


def console(width=80, **options):
    return Console(file=io.StringIO(), width=width, **options)


def test_lines_without_a_terminal(monkeypatch):
    clock = iter([0, 0, 1, 9.9, 70, 71, 100, 101, 200])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = console(40)
    shown = progress.Progress(out)
    with shown.bar(LONG, 4) as bar:
        for _ in range(4):
            bar.advance()
        bar.update("last", 4)
    with shown.status("soon after"):
        pass
    with shown.status("[later]"):
        pass
    assert out.file.getvalue().splitlines() == [
        f"{LONG}: 0%, 0 min 0 s",
        f"{LONG}: 75%, 1 min 10 s",
        "last: 100%, 1 min 40 s",
        "[later], 3 min 20 s",
    ]


def test_bar_in_a_narrow_terminal():
    out = console(40, force_terminal=True, color_system=None)
    with progress.Progress(out).bar(LONG, 2) as bar:
        bar.advance()
        bar.update(LONG, 2)
    text = out.file.getvalue()
    assert "\x1b[?25l" in text
    lines = [line for line in text.replace("\r", "\n").split("\n") if "100%" in line]
    assert lines
    for line in lines:
        shown = line.replace("\x1b[2K", "").replace("\x1b[?25h", "")
        assert shown.startswith("compare: a l")
        assert len(shown.rstrip()) <= 40


def test_tables_fit():
    for width in (60, 80, 200):
        out = console(width, force_terminal=True, color_system=None)
        report.show(out, TABLE)
        text = out.file.getvalue()
        assert all(len(line.rstrip()) <= width for line in text.splitlines())
        assert "10.0 ± 0.1" in text
        assert "1.000 ± 0.003" in text


def test_tables_in_narrow_terminals_are_lists():
    out = console(40, force_terminal=True, color_system=None)
    report.show(out, TABLE)
    assert out.file.getvalue().splitlines() == [
        "A title:",
        "",
        "all-reduce SGD",
        "  accuracy % after 10: 10.0 ± 0.1",
        "  after 20: 20.0 ± 0.2",
        "  train loss: 1.000 ± 0.003",
        "",
        "A note.",
    ]


@pytest.mark.parametrize("width", [20, 80])
def test_tables_in_files_are_tables(width):
    out = console(width)
    report.show(out, TABLE)
    (row,) = [x for x in out.file.getvalue().splitlines() if "all-reduce SGD" in x]
    assert row.split("  ")[-1].strip() == "1.000 ± 0.003"
    assert "\x1b" not in out.file.getvalue()
