"""Synchronized batch normalization of the examples equals that of one total batch."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import decentral_jax as dj
from benchmarks.examples import load
from tests.support.layouts import LAYOUTS

N, BATCH = 8, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(2.0, 3.0, (N, BATCH, 8, 8, 1)).astype(np.float32)
LABELS = RNG.integers(10, size=(N, BATCH)).astype(np.int32)


def joined(x):
    return x.reshape(-1, *x.shape[2:])


def nnx_updates(tx):
    """Returns a step of the example, and the same step with the total batch."""
    example = load("image_classifier")

    def step(model, opt_state, images, labels):
        grads = nnx.grad(example.loss_fn)(model, images, labels)
        updates, _ = tx.update(grads, opt_state, nnx.state(model, nnx.Param))
        return updates, nnx.state(model, nnx.BatchStat)

    model, single = example.CNN(nnx.Rngs(0)), example.CNN(nnx.Rngs(0))
    # Flax's own layer is the reference for one worker.
    single.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=nnx.Rngs(0))
    single.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=nnx.Rngs(0))
    grads = nnx.grad(example.loss_fn)(single, joined(IMAGES), joined(LABELS))
    updates = jax.tree.map(lambda g: -g, grads)
    expected = updates, nnx.state(single, nnx.BatchStat)
    state = model, tx.init(nnx.state(model, nnx.Param))
    return step, state, expected


def linen_updates(tx):
    """Returns a step of the example, and the same step with the total batch."""
    example = load("image_classifier_linen")

    def step(variables, opt_state, images, labels):
        state = example.TrainState(
            **variables,
            step=0,
            apply_fn=example.CNN().apply,
            tx=tx,
            opt_state=opt_state,
        )
        grad = jax.grad(example.loss_fn, has_aux=True)
        grads, stats = grad(state.params, state, images, labels)
        return tx.update(grads, opt_state, state.params)[0], stats

    variables = example.CNN().init(jax.random.key(0), IMAGES[0], train=False)
    with pytest.MonkeyPatch.context() as patch:
        # Flax's own layer is the reference for one worker.
        patch.setattr(example, "SyncBatchNorm", nn.BatchNorm)
        state = example.TrainState.create(
            apply_fn=example.CNN().apply, tx=optax.identity(), **variables
        )
        grad = jax.grad(example.loss_fn, has_aux=True)
        grads, stats = grad(state.params, state, joined(IMAGES), joined(LABELS))
    expected = jax.tree.map(lambda g: -g, grads), stats
    return step, (variables, tx.init(variables["params"])), expected


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "folded_2", "one_device"])
@pytest.mark.parametrize("make", [nnx_updates, linen_updates])
def test_gradients_equal_those_of_the_total_batch(make, layout, standard_promotion):
    step, state, expected = make(dj.all_reduce_sgd(1.0))
    copies = jax.tree.map(lambda x: np.stack([x] * N), state)
    results = LAYOUTS[layout](step, N)(*copies, IMAGES, LABELS)
    for result, reference in zip(
        jax.tree.leaves(results), jax.tree.leaves(expected), strict=True
    ):
        everywhere = np.broadcast_to(reference, result.shape)
        np.testing.assert_allclose(result, everywhere, rtol=1e-5, atol=1e-5)
