"""Evaluation sets, divided among the workers."""

import jax.numpy as jnp
import numpy as np
import pytest

import decentral_jax as dj

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [1, 4, {"hub": 2, "worker": 4}])
@pytest.mark.parametrize("num_examples", [1, 3, 8, 21])
def test_the_mean_over_parts_is_the_mean_over_all(shape, num_examples):
    workers = dj.Workers(shape)
    x = RNG.normal(size=(num_examples, 3)).astype(np.float32)
    (part, number), weight = dj.data.split((x, np.arange(num_examples)), workers)
    assert part.shape[:-2] == workers.shape
    # Every example is there once.
    assert sorted(number[weight > 0]) == list(range(num_examples))
    np.testing.assert_array_equal(part[weight > 0], x[number[weight > 0]])

    def one_worker(x, weight):
        return dj.average(jnp.mean(weight[:, None] * x, 0), workers.axis_name)

    means = workers.spmd(one_worker)(*workers.shard((part, weight)))
    np.testing.assert_allclose(
        means, np.broadcast_to(x.mean(0), means.shape), atol=1e-6
    )


def test_sets_that_cannot_be_divided():
    workers = dj.Workers(2)
    with pytest.raises(ValueError, match="at least one example"):
        dj.data.split(np.zeros((0, 2)), workers)
    with pytest.raises(ValueError, match="same number of examples"):
        dj.data.split((np.zeros(3), np.zeros(4)), workers)
    with pytest.raises(TypeError, match="NumPy arrays"):
        dj.data.split([1.0, 2.0], workers)
