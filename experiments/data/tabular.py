"""Loads tabular data sets: a9a for classification, and M4 weekly for forecasting.

This module does not download anything: each loader reads the published files,
optionally gzipped, from a folder.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.data.files import read_file, readable
from experiments.errors import UsageError

WINDOW = 20  # number of values that a forecast is based on
HORIZON = 6  # number of values to forecast

_A9A_FEATURES = 123


class Table(NamedTuple):
    """Training and test examples with two classes, in memory."""

    x_train: np.ndarray  # shape=[N, features], dtype=float32
    y_train: np.ndarray  # shape=[N], dtype=int32, values 0 and 1
    x_test: np.ndarray  # shape=[M, features], dtype=float32
    y_test: np.ndarray  # shape=[M], dtype=int32, values 0 and 1


class Windows(NamedTuple):
    """Windows of time series (inputs) and the values that follow (targets), as logs."""

    x_train: np.ndarray  # shape=[N, 20], dtype=float32
    y_train: np.ndarray  # shape=[N, 6], dtype=float32
    x_test: np.ndarray  # shape=[series, 20], dtype=float32
    y_test: np.ndarray  # shape=[series, 6], dtype=float32


def load_a9a(data_dir: str | Path) -> Table:
    """Loads LIBSVM's a9a: whether a person earns more than 50,000 dollars per year.

    Args:
      data_dir: Folder with the files `a9a` and `a9a.t`, optionally gzipped, or with a
        subfolder `libsvm` that holds them.

    Returns:
      32,561 training and 16,281 test examples of 123 features, each 0 or 1.

    Raises:
      MissingFileError: If a file is missing.
      UsageError: If a file is broken.
    """
    return Table(*_read_a9a(data_dir, "a9a"), *_read_a9a(data_dir, "a9a.t"))


def load_m4_weekly(
    data_dir: str | Path, windows_per_series: int | None = None
) -> Windows:
    """Loads the weekly series of the M4 competition, cut into windows.

    A training window consists of 20 consecutive values of a series, the input, and the
    6 values that follow, the target. The test window of a series consists of its last
    20 training values and its first 6 test values, which no training window contains.

    The loader takes the logarithm of all 26 values and subtracts the mean logarithm of
    the first 20. Inputs are therefore centered and do not depend on the level of the
    series, errors are relative (0.01 is one percent), and sudden jumps, which reach a
    factor of 50, do not dominate the loss as ratios would. Because the scale of a
    series cancels in `smape`, its value for `exp(forecast)` and `exp(target)` equals
    the value in the units of the series.

    Args:
      data_dir: Folder with `Weekly-train.csv` and `Weekly-test.csv`, optionally
        gzipped, or with a subfolder `m4` that holds them.
      windows_per_series: Maximum number of training windows per series, evenly spaced
        and always with the last window. If None, all windows, one per week.

    Returns:
      The windows. Windows of one series are consecutive, in temporal order.

    Raises:
      MissingFileError: If a file is missing.
      UsageError: If a file is broken, or `windows_per_series` is less than 1.
    """
    if windows_per_series is not None and windows_per_series < 1:
        raise UsageError(
            f"windows_per_series={windows_per_series!r}: pass at least 1, or None for "
            "all windows."
        )
    train = _read_m4(data_dir, "Weekly-train.csv", at_least=WINDOW + HORIZON)
    test = _read_m4(data_dir, "Weekly-test.csv", at_least=HORIZON)
    unpaired = sorted(train.keys() ^ test.keys())
    if unpaired:
        raise UsageError(
            f"data_dir='{data_dir}': only one of Weekly-train.csv and Weekly-test.csv "
            f"holds the series {', '.join(unpaired)}: put both files of one release "
            "there."
        )
    # Training windows: evenly spaced ones from each series, up to its last window.
    windows = []
    for series in train.values():
        candidates = np.lib.stride_tricks.sliding_window_view(series, WINDOW + HORIZON)
        count = len(candidates)
        kept = min(windows_per_series or count, count)
        windows.append(candidates[np.arange(1, kept + 1) * count // kept - 1])
    # Test windows: the end of each training series, and the start of its test series.
    last = [
        np.concatenate([series[-WINDOW:], test[name][:HORIZON]])
        for name, series in train.items()
    ]
    return Windows(*_split(np.concatenate(windows)), *_split(np.stack(last)))


def smape(
    forecast: jax.Array | np.ndarray, actual: jax.Array | np.ndarray
) -> jax.Array | np.floating:
    r"""Computes the symmetric mean absolute percentage error as M4 defines it.

    .. math:: \operatorname{mean} \frac{200 |f - a|}{|f| + |a|}

    Args:
      forecast: Forecast values :math:`f`, any shape.
      actual: True values :math:`a`, same shape, nonzero.

    Returns:
      The error in percent, from 0 to 200, a scalar.
    """
    error = abs(forecast - actual) / (abs(forecast) + abs(actual))
    return 200 * error.mean()


def _read_a9a(data_dir: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    # Imported here because the import takes about a second, and only a9a needs it.
    from sklearn.datasets import load_svmlight_file

    path, content = read_file(data_dir, "libsvm", name)
    with readable(path):
        x, labels = load_svmlight_file(
            io.BytesIO(content),
            n_features=_A9A_FEATURES,
            zero_based=False,  # pyright: ignore[reportArgumentType]  (typed as str)
        )
    if labels.size == 0 or not np.isin(labels, (-1, 1)).all():
        raise UsageError(
            f"{path} has the labels {np.unique(labels)}, expected -1 and 1: it is not "
            f"{name}; fetch it again."
        )
    return x.toarray().astype(np.float32), (labels > 0).astype(np.int32)


def _read_m4(data_dir: str | Path, name: str, at_least: int) -> dict[str, np.ndarray]:
    """Returns a dictionary from series names to values, one series per row of a CSV."""
    path, content = read_file(data_dir, "m4", name)
    table = {}
    with readable(path):
        for row in list(csv.reader(io.StringIO(content.decode(), newline="")))[1:]:
            while not row[-1]:  # short rows are padded with empty cells
                row.pop()
            table[row[0]] = np.array(row[1:], np.float64)
    if not table:
        raise UsageError(f"{path} holds no series: fetch it again.")
    for series, values in table.items():
        if values.size < at_least or not (0 < values.min() <= values.max() < np.inf):
            raise UsageError(
                f"{path}: series {series} has {values.size} values, expected at least "
                f"{at_least}, all positive and finite: fetch the file again."
            )
    return table


def _split(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits windows, `[N, 26]`, into inputs and targets, as centered logarithms."""
    logs = np.log(windows)
    logs -= logs[:, :WINDOW].mean(1, keepdims=True)
    x, y = np.split(logs.astype(np.float32), [WINDOW], axis=1)
    return x, y
