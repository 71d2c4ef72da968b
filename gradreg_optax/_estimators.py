r"""Estimates of the product :math:`H d` of the Hessian with an ascent direction.

Gradient regularization penalises the squared norm of the gradient :math:`g = \nabla L(\theta)`,

.. math::

    \tilde L(\theta) = L(\theta) + \tfrac{\gamma}{2} \|\nabla L(\theta)\|^2, \qquad
    \nabla \tilde L(\theta) = g + \gamma H g, \qquad H = \nabla^2 L(\theta).

More generally, for a direction :math:`d = M g` with a fixed linear map :math:`M` (a mask, a
preconditioner), :math:`H d` is the gradient of :math:`\tfrac12 g^\top M g`. Gradients and
directions have the structure of the parameters.

Source: Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._numerics import cast, scale, widen, within
from gradreg_optax._types import GradFn, Mode, PyTree, Scheme

Climb: TypeAlias = Callable[[PyTree], tuple[PyTree, optax.OptState]]  # gradient -> direction, state


class Point(NamedTuple):
    """Where, and in which direction, to multiply by the Hessian.

    Attributes:
      grad_fn: the gradient function, which also returns aux.
      params: the parameters.
      climb: a function from the gradient to the direction and the new state of the ascent.
      gradient: the gradient at the parameters, or None if it is not known.
    """

    grad_fn: GradFn
    params: PyTree
    climb: Climb
    gradient: PyTree = None


class Estimate(NamedTuple):
    """An estimate of :math:`H d`, with the gradient that it was computed from.

    Attributes:
      gradient: the gradient at the parameters.
      aux: aux of the gradient function, or None if the gradient was given.
      product: the estimate of H d, in float32 or wider.
      ascent: the new state of the ascent direction.
    """

    gradient: PyTree
    aux: Any
    product: PyTree
    ascent: optax.OptState


def difference(at: Point, *, epsilon: jax.Array, scheme: Scheme) -> Estimate:
    r"""Estimate :math:`H d` by a finite difference of gradients.

    ========  =================================================================  ========  =====
    scheme    estimate                                                           gradients error
    ========  =================================================================  ========  =====
    forward   :math:`(\nabla L(\theta + \epsilon d) - g) / \epsilon`             1         O(ε)
    backward  :math:`(g - \nabla L(\theta - \epsilon d)) / \epsilon`             1         O(ε)
    central   half the difference of the two :math:`\nabla L / \epsilon`         2         O(ε²)
    ========  =================================================================  ========  =====

    The table counts gradients in addition to :math:`g`, which is evaluated if it is not given. The
    difference is computed in float32 or wider. For ``epsilon == 0`` (a warm-up schedule) the
    estimate is zero. For a negative ``epsilon``, forward and backward change places.
    """
    gradient, aux = at.grad_fn(at.params) if at.gradient is None else (at.gradient, None)
    direction, ascent = at.climb(gradient)
    ahead = behind = gradient
    if scheme != "backward":
        ahead = at.grad_fn(shift(at.params, direction, epsilon))[0]
    if scheme != "forward":
        behind = at.grad_fn(shift(at.params, direction, -epsilon))[0]
    inverse = functools.cache(functools.partial(_inverse, epsilon, scheme == "central"))

    def quotient(p: Any, a: Any, b: Any) -> jax.Array:
        dtype = widen(p).dtype
        change = widen(a).astype(dtype) - widen(b).astype(dtype)
        return scale(inverse(change.real.dtype), change)

    return Estimate(gradient, aux, jax.tree.map(quotient, at.params, ahead, behind), ascent)


def product(caller: str, at: Point, *, mode: Mode) -> Estimate:
    r"""Compute :math:`H d` exactly, together with the gradient.

    ``forward_over_reverse`` linearizes the gradient. ``reverse_over_reverse`` is literal double
    backpropagation, which needs no forward-mode rules. Both cost about two gradients; under one
    ``jit`` the primal pass is shared with the gradient. A loss without a second derivative is a
    TypeError.
    """
    forward = mode == "forward_over_reverse"
    transform: Any = jax.linearize if forward else jax.vjp
    explained = functools.partial(_second_derivative, caller, at, mode)
    with explained():
        evaluated, multiply, aux = transform(at.grad_fn, at.params, has_aux=True)
    gradient = evaluated if at.gradient is None else at.gradient
    direction, ascent = at.climb(gradient)
    with explained():
        image = multiply(jax.tree.map(cast, direction, at.params))
    return Estimate(gradient, aux, image if forward else image[0], ascent)


def shift(params: PyTree, direction: PyTree, epsilon: jax.Array) -> PyTree:
    r"""Return :math:`\theta + \epsilon d`, computed in float32 or wider, in the params' dtypes."""

    def moved(p: Any, d: Any) -> jax.Array:
        start = widen(p)
        return cast(start + scale(epsilon, widen(d).astype(start.dtype)), p)

    return jax.tree.map(moved, params, direction)


def add_penalty(updates: PyTree, gamma: jax.Array, product: PyTree) -> PyTree:
    r"""Return :math:`g + \gamma H d`, computed in float32 or wider, in the dtypes of ``updates``.

    For gamma = 0 the result is g, even if the gradient at the perturbed parameters overflowed.
    """
    something = gamma != 0

    def add(u: Any, p: Any) -> jax.Array:
        gradient = widen(u)
        image = widen(p).astype(gradient.dtype)
        image = jnp.where(something | jnp.isfinite(image), image, 0)
        return cast(gradient + scale(gamma, image), u)

    return jax.tree.map(add, updates, product)


@contextlib.contextmanager
def _second_derivative(caller: str, at: Point, mode: Mode) -> Iterator[None]:
    """Explain the error of a loss without a second derivative."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        at.grad_fn(at.params)  # an error of the loss itself is raised here, unchanged
        raise TypeError(
            f"{caller}: the loss must have a second derivative, {mode.replace('_', ' ')}, got an"
            f" error ({error}). Try the other mode, or use fd_gradreg or fd_value_and_grad."
        ) from error


def _inverse(epsilon: jax.Array, halved: bool, dtype: Any) -> jax.Array:
    """Return ``1 / epsilon``, or half of it, and 0 for an ``epsilon`` of 0."""
    epsilon = within(epsilon, dtype)
    moves = jnp.abs(epsilon) >= np.finfo(dtype).tiny  # for a smaller one, 1 / epsilon overflows
    return jnp.where(moves, (0.5 if halved else 1) / jnp.where(moves, epsilon, 1), 0)
