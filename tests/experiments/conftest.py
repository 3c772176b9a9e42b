"""Runs experiments as the command line does."""

import re
import sys

import pytest

from experiments import __main__ as cli


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        monkeypatch.chdir(tmp_path)
        cli.main()
        return tmp_path / "results"

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
