"""Leaves of trees: partition them in two, combine the two, compare by identity."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from gradreg_optax._types import PyTree


def partition(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Return the chosen leaves and the others."""
    pairs = list(zip(leaves, chosen, strict=True))
    return [x for x, c in pairs if c], [x for x, c in pairs if not c]


def combine(some: Sequence[Any], others: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """Invert :func:`partition`."""
    left, right = iter(some), iter(others)
    return [next(left) if c else next(right) for c in chosen]


def split(
    tree: PyTree, choose: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """Return the chosen leaves of a tree, and a function from such leaves to the tree."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = list(map(choose, leaves))
    some, others = partition(leaves, chosen)
    return some, lambda some: jax.tree.unflatten(structure, combine(some, others, chosen))


def identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return list(map(id, some)) == list(map(id, others))
