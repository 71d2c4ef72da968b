"""Leaves of trees: take some of them out and put them back, compare by identity."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from gradreg_optax._types import PyTree


def split(
    tree: PyTree, choose: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """Return the chosen leaves of a tree, and a function from such leaves to the tree."""
    leaves, structure = jax.tree.flatten(tree)
    rest = [None if choose(leaf) else leaf for leaf in leaves]  # None is never a leaf

    def whole(some: Sequence[Any]) -> PyTree:
        given = iter(some)
        return jax.tree.unflatten(structure, [next(given) if x is None else x for x in rest])

    return [x for x, r in zip(leaves, rest, strict=True) if r is None], whole


def identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return list(map(id, some)) == list(map(id, others))
