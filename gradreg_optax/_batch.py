"""Parts of a batch: a pytree whose leaves share their leading axis."""

import math

import jax
import jax.numpy as jnp

from gradreg_optax._typing import PyTree


def batch_size(function: str, option: str, batch: PyTree) -> int:
    """The common length of the leading axes."""
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else -1 for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            f"{function}: {option} needs a batch whose leaves share their leading axis, got shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]}: pass what is not split as a further argument."
        )
    return sizes.pop()


def split_batch(function: str, option: str, batch: PyTree, count: int) -> PyTree:
    """The batch as ``count`` equal parts along a new leading axis."""
    size = batch_size(function, option, batch)
    if count < 1 or size % count:
        raise ValueError(f"{function}: {option} must be at least 1 and divide the batch size {size}, got {count}.")
    return jax.tree.map(lambda x: jnp.reshape(x, (count, size // count, *jnp.shape(x)[1:])), batch)


def first_fraction(function: str, option: str, batch: PyTree, fraction: float) -> PyTree:
    """The first ``fraction`` of the batch, rounded up to whole samples."""
    size = batch_size(function, option, batch)
    kept = max(1, math.ceil(fraction * size - 1e-9))  # 0.7 * 10 may be 7.000000000000001
    return jax.tree.map(lambda x: x[:kept], batch)
