"""Images: all file formats, broken files, and the split between workers."""

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from experiments.data import images

MNIST = {
    "train-images-idx3-ubyte": "x_train",
    "train-labels-idx1-ubyte": "y_train",
    "t10k-images-idx3-ubyte": "x_test",
    "t10k-labels-idx1-ubyte": "y_test",
}
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def raw_arrays(image_shape: tuple[int, ...], sizes=(10, 4)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in zip(("train", "test"), sizes, strict=True):
        images = rng.integers(0, 256, (size, *image_shape), np.uint8)
        images.flat[:2] = 0, 255
        arrays[f"x_{part}"] = images
        arrays[f"y_{part}"] = rng.integers(0, 10, size, np.uint8)
    return arrays


def assert_holds(dataset: images.Dataset, raw: dict[str, np.ndarray], image_shape):
    for part in ("train", "test"):
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        assert x.dtype == np.float32
        assert y.dtype == np.int32
        assert x.shape == (len(raw[f"x_{part}"]), *image_shape)
        expected = raw[f"x_{part}"].reshape(x.shape) / 255
        np.testing.assert_allclose(x, expected, rtol=1e-6)
        assert x.min() == 0.0
        assert x.max() == 1.0
        np.testing.assert_array_equal(y, raw[f"y_{part}"])
    assert dataset.num_classes == 10


# Digits


def test_digits_are_scikit_learns_in_a_fixed_balanced_split():
    digits = images.load("digits")
    assert digits.x_train.shape == (1440, 8, 8, 1)
    assert digits.x_test.shape == (357, 8, 8, 1)
    np.testing.assert_array_equal(np.bincount(digits.y_train), [144] * 10)
    assert np.bincount(digits.y_test).min() >= 30
    assert digits.x_train.dtype == digits.x_test.dtype == np.float32
    assert digits.y_train.dtype == digits.y_test.dtype == np.int32
    for ours, again in zip(digits, images.load_digits(), strict=True):
        np.testing.assert_array_equal(ours, again)

    pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
    x = np.concatenate([digits.x_train, digits.x_test]).reshape(-1, 64) * 16
    y = np.concatenate([digits.y_train, digits.y_test])
    ours = sorted((row.tobytes(), label) for row, label in zip(x, y, strict=True))
    pixels = pixels.astype(np.float32)
    theirs = sorted((r.tobytes(), n) for r, n in zip(pixels, labels, strict=True))
    assert ours == theirs


def test_digits_are_in_random_order():
    labels = images.load_digits().y_train
    assert all(len(np.unique(labels[i : i + 144])) == 10 for i in range(0, 1440, 144))
    assert (np.diff(labels) != 0).mean() > 0.8


# MNIST


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, raw: dict[str, np.ndarray], zipped: bool) -> None:
    folder.mkdir(exist_ok=True)
    for name, key in MNIST.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(raw[key])))
        else:
            (folder / name).write_bytes(idx(raw[key]))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sub_folder", [".", "mnist"])
def test_mnist_is_read(tmp_path: Path, zipped: bool, sub_folder: str):
    raw = raw_arrays((28, 28))
    write_mnist(tmp_path / sub_folder, raw, zipped)
    assert_holds(images.load("mnist", tmp_path), raw, (28, 28, 1))


def test_mnist_missing_file_is_named(tmp_path: Path):
    write_mnist(tmp_path, raw_arrays((28, 28)), zipped=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="holds no t10k-labels-idx1-ubyte"):
        images.load("mnist", tmp_path)


def break_mnist(name: str, change: Callable[[bytes], bytes]):
    def write(folder: Path) -> None:
        write_mnist(folder, raw_arrays((28, 28)), zipped=name.endswith(".gz"))
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def mnist_of(**changes: np.ndarray):
    return lambda folder: write_mnist(folder, raw_arrays((28, 28)) | changes, False)


GZ = "train-images-idx3-ubyte.gz"
RAW = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (break_mnist(GZ, lambda b: b[: len(b) // 2]), f"{GZ} cannot be read"),
        (break_mnist(GZ, lambda b: b""), f"{GZ} starts with nothing"),
        (break_mnist(GZ, lambda b: b"no gzip" + b), f"{GZ} cannot be read"),
        (break_mnist(GZ, lambda b: b[:20] + b"\0" * 50 + b[70:]), "cannot be read"),
        (break_mnist(RAW, lambda b: b[:-1]), f"{RAW} declares 7840 values"),
        (break_mnist(RAW, lambda b: b + b"\0"), "but holds 7841"),
        (break_mnist(RAW, lambda b: b[:10]), "starts with 00000803"),
        (break_mnist(RAW, lambda b: b"\0\0\x08\x01" + b[4:]), "expected 00000803"),
        (break_mnist(RAW, lambda b: b"\0\0\x0d\x03" + b[4:]), "expected 00000803"),
        (mnist_of(x_train=np.zeros((10, 27, 28), np.uint8)), r"\(10, 27, 28, 1\)"),
        (mnist_of(y_test=np.zeros(5, np.uint8)), "4 test images but 5 labels"),
        (mnist_of(y_train=np.full(10, 10, np.uint8)), "integers from 0 to 9"),
        (
            mnist_of(x_test=np.zeros((0, 28, 28), np.uint8), y_test=np.zeros(0, "u1")),
            "0 test images",
        ),
    ],
)
def test_mnist_broken_file_is_named(tmp_path: Path, write, message: str):
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        images.load("mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)


# CIFAR-10


def python2_string(content: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(content)) + content


def python2_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def python2_array(array: np.ndarray, dtype: bytes = b"u1") -> bytes:
    """Pickles an array as Python 2 with NumPy 1.x did, opcode by opcode."""
    return b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\n" + b"K\0\x85" + python2_string(b"b") + b"\x87R",
            b"(K\x01",
            b"(" + b"".join(map(python2_int, array.shape)) + b"t",
            b"cnumpy\ndtype\n" + python2_string(dtype) + b"K\0K\x01\x87R",
            b"(K\x03" + python2_string(b"|") + b"NNN",
            python2_int(-1) + python2_int(-1) + b"K\0tb",
            b"\x89" + python2_string(array.tobytes()) + b"tb",
        ]
    )


def python2_batch(rows: np.ndarray, labels: Any, dtype: bytes = b"u1") -> bytes:
    return b"".join(
        [
            b"\x80\x02}(",
            python2_string(b"batch_label") + python2_string(b"training batch"),
            python2_string(b"labels") + b"](",
            b"".join(python2_int(int(label)) for label in labels) + b"e",
            python2_string(b"data") + python2_array(rows, dtype),
            python2_string(b"filenames") + b"](" + python2_string(b"a.png") + b"e",
            b"u.",
        ]
    )


def cifar10_batches(raw: dict[str, np.ndarray]) -> dict[str, bytes]:
    images = [*np.split(raw["x_train"], 5), raw["x_test"]]
    labels = [*np.split(raw["y_train"], 5), raw["y_test"]]
    return {
        name: python2_batch(x.transpose(0, 3, 1, 2).reshape(len(x), 3072), y)
        for name, x, y in zip(BATCHES, images, labels, strict=True)
    }


def write_npz(folder: Path, raw: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "cifar10_some.npz", allow_pickle=True, **raw)


def write_batches(folder: Path, raw: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in cifar10_batches(raw).items():
        (folder / name).write_bytes(content)


def write_tar(folder: Path, raw: dict[str, np.ndarray], leave_out: str = "") -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in cifar10_batches(raw).items():
            if name != leave_out:
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("write", "sub_folder"),
    [
        (write_npz, "."),
        (write_npz, "cifar10"),
        (write_batches, "."),
        (write_batches, "cifar-10-batches-py"),
        (write_tar, "."),
        (write_tar, "cifar10"),
    ],
)
def test_cifar10_is_read(tmp_path: Path, write, sub_folder: str):
    raw = raw_arrays((32, 32, 3))
    write(tmp_path / sub_folder, raw)
    before = sorted(tmp_path.rglob("*"))
    assert_holds(images.load("cifar10", tmp_path), raw, (32, 32, 3))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_cifar10_labels_may_be_a_column(tmp_path: Path):
    raw = raw_arrays((32, 32, 3))
    write_npz(tmp_path, raw | {"y_train": raw["y_train"][:, None]})
    assert_holds(images.load("cifar10", tmp_path), raw, (32, 32, 3))


def test_cifar10_missing_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no CIFAR-10: put cifar10"):
        images.load("cifar10", tmp_path)
    write_tar(tmp_path, raw_arrays((32, 32, 3)), leave_out="data_batch_4")
    with pytest.raises(FileNotFoundError, match=r"\['data_batch_4'\] are missing"):
        images.load("cifar10", tmp_path)
    write_batches(tmp_path, raw_arrays((32, 32, 3)))
    (tmp_path / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['test_batch'\] are missing"):
        images.load("cifar10", tmp_path)


def test_cifar10_ambiguous_files_are_refused(tmp_path: Path):
    for name in ("cifar10_a.npz", "cifar10_b.npz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"cifar10_a\.npz, cifar10_b\.npz: keep"):
        images.load("cifar10", tmp_path)


def broken(write, name: str, change: Callable[[bytes], bytes]):
    def write_broken(folder: Path) -> None:
        write(folder, raw_arrays((32, 32, 3)))
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write_broken


def npz_of(**changes: np.ndarray):
    return lambda folder: write_npz(folder, raw_arrays((32, 32, 3)) | changes)


def npz_without(name: str):
    def write(folder: Path) -> None:
        raw = raw_arrays((32, 32, 3))
        del raw[name]
        write_npz(folder, raw)

    return write


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


NPZ = "cifar10_some.npz"
TAR = "cifar-10-python.tar.gz"
ROWS = np.zeros((2, 3072), np.uint8)
OBJECTS = np.array([None] * 10, object)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (broken(write_npz, NPZ, lambda b: b[: len(b) // 2]), "cannot be read"),
        (broken(write_npz, NPZ, lambda b: b""), "cannot be read"),
        (broken(write_npz, NPZ, lambda b: b"\x93NUMPY no zip"), "cannot be read"),
        (broken(write_npz, NPZ, lambda b: npy_bytes(ROWS)), "not an npz archive"),
        (
            broken(write_npz, NPZ, lambda b: b[:999] + b"\xff" * 99 + b[1098:]),
            r"cannot be read \(BadZipFile: Bad CRC",
        ),
        (npz_without("y_test"), r"lacks the arrays \['y_test'\]"),
        (npz_of(y_train=OBJECTS), "Object arrays cannot be loaded"),
        (npz_of(x_test=np.zeros((4, 3, 32, 32), np.uint8)), r"\(4, 3, 32, 32\)"),
        (npz_of(x_test=np.zeros((4, 32, 32, 3))), "dtype float64"),
        (npz_of(y_test=np.zeros(5, int)), "4 test images but 5 labels"),
        (npz_of(y_test=np.zeros((4, 10), int)), "4 test images but 40 labels"),
        (npz_of(y_test=np.full(4, -1)), "integers from 0 to 9"),
        (npz_of(y_test=np.zeros(4)), "dtype float64.* must be integers"),
        (broken(write_tar, TAR, lambda b: b[: len(b) // 2]), "cannot be read"),
        (broken(write_tar, TAR, lambda b: gzip.compress(b"?" * 999)), "cannot be read"),
        (broken(write_batches, "data_batch_2", lambda b: b[:-9]), "data_batch_2 in"),
        (broken(write_batches, "data_batch_2", lambda b: b""), "data_batch_2 in"),
        (broken(write_batches, "test_batch", lambda b: b"\x80\x02K\x01."), "TypeError"),
        (broken(write_batches, "test_batch", lambda b: b"\x80\x02}."), "KeyError"),
        (
            broken(write_batches, "test_batch", lambda b: python2_batch(ROWS, [1])),
            "2 images but 1 labels",
        ),
        (
            broken(
                write_batches,
                "test_batch",
                lambda b: python2_batch(ROWS[:, 1:], [1, 1]),
            ),
            "test_batch in .*cannot reshape",
        ),
        (
            broken(
                write_batches,
                "test_batch",
                lambda b: python2_batch(ROWS, [1, 1], b"O8"),
            ),
            "dtype b'O8' is not allowed",
        ),
    ],
)
def test_cifar10_broken_file_is_named(tmp_path: Path, write, message: str):
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        images.load("cifar10", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_cifar10_pickle_cannot_call_anything_else(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "attacked",)

    attack = pickle.dumps(Attack(), protocol=2)
    pickle.loads(attack)
    assert (
        tmp_path / "attacked"
    ).exists()  # the attack works with an unrestricted unpickler
    (tmp_path / "attacked").unlink()

    write_batches(tmp_path, raw_arrays((32, 32, 3)))
    (tmp_path / "data_batch_1").write_bytes(attack)
    with pytest.raises(ValueError, match="is not allowed in a batch file"):
        images.load("cifar10", tmp_path)
    assert not (tmp_path / "attacked").exists()


# Arguments


def test_load_refuses_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="name='imagenet' is unknown: pass one of"):
        images.load("imagenet", tmp_path)
    (tmp_path / "file").touch()
    for name in ("mnist", "cifar10"):
        with pytest.raises(ValueError, match=f"data_dir=None, but name='{name}'"):
            images.load(name)
        for folder in ("nowhere", "file"):
            with pytest.raises(
                FileNotFoundError, match=f"{folder}' is not an existing"
            ):
                images.load(name, tmp_path / folder)


@pytest.mark.skipif(
    "DECENTRAL_JAX_DATA" not in os.environ,
    reason="set DECENTRAL_JAX_DATA to a folder with MNIST and CIFAR-10 to read them",
)
def test_real_files_are_read():
    folder = os.environ["DECENTRAL_JAX_DATA"]
    mnist = images.load("mnist", folder)
    assert mnist.x_train.shape == (60000, 28, 28, 1)
    assert mnist.x_test.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(mnist.y_train[:8], [5, 0, 4, 1, 9, 2, 1, 3])
    np.testing.assert_allclose(mnist.x_train.mean(), 0.1307, atol=1e-4)
    np.testing.assert_allclose(mnist.x_train.std(), 0.3081, atol=1e-4)
    cifar10 = images.load("cifar10", folder)
    assert cifar10.x_train.shape[1:] == (32, 32, 3)
    np.testing.assert_array_equal(cifar10.y_train[:8], [6, 9, 9, 4, 1, 1, 2, 7])
    mean = cifar10.x_train.mean((0, 1, 2))
    np.testing.assert_allclose(mean, [0.491, 0.482, 0.447], atol=0.01)


# Partition


LABELS = np.random.default_rng(1).integers(0, 10, 1000)


def test_partition_unshuffled_is_sorted_by_label():
    parts = images.partition(LABELS, 8, 0, seed=3)
    assert parts.shape == (8, 125)
    np.testing.assert_array_equal(LABELS[parts].ravel(), np.sort(LABELS))
    np.testing.assert_array_equal(np.sort(parts.ravel()), np.arange(1000))
    assert max(len(np.unique(LABELS[part])) for part in parts) <= 3


def test_partition_shuffled_is_uniform():
    labels = np.repeat(np.arange(4), 10)
    draws = np.stack([images.partition(labels, 4, 100, seed=s) for s in range(2000)])
    # Each example goes to a uniformly random worker: standard error 0.01.
    share = (draws[:, 0, :, None] == np.arange(40)).any(1).mean(0)
    np.testing.assert_allclose(share, 0.25, atol=0.05)
    assert all(len(np.unique(draw)) == 40 for draw in draws[:20])
    assert len({draw.tobytes() for draw in draws}) == 2000


@pytest.mark.parametrize(("shuffled", "first"), [(10, 100), (25.55, 256), (50, 500)])
def test_partition_shuffles_exactly_the_first_percent(shuffled: float, first: int):
    by_label = np.argsort(LABELS, kind="stable")
    orders = np.stack(
        [images.partition(LABELS, 10, shuffled, s).ravel() for s in (0, 1)]
    )
    moved = (orders != by_label).any(0)
    assert not moved[first:].any()
    assert moved[:first].mean() > 0.9
    assert moved[first - 1]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order[:first]), np.sort(by_label[:first]))


def test_partition_drops_the_remainder_and_repeats_by_seed():
    parts = images.partition(LABELS.tolist(), 7, 100.0, seed=5)
    assert parts.shape == (7, 142)
    assert len(np.unique(parts)) == 7 * 142
    np.testing.assert_array_equal(parts, images.partition(LABELS, 7, 100, seed=5))
    assert (parts != images.partition(LABELS, 7, 100, seed=6)).mean() > 0.9
    assert np.issubdtype(parts.dtype, np.integer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": np.zeros((4, 1), int)}, r"labels has shape \(4, 1\)"),
        ({"labels": np.zeros(4)}, "dtype float64"),
        ({"labels": np.zeros(0, int)}, "num_workers=2 for 0 labels"),
        ({"num_workers": 0}, "num_workers=0 for 1000 labels"),
        ({"num_workers": 1001}, "num_workers=1001"),
        ({"num_workers": 2.0}, "num_workers=2.0"),
        ({"num_workers": True}, "num_workers=True"),
        ({"shuffled": -1}, "shuffled=-1: pass a percentage"),
        ({"shuffled": 100.5}, "shuffled=100.5"),
        ({"shuffled": float("nan")}, "shuffled=nan"),
        ({"shuffled": True}, "shuffled=True"),
        ({"shuffled": "50"}, "shuffled='50'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_partition_refuses_bad_arguments(arguments: dict[str, Any], message: str):
    good = {"labels": LABELS, "num_workers": 2, "shuffled": 0, "seed": 0}
    with pytest.raises(ValueError, match=message):
        images.partition(**(good | arguments))
