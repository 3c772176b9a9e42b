"""The experiment on hubs and workers runs from the command line."""

import numpy as np
import pytest

from experiments import report
from experiments.runs import multi_level
from tests.experiments.files import read_charts

SMALL = ["--hubs", "2", "--workers", "5", "--tau", "2", "--q", "2", "--seeds", "2"]
SMALL += ["--rounds", "12", "--evaluations", "12", "--learning-rate", "0.5"]


def test_hierarchy_rates_and_slots(run):
    parts = ("hierarchy", "rates", "slots")
    out = run("mll-sgd", *SMALL, "--parts", *parts)
    for part in parts:
        assert (out / f"{part}.png").stat().st_size > 10_000
    rows = report.read_csv(out / "mll_sgd.csv")
    charts = read_charts(out / "mll_sgd.html")
    assert [len(chart) for chart in charts] == [4, 5, 4]

    def last(part, name):
        losses = [
            float(row["train_loss"])
            for row in rows
            if (row["part"], row["algorithm"], row["iteration"]) == (part, name, "48")
        ]
        assert len(losses) == 2
        return np.mean(losses)

    losses = [last("hierarchy", name) for name in ("distributed SGD", "MLL-SGD")]
    assert max(losses) < 0.6
    assert len({*losses, last("hierarchy", "Local SGD")}) == 3
    # Workers that take more steps reach a lower loss.
    assert last("hierarchy", "MLL-SGD") < last("rates", "all .55") - 0.05
    waited = {
        row["algorithm"]: float(row["simulated_seconds"])
        for row in rows
        if row["part"] == "slots" and row["iteration"] == "48"
    }
    assert waited["MLL-SGD"] == 48
    assert waited["distributed SGD, waiting"] > waited["Local SGD, waiting"] > 48


def test_shapes(run):
    """One hub with all workers, and hubs with one worker each."""
    shape = ["--hubs", "2", "--workers", "1", "--parts", "shapes"]
    out = run("mll-sgd", *SMALL, *shape)
    names = {row["algorithm"] for row in report.read_csv(out / "mll_sgd.csv")}
    assert names == {"1 hubs x 2 workers", "2 hubs x 1 workers"}


def test_rates_have_the_published_mean():
    rates = multi_level.distributions(100)
    means = {name: values.mean() for name, values in rates.items()}
    assert means.pop("all 1") == 1
    assert all(mean == pytest.approx(0.55) for mean in means.values())
    assert all((values > 0).all() for values in rates.values())
    assert (rates["10% .1, rest .6"] == 0.1).sum() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "no --data-dir, but --dataset 'mnist'"),
        (["--tau", "0"], "--tau must be at least 1"),
        (
            ["--rounds", "10", "--evaluations", "3"],
            "--evaluations 3 must divide --rounds 10",
        ),
    ],
)
def test_bad_options(fails, arguments, message):
    fails(message, "mll-sgd", *arguments)
