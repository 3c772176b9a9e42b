"""Flax models for the experiments, efficient for many workers on one CPU.

Under `jax.vmap` over workers, every worker has its own kernels, and XLA on CPU converts
`lax.conv` to a slow grouped convolution. `Conv` computes the same result with slices
and one matrix product, and pooling is a reshape.

Every model except `Forecaster` and `LSTMLanguageModel` maps images `[batch, ...]` to
logits `[batch, num_classes]`. Call a model as `model.apply(variables, x, train=...)`;
only batch normalization uses `train`. Parameters are float32. All other values have the
dtype of `x`, which must be floating-point, except that language models take integer
tokens and compute in float32.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.errors import UsageError


class Conv(nn.Module):
    """Convolution of images, computed by shifted slices and one matrix product.

    A replacement for `flax.linen.Conv` with the same result up to rounding, the same
    parameters (`kernel` of shape `[kh, kw, in, features]`, `bias` of shape
    `[features]`), and the same initialization. It stores kh * kw shifted copies of its
    input.

    Attributes:
      features: Number of output channels.
      kernel_size: Height and width of the kernel.
      strides: Vertical and horizontal stride.
      padding: "SAME" (zero padding, output size ceil(size / stride)) or "VALID".
      use_bias: Whether to add a bias.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., height, width, in]` to `[..., height', width', features]`."""
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel_size, x.shape[-1], self.features),
            jnp.float32,
        )
        _check_floating(x)
        patches = _patches(x, self.kernel_size, self.strides, self.padding)
        y = patches @ kernel.reshape(-1, self.features).astype(x.dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y


def _check_floating(x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x has dtype {x.dtype}: pass floating-point images, scaled to [0, 1]."
        )


def _patches(
    x: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int], padding: str
) -> jax.Array:
    """Gathers the patch at each output position, `[..., h', w', kh * kw * in]`."""
    if x.ndim < 3:
        raise ValueError(
            f"x has shape {x.shape}: pass images [..., height, width, in]."
        )
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding={padding!r}: pass 'SAME' or 'VALID'.")
    # Output height and width, and the padding that they need.
    pads, sizes = [(0, 0)] * (x.ndim - 3), []
    for size, kernel, stride in zip(x.shape[-3:-1], kernel_size, strides, strict=True):
        if padding == "SAME":
            out = -(-size // stride)
            total = max((out - 1) * stride + kernel - size, 0)
        else:
            out = (size - kernel) // stride + 1
            total = 0
        if out < 1:
            raise ValueError(
                f"kernel_size={kernel_size} does not fit into an image of shape "
                f"{x.shape[-3:-1]}: pass larger images or padding='SAME'."
            )
        pads.append((total // 2, total - total // 2))
        sizes.append(out)
    x = jnp.pad(x, [*pads, (0, 0)])

    def strided(
        x: jax.Array, start: int, out: int, stride: int, axis: int
    ) -> jax.Array:
        stop = start + (out - 1) * stride + 1
        return jax.lax.slice_in_dim(x, start, stop, stride, axis)

    # One strided slice of the image for each entry of the kernel.
    shifted = []
    for i in range(kernel_size[0]):
        rows = strided(x, i, sizes[0], strides[0], axis=-3)
        for j in range(kernel_size[1]):
            shifted.append(strided(rows, j, sizes[1], strides[1], axis=-2))
    return jnp.concatenate(shifted, axis=-1)


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Computes the maximum of each `window` x `window` block, by a reshape.

    Equal to `flax.linen.max_pool` with stride `window`. Rows and columns that do not
    fill a block are dropped. If several values are the maximum, they share the
    gradient.

    Args:
      x: Images `[..., height, width, channels]`.
      window: Side of a block, in pixels.

    Returns:
      Images `[..., height // window, width // window, channels]`.
    """
    *batch, height, width, channels = x.shape
    h, w = height // window, width // window
    x = x[..., : h * window, : w * window, :]
    return x.reshape(*batch, h, window, w, window, channels).max((-4, -2))


class LogisticRegression(nn.Module):
    """One linear layer on the flattened image, initialized to zero (convex problem)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, ...]` to logits `[batch, num_classes]`."""
        _check_floating(x)
        x = x.reshape(x.shape[0], -1)
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_classes, dtype=x.dtype, kernel_init=zeros)(x)


class MLP(nn.Module):
    """Linear layers with a ReLU after each layer except the last.

    Attributes:
      features: Widths of the hidden layers.
      num_classes: Number of logits.
    """

    features: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, ...]` to logits `[batch, num_classes]`."""
        _check_floating(x)
        x = x.reshape(x.shape[0], -1)
        for width in self.features:
            x = nn.relu(nn.Dense(width, dtype=x.dtype)(x))
        return nn.Dense(self.num_classes, dtype=x.dtype)(x)


class BinaryLogistic(nn.Module):
    """Logistic regression with one logit; the logit of the other class is 0.

    A gradient step changes the difference of the logits half as much as a step of
    `LogisticRegression`, in which both classes have weights.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, ...]` to logits `[batch, 2]`."""
        logit = LogisticRegression(1)(x)
        return jnp.concatenate([jnp.zeros_like(logit), logit], axis=-1)


class CNN(nn.Module):
    """Two convolutions with pooling, then two linear layers.

    Attributes:
      num_classes: Number of logits.
      channels: Numbers of output channels of the two convolutions.
      kernel: Height and width of their kernels, in pixels.
      hidden: Width of the first linear layer.
      padding: "SAME" or "VALID".
    """

    num_classes: int
    channels: tuple[int, int] = (16, 32)
    kernel: int = 3
    hidden: int = 64
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, num_classes]`."""
        for width in self.channels:
            conv = Conv(width, (self.kernel, self.kernel), padding=self.padding)
            x = max_pool(nn.relu(conv(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, dtype=x.dtype)(x))
        return nn.Dense(self.num_classes, dtype=x.dtype)(x)


def emnist_cnn(num_classes: int) -> CNN:
    """The network of Castiglia et al. (2021) for 28x28 images."""
    return CNN(num_classes, (10, 20), kernel=5, hidden=100, padding="VALID")


class LeNet(nn.Module):
    """LeNet-5 with ReLU, max pooling, and padding, so that 8x8 images are possible."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, num_classes]`."""
        for width in (6, 16):
            x = max_pool(nn.relu(Conv(width, (5, 5))(x)))
        return MLP((120, 84), self.num_classes)(x)


class ResNet20(nn.Module):
    """The 20-layer residual network for 32x32 images of He et al. (2016).

    The network has three stages of three blocks. If the shape changes, the shortcut is
    a strided 1x1 convolution with normalization (option B). With width 16 and ten
    classes, the network has 272,474 parameters.

    Attributes:
      num_classes: Number of logits.
      norm: "group" (at most 8 groups) or "batch". Batch normalization keeps the running
        statistics of each worker in the collection `batch_stats`; to update them, pass
        `train=True, mutable=["batch_stats"]`. Both kinds compute in float32.
      width: Number of channels of the first stage. The second and third stage have two
        and four times as many.
    """

    num_classes: int
    norm: str = "group"
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, num_classes]`."""
        if self.norm not in ("group", "batch"):
            raise ValueError(f"norm={self.norm!r}: pass 'group' or 'batch'.")

        def conv(x: jax.Array, width: int, size: int, stride: int) -> jax.Array:
            layer = Conv(width, (size, size), (stride, stride), use_bias=False)
            return self._normalize(layer(x), train)

        x = nn.relu(conv(x, self.width, size=3, stride=1))
        for stage, width in enumerate((self.width, 2 * self.width, 4 * self.width)):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(conv(x, width, size=3, stride=stride))
                y = conv(y, width, size=3, stride=1)
                shortcut = x if stride == 1 else conv(x, width, size=1, stride=stride)
                x = nn.relu(y + shortcut)
        return nn.Dense(self.num_classes, dtype=x.dtype)(x.mean((1, 2)))

    def _normalize(self, x: jax.Array, train: bool) -> jax.Array:
        # Flax combines float32 statistics with x, which strict promotion forbids.
        if self.norm == "batch":
            layer = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        else:
            layer = nn.GroupNorm(num_groups=math.gcd(8, x.shape[-1]))
        return layer(x.astype(jnp.float32)).astype(x.dtype)


class Forecaster(nn.Module):
    """MLP with two hidden layers that forecasts 6 values of a series from 20 values."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[batch, 20]` to `[batch, 6]`."""
        return MLP((64, 64), 6)(x)


class LSTMLanguageModel(nn.Module):
    """Stacked LSTM layers with one embedding for input and output tokens.

    Attributes:
      vocabulary: Number of different tokens.
      width: Dimension of the embedding and of the states of the LSTM layers.
      layers: Number of LSTM layers.
    """

    vocabulary: int
    width: int = 32
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Maps integers `[..., length]` to logits `[..., length, vocabulary]`.

        The logits at each position predict the next token. The initial states are zero.
        """
        embed = nn.Embed(self.vocabulary, self.width)
        cells = [nn.OptimizedLSTMCell(self.width) for _ in range(self.layers)]
        stack = nn.Sequential([nn.RNN(cell) for cell in cells])
        return embed.attend(stack(embed(tokens)))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "logistic": LogisticRegression,
    "small_mlp": lambda num_classes: MLP((32,), num_classes),
    "mlp": lambda num_classes: MLP((128,), num_classes),
    "small_cnn": CNN,
    "emnist_cnn": emnist_cnn,
    "lenet": LeNet,
    "resnet20": ResNet20,
    "resnet20_batch": lambda num_classes: ResNet20(num_classes, norm="batch"),
}


def get_model(name: str, num_classes: int) -> nn.Module:
    """Builds a model with its default sizes.

    Args:
      name: A key of `MODELS`.
      num_classes: Number of logits, at least 2.

    Returns:
      The module, without parameters.

    Raises:
      UsageError: If the name is unknown, or `num_classes` is less than 2.
    """
    if name not in MODELS:
        raise UsageError(f"name={name!r} is unknown: pass one of {tuple(MODELS)}.")
    if num_classes < 2:
        raise UsageError(f"num_classes={num_classes!r}: pass at least 2.")
    return MODELS[name](num_classes)
