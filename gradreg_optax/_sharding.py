"""Mesh axes over which values vary (``jax.shard_map``) or are sharded."""

import math
from collections.abc import Callable
from typing import Any

import jax

from gradreg_optax._types import PyTree


def axes_of(tree: PyTree) -> frozenset[str]:
    """Return the axes of ``jax.shard_map`` over which some leaf varies; none outside of it."""
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def axes_of_value(fun: Callable[[PyTree], Any], argument: PyTree) -> frozenset[str]:
    """Return the axes over which the first result of a function varies, after its reductions."""
    if not jax.sharding.get_abstract_mesh().manual_axes:  # not in jax.shard_map
        return frozenset()
    return _of_type(jax.make_jaxpr(fun)(argument).out_avals[0])


def varying(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Cast leaves to vary over ``axes``. The transpose of this cast sums over the axes."""
    lax: Any = jax.lax

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _axes(leaf)))
        if not missing:
            return leaf
        if hasattr(lax, "pcast"):
            return lax.pcast(leaf, missing, to="varying")
        return lax.pvary(leaf, missing)  # the name before jax 0.9

    return jax.tree.map(cast, tree)


def leading_devices(leaf: Any) -> int:
    """Return the number of devices that an explicit sharding splits the leading axis over."""
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None)
    spec = getattr(sharding, "spec", ())
    if not spec or spec[0] is None:
        return 1
    names = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _axes(leaf: Any) -> frozenset[str]:
    return _of_type(jax.typeof(leaf)) if isinstance(leaf, jax.Array) else frozenset()


def _of_type(aval: Any) -> frozenset[str]:
    manual = getattr(aval, "manual_axis_type", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying  # vma before jax 0.10
    return frozenset(axes or ())
