"""A simulator as papers write them: a NumPy loop over workers, same arithmetic.

What `benchmarks.one_device.local_updates` is measured against: logistic
regression and the CNN of the Multi-Level Local SGD paper, one worker after the other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Params = dict[str, np.ndarray]


def logistic_gradient(params: Params, x: np.ndarray, y: np.ndarray) -> Params:
    """Of the mean loss of digits in two classes; x `[B, 784]`, y `[B]` of 0 and 1."""
    z = x @ params["kernel"] + params["bias"]
    residual = (1 / (1 + np.exp(-z)) - y[:, None]) / len(y)
    return {"kernel": x.T @ residual, "bias": residual.sum(0)}


def cnn_gradient(params: Params, x: np.ndarray, y: np.ndarray) -> Params:
    """Two 5x5 convolutions with pooling, two linear layers; x `[B, 28, 28, 1]`."""
    p1, c1 = _conv(x, params["conv1"], params["bias1"])
    h1, back1 = _pool(np.maximum(c1, 0))
    p2, c2 = _conv(h1, params["conv2"], params["bias2"])
    h2, back2 = _pool(np.maximum(c2, 0))
    flat = h2.reshape(len(x), -1)
    a = flat @ params["dense1"] + params["bias3"]
    h3 = np.maximum(a, 0)
    logits = h3 @ params["dense2"] + params["bias4"]
    e = np.exp(logits - logits.max(1, keepdims=True))
    d = e / e.sum(1, keepdims=True)
    d[np.arange(len(y)), y] -= 1
    d /= len(y)
    grads = {"dense2": h3.T @ d, "bias4": d.sum(0)}
    d = (d @ params["dense2"].T) * (a > 0)
    grads |= {"dense1": flat.T @ d, "bias3": d.sum(0)}
    d = back2((d @ params["dense1"].T).reshape(h2.shape)) * (c2 > 0)
    grads |= {"conv2": _kernel_gradient(p2, d, 10), "bias2": d.sum((0, 1, 2))}
    padded = np.pad(d, ((0, 0), (4, 4), (4, 4), (0, 0)))
    turned = params["conv2"][::-1, ::-1].swapaxes(2, 3)
    _, d = _conv(padded, turned, np.float32(0))
    d = back1(d) * (c1 > 0)
    return grads | {"conv1": _kernel_gradient(p1, d, 1), "bias1": d.sum((0, 1, 2))}


def _conv(x, kernel, bias):
    """Patches `[B, h, w, 25 * in]` and the convolution, by one matrix product."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)
    return patches, patches @ kernel.reshape(-1, kernel.shape[-1]) + bias


def _kernel_gradient(patches, d, channels):
    flat = patches.reshape(-1, patches.shape[-1]).T @ d.reshape(-1, d.shape[-1])
    return flat.reshape(5, 5, channels, d.shape[-1])


def _pool(x):
    """The largest of each 2x2 block, and the way back for gradients."""
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
    """Multi-Level Local SGD, all workers at rate 1.

    Args:
      gradient: Of a worker.
      params: The common start.
      hubs: The hubs' mixing matrix `[D, D]`.
      batches: Examples `[ticks, D, N, B]`.
      data: Images as bytes, and labels.
      rate: The step size.
      tau: Ticks from one average inside hubs to the next.
      q: Averages inside hubs from one exchange between hubs to the next.

    Returns:
      Each worker's parameters.
    """
    x, y = data
    ticks, num_hubs, per_hub, _ = batches.shape
    workers: list[Any] = [
        {k: v.copy() for k, v in params.items()} for _ in range(num_hubs * per_hub)
    ]
    for t in range(ticks):
        for i, own in enumerate(workers):
            batch = batches[t, i // per_hub, i % per_hub]
            images = x[batch].astype(np.float32) / np.float32(255)
            grads = gradient(own, images, y[batch])
            for k in own:
                own[k] -= np.float32(rate) * grads[k]
        if (t + 1) % tau == 0:
            for k in params:
                z = np.stack([own[k] for own in workers])
                z = z.reshape(num_hubs, per_hub, *z.shape[1:]).mean(1)
                if (t + 1) % (q * tau) == 0:
                    z = np.tensordot(hubs.astype(np.float32), z, 1)
                for i, own in enumerate(workers):
                    own[k] = z[i // per_hub].copy()
    return workers
