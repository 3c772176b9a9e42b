"""Metrics: summaries over workers, and loggers that survive crashes and resumes."""

import csv
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import decentral_jax as dj
from decentral_jax.metrics import (
    CSV,
    JSONLines,
    Logger,
    Loggers,
    ProgressBar,
    TensorBoard,
    summarize,
)

ROOT = Path(__file__).parent.parent.parent


def rows_of(path):
    """The rows of a file, with numbers in place of text."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    rows = csv.DictReader(text.splitlines())
    return [{k: float(v) for k, v in row.items() if v} for row in rows]


# Summaries


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_summary_of_a_step(devices):
    workers = dj.Workers(8, devices=jax.devices()[:devices])

    def step(x):
        return {
            "loss": x,
            "train": {"correct": x > 2, "half": x.astype(jnp.bfloat16)},
            "count": jnp.int32(3) + dj.worker_index(),
        }

    step_metrics = workers.spmd(step)(jnp.arange(8.0))
    found = summarize(step_metrics, workers)
    assert found == {
        "count": 6.5,
        "loss": 3.5,
        "train/correct": 5 / 8,
        "train/half": 3.5,
    }
    assert all(type(value) is float for value in found.values())
    found = summarize({"loss": step_metrics["loss"]}, workers, detail="range")
    assert found == {"loss": 3.5, "loss/min": 0, "loss/max": 7}
    found = summarize({"loss": step_metrics["loss"]}, workers, detail="workers")
    each = {f"loss/worker_{i}": i for i in range(8)}
    assert found == {"loss": 3.5, "loss/min": 0, "loss/max": 7, **each}


def test_summary_of_nested_workers():
    workers = dj.Workers({"hub": 2, "worker": 2})
    found = summarize([jnp.array([[0.0, 1], [2, 3]])], workers, detail="workers")
    each = {f"0/worker_{i}": i for i in range(4)}
    assert found == {"0": 1.5, "0/min": 0, "0/max": 3, **each}


def test_a_diverged_worker_is_visible():
    workers = dj.Workers(4)
    losses = jnp.array([1, 1, jnp.nan, 1])
    found = summarize({"loss": losses}, workers, detail="workers")
    assert [np.isnan(found[k]) for k in ("loss", "loss/min", "loss/max")] == [True] * 3
    assert [name for name, x in found.items() if "_" in name and np.isnan(x)] == [
        "loss/worker_2"
    ]


@pytest.mark.parametrize(
    ("metrics", "detail", "error", "match"),
    [
        (np.ones(4), "mean", ValueError, "got one array"),
        ({"loss": np.ones((4, 2))}, "mean", ValueError, r"shape \(4, 2\) at loss"),
        ({"loss": np.ones(3)}, "mean", ValueError, "leading axes"),
        ({"loss": 1.0}, "mean", ValueError, "leading axes"),
        ({"loss": "low"}, "mean", TypeError, "got 'low'"),
        ({"loss": np.ones(4)}, "all", ValueError, "detail must be one of 'mean'"),
        (
            {"loss": np.ones(4), "loss/min": np.ones(4)},
            "range",
            ValueError,
            "'loss/min' is repeated",
        ),
    ],
)
def test_bad_metrics(metrics, detail, error, match):
    with pytest.raises(error, match=match):
        summarize(metrics, dj.Workers(4), detail)


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_averages_by_flax(devices, standard_promotion):
    """As docs/training.md shows: running averages in the state of each worker."""
    workers = dj.Workers(8, devices=jax.devices()[:devices])

    def train_step(averages, x):
        averages.update(loss=x, logits=jnp.stack([x, -x], -1), labels=x.astype(int) % 2)
        return averages

    def new():
        return workers.replicate(
            nnx.MultiMetric(
                loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
            )
        )

    step = workers.spmd(train_step, donate_argnums=0)
    compute = workers.spmd(lambda averages: averages.compute())
    values = np.random.default_rng(0).integers(-9, 9, (5, 8, 3)).astype(np.float32)
    averages = new()
    for x in values:
        averages = step(averages, workers.shard(x))
    found = summarize(compute(averages), workers, detail="workers")
    for i in range(8):
        x = values[:, i]
        assert found[f"loss/worker_{i}"] == pytest.approx(x.mean(), abs=1e-6)
        correct = (x < 0) == (x.astype(int) % 2 == 1)
        assert found[f"accuracy/worker_{i}"] == pytest.approx(correct.mean())
    averages = step(new(), workers.shard(values[0]))
    found = summarize(compute(averages), workers)
    assert found["loss"] == pytest.approx(values[0].mean(), abs=1e-6)


# Files


@pytest.fixture(params=["jsonl", "csv"])
def make(request, tmp_path):
    """Makes loggers of one kind for one path."""
    path = tmp_path / "new" / f"metrics.{request.param}"
    kind = {"jsonl": JSONLines, "csv": CSV}[request.param]

    def make(start=None):
        return kind(path, start)

    make.path = path
    return make


def log(logger, steps, offset=0.0):
    for step in steps:
        logger.log(step, {"loss": step + offset, "lr": 0.1})


def expected(steps, offset=0.0):
    return [{"step": step, "loss": step + offset, "lr": 0.1} for step in steps]


def test_rows(make):
    with make() as logger:
        log(logger, [0, 10, 10, 20])
    assert rows_of(make.path) == expected([0, 10, 10, 20])


def test_values(make):
    """All digits, whatever holds the number; NaN and infinity, too."""
    values = {
        "third": 1 / 3,
        "jax": jnp.float32(0.1),
        "numpy": np.int64(7),
        "huge": 1e300,
        'a, "quoted" name': 2.0,
        "infinite": np.inf,
        "missing": np.nan,
    }
    with make() as logger:
        logger.log(1, values)
    (row,) = rows_of(make.path)
    assert row.pop("step") == 1
    np.testing.assert_equal(row, {k: float(v) for k, v in values.items()})


def test_resuming_does_not_repeat_steps(make):
    with make() as logger:
        log(logger, [0, 10, 29, 30, 31, 40])
    # The checkpoint is of step 30: what came after it is run again.
    with make(start=30) as logger:
        log(logger, [31, 40, 50], offset=0.5)
    kept = expected([0, 10, 29, 30])
    assert rows_of(make.path) == kept + expected([31, 40, 50], 0.5)
    assert os.listdir(make.path.parent) == [make.path.name]


def test_resuming_where_nothing_is_to_be_removed(make):
    with make() as logger:
        log(logger, [10, 20])
    before = make.path.read_text()
    with make(start=25) as logger:
        assert make.path.read_text() == before
        log(logger, [30])
    assert rows_of(make.path) == expected([10, 20, 30])


def test_starting_anew(make):
    """Also with other metrics."""
    with make(start=0) as logger:
        log(logger, [10, 20])
    with make(start=0) as logger:
        logger.log(10, {"other": 1})
    assert rows_of(make.path) == [{"step": 10, "other": 1}]


def test_an_existing_file_is_not_overwritten(make):
    with make() as logger:
        log(logger, [10])
    with pytest.raises(FileExistsError, match="start=0"):
        make()
    assert rows_of(make.path) == expected([10])


@pytest.mark.parametrize("text", ["hello", "hello\n", "x,step\n1,2\n", '{"a": 1}\n'])
def test_other_files_are_not_changed(make, text):
    make.path.parent.mkdir()
    make.path.write_text(text)
    with pytest.raises(ValueError, match="does not hold rows"):
        make(start=0)
    assert make.path.read_text() == text


def test_incomplete_rows_are_removed(make):
    """As a crash leaves them, after any byte."""
    with make() as logger:
        log(logger, [10, 20])
    text = make.path.read_text()
    for cut in range(1, len(text) + 1):
        make.path.write_text(text[:cut])
        with make(start=15) as logger:
            log(logger, [20], offset=0.5)
        first = expected([10]) if text[:cut].count("\n") > (text[0] == "s") else []
        assert rows_of(make.path) == first + expected([20], 0.5), text[:cut]


def test_rows_survive_a_kill(make):
    kind = "JSONLines" if make.path.suffix == ".jsonl" else "CSV"
    program = f"""
import os, signal
import decentral_jax as dj
logger = dj.metrics.{kind}({str(make.path)!r})
for step in (1, 2, 3):
    logger.log(step, {{"loss": step, "lr": 0.1}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment)
    assert ended.returncode == -9
    assert rows_of(make.path) == expected([1, 2, 3])


def test_json_lines_accept_new_metrics(tmp_path):
    with JSONLines(tmp_path / "metrics.jsonl") as logger:
        logger.log(1, {"loss": 1})
        logger.log(1, {"accuracy": 0.5})
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": 1}, {"step": 1, "accuracy": 0.5}]


def test_csv_refuses_new_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    with CSV(path) as logger:
        logger.log(1, {"loss": 1, "accuracy": 0.5})
        with pytest.raises(ValueError, match=r"metrics\.csv, got lr, mu: log all"):
            logger.log(2, {"loss": 1, "lr": 0.1, "mu": 2})
        logger.log(3, {"accuracy": 0.75})
    # Also after a resume.
    with CSV(path, start=3) as logger:
        with pytest.raises(ValueError, match="got lr: log all"):
            logger.log(4, {"lr": 1})
        logger.log(4, {"accuracy": 0.8, "loss": 0.25})
    assert path.read_text() == "step,loss,accuracy\n1,1.0,0.5\n3,,0.75\n4,0.25,0.8\n"


def test_bad_rows(make):
    with make(start=5) as logger:
        with pytest.raises(ValueError, match="step must be at least 6, got 5"):
            logger.log(5, {"loss": 1})
        log(logger, [8])
        with pytest.raises(ValueError, match="step must be at least 8, got 7"):
            logger.log(7, {"loss": 1})
        with pytest.raises(TypeError, match=r"at 'loss': pass dj\.metrics\.summarize"):
            logger.log(8, {"loss": np.ones(4)})
        with pytest.raises(ValueError, match='the name "step"'):
            logger.log(8, {"step": 1})
        with pytest.raises(TypeError, match="step must be an integer"):
            logger.log(8.0, {"loss": 1})
    with pytest.raises(ValueError, match="closed file"):
        log(logger, [9])
    assert rows_of(make.path) == expected([8])
    with pytest.raises(ValueError, match="start must be at least 0"):
        make(start=-1)


# Other loggers


def events(folder):
    """The scalars in files of events, read as the format defines them."""
    from tensorboardX.proto.event_pb2 import Event

    found, sessions = [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while len(content) >= 8:
            # Length, checksum, event, checksum.
            (size,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + size:
                break  # still being written
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                sessions.append((event.step, event.session_log.status))
    return found, sessions


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    logger = TensorBoard(tmp_path)
    logger.log(10, {"loss": 0.5, "train/accuracy": np.float32(0.25)})
    # Before it is closed.
    deadline = time.monotonic() + 30
    while len(events(tmp_path)[0]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    rows, sessions = events(tmp_path)
    assert rows == [(10, "loss", 0.5), (10, "train/accuracy", 0.25)]
    assert sessions == []
    logger.close()
    with pytest.raises(TypeError, match="got 'low' at 'loss'"):
        logger.log(11, {"loss": "low"})


def test_tensorboard_resumes(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with TensorBoard(tmp_path, start=10) as logger:
        logger.log(20, {"loss": 0.25})
    rows, sessions = events(tmp_path)
    assert rows == [(20, "loss", 0.25)]
    # TensorBoard hides earlier events from step 11 on.
    assert sessions == [(11, 1)]


def test_progress_bar(capsys):
    with ProgressBar(200, start=50) as logger:
        logger.log(60, {"loss": 0.123456, "[b]x": 2})
    out = capsys.readouterr().out
    assert "60/200" in out
    assert "loss 0.1235  [b]x 2" in " ".join(out.split("\n"))


def test_several_loggers(tmp_path):
    class Failing(Logger):
        closed = False

        def log(self, step, metrics):
            self.last = step, metrics

        def close(self):
            self.closed = True
            raise OSError("disk full")

    failing = Failing()
    files = [JSONLines(tmp_path / "a.jsonl"), JSONLines(tmp_path / "b.jsonl")]
    logger = Loggers(files[0], failing, files[1])
    with pytest.raises(OSError, match="disk full"), logger:
        logger.log(3, {"loss": 1.0})
    assert failing.last == (3, {"loss": 1.0})
    assert failing.closed
    for path, file in zip(sorted(tmp_path.iterdir()), files, strict=True):
        assert rows_of(path) == [{"step": 3, "loss": 1}]
        with pytest.raises(ValueError, match="closed file"):
            file.log(4, {})


@pytest.mark.parametrize(
    ("package", "make", "match"),
    [
        ("tensorboardX", lambda: TensorBoard("runs"), r"decentral_jax\[tensorboard\]"),
        ("rich", lambda: ProgressBar(10), "pip install rich"),
    ],
)
def test_missing_packages_are_named(monkeypatch, package, make, match):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=match):
        make()


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Loggers(
        JSONLines(tmp_path / "a.jsonl"),
        CSV(tmp_path / "b.csv"),
        TensorBoard(tmp_path / "c"),
        ProgressBar(10),
    ) as logger:
        logger.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
