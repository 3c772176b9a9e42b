"""Accuracy against delay, on a small run."""

import csv

import numpy as np
import pytest


def test_delays(run):
    arguments = ["--models", "logistic", "--delays", "0", "100", "--rate", "0.03"]
    arguments += ["--iterations", "200", "--evaluations", "4", "--seeds", "2"]
    out = run("apam", *arguments) / "apam"
    assert (out / "logistic_digits.png").stat().st_size > 10_000
    with (out / "logistic_digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 4

    def accuracy(delay, gradients):
        return np.mean(
            [
                float(row["test_accuracy"])
                for row in rows
                if (row["delay"], row["gradients"]) == (delay, gradients)
            ]
        )

    assert accuracy("0", "200") > 0.85
    # Late gradients slow the start.
    assert accuracy("100", "50") < accuracy("0", "50") - 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delays", "-1"], "delays must be at least 0"),
        (["--evaluations", "7"], "evaluations=7 must divide iterations=2000"),
        (["--rate", "0"], "rate must be positive, got 0"),
    ],
)
def test_bad_options(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("apam", *arguments)
