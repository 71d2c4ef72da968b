"""What a hand-written gradient owes to those who differentiate more than the value of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradreg_optax._types import PyTree


def scaled(factor: Any, gradient: list[jax.Array]) -> list[jax.Array]:
    """The gradient of a value times the cotangent of that value."""
    if isinstance(factor, SymbolicZero):
        return [jnp.zeros_like(g) for g in gradient]
    return [factor.astype(g.dtype) * g for g in gradient]


def with_aux_cotangent(
    cotangents: list[jax.Array],
    aux_of: Callable[[list[Any]], PyTree],
    numbers: list[Any],
    cotangent: PyTree,
) -> list[jax.Array]:
    """Adds what aux contributes; it is evaluated only where somebody differentiates aux."""
    given = jax.tree.leaves(cotangent, is_leaf=lambda c: isinstance(c, SymbolicZero))
    asked = [i for i, c in enumerate(given) if not isinstance(c, SymbolicZero)]
    if not asked:
        return cotangents

    def asked_of(numbers: list[Any]) -> list[jax.Array]:
        leaves = jax.tree.leaves(aux_of(numbers))
        return [leaves[i] for i in asked]

    (parts,) = jax.vjp(asked_of, numbers)[1]([given[i] for i in asked])
    return [c + p.astype(c.dtype) for c, p in zip(cotangents, parts, strict=True)]
