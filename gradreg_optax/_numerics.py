"""Mixed precision: sums and differences in float32 or wider, results in the original dtypes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ASCENT_GROUPS = "gradreg_optax.ascent_groups"  # the axis of the groups in the train step


def default_float() -> Any:
    """Return float32, or float64 if x64 is enabled."""
    return jax.dtypes.canonicalize_dtype(float)


def wide(dtype: Any) -> Any:
    """Return a real or complex dtype, or float32 if it is narrower."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widen(x: Any) -> jax.Array:
    """Cast ``x`` to float32 or wider (complex64 or wider)."""
    array = jnp.asarray(x)
    return array.astype(wide(array.dtype))


def cast(x: jax.Array, like: Any) -> jax.Array:
    """Cast ``x`` to the dtype of ``like``, also if that is weak or older than a switch to x64."""
    return x.astype(jax.typeof(like).dtype)


def conjugate(x: Any) -> jax.Array:
    """Return the complex conjugate of ``x``, in float32 or wider."""
    array = widen(x)
    return jnp.conj(array) if jnp.iscomplexobj(array) else array


def within(factor: jax.Array, dtype: Any) -> jax.Array:
    """Cast a scalar to ``dtype``, clipped to its range, so that no infinity arises."""
    if jnp.finfo(factor.dtype).bits > jnp.finfo(dtype).bits:
        largest = float(jnp.finfo(dtype).max)
        factor = jnp.clip(factor, -largest, largest)
    return factor.astype(dtype)


def scale(factor: jax.Array, x: jax.Array) -> jax.Array:
    """Return ``factor * x`` in the dtype of ``x``."""
    return jnp.multiply(within(factor, x.real.dtype), x)


def global_norm(tree: Any) -> jax.Array:
    """Return the Euclidean norm over all leaves, in float32 or wider, with derivative 0 at 0."""
    leaves = [widen(x) for x in jax.tree.leaves(tree)]
    dtype = np.result_type(np.float32, *(x.real.dtype for x in leaves))
    squares = (jnp.sum(x.real**2 + x.imag**2).astype(dtype) for x in leaves)
    square = sum(squares, start=jnp.zeros([], dtype))
    return jnp.where(square != 0, jnp.sqrt(jnp.where(square != 0, square, 1)), 0)


def ratio(length: jax.Array, by: jax.Array) -> jax.Array:
    """Return ``length / by``, or zero if that is not finite."""
    defined = jnp.isfinite(length) & jnp.isfinite(by) & (by > 0)
    quotient = jnp.where(defined, length, 0) / jnp.where(defined, by, 1)
    return jnp.where(jnp.isfinite(quotient), quotient, 0)


def owned(tree: Any) -> Any:
    """Copy all arrays, without weak types, so that each can be donated.

    A donated buffer must occur only once, and must not belong to the caller. A weak type would
    cause a second compilation.
    """

    def copied(x: Any) -> Any:
        is_array = hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)
        return jnp.array(x, dtype=jax.typeof(x).dtype, copy=True) if is_array else x

    return jax.tree.map(copied, tree)


def keep_finite(new: Any, old: Any, *also: Any) -> Any:
    """Return ``new``, or ``old`` if a number in ``new`` or ``also`` has become infinite or NaN.

    Numbers that are not finite in ``old``, such as a minimum before the first value, may stay so.
    Under ``ascent_groups`` the decision is the same in all groups, so that their counters agree.
    """
    if not jax.tree.leaves(new):
        return new
    pairs = zip(map(jnp.asarray, jax.tree.leaves(new)), jax.tree.leaves(old), strict=True)
    sound = [
        jnp.all(jnp.isfinite(a) | jnp.isnan(b) | ~(jnp.isfinite(b) | jnp.isnan(a)))
        for a, b in ((widen(a), widen(b)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.inexact))
    ]
    sound += [jnp.all(jnp.isfinite(widen(x))) for x in jax.tree.leaves(also)]
    every = _in_every_group(functools.reduce(jnp.logical_and, sound, jnp.asarray(True)))
    return jax.tree.map(lambda a, b: jnp.where(every, a, b), new, old)


def _in_every_group(holds: jax.Array) -> jax.Array:
    try:
        return jax.lax.pmin(holds.astype(jnp.int32), ASCENT_GROUPS) > 0
    except NameError:  # not under ascent_groups
        return holds
