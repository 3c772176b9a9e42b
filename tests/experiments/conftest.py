"""Runs experiments as the command line does."""

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
