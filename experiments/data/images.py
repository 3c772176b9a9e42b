"""Loads image data sets from local files, and partitions them among workers.

This module does not download anything. The digits are part of scikit-learn; MNIST and
CIFAR-10 are read from the files that their authors publish. All images are float32,
shape `[N, H, W, C]`, and are divided by the largest possible pixel value, so that they
lie in [0, 1]. They are not standardized: all data sets follow the same rule, and
logistic regression sees the same inputs as in the papers. Labels are int32, shape
`[N]`.
"""

import io
import math
import numbers
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.data.files import read_file, readable
from experiments.errors import MissingFileError, UsageError

DATASETS = ("digits", "mnist", "cifar10")

# 1,440 training images in total, which 8, 10, 16, and 32 workers share evenly.
_DIGITS_TRAIN_PER_CLASS = 144
_DIGITS_SEED = 0

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10_TEST = "test_batch"
_CIFAR10_BATCHES = (*_CIFAR10_TRAIN, _CIFAR10_TEST)
_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR10_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Dataset(NamedTuple):
    """Training and test examples, in memory."""

    x_train: np.ndarray  # shape=[N, H, W, C], dtype=float32, values in [0, 1]
    y_train: np.ndarray  # shape=[N], dtype=int32, values in [0, num_classes)
    x_test: np.ndarray  # shape=[M, H, W, C], dtype=float32, values in [0, 1]
    y_test: np.ndarray  # shape=[M], dtype=int32, values in [0, num_classes)
    num_classes: int  # number of different labels


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: Name of the data set: "digits", "mnist", or "cifar10".
      data_dir: Folder with the files; not needed for "digits". MNIST consists of four
        idx files, optionally gzipped. CIFAR-10 is, in this order of preference, a file
        `cifar10*.npz` with uint8 arrays `x_train, y_train, x_test, y_test`, the
        official Python batches (optionally in a subfolder `cifar-10-batches-py`), or
        the official `cifar-10-python.tar.gz`, which is read without unpacking it to
        disk. If the folder does not contain the files, its subfolder `mnist` or
        `cifar10` is searched.

    Returns:
      The data set, with images in [0, 1].

    Raises:
      UsageError: If the name is unknown, `data_dir` is None for a data set that is read
        from files, or a file is broken.
      MissingFileError: If the folder or a file in it is missing.
    """
    if name not in DATASETS:
        raise UsageError(f"name={name!r} is unknown: pass one of {DATASETS}.")
    if name == "digits":
        return load_digits()
    if data_dir is None:
        raise UsageError(
            f"data_dir=None, but name={name!r} is read from files: pass the folder "
            "that holds them, or pass name='digits', which needs no files."
        )
    folder = Path(data_dir)
    if not folder.is_dir():
        raise MissingFileError(
            f"data_dir='{folder}' is not an existing folder: create it, put the "
            f"{name} files into it, or pass the folder that holds them."
        )
    return _load_mnist(folder) if name == "mnist" else _load_cifar10(folder)


def load_digits() -> Dataset:
    """Loads scikit-learn's handwritten digits: 8x8 images of 10 classes.

    The split is fixed: 144 images of each class (1,440 in total) are for training, and
    the other 357 images are for testing.

    Returns:
      The data set, with images `[N, 8, 8, 1]` in [0, 1] in a fixed random order.
    """
    # Imported here because the import takes about a second, and only digits need it.
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(_DIGITS_SEED)
    # Choose the training images at random, but the same number from each class.
    is_train = np.zeros(labels.size, bool)
    for label in range(10):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        is_train[of_class[:_DIGITS_TRAIN_PER_CLASS]] = True
    train = rng.permutation(np.flatnonzero(is_train))
    test = rng.permutation(np.flatnonzero(~is_train))
    x = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    y = labels.astype(np.int32)
    return Dataset(x[train], y[train], x[test], y[test], num_classes=10)


def partition(
    labels: ArrayLike, num_workers: int, shuffled: float, seed: int = 0
) -> np.ndarray:
    """Partitions examples among workers, from sorted by label to uniformly random.

    The partition follows Lu & De Sa (Optimal Complexity in Decentralized Training, ICML
    2021): sort the examples by label, shuffle the first `shuffled` percent of the
    sorted examples, and cut the result into consecutive parts of equal size. If
    `0 < shuffled < 100`, only the examples with the lowest labels are shuffled: the
    first workers get mixed classes, and each of the last workers gets one or two
    classes.

    Args:
      labels: Class of each example, integers, shape `[N]`.
      num_workers: Number of parts, at most N.
      shuffled: Percentage of the sorted examples to shuffle, in [0, 100]. With 0 (the
        paper's "unshuffled"), each worker gets few classes. With 100 ("shuffled"), the
        data of all workers have the same distribution.
      seed: Seed for the shuffle, at least 0; has no effect if `shuffled` is 0.

    Returns:
      Distinct indices into `labels`, shape `[num_workers, N // num_workers]`. The last
      `N % num_workers` examples are omitted; with `shuffled=0`, these have the highest
      label.

    Raises:
      UsageError: If an argument is outside its range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(
            f"labels has shape {labels.shape} and dtype {labels.dtype}: pass one "
            "integer class per example, shape [N]."
        )
    if not _is_integer(num_workers) or not 1 <= num_workers <= labels.size:
        raise UsageError(
            f"num_workers={num_workers!r} for {labels.size} labels: pass an integer "
            "from 1 to the number of labels."
        )
    # Refuse booleans: True would mean one percent.
    is_number = isinstance(shuffled, numbers.Real) and not isinstance(shuffled, bool)
    if not is_number or not 0 <= shuffled <= 100:
        raise UsageError(
            f"shuffled={shuffled!r}: pass a percentage from 0 (sorted by label) to "
            "100 (uniformly random)."
        )
    if not _is_integer(seed) or seed < 0:
        raise UsageError(f"seed={seed!r}: pass an integer of at least 0.")
    # Sort by label, shuffle the first part, and cut into equal parts.
    order = np.argsort(labels, kind="stable")
    first = round(labels.size * float(shuffled) / 100)
    order[:first] = np.random.default_rng(seed).permutation(order[:first])
    per_worker = labels.size // num_workers
    return order[: num_workers * per_worker].reshape(num_workers, per_worker)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _dataset(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    image_shape: tuple[int, ...],
    source: Path,
) -> Dataset:
    """Checks raw images and labels of ten classes, and scales the images.

    Args:
      train: Training images, uint8 `[N, *image_shape]`, and labels, `[N]` or `[N, 1]`.
      test: Test images and labels in the same format.
      image_shape: Shape of an image, (H, W, C).
      source: File or folder that error messages name.

    Raises:
      UsageError: If an array has a wrong shape, dtype, or value.
    """
    arrays = []
    for part, (images, labels) in (("training", train), ("test", test)):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.shape[1:] != image_shape:
            raise UsageError(
                f"{source}: {part} images have shape {images.shape} and dtype "
                f"{images.dtype}, expected [N, {', '.join(map(str, image_shape))}] "
                "and uint8: fetch or convert the file again."
            )
        if labels.size != images.shape[0] or labels.size == 0:
            raise UsageError(
                f"{source}: {images.shape[0]} {part} images but {labels.size} labels; "
                "expected one label per image and at least one image: put images and "
                "labels of the same data set there."
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
            raise UsageError(
                f"{source}: {part} labels (dtype {labels.dtype}) must be integers "
                "from 0 to 9: fetch or convert the file again."
            )
        arrays += [
            np.divide(images, np.float32(255)),
            labels.reshape(-1).astype(np.int32),
        ]
    return Dataset(*arrays, num_classes=10)


def _load_mnist(data_dir: Path) -> Dataset:
    files = [read_file(data_dir, "mnist", name) for name in _MNIST_FILES]
    x_train, y_train, x_test, y_test = (
        _decode_idx(path, content, ndim)
        for (path, content), ndim in zip(files, (3, 1, 3, 1), strict=True)
    )
    return _dataset(
        (x_train[..., None], y_train),
        (x_test[..., None], y_test),
        (28, 28, 1),
        data_dir,
    )


def _decode_idx(path: Path, content: bytes, ndim: int) -> np.ndarray:
    """Decodes an idx file of unsigned bytes.

    The file consists of a magic number, `ndim` sizes, and the values.
    """
    header = 4 + 4 * ndim
    magic = struct.pack(">HBB", 0, 8, ndim)  # 8: unsigned bytes
    if len(content) < header or content[:4] != magic:
        raise UsageError(
            f"{path} starts with {content[:4].hex() or 'nothing'}, expected "
            f"{magic.hex()} and {ndim} sizes: it is not an idx file of this kind; "
            "fetch it again."
        )
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UsageError(
            f"{path} declares {math.prod(shape)} values (shape {shape}) but holds "
            f"{len(content) - header}: it is truncated or damaged; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _load_cifar10(data_dir: Path) -> Dataset:
    # In each folder, prefer an npz file to the batches, and the batches to the archive.
    for folder in (data_dir, data_dir / "cifar10"):
        archives = [p for p in sorted(folder.glob("cifar10*.npz")) if p.is_file()]
        if len(archives) > 1:
            raise UsageError(
                f"data_dir='{data_dir}' holds several CIFAR-10 files, "
                f"{', '.join(p.name for p in archives)}: keep one of them there."
            )
        if archives:
            return _read_cifar10_npz(archives[0])
        for batches in (folder, folder / _CIFAR10_FOLDER):
            present = [n for n in _CIFAR10_BATCHES if (batches / n).is_file()]
            if present:
                contents = {n: (batches / n).read_bytes() for n in present}
                return _decode_cifar10(contents, batches)
        archive = folder / _CIFAR10_ARCHIVE
        if archive.is_file():
            return _decode_cifar10(_read_cifar10_tar(archive), archive)
    raise MissingFileError(
        f"data_dir='{data_dir}' holds no CIFAR-10: put cifar10*.npz (arrays "
        f"{', '.join(_CIFAR10_ARRAYS)}), the folder {_CIFAR10_FOLDER}, or "
        f"{_CIFAR10_ARCHIVE} there."
    )


def _read_cifar10_npz(path: Path) -> Dataset:
    with readable(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TypeError("a single array, not an npz archive")
        with archive:
            arrays = {n: archive[n] for n in _CIFAR10_ARRAYS if n in archive.files}
    missing = [name for name in _CIFAR10_ARRAYS if name not in arrays]
    if missing:
        raise UsageError(
            f"{path} lacks the arrays {missing}: store all of {_CIFAR10_ARRAYS} in it."
        )
    x_train, y_train, x_test, y_test = (arrays[name] for name in _CIFAR10_ARRAYS)
    return _dataset((x_train, y_train), (x_test, y_test), (32, 32, 3), path)


def _read_cifar10_tar(path: Path) -> dict[str, bytes]:
    """Returns a dictionary from batch file names in the archive to their contents."""
    wanted = {f"{_CIFAR10_FOLDER}/{n}": n for n in _CIFAR10_BATCHES}
    contents = {}
    with readable(path), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name in wanted else None
            if file is not None:
                contents[wanted[member.name]] = file.read()
    return contents


def _decode_cifar10(contents: Mapping[str, bytes], source: Path) -> Dataset:
    """Decodes the official batches: pickled dictionaries of uint8 rows and labels."""
    missing = [name for name in _CIFAR10_BATCHES if name not in contents]
    if missing:
        raise MissingFileError(
            f"CIFAR-10 files {missing} are missing in {source}: put all of "
            f"{', '.join(_CIFAR10_BATCHES)} there."
        )
    parts = []
    for names in (_CIFAR10_TRAIN, (_CIFAR10_TEST,)):
        images, labels = [], []
        for name in names:
            with readable(f"{name} in {source}"):
                batch = _BatchUnpickler(contents[name]).load()
                rows, batch_labels = batch[b"data"], batch[b"labels"]
                # Each row has 1,024 red, 1,024 green, and 1,024 blue values.
                images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(np.asarray(batch_labels))
                if len(images[-1]) != len(labels[-1]):
                    raise ValueError(
                        f"{len(images[-1])} images but {len(labels[-1])} labels"
                    )
        parts.append((np.concatenate(images), np.concatenate(labels)))
    return _dataset(parts[0], parts[1], (32, 32, 3), source)


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of lists, byte strings, and uint8 arrays, nothing else.

    A pickle can call any function that it can import. This class allows only the three
    names that CIFAR-10 batches need.
    """

    def __init__(self, content: bytes):
        # Python 2 wrote the files; its strings are bytes.
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        allowed = {
            # Taken from an array, because NumPy 2 moved the function.
            "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": _uint8_dtype,
        }
        if name not in allowed:
            raise pickle.UnpicklingError(f"{name} is not allowed in a batch file")
        return allowed[name]


def _uint8_dtype(name: bytes, align: int, copy: int) -> np.dtype:
    """Replaces `np.dtype`, whose integer flags cause a warning in NumPy 2.4."""
    if name != b"u1":
        raise pickle.UnpicklingError(f"dtype {name!r} is not allowed in a batch file")
    return np.dtype(np.uint8, align=bool(align), copy=bool(copy))
