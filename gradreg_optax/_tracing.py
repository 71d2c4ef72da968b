"""Functions that JAX traces: with outputs that are not arrays, and only once."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from gradreg_optax._leaves import split
from gradreg_optax._types import PyTree

Leaves: TypeAlias = list[Any]


class StaticPart:
    """The non-array part of the output of a function that may return arrays only.

    Attributes:
      whole: a function from the arrays to the output.
    """

    whole: Callable[[Leaves], PyTree]

    def arrays(self, tree: PyTree) -> Leaves:
        """Return the arrays of a tree, and store the rest."""
        arrays, self.whole = split(tree, lambda leaf: isinstance(leaf, jax.Array))
        return arrays


def traced_once(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return ``function``, which under ``jax.jit`` is traced only on the first of several calls."""
    static = StaticPart()

    @jax.jit
    @functools.wraps(function)  # JAX's errors name the function and its arguments
    def arrays(*args: PyTree) -> Leaves:
        return static.arrays(function(*args))

    def evaluate(*args: PyTree) -> PyTree:
        if not is_tracing():
            return function(*args)
        found = arrays(*args)  # sets the static part
        return static.whole(found)

    return evaluate


def is_tracing() -> bool:
    """Whether operations are recorded: under ``jax.jit``, ``jax.lax.scan``, ..."""
    return isinstance(jax.lax.add(0.0, 0.0), jax.core.Tracer)
