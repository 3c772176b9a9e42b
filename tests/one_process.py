"""One of several processes that run trajectories together; see test_processes.py.

Usage: python tests/one_process.py RANK PROCESSES PORT ALGORITHM ...
"""

import os
import sys

import jax
import numpy as np

import decentral_jax as dj
from tests.layouts import named
from tests.registry import ALGORITHMS
from tests.test_trajectories import expected, problem, schedule, trajectory


def main(rank: int, processes: int, port: int, names: list[str]) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // processes}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    for name in names:
        algorithm = ALGORITHMS[name]
        sizes = named(algorithm.shape)
        workers = dj.Workers(sizes)
        assert workers.num_devices == 8
        run = workers.spmd(trajectory(algorithm.make(schedule), tuple(sizes)))
        data = jax.tree.map(
            lambda x, sizes=sizes: x.reshape(*sizes.values(), *x.shape[1:]), problem()
        )
        path = workers.gather(run(workers.shard(data)))
        np.testing.assert_allclose(
            path.reshape(8, *path.shape[len(sizes) :]),
            expected(name),
            rtol=0,
            atol=1e-10,
            err_msg=name,
        )
    print("equal")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4:])
