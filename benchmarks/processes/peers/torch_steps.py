"""PyTorch process of `multi_process.py`, which builds and times steps on command."""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from torch import distributed, nn  # pyright: ignore[reportMissingImports]

from benchmarks.support.answers import ANSWERS

WIDTH = int(sys.argv[1])
RATE = 0.01


def model():
    """Returns the same MLP as in JAX."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def plain(wrap, momentum=0.0):
    """Returns a training step of plain PyTorch, with a wrapped model."""
    net = wrap(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=momentum)

    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def decent_dp(topology):
    """Returns a training step of Decent-DP, which steps inside the backward pass."""
    from decent_dp.ddp import (  # pyright: ignore[reportMissingImports]
        DecentralizedDataParallel,
    )

    def optimizer(named):
        return torch.optim.SGD([parameter for _, parameter in named], lr=RATE)

    net = DecentralizedDataParallel(model(), optim_fn=optimizer, topology=topology)

    def step(x, y):
        nn.functional.cross_entropy(net(x), y).backward()

    return step


def ddp(net):
    """Wraps a model by PyTorch's DDP, without copies between gradients and buckets."""
    return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)


BUILD = {
    "none": lambda: plain(lambda net: net),
    "DDP": lambda: plain(ddp),
    "none, momentum": lambda: plain(lambda net: net, 0.9),
    "DDP, momentum": lambda: plain(ddp, 0.9),
    "Decent-DP ring": lambda: decent_dp("ring"),
    "Decent-DP exp": lambda: decent_dp("one-peer-exp"),
}


def main() -> None:
    """Executes commands until standard input ends."""
    distributed.init_process_group("gloo")
    x, y = torch.randn(16, 784), torch.arange(16) % 10
    built = {}
    for line in sys.stdin:
        command, name, *rest = json.loads(line)
        if command == "make":
            built[name] = BUILD[name]()
            print(json.dumps(None), file=ANSWERS)
            continue
        (steps,) = rest
        start = time.perf_counter()
        for _ in range(steps):
            built[name](x, y)
        print(json.dumps(1e3 * (time.perf_counter() - start) / steps), file=ANSWERS)


if __name__ == "__main__":
    main()
