"""The documented examples run and learn: Flax linen, Flax nnx, and the README."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.examples import load

ROOT = Path(__file__).parent.parent.parent


# Bounds on what `main` returns, for each program in docs/examples.
METRICS = {
    "asynchronous_ray": (0.85, 1.0),
    "character_model": (0.0, 2.2),  # the frequencies of pairs give 2.32
    "flax_linen": (0.9, 1.0),
    "flax_nnx": (0.9, 1.0),
    "image_classifier": (0.96, 1.0),
    "image_classifier_linen": (0.96, 1.0),
    "lora": (0.9, 1.0),
    "ordered_examples": (0.93, 1.0),
    "sweep": (0.92, 1.0),
}
# Optional packages of single programs.
NEEDS = {"ordered_examples": "grain"}


# Ray forks processes, and JAX warns about forks.
@pytest.mark.filterwarnings(r"ignore:os\.fork:RuntimeWarning")
@pytest.mark.parametrize("name", METRICS)
def test_flax_example_learns(name, standard_promotion):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    low, high = METRICS[name]
    assert low < load(name).main() <= high


def test_grain_loads_the_examples_in_the_given_order():
    pytest.importorskip("grain", reason="needs Grain: pip install grain")
    module = load("ordered_examples")
    records, _ = module.load_digits()
    shape = module.NUM_WORKERS, module.PER_WORKER
    order = np.random.default_rng(0).permuted(np.indices(shape)[1], axis=1)
    workers = [2, 5]  # those of one process
    loaded = list(module.batches(records, order, workers))
    for part, images in ((0, True), (1, False)):
        found = np.concatenate([batch[part] for batch in loaded], axis=1)
        for row, worker in zip(found, workers, strict=True):
            expected = [records[worker][i][part] for i in order[worker]]
            np.testing.assert_array_equal(row * (16 if images else 1), expected)


def test_readme_example_runs_as_printed(capsys, standard_promotion):
    """The first block runs alone and prints what the README says; two build on it."""
    text = (ROOT / "README.md").read_text()
    program, cost, others = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(program, names)
    assert capsys.readouterr().out.strip() in text
    exec(cost, names)
    assert f"{float(capsys.readouterr().out):,.0f} bytes per step" in text
    # Without compression, as the README says.
    learning = program.replace(*re.findall(r"tx = (dj\.\w+\(.*?\))(?:  #|`)", text)[:2])
    exec(learning, names)
    assert names["tx"] is not None
    assert "accuracy of " + capsys.readouterr().out.split()[-1] in text
    exec(cost, names)
    assert f"{float(capsys.readouterr().out):,.0f} bytes" in text
    for line in filter(None, others.splitlines()):
        exec(line, names)
        names["tx"].init(names["params"])


def test_two_set_up_commands():
    """The README has exactly two setup commands; .ci/run runs the second."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^pip install.*$", text, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python -m experiments compare")
    assert commands[1].endswith("python -m pytest")
