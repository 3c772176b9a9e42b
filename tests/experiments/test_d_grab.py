"""Herding equals the reference's order server, and training equals plain SGD."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import decentral_jax as dj
from experiments import report
from experiments.runs import herding
from experiments.training import ordered, tasks
from tests.experiments.files import read_charts
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
    vectors = herding.unit_vectors(m * n, 5, 0).reshape(m, n, 5).astype(np.float64)
    found = herding.herding(make(n, m), jnp.asarray(vectors), rounds)
    orders = ordering.run(method, lambda e, w, i: vectors[w, i], n, m, rounds)
    expected = [ordering.herding_bound(vectors, o) for o in orders[:rounds]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_vectors_have_norm_one_and_mean_zero():
    x = herding.unit_vectors(10_000, 16, 1)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=0.02)
    np.testing.assert_allclose(x.astype(np.float64).sum(0), 0, atol=1e-3)
    assert not np.array_equal(x, herding.unit_vectors(10_000, 16, 2))


def test_herding(run):
    small = ["--vectors", "2400", "--shared-by", "2", "12", "--rounds", "12"]
    out = run("d-grab", "--parts", "herding", *small, "--draws", "2")
    assert (out / "herding.png").stat().st_size > 10_000
    rows = report.read_csv(out / "herding.csv")
    (chart,) = read_charts(out / "d_grab.html")
    assert len(chart) == 4

    def bound(method, workers):
        return np.mean(
            [
                float(row["bound"])
                for row in rows
                if (row["method"], row["workers"]) == (method, str(workers))
            ]
        )

    # D-GraB's bound stays flat in the number of workers; the others grow.
    assert bound("D-GraB", 12) < 1.3 * bound("D-GraB", 2)
    assert bound("ID-GraB, pairs", 12) > 1.5 * bound("ID-GraB, pairs", 2)
    assert bound("D-GraB", 12) < bound("ID-GraB, mean", 12) < bound("D-RR", 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vectors", "100", "--shared-by", "3"], "--vectors 100 must divide"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--source", "a9a"], "--source 'a9a' requires a single task"),
        (
            ["--tasks", "lenet", "--source", "a9a"],
            "--source 'a9a' for the task lenet must be",
        ),
        (["--tasks", "forecast"], "m4 is read from files: pass --data-dir"),
        (["--examples", "7"], "--workers 16 is too many for the 7 examples of"),
    ],
)
def test_bad_options(fails, arguments, message):
    fails(message, "d-grab", *arguments)


def test_training(run):
    """On digits, D-GraB ends at a lower loss than random orders."""
    arguments = ["--tasks", "logistic", "--rates", "0.4", "--epochs", "6"]
    arguments += ["--seeds", "2", "--workers", "4", "8"]
    out = run("d-grab", "--parts", "training", *arguments)
    assert (out / "logistic_digits.png").stat().st_size > 10_000
    rows = report.read_csv(out / "logistic_digits.csv")
    assert len(rows) == 2 * 4 * 2 * 7
    assert [len(chart) for chart in read_charts(out / "d_grab.html")] == [4, 4]
    loss = {
        (row["workers"], row["method"], row["seed"], row["epoch"]): float(
            row["train_loss"]
        )
        for row in rows
    }
    for workers in ("4", "8"):
        for seed in ("0", "1"):
            # All methods share the start and the first epoch; D-GraB ends lower.
            for epoch in ("0", "1"):
                ends = {
                    loss[workers, method, seed, epoch]
                    for method in ("D-GraB", "D-RR", "ID-GraB, pairs", "ID-GraB, mean")
                }
                assert max(ends) - min(ends) < 1e-5
            random = loss[workers, "D-RR", seed, "6"]
            assert loss[workers, "D-GraB", seed, "6"] < random - 1e-3


def test_training_equals_plain_sgd():
    """One worker and one epoch equal minibatch SGD in NumPy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 20)).astype(np.float32), rng.normal(size=(6, 6))
    task = tasks.Task(
        name="least squares",
        model=Linear(),
        loss=lambda outputs, y: jnp.square(outputs - y).mean(),
        x=x,
        y=y.astype(np.float32),
        rates=(),
        momentum=0.5,
        epochs=1,
        penalty=0.1,
    )
    found = ordered.train(dj.random_reshuffling(6), task, 1, (0.3, 0.1), (0, 1))
    assert found.shape == (2, 2, 2)
    for i, rate in enumerate((0.3, 0.1)):
        for seed in (0, 1):
            order = np.random.default_rng(seed).permutation(6)
            w, velocity = np.zeros((20, 6)), np.zeros((20, 6))
            for pair in order.reshape(3, 2):
                error = x[pair] @ w - y[pair]
                grad = x[pair].T @ error * 2 / error.size + 0.1 * w
                velocity = 0.5 * velocity + grad
                w = w - rate * velocity
            loss = np.square(x @ w - y).mean() + 0.05 * np.square(w).sum()
            np.testing.assert_allclose(found[i, seed, 1], loss, rtol=1e-5)
            np.testing.assert_allclose(found[i, seed, 0], np.square(y).mean(), 1e-5)


class Linear(nn.Module):
    """A linear map that starts at zero."""

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return x @ self.param("w", zeros, (20, 6), jnp.float32)
