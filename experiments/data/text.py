"""Read text as numbered words, for language models.

Nothing here downloads: "python" is the documentation that every Python carries along,
WikiText-2 is read from its published files.
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

_UNKNOWN = "<unk>"  # as WikiText-2 itself writes words it leaves out
_END_OF_LINE = "<eos>"
_TRAIN_TENTHS = 9


class Text(NamedTuple):
    """Training and test text: number 0 is any unknown word, 1 the most frequent."""

    tokens_train: np.ndarray  # shape=[N], dtype=int32, values in [0, vocabulary)
    tokens_test: np.ndarray  # shape=[M], dtype=int32, values in [0, vocabulary)
    vocabulary: int


def load_text(
    name: str, data_dir: str | Path | None = None, vocabulary: int = 1000
) -> Text:
    """Loads a text by name.

    Args:
      name: "python", the help topics of this Python in lower case, split into words
        and runs of one sign; the last tenth tests. About 100,000 tokens, not the same
        in each version of Python. Or "wikitext2", split at white space, with a token
        for the end of each line.
      data_dir: Folder with WikiText-2, or with a sub-folder ``wikitext2`` which holds
        it; not needed for "python". Its files are ``wiki.test.tokens`` or ``test.txt``,
        and likewise "train"; without these, "valid" trains. They may be gzipped.
      vocabulary: Number of different tokens to keep, at least 2: one for all unknown
        words, the others for the most frequent words of the training text.

    Returns:
      The text; its vocabulary is smaller if the training text has fewer words.

    Raises:
      UsageError: If the name is unknown, ``data_dir`` is needed and missing,
        ``vocabulary`` is too small, or a file is broken.
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
            "which holds them, or use name='python', which needs none."
        )
    else:
        train = _wikitext2_words(data_dir, "train", "valid")
        test = _wikitext2_words(data_dir, "test")
    return _number(train, test, vocabulary)


def segments(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into consecutive pieces which do not overlap.

    Args:
      tokens: The text, int32 ``[M]``.
      length: Tokens of a piece, from 1 to M - 1.

    Returns:
      Inputs and outputs, int32 ``[(M - 1) // length, length]`` each: an output is the
      token after its input. What fills no piece is left out, at the end.

    Raises:
      UsageError: If ``length`` is outside its range.
    """
    if not 1 <= length < tokens.size:
        raise UsageError(
            f"length={length!r} for {tokens.size} tokens: pass at least 1, and fewer "
            "than there are tokens."
        )
    used = (tokens.size - 1) // length * length
    return tokens[:used].reshape(-1, length), tokens[1 : used + 1].reshape(-1, length)


def _python_words() -> tuple[list[str], list[str]]:
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


def _number(train: list[str], test: list[str], vocabulary: int) -> Text:
    counts = Counter(word for word in train if word != _UNKNOWN)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 1]
    numbers = {word: number for number, word in enumerate(frequent, start=1)}

    def tokens(words: list[str]) -> np.ndarray:
        return np.array([numbers.get(word, 0) for word in words], np.int32)

    return Text(tokens(train), tokens(test), vocabulary=len(numbers) + 1)
