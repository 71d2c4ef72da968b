r"""The mathematics: the gradient of a penalty on the gradient, by difference and by product.

Gradient regularization penalises the squared norm of the gradient :math:`g = \nabla L(\theta)`,

.. math::

    \tilde L(\theta) = L(\theta) + \tfrac{\gamma}{2} \|\nabla L(\theta)\|^2, \qquad
    \nabla \tilde L(\theta) = g + \gamma H g, \qquad H = \nabla^2 L(\theta).

More generally, along a direction :math:`d = M g` with a fixed linear map :math:`M` (a mask, a
preconditioner), :math:`H d` is the gradient of :math:`\tfrac12 g^\top M g`. Everything here
estimates :math:`H d`; gradients and trees have the structure of the parameters.

Source: Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax._checks import check_like
from gradreg_optax._typing import AscentFn, GradFn, Mode, PyTree, Scheme


def difference_product(
    grad_fn: GradFn,
    params: PyTree,
    gradient: PyTree,
    direction: PyTree,
    epsilon: jax.Array,
    scheme: Scheme,
) -> PyTree:
    r"""Estimates :math:`H d` by a finite difference of gradients.

    ==========  ======================================================================  ===============  ===========
    scheme      estimate                                                                further calls    error
    ==========  ======================================================================  ===============  ===========
    forward     :math:`(\nabla L(\theta + \epsilon d) - g) / \epsilon`                  1                O(ε)
    backward    :math:`(g - \nabla L(\theta - \epsilon d)) / \epsilon`                  1                O(ε)
    central     :math:`(\nabla L(\theta+\epsilon d) - \nabla L(\theta-\epsilon d)) / 2\epsilon`  2       O(ε²)
    ==========  ======================================================================  ===============  ===========

    The difference is formed in float32 or wider. At ``epsilon == 0`` (a warm-up schedule that
    starts there) nothing is climbed, and the estimate is zero.

    Args:
      grad_fn: the gradient of the loss as a function of the parameters.
      params: the parameters :math:`\theta`.
      gradient: :math:`g`, the gradient at ``params``.
      direction: :math:`d`, see :func:`ascent_direction`.
      epsilon: the ascent step, a scalar. A negative one turns forward into backward.
      scheme: "forward", "backward" or "central".

    Returns:
      The estimate, leaf by leaf in float32 or wider.
    """
    if scheme == "forward":
        ahead, behind, width = grad_fn(shift(params, direction, epsilon)), gradient, epsilon
    elif scheme == "backward":
        ahead, behind, width = gradient, grad_fn(shift(params, direction, -epsilon)), epsilon
    else:
        ahead, behind, width = (
            grad_fn(shift(params, direction, epsilon)),
            grad_fn(shift(params, direction, -epsilon)),
            2 * epsilon,
        )
    climbs = jnp.abs(width) >= np.finfo(width.dtype).tiny  # below it 1 / width overflows
    inverse = jnp.where(climbs, 1 / jnp.where(climbs, width, 1), 0)
    return jax.tree.map(lambda a, b: _scale(inverse, _widen(a) - _widen(b)), ahead, behind)


def shift(params: PyTree, direction: PyTree, epsilon: jax.Array) -> PyTree:
    r"""Returns :math:`\theta + \epsilon d`, formed in float32 or wider and cast to the dtypes of
    the parameters.
    """
    return jax.tree.map(
        lambda p, d: _cast(_widen(p) + _scale(epsilon, _widen(d)), p), params, direction
    )


def exact_product(
    function: str, grad_fn: GradFn, params: PyTree, mode: Mode
) -> tuple[PyTree, Any, GradFn]:
    r"""Evaluates the gradient once, and returns with it the function :math:`d \mapsto H d`.

    ``forward_over_reverse`` linearizes the gradient; ``reverse_over_reverse`` pulls back through
    it, which is the double backpropagation of :math:`\tfrac12\|\nabla L\|^2` to the letter and
    needs no forward-mode rules. Both cost about one further gradient evaluation.

    Args:
      function: who asks, for the error.
      grad_fn: returns ``(gradient, aux)`` at the parameters.
      params: the parameters.
      mode: the order of differentiation.

    Returns:
      ``(gradient, aux, product)``.

    Raises:
      TypeError: JAX can take the gradient but not its derivative.
    """
    with _second_derivative(function, grad_fn, params, mode):
        if mode == "forward_over_reverse":
            gradient, transform, aux = jax.linearize(grad_fn, params, has_aux=True)
        else:
            gradient, pullback, aux = jax.vjp(grad_fn, params, has_aux=True)

            def transform(cotangent: PyTree) -> PyTree:
                return pullback(cotangent)[0]

    def product(direction: PyTree) -> PyTree:
        with _second_derivative(function, grad_fn, params, mode):
            return transform(jax.tree.map(_cast, direction, params))

    return gradient, aux, product


def add_penalty(updates: PyTree, gamma: jax.Array, product: PyTree) -> PyTree:
    r"""Returns :math:`g + \gamma H d`, formed in float32 or wider and cast to the dtypes of
    ``updates``.
    """
    return jax.tree.map(
        lambda u, p: _cast(_widen(u) + _scale(gamma, _widen(p)), u), updates, product
    )


def ascent_direction(
    function: str, gradient: PyTree, params: PyTree, ascent: AscentFn | None
) -> PyTree:
    """The direction to climb along: the direction of steepest ascent, or what ``ascent`` makes of
    it.

    JAX's gradient of a real loss with respect to complex parameters is the conjugate of the
    direction of steepest ascent, so the conjugate is taken here, before ``ascent`` sees it.
    """
    steepest = jax.tree.map(lambda g: jnp.conj(_widen(g)), gradient)
    if ascent is None:
        return steepest
    direction = ascent(steepest, params)
    check_like(function, "the direction returned by ascent", direction, params)
    return direction


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
    norm = global_norm(gradient)
    norm = jnp.maximum(norm, np.finfo(norm.dtype).tiny ** 0.5)
    return jax.tree.map(lambda g: _cast(_widen(g) / norm, g), gradient)


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
    size = jax.tree.map(lambda p: jnp.abs(_widen(p)), params)
    unit = normalized(jax.tree.map(lambda s, g: s * _widen(g), size, gradient), params)
    return jax.tree.map(lambda s, u, g: _cast(s * u, g), size, unit, gradient)


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
      TypeError: a leaf of the mask is no bool.
      ValueError: the mask is no prefix of the parameters.

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


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, in float32 or wider; its derivative at zero is zero."""
    leaves = [_widen(x) for x in jax.tree.leaves(tree)]
    square = sum((jnp.sum(x.real**2 + x.imag**2) for x in leaves), start=jnp.zeros([], jnp.float32))
    return jnp.where(square != 0, jnp.sqrt(jnp.where(square != 0, square, 1)), 0)


@contextlib.contextmanager
def _second_derivative(
    function: str, grad_fn: GradFn, params: PyTree, mode: Mode
) -> Iterator[None]:
    """Says in one sentence that the loss has no second derivative, if that is what went wrong."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        grad_fn(params)  # a mistake in the loss itself shows here, as it is
        raise TypeError(
            f"{function}: the gradient of this loss cannot be differentiated"
            f" {mode.replace('_', ' ')}: try the other mode, or use fd_gradreg or"
            f" fd_value_and_grad, which need first derivatives only ({error})."
        ) from error


def _widen(x: Any) -> jax.Array:
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _scale(factor: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.multiply(factor.astype(x.real.dtype), x)


def _cast(x: jax.Array, like: Any) -> jax.Array:
    return x.astype(jnp.result_type(like))
