"""Evaluation during training: the averaged model, and the consensus distance."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from decentral_jax._exchange.axis import AxisName, WorkerAxis
from decentral_jax._exchange.numbers import PyTree
from decentral_jax._nnx import values
from decentral_jax._validation import require_params
from decentral_jax.mixing import average

__all__ = ["consensus_distance", "eval_params"]


def eval_params(
    opt_state: optax.OptState, params: optax.Params, axis_name: AxisName = "workers"
) -> PyTree:
    r"""Returns the model to evaluate: the mean :math:`\bar x` of the workers' models.

    Call it inside a function that runs under the worker axis. Some algorithms compute
    gradients at a point that differs from their model. Such an algorithm stores the
    model in its state, and the state has a method `evaluation_params(params)`.
    `eval_params` finds these states inside `optax.chain`, `optax.masked`,
    `optax.partition`, and similar wrappers. For leaves that no such state covers, such
    as frozen ones, it averages the parameters themselves.

    Args:
      opt_state: The optimizer state, as `init` and `update` return it; of an
        `nnx.Optimizer`, its attribute `opt_state`.
      params: This worker's parameters, such as `nnx.state(model, nnx.Param)`.
      axis_name: Name of the worker axis.

    Returns:
      The averaged model, which is equal on all workers.

    Raises:
      TypeError: If any leaf of `params` is not an array, or `params` is an optimizer
        state.
      ValueError: If `params` is None, or two states hold a hidden model of one leaf.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> tx = dj.d_psgd(0.1, dj.topology.ring(4))
      >>> params = jnp.arange(4.0)
      >>> state = jax.vmap(tx.init)(params)
      >>> jax.vmap(dj.eval_params, axis_name="workers")(state, params)
      Array([1.5, 1.5, 1.5, 1.5], dtype=float32)
    """
    given = require_params(params, "eval_params")
    if any(map(_is_state, jax.tree.leaves(params, is_leaf=_is_state))):
        raise TypeError(
            "params must be the parameters, got the state of an optimizer: call "
            "eval_params(opt_state, params)."
        )
    params, opt_state = values((given, opt_state))

    def is_hidden(node):
        return hasattr(node, "evaluation_params")

    # One list per hidden model: its leaves, or MaskedNode for leaves it does not cover.
    nodes = jax.tree.leaves(opt_state, is_leaf=is_hidden)
    models = [_of_part(node, params) for node in nodes if is_hidden(node)]
    # Replace each leaf of params by that of the hidden model that covers it, if any.
    leaves = jax.tree.leaves(params)
    for number, alternatives in enumerate(zip(*models, strict=True)):
        found = [leaf for leaf in alternatives if not _is_masked(leaf)]
        if len(found) > 1:
            name = jax.tree_util.keystr(jax.tree.leaves_with_path(params)[number][0])
            raise ValueError(
                "opt_state must hold at most one hidden model of each leaf, got "
                f"{len(found)} of params{name}: chain only one transformation whose "
                "evaluated model differs from params, or assign separate leaves to "
                "each with optax.partition."
            )
        leaves[number] = found[0] if found else leaves[number]
    # Average the floating-point leaves in one call. Frozen leaves may be integers,
    # which have no mean and are equal on all workers.
    averaged = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    means = iter(average(averaged, axis_name))
    return jax.tree.structure(given).unflatten(
        next(means) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
        for x in leaves
    )


def _is_state(node: object) -> bool:
    """Returns whether a node is the state of an optimizer."""
    modules = ("optax.", "decentral_jax.")
    return hasattr(node, "_fields") and type(node).__module__.startswith(modules)


def _is_masked(node: object) -> bool:
    """Returns whether a node is the placeholder of a masked leaf."""
    return isinstance(node, optax.MaskedNode)


def _of_part(hidden: PyTree, params: PyTree) -> list[Any]:
    """Returns the leaves of the model that one state holds.

    `optax.masked`, `partition`, and `multi_transform` pass only some leaves to a
    transformation, and `optax.MaskedNode` in place of the others. The trees in the
    state show which leaves the transformation has received.

    Args:
      hidden: A state with a method `evaluation_params`.
      params: All parameters.

    Returns:
      One entry per leaf of `params`: the model's leaf, or `optax.MaskedNode` if the
      state does not cover it.
    """
    # Find a field of the state with the structure of params, where a masked node may
    # stand for a whole subtree of params. If there is none, nothing is masked.
    structure, parts = jax.tree.structure(params), jax.tree.leaves(params)
    masked = [False] * len(parts)
    for field in jax.tree.leaves(hidden, is_leaf=lambda node: node is not hidden):
        nodes, tree = jax.tree.flatten(field, is_leaf=_is_masked)
        try:
            subtrees = tree.flatten_up_to(params)
        except ValueError:  # another structure
            continue
        out = [_is_masked(node) for node in nodes]
        if all(
            o or jax.tree_util.all_leaves([p])
            for o, p in zip(out, subtrees, strict=True)
        ):
            structure, parts, masked = tree, subtrees, out
    # Call the method with what the transformation itself receives.
    shown = [
        optax.MaskedNode() if out else part
        for out, part in zip(masked, parts, strict=True)
    ]
    model = hidden.evaluation_params(structure.unflatten(shown))
    nodes = jax.tree.leaves(model, is_leaf=_is_masked)
    # A masked node stands for all leaves of its subtree.
    return [
        node
        for node, part in zip(nodes, parts, strict=True)
        for _ in jax.tree.leaves(part)
    ]


def consensus_distance(
    params: optax.Params, axis_name: AxisName = "workers"
) -> jax.Array:
    r"""Returns the root mean square distance of the workers' models from their mean.

    .. math:: \Xi = \Bigl(\frac1n \sum_i \|x_i - \bar x\|^2\Bigr)^{1/2}

    (Kong et al., "Consensus Control for Decentralized Deep Learning", ICML 2021.)

    Args:
      params: This worker's parameters.
      axis_name: Name of the worker axis.

    Returns:
      A float32 scalar (float64 if enabled), equal on all workers. It is 0 if all models
      are equal.

    Raises:
      TypeError: If any leaf of `params` is not an array.
      ValueError: If `params` is None.

    Example:
      >>> import decentral_jax as dj, jax, jax.numpy as jnp
      >>> jax.vmap(dj.consensus_distance, axis_name="workers")(jnp.array([1.0, 3.0]))
      Array([1., 1.], dtype=float32)
    """
    params = require_params(params, "consensus_distance")
    mean = average(params, axis_name)
    dtype = jnp.result_type(float)

    def squared(x, m):
        return jnp.sum(jnp.square(jnp.abs(x.astype(dtype) - m.astype(dtype))))

    # Sum over the leaves of one worker, then average over the workers.
    terms = jax.tree.leaves(jax.tree.map(squared, params, mean))
    return jnp.sqrt(WorkerAxis.bind(axis_name).mean(sum(terms, jnp.zeros([], dtype))))
