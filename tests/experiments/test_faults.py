"""Training with missing workers, on a small run."""

import pytest

from experiments import report
from tests.experiments.files import read_charts


def test_missing_workers(run):
    arguments = ["--workers", "4", "--missing", "0", "1", "--iterations", "120"]
    arguments += ["--evaluations", "2", "--rates", "0.2", "--seeds", "2"]
    out = run("faults", *arguments, "--ratio", "2")
    assert (out / "faults.png").stat().st_size > 10_000
    rows = report.read_csv(out / "faults.csv")
    assert len(rows) == 2 * 3 * 2 * 2
    charts = read_charts(out / "faults.html")
    assert [list(chart) for chart in charts] == [["0 missing", "1 missing"]] * 3
    ends = {
        (row["missing"], row["algorithm"], row["seed"]): float(row["train_loss"])
        for row in rows
        if row["iteration"] == "120"
    }
    for (missing, algorithm, seed), loss in ends.items():
        assert loss < 2
        if missing == "1":
            assert loss != ends["0", algorithm, seed]


@pytest.mark.parametrize("missing", ["8", "-1"])
def test_bad_options(fails, missing):
    arguments = "faults", "--workers", "8", "--missing", missing
    fails("--missing .* less than --workers 8", *arguments)


def test_bad_ratio(fails):
    fails("--ratio must", "faults", "--ratio", "0.5", "--workers", "8")
