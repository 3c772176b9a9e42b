"""Bad inputs of example orders; see `test_bad_inputs`."""

import jax
import jax.numpy as jnp
import optax

import decentral_jax as dj


def updated(tx, shape=(4, 3), workers=2):
    """Returns a call that traces `init` and `update` on gradients of a shape."""
    grads = jax.ShapeDtypeStruct((workers, *shape), jnp.float32)

    def step(grads):
        return tx.update(grads, tx.init(jnp.zeros(3)))

    return lambda: jax.eval_shape(jax.vmap(step, axis_name="workers"), grads)


X = jnp.zeros(3)
STATE = dj.grab(3).init(X)
ROWS = {
    "no examples": (lambda: dj.grab(0), "ValueError: num_examples | 0 | >= 2"),
    "fractional examples": (
        lambda: dj.pair_balance(2.5),
        "TypeError: num_examples | 2.5 | >= 2",
    ),
    "one example": (
        lambda: dj.random_reshuffling(1),
        "ValueError: num_examples | 1 | >= 2",
    ),
    "no sketch": (
        lambda: dj.d_grab(8, 2, sketch=0),
        "ValueError: sketch | 0 | >= 1",
    ),
    "no workers": (lambda: dj.d_grab(8, 0), "ValueError: num_workers | 0 | >= 1"),
    "different number of workers": (
        updated(dj.d_grab(8, 3)),
        "ValueError: num_workers | 'workers' | 2 | got 3",
    ),
    "an odd batch": (
        updated(dj.d_grab(8, 2), (3, 3)),
        "ValueError: updates | d_grab | 3 | odd_batches=True",
    ),
    "gradients without examples": (
        updated(dj.grab(8), ()),
        r"ValueError: updates | grab | \(\) | jax.vmap",
    ),
    "order's axis": (
        lambda: dj.random_reshuffling(8, axis_name=3),
        "TypeError: axis_name | 3 | string",
    ),
    "order's seed": (lambda: dj.random_reshuffling(8, seed=-1), "ValueError: seed"),
    "order without params": (
        lambda: dj.d_grab(8, 2).init(None),
        "ValueError: d_grab needs params | None",
    ),
    "no order": (
        lambda: dj.next_examples(optax.sgd(0.1).init(X), 2),
        "ValueError: opt_state | got 0 | d_grab",
    ),
    "two orders": (
        lambda: dj.next_examples((STATE, STATE), 2),
        "ValueError: opt_state | got 2 | chain one",
    ),
    "no batch": (
        lambda: dj.next_examples(STATE, 0),
        "ValueError: batch_size | 0 | >= 1",
    ),
}
