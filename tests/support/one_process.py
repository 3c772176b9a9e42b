"""Runs trajectories and example orders on several processes.

test_processes.py starts it.

Usage: python -m decentral_jax.launch --processes P --devices D
    tests/support/one_process.py DTYPE ALGORITHM ...
"""

import sys

import jax
import numpy as np

import decentral_jax as dj
from tests.contracts.test_trajectories import expected, problem, schedule, trajectory
from tests.support.layouts import named
from tests.support.registry import ALGORITHMS
from tests.transforms.test_ordering import METHODS, gradients, orders
from tests.transforms.test_ordering import expected as expected_orders

ORDERS = ("d_grab", "d_grab, gathered", "pair_balance", "grab")
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}


def main(dtype: str, names: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_enable_x64", dtype == "float64")
    dj.initialize(timeout=120)
    for name in names:
        algorithm = ALGORITHMS[name]
        sizes = named(algorithm.shape)
        workers = dj.Workers(sizes)
        assert workers.num_devices == jax.device_count()
        run = workers.spmd(trajectory(algorithm.make(schedule), tuple(sizes)))
        data = jax.tree.map(
            lambda x, sizes=sizes: x.reshape(*sizes.values(), *x.shape[1:]).astype(
                dtype
            ),
            problem(),
        )
        path = workers.gather(run(workers.shard(data)))
        np.testing.assert_allclose(
            path.reshape(8, *path.shape[len(sizes) :]),
            expected(name),
            rtol=0,
            atol=TOLERANCES[dtype],
            err_msg=name,
        )
    for name in ORDERS:
        make, method = METHODS[name]
        workers = dj.Workers(8)
        run = workers.spmd(orders(make(10, 8), 2, 10))
        vectors = np.moveaxis(gradients(4, 8, 10), 1, 0).astype(dtype)
        found = workers.gather(run(workers.shard(vectors)))
        reference = np.moveaxis(expected_orders(method, 4, 8, 10), 1, 0)
        np.testing.assert_array_equal(found, reference, err_msg=name)
    print(f"{len(names)} equal on {jax.process_count()} processes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(ALGORITHMS))
