"""Loads text as sequences of token numbers, for language models.

This module does not download anything. "python" is the documentation that Python
includes; WikiText-2 is read from its published files.
"""

import pydoc_data.topics
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.files import read_file, readable
from experiments.errors import UsageError

TEXTS = ("python", "wikitext2")

_UNKNOWN = "<unk>"  # how WikiText-2 marks words outside its vocabulary
_END_OF_LINE = "<eos>"
_TRAIN_TENTHS = 9  # tenths of the text "python" for training; the rest is for testing


class Text(NamedTuple):
    """Training and test text as token numbers.

    Token 0 stands for all unknown words, and token 1 for the most frequent word.
    """

    tokens_train: np.ndarray  # shape=[N], dtype=int32, values in [0, vocabulary)
    tokens_test: np.ndarray  # shape=[M], dtype=int32, values in [0, vocabulary)
    vocabulary: int  # number of different tokens


def load_text(
    name: str, data_dir: str | Path | None = None, vocabulary: int = 1000
) -> Text:
    """Loads a text by name.

    Args:
      name: Name of the text. "python" is the lowercase text of all help topics of the
        running Python, split into words and runs of one repeated punctuation mark; the
        last tenth is the test text. It has about 100,000 tokens, and differs between
        versions of Python. "wikitext2" is split at white space, with an additional
        token at the end of each line.
      data_dir: Folder with WikiText-2, or with a subfolder `wikitext2` that holds it;
        not needed for "python". The test file is `wiki.test.tokens` or `test.txt`. The
        training file has "train" instead of "test" in its name, or "valid" if there is
        no such file. The files may be gzipped.
      vocabulary: Number of different tokens to keep, at least 2: one token for all
        unknown words, and the others for the most frequent words of the training text.

    Returns:
      The text. Its vocabulary is smaller if the training text has fewer words.

    Raises:
      UsageError: If the name is unknown, `data_dir` is None for a text that is read
        from files, `vocabulary` is less than 2, or a file is broken.
      MissingFileError: If a file is missing.
    """
    if name not in TEXTS:
        raise UsageError(f"name={name!r} is unknown: pass one of {TEXTS}.")
    if vocabulary < 2:
        raise UsageError(f"vocabulary={vocabulary!r}: pass at least 2.")
    if name == "python":
        train, test = _python_words()
    elif data_dir is None:
        raise UsageError(
            f"data_dir=None, but name={name!r} is read from files: pass the folder "
            "that holds them, or pass name='python', which needs no files."
        )
    else:
        train = _wikitext2_words(data_dir, "train", "valid")
        test = _wikitext2_words(data_dir, "test")
    return _tokenize(train, test, vocabulary)


def segments(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into consecutive segments that do not overlap.

    Args:
      tokens: Tokens of the text, int32, shape `[M]`.
      length: Number of tokens per segment, from 1 to M - 1.

    Returns:
      Inputs and targets, int32, shape `[(M - 1) // length, length]` each. The target of
      each input token is the token that follows it. Tokens at the end that do not fill
      a segment are omitted.

    Raises:
      UsageError: If `length` is outside its range.
    """
    if not 1 <= length < tokens.size:
        raise UsageError(
            f"length={length!r} for {tokens.size} tokens: pass at least 1, and less "
            "than the number of tokens."
        )
    used = (tokens.size - 1) // length * length
    return tokens[:used].reshape(-1, length), tokens[1 : used + 1].reshape(-1, length)


def _python_words() -> tuple[list[str], list[str]]:
    # Tokens are words, and runs of one repeated punctuation mark.
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[topic] for topic in sorted(topics)).lower()
    words = [match[0] for match in re.finditer(r"\w+|([^\w\s])\1*", text)]
    train = len(words) * _TRAIN_TENTHS // 10
    return words[:train], words[train:]


def _wikitext2_words(data_dir: str | Path, *parts: str) -> list[str]:
    names = [name for part in parts for name in (f"wiki.{part}.tokens", f"{part}.txt")]
    path, content = read_file(data_dir, "wikitext2", *names)
    with readable(path):
        words = content.decode().replace("\n", f" {_END_OF_LINE} ").split()
    if not words:
        raise UsageError(f"{path} holds no words: fetch it again.")
    return words


def _tokenize(train: list[str], test: list[str], vocabulary: int) -> Text:
    """Numbers the most frequent training words from 1 on, ties alphabetically."""
    counts = Counter(word for word in train if word != _UNKNOWN)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 1]
    numbers = {word: number for number, word in enumerate(frequent, start=1)}

    def tokens(words: list[str]) -> np.ndarray:
        return np.array([numbers.get(word, 0) for word in words], np.int32)

    return Text(tokens(train), tokens(test), vocabulary=len(numbers) + 1)
