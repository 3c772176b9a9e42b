"""Runs experiments as the command line does."""

import re
import sys

import pytest

from experiments import commands, folders


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command, and returns the folder of its results."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        monkeypatch.chdir(tmp_path)
        commands.main()
        if "--out" in arguments:
            return tmp_path / arguments[arguments.index("--out") + 1]
        return folders._numbered(tmp_path / "results" / arguments[0])[-1]

    return run


@pytest.fixture
def fails(run, capsys):
    """Asserts that a command exits with status 2 and one line of error message."""

    def fails(message, *arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert re.search(message, line)

    return fails
