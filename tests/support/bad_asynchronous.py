"""Bad inputs of asynchronous transformations and traces; see `test_bad_inputs`."""

import jax
import jax.numpy as jnp
import optax

import decentral_jax as dj
from decentral_jax.traces import Trace

X = jnp.zeros(3)
TWO = dj.traces.round_robin(2, 5)


def three_workers():
    tx = dj.asynchronous(optax.sgd(0.1), TWO)

    def step(x):
        return tx.update(x, tx.init(x), x)

    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    jax.eval_shape(jax.vmap(step, axis_name="workers"), x)


ROWS = {
    "unknown worker": (
        lambda: Trace([0, 2], [0, 0], 2),
        "ValueError: workers | num_workers=2 | got 2 | tick 1",
    ),
    "before the start": (
        lambda: Trace([0, 0], [0, 2], 1),
        "ValueError: staleness | tick 1 | 0 to 1 | got 2",
    ),
    "different numbers of ticks": (
        lambda: Trace([0, 0], [0], 1),
        "ValueError: staleness | workers | 2 | got 1",
    ),
    "no ticks": (
        lambda: Trace([], [], 1),
        r"ValueError: workers | at least one | \(0,",
    ),
    "fractional workers": (
        lambda: Trace([0.5], [0], 1),
        "ValueError: workers | float64",
    ),
    "zero seconds": (
        lambda: dj.traces.from_speeds([1, 0], 9),
        r"ValueError: seconds | positive | \[1, 0\]",
    ),
    "jitter": (
        lambda: dj.traces.from_speeds([1], 9, jitter=-1),
        "ValueError: jitter | -1",
    ),
    "delay below 0": (
        lambda: dj.traces.uniform_delay(-1, 9),
        "ValueError: max_delay | -1 | >= 0",
    ),
    "trace a list": (
        lambda: dj.asynchronous(optax.sgd(0.1), [0, 1]),
        r"TypeError: trace | \[0, 1\] | from_speeds",
    ),
    "number instead of an optimizer": (
        lambda: dj.asynchronous(0.1, TWO),
        "TypeError: optimizer | 0.1",
    ),
    "workers of the trace": (
        three_workers,
        "ValueError: trace has 2 workers | 'workers' | 3",
    ),
    "asynchronous without params": (
        lambda: dj.apam(0.1, TWO).update(X, None),
        "ValueError: asynchronous needs params | None",
    ),
    "b1": (lambda: dj.amsgrad(0.1, b1=1.0), r"ValueError: b1 | \[0.0, 1.0\) | 1.0"),
    "eps": (lambda: dj.apam(0.1, TWO, eps=-1), "ValueError: eps | -1"),
    "decay": (
        lambda: dj.amsgrad(0.1, weight_decay=-1),
        "ValueError: weight_decay | -1",
    ),
    "projection without params": (
        lambda: dj.project(lambda x: x).update(X, optax.EmptyState()),
        "ValueError: project needs params | None",
    ),
    "staleness unknown": (
        lambda: dj.scale_by_staleness().update(X, optax.EmptyState()),
        "ValueError: scale_by_staleness | staleness | dj.asynchronous",
    ),
    "staleness power": (lambda: dj.scale_by_staleness(0.0), "ValueError: power | 0.0"),
    "negative delay": (lambda: dj.delay_gradients([1, -2]), "ValueError: delay | -2"),
    "fractional delay": (lambda: dj.delay_gradients(0.5), "TypeError: delay | 0.5"),
}
