"""Lists of leaves: partition one in two, combine the two, compare by identity."""

from collections.abc import Sequence
from typing import Any


def partition(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Return the chosen leaves and the others."""
    pairs = list(zip(leaves, chosen, strict=True))
    return [x for x, c in pairs if c], [x for x, c in pairs if not c]


def combine(some: Sequence[Any], others: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """Invert :func:`partition`."""
    left, right = iter(some), iter(others)
    return [next(left) if c else next(right) for c in chosen]


def identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return list(map(id, some)) == list(map(id, others))
