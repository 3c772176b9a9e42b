"""The herding test, against the plain order server and its bound."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

import decentral_jax as dj
from experiments import d_grab
from tests.reference import ordering


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("d_grab", lambda n, m: dj.d_grab(n, m)),
        ("pair_balance", lambda n, m: dj.pair_balance(n)),
        ("grab", lambda n, m: dj.grab(n)),
    ],
)
def test_bounds_equal_the_references(method, make, x64):
    m, n, rounds = 3, 20, 4
    vectors = d_grab.unit_vectors(m * n, 5, 0).reshape(m, n, 5).astype(np.float64)
    found = d_grab.herding(make(n, m), jnp.asarray(vectors), rounds)
    orders = ordering.run(method, lambda e, w, i: vectors[w, i], n, m, rounds)
    expected = [ordering.herding_bound(vectors, o) for o in orders[:rounds]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_vectors_have_norm_one_and_mean_zero():
    x = d_grab.unit_vectors(10_000, 16, 1)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=0.02)
    np.testing.assert_allclose(x.astype(np.float64).sum(0), 0, atol=1e-3)
    assert not np.array_equal(x, d_grab.unit_vectors(10_000, 16, 2))


def test_herding(run):
    small = ["--vectors", "2400", "--workers", "2", "12", "--rounds", "12"]
    out = run("d-grab", *small, "--seeds", "2") / "d_grab"
    assert (out / "herding.png").stat().st_size > 10_000
    with (out / "herding.csv").open() as file:
        rows = list(csv.DictReader(file))

    def bound(method, workers):
        return np.mean(
            [
                float(row["bound"])
                for row in rows
                if (row["method"], row["workers"]) == (method, str(workers))
            ]
        )

    # Flat in the number of workers, where the others grow.
    assert bound("D-GraB", 12) < 1.3 * bound("D-GraB", 2)
    assert bound("ID-GraB, pairs", 12) > 1.5 * bound("ID-GraB, pairs", 2)
    assert bound("D-GraB", 12) < bound("ID-GraB, mean", 12) < bound("D-RR", 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vectors", "100", "--workers", "3"], "vectors=100 must divide"),
        (["--rounds", "0"], "rounds and seeds must be at least 1"),
    ],
)
def test_bad_options(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("d-grab", *arguments)
