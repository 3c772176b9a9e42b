"""Flax nnx trees, without importing Flax: a caller who passes them has imported it."""

import sys

import jax

from decentral_jax._exchange.numbers import PyTree


def values(tree: PyTree) -> PyTree:
    """Replaces each `nnx.Variable` in a tree by its value.

    `nnx.Optimizer` wraps the leaves of the optimizer's state in variables of other
    types than those of the model, so that the two trees differ in structure.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def is_variable(x):
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x,
        tree,
        is_leaf=is_variable,
    )
