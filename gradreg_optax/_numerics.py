"""Numbers in their dtypes: sums and differences are formed wide, results are as they were."""

from typing import Any

import jax
import jax.numpy as jnp


def default_float() -> Any:
    """float32, or float64 where x64 is switched on."""
    return jax.dtypes.canonicalize_dtype(float)


def wide(dtype: Any) -> Any:
    """The dtype of a real or complex number, or float32 where that is narrower."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widen(x: Any) -> jax.Array:
    """``x`` in float32 or wider (complex64 or wider)."""
    array = jnp.asarray(x)
    return array.astype(wide(array.dtype))


def cast(x: jax.Array, like: Any) -> jax.Array:
    """``x`` in the dtype of ``like``, which is its own even if it is weak and made before x64."""
    return x.astype(jax.typeof(like).dtype)


def conjugate(x: Any) -> jax.Array:
    """The complex conjugate of ``x``, widened."""
    array = widen(x)
    return jnp.conj(array) if jnp.iscomplexobj(array) else array


def within(factor: jax.Array, dtype: Any) -> jax.Array:
    """A scalar in ``dtype``: what lies beyond its range becomes its largest number, no infinity."""
    if jnp.finfo(factor.dtype).bits > jnp.finfo(dtype).bits:
        largest = float(jnp.finfo(dtype).max)
        factor = jnp.clip(factor, -largest, largest)
    return factor.astype(dtype)


def scale(factor: jax.Array, x: jax.Array) -> jax.Array:
    """``factor * x`` in the dtype of ``x``."""
    return jnp.multiply(within(factor, x.real.dtype), x)
