"""Tests of experiments/data/tabular.py: both formats, broken files, windows, sMAPE."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data import tabular
from experiments.data.files import read_file
from tests.experiments.files import write_files

# a9a

A9A = {
    "a9a": "-1 3:1 11:1 \n+1 1:1 123:0.5\n-1 2:1\n",
    "a9a.t": "+1 122:1\n",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sub_folder", [".", "libsvm"])
def test_a9a_is_read(tmp_path: Path, zipped: bool, sub_folder: str):
    write_files(tmp_path / sub_folder, A9A, zipped)
    table = tabular.load_a9a(tmp_path)
    x_train, x_test = np.zeros((3, 123)), np.zeros((1, 123))
    x_train[[0, 0, 1, 1, 2], [2, 10, 0, 122, 1]] = 1, 1, 1, 0.5, 1
    x_test[0, 121] = 1
    expected = (x_train, [0, 1, 0], x_test, [1])
    for actual, array, dtype in zip(table, expected, ["f4", "i4"] * 2, strict=True):
        np.testing.assert_array_equal(actual, array, strict=False)
        assert actual.dtype == np.dtype(dtype)
        assert actual.shape == np.shape(array)


def test_the_folder_itself_and_the_first_name_take_precedence(tmp_path: Path):
    write_files(tmp_path, {"a": "own"}, zipped=True)
    write_files(tmp_path / "sub", {"a": "sub", "b": "other"})
    path, content = read_file(tmp_path, "sub", "a", "b")
    assert (path, content) == (tmp_path / "a.gz", b"own")
    path, content = read_file(tmp_path, "sub", "none", "b")
    assert (path, content) == (tmp_path / "sub" / "b", b"other")


def test_a9a_missing_file_is_named(tmp_path: Path):
    write_files(tmp_path, {"a9a": A9A["a9a"]})
    with pytest.raises(FileNotFoundError, match=r"holds no a9a\.t .* libsvm: put it"):
        tabular.load_a9a(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' holds no a9a "):
        tabular.load_a9a(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read|has the labels"),
        ("-1 124:1\n", "cannot be read .*124 features"),
        ("-1 0:1\n", "cannot be read .*Invalid index 0"),
        ("-1 3:one\n", "cannot be read"),
        ("<html>\n", "cannot be read"),
        ("2 3:1\n-1 3:1\n", r"has the labels \[-1\.  2\.\], expected -1 and 1"),
    ],
)
def test_a9a_broken_file_is_named(tmp_path: Path, content: str, message: str):
    write_files(tmp_path, A9A | {"a9a.t": content})
    with pytest.raises(ValueError, match=rf"a9a\.t ({message})"):
        tabular.load_a9a(tmp_path)


def test_broken_gzip_is_named(tmp_path: Path):
    write_files(tmp_path, A9A, zipped=True)
    path = tmp_path / "a9a.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a9a\.gz cannot be read .*fetch it again"):
        tabular.load_a9a(tmp_path)


# M4


def m4(train: dict[str, Any], test: dict[str, Any]) -> dict[str, str]:
    """Writes quoted rows as published: empty cells pad the training rows."""

    def rows(series: dict[str, Any], fill: int) -> str:
        lines = [[f"V{i}" for i in range(1, fill + 2)]]
        for name, values in series.items():
            values = [str(value) for value in values]
            lines.append([name, *values, *[""] * (fill - len(values))])
        return "".join(
            ",".join(f'"{v}"' if v else "" for v in line) + "\n" for line in lines
        )

    return {"Weekly-train.csv": rows(train, 40), "Weekly-test.csv": rows(test, 13)}


RNG = np.random.default_rng(0)
TRAIN = {"W1": RNG.uniform(900, 1100, 26).round(2), "W2": RNG.uniform(1, 2, 36)}
TEST = {"W1": RNG.uniform(900, 1100, 13).round(2), "W2": RNG.uniform(1, 2, 13)}


def assert_is_window(x: np.ndarray, y: np.ndarray, values: np.ndarray):
    """Undoes the scaling, which divides by the geometric mean of the inputs."""
    assert x.dtype == y.dtype == np.float32
    level = np.prod(values[:20]) ** (1 / 20)
    np.testing.assert_allclose(level * np.exp(x), values[:20], rtol=1e-6)
    np.testing.assert_allclose(level * np.exp(y), values[20:], rtol=1e-6)


@pytest.mark.parametrize(("zipped", "sub_folder"), [(False, "."), (True, "m4")])
def test_m4_windows_and_tests_hold_the_series(
    tmp_path: Path, zipped: bool, sub_folder: str
):
    write_files(tmp_path / sub_folder, m4(TRAIN, TEST), zipped)
    windows = tabular.load_m4_weekly(tmp_path)
    assert windows.x_train.shape == (1 + 11, 20)
    assert windows.y_train.shape == (1 + 11, 6)
    assert windows.x_test.shape == (2, 20)
    assert windows.y_test.shape == (2, 6)
    assert_is_window(windows.x_train[0], windows.y_train[0], TRAIN["W1"])
    for i in range(11):
        values = TRAIN["W2"][i : i + 26]
        assert_is_window(windows.x_train[1 + i], windows.y_train[1 + i], values)
    for i, name in enumerate(("W1", "W2")):
        values = np.concatenate([TRAIN[name][-20:], TEST[name][:6]])
        assert_is_window(windows.x_test[i], windows.y_test[i], values)


@pytest.mark.parametrize(
    ("windows", "kept"),
    [(1, [10]), (2, [4, 10]), (4, [1, 4, 7, 10]), (11, range(11)), (99, range(11))],
)
def test_m4_windows_may_be_fewer(tmp_path: Path, windows: int, kept):
    write_files(tmp_path, m4(TRAIN, TEST))
    complete = tabular.load_m4_weekly(tmp_path)
    some = tabular.load_m4_weekly(tmp_path, windows)
    rows = [0, *(1 + i for i in kept)]
    np.testing.assert_array_equal(some.x_train, complete.x_train[rows])
    np.testing.assert_array_equal(some.y_train, complete.y_train[rows])
    np.testing.assert_array_equal(some.x_test, complete.x_test)


def test_m4_missing_file_is_named(tmp_path: Path):
    write_files(tmp_path, {"Weekly-train.csv": m4(TRAIN, TEST)["Weekly-train.csv"]})
    with pytest.raises(FileNotFoundError, match=r"no Weekly-test\.csv .* m4: put it"):
        tabular.load_m4_weekly(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (m4({"W1": TRAIN["W1"][:25]}, TEST), "train.csv: series W1 has 25 values"),
        (m4(TRAIN, {"W2": TEST["W2"][:5]}), "test.csv: series W2 has 5 values"),
        (m4(TRAIN, {"W1": [0.0] * 13}), "test.csv: series W1 .*all positive"),
        (m4(TRAIN, {"W1": ["nan"] * 13}), "test.csv: series W1 .*all positive"),
        (m4(TRAIN, {"W1": ["inf"] * 13}), "test.csv: series W1 .*and finite"),
        (m4(TRAIN, {"W1": ["?"] * 13}), "test.csv cannot be read .*'?'"),
        (m4(TRAIN, {"W1": [1, "", *[2] * 9]}), "test.csv cannot be read"),
        (m4(TRAIN, {}), "test.csv holds no series"),
        (m4(TRAIN, {"W1": TEST["W1"], "W3": TEST["W2"]}), "the series W2, W3: put"),
    ],
)
def test_m4_broken_file_is_named(tmp_path: Path, files: dict[str, str], message: str):
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=message) as caught:
        tabular.load_m4_weekly(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_m4_refuses_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="windows_per_series=0: pass at least 1"):
        tabular.load_m4_weekly(tmp_path, 0)


def test_smape_is_that_of_m4():
    forecast = np.array([[1.0, 3.0], [0.0, -2.0]])
    actual = np.array([[3.0, 1.0], [5.0, -2.0]])
    np.testing.assert_allclose(tabular.smape(forecast, actual), (100 + 100 + 200) / 4)
    # Scales that differ by row cancel, even if the values do not.
    scale = np.array([[7.0], [0.1]])
    np.testing.assert_allclose(tabular.smape(scale * forecast, scale * actual), 100)


# Real files


@pytest.mark.skipif(
    "DECENTRAL_JAX_DATA" not in os.environ,
    reason="set DECENTRAL_JAX_DATA to a folder with a9a and M4 to read them",
)
def test_real_files_are_read():
    folder = os.environ["DECENTRAL_JAX_DATA"]
    a9a = tabular.load_a9a(folder)
    assert a9a.x_train.shape == (32561, 123)
    assert a9a.x_test.shape == (16281, 123)
    np.testing.assert_allclose(a9a.y_train.mean(), 0.2408, atol=1e-4)
    assert set(np.unique(a9a.x_train)) == {0.0, 1.0}

    windows = tabular.load_m4_weekly(folder, windows_per_series=4)
    assert windows.x_train.shape == (359 * 4, 20)
    assert windows.x_test.shape == (359, 20)
    last = np.repeat(windows.x_test[:, -1:], 6, axis=1)
    error = tabular.smape(np.exp(last), np.exp(windows.y_test))
    np.testing.assert_allclose(error, 7.56, atol=0.01)
