"""Some of the leaves of a tree apart from the others, and back in their places."""

from collections.abc import Callable, Sequence
from typing import Any


def apart(
    leaves: Sequence[Any], chosen: Sequence[bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The chosen leaves, and what puts others in their place among all of them."""

    def put(some: Sequence[Any]) -> list[Any]:
        given = iter(some)
        return [next(given) if c else x for x, c in zip(leaves, chosen, strict=True)]

    return [x for x, c in zip(leaves, chosen, strict=True) if c], put
