"""Every run has a folder of its own, which records what ran."""

import argparse
import json

import pytest

from experiments import folders
from experiments.errors import UsageError
from experiments.runs.synthetic import Synthetic
from experiments.training import provenance, resuming


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def claim(name="synthetic", **options):
    return str(folders.claim(name, Synthetic(**options)))


def test_numbers_go_on():
    assert [claim() for _ in range(11)][-1] == "results/synthetic/11"
    assert claim("other") == "results/other/1"
    # Numbers, not strings, are compared.
    assert claim() == "results/synthetic/12"
    (folders.ROOT / "synthetic" / "notes").mkdir()
    assert claim() == "results/synthetic/13"
    assert claim(resume=True) == "results/synthetic/13"


def test_two_runs_at_once(monkeypatch):
    assert claim() == "results/synthetic/1"
    monkeypatch.setattr(folders, "_numbered", lambda parent: [])
    assert claim() == "results/synthetic/2"


def test_resumes_the_latest_run_with_equal_options(monkeypatch):
    assert claim(seeds=3) == "results/synthetic/1"
    assert claim(seeds=3) == "results/synthetic/2"
    assert claim(seeds=4) == "results/synthetic/3"
    assert claim(seeds=3, resume=True) == "results/synthetic/2"
    assert claim(seeds=5, resume=True) == "results/synthetic/4"
    monkeypatch.setattr(resuming, "code", lambda: "other")
    assert claim(seeds=3, resume=True) == "results/synthetic/5"


def test_a_given_folder_is_never_overwritten(tmp_path):
    out = tmp_path / "mine"
    assert claim(out=out) == str(out)
    with pytest.raises(UsageError, match=r"mine is not empty: .*--resume"):
        claim(out=out)
    assert claim(out=out, resume=True) == str(out)
    with pytest.raises(UsageError, match="mine has the results of other options"):
        claim(out=out, seeds=9, resume=True)
    (out / folders.RECORD).write_text("[]")
    with pytest.raises(UsageError, match="mine has the results of other options"):
        claim(out=out, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        claim(out=out / folders.RECORD)


def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "synthetic", "--seeds", "3"])
    folder = folders.claim("synthetic", Synthetic(seeds=3))
    record = json.loads((folder / folders.RECORD).read_text())
    assert record["command"] == "python -m experiments synthetic --seeds 3"
    assert record["options"]["seeds"] == 3
    assert record["options"]["kappa"] == 0.1
    assert record["packages"] == provenance.packages()
    assert record["commit"] == provenance.commit()
    assert record["device"].startswith("8 x cpu, ")
    # A benchmark's options are no dataclass, and it cannot be resumed.
    folder = folders.claim("network", argparse.Namespace(out=None, hosts=8))
    assert str(folder) == "results/network/1"
    record = json.loads((folder / folders.RECORD).read_text())
    assert record["options"] == {"out": None, "hosts": 8}


def test_only_folders_without_results_are_discarded():
    first, second = (folders.claim("synthetic", Synthetic()) for _ in range(2))
    (second / "synthetic.csv").touch()
    folders.discard(second)
    assert (second / folders.RECORD).exists()
    folders.discard(first)
    assert not first.exists()
    (second / "synthetic.csv").unlink()
    folders.discard(second)
    assert not folders.ROOT.exists()


def test_failed_commands_leave_no_folder(fails):
    fails("--data-dir", "compare", "--dataset", "mnist", "--data-dir", "nowhere")
    assert not folders.ROOT.exists()
