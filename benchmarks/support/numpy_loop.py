"""A typical simulator: a NumPy loop over workers with the same arithmetic.

The baseline of `benchmarks.one_device.local_updates`: logistic regression and the CNN
of the Multi-Level Local SGD paper, one worker after the other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Params = dict[str, np.ndarray]


def logistic_gradient(params: Params, x: np.ndarray, y: np.ndarray) -> Params:
    """Returns the gradient of the mean logistic loss.

    Args:
      params: Kernel `[784, 1]` and bias `[1]`.
      x: Images, shape `[B, 784]`.
      y: Labels 0 and 1, shape `[B]`.
    """
    z = x @ params["kernel"] + params["bias"]
    residual = (1 / (1 + np.exp(-z)) - y[:, None]) / len(y)
    return {"kernel": x.T @ residual, "bias": residual.sum(0)}


def cnn_gradient(params: Params, x: np.ndarray, y: np.ndarray) -> Params:
    """Returns the gradient of the mean cross-entropy of the CNN.

    The CNN has two 5x5 convolutions with pooling, and two linear layers.

    Args:
      params: Kernels and biases.
      x: Images, shape `[B, 28, 28, 1]`.
      y: Labels, shape `[B]`.
    """
    # Forward pass.
    p1, c1 = _conv(x, params["conv1"], params["bias1"])
    h1, back1 = _pool(np.maximum(c1, 0))
    p2, c2 = _conv(h1, params["conv2"], params["bias2"])
    h2, back2 = _pool(np.maximum(c2, 0))
    flat = h2.reshape(len(x), -1)
    a = flat @ params["dense1"] + params["bias3"]
    h3 = np.maximum(a, 0)
    logits = h3 @ params["dense2"] + params["bias4"]
    # Backward pass: d is the gradient with respect to the output of each layer.
    e = np.exp(logits - logits.max(1, keepdims=True))
    d = e / e.sum(1, keepdims=True)
    d[np.arange(len(y)), y] -= 1
    d /= len(y)
    grads = {"dense2": h3.T @ d, "bias4": d.sum(0)}
    d = (d @ params["dense2"].T) * (a > 0)
    grads |= {"dense1": flat.T @ d, "bias3": d.sum(0)}
    d = back2((d @ params["dense1"].T).reshape(h2.shape)) * (c2 > 0)
    grads |= {"conv2": _kernel_gradient(p2, d, 10), "bias2": d.sum((0, 1, 2))}
    # The gradient of a convolution with respect to its input is a convolution with the
    # rotated kernel.
    padded = np.pad(d, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rotated = params["conv2"][::-1, ::-1].swapaxes(2, 3)
    _, d = _conv(padded, rotated, np.float32(0))
    d = back1(d) * (c1 > 0)
    return grads | {"conv1": _kernel_gradient(p1, d, 1), "bias1": d.sum((0, 1, 2))}


def _conv(x, kernel, bias):
    """Returns patches, `[B, h, w, 25 * in]`, and the convolution of an image batch."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)
    return patches, patches @ kernel.reshape(-1, kernel.shape[-1]) + bias


def _kernel_gradient(patches, d, channels):
    """Returns the gradient with respect to a 5x5 kernel."""
    flat = patches.reshape(-1, patches.shape[-1]).T @ d.reshape(-1, d.shape[-1])
    return flat.reshape(5, 5, channels, d.shape[-1])


def _pool(x):
    """Returns the maximum of each 2x2 block, and a function for its backward pass."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    top = blocks.max((2, 4), keepdims=True)

    def back(d):
        return ((blocks == top) * d[:, :, None, :, None]).reshape(x.shape)

    return top[:, :, 0, :, 0], back


def multi_level_loop(
    gradient: Callable[..., Params],
    params: Params,
    hubs: np.ndarray,
    batches: np.ndarray,
    data: tuple[np.ndarray, np.ndarray],
    rate: float,
    tau: int,
    q: int,
) -> list[Params]:
    """Runs Multi-Level Local SGD with operating rate 1 for all workers.

    Args:
      gradient: Function from parameters, images, and labels to the gradient.
      params: Initial parameters of all workers.
      hubs: Mixing matrix of the hubs, shape `[D, D]`.
      batches: Indices of examples, shape `[ticks, D, N, B]`.
      data: Images as bytes, and labels.
      rate: Learning rate.
      tau: Number of ticks between two averages inside hubs.
      q: Number of averages inside hubs between two exchanges among hubs.

    Returns:
      The parameters of each worker.
    """
    x, y = data
    ticks, num_hubs, per_hub, _ = batches.shape
    workers: list[Any] = [
        {k: v.copy() for k, v in params.items()} for _ in range(num_hubs * per_hub)
    ]
    for t in range(ticks):
        # A gradient step of each worker.
        for i, own in enumerate(workers):
            batch = batches[t, i // per_hub, i % per_hub]
            images = x[batch].astype(np.float32) / np.float32(255)
            grads = gradient(own, images, y[batch])
            for k in own:
                own[k] -= np.float32(rate) * grads[k]
        # The average inside each hub, and the exchange among hubs.
        if (t + 1) % tau == 0:
            for k in params:
                z = np.stack([own[k] for own in workers])
                z = z.reshape(num_hubs, per_hub, *z.shape[1:]).mean(1)
                if (t + 1) % (q * tau) == 0:
                    z = np.tensordot(hubs.astype(np.float32), z, 1)
                for i, own in enumerate(workers):
                    own[k] = z[i // per_hub].copy()
    return workers
