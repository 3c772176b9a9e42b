"""What to look at while training: the model to evaluate, and how far workers differ."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax.mixing import average
from decentral_jax.validation import require_params

__all__ = ["consensus_distance", "eval_params"]


def eval_params(opt_state: Any, params: Any, axis_name: AxisName = "workers") -> Any:
    r"""The model to evaluate: the mean :math:`\bar x` of the workers' models.

    Call it inside a function that runs under the worker axis. An algorithm whose model
    differs from the point where gradients are taken keeps it in its state, and gives
    that state a method `evaluation_params(params)`; it is found here through
    `optax.chain`, `optax.masked`, `optax.partition` and the like. Leaves that none of
    these states sees, such as frozen ones, are the parameters' own.

    Args:
      opt_state: The optimizer's state, as `init` and `update` return it.
      params: This worker's parameters.
      axis_name: The worker axis.

    Returns:
      The averaged model, the same on all workers.

    Raises:
      ValueError: If `params` is None, or two states hold a hidden model of one leaf.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> tx = dj.d_psgd(0.1, dj.topology.ring(4))
      >>> params = jnp.arange(4.0)
      >>> state = jax.vmap(tx.init)(params)
      >>> jax.vmap(dj.eval_params, axis_name="workers")(state, params)
      Array([1.5, 1.5, 1.5, 1.5], dtype=float32)
    """
    params = require_params(params, "eval_params")

    def is_hidden(node):
        return hasattr(node, "evaluation_params")

    nodes = jax.tree.leaves(opt_state, is_leaf=is_hidden)
    models = [_of_part(node, params) for node in nodes if is_hidden(node)]
    leaves, structure = jax.tree.flatten(params)
    for number, alternatives in enumerate(zip(*models, strict=True)):
        found = [leaf for leaf in alternatives if not _is_masked(leaf)]
        if len(found) > 1:
            name = jax.tree_util.keystr(jax.tree.leaves_with_path(params)[number][0])
            raise ValueError(
                f"opt_state must hold at most one hidden model of each leaf, got "
                f"{len(found)} of params{name}: chain only one transformation that "
                "evaluates away from params, or give each its own leaves by "
                "optax.partition."
            )
        leaves[number] = found[0] if found else leaves[number]
    # Frozen leaves may be integers, which have no mean; they are equal on all workers.
    averaged = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    means = iter(average(averaged, axis_name))
    return structure.unflatten(
        next(means) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
        for x in leaves
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _of_part(hidden: Any, params: Any) -> list:
    """The model in a state of some leaves, `optax.MaskedNode` for all the others.

    `optax.masked`, `partition` and `multi_transform` show a transformation its own
    leaves alone. Which those are is seen in the trees that its state keeps.
    """
    leaves, structure = jax.tree.flatten(params)
    masked = [False] * len(leaves)
    for field in jax.tree.leaves(hidden, is_leaf=lambda node: node is not hidden):
        nodes, tree = jax.tree.flatten(field, is_leaf=_is_masked)
        if tree == structure:
            masked = [_is_masked(node) for node in nodes]
    shown = [
        optax.MaskedNode() if out else leaf
        for out, leaf in zip(masked, leaves, strict=True)
    ]
    model = hidden.evaluation_params(structure.unflatten(shown))
    return jax.tree.leaves(model, is_leaf=_is_masked)


def consensus_distance(params: Any, axis_name: AxisName = "workers") -> jax.Array:
    r"""How far the workers' models lie from their mean, as a root mean square.

    .. math:: \Xi = \Bigl(\frac1n \sum_i \|x_i - \bar x\|^2\Bigr)^{1/2}

    (Kong et al., "Consensus Control for Decentralized Deep Learning", ICML 2021.)

    Args:
      params: This worker's parameters.
      axis_name: The worker axis.

    Returns:
      A scalar (float32, or float64 where enabled), equal on all workers; 0 when all
      agree.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> jax.vmap(dj.consensus_distance, axis_name="workers")(jnp.array([1.0, 3.0]))
      Array([1., 1.], dtype=float32)
    """
    params = require_params(params, "consensus_distance")
    centre = average(params, axis_name)
    dtype = jnp.result_type(float)

    def squared(x, c):
        return jnp.sum(jnp.square(jnp.abs(x.astype(dtype) - c.astype(dtype))))

    terms = jax.tree.leaves(jax.tree.map(squared, params, centre))
    return jnp.sqrt(WorkerAxis.bind(axis_name).mean(sum(terms, jnp.zeros([], dtype))))
