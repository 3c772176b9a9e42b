"""Bad inputs of compression; see `test_bad_inputs`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decentral_jax as dj

N = 8
C = dj.compression
RING = dj.topology.ring(N)
X = jax.ShapeDtypeStruct((N, 3), jnp.float32)
TWO = {"a": X, "b": jax.ShapeDtypeStruct((N, 3), jnp.bfloat16)}
BLOCK = C.random_block(2)


def updated(tx, params=X, updates=lambda x: x, given=lambda x: x):
    """Traces `init` and `update` of one worker."""

    def step(x):
        return tx.update(updates(x), tx.init(x), given(x))

    return lambda: jax.eval_shape(jax.vmap(step, axis_name="workers"), params)


ROWS = {
    "ratio below 1": (lambda: C.random_block(0.5), "ValueError: ratio | 0.5"),
    "ratio a string": (lambda: C.random_k("64"), "TypeError: ratio | 64"),
    "ratio a function": (lambda: C.random_block(lambda: 64), "TypeError: ratio"),
    "ratio of sgd_ia": (
        lambda: dj.sgd_ia(optax.sgd(0.1, momentum=0.9), ratio=0.5),
        "ValueError: ratio | 0.5",
    ),
    "k above the leaf": (
        updated(dj.error_feedback(C.top_k(k=4))),
        r"ValueError: k=4 | \(3,\) | smaller k",
    ),
    "ratio and k": (lambda: C.top_k(2, k=3), "ValueError: ratio=2 and k=3"),
    "k 0": (lambda: C.top_k(k=0), "ValueError: k | 0"),
    "bits 0": (lambda: C.quantize(0), "ValueError: bits | 0"),
    "bits 9": (lambda: C.quantize(9), "ValueError: bits | 9 | cast"),
    "bits 2.5": (lambda: C.quantize(2.5), "TypeError: bits | 2.5"),
    "rank 0": (lambda: C.low_rank(0), "ValueError: rank | 0"),
    "cast to integers": (lambda: C.cast("int8"), "TypeError: dtype | 'int8'"),
    "cast to nonsense": (lambda: C.cast("nonsense"), "TypeError: dtype | 'nonsense'"),
    "not called": (
        lambda: dj.error_feedback(C.sign),
        "TypeError: compressor | function sign | call",
    ),
    "not called in cser": (
        lambda: dj.cser(optax.sgd(0.1, momentum=0.9), BLOCK, reset_compressor=C.sign),
        "TypeError: reset_compressor | function sign | call",
    ),
    "detach -0.1": (
        lambda: dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK, detach=-0.1),
        "ValueError: detach | -0.1",
    ),
    "detach 1.5": (
        lambda: dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK, detach=1.5),
        "ValueError: detach | 1.5",
    ),
    "period 0": (
        lambda: dj.error_feedback(BLOCK, period=0),
        "ValueError: period | 0",
    ),
    "feedback 0": (
        lambda: dj.error_feedback(BLOCK, feedback=0),
        "ValueError: feedback | 0",
    ),
    "feedback 1.1": (
        lambda: dj.error_feedback(BLOCK, feedback=1.1),
        "ValueError: feedback | 1.1",
    ),
    "evaluate": (
        lambda: dj.error_feedback(BLOCK, evaluate="x"),
        "ValueError: evaluate | 'x' | 'averaged'",
    ),
    "seed": (lambda: dj.error_feedback(BLOCK, seed=-1), "ValueError: seed | -1"),
    "integers": (
        lambda: dj.error_feedback(BLOCK).init({"a": np.ones(3, int)}),
        r"TypeError: params | int(32|64) | \['a'\]",
    ),
    "empty": (lambda: dj.error_feedback(BLOCK).init({}), "ValueError: params | {}"),
    "structure": (
        updated(dj.error_feedback(BLOCK), TWO, lambda x: x["a"]),
        "ValueError: updates | structure",
    ),
    "shapes": (
        updated(dj.error_feedback(BLOCK), updates=lambda x: x[:2]),
        r"ValueError: updates | shapes | \(2,\)",
    ),
    "detached without params": (
        updated(dj.def_sgd(optax.sgd(0.1, momentum=0.9), BLOCK), given=lambda x: None),
        "ValueError: params | None | update",
    ),
    "whole_model of two dtypes": (
        updated(dj.error_feedback(C.top_k(2, whole_model=True)), TWO),
        "TypeError: whole_model | bfloat16 | float32",
    ),
    "low_rank in gossip": (
        lambda: dj.choco_sgd(0.1, RING, C.low_rank(1), consensus_rate=0.5),
        "TypeError: compressor | LowRank | random_block",
    ),
    "consensus_rate 0": (
        lambda: dj.compressed_gossip(RING, BLOCK, consensus_rate=0),
        "ValueError: consensus_rate | 0",
    ),
    "consensus_rate 1.5": (
        lambda: dj.compressed_gossip(RING, BLOCK, consensus_rate=1.5),
        "ValueError: consensus_rate | 1.5",
    ),
    "schedule in gossip": (
        lambda: dj.compressed_gossip(
            dj.topology.one_peer_exponential(N), BLOCK, consensus_rate=0.5
        ),
        "TypeError: topology | schedule|static",
    ),
}
