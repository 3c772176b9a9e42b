"""The documented examples run and learn: Flax linen, Flax nnx, and the README."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.examples import load

ROOT = Path(__file__).parent.parent.parent


# Bounds on what `main` returns, for each program in docs/examples.
METRICS = {
    "character_model": (0.0, 2.2),  # the frequencies of pairs give 2.32
    "flax_linen": (0.9, 1.0),
    "flax_nnx": (0.9, 1.0),
    "image_classifier": (0.96, 1.0),
    "image_classifier_linen": (0.96, 1.0),
}


@pytest.mark.parametrize("name", METRICS)
def test_flax_example_learns(name, standard_promotion):
    low, high = METRICS[name]
    assert low < load(name).main() <= high


def test_readme_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    batch = np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32)

    def loss_fn(params, batch):
        return jnp.mean(jnp.square(model.apply(params, batch) - 1))

    def batches():
        for _ in range(40):
            # With many steps in flight, fake devices of JAX 0.10 can block each other.
            jax.block_until_ready(names.get("loss"))
            yield batch

    names = {"model": model, "params": params, "loss_fn": loss_fn}
    names |= {"batches": batches(), "optax": optax}
    exec(blocks[0], names)
    names["topology"] = names["dj"].topology.ring(8)
    exec(blocks[1], names)
    losses = names["workers"].gather(names["loss"])
    assert losses.shape == (8,)
    assert losses.mean() < 0.8
    assert "ppermute" in capsys.readouterr().out
    assert isinstance(names["tx"], optax.GradientTransformation)


def test_two_set_up_commands():
    """The README has exactly two setup commands; .ci/run runs the second."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^pip install.*$", text, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python -m experiments compare")
    assert commands[1].endswith("python -m pytest")
