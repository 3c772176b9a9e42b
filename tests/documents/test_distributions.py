"""The source archive has the whole repository, and the wheel has only the library."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Files of the repository that the source archive leaves out.
LEFT_OUT: set[str] = set()
# Files that the build adds to the source archive.
ADDED = {"PKG-INFO", "setup.cfg"}

BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools changes sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def files():
    """Files of the repository: those that git tracks."""
    listed = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """Folder with a source archive and a wheel of exactly these files."""
    source = tmp_path_factory.mktemp("source")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # What lies in the folders of a checkout, but belongs in no archive.
    for name in ("tests/__pycache__/a.pyc", "docs/_build/a.html", "results/a.csv"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_source_archive(files, built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    assert files - names == LEFT_OUT
    assert names - files == ADDED
    for name in ("LICENSE", "CHANGELOG.md", "tests/conftest.py", "docs/index.md"):
        assert name in names


def test_wheel(files, built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        text = wheel.read(metadata).decode()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {name for name in files if name.startswith("decentral_jax/")}
    assert "decentral_jax/py.typed" in package
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "\nLicense-Expression: MIT\n" in text
    assert "\nRequires-Python: >=3.11\n" in text


def test_versions_agree():
    """Versions that are written in two places are the same in both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\n## {project['version']} " in (ROOT / "CHANGELOG.md").read_text()
    (ruff,) = [x for x in project["optional-dependencies"]["lint"] if "ruff" in x]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff==[\d.]+", hooks) == [ruff, ruff]
