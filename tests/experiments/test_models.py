"""Models: `Conv` against Flax, dtypes, shapes, training."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data.images import load_digits, partition
from experiments.training import models


def filled(shapes: Any, seed: int = 0) -> Any:
    """Draws values of the given shapes and dtypes, far cheaper than `model.init`."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = np.prod(leaf.shape[:-1]) or 1
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def init_shapes(model: nn.Module, x: Any) -> Any:
    return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), x)


def images(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def dtypes(tree: Any) -> set[np.dtype]:
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


# Conv


@pytest.mark.parametrize(
    ("shape", "kernel_size", "strides", "padding"),
    [
        ((2, 8, 8, 3), (3, 3), (1, 1), "SAME"),
        ((2, 8, 7, 2), (3, 3), (2, 2), "SAME"),
        ((3, 9, 9, 1), (5, 5), (1, 1), "VALID"),
        ((2, 9, 8, 2), (2, 3), (2, 3), "VALID"),
        ((2, 7, 5, 2), (4, 2), (3, 1), "SAME"),
        ((2, 5, 6, 3), (1, 1), (2, 2), "SAME"),
        ((7, 6, 2), (3, 3), (2, 1), "SAME"),
    ],
)
def test_conv_and_its_gradient_equal_flax(shape, kernel_size, strides, padding):
    ours = models.Conv(4, kernel_size, strides, padding)
    flax = nn.Conv(4, kernel_size, strides, padding)
    with jax.enable_x64(True):
        x = images(*shape, dtype=np.float64)
        kernel_shape = (*kernel_size, shape[-1], 4)
        params = {
            "kernel": images(*kernel_shape, dtype=np.float64),
            "bias": images(4, dtype=np.float64),
        }
        # Distinct weights, so that swapped positions change the loss.
        weights = images(*jax.eval_shape(flax.apply, {"params": params}, x).shape)

        def run(model: nn.Module, params: Any, x: Any):
            def loss(params: Any, x: Any):
                y = model.apply({"params": params}, x)
                return (y**2 * weights.astype(y.dtype)).sum(), y

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        actual, expected = jax.jit(
            lambda params, x: (run(ours, params, x), run(flax, params, x))
        )(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        actual,
        expected,
    )
    assert dtypes(actual) == {np.dtype(np.float64)}


def test_conv_has_the_initial_values_of_flax():
    x = images(1, 4, 4, 3)
    key = jax.random.key(3)
    ours = models.Conv(5).init(key, x)
    flax = nn.Conv(5, (3, 3)).init(key, x)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
    assert list(init_shapes(models.Conv(5, use_bias=False), x)["params"]) == ["kernel"]


def test_conv_under_vmap_is_one_product_and_slices():
    model = models.Conv(4, strides=(2, 2))
    x = images(6, 2, 8, 8, 3)
    params = filled(init_shapes(model, x[0]))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 6), params)
    text = str(jax.make_jaxpr(jax.vmap(model.apply))(stacked, x))
    assert text.count("dot_general[") == 1
    assert "slice[" in text
    assert "conv_general" not in text
    assert "gather" not in text


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (models.Conv(2, padding="FULL"), images(1, 4, 4, 1), "padding='FULL': pass"),
        (models.Conv(2, padding="VALID"), images(1, 2, 4, 1), "does not fit"),
        (models.Conv(2), images(4, 4), r"x has shape \(4, 4\)"),
        (models.Conv(2), np.zeros((1, 4, 4, 1), np.uint8), "x has dtype uint8"),
        (models.MLP((2,), 2), np.zeros((1, 4), np.int32), "x has dtype int32"),
        (models.LogisticRegression(2), np.zeros((1, 4), bool), "x has dtype bool"),
        (models.ResNet20(2, norm="layer"), images(1, 8, 8, 1), "norm='layer': pass"),
    ],
)
def test_bad_input_is_refused(model: nn.Module, x: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        init_shapes(model, x)


# Pooling


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 8, 6, 3), 2), ((2, 7, 9, 1), 2), ((7, 8, 2), 3)]
)
def test_max_pool_and_its_gradient_equal_flax(shape, window: int):
    x = images(*shape)
    flax = functools.partial(
        nn.max_pool, window_shape=(window, window), strides=(window, window)
    )
    y, pullback = jax.vjp(lambda x: models.max_pool(x, window), x)
    expected, expected_pullback = jax.vjp(flax, x)
    np.testing.assert_array_equal(y, expected)
    cotangent = images(*y.shape)
    np.testing.assert_allclose(
        pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=1e-6
    )


def test_max_pool_shares_the_gradient_of_ties():
    gradient = jax.grad(lambda x: models.max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 2, 2, 1), 0.25))


# Models

CASES = {
    "logistic": (models.LogisticRegression(10), (8, 8, 1)),
    "mlp": (models.MLP((16, 8), 10), (8, 8, 1)),
    "small_cnn_8": (models.CNN(10), (8, 8, 1)),
    "small_cnn_28": (models.CNN(10), (28, 28, 1)),
    "lenet": (models.LeNet(10), (8, 8, 1)),
    "resnet20_group": (models.ResNet20(10, norm="group"), (32, 32, 3)),
    "resnet20_batch": (models.ResNet20(10, norm="batch"), (32, 32, 3)),
}


# Other tests cover float32: a promotion that widens it also widens bfloat16.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "bfloat16") for case in CASES),
        ("mlp", "float64"),
        ("small_cnn_8", "float64"),
        ("resnet20_batch", "float64"),
    ],
)
def test_dtypes_under_strict_promotion(case: str, dtype: str):
    model, shape = CASES[case]
    init = functools.partial(model.init_with_output, jax.random.key(0))

    def step(variables: Any, x: jax.Array):
        def loss(params: Any):
            logits, updated = model.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return logits.mean(), (logits, updated)

        return jax.grad(loss, has_aux=True)(variables["params"])

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = jax.ShapeDtypeStruct((4, *shape), dtype)
        evaluated, variables = jax.eval_shape(init, x)
        gradient, (logits, updated) = jax.eval_shape(step, variables, x)
    assert logits.shape == evaluated.shape == (4, 10)
    assert logits.dtype == evaluated.dtype == jnp.dtype(dtype)
    assert dtypes(variables) == dtypes(gradient) == {np.dtype(np.float32)}
    assert dtypes(updated) <= {np.dtype(np.float32)}
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])


def test_logistic_regression_is_linear_and_starts_at_zero():
    model, x = models.LogisticRegression(3), images(5, 2, 2, 1)
    variables = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(model.apply(variables, x), np.zeros((5, 3)))
    variables = filled(init_shapes(model, x))
    dense = variables["params"]["Dense_0"]
    expected = x.reshape(5, 4) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5)


def test_mlp_equals_numpy():
    model, x = models.MLP((6, 5), 3), images(4, 2, 2, 1)
    variables = filled(init_shapes(model, x))
    expected = x.reshape(4, 4)
    for i, layer in enumerate(("Dense_0", "Dense_1", "Dense_2")):
        dense = variables["params"][layer]
        expected = expected @ dense["kernel"] + dense["bias"]
        if i < 2:
            expected = np.maximum(expected, 0)
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet20_has_the_published_size_and_shapes(norm: str):
    model = models.ResNet20(10, norm=norm)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    shapes = init_shapes(model, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 272_474
    assert ("batch_stats" in shapes) == (norm == "batch")

    capture = functools.partial(model.apply, capture_intermediates=True)
    _, captured = jax.eval_shape(capture, shapes, x)
    outputs = [
        captured["intermediates"][f"Conv_{i}"]["__call__"][0].shape[1:]
        for i in range(21)
    ]
    # Each later stage has one additional convolution: its shortcut.
    assert outputs == [(32, 32, 16)] * 7 + [(16, 16, 32)] * 7 + [(8, 8, 64)] * 7


def with_other_batch_neighbors(x: np.ndarray) -> np.ndarray:
    """Changes all examples of a batch except the first."""
    return np.concatenate([x[:1], 2 + x[1:] ** 2])


# One test instead of two: the first call's compilation dominates the run time.
def test_resnet20_group_norm_sees_one_example_and_blocks_add_their_input():
    model, x = models.ResNet20(10, width=2), images(4, 8, 8, 3)
    variables = filled(init_shapes(model, x))
    logits = model.apply(variables, x, train=True)
    changed = model.apply(variables, with_other_batch_neighbors(x), train=True)
    np.testing.assert_allclose(logits[0], changed[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits[1], changed[1], rtol=1e-4, atol=1e-4)

    # With zero scales and biases, the blocks of the first stage add nothing: input of
    # the second stage is the output of the very first layer.
    params = variables["params"]
    for i in range(1, 7):
        zeros = jax.tree.map(np.zeros_like, params[f"GroupNorm_{i}"])
        params[f"GroupNorm_{i}"] = zeros
    _, captured = model.apply(variables, x, capture_intermediates=True)
    first = captured["intermediates"]["GroupNorm_0"]["__call__"][0]
    second_stage = captured["intermediates"]["Conv_7"]["__call__"][0]
    conv = models.Conv(4, strides=(2, 2), use_bias=False)
    expected = conv.apply({"params": params["Conv_7"]}, nn.relu(first))
    np.testing.assert_allclose(second_stage, expected, rtol=1e-5, atol=1e-6)


def test_resnet20_batch_norm_keeps_running_statistics():
    model, x = models.ResNet20(10, norm="batch", width=2), images(4, 8, 8, 3)
    variables = filled(init_shapes(model, x))
    ones = jax.tree.map(np.ones_like, variables["batch_stats"])
    variables = variables | {"batch_stats": ones}
    logits = model.apply(variables, x)
    changed = model.apply(variables, with_other_batch_neighbors(x))
    np.testing.assert_allclose(logits[0], changed[0], rtol=1e-4, atol=1e-4)

    trained, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert not np.allclose(trained, logits, rtol=0.1)
    actual = updated["batch_stats"]["BatchNorm_0"]
    conv = models.Conv(2, use_bias=False)
    first = np.asarray(conv.apply({"params": variables["params"]["Conv_0"]}, x))
    mean, var = first.mean((0, 1, 2)), first.var((0, 1, 2))
    np.testing.assert_allclose(actual["mean"], 0.9 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(actual["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_workers_train_small_cnn_under_vmap():
    digits = load_digits()
    parts = partition(digits.y_train[:512], num_workers=2, shuffled=100)
    x, y = digits.x_train[parts], digits.y_train[parts]
    model = models.CNN(10, (4, 8), hidden=16)
    params = filled(init_shapes(model, x[0]))
    params = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), params)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(model.apply(params, x))
        return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()

    def step(params: Any, _: None):
        losses, gradient = jax.vmap(jax.value_and_grad(loss))(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), losses

    _, losses = jax.jit(lambda params: jax.lax.scan(step, params, length=150))(params)
    assert losses.shape == (150, 2)
    assert (np.asarray(losses[0]) > 1.5).all()
    assert (np.asarray(losses[-1]) < 0.5).all()


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 7, shape, np.int32)


LSTM = models.LSTMLanguageModel(7, width=4)
# Two layers with 4 gates: per gate, two 32 x 32 kernels (input, state) and a bias.
LSTM_SIZE = 1000 * 32 + 2 * 4 * (2 * 32 * 32 + 32)


@pytest.mark.parametrize(
    ("model", "x", "output", "size"),
    [
        (models.LeNet(10), images(2, 8, 8, 1), (2, 10), 21_386),
        (models.LeNet(10), images(2, 32, 32, 3), (2, 10), 136_886),
        (models.Forecaster(), images(2, 20), (2, 6), 5_894),
        (models.LSTMLanguageModel(1000), tokens(2, 5), (2, 5, 1000), LSTM_SIZE),
        (models.LSTMLanguageModel(1000), tokens(5), (5, 1000), LSTM_SIZE),
        (models.LSTMLanguageModel(7, 4, 1), tokens(3, 2, 5), (3, 2, 5, 7), 172),
    ],
)
def test_sizes_and_shapes(model: nn.Module, x: np.ndarray, output, size: int):
    with jax.enable_x64(True):
        init = functools.partial(model.init_with_output, jax.random.key(0))
        y, variables = jax.eval_shape(init, x)
    assert y.shape == output
    assert y.dtype == np.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == size


def test_lstm_equals_numpy():
    model, x = LSTM, tokens(3, 5)
    params = filled(init_shapes(model, x))["params"]
    embedding = params["Embed_0"]["embedding"]
    inputs = embedding[x]
    for layer in range(2):
        cell = params[f"OptimizedLSTMCell_{layer}"]
        carry = hidden = np.zeros((3, 4))
        outputs = []
        for t in range(5):
            i, f, g, o = (
                inputs[:, t] @ cell[f"i{gate}"]["kernel"]
                + hidden @ cell[f"h{gate}"]["kernel"]
                + cell[f"h{gate}"]["bias"]
                for gate in "ifgo"
            )
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            carry = f * carry + i * np.tanh(g)
            hidden = o * np.tanh(carry)
            outputs.append(hidden)
        inputs = np.stack(outputs, axis=1)
    actual = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(actual, inputs @ embedding.T, rtol=1e-4, atol=1e-6)


def test_lstm_is_causal():
    model, x = LSTM, tokens(6)
    apply = jax.jit(functools.partial(model.apply, filled(init_shapes(model, x))))
    logits = apply(x)
    for t in range(6):
        changed = apply(np.where(np.arange(6) == t, (x + 1) % 7, x))
        np.testing.assert_array_equal(changed[:t], logits[:t])
        assert (np.abs(changed - logits)[t:].max(1) > 1e-4).all()


def test_lstm_output_is_tied_to_the_embedding():
    model, x = LSTM, np.array([1, 2, 3], np.int32)
    params = filled(init_shapes(model, x))
    apply = jax.jit(model.apply)
    logits = apply(params, x)
    # Token 6 is not in x, so its embedding affects only its own logit.
    params["params"]["Embed_0"]["embedding"][6] *= 3
    changed = apply(params, x)
    np.testing.assert_array_equal(changed[:, :6], logits[:, :6])
    np.testing.assert_allclose(changed[:, 6], 3 * logits[:, 6], rtol=1e-5)


class FlaxLeNet(nn.Module):
    """LeNet with Flax's convolution and pooling."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (6, 16):
            x = nn.relu(nn.Conv(width, (5, 5), padding="SAME")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return models.MLP((120, 84), 10)(x)


@pytest.mark.parametrize(
    ("model", "reference", "x"),
    [
        (models.LeNet(10), FlaxLeNet(), images(2, 3, 8, 9, 2)),
        (models.Forecaster(), models.Forecaster(), images(2, 3, 20)),
        (LSTM, LSTM, tokens(2, 3, 5)),
    ],
)
def test_per_worker_and_per_example_loss_and_gradient(
    model: nn.Module, reference: nn.Module, x: np.ndarray
):
    shapes = init_shapes(model, x[0])
    workers = [filled(shapes, seed) for seed in (0, 1)]

    def gradient(model: nn.Module, params: Any, x: jax.Array):
        def loss(params: Any) -> jax.Array:
            return (model.apply(params, x[None]) ** 2).mean()

        return jax.value_and_grad(loss)(params)

    per_example = jax.vmap(functools.partial(gradient, model), (None, 0))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *workers)
    value, actual = jax.jit(jax.vmap(per_example))(stacked, x)
    single = jax.jit(functools.partial(gradient, reference))
    for w, params in enumerate(workers):
        for i in range(3):
            expected_value, expected = single(params, x[w, i])
            np.testing.assert_allclose(value[w, i], expected_value, rtol=1e-5)
            for a, b in zip(
                jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(a[w, i], b, rtol=1e-4, atol=1e-6)


# Registry


def test_registry_builds_every_model():
    named = {"logistic", "mlp", "small_cnn", "emnist_cnn", "resnet20", "resnet20_batch"}
    assert named <= set(models.MODELS)
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), np.float32)
    for name in models.MODELS:
        model = models.get_model(name, 7)
        logits, _ = jax.eval_shape(
            functools.partial(model.init_with_output, jax.random.key(0)), x
        )
        assert logits.shape == (2, 7)
    assert models.get_model("lenet", 7) == models.LeNet(7)
    assert models.get_model("resnet20_batch", 7) == models.ResNet20(7, norm="batch")


def test_the_binary_model_equals_one_of_two_classes():
    """Its gradient equals that of the second class, as for logits (0, z)."""
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    y = np.array([0, 1, 1, 0, 1])

    def gradient(model):
        params = model.init(jax.random.key(0), x)

        def loss(params):
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        grads = jax.grad(loss)(params)
        return np.concatenate([np.atleast_2d(g) for g in jax.tree.leaves(grads)])

    one, both = (
        gradient(models.BinaryLogistic()),
        gradient(models.get_model("logistic", 2)),
    )
    assert one.shape == (5, 1)
    np.testing.assert_allclose(one[:, 0], both[:, 1], rtol=1e-6)
    np.testing.assert_allclose(one[:, 0], -both[:, 0], rtol=1e-6)


def test_registry_refuses_bad_arguments():
    with pytest.raises(ValueError, match="name='vgg' is unknown: pass one of"):
        models.get_model("vgg", 10)
    with pytest.raises(ValueError, match="num_classes=1: pass at least 2"):
        models.get_model("mlp", 1)
