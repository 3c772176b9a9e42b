"""Bad input raises an error before any device work, and the message names the remedy.

Each row of the table holds a call and the expected error, written as
"error: argument | value | remedy". The parts are regular expressions.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decentral_jax as dj
from tests.support import (
    bad_asynchronous,
    bad_compression,
    bad_local_updates,
    bad_ordering,
    bad_topologies,
)
from tests.support.bad_topologies import HALVES, ONE_PEER, RING
from tests.support.layouts import compilations, nested_vmap
from tests.support.registry import ALGORITHMS as ALL_ALGORITHMS

T = dj.topology
# A bipartite graph without self-weights has the eigenvalue -1.
BIPARTITE = T.Topology((np.roll(np.eye(8), 1, 0) + np.roll(np.eye(8), -1, 0)) / 2)
COLUMNS = T.Topology([[0.9, 0.5], [0.1, 0.5]], "columns")
X = jax.ShapeDtypeStruct((8, 3), jnp.float32)
INTS = jax.ShapeDtypeStruct((8, 3), jnp.int32)
ONES = np.ones((8, 3), np.float32)
ADAM = optax.adam(1e-3)


def traced(fn, x=X, axis_name="workers"):
    """Returns a call that traces one worker's function without running it."""
    return lambda: jax.eval_shape(jax.vmap(fn, axis_name=axis_name), x)


def updated(tx, *, params=False):
    """Returns a call that traces `tx.update`, without params by default."""
    return traced(lambda x: tx.update(x, tx.init(x), x if params else None))


def injected():
    tx = optax.inject_hyperparams(dj.detag)(0.1, topology=RING, rounds=4)
    return jax.eval_shape(tx.init, X)


class Hidden(NamedTuple):
    """A state whose evaluation model is hidden in the optimizer state."""

    x: Any

    def evaluation_params(self, params):
        return params


class Activation:
    """A leaf that is not an array, as functions in Equinox modules are."""


MODULE = {"layers": [{"kernel": np.ones((8, 2), np.float32), "act": Activation()}]}
NOT_ARRAYS = "TypeError: must hold arrays | Activation | 'layers'.*'act' | partition"
NOT_ARRAY_ROWS = {
    "mix": traced(lambda x: dj.mix(MODULE, RING)),
    "average": traced(lambda x: dj.average(MODULE)),
    "average_every": traced(lambda x: dj.average_every(MODULE, 2, 0)),
    "accelerated_mix": traced(lambda x: dj.accelerated_mix(MODULE, RING, 2)),
    "average_by_factors": traced(lambda x: dj.average_by_factors(MODULE, RING)),
    "eval_params": traced(lambda x: dj.eval_params((), MODULE)),
    "consensus_distance": traced(lambda x: dj.consensus_distance(MODULE)),
    "replicate": lambda: dj.Workers(8).replicate(MODULE),
    "shard": lambda: dj.Workers(8).shard(MODULE),
    "spmd": lambda: dj.Workers(8).spmd(lambda x: x)(MODULE),
    "cost": lambda: dj.communication_cost(lambda x: x, MODULE, axis_sizes={"a": 2}),
    "costs": lambda: dj.communication_costs(ADAM, MODULE, axis_sizes={"a": 2}),
    "cost of spmd": lambda: dj.communication_cost(
        dj.Workers(8).spmd(lambda x: x), MODULE
    ),
}
TWO_HIDDEN = (Hidden(1.0), Hidden(2.0))
MIXING = {
    "axis unbound": (
        lambda: jax.eval_shape(lambda x: dj.mix(x, RING), X),
        r"ValueError: axis_name | 'workers' | jax\.vmap",
    ),
    "axis of another name": (
        traced(lambda x: dj.average(x, axis_name="hubs")),
        "ValueError: axis_name | 'hubs' | name that you use",
    ),
    "axis not a string": (
        traced(lambda x: dj.mix(x, RING, axis_name=3)),
        'TypeError: axis_name | 3 | "workers"',
    ),
    "axis None": (
        lambda: dj.average_gradients(axis_name=None),
        'TypeError: axis_name | None | "workers"',
    ),
    "no axes": (
        lambda: dj.gossip(RING, axis_name=()),
        r"TypeError: axis_name | \(\) | string",
    ),
    "axes repeated": (
        lambda: dj.d2(0.1, RING.lazy(0.5), axis_name=("a", "a")),
        r"ValueError: axis_name | \('a', 'a'\) | repeat",
    ),
    "axis size": (
        traced(lambda x: dj.mix(x, T.ring(4))),
        r"ValueError: topology | ring\(4\) | 8 workers",
    ),
    "axis size, accelerated": (
        traced(lambda x: dj.accelerated_mix(x, T.ring(16), 2)),
        r"ValueError: topology | ring\(16\) | 8 workers",
    ),
    "axis size, factors": (
        traced(lambda x: dj.average_by_factors(x, T.ring(4))),
        "ValueError: topology | 4 workers | 8 workers",
    ),
    "axis size, algorithm": (
        updated(dj.defacto(0.1, T.ring(4)), params=True),
        "ValueError: topology | 4 workers | 8 workers",
    ),
    "axes in ambiguous order": (
        lambda: jax.eval_shape(
            dj.Workers({"a": 6, "b": 2}, devices=jax.devices()[:4]).spmd(
                lambda x: dj.mix(x, T.ring(12), axis_name=("a", "b"))
            ),
            jax.ShapeDtypeStruct((6, 2), jnp.float32),
        ),
        r"ValueError: axis_name | \('a', 'b'\) | numbers of devices",
    ),
    "integers": (
        traced(lambda x: dj.mix({"count": x}, RING), INTS),
        r"TypeError: tree.*\['count'\] | int32 | optax.masked",
    ),
    "integers, exactly averaged": (
        traced(lambda x: dj.mix({"count": x}, T.complete(8)), INTS),
        r"TypeError: tree.*\['count'\] | int32 | astype",
    ),
    "integer gradients": (
        traced(lambda x: dj.average_gradients().update(x, optax.EmptyState()), INTS),
        "TypeError: updates | int32 | astype",
    ),
    "integers, periodically averaged": (
        traced(lambda x: dj.average_every({"count": x}, 2, 0), INTS),
        r"TypeError: tree.*\['count'\] | int32 | astype",
    ),
    "keys": (
        traced(lambda x: dj.average(jax.random.key(0))),
        "TypeError: tree | key<fry> | optax.masked",
    ),
    "no step": (
        traced(lambda x: dj.mix(x, ONE_PEER)),
        "ValueError: step | None | round number",
    ),
    "step 1.5": (
        traced(lambda x: dj.mix(x, ONE_PEER, step=1.5)),
        "TypeError: step | 1.5 | integer",
    ),
    "topology a matrix": (
        traced(lambda x: dj.mix(x, RING.matrix)),
        "TypeError: topology | array | from_matrix",
    ),
    "accelerated schedule": (
        traced(lambda x: dj.accelerated_mix(x, ONE_PEER, 2)),
        "TypeError: topology | one_peer_ring | static",
    ),
    "accelerated directed": (
        traced(lambda x: dj.accelerated_mix(x, T.exponential(8), 2)),
        "ValueError: topology | exponential | symmetric",
    ),
    "accelerated bipartite": (
        traced(lambda x: dj.accelerated_mix(x, BIPARTITE, 2)),
        r"ValueError: topology | eigenvalue is -1 | lazy\(0.5\)",
    ),
    "no accelerated rounds": (
        traced(lambda x: dj.accelerated_mix(x, RING, 0)),
        "ValueError: rounds | 0 | >= 1",
    ),
}
RATES = {
    "negative": (
        -0.1,
        "ValueError: learning rate passed as optimizer | -0.1 | number in that range",
    ),
    "nan": (
        np.nan,
        "ValueError: learning rate passed as optimizer | nan | number in that range",
    ),
    "infinite": (
        np.inf,
        "ValueError: learning rate passed as optimizer | inf | number in that range",
    ),
    "word": (
        "0.1",
        "TypeError: learning rate passed as optimizer | '0.1' | pass a float",
    ),
    "bool": (
        True,
        "TypeError: learning rate passed as optimizer | True | pass a float",
    ),
    "vector": (
        np.ones(2),
        r"TypeError: learning rate passed as optimizer | \[1., 1.\] | pass a float",
    ),
}
BY_NAME = {
    "all_reduce_sgd": dj.all_reduce_sgd,
    "d_psgd": partial(dj.d_psgd, topology=RING),
    "d2": partial(dj.d2, topology=RING.lazy(0.5)),
    "dsgt": partial(dj.dsgt, topology=RING),
    "detag": partial(dj.detag, topology=RING, rounds=4),
    "defacto": partial(dj.defacto, topology=RING),
    "local_sgd": partial(dj.local_sgd, period=2),
    "slowmo": partial(dj.slowmo, period=2),
    "diloco": partial(dj.diloco, period=2),
    "sgp": partial(dj.sgp, topology=RING),
}
BY_NAME_ROWS = {
    "rate": (
        lambda make: make(-2.0),
        "ValueError: learning rate passed as optimizer | -2.0 | range",
    ),
    "none": (lambda make: make(None), r"TypeError: optimizer | None | optax\.adam"),
    "a function": (
        lambda make: make(optax.adam),
        "TypeError: optimizer | function adam | constructor",
    ),
    "MultiSteps": (
        lambda make: make(optax.MultiSteps(ADAM, 2)),
        "TypeError: optimizer | MultiSteps | gradient_transformation",
    ),
    "axis": (
        lambda make: make(0.1, axis_name=["a"]),
        "TypeError: axis_name | 'a' | string",
    ),
}
NEED_PARAMS = {
    "gossip": dj.gossip(RING),
    "exact_diffusion": dj.exact_diffusion(RING.lazy(0.5)),
    "accelerated_tracking": dj.detag(0.1, RING, rounds=4),
    "exact_phases": dj.defacto(0.1, RING),
}
ALGORITHMS = {
    "rounds 0": (
        lambda: dj.detag(0.1, RING, rounds=0),
        "ValueError: rounds | 0 | >= 1",
    ),
    "rounds 2.5": (
        lambda: dj.detag(0.1, RING, rounds=2.5),
        "TypeError: rounds | 2.5 | >= 1",
    ),
    "rounds traced": (injected, "TypeError: rounds | before tracing | static_args"),
    "defacto rounds": (
        lambda: dj.defacto(0.1, RING, rounds=-1),
        "ValueError: rounds | -1 | >= 1",
    ),
    "order": (
        lambda: dj.d_psgd(0.1, RING, order="atc"),
        "ValueError: order | 'atc' | adapt_then_combine",
    ),
    "tracking order": (
        lambda: dj.track_gradients(RING, order="cta"),
        "ValueError: order | 'cta' | combine_then_adapt",
    ),
    "when": (
        lambda: dj.detag(0.1, RING, rounds=4, when="later"),
        "ValueError: when | 'later' | phase_end",
    ),
    "d2 on a ring": (
        lambda: dj.d2(0.1, RING),
        r"ValueError: topology | -0.3333 | lazy\(0.75\)",
    ),
    "d2 on a schedule": (
        lambda: dj.d2(0.1, ONE_PEER),
        "TypeError: topology | one_peer_ring | static",
    ),
    "d2 on a directed graph": (
        lambda: dj.exact_diffusion(T.exponential(8)),
        "ValueError: topology | exponential | symmetric",
    ),
    "detag on a schedule": (
        lambda: dj.detag(0.1, ONE_PEER, rounds=4),
        "TypeError: topology | one_peer_ring | static",
    ),
    "detag on a bipartite graph": (
        lambda: dj.detag(0.1, BIPARTITE, rounds=4),
        r"ValueError: topology | eigenvalue is -1 | lazy\(0.5\)",
    ),
    "defacto on a schedule": (
        lambda: dj.defacto(0.1, ONE_PEER),
        "TypeError: topology | one_peer_ring | static",
    ),
    "columns only": (
        lambda: dj.gossip(COLUMNS),
        "ValueError: topology | columns: | Metropolis",
    ),
    "negative weights": (
        lambda: dj.gossip(T.Topology([[1.5, -0.5], [-0.5, 1.5]])),
        "ValueError: topology | negative | Metropolis",
    ),
    "disconnected graph": (
        lambda: dj.dsgt(0.1, HALVES),
        "ValueError: topology | halves | add edges",
    ),
    "topology missing": (
        lambda: dj.d_psgd(0.1, None),
        r"TypeError: topology | None | dj\.topology\.ring",
    ),
    "optimizer constructor": (
        lambda: dj.accelerated_tracking(optax.sgd, RING, rounds=4),
        r"TypeError: optimizer | function sgd | optax\.adam",
    ),
    "number instead of an optimizer": (
        lambda: dj.exact_phases(0.1, RING),
        r"TypeError: optimizer | 0.1 | optax\.adam",
    ),
    "eval_params": (
        traced(lambda x: dj.eval_params((), None)),
        "ValueError: params | None | call",
    ),
    "consensus_distance": (
        traced(lambda x: dj.consensus_distance(None)),
        "ValueError: params | None | call",
    ),
    "two hidden models": (
        traced(lambda x: dj.eval_params(TWO_HIDDEN, x)),
        "ValueError: opt_state | got 2 | chain only one",
    ),
}
WORKERS = {
    "no workers": (lambda: dj.Workers(0), "ValueError: shape | 0 | >= 1"),
    "2.5 workers": (lambda: dj.Workers(2.5), "TypeError: shape | 2.5 | >= 1"),
    "bool": (lambda: dj.Workers(True), "TypeError: shape | True | >= 1"),
    "no axis": (lambda: dj.Workers({}), 'ValueError: shape | {} | "workers": 8'),
    "empty axis": (
        lambda: dj.Workers({"hub": 0}),
        r"ValueError: shape\['hub'\] | 0 | >= 1",
    ),
    "axis name": (lambda: dj.Workers({1: 2}), 'TypeError: axis_name | 1 | "workers"'),
    "empty name": (
        lambda: dj.Workers(8, axis_name=""),
        "TypeError: axis_name | '' | worker axis",
    ),
    "two names": (
        lambda: dj.Workers({"hub": 2}, axis_name="x"),
        "ValueError: axis_name | 'x' | leave it out",
    ),
    "no devices": (
        lambda: dj.Workers(8, devices=[]),
        "ValueError: devices | none | at least one",
    ),
    "not divisible": (
        lambda: dj.Workers(6, devices=jax.devices()[:4]),
        r"ValueError: shape=6 | 4 devices | devices=jax.devices\(\)\[:3\]",
    ),
    "not divisible, named": (
        lambda: dj.Workers({"hub": 3, "worker": 3}),
        r"ValueError: shape={'hub': 3, 'worker': 3} | 8 devices | \[:3\]",
    ),
    "fn not a function": (
        lambda: dj.Workers(8).spmd(3),
        "TypeError: fn | 3 | one worker's",
    ),
    "shard": (
        lambda: dj.Workers(8).shard({"x": np.ones((4, 2))}),
        r"ValueError: tree | \(4, 2\) at \['x'\] | \.replicate",
    ),
    "shard a number": (
        lambda: dj.Workers(8).shard(1.0),
        r"ValueError: tree | \(\) at the | stack",
    ),
    "spmd": (
        lambda: dj.Workers(8).spmd(lambda x: x)(np.ones(3)),
        r"ValueError: arguments | \(3,\) | \.replicate",
    ),
    "spmd, named": (
        lambda: dj.Workers({"a": 4, "b": 2}).spmd(lambda x, y: x)(ONES, ONES),
        r"ValueError: arguments | \(8, 3\) at \[0\] | \(4, 2\)",
    ),
    "cost of no function": (
        lambda: dj.communication_cost(3),
        "TypeError: fn | 3 | function",
    ),
    "cost of a wrong shape": (
        lambda: dj.communication_cost(dj.Workers(8).spmd(lambda x: x), np.ones(3)),
        r"ValueError: arguments | \(3,\) | \.replicate",
    ),
    "costs of no transformation": (
        lambda: dj.communication_costs(3, X, axis_sizes={"workers": 8}),
        "TypeError: tx | 3 | transformation",
    ),
    "costs of no steps": (
        lambda: dj.communication_costs(ADAM, X, 0, axis_sizes={"workers": 8}),
        "ValueError: steps | 0 | at least 1",
    ),
    "cost without axes": (
        lambda: dj.communication_cost(lambda x: dj.mix(x, RING), np.ones(3)),
        "ValueError: axis_name | 'workers' | spmd",
    ),
}


def module_update(tx, shape, arrays, what):
    """Traces a step whose gradients or params hold leaves that are not arrays."""
    trees = {"updates": arrays, "params": arrays, what: MODULE}

    def step():
        return tx.update(trees["updates"], tx.init(arrays), trees["params"])[0]

    return jax.eval_shape(nested_vmap(step, shape))


def counted_update(tx, shape, arrays):
    """Traces a step whose params hold an integer leaf that `init` did not see."""
    grads, params = arrays | {"count": None}, arrays | {"count": np.ones(2, np.int32)}

    def step():
        return tx.update(grads, tx.init(grads), params)[0]

    return jax.eval_shape(nested_vmap(step, shape))


def table():
    """Yields all rows: (id, call, expected error)."""
    yield from bad_topologies.rows()
    others = bad_compression, bad_local_updates, bad_ordering, bad_asynchronous
    for rows in (module.ROWS for module in others):
        yield from ((name, *row) for name, row in rows.items())
    for group in (MIXING, ALGORITHMS, WORKERS):
        yield from ((name, *row) for name, row in group.items())
    for name, (rate, expected) in RATES.items():
        yield f"learning_rate {name}", partial(dj.d_psgd, rate, RING), expected
    for name, make in BY_NAME.items():
        for row, (call, expected) in BY_NAME_ROWS.items():
            yield f"{name} {row}", partial(call, make), expected
    for name, call in NOT_ARRAY_ROWS.items():
        yield f"{name} of a module", call, NOT_ARRAYS
    for name, algorithm in ALL_ALGORITHMS.items():
        if not hasattr(dj, algorithm.build.__name__):
            continue  # starts with an optax transformation, which has no such checks
        tx, expected = algorithm.make(0.1), NOT_ARRAYS
        yield f"{name} init of a module", partial(tx.init, MODULE), expected
        arrays = jax.tree.map(lambda x: np.ones(2, np.float32), MODULE)
        for what in ("updates", "params"):
            call = partial(module_update, tx, algorithm.shape, arrays, what)
            yield f"{name} update of a module in {what}", call, expected
        if algorithm.build is dj.all_reduce_sgd:
            continue  # does not read the parameters
        call = partial(counted_update, tx, algorithm.shape, arrays)
        yield f"{name} update of a count in params", call, "TypeError: int32 | count"
    for name, tx in NEED_PARAMS.items():
        expected = f"ValueError: {name} needs params | None | update"
        yield f"{name} without params", updated(tx), expected


@pytest.mark.parametrize(
    ("call", "expected"), [pytest.param(*row, id=name) for name, *row in table()]
)
def test_bad_input(call, expected):
    error, patterns = expected.split(": ", maxsplit=1)
    with compilations() as compiled, pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert caught.type.__name__ == error
    for pattern in patterns.split(" | "):
        assert re.search(pattern, message, re.DOTALL), (pattern, message)
    assert message.endswith(".")
    assert not compiled


def test_unknown_rates_are_accepted():
    """Schedules and traced rates pass the checks: they have no value yet."""
    for rate in (optax.linear_schedule(1.0, 0.0, 10), np.float32(0.1), 0, jnp.ones([])):
        dj.d_psgd(rate, RING)
    tx = optax.inject_hyperparams(dj.d_psgd)(0.1, topology=RING)
    state = jax.eval_shape(tx.init, X)
    assert state.hyperparams["optimizer"].shape == ()
