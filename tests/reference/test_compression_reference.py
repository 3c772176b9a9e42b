"""The compression references against results by hand and invariants."""

import functools

import numpy as np
import pytest

from . import averaging, compression, gossip

WORKERS, DIMENSION, STEPS, BETA = 4, 5, 9, 0.7
X0 = [1, -2, 3, 0, 1]  # integers: the references must compute in float64
CLOSE = {"rtol": 1e-12, "atol": 1e-13, "equal_nan": False}


def gamma(t):
    return 0.2 / (t + 2)


@functools.cache
def noise(t, i, shape=DIMENSION):
    return np.random.default_rng((t, i)).normal(size=shape)


@functools.cache
def quadratic(i, shape):
    rng = np.random.default_rng(100 + i)
    return rng.uniform(0.5, 1.5, shape), rng.normal(size=shape)


def grad_fn(t, i, x):
    """Gradients of quadratics that differ between workers, with noise."""
    a, b = quadratic(i, x.shape)
    return a * (x - b) + noise(t, i, x.shape)


def with_momentum(function, beta):
    """Turns gradients g into beta m + g; references call it once per iteration."""
    buffers = {}

    def momentum_fn(t, i, x):
        buffers[i] = beta * buffers.get(i, 0.0) + function(t, i, x)
        return buffers[i]

    return momentum_fn


def buffers(function, params, beta):
    """The momentum of every iteration and worker at the points in `params`."""
    momentum_fn = with_momentum(function, beta)
    return np.array(
        [
            [momentum_fn(t, i, x) for i, x in enumerate(X)]
            for t, X in enumerate(params[:-1])
        ]
    )


def updates(run):
    """gamma_t m_i of every iteration and worker."""
    return np.array(
        [gamma(t) * m for t, m in enumerate(buffers(grad_fn, run.params, BETA))]
    )


def identity(t, i, v):
    return v


def nothing(t, i, v):
    return np.zeros_like(v)


def keep(j):
    """A compressor that keeps only entry j."""
    return lambda t, i, v: np.where(np.arange(len(v)) == j, v, 0.0)


COMPRESSORS = {
    "identity": identity,
    "nothing": nothing,
    "random_block": lambda t, i, v: compression.random_block(v, 2, 3 * t),
    "random_k": lambda t, i, v: compression.random_k(v, [t % 5, (t + i + 1) % 5]),
    "top_k": lambda t, i, v: compression.top_k(v, 2),
    "sign": lambda t, i, v: compression.sign(v),
    "quantize": lambda t, i, v: compression.quantize(
        v, 2, np.random.default_rng((t, i, 7)).uniform(size=len(v))
    ),
    "cast_bfloat16": lambda t, i, v: compression.cast_bfloat16(v),
}
over_compressors = pytest.mark.parametrize(
    "compress", COMPRESSORS.values(), ids=COMPRESSORS
)


class Recorder:
    """A compressor that records the arguments and results of its calls."""

    def __init__(self, compress):
        self.compress, self.calls, self.given, self.sent = compress, [], [], []

    def __call__(self, t, i, v):
        self.calls.append((t, i))
        self.given.append(v.copy())
        self.sent.append(self.compress(t, i, v.copy()))
        v[:] = np.nan  # the reference must not depend on this array
        return self.sent[-1].copy()

    def stacks(self):
        shape = (-1, WORKERS, DIMENSION)
        return np.reshape(self.given, shape), np.reshape(self.sent, shape)


# Compressors


@pytest.mark.parametrize(
    ("ratio", "start", "expected"),
    [
        (2, 4, [1, 2, 0, 0, 5]),
        (2, 0, [1, 2, 3, 0, 0]),
        (4, 3, [0, 0, 0, 4, 5]),
        (5, 2, [0, 0, 3, 0, 0]),
        (64, 4, [0, 0, 0, 0, 5]),
        (1, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_random_block(ratio, start, expected):
    sent = compression.random_block(np.arange(1.0, 6.0), ratio, start)
    np.testing.assert_array_equal(sent, expected)


def test_random_k():
    sent = compression.random_k(np.arange(1.0, 6.0), [3, 0])
    np.testing.assert_array_equal(sent, [1, 0, 0, 4, 0])


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [0, -3, 0, 0, 0]), (2, [0, -3, 3, 0, 0]), (4, [0, -3, 3, 2, -3])],
)
def test_top_k(k, expected):
    v = np.array([1.0, -3.0, 3.0, 2.0, -3.0])
    np.testing.assert_array_equal(compression.top_k(v, k), expected)


def test_sign():
    sent = compression.sign(np.array([3.0, -1.0, 0.0, -4.0]))
    np.testing.assert_array_equal(sent, [2, -2, 2, -2])


def test_quantize_by_hand():
    v = np.array([2.0, -2.0, 0.0, 0.0, 1.0])
    uniform = np.array([0.5, 0.999, 0.5, 0.49, 0.0])
    # (v / 2 + 1) / 2 * 3 = 3, 0, 1.5, 1.5, 2.25, so q = 3, 0, 2, 1, 2
    sent = compression.quantize(v, 2, uniform)
    np.testing.assert_allclose(sent, [2, -2, 2 / 3, -2 / 3, 2 / 3], rtol=1e-15)


def test_quantize_edges():
    largest = np.nextafter(1.0, 0.0)
    sent = compression.quantize(np.array([3.0, -3.0]), 8, np.full(2, largest))
    np.testing.assert_array_equal(sent, [3, -3])
    zeros = compression.quantize(np.zeros(3), 4, np.full(3, largest))
    np.testing.assert_array_equal(zeros, np.zeros(3))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_quantize_is_unbiased(bits):
    v = noise(0, 0)
    draws = (np.arange(2000) + 0.5) / 2000  # on a grid, the error is O(1 / 2000)
    sent = np.array([compression.quantize(v, bits, np.full(5, u)) for u in draws])
    step = 2 * np.abs(v).max() / (2**bits - 1)
    assert np.abs(sent.mean(0) - v).max() <= step / 2000
    assert np.abs(sent - v).max() <= step
    assert len(np.unique(np.round(sent, 9))) <= 2**bits


def test_cast_bfloat16():
    v = np.array([1 + 2**-7, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, 0.0])
    sent = compression.cast_bfloat16(v)
    assert sent.dtype == np.float64
    np.testing.assert_array_equal(sent, [1 + 2**-7, 1, 1 + 2**-6, -1, 0])


@over_compressors
def test_compressors_keep_shape_and_input(compress):
    v = noise(1, 2)
    given = v.copy()
    sent = compress(3, 1, v)
    assert sent.shape == v.shape
    assert sent.dtype == np.float64
    np.testing.assert_array_equal(v, given)


# Error feedback, detached and partial


def test_hand_worked_error_feedback():
    """Two iterations, gradients (1, 2) and (3, 4), gamma 1; only entry 0 is sent."""

    def constant(t, i, x):
        return np.array([1.0, 2.0]) + 2.0 * i

    args = (constant, np.zeros(2), 2, 1.0, 2, keep(0))
    run = compression.def_sgd(*args, 0.25)
    np.testing.assert_array_equal(run.shared, [[0, 0], [-2, 0], [-4, 0]])
    np.testing.assert_array_equal(run.errors[1:], [[[0, 2], [0, 4]], [[0, 4], [0, 8]]])
    np.testing.assert_array_equal(run.params[2], [[-4, -1], [-4, -2]])
    np.testing.assert_array_equal(
        compression.def_a_model(run), [[0, 0], [-2, -3], [-4, -6]]
    )
    run = compression.pef_sgd(*args, 0.25, 0.5)
    np.testing.assert_array_equal(run.shared, [[0, 0], [-2, 0], [-4, 0]])
    np.testing.assert_array_equal(run.errors[2], [[0, 3], [0, 6]])
    run = compression.def_sgd(*args, 0.25, momentum=0.5)  # m = 1.5 g
    np.testing.assert_array_equal(run.shared[2], [-5, 0])
    run = compression.def_sgd(*args, 0.25, period=2)
    np.testing.assert_array_equal(run.shared, [[0, 0], [0, 0], [-4, 0]])
    np.testing.assert_array_equal(run.errors[1:], [[[1, 2], [3, 4]], [[0, 4], [0, 8]]])
    np.testing.assert_array_equal(run.params[1], [[-1, -2], [-3, -4]])


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("feedback", [1.0, 0.6])
@over_compressors
def test_sent_and_residual_add_up_to_the_input(compress, feedback, period):
    record = Recorder(compress)
    args = (grad_fn, X0, WORKERS, gamma, STEPS, record, 0.3)
    if feedback == 1:
        run = compression.def_sgd(*args, momentum=BETA, period=period)
    else:
        run = compression.pef_sgd(*args, feedback, momentum=BETA, period=period)
    when = [t for t in range(STEPS) if t % period == period - 1]
    assert record.calls == [(t, i) for t in when for i in range(WORKERS)]
    given, sent = record.stacks()
    # Feedback multiplies the residual of an exchange once.
    weight = np.where(np.arange(STEPS) % period == 0, feedback, 1.0)
    all_given = weight[:, None, None] * run.errors[:-1] + updates(run)
    np.testing.assert_allclose(given, all_given[when], **CLOSE)
    all_sent = np.zeros_like(all_given)
    all_sent[when] = sent
    np.testing.assert_allclose(run.errors[1:] + all_sent, all_given, **CLOSE)
    np.testing.assert_allclose(np.diff(run.shared, axis=0), -all_sent.mean(1), **CLOSE)
    back = run.shared[:, None] - 0.3 * np.asarray(run.errors)
    alone = run.params[:-1] - updates(run)
    for t in range(STEPS):
        after = back[t + 1] if t in when else alone[t]
        np.testing.assert_allclose(run.params[t + 1], after, **CLOSE)


@pytest.mark.parametrize("period", [1, 3])
@over_compressors
def test_def_a_model_moves_by_the_mean_update(compress, period):
    run = compression.def_sgd(
        grad_fn, X0, WORKERS, gamma, STEPS, compress, 0.3, BETA, period
    )
    z = compression.def_a_model(run)
    np.testing.assert_array_equal(z[0], X0)
    np.testing.assert_allclose(np.diff(z, axis=0), -updates(run).mean(1), **CLOSE)


def test_full_detach_is_local_sgd_between_exchanges():
    """y_i = x - e_i: `period` local steps from a shared point, then an average."""
    run = compression.def_sgd(
        grad_fn, X0, WORKERS, gamma, 6, identity, 1.0, period=3, momentum=0.0
    )
    X = np.tile(np.array(X0, dtype=float), (WORKERS, 1))
    for t in range(6):
        np.testing.assert_allclose(run.params[t], X, **CLOSE)
        X = X - gamma(t) * np.array([grad_fn(t, i, x) for i, x in enumerate(X)])
        if t % 3 == 2:
            X = np.tile(X.mean(0), (WORKERS, 1))
    np.testing.assert_allclose(run.params[6], X, **CLOSE)


# SGD with iterate averaging


def same_gradient(t, i, x):
    """A gradient that is equal on all workers and not linear in x."""
    return grad_fn(t, 0, x) + np.sin(x)


def same_curvature(t, i, x):
    """Equal curvatures imply mean_i g_i(y_i) = mean_i g_i(mean_i y_i)."""
    return 0.8 * x + noise(t, i)


@pytest.mark.parametrize(
    ("function", "detach"),
    [
        (same_gradient, 0.3),
        (same_gradient, 1.0),
        (same_curvature, 0.3),
        (grad_fn, 0.0),
    ],
)
def test_def_with_a_shrinking_compressor_is_sgd_ia(function, detach):
    run = compression.def_sgd(
        function, X0, WORKERS, gamma, STEPS, lambda t, i, v: v / 4, detach, BETA
    )
    averaged = compression.sgd_ia(
        function, X0, WORKERS, gamma, STEPS, 1 / 4, detach, BETA
    )
    np.testing.assert_allclose(averaged.shared, run.shared, **CLOSE)
    np.testing.assert_allclose(averaged.z, compression.def_a_model(run), **CLOSE)
    np.testing.assert_allclose(averaged.params[:, 0], run.params.mean(1), **CLOSE)
    if function is not same_curvature:  # otherwise e_i differs between workers
        np.testing.assert_allclose(averaged.params, run.params, **CLOSE)


def test_sgd_ia_by_hand():
    """Two iterations, gradients 1 and 3, gamma 1, beta 1/2: m = 2, then 3."""
    run = compression.sgd_ia(
        lambda t, i, x: np.array([1.0 + 2 * i]), [0], 2, 1.0, 2, 1 / 4, 1 / 2, 1 / 2
    )
    np.testing.assert_array_equal(run.z[:, 0], [0, -2, -5])
    np.testing.assert_array_equal(run.shared[:, 0], [0, -0.5, -1.625])
    np.testing.assert_array_equal(run.params[:, 1, 0], [0, -1.25, -3.3125])


# CSER


def test_hand_worked_cser():
    """Two iterations, gradients (1, 2, 1) and (3, 4, 3), gamma 1, then a reset.

    Every iteration sends entry 0, the reset sends entry 1, and nothing sends entry 2.
    """

    def constant(t, i, x):
        return np.array([1.0, 2.0, 1.0]) + 2.0 * i

    run = compression.cser(constant, np.zeros(3), 2, 1.0, 2, keep(0), keep(1), 2)
    np.testing.assert_array_equal(run.params[1], [[-2, -2, -1], [-2, -4, -3]])
    np.testing.assert_array_equal(run.errors[1], [[0, -2, -1], [0, -4, -3]])
    np.testing.assert_array_equal(run.params[2], [[-4, -6, -2], [-4, -6, -6]])
    np.testing.assert_array_equal(run.errors[2], [[0, 0, -2], [0, 0, -6]])


@over_compressors
def test_cser_invariants(compress):
    record, reset = Recorder(compress), Recorder(COMPRESSORS["random_k"])
    run = compression.cser(
        grad_fn, X0, WORKERS, gamma, STEPS, record, reset, 3, momentum=BETA
    )
    workers = range(WORKERS)
    assert record.calls == [(t, i) for t in range(STEPS) for i in workers]
    assert reset.calls == [(t, i) for t in (2, 5, 8) for i in workers]
    (given, sent), (given_error, sent_error) = record.stacks(), reset.stacks()
    np.testing.assert_allclose(given, updates(run), **CLOSE)
    # e_i <- e_i - (p_i - C2(p_i)); a reset then subtracts C1(e_i)
    kept = run.errors[:-1] - (given - sent)
    np.testing.assert_allclose(given_error, kept[2::3], **CLOSE)
    kept[2::3] -= sent_error
    np.testing.assert_allclose(run.errors[1:], kept, **CLOSE)
    # x_i - e_i is equal on all workers; mean x_i moves by the mean update
    shared = run.params - run.errors
    np.testing.assert_allclose(shared, shared[:, :1].repeat(WORKERS, 1), **CLOSE)
    np.testing.assert_allclose(
        np.diff(run.params.mean(1), axis=0), -updates(run).mean(1), **CLOSE
    )


def test_cser_without_resets_moves_by_partial_syncs():
    compress = COMPRESSORS["top_k"]
    run = compression.cser(
        grad_fn, X0, WORKERS, gamma, STEPS, compress, nothing, 99, momentum=BETA
    )
    for t, p in enumerate(updates(run)):
        sent = np.array([compress(t, i, v) for i, v in enumerate(p)])
        synced, residuals = compression.partial_sync(t, p, compress)
        np.testing.assert_allclose(sent + residuals, p, **CLOSE)
        np.testing.assert_allclose(synced - residuals, [sent.mean(0)] * 4, **CLOSE)
        np.testing.assert_allclose(run.params[t + 1], run.params[t] - synced, **CLOSE)


def test_cser_that_sends_only_in_full_resets_is_local_sgd():
    args = (grad_fn, X0, WORKERS, gamma, STEPS)
    local = compression.def_sgd(*args, identity, 1.0, momentum=BETA, period=3)
    run = compression.cser(*args, nothing, identity, 3, momentum=BETA)
    np.testing.assert_allclose(run.params, local.params, **CLOSE)
    np.testing.assert_allclose(run.errors[3::3], 0, **CLOSE)


# CHOCO-SGD


def ring(n):
    eye = np.eye(n)
    return 0.5 * eye + 0.3 * np.roll(eye, 1, 1) + 0.2 * np.roll(eye, -1, 1)


def test_choco_by_hand():
    """Two iterations, gradients 1 and 3, Q(v) = v / 2, zeta = 1 / 2, gamma = 1."""
    run = compression.choco_sgd(
        lambda t, i, x: np.array([1.0 + 2 * i]),
        np.zeros(1),
        np.array([[3, 1], [1, 3]]) / 4,
        1.0,
        2,
        lambda t, i, v: v / 2,
        0.5,
    )
    np.testing.assert_array_equal(
        run.params[..., 0], [[0, 0], [-1.125, -2.875], [-2.421875, -5.578125]]
    )
    np.testing.assert_array_equal(
        run.copies[..., 0], [[0, 0], [-0.5, -1.5], [-1.3125, -3.6875]]
    )


def test_choco_without_compression_is_d_psgd():
    W = ring(WORKERS)
    run = compression.choco_sgd(
        grad_fn, X0, W, gamma, STEPS, identity, 1.0, momentum=BETA
    )
    expected = gossip.d_psgd(
        with_momentum(grad_fn, BETA), X0, [W], gamma, STEPS, "adapt_then_combine"
    )
    np.testing.assert_allclose(run.params, expected, **CLOSE)


@over_compressors
def test_choco_invariants(compress):
    record, W = Recorder(compress), ring(WORKERS)
    run = compression.choco_sgd(
        grad_fn, X0, W, gamma, STEPS, record, 0.4, momentum=BETA
    )
    assert record.calls == [(t, i) for t in range(STEPS) for i in range(WORKERS)]
    given, sent = record.stacks()
    half = run.params[:-1] - updates(run)
    np.testing.assert_allclose(given, half - run.copies[:-1], **CLOSE)
    np.testing.assert_allclose(np.diff(run.copies, axis=0), sent, **CLOSE)
    step = 0.4 * (W - np.eye(WORKERS)) @ run.copies[1:]
    np.testing.assert_allclose(run.params[1:], half + step, **CLOSE)
    np.testing.assert_allclose(run.params[1:].mean(1), half.mean(1), **CLOSE)


# PowerSGD


def power_start(a, b, rank):
    rng = np.random.default_rng(5)
    return rng.normal(size=(a, b)), rng.normal(size=(b, rank))


@pytest.mark.parametrize(("a", "b", "rank"), [(5, 3, 1), (5, 3, 2), (3, 5, 2)])
def test_powersgd_projects_the_mean(a, b, rank):
    """The step is Pi mean_i M_i, with Pi the projector on the span of mean_i M_i Q."""
    x0, Q = power_start(a, b, rank)
    run = compression.powersgd(
        grad_fn, x0, WORKERS, gamma, STEPS, rank, Q, momentum=BETA
    )
    np.testing.assert_array_equal(run.errors[0], np.zeros((WORKERS, a, b)))
    m = 0.0
    for t in range(STEPS):
        M = run.errors[t] + [grad_fn(t, i, x) for i, x in enumerate(run.params[t])]
        basis = M.mean(0) @ Q
        projector = basis @ np.linalg.pinv(basis)
        m = BETA * m + projector @ M.mean(0)
        np.testing.assert_allclose(
            run.params[t + 1], run.params[t] - gamma(t) * m, rtol=0, atol=1e-10
        )
        np.testing.assert_allclose(
            run.errors[t + 1], M - projector @ M, rtol=0, atol=1e-10
        )
        Q = M.mean(0).T @ basis  # has the same span as mean_i Q_i


def test_powersgd_depends_on_the_span_of_q0_alone():
    x0, q0 = power_start(5, 4, 2)
    args = (grad_fn, x0, WORKERS, gamma, STEPS, 2)
    run = compression.powersgd(*args, q0)
    other = compression.powersgd(*args, q0 @ np.array([[0.0, -2.0], [1.0, 3.0]]))
    np.testing.assert_allclose(other.params, run.params, rtol=0, atol=1e-10)
    np.testing.assert_allclose(other.errors, run.errors, rtol=0, atol=1e-10)


def test_powersgd_keeps_the_residual():
    x0, q0 = power_start(5, 4, 1)
    run = compression.powersgd(grad_fn, x0, WORKERS, 0.1, STEPS, 1, q0)
    virtual = run.params[:, 0] - 0.1 * run.errors.mean(1)
    np.testing.assert_allclose(
        np.diff(virtual, axis=0),
        -0.1 * buffers(grad_fn, run.params, 0.0).mean(1),
        **CLOSE,
    )
    moved = np.linalg.matrix_rank(np.diff(run.params[:, 0], axis=0), tol=1e-9)
    np.testing.assert_array_equal(moved, np.ones(STEPS))


@pytest.mark.parametrize(("a", "b"), [(3, 5), (5, 3), (4, 4)])
def test_powersgd_of_full_rank_is_all_reduce_sgd(a, b):
    x0, q0 = power_start(a, b, min(a, b))
    run = compression.powersgd(
        grad_fn, x0, WORKERS, gamma, STEPS, min(a, b), q0, momentum=BETA
    )
    expected = averaging.all_reduce_sgd(
        with_momentum(grad_fn, BETA), x0, WORKERS, gamma, STEPS
    )
    np.testing.assert_allclose(run.params, expected, rtol=0, atol=1e-10)
    kept = run.errors if a <= b else run.errors.mean(1)
    np.testing.assert_allclose(kept, 0, atol=1e-10)


def test_powersgd_refuses_q0_of_another_rank():
    x0, q0 = power_start(5, 4, 2)
    for wrong, rank in ((q0, 1), (q0[:3], 2)):
        with pytest.raises(ValueError, match="q0 has shape"):
            compression.powersgd(grad_fn, x0, WORKERS, gamma, 1, rank, wrong)


# All methods

ARGS = (grad_fn, X0, WORKERS, gamma, STEPS)
WITHOUT_COMPRESSION = {
    "def": functools.partial(compression.def_sgd, *ARGS, identity, 0.3),
    "pef": functools.partial(compression.pef_sgd, *ARGS, identity, 0.3, 0.6),
    "sgd_ia": functools.partial(compression.sgd_ia, *ARGS, 1.0, 0.3),
    "cser": functools.partial(compression.cser, *ARGS, identity, identity, 2),
    "cser_nothing_to_reset": functools.partial(
        compression.cser, *ARGS, identity, nothing, 2
    ),
    "choco": functools.partial(
        compression.choco_sgd,
        grad_fn,
        X0,
        np.full((WORKERS, WORKERS), 1 / WORKERS),
        gamma,
        STEPS,
        identity,
        1.0,
    ),
}


@pytest.mark.parametrize(
    "method", WITHOUT_COMPRESSION.values(), ids=WITHOUT_COMPRESSION
)
def test_without_compression_it_is_all_reduce_sgd(method):
    expected = averaging.all_reduce_sgd(with_momentum(grad_fn, BETA), *ARGS[1:])
    run = method(momentum=BETA)
    np.testing.assert_allclose(run.params, expected, **CLOSE)
    if hasattr(run, "errors"):
        np.testing.assert_allclose(run.errors, 0, atol=1e-15)
    assert all(field.dtype == np.float64 for field in run)
    assert run.params.shape == (STEPS + 1, WORKERS, DIMENSION)


def test_references_compute_in_float64():
    """A start in single precision is converted to float64."""
    x0, q0 = (m.astype(np.float32) for m in power_start(5, 4, 2))
    run = functools.partial(compression.powersgd, n=2, learning_rate=0.1, steps=3)
    single = run(grad_fn, x0, rank=2, q0=q0)
    double = run(grad_fn, x0.astype(float), rank=2, q0=q0.astype(float))
    for field, expected in zip(single, double, strict=True):
        assert field.dtype == np.float64
        np.testing.assert_array_equal(field, expected)
    start = noise(0, 0).astype(np.float32)
    for method in (
        lambda x: compression.def_sgd(grad_fn, x, 2, 0.1, 3, identity, 0.3, BETA),
        lambda x: compression.sgd_ia(grad_fn, x, 2, 0.1, 3, 0.25, 0.3, BETA),
        lambda x: compression.cser(grad_fn, x, 2, 0.1, 3, identity, identity, 2),
        lambda x: compression.choco_sgd(grad_fn, x, np.eye(2), 0.1, 3, identity, 1.0),
    ):
        for field, expected in zip(
            method(start), method(start.astype(float)), strict=True
        ):
            assert field.dtype == np.float64
            np.testing.assert_array_equal(field, expected)


@pytest.mark.parametrize(
    "method", WITHOUT_COMPRESSION.values(), ids=WITHOUT_COMPRESSION
)
def test_momentum_is_off_by_default(method):
    expected = averaging.all_reduce_sgd(*ARGS)
    np.testing.assert_allclose(method().params, expected, **CLOSE)
