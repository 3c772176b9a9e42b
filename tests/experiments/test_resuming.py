"""A resumed experiment does not repeat the parts that it has finished."""

import dataclasses
import shlex

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import decentral_jax as dj
from experiments import report
from experiments.runs import (
    compare,
    delays,
    herding,
    multi_level,
    real_time,
    synthetic,
)
from experiments.training import ordered, provenance, results, resuming

COMPARE = "compare --iterations 24 --evaluations 2 --rates 0.1"
COMPARE += " --algorithms all-reduce_SGD D-PSGD DSGT"
LEVELS = "mll-sgd --hubs 2 --workers 2 --tau 2 --q 2 --rounds 2 --evaluations 2"
TRAINING = "d-grab --parts training --tasks logistic --examples 40 --workers 4"
HERDING = "d-grab --parts herding --vectors 240 --shared-by 2 --rounds 2"
DELAYS = "apam --models logistic --parts delay --delays 0 1 2 --iterations 4"
TIME = "apam --models logistic --parts speedup --workers 1 --speedup-workers 1 2"

# command -> (owner and name of the computation, interrupted call, file written)
CASES = {
    COMPARE + " --seeds 1": (results, "train", 2, "compare.csv"),
    LEVELS + " --parts hierarchy --seeds 1": (
        *(multi_level, "train", 3),
        "mll_sgd.csv",
    ),
    # Two calls per method: the rates, then the seeds at the best rate.
    TRAINING + " --epochs 1 --rates 0.1 0.2 --seeds 2": (
        *(ordered, "train", 4),
        "logistic_digits.csv",
    ),
    "synthetic --iterations 20 --seeds 1": (synthetic, "_errors", 3, "synthetic.csv"),
    HERDING + " --draws 2": (herding, "herding", 6, "herding.csv"),
    DELAYS + " --evaluations 2 --seeds 1": (
        *(delays, "accuracies", 2),
        "delay_logistic_digits.csv",
    ),
    TIME + " --gradients 4 --points 2 --seeds 2 --adaptive-rates 0.1": (
        *(real_time.Trainer, "_train", 3),
        None,  # measured times differ between runs
    ),
}


@pytest.mark.parametrize("command", CASES)
def test_resumes_after_an_interrupt(run, monkeypatch, capsys, command):
    owner, name, interrupted, file = CASES[command]
    arguments = [word.replace("_SGD", " SGD") for word in command.split()]
    real, known, stop, calls = getattr(owner, name), [], None, 0

    def compute(*args, **kwargs):
        """Computes each result once and replays it afterwards, to save time."""
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        if calls > len(known):
            known.append(real(*args, **kwargs))
        return known[calls - 1]

    monkeypatch.setattr(owner, name, compute)
    monkeypatch.setattr(
        report.Output, "figure", lambda self, name, figure: plt.close(figure)
    )
    whole = run(*arguments, "--out", "whole")
    total = calls
    assert total > interrupted

    calls, stop = 0, interrupted
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    again = f"{shlex.join(arguments)} --out results/{arguments[0]}/1 --resume"
    assert line == f"python -m experiments {again}"
    # If a part takes two calls, an interrupt of the second repeats the first.
    calls, stop = (interrupted - 1) // 2 * 2 if owner is ordered else interrupted - 1, 0
    written = run(*shlex.split(line)[3:])
    assert calls == total
    if file:
        assert report.read_csv(written / file) == report.read_csv(whole / file)
    calls = 0
    assert run(*arguments, "--resume") == written
    assert calls == 0


def test_memory(tmp_path, monkeypatch):
    options = compare.Compare(out=tmp_path, resume=True)
    computed = []

    def recall(options, name):
        def compute():
            computed.append(name)
            return {"x": np.arange(3), "seconds": 1.5}

        recalled = resuming.memory(options).recall(name, compute)
        np.testing.assert_array_equal(recalled["x"], [0, 1, 2])
        assert recalled["seconds"] == 1.5

    for _ in range(2):
        recall(options, "a")
    recall(options, "b")
    assert computed == ["a", "b"]
    # Other options, or `resume=False`, compute again.
    recall(dataclasses.replace(options, batch_size=2), "a")
    recall(dataclasses.replace(options, resume=False), "a")
    assert computed == ["a", "b", "a", "a"]
    recall(options, "a")
    assert computed == ["a", "b", "a", "a"]
    # Results of other code are not reused.
    monkeypatch.setattr(resuming, "code", lambda: "other")
    recall(options, "a")
    assert computed == ["a", "b", "a", "a", "a"]
    # The output folder may move.
    moved = dataclasses.replace(options, out=tmp_path / "elsewhere")
    assert resuming.memory(moved).folder.name == resuming.memory(options).folder.name


def test_memory_adds_up_the_seconds_of_its_parts(tmp_path, monkeypatch):
    options = compare.Compare(out=tmp_path, resume=True)
    clock = iter([1.0, 3.5, 10.0, 11.0])
    monkeypatch.setattr(resuming.time, "perf_counter", lambda: next(clock))
    for name in ("a", "b", "a"):
        resuming.memory(options).recall(name, lambda: {"x": 1})
    assert resuming.memory(options).seconds() == 3.5
    assert resuming.memory(compare.Compare(out=tmp_path, seeds=9)).seconds() == 0


def test_results_record_their_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "compare", "--out", "my results"])
    output = report.Output(compare.Compare(out=tmp_path, kappa=0.3))
    output.csv("x", [{"a": 1, "b": 2.5}])
    assert report.read_csv(tmp_path / "x.csv") == [{"a": "1", "b": "2.5"}]
    output.figure("x", plt.figure())
    output.table("x", report.Table("A title", ("a", "b"), [("1", "2*")]))
    texts = [
        (tmp_path / "x.csv").read_text(),
        Image.open(tmp_path / "x.png").text["Description"],
        (tmp_path / "x.md").read_text(),
    ]
    for text in texts:
        assert "command: python -m experiments compare --out 'my results'" in text
        # All options, not only those on the command line.
        assert "options: Compare(seeds=5, " in text
        assert "kappa=0.3, rounds=4," in text
        assert f"version: decentral_jax {dj.__version__}" in text
        assert f"jax {jax.__version__}" in text
        assert "device: 8 x cpu, " in text
        assert f"code: {provenance.code()}" in text
    assert texts[2].startswith("A title:\n\n| a | b |\n| --- | --- |\n| 1 | 2\\* |\n")
    assert "\n\\* the best rate is at the edge" in texts[2]


def test_only_instructions_count_as_code():
    """Prose may change without making results stale; numbers may not."""
    code = provenance._instructions
    plain = code("def f(x):\n    return x + 1\n")
    assert (
        code('"""A module."""\ndef f(x):\n    """Adds."""\n    return (x+1)  # !')
        == plain
    )
    assert code("def f(x):\n    return x + 2\n") != plain
    assert code('def f(x):\n    """Only prose."""\n') == code("def f(x):\n    pass\n")
