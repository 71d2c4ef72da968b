"""Ascent directions: functions of the gradient and the parameters, or Optax transformations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._estimators import Climb
from gradreg_optax._numerics import cast, conjugate, global_norm, widen
from gradreg_optax._types import Ascent, AscentFn, PyTree
from gradreg_optax._validation import check_inexact, check_like, is_inexact


def ascent_transformation(caller: str, ascent: Ascent | None) -> optax.GradientTransformation:
    """``ascent`` as an Optax transformation of the gradient; by default the gradient itself.

    JAX's gradient of a real loss with respect to complex parameters is the conjugate of the
    direction of steepest ascent. It is conjugated here, in float32 or wider, before ``ascent``
    receives it. The state is in float32 or wider as well, and keeps its dtypes.
    """
    if ascent is None:
        return optax.GradientTransformation(
            lambda params: (), lambda g, state, _: (_steepest(g), state)
        )
    if isinstance(ascent, optax.GradientTransformation):
        init, update = ascent.init, ascent.update
    elif callable(ascent):
        init, update = lambda params: (), lambda g, state, params: (ascent(g, params), state)
    else:
        raise TypeError(
            f"{caller}: ascent must be a function (gradient, params) -> direction, got"
            f" {type(ascent).__name__}. For a mask write ascent=masked(mask); for an ascent with"
            " state pass an Optax transformation."
        )

    def climb(gradient: PyTree, state: optax.OptState, params: PyTree) -> tuple[PyTree, Any]:
        direction, after = update(_steepest(gradient), state, params)
        check_like(caller, "the direction returned by ascent", direction, params)
        return direction, jax.tree.map(_in_dtype_of, after, state)

    return optax.GradientTransformation(lambda p: init(jax.tree.map(widen, p)), climb)


def stateless(caller: str, tx: optax.GradientTransformation, params: PyTree) -> Climb:
    """The direction of an ascent that keeps no state, as a function of the gradient."""
    state = tx.init(params)
    if jax.tree.leaves(state):
        raise TypeError(
            f"{caller}: ascent must not keep state between steps, got an Optax transformation with"
            " state. Use the transformation of the same family, fd_gradreg(..., ascent=ascent)."
        )
    return lambda gradient: tx.update(gradient, state, params)


def _steepest(gradient: PyTree) -> PyTree:
    return jax.tree.map(conjugate, gradient)


def _in_dtype_of(new: Any, old: Any) -> Any:
    return cast(new, old) if is_inexact(old) else new


def normalized(gradient: PyTree, params: PyTree) -> PyTree:
    r"""The unit direction :math:`g / \|g\|` of SAM and of penalties on the plain norm; zero where
    the gradient is zero.

    Along it, :math:`\gamma H g/\|g\|` is the gradient of :math:`\gamma\|\nabla L\|`. The norm is
    over all leaves and taken in float32 or wider. Below 1e-19 in float32 (1e-154 in float64), where
    squares underflow, it counts as that much, so that the direction shrinks to zero with the
    gradient; beyond 1e19 (1e154), where they overflow, the direction is zero. Costs no gradient
    evaluation.

    Args:
      gradient: the direction of steepest ascent.
      params: the parameters, not used.

    Returns:
      A tree like ``gradient``, of norm one or, about zero, less.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import normalized
      >>> print(normalized(jnp.array([3.0, 4.0]), None))
      [0.6 0.8]

    References:
      Foret et al., *Sharpness-Aware Minimization*, ICLR 2021. Zhao et al., *Penalizing Gradient
      Norm*, ICML 2022.
    """
    del params
    check_inexact("normalized", "the gradient", gradient)
    norm = global_norm(gradient)
    norm = jnp.maximum(norm, float(np.finfo(norm.dtype).tiny) ** 0.5)

    def unit(g: Any) -> jax.Array:
        wide = widen(g)
        return cast(wide.astype(np.promote_types(wide.dtype, norm.dtype)) / norm, g)

    return jax.tree.map(unit, gradient)


def adaptive(gradient: PyTree, params: PyTree) -> PyTree:
    r"""ASAM's direction :math:`\theta^2 g \,/\, \| |\theta|\, g \|`, elementwise; zero where
    :math:`|\theta| g` is zero.

    It does not change when a layer's weights are scaled up and the next layer's down. Costs no
    gradient evaluation.

    Args:
      gradient: the direction of steepest ascent.
      params: the parameters :math:`\theta`.

    Returns:
      A tree like ``gradient``.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import adaptive
      >>> print(adaptive(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])))
      [1. 0.]

    References:
      Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization*, ICML 2021.
    """
    check_inexact("adaptive", "the parameters", params)
    check_like("adaptive", "the gradient", gradient, params)
    wide = jax.tree.map(widen, gradient)
    size = jax.tree.map(lambda p, g: jnp.abs(widen(p)).astype(g.real.dtype), params, wide)
    unit = normalized(jax.tree.map(jnp.multiply, size, wide), params)
    return jax.tree.map(lambda s, u, g: cast(s * u, g), size, unit, gradient)


def masked(mask: PyTree) -> AscentFn:
    r"""An ascent direction that climbs in some of the parameters only.

    With :math:`M` the projection on the masked coordinates, :math:`H M g` is the gradient of
    :math:`\tfrac12\|\nabla_M L\|^2`: only those coordinates are perturbed, and the correction
    reaches *all* of them. To leave the others untouched as well, freeze them behind the
    regularizer, with ``optax.partition`` or ``optax.masked``. Costs no gradient evaluation.

    Args:
      mask: a tree of bools (Python's, or arrays for single coordinates) that is a prefix of the
        parameters, or a function that makes one from the parameters.

    Returns:
      A function ``(gradient, params) -> direction``.

    Raises:
      TypeError: a leaf of the mask is not a bool.
      ValueError: the mask is not a prefix of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import masked
      >>> ones = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
      >>> masked({"kernel": True, "bias": False})(ones, ones)["bias"]
      Array([0., 0.], dtype=float32)
    """

    def direction(gradient: PyTree, params: PyTree) -> PyTree:
        # A module of bools may be callable and is yet a tree, not a function of the parameters.
        tree = mask(params) if callable(mask) and jax.tree_util.all_leaves([mask]) else mask
        for leaf in jax.tree.leaves(tree):
            if not (isinstance(leaf, bool) or getattr(leaf, "dtype", None) == jnp.bool_):
                raise TypeError(f"masked: the mask must hold bools, got {leaf!r}.")
        try:
            return jax.tree.map(
                lambda keep, part: jax.tree.map(
                    lambda g: jnp.where(keep, g, jnp.zeros_like(g)), part
                ),
                tree,
                gradient,
            )
        except ValueError as error:
            raise ValueError(
                "masked: the mask must be a tree of bools that is a prefix of the parameters:"
                f" {error}"
            ) from error

    return direction
