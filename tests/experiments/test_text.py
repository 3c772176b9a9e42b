"""Tests of experiments/data/text.py: words, numbers, files, segments."""

import gzip
import os
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from experiments.data import text
from tests.experiments.files import write_files


def assert_tokens(actual: np.ndarray, expected: list[int]):
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.int32


# Python's documentation


def test_python_is_split_into_words_and_signs(monkeypatch):
    topics = {"b": "The for, the FOR!!\n", "a": "x == y_1 (the)"}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    # x == y_1 ( the ) the for , the | for !!
    loaded = text.load_text("python", vocabulary=100)
    assert loaded.vocabulary == 9
    assert_tokens(loaded.tokens_train, [7, 5, 8, 2, 1, 3, 1, 6, 4, 1])
    assert_tokens(loaded.tokens_test, [6, 0])
    # Among words that occur once, the vocabulary keeps the alphabetically first.
    loaded = text.load_text("python", vocabulary=4)
    assert loaded.vocabulary == 4
    assert_tokens(loaded.tokens_train, [0, 0, 0, 2, 1, 3, 1, 0, 0, 1])
    assert_tokens(loaded.tokens_test, [0, 0])


def test_python_needs_no_file_and_is_large_enough():
    loaded = text.load_text("python")
    assert loaded.vocabulary == 1000
    total = loaded.tokens_train.size + loaded.tokens_test.size
    assert total > 50_000
    assert loaded.tokens_train.size == total * 9 // 10
    counts = np.bincount(loaded.tokens_train, minlength=1000)
    assert counts.size == 1000
    assert (np.diff(counts[1:]) <= 0).all()
    assert counts[0] < 0.2 * total
    assert (loaded.tokens_test == 0).mean() < 0.2


# WikiText-2

FILES = {
    "test.txt": " \n = a b = \n\n <unk> c d \n",
    "valid.txt": "b b a\n",
    "train.txt": "c <unk> c A <unk> <unk> a\n\na",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sub_folder", [".", "wikitext2"])
def test_wikitext2_is_read(tmp_path: Path, zipped: bool, sub_folder: str):
    write_files(tmp_path / sub_folder, FILES, zipped)
    loaded = text.load_text("wikitext2", tmp_path)
    # Numbers 0 to 4: unknown, end of line, a, c, A.
    assert loaded.vocabulary == 5
    assert_tokens(loaded.tokens_train, [3, 0, 3, 4, 0, 0, 2, 1, 1, 2])
    assert_tokens(loaded.tokens_test, [1, 0, 2, 0, 0, 1, 1, 0, 3, 0, 1])


def test_wikitext2_trains_on_the_validation_text_if_alone(tmp_path: Path):
    write_files(tmp_path, {k: v for k, v in FILES.items() if k != "train.txt"})
    loaded = text.load_text("wikitext2", tmp_path)
    assert_tokens(loaded.tokens_train, [1, 1, 3, 2])
    write_files(tmp_path, {"wiki.train.tokens": "d\nb b b"})
    loaded = text.load_text("wikitext2", tmp_path)
    assert_tokens(loaded.tokens_train, [3, 2, 1, 1, 1])


def test_wikitext2_missing_file_is_named(tmp_path: Path):
    write_files(tmp_path, {"valid.txt": "a"})
    with pytest.raises(
        FileNotFoundError, match=r"holds no wiki\.test\.tokens or test\.txt .*: put it"
    ):
        text.load_text("wikitext2", tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt or .* or valid\.txt"):
        text.load_text("wikitext2", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.txt.gz", gzip.compress(b"a b c", mtime=0)[:-9], "cannot be read"),
        ("test.txt.gz", b"no gzip", "cannot be read"),
        ("test.txt", b"\xff\xfe", r"cannot be read \(UnicodeDecodeError"),
        ("test.txt", b" ", "holds no words"),
    ],
)
def test_wikitext2_broken_file_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
):
    write_files(tmp_path, {"train.txt": "a"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}.*fetch it again"):
        text.load_text("wikitext2", tmp_path)


def test_load_text_refuses_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="name='c4' is unknown: pass one of"):
        text.load_text("c4", tmp_path)
    with pytest.raises(ValueError, match="data_dir=None, but name='wikitext2'"):
        text.load_text("wikitext2")
    with pytest.raises(ValueError, match="vocabulary=1: pass at least 2"):
        text.load_text("python", vocabulary=1)


@pytest.mark.skipif(
    "DECENTRAL_JAX_DATA" not in os.environ,
    reason="set DECENTRAL_JAX_DATA to a folder with WikiText-2 to read it",
)
def test_real_files_are_read():
    loaded = text.load_text("wikitext2", os.environ["DECENTRAL_JAX_DATA"])
    assert loaded.vocabulary == 1000
    assert loaded.tokens_test.size == 245_569
    assert loaded.tokens_train.size in (217_646, 2_088_628)


# Segments


@pytest.mark.parametrize(("length", "number"), [(3, 3), (9, 1), (4, 2), (1, 9), (5, 1)])
def test_segments_cover_the_text_once(length: int, number: int):
    tokens = np.arange(10, 20, dtype=np.int32)
    x, y = text.segments(tokens, length)
    assert x.shape == y.shape == (number, length)
    assert_tokens(x.ravel(), list(range(10, 10 + number * length)))
    assert_tokens(y, x + 1)


@pytest.mark.parametrize("length", [0, -1, 10])
def test_segments_refuse_bad_lengths(length: int):
    with pytest.raises(ValueError, match=f"length={length} for 10 tokens: pass"):
        text.segments(np.arange(10, dtype=np.int32), length)
