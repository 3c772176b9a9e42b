"""The training task: a ReLU MLP with one million parameters on scikit-learn's digits.

The JAX hosts, the PyTorch hosts, and the tuning on one device share this module.
"""

import itertools

import numpy as np

WIDTHS = (64, 980, 980, 10)  # 1,034,890 parameters
BATCH = 16
MOMENTUM = 0.9


def load():
    """Returns flattened training images and labels, then those for testing."""
    from experiments.data import images

    digits = images.load_digits()
    x, x_test = (part.reshape(len(part), -1) for part in (digits[0], digits[2]))
    return x, digits.y_train, x_test, digits.y_test


def batches(workers: int, seed: int = 0):
    """Yields batches of all workers without end, as indices `[workers, BATCH]`.

    Each worker draws from its own part of the examples.
    """
    rng = np.random.default_rng(seed)
    parts = rng.permutation(1440)[: 1440 // workers * workers].reshape(workers, -1)
    while True:
        chosen = rng.integers(parts.shape[1], size=(workers, BATCH))
        yield np.take_along_axis(parts, chosen, axis=1)


def initial_params(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Returns the parameters of the MLP with He initialization."""
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": (rng.normal(size=(i, o)) * np.sqrt(2 / i)).astype(np.float32),
            "bias": np.zeros(o, np.float32),
        }
        for i, o in itertools.pairwise(WIDTHS)
    ]
