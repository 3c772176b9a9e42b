"""Ordinary one-worker steps, as users write them between collectives.

Each program takes one worker's `data` and the name of the worker axis, and returns a
tree of arrays. No program depends on the layout, so each must give the same numbers in
all layouts. test_one_worker_programs.py compares them.

To run all or some programs on two processes: `PYTHONPATH=. python -m
decentral_jax.launch --processes 2 --devices 2 tests/support/one_worker_programs.py
[NAME ...]`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import decentral_jax as dj

N = 8
PROGRAMS: dict[str, Callable[[Any, Any], Any]] = {}

GRID = np.linspace(0, 1, 5, dtype=np.float32)  # shared by all workers
SHARED = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def program(fn: Callable) -> Callable:
    """Decorator that adds a function to `PROGRAMS`."""
    PROGRAMS[fn.__name__] = fn
    return fn


def dataset(typed_keys: bool = True) -> dict[str, np.ndarray | jax.Array]:
    """All workers' data with one leading worker axis."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(N, *shape)).astype(np.float32)

    data = {
        "scalar": normal(),
        "x": normal(6),
        "rows": normal(4, 3),
        "square": normal(3, 3) + 3 * np.eye(3, dtype=np.float32),
        "sequence": normal(2, 5, 3),
        "label": rng.integers(0, 3, (N, 4)).astype(np.int32),
        "flag": rng.integers(0, 2, (N, 4)) > 0,
        "byte": rng.integers(0, 256, (N, 4)).astype(np.uint8),
        "seed": rng.integers(0, 2**31, (N, 2)).astype(np.uint32),
        "half": normal(4).astype(jnp.float16),
        "brain": normal(4).astype(jnp.bfloat16),
        "empty": normal(0, 3),
    }
    if typed_keys:
        data["key"] = jax.random.split(jax.random.key(1), N)
    return data


def own_key(axis):
    return jax.random.fold_in(jax.random.key(7), dj.worker_index(axis))


# Control flow


@program
def scan_from_constant(data, axis):
    def body(total, row):
        return total + row**2, total

    return lax.scan(body, jnp.zeros(3), data["rows"])


@program
def accumulated_gradients(data, axis):
    def body(total, row):
        gradient = jax.grad(lambda p: jnp.sum((p - row) ** 2))(data["x"][:3])
        return jax.tree.map(jnp.add, total, gradient), None

    return lax.scan(body, jnp.zeros(3), data["rows"])[0]


@program
def while_from_constants(data, axis):
    def body(carry):
        return carry[0] + 1, carry[1] + data["scalar"]

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, 0.0))


@program
def while_on_own_data(data, axis):
    limit = 1 + jnp.abs(data["scalar"])
    return lax.while_loop(
        lambda c: c[1] < limit, lambda c: (c[0] + 1, c[1] * 1.5), (0, 0.25)
    )


@program
def fori_from_constant(data, axis):
    return lax.fori_loop(0, 4, lambda i, y: y + i * data["x"], jnp.zeros(6))


@program
def cond_from_constants(data, axis):
    return lax.cond(data["scalar"] > 0, lambda: data["scalar"] * 2, lambda: 0.0)


@program
def cond_of_shared_predicate(data, axis):
    return lax.cond(GRID[1] > 1, lambda x: x, lambda x: jnp.zeros(6), data["x"])


@program
def switch(data, axis):
    branches = [jnp.zeros_like, jnp.exp, lambda x: jnp.ones(6)]
    return lax.switch(data["label"][0], branches, data["x"])


@program
def switch_on_worker_index(data, axis):
    index = dj.worker_index(axis)
    return lax.switch(
        index % 3, [jnp.sin, jnp.cos, lambda x: jnp.full(6, 2.0)], data["x"]
    )


@program
def nested_jit(data, axis):
    inner = jax.jit(lambda x, s: jax.jit(jnp.tanh)(x) * s, static_argnums=1)
    return jax.grad(lambda x: inner(x, 3.0).sum())(data["x"])


@program
def remat(data, axis):
    @jax.checkpoint
    def layer(w, x):
        return jnp.tanh(x @ w)

    return jax.grad(lambda w: layer(w, layer(w, data["rows"])).sum())(data["square"])


@program
def remat_in_scan(data, axis):
    @jax.checkpoint
    def body(h, x):
        return jnp.tanh(h * 0.5 + x), h.sum()

    return jax.grad(lambda rows: lax.scan(body, jnp.zeros(3), rows)[1].sum())(
        data["rows"]
    )


@program
def lax_map(data, axis):
    return lax.map(lambda row: jnp.sort(row) * data["scalar"], data["rows"])


@program
def lax_map_over_shared_data(data, axis):
    return lax.map(lambda row: row @ data["square"], jnp.asarray(SHARED), batch_size=3)


@program
def inner_vmap(data, axis):
    inner = jax.vmap(lambda row, w: w @ row, in_axes=(0, None), axis_name="batch")
    return inner(data["rows"], data["square"])


@program
def inner_vmap_with_collective(data, axis):
    return jax.vmap(lambda row: row - lax.pmean(row, "batch"), axis_name="batch")(
        data["rows"]
    )


@program
def associative_scan(data, axis):
    return lax.associative_scan(jnp.multiply, data["rows"])


@program
def pure_callback(data, axis):
    like = jax.ShapeDtypeStruct((6,), np.float32)
    double = functools.partial(np.multiply, np.float32(2))
    return jax.pure_callback(double, like, data["x"], vmap_method="sequential")


@program
def debug_callback(data, axis):
    jax.debug.callback(lambda x: None, data["x"])
    return data["x"] + 1


# Derivatives


@jax.custom_vjp
def clipped(x):
    return x * 1


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (jnp.clip(g, -1, 1),))


@program
def custom_vjp(data, axis):
    return jax.grad(lambda x: jnp.sum(clipped(x) ** 2 * 3))(data["x"])


@jax.custom_jvp
def softened(x):
    return jnp.abs(x)


softened.defjvp(lambda p, t: (softened(*p), jnp.tanh(p[0]) * t[0]))


@program
def custom_jvp(data, axis):
    return jax.jvp(softened, (data["x"],), (jnp.ones(6),)), jax.grad(
        lambda x: softened(x).sum()
    )(jnp.ones(6) * data["scalar"])


@program
def jvp(data, axis):
    return jax.jvp(
        lambda x: jnp.sin(x) * data["scalar"], (GRID,), (np.ones_like(GRID),)
    )


@program
def vjp(data, axis):
    value, pull = jax.vjp(lambda w, x: w @ x, data["square"], jnp.ones(3))
    return value, pull(jnp.ones(3))


@program
def hessian_vector_product(data, axis):
    def loss(w):
        return jnp.sum(jnp.tanh(data["rows"] @ w) ** 2)

    return jax.jvp(jax.grad(loss), (jnp.ones(3),), (jnp.ones(3),))[1]


@program
def jacobians(data, axis):
    def f(w):
        return jnp.tanh(data["rows"] @ w)

    at = jnp.full(3, 0.5)
    return jax.jacfwd(f)(at), jax.jacrev(f)(at)


@program
def hessian(data, axis):
    return jax.hessian(lambda w: jnp.sum(jnp.exp(data["square"] @ w)))(jnp.zeros(3))


@program
def linearize(data, axis):
    value, tangent = jax.linearize(lambda x: jnp.sin(x * data["scalar"]), jnp.ones(3))
    transpose = jax.linear_transpose(lambda x: x @ data["square"], jnp.ones(3))
    return value, tangent(jnp.ones(3)), transpose(jnp.ones(3))


@program
def derivative_at_collocation_points(data, axis):
    def u(x):
        return data["scalar"] * x**2

    return jax.vmap(jax.grad(jax.grad(u)))(GRID), jax.vmap(jax.grad(u))(
        jnp.asarray(GRID)
    )


@program
def adversarial_from_zeros(data, axis):
    def loss(delta):
        return jnp.sum((data["x"] + delta) ** 3)

    return data["x"] + 0.1 * jnp.sign(jax.grad(loss)(jnp.zeros(6)))


@program
def gradient_of_constant(data, axis):
    return jax.value_and_grad(lambda w: jnp.sum(data["rows"] @ w))(jnp.ones(3))


@program
def gradient_of_closed_over(data, axis):
    return jax.grad(lambda s: jnp.sum(s @ data["square"] ** 2))(jnp.asarray(SHARED))


@program
def gradient_penalty(data, axis):
    def critic(w, x):
        return jnp.tanh(x @ w).sum()

    def loss(w):
        slopes = jax.vmap(jax.grad(critic, argnums=1), in_axes=(None, 0))(
            w, data["rows"]
        )
        return jnp.mean((jnp.sqrt(jnp.sum(slopes**2, -1) + 1e-6) - 1) ** 2)

    return jax.grad(loss)(jnp.full(3, 0.3))


@program
def gradient_through_worker_index(data, axis):
    index = dj.worker_index(axis).astype(np.float32)
    return jax.grad(lambda s: jnp.sin(s * index))(1.0)


@program
def where_without_nan_gradient(data, axis):
    def loss(x):
        safe = jnp.where(x > 0, x, 1.0)
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(safe), 0.0))

    return jax.grad(loss)(data["x"]), jax.grad(loss)(jnp.zeros(6))


@program
def stop_gradient(data, axis):
    return jax.grad(lambda w: jnp.sum(w * lax.stop_gradient(w * data["scalar"])))(
        jnp.ones(3)
    )


@program
def closure_convert(data, axis):
    pure, hidden = jax.closure_convert(lambda w: w * data["x"][:3], jnp.ones(3))
    return pure(jnp.ones(3), *hidden)


@program
def implicit_root(data, axis):
    """Differentiates through a fixed point that an iteration finds."""
    target = 1 + data["scalar"] ** 2
    return jax.value_and_grad(
        lambda a: lax.custom_root(
            lambda y: y**2 - a,
            jnp.ones([]),
            lambda f, y: lax.fori_loop(0, 8, lambda _, z: 0.5 * (z + a / z), y),
            lambda g, y: y / g(1.0),
        )
    )(target)


# Collectives inside


def through(communicate):
    """Gradients with respect to local data and constants, and a second derivative."""

    def run(data, axis):
        def loss(w):
            return jnp.sum(communicate(w * data["x"], axis) ** 2)

        own = jax.grad(loss)(data["x"])
        constant = jax.grad(loss)(jnp.ones(6))
        twice = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(jnp.ones(6))
        return communicate(data["x"], axis), own, constant, twice

    return run


TOPOLOGIES = {
    "ring": dj.topology.ring(N),
    "complete": dj.topology.complete(N),
    "star": dj.topology.star(N),
    "one_peer": dj.topology.one_peer_exponential(N),
}


def _mix(topology):
    return lambda x, axis: dj.mix(x, topology, axis_name=axis, step=1)


for _name, _topology in TOPOLOGIES.items():
    PROGRAMS[f"gradient_through_mix_{_name}"] = through(_mix(_topology))
PROGRAMS["gradient_through_average"] = through(
    lambda x, axis: dj.average(x, axis_name=axis)
)


@program
def mix_in_scan(data, axis):
    def body(x, step):
        x = dj.mix(x, TOPOLOGIES["one_peer"], axis_name=axis, step=step)
        return x, x[0]

    return lax.scan(body, data["x"], jnp.arange(4))


@program
def mix_of_constant(data, axis):
    both = {"shared": jnp.ones(3), "own": data["x"]}
    return dj.mix(both, TOPOLOGIES["ring"], axis_name=axis)


def trained(make, steps=3):
    """Optimizer steps in a scan, from parameters created inside the program."""

    def run(data, axis):
        tx = make(axis)
        params = {"w": jnp.zeros(3), "b": jnp.zeros([])}

        def loss(params):
            error = data["rows"] @ params["w"] + params["b"] - data["x"][:4]
            return jnp.mean(error**2)

        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = lax.scan(body, (params, tx.init(params)), None, steps)
        return params, losses

    return run


OPTIMIZERS = {
    "adam": lambda axis: optax.adam(0.1),
    "lbfgs": lambda axis: optax.lbfgs(0.1, linesearch=None),
    "multi_steps": lambda axis: optax.MultiSteps(optax.sgd(0.1), 2),
    "d_psgd": lambda axis: dj.d_psgd(0.1, TOPOLOGIES["ring"], axis_name=axis),
    "dsgt": lambda axis: dj.dsgt(0.1, TOPOLOGIES["one_peer"], axis_name=axis),
    "local_sgd": lambda axis: dj.local_sgd(0.1, period=2, axis_name=axis),
    "ef_sgd": lambda axis: dj.ef_sgd(
        optax.sgd(0.1, momentum=0.9), dj.compression.random_block(2), axis_name=axis
    ),
}
for _name, _make in OPTIMIZERS.items():
    PROGRAMS[f"training_with_{_name}"] = trained(_make)


# Models


@program
def linen_lstm(data, axis):
    model = nn.RNN(nn.LSTMCell(3))
    params = model.init(jax.random.key(0), jnp.ones((2, 5, 3)))
    return jax.grad(lambda p: model.apply(p, data["sequence"]).sum())(params)


@program
def linen_gru_bidirectional(data, axis):
    model = nn.Bidirectional(nn.RNN(nn.GRUCell(2)), nn.RNN(nn.GRUCell(2)))
    params = model.init(own_key(axis), data["sequence"])
    return model.apply(params, data["sequence"])


@program
def linen_attention_with_dropout(data, axis):
    model = nn.MultiHeadDotProductAttention(1, dropout_rate=0.3, deterministic=False)
    key, dropout = jax.random.split(own_key(axis))
    params = model.init({"params": key, "dropout": dropout}, data["sequence"])

    def loss(params):
        y = model.apply(params, data["sequence"], rngs={"dropout": dropout})
        return jnp.sum(y**2)

    return jax.value_and_grad(loss)(params)


@program
def linen_batch_norm(data, axis):
    model = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = model.init(jax.random.key(0), data["rows"])

    def loss(params):
        y, state = model.apply(
            {**variables, "params": params}, data["rows"], mutable=["batch_stats"]
        )
        return jnp.sum(y**3), state

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@program
def linen_convolution(data, axis):
    model = nn.Sequential([nn.Conv(4, (3,)), nn.tanh, nn.LayerNorm(0.1), nn.Dense(1)])
    params = model.init(jax.random.key(0), data["sequence"])
    return jax.grad(lambda p: model.apply(p, data["sequence"]).sum())(params)


@program
def linen_embedding(data, axis):
    model = nn.Embed(3, 2)
    params = model.init(own_key(axis), data["label"])
    return jax.grad(lambda p: model.apply(p, data["label"]).sum())(params)


@program
def init_inside_the_step(data, axis):
    """A sweep: each worker initializes and trains its own model."""
    model, tx = nn.Dense(1), optax.sgd(0.1, momentum=0.9)
    params = model.init(own_key(axis), data["rows"])
    state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(lambda p: jnp.mean(model.apply(p, data["rows"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


@program
def nnx_training(data, axis):
    model = Net(nnx.Rngs(own_key(axis)))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    losses = []
    for _ in range(2):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(data["rows"]) ** 2))(
            model
        )
        optimizer.update(model, grads)
        losses.append(loss)
    return losses, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


@program
def nnx_from_constant_key(data, axis):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: jnp.sum(m(data["rows"]) ** 2))(model)
    return nnx.to_pure_dict(grads)


# Losses


@program
def ctc_loss(data, axis):
    def loss(bias):
        logits = data["sequence"] + bias
        zeros = jnp.zeros
        return optax.ctc_loss(
            logits, zeros((2, 5)), jnp.array([[1, 2], [2, 1]]), zeros((2, 2))
        ).sum()

    return jax.value_and_grad(loss)(jnp.zeros(3))


@program
def cross_entropy(data, axis):
    return optax.softmax_cross_entropy_with_integer_labels(data["rows"], data["label"])


# Random numbers


@program
def random_floats(data, axis):
    key = own_key(axis)
    return {
        "uniform": jax.random.uniform(key, (3,)),
        "normal": jax.random.normal(key, (3,)),
        "gamma": jax.random.gamma(key, 2.0, (3,)),
        "gamma of own data": jax.random.gamma(key, jnp.abs(data["x"]) + 0.1),
        "truncated": jax.random.truncated_normal(key, -1, 1, (3,)),
        "dirichlet": jax.random.dirichlet(key, jnp.ones(3)),
    }


@program
def random_choices(data, axis):
    key = own_key(axis)
    return {
        "poisson": jax.random.poisson(key, 3.0, (3,)),
        "categorical": jax.random.categorical(key, data["rows"]),
        "permutation": jax.random.permutation(key, data["x"]),
        "permutation of indices": jax.random.permutation(key, 7),
        "choice": jax.random.choice(key, data["x"], (3,), replace=False),
        "bernoulli": jax.random.bernoulli(key, 0.4, (9,)),
        "bits": jax.random.bits(key, (3,)),
        "integers": jax.random.randint(key, (3,), 0, 100),
    }


@program
def random_with_shared_key(data, axis):
    key = jax.random.key(3)
    return jax.random.permutation(key, 7), jax.random.normal(key, (6,)) + data["x"]


@program
def dropout_mask(data, axis):
    keep = jax.random.bernoulli(own_key(axis), 0.7, (6,))
    return jax.grad(lambda w: jnp.sum(jnp.where(keep, w * data["x"], 0) / 0.7))(
        jnp.ones(6)
    )


@program
def poisson_gradient(data, axis):
    draw = jax.random.poisson(own_key(axis), jnp.exp(data["x"]))
    return draw, jax.grad(lambda r: jnp.sum(draw * jnp.log(r) - r))(jnp.ones(6))


@program
def keys_from_raw_seed(data, axis):
    key = jax.random.wrap_key_data(data["seed"])
    return jax.random.key_data(jax.random.split(key)), jax.random.normal(key, (2,))


@program
def typed_keys(data, axis):
    key, used = jax.random.split(data["key"])
    return {"key": key, "draw": jax.random.normal(used, (2,))}


# Arrays


@program
def orders(data, axis):
    return {
        "cumsum": jnp.cumsum(data["x"]),
        "sort": jnp.sort(data["x"]),
        "argsort": jnp.argsort(data["x"]),
        "top_k": lax.top_k(data["x"], 3),
        "searchsorted": jnp.searchsorted(jnp.sort(data["x"]), GRID),
        "unique": jnp.unique(data["label"], size=3, fill_value=-1),
    }


@program
def linear_algebra(data, axis):
    matrix = data["square"]
    positive = matrix @ matrix.T + jnp.eye(3)
    q, r = jnp.linalg.qr(matrix)
    values, vectors = jnp.linalg.eigh(positive)
    return {
        "qr": (q, r),
        "cholesky": jnp.linalg.cholesky(positive),
        "eigh": (values, (vectors * values) @ vectors.T),
        "solve": jnp.linalg.solve(positive, jnp.ones(3)),
        "slogdet": jax.grad(lambda m: jnp.linalg.slogdet(m)[1])(positive),
        "svd": jnp.linalg.svd(matrix, compute_uv=False),
    }


@program
def conjugate_gradients(data, axis):
    positive = data["square"] @ data["square"].T + jnp.eye(3)
    return jax.scipy.sparse.linalg.cg(lambda v: positive @ v, jnp.ones(3), maxiter=3)[0]


@program
def fft(data, axis):
    return jnp.fft.irfft(jnp.fft.rfft(data["x"]) * 0.5), jnp.fft.fft(jnp.ones(4))


@program
def scatter(data, axis):
    return {
        "segment_sum": jax.ops.segment_sum(data["rows"], data["label"], 3),
        "add": jnp.zeros(3).at[data["label"]].add(data["x"][:4]),
        "set": jnp.zeros(6).at[data["label"][0]].set(data["scalar"]),
        "one_hot": jax.nn.one_hot(data["label"], 3),
        "bincount": jnp.bincount(data["label"], length=3),
    }


@program
def dynamic_slices(data, axis):
    at = data["label"][0]
    window = lax.dynamic_slice(data["x"], (at,), (2,))
    shared = lax.dynamic_slice(jnp.asarray(GRID), (at,), (2,))
    return window, shared, lax.dynamic_update_slice(jnp.zeros(6), window, (at,))


@program
def convolution(data, axis):
    return jnp.convolve(data["x"], GRID), jax.grad(
        lambda k: jnp.convolve(data["x"], k).sum()
    )(jnp.ones(3))


@program
def integers(data, axis):
    index = dj.worker_index(axis)
    return {
        "byte": data["byte"] + jnp.uint8(200),
        "label": data["label"] // 2 + index,
        "flag": ~data["flag"],
        "shift": jnp.left_shift(data["seed"], jnp.uint32(3)),
        "any": data["flag"].any(),
        "index": index,
    }


@program
def half_precision(data, axis):
    return {
        "half": data["half"] * 2 + 1,
        "brain": data["brain"] + jnp.ones(4, jnp.bfloat16),
        "gradient": jax.grad(lambda x: jnp.sum(x * data["brain"]))(
            jnp.ones(4, jnp.bfloat16)
        ),
        "mixed": dj.mix(data["brain"], TOPOLOGIES["ring"], axis_name=axis),
        "averaged": dj.average(data["half"], axis_name=axis),
    }


@program
def empty(data, axis):
    return {
        "empty": data["empty"] * 2,
        "sum": data["empty"].sum(0),
        "mixed": dj.mix(data["empty"], TOPOLOGIES["ring"], axis_name=axis),
        "made": jnp.zeros((0, 2)),
    }


@program
def constants_only(data, axis):
    return {"scalar": 1.0, "array": jnp.arange(3), "python": 2, "numpy": GRID}


@program
def structures(data, axis):
    return data["scalar"], [data["flag"], {"none": None, "nested": (data["byte"],)}]


# Comparison

# Largest difference from plain `vmap`, in units in the last place of the program's
# largest result: XLA orders sums differently for different shapes. Integers, Booleans,
# and keys must be equal.
ULPS = 32

# Without LLVM's optimization, the comparison takes seconds instead of minutes.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def run_all(data, axis, names=None):
    """Runs all programs as one, which compiles once."""
    return {name: PROGRAMS[name](data, axis) for name in names or PROGRAMS}


def expected(data, names=None):
    """The results under plain `vmap`."""
    return compiled(
        jax.jit(
            jax.vmap(lambda data: run_all(data, "workers", names), axis_name="workers")
        ),
        data,
    )


def compiled(jitted, *args):
    """Compiles without optimization, and runs."""
    return jitted.lower(*args).compile(compiler_options=COMPILER_OPTIONS)(*args)


def as_numpy(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def differences(found, wanted):
    """Returns one line per program whose results differ, with the difference."""
    reports = []
    for name in wanted:
        left, right = jax.tree.flatten(found[name]), jax.tree.flatten(wanted[name])
        if left[1] != right[1]:
            reports.append(f"{name}: structure {left[1]} instead of {right[1]}")
            continue
        pairs = [*zip(map(as_numpy, left[0]), map(as_numpy, right[0]), strict=True)]
        largest = max(
            (np.abs(y).max() for _, y in pairs if y.size and y.dtype.kind in "fcV"),
            default=0,
        )
        for x, y in pairs:
            if x.dtype != y.dtype or x.shape != y.shape:
                reports.append(f"{name}: {x.dtype}{x.shape}, not {y.dtype}{y.shape}")
            elif not jnp.issubdtype(x.dtype, jnp.inexact):
                if not (x == y).all():
                    reports.append(f"{name}: {x} instead of {y}")
            elif x.size:
                unit = float(jnp.finfo(x.dtype).eps)
                wide = np.complex128 if np.iscomplexobj(x) else np.float64
                x, y = x.astype(wide), y.astype(wide)
                error = np.abs(x - y).max() / (unit * max(float(largest), 1e-30))
                if not error <= ULPS:
                    reports.append(f"{name}: {error:.3g} units in the last place")
    return reports


def main(names: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    dj.initialize(timeout=120)
    workers = dj.Workers(N)
    assert workers.num_devices == jax.device_count()
    data = dataset(typed_keys=False)
    names = names or [name for name in PROGRAMS if name not in ONE_PROCESS]
    step = workers.spmd(lambda data: run_all(data, "workers", names))
    found = workers.gather(step(workers.shard(data)))
    reports = differences(found, expected(data, names))
    assert not reports, "\n".join(reports)
    print(f"{len(names)} equal on {jax.process_count()} processes")


# Programs that several processes do not support.
ONE_PROCESS = {"typed_keys": "`Workers.shard` refuses typed keys of all processes"}

if __name__ == "__main__":
    main(sys.argv[1:])
