"""Training tasks for comparing example orders, modeled on those of CD-GraB."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import images, tabular, text
from experiments.errors import UsageError
from experiments.training import models

# Number of tokens per example of the language model, and size of its vocabulary.
SEGMENT = 35
VOCABULARY = 500

Source = Literal["digits", "python", "a9a", "mnist", "cifar10", "wikitext2", "m4"]


class Task(NamedTuple):
    """A model, its training examples, and the settings of its training."""

    model: nn.Module
    loss: Callable[[Any, jax.Array], jax.Array]  # (outputs, targets) -> batch mean
    x: np.ndarray  # shape=[N, ...], inputs
    y: np.ndarray  # shape=[N, ...], targets
    rates: tuple[float, ...]  # learning rates to tune over
    momentum: float | None
    epochs: int
    penalty: float = 0.0  # weight of half the squared norm of the parameters
    name: str = ""  # names of the task and of its data set


def load(
    name: str, data_dir: Path | None, source: str | None, examples: int | None
) -> Task:
    """Loads a task.

    Args:
      name: "logistic", "lenet", "lstm", or "forecast".
      data_dir: Folder with the files; not needed for "digits" and "python".
      source: Name of the data set. If None, the first data set of the task, which needs
        no files unless the task is "forecast".
      examples: Number of training examples to use, from the first on. If None, all.

    Returns:
      The task.

    Raises:
      UsageError: If the task does not support the data set, or `data_dir` is None for
        a data set that is read from files.
      MissingFileError: If a file is missing.
    """
    makers = {
        "logistic": (_logistic, ("digits", "a9a")),
        "lenet": (_lenet, ("digits", "mnist", "cifar10")),
        "lstm": (_lstm, ("python", "wikitext2")),
        "forecast": (_forecast, ("m4",)),
    }
    make, sources = makers[name]
    source = source or sources[0]
    if source not in sources:
        raise UsageError(
            f"source={source!r} for the task {name} must be one of {sources}."
        )
    task = make(source, data_dir)
    return task._replace(
        name=f"{name}, {source}", x=task.x[:examples], y=task.y[:examples]
    )


def _table(loader: Callable, source: str, data_dir: Path | None, **options: int) -> Any:
    if data_dir is None:
        raise UsageError(
            f"data_dir=None, but {source} is read from files: pass data_dir, the "
            "folder that holds them."
        )
    return loader(data_dir, **options)


def _cross_entropy(logits: Any, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _squared_error(outputs: Any, y: jax.Array) -> jax.Array:
    return jnp.square(outputs - y).mean()


def _logistic(source: str, data_dir: Path | None) -> Task:
    found: Any = (
        _table(tabular.load_a9a, source, data_dir)
        if source == "a9a"
        else images.load(source, data_dir)
    )
    classes = int(found.y_train.max()) + 1
    return Task(
        model=models.LogisticRegression(classes),
        loss=_cross_entropy,
        x=found.x_train,
        y=found.y_train,
        rates=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        momentum=None,
        epochs=30,
        penalty=1e-3,
    )


def _lenet(source: str, data_dir: Path | None) -> Task:
    found = images.load(source, data_dir)
    return Task(
        model=models.get_model("lenet", found.num_classes),
        loss=_cross_entropy,
        x=found.x_train,
        y=found.y_train,
        rates=(0.02, 0.05, 0.1, 0.2),
        momentum=None,
        epochs=15,
    )


def _lstm(source: str, data_dir: Path | None) -> Task:
    found = text.load_text(source, data_dir, VOCABULARY)
    x, y = text.segments(found.tokens_train, SEGMENT)
    return Task(
        model=models.LSTMLanguageModel(found.vocabulary),
        loss=_cross_entropy,
        x=x,
        y=y,
        rates=(0.5, 1.0, 2.0, 4.0),
        momentum=0.9,
        epochs=10,
    )


def _forecast(source: str, data_dir: Path | None) -> Task:
    found = _table(tabular.load_m4_weekly, source, data_dir, windows_per_series=8)
    return Task(
        model=models.Forecaster(),
        loss=_squared_error,
        x=found.x_train,
        y=found.y_train,
        rates=(0.02, 0.04, 0.08, 0.16, 0.32),
        momentum=0.9,
        epochs=30,
    )
