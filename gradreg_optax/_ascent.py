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
    """Convert ``ascent`` to an Optax transformation of the gradient; None is the identity.

    For complex parameters, JAX's gradient is the conjugate of the direction of steepest ascent. It
    is conjugated, in float32 or wider, before it is passed to ``ascent``. The state is in float32
    or wider too, and keeps its dtypes.
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
            f" {type(ascent).__name__}. Pass masked(mask) for a mask, an Optax transformation for"
            " an ascent with state."
        )

    def climb(gradient: PyTree, state: optax.OptState, params: PyTree) -> tuple[PyTree, Any]:
        direction, after = update(_steepest(gradient), state, params)
        check_like(caller, "the direction returned by ascent", direction, params)
        return direction, jax.tree.map(_in_dtype_of, after, state)

    return optax.GradientTransformation(lambda p: init(jax.tree.map(widen, p)), climb)


def stateless(caller: str, tx: optax.GradientTransformation, params: PyTree) -> Climb:
    """Return the direction as a function of the gradient, for an ascent without state."""
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
    r"""The unit ascent direction :math:`g / \|g\|` of SAM; zero for a zero gradient.

    Along this direction, :math:`\gamma H g/\|g\|` is the gradient of :math:`\gamma\|\nabla L\|`.
    The norm is over all leaves, in float32 or wider. A norm below 1e-19 in float32 (1e-154 in
    float64), where squares underflow, is replaced by this bound, so the direction vanishes with the
    gradient. Above 1e19 (1e154), where squares overflow, the direction is zero.

    Cost:
      No gradient evaluation.

    Args:
      gradient: the direction of steepest ascent.
      params: the parameters, not used.

    Returns:
      A tree like ``gradient``, of norm 1, or less close to a zero gradient.

    Raises:
      TypeError: a gradient that is not of real or complex numbers.

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
    r"""ASAM's ascent direction :math:`\theta^2 g \,/\, \| |\theta|\, g \|`, elementwise.

    It is invariant to a rescaling of layers: multiply the weights of a layer by a constant, divide
    those of the next one by it, and the perturbation of the function is the same. Where
    :math:`|\theta| g` is zero, the direction is zero.

    Cost:
      No gradient evaluation.

    Args:
      gradient: the direction of steepest ascent.
      params: the parameters :math:`\theta`.

    Returns:
      A tree like ``gradient``.

    Raises:
      ValueError: gradient and parameters of different structure or shapes.
      TypeError: a gradient or parameters that are not real or complex numbers.

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
    r"""An ascent direction that perturbs some of the parameters only.

    Let :math:`M` be the projection on the selected coordinates. Then :math:`H M g` is the gradient
    of :math:`\tfrac12\|\nabla_M L\|^2`: only these coordinates are perturbed, but the correction
    changes the gradient of *all* parameters. To leave the other parameters unchanged too, freeze
    them behind the regularizer, with ``optax.partition`` or ``optax.masked``.

    Cost:
      No gradient evaluation.

    Args:
      mask: a tree of bools that is a prefix of the parameters (arrays of bools select single
        coordinates), or a function ``params -> mask``.

    Returns:
      A function ``(gradient, params) -> direction``.

    Raises:
      TypeError: at a call, a leaf of the mask that is not a bool.
      ValueError: at a call, a mask that is not a prefix of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import masked
      >>> ones = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
      >>> masked({"kernel": True, "bias": False})(ones, ones)["bias"]
      Array([0., 0.], dtype=float32)
    """

    def direction(gradient: PyTree, params: PyTree) -> PyTree:
        # A callable that is a pytree (a module of bools) is a mask, not a function of params.
        tree = mask(params) if callable(mask) and jax.tree_util.all_leaves([mask]) else mask
        for leaf in jax.tree.leaves(tree):
            if not (isinstance(leaf, bool) or getattr(leaf, "dtype", None) == jnp.bool_):
                raise TypeError(
                    f"masked: the mask must hold bools, got {leaf!r}. Use True for the parameters"
                    " to perturb, and False for the others."
                )
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
                f"masked: the mask must be bools in a prefix of the parameters, got: {error}"
            ) from error

    return direction
