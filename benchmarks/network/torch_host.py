"""PyTorch process of one host of the network benchmark: DDP or Decent-DP, over gloo."""

import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import distributed, nn  # pyright: ignore[reportMissingImports]

from benchmarks.network import tasks
from benchmarks.support.answers import RANK, SIZE, obey

# The JAX side provides the data, because this interpreter may lack scikit-learn.
with np.load(sys.argv[1]) as file:
    X, Y, X_TEST, Y_TEST = (torch.from_numpy(file[k]) for k in ("a", "b", "c", "d"))


class Training:
    """Training by SGD with momentum, with one learning rate."""

    def __init__(self, name: str, rate: float):
        self.name, self.rate = name, rate
        self.restart()
        self.run(8)
        self.restart()

    def restart(self) -> None:
        """Resets parameters and batches to the initial ones, the same as in JAX."""
        layers = []
        for layer in tasks.initial_params():
            linear = nn.Linear(*layer["kernel"].shape)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(layer["kernel"].T))
                linear.bias.zero_()
            layers += [linear, nn.ReLU()]
        self.plain = nn.Sequential(*layers[:-1])
        self.drawn = tasks.batches(SIZE)
        if self.name.startswith("Decent-DP"):
            self.net, self.optimizer = self._decent_dp(), None
            return
        self.net = nn.parallel.DistributedDataParallel(
            self.plain, gradient_as_bucket_view=True
        )
        self.optimizer = self._sgd(self.net.parameters())

    def _sgd(self, parameters):
        return torch.optim.SGD(parameters, lr=self.rate, momentum=tasks.MOMENTUM)

    def _decent_dp(self):
        """Wraps the model by Decent-DP, which steps inside the backward pass."""
        from decent_dp.ddp import (  # pyright: ignore[reportMissingImports]
            DecentralizedDataParallel,
        )

        return DecentralizedDataParallel(
            self.plain,
            optim_fn=lambda named: self._sgd([parameter for _, parameter in named]),
            topology=self.name.partition(" ")[2],
        )

    def run(self, steps: int) -> float:
        """Runs some training steps, and returns the seconds that they take."""
        chosen = [torch.from_numpy(next(self.drawn)[RANK]) for _ in range(steps)]
        batches = [(X[c], Y[c].long()) for c in chosen]
        start = time.perf_counter()
        for x, y in batches:
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(self.net(x), y).backward()
            if self.optimizer is not None:
                self.optimizer.step()
        return time.perf_counter() - start

    def accuracy(self) -> float:
        """Returns the accuracy of this host's model on the test images."""
        with torch.no_grad():
            return (self.plain(X_TEST).argmax(-1) == Y_TEST).float().mean().item()


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    obey({"training": Training})
