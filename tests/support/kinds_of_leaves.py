"""Puts leaves of every kind on workers and fetches them back.

test_workers.py runs it in one process, test_processes.py in several.

Usage: python -m decentral_jax.launch --processes P --devices D
    tests/support/kinds_of_leaves.py FOLDER
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import decentral_jax as dj
from decentral_jax.checkpoints import Checkpoints

N = 4
DTYPES = ["bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32"]
DTYPES += ["complex64", "int4", "uint4", "float4_e2m1fn", "float8_e3m4"]
DTYPES += ["float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2"]
IMPLEMENTATIONS = ["threefry2x32", "rbg"]


def of_one_worker():
    """One worker's values, keyed by kind."""
    arrays = {dtype: jnp.asarray([[0, 1], [1, 0]], dtype) for dtype in DTYPES}
    return {
        **{f"jax {dtype}": x for dtype, x in arrays.items()},
        **{f"numpy {dtype}": np.asarray(x) for dtype, x in arrays.items()},
        **{f"key {one}": jax.random.key(7, impl=one) for one in IMPLEMENTATIONS},
        "keys": jax.random.split(jax.random.key(1), (2, 3)),
        "raw key": jax.random.PRNGKey(3),
        "numpy scalar": np.float32(0.5),
        "numpy bool scalar": np.bool_(True),
        "numpy bfloat16 scalar": jnp.bfloat16(0.5),
        "empty": np.zeros((0, 3), np.float32),
        "float": 0.5,
        "int": 3,
        "bool": True,
        "complex": 1j,
    }


def is_key(x):
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def plain(x):
    """The documented result of `gather`: NumPy arrays, and the data of keys."""
    return np.asarray(jax.random.key_data(x) if is_key(x) else jnp.asarray(x))


def stacked(x):
    """One value per worker along a leading axis."""
    if is_key(x):
        return (
            jax.vmap(lambda i: jax.random.fold_in(x, i))(jnp.arange(N))
            if x.ndim == 0
            else jnp.stack([x] * N)
        )
    return (jnp if isinstance(x, jax.Array) else np).stack([x] * N)


def check(workers):
    """Checks every kind of leaf with every function, named by kind in errors."""
    for name, x in of_one_worker().items():
        copies = workers.replicate(x)
        assert copies.shape == (N, *np.shape(x)), name
        assert copies.dtype == jnp.asarray(x).dtype, name
        assert_same(name, workers.gather(copies), np.stack([plain(x)] * N))
        whole = stacked(x)
        wanted = plain(whole)
        assert_same(name, workers.gather(workers.shard(whole)), wanted)
        own = workers.shard(whole[workers.local], local=True)
        assert own.sharding == workers.shard(whole).sharding, name
        assert_same(name, workers.gather(own), wanted)
        for again in (workers.shard(own), workers.spmd(lambda x: x)(own)):
            assert_same(name, workers.gather(again), wanted)
    keys = workers.shard(jax.random.split(jax.random.key(5), N))
    draws = workers.spmd(lambda key: jax.random.uniform(key))(keys)
    expected = jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(5), N))
    assert_same("draws", workers.gather(draws), np.asarray(expected))


def assert_same(name, found, wanted):
    assert isinstance(found, np.ndarray), name
    assert found.dtype == wanted.dtype, (name, found.dtype, wanted.dtype)
    np.testing.assert_array_equal(found, wanted, err_msg=name)


def check_checkpoints(workers, folder):
    """Saves and restores all kinds in one checkpoint, from arrays on the devices."""
    one = of_one_worker()
    state = {
        "replicated": workers.replicate(one),
        "own": {name: workers.shard(stacked(x)) for name, x in one.items()},
    }
    like = jax.tree.map(lambda x: workers.spmd(jnp.zeros_like)(x), state)
    with Checkpoints(folder, workers) as checkpoints:
        checkpoints.save(1, state)
        found = checkpoints.restore(like).state
    for path, x in jax.tree.leaves_with_path(found):
        before = state[path[0].key][path[1].key]
        assert x.dtype == before.dtype, path
        assert_same(str(path), workers.gather(x), workers.gather(before))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    dj.initialize(timeout=120)
    check(dj.Workers(N))
    check_checkpoints(dj.Workers(N), sys.argv[1])
    print(f"all kinds equal on {jax.process_count()} processes")
