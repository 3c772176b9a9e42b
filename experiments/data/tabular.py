"""Read rows of numbers from local files: a9a to classify, M4 weekly to forecast.

Nothing here downloads: each loader takes a folder with the files as they are published,
or gzipped.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.data.files import read_file, readable
from experiments.errors import UsageError

WINDOW = 20  # values that a forecast sees
HORIZON = 6  # values that it foretells

_A9A_FEATURES = 123


class Table(NamedTuple):
    """Training and test examples with two classes, in memory."""

    x_train: np.ndarray  # shape=[N, features], dtype=float32
    y_train: np.ndarray  # shape=[N], dtype=int32, values 0 and 1
    x_test: np.ndarray  # shape=[M, features], dtype=float32
    y_test: np.ndarray  # shape=[M], dtype=int32, values 0 and 1


class Windows(NamedTuple):
    """Pieces of time series and what followed each, as logarithms, in memory."""

    x_train: np.ndarray  # shape=[N, 20], dtype=float32
    y_train: np.ndarray  # shape=[N, 6], dtype=float32
    x_test: np.ndarray  # shape=[series, 20], dtype=float32
    y_test: np.ndarray  # shape=[series, 6], dtype=float32


def load_a9a(data_dir: str | Path) -> Table:
    """Loads LIBSVM's a9a: does a person earn more than 50,000 dollars a year?

    Args:
      data_dir: Folder with the files ``a9a`` and ``a9a.t``, as they are or gzipped,
        or with a sub-folder ``libsvm`` which holds them.

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

    A training window is 20 consecutive values of a series and the 6 that follow. The
    test window of a series is its last 20 training values and the first 6 of its test
    values, which no training window contains.

    All 26 values become logarithms, less the mean of the first 20: inputs are centred,
    series of any level are alike, errors are relative (0.01 is a percent), and a sudden
    jump, up to 50-fold, does not outweigh all else as it would among ratios. What
    `smape` says of ``exp`` of forecasts and outputs holds for the values themselves.

    Args:
      data_dir: Folder with ``Weekly-train.csv`` and ``Weekly-test.csv``, as they are
        or gzipped, or with a sub-folder ``m4`` which holds them.
      windows_per_series: At most so many training windows of each series, evenly
        spread, its last always among them; None takes all, one a week.

    Returns:
      The windows; those of one series are consecutive, in order of time.

    Raises:
      MissingFileError: If a file is missing.
      UsageError: If a file is broken, or ``windows_per_series`` is below 1.
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
    windows = []
    for series in train.values():
        every = np.lib.stride_tricks.sliding_window_view(series, WINDOW + HORIZON)
        kept = min(windows_per_series or len(every), len(every))
        windows.append(every[np.arange(1, kept + 1) * len(every) // kept - 1])
    last = [
        np.concatenate([series[-WINDOW:], test[name][:HORIZON]])
        for name, series in train.items()
    ]
    return Windows(*_examples(np.concatenate(windows)), *_examples(np.stack(last)))


def smape(
    forecast: jax.Array | np.ndarray, actual: jax.Array | np.ndarray
) -> jax.Array | np.floating:
    r"""The symmetric mean absolute percentage error, as M4 defines it.

    .. math:: \operatorname{mean} \frac{200 |f - a|}{|f| + |a|}

    Args:
      forecast: Values :math:`f`, of any shape.
      actual: Values :math:`a` of the same shape, none of them 0.

    Returns:
      Percent, from 0 to 200, a scalar.
    """
    error = abs(forecast - actual) / (abs(forecast) + abs(actual))
    return 200 * error.mean()


def _read_a9a(data_dir: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    # Imported here because it takes about a second, and only a9a needs it.
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
    """Reads a header and one series a row: its name, then its values."""
    path, content = read_file(data_dir, "m4", name)
    table = {}
    with readable(path):
        for row in list(csv.reader(io.StringIO(content.decode(), newline="")))[1:]:
            while not row[-1]:  # short rows are filled up
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


def _examples(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts the values of windows ``[N, 26]``, as centred logarithms."""
    logs = np.log(windows)
    logs -= logs[:, :WINDOW].mean(1, keepdims=True)
    x, y = np.split(logs.astype(np.float32), [WINDOW], axis=1)
    return x, y
