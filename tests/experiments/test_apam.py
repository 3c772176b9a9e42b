"""Small runs: accuracy versus delay, and wall-clock time of asynchronous training."""

import numpy as np
import pytest

from experiments import report
from experiments.runs import real_time
from tests.experiments.files import read_charts, write_files
from tests.experiments.test_tabular import A9A


def read(path):
    assert path.with_suffix(".png").stat().st_size > 10_000
    return report.read_csv(path)


def test_delays(run):
    arguments = ["--parts", "delay", "--models", "logistic", "--delays", "0", "100"]
    arguments += ["--rate", "0.03", "--iterations", "200", "--evaluations", "4"]
    out = run("apam", *arguments, "--seeds", "2")
    rows = read(out / "delay_logistic_digits.csv")
    assert len(rows) == 2 * 2 * 4
    (chart,) = read_charts(out / "apam.html")
    assert [len(y) for y in chart.values()] == [4, 4]

    def accuracy(delay, gradients):
        return np.mean(
            [
                float(row["test_accuracy"])
                for row in rows
                if (row["delay"], row["gradients"]) == (delay, gradients)
            ]
        )

    assert accuracy("0", "200") > 0.85
    # Delayed gradients slow down the start of training.
    assert accuracy("100", "50") < accuracy("0", "50") - 0.02


def test_time_and_speedup(run):
    arguments = ["--parts", "time", "speedup", "--models", "logistic", "--seeds", "2"]
    arguments += ["--gradients", "60", "--points", "3", "--workers", "3"]
    arguments += ["--adaptive-rates", "0.03", "--sgd-rates", "1e-9", "1"]
    arguments += ["--speedup-workers", "2", "1", "--goal", "20"]
    out = run("apam", *arguments)
    rows = read(out / "time_logistic_digits.csv")
    assert len(rows) == 2 * 3 * 2 * 3
    assert {row["speeds"] for row in rows} == {"equal", "one 3x slower"}
    # Tuning selects the rate that learns.
    rates = {row["method"]: row["rate"] for row in rows}
    assert rates["asynchronous SGD"] == "1.0"

    def seconds(speeds, method):
        return min(
            float(row["seconds"])
            for k, row in enumerate(rows)
            if (row["speeds"], row["method"], k % 3) == (speeds, method, 2)
        )

    # 20 gradients of 20 ms each, or 60 ms if all workers wait for a slow one.
    assert seconds("equal", "synchronous AMSGrad") > 0.38
    assert seconds("one 3x slower", "synchronous AMSGrad") > 3 * 0.38
    assert seconds("one 3x slower", "asynchronous AMSGrad") > 60 / (7 / 3) * 0.019
    rows = read(out / "speedup_logistic_digits.csv")
    assert [row["workers"] for row in rows] == ["1", "1", "2", "2"] * 2
    taken = {
        (row["method"], row["seed"], row["workers"]): float(row["seconds"])
        for row in rows
    }
    for row in rows:
        this = row["method"], row["seed"]
        # The workers share 60 gradients, each of which sleeps for at least 20 ms.
        assert taken[*this, row["workers"]] > 60 / int(row["workers"]) * 0.019
        expected = taken[*this, "1"] / taken[*this, row["workers"]]
        assert float(row["speedup"]) == pytest.approx(expected)


def test_a9a(run, tmp_path):
    write_files(tmp_path / "files", A9A)
    arguments = ["--dataset", "a9a", "--data-dir", str(tmp_path / "files")]
    arguments += ["--parts", "delay", "--models", "logistic", "--delays", "1"]
    arguments += ["--iterations", "4", "--evaluations", "2", "--seeds", "1"]
    rows = read(run("apam", *arguments) / "delay_logistic_a9a.csv")
    assert len(rows) == 2


def test_first_time():
    seconds = np.array([[1.0, 2, 3], [1, 4, 6]])
    reached = np.array([[False, True, False], [False, True, True]])
    assert real_time._first_time(seconds, reached) == "3.00 ± 1.00"
    assert real_time._first_time(seconds, reached & reached[:1]) == "3.00 ± 1.00"
    assert real_time._first_time(seconds, reached & ~reached[:1]) == "1 of 2 runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delays", "-1"], "--delays must be at least 0"),
        (["--evaluations", "7"], "--evaluations 7 must divide --iterations 2000"),
        (["--rate", "0"], "--rate must be positive, got 0"),
        (["--dataset", "a9a"], "lenet needs images, but --dataset a9a"),
        (["--dataset", "a9a", "--models", "logistic"], "a9a is read from files: pass"),
        (["--points", "7"], "--points 7 must divide --gradients 600"),
        (["--sleep-ms", "0"], "--sleep-ms must be positive"),
        (["--speedup-workers", "2"], "--speedup-workers must contain 1"),
    ],
)
def test_bad_options(fails, arguments, message):
    fails(message, "apam", *arguments)
