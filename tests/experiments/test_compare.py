"""The experiments run from the command line and write the documented files."""

import functools

import numpy as np
import pytest

import decentral_jax as dj
from experiments import catalog, report, settings
from experiments.runs import compare
from experiments.training import loop, models, results
from tests.experiments.files import read_charts

QUICK = ["--iterations", "24", "--evaluations", "2", "--seeds", "2", "--rates", "0.1"]


def read(path):
    return report.read_csv(path)


def test_compare(run, capsys):
    chosen = ["all-reduce SGD", "DeTAG", "DEF-A", "MLL-SGD", "Local SGD"]
    out = run("compare", *QUICK, "--algorithms", *chosen)
    for figure in ("compare", "compare_accuracy"):
        assert (out / f"{figure}.png").stat().st_size > 10_000
    rows = read(out / "compare.csv")
    names = {row["algorithm"] for row in rows}
    assert len(rows) == len(names) * 2 * 2
    assert names == set(chosen)
    seconds = {row["algorithm"]: float(row["simulated_seconds"]) for row in rows}
    # Algorithms that wait need at least 24 gradients of 20 ms on the slow worker.
    assert seconds["Local SGD"] > 0.48
    assert seconds["MLL-SGD"] < seconds["all-reduce SGD"]
    # By default, the link is slow: messages take more time than gradients.
    assert seconds["all-reduce SGD"] > 5 * 0.48
    printed = capsys.readouterr().out
    assert "MB sent" in printed
    assert all(name.split(",")[0] in printed for name in names)


def test_every_algorithm_of_compare_traces():
    """For several numbers of workers that the command line accepts."""
    for n in (2, 3, 8):
        setting = small_setting(parts=np.zeros((n, 4), int))
        entries = catalog.everything(dj.topology.ring(n).lazy(0.5), rounds=2)
        assert len(entries) > 18
        for entry in entries.values():
            log = loop.step_log(entry.make, setting, entry.levels)
            assert len(log) == log.period
            sent = loop.bytes_sent(log, 16)
            assert sent[-1] > 0 or n < 3
            seconds = settings.Network().seconds(entry, log, n, 16)
            assert (np.diff(seconds) > 0).all()


def test_detag_figures(run):
    figures = ["--fractions", "0", "--kappas", "0.1", "1", "--model", "logistic"]
    out = run("detag", *QUICK, *figures)
    for name, cells in (("fractions", 1), ("kappas", 2)):
        assert (out / f"{name}.png").stat().st_size > 10_000
        rows = read(out / f"{name}.csv")
        assert len({(row["kappa"], row["shuffled"]) for row in rows}) == cells
    assert len(read_charts(out / "detag.html")) == 2


def test_def_figures(run):
    """DEF sends a fraction of dense SGD's bytes; DEF-A evaluates the same run."""
    out = run("def", *QUICK, "--ratios", "16", "--model", "logistic")
    assert (out / "ratio_16.png").stat().st_size > 10_000
    rows = {
        (row["algorithm"], row["seed"], row["iteration"]): row
        for row in read(out / "def.csv")
    }
    end = {name: rows[name, "0", "24"] for name in ("dense SGD", "DEF", "DEF-A")}
    sent = {name: float(row["megabytes_sent"]) for name, row in end.items()}
    # The blocks send 40 of 640 weights and 1 of 10 biases.
    assert sent["DEF"] == pytest.approx(sent["dense SGD"] * 41 / 650, rel=1e-3)
    assert end["DEF"]["consensus_distance"] == end["DEF-A"]["consensus_distance"]
    assert end["DEF"]["train_loss"] != end["DEF-A"]["train_loss"]
    (chart,) = read_charts(out / "def.html")
    assert list(chart) == ["dense SGD", *catalog.compressed(16)]
    losses = [float(rows["DEF", seed, "24"]["train_loss"]) for seed in ("0", "1")]
    assert chart["DEF"][-1] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "no --data-dir, but --dataset 'mnist' is read"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--model", "small_mlq"], "--model 'small_mlq'.* mean 'small_mlp'"),
        (
            ["--iterations", "10", "--evaluations", "3"],
            "--evaluations 3 must divide --iterations 10",
        ),
        (["--rates", "-1"], "--rates must be positive"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--kappa", "2"], "--kappa must lie in"),
        (["--slow", "0.5"], "--slow must be at least 1, got 0.5"),
        (["--algorithms", "d-psg"], "--algorithms 'd-psg'.* mean 'D-PSGD'"),
        (["--algorithms", "Adamw"], "'Adamw' is unknown. Pass one of 'all-reduce"),
        (["--shuffled", "101"], "--shuffled 101"),
    ],
)
def test_bad_options_end_with_one_clear_line(fails, arguments, message):
    fails(message, "compare", *arguments)


def test_options_of_another_type(run):
    with pytest.raises(SystemExit) as stop:
        run("compare", "--workers", "1.5")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["def", "--ratios", "0.5"], "--ratios must lie in"),
        (["detag", "--kappas", "2"], "--kappas must lie in"),
        (["synthetic", "--kappa", "2"], "--kappa must lie in"),
        (["synthetic", "--iterations", "0"], "--iterations must be at least 1, got 0"),
    ],
)
def test_bad_options_of_other_commands(fails, arguments, message):
    fails(message, *arguments)


def test_mistakes_in_the_code_show_a_traceback(run, monkeypatch):
    def broken(*args):
        raise ValueError("broken")

    monkeypatch.setattr(results, "train", broken)
    with pytest.raises(ValueError, match="broken"):
        run("compare", *QUICK, "--algorithms", "DSGT")


def small_setting(**changes):
    options = compare.Compare(
        iterations=16, evaluations=2, seeds=2, rates=(0.1, 0.2), model="logistic"
    )
    return options.setting(0.0)._replace(**changes)


def test_runs_in_one_program_equal_runs_alone():
    """Rates and seeds in one program are independent of each other."""
    topology = dj.topology.ring(8).lazy(0.5)
    together = loop.train(lambda rate: dj.dsgt(rate, topology), small_setting())
    alone = loop.train(
        lambda rate: dj.dsgt(rate, topology), small_setting(rates=(0.2,), seeds=(1,))
    )
    for name in ("train_loss", "test_accuracy", "consensus"):
        both, one = getattr(together, name), getattr(alone, name)
        np.testing.assert_allclose(both[1, 1], one[0, 0], rtol=1e-4, atol=1e-6)
    assert together.train_loss[0, 0, -1] != together.train_loss[1, 0, -1]
    assert together.train_loss[0, 0, -1] != together.train_loss[0, 1, -1]


def test_bytes_sent_follow_the_phases():
    setting = small_setting(iterations=20)
    topology = dj.topology.ring(8)
    weights = 650 * 4  # logistic regression on 64 pixels and 10 classes, float32
    log = loop.step_log(lambda r: dj.d_psgd(r, topology), setting)
    sent = loop.bytes_sent(log, 20)
    np.testing.assert_allclose(sent, 2 * weights * np.arange(21))
    log = loop.step_log(lambda r: dj.defacto(r, topology), setting)
    assert log.period == 8
    sends = np.arange(20) % 8 >= 4
    expected = 2 * weights * np.cumsum(sends)
    np.testing.assert_allclose(loop.bytes_sent(log, 20)[1:], expected)


def test_phase_length_grows_with_sparsity():
    lengths = [
        catalog.phase_length(dj.topology.ring(16).lazy(kappa))
        for kappa in (1, 0.1, 0.01)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] > 1
    assert catalog.phase_length(dj.topology.complete(8)) == 1


def test_models_that_the_documentation_names():
    assert set(models.MODELS) >= {"small_mlp", "logistic", "resnet20"}


def test_compare_covers_all_synchronous_algorithms(monkeypatch):
    called = set()

    def record(name, real, *args, **kwargs):
        called.add(name)
        return real(*args, **kwargs)

    for name in dj.algorithms.__all__:
        recorded = functools.partial(record, name, getattr(dj, name))
        monkeypatch.setattr(dj, name, recorded)
    topology = dj.topology.ring(8).lazy(0.5)
    for entry in catalog.everything(topology, rounds=2).values():
        entry.make(0.1)
    assert set(dj.algorithms.__all__) - called == {"apam"}
