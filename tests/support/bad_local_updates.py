"""Bad inputs of local updates, hubs and push-sum; see `test_bad_inputs`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decentral_jax as dj
from tests.support.layouts import nested_vmap

T = dj.topology
RING = T.ring(4)
SGD = optax.sgd(0.1)
QUARTERS = [[0.125, 0.125]] * 4


def mll(**changed):
    """Returns a call that builds `mll_sgd` with some valid arguments replaced."""
    arguments = {"hub_topology": RING, "tau": 2, "q": 3, **changed}
    return lambda: dj.mll_sgd(0.1, **arguments)


def updated(tx, shape, params=True):
    """Returns a call that traces `init` and `update` over axes of the given shape."""
    x = jax.ShapeDtypeStruct((*shape.values(), 3), jnp.float32)

    def step(x):
        return tx().update(x, tx().init(x), x if params else None)

    return lambda: jax.eval_shape(nested_vmap(step, shape), x)


HUBS = {"hub": 4, "worker": 2}
ROWS = {
    "rate 0": (mll(rates=0.0), r"ValueError: rates | \(0, 1\] | got 0"),
    "rate 1.5": (mll(rates=[[0.5, 1.5]] * 4), r"ValueError: rates | \(0, 1\] | 1.5"),
    "rate -1": (mll(rates=-1), "ValueError: rates | got -1"),
    "rate nan": (mll(rates=float("nan")), "ValueError: rates | nan"),
    "rates a string": (mll(rates="fast"), "TypeError: rates | 'fast' | one entry"),
    "rates of another shape": (
        updated(mll(rates=[0.5] * 8), HUBS),
        r"ValueError: rates | \(4, 2\) | \(8,\)",
    ),
    "rates of fewer workers": (
        updated(lambda: dj.operating_rates(SGD, rates=[0.5, 1.0]), {"workers": 8}),
        r"ValueError: rates | \(8,\) | \(2,\)",
    ),
    "optimizer not called": (
        lambda: dj.operating_rates(optax.sgd, rates=0.5),
        "TypeError: optimizer | function sgd | call",
    ),
    "shares not 1": (
        mll(shares=[[0.2, 0.2]] * 4),
        "ValueError: shares | sum to 1 | 1.6 | divide",
    ),
    "share negative": (
        mll(shares=[[0.5, -0.25]] * 4),
        "ValueError: shares | negative | -0.25",
    ),
    "share nan": (mll(shares=[[np.nan, 0.1]] * 4), "ValueError: shares | nan"),
    "hub without data": (
        mll(shares=[[0.25, 0.25], [0.25, 0.25], [0, 0], [0, 0]]),
        "ValueError: shares | hub 2 | leave",
    ),
    "shares of fewer hubs": (
        mll(shares=[[0.5, 0.5]]),
        r"ValueError: shares | 4 rows | \(1, 2\)",
    ),
    "shares flat": (mll(shares=[0.125] * 8), r"ValueError: shares | \(8,\) | rows"),
    "shares of more workers": (
        updated(mll(shares=[[0.125, 0.125, 0.0]] * 4), HUBS),
        r"ValueError: shares | \(4, 2\) | \(4, 3\)",
    ),
    "tau 0": (mll(tau=0), "ValueError: tau | 0 | >= 1"),
    "tau 1.5": (mll(tau=1.5), "TypeError: tau | 1.5 | >= 1"),
    "q 0": (mll(q=0), "ValueError: q must | 0 | >= 1"),
    "hub topology of the wrong size": (
        updated(mll(hub_topology=T.ring(5)), HUBS),
        r"ValueError: topology | 'hub' | 4 | ring\(5\)",
    ),
    "hub topology a matrix": (
        mll(hub_topology=np.eye(4)),
        "TypeError: topology | array | from_matrix",
    ),
    "hub topology directed, with uneven shares": (
        updated(
            mll(hub_topology=T.exponential(5), shares=[[0.3], [0.4], *[[0.1]] * 3]),
            {"hub": 5, "worker": 1},
        ),
        "ValueError: topology | exponential | symmetric",
    ),
    "one axis twice": (mll(worker_axis="hub"), "ValueError: axis_name | repeat"),
    "no hubs": (
        lambda: dj.hl_sgd(0.1, 0, tau=1, q=1),
        "ValueError: num_hubs must | 0 | >= 1",
    ),
    "period 0": (lambda: dj.local_sgd(0.1, period=0), "ValueError: period | 0"),
    "period 2.5": (
        lambda: dj.slowmo(optax.sgd(0.1, momentum=0.9), period=2.5),
        "TypeError: period | 2.5",
    ),
    "fragments above the period": (
        lambda: dj.diloco(optax.adamw(0.1), period=2, fragments=3),
        "ValueError: fragments | period=2 | 3",
    ),
    "fragments above the leaves": (
        updated(
            lambda: dj.diloco(optax.adamw(0.1), period=9, fragments=3), {"workers": 8}
        ),
        "ValueError: fragments | leaves | 3 for 1",
    ),
    "fragments 0": (
        lambda: dj.diloco(optax.adamw(0.1), period=9, fragments=0),
        "ValueError: fragments",
    ),
    "slow momentum 1": (
        lambda: dj.slowmo(optax.sgd(0.1, momentum=0.9), period=2, slow_momentum=1.0),
        "ValueError: slow_momentum | 1.0",
    ),
    "slow rate -1": (
        lambda: dj.slowmo(optax.sgd(0.1, momentum=0.9), period=2, slow_rate=-1.0),
        "ValueError: slow_rate | -1.0",
    ),
    "outer not called": (
        lambda: dj.diloco(0.1, period=2, outer=optax.sgd),
        "TypeError: outer | function sgd | call",
    ),
    "learning rate beside a learning rate": (
        lambda: dj.slowmo(0.1, period=2, learning_rate=0.1),
        "ValueError: learning_rate=0.1 | leave it out",
    ),
    "quasi-global momentum 1": (
        lambda: dj.qg_dsgdm(0.1, RING, momentum=1.0),
        "ValueError: momentum | 1.0",
    ),
    "quasi-global factor 2": (
        lambda: dj.qg_dsgdm(0.1, RING, factor=2.0),
        "ValueError: factor | 2.0",
    ),
    "push-sum with rows only": (
        lambda: dj.sgp(0.1, T.from_matrix([[0.5, 0.5], [0.2, 0.8]])),
        "ValueError: topology | columns | push",
    ),
    "reweighted, a share of 0": (
        lambda: T.reweighted(RING, [1, 1, 1, 0]),
        r"ValueError: shares | 4 positive | \[1, 1, 1, 0\]",
    ),
    "reweighted, too few": (
        lambda: T.reweighted(RING, [1, 2]),
        r"ValueError: shares | 4 positive | \[1, 2\]",
    ),
    "push weights of no graph": (
        lambda: T.from_graph(RING.matrix, weights="push"),
        "TypeError: graph | ndarray | from_matrix",
    ),
}


def reshaped(tx, shape):
    """Returns a call that traces `update` with updates that lack an entry."""
    x = jax.ShapeDtypeStruct((*shape.values(), 3), jnp.float32)
    return lambda: jax.eval_shape(
        nested_vmap(lambda x: tx.update(x[:2], tx.init(x), x), shape), x
    )


COLUMNS = T.Topology([[0.9, 0.5], [0.1, 0.5]], "columns")
ROWS |= {
    "hub topology not doubly stochastic": (
        mll(hub_topology=COLUMNS),
        "ValueError: topology | doubly stochastic | columns",
    ),
    "quasi-global momentum on columns": (
        lambda: dj.qg_dsgdm(0.1, COLUMNS),
        "ValueError: topology | doubly stochastic | columns",
    ),
    "quasi-global rate -1": (
        lambda: dj.qg_dsgdm(-1.0, RING),
        "ValueError: learning_rate | -1.0",
    ),
    "seed of the operating workers": (mll(seed=-1), "ValueError: seed | -1 | >= 0"),
    "reweighted, a share of inf": (
        lambda: T.reweighted(RING, [1, 1, 1, np.inf]),
        "ValueError: shares | 4 positive | inf",
    ),
    "reweighted schedule": (
        lambda: T.reweighted(T.one_peer_exponential(4), [1, 2, 3, 4]),
        "TypeError: topology | schedule | static",
    ),
    "rates' axis": (
        lambda: dj.operating_rates(SGD, rates=0.5, axis_name=["a"]),
        "TypeError: axis_name | 'a' | string",
    ),
    "quasi-global axis": (
        lambda: dj.qg_dsgdm(0.1, RING, axis_name=["a"]),
        "TypeError: axis_name | 'a' | string",
    ),
}
TRANSFORMATIONS = {
    "average_parameters": (dj.average_parameters(period=2), {"workers": 4}),
    "multi_level": (dj.multi_level(RING, tau=2, q=3), HUBS),
    "push_sum": (dj.push_sum(RING), {"workers": 4}),
    "quasi_global_momentum": (dj.quasi_global_momentum(0.1, RING), {"workers": 4}),
}
for name, (tx, shape) in TRANSFORMATIONS.items():
    ROWS |= {
        f"{name} without params": (
            updated(lambda tx=tx: tx, shape, params=False),
            f"ValueError: {name} needs params | None | update",
        ),
        f"{name} of no arrays": (partial(tx.init, {}), "ValueError: params | {}"),
        f"{name} of integers": (
            partial(tx.init, {"a": np.ones(3, int)}),
            r"TypeError: params | int(32|64) | \['a'\]",
        ),
        f"{name} of another shape": (
            reshaped(tx, shape),
            r"ValueError: updates | shapes | \(2,\)",
        ),
    }
