r"""The mathematics: the gradient of a penalty on the gradient, by difference and by product.

Gradient regularization penalises the squared norm of the gradient :math:`g = \nabla L(\theta)`,

.. math::

    \tilde L(\theta) = L(\theta) + \tfrac{\gamma}{2} \|\nabla L(\theta)\|^2, \qquad
    \nabla \tilde L(\theta) = g + \gamma H g, \qquad H = \nabla^2 L(\theta).

More generally, along a direction :math:`d = M g` with a fixed linear map :math:`M` (a mask, a
preconditioner), :math:`H d` is the gradient of :math:`\tfrac12 g^\top M g`. An estimator evaluates
:math:`H d`; gradients and trees have the structure of the parameters.

Source: Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._numerics import cast, conjugate, scale, widen, within
from gradreg_optax._types import Ascent, AscentFn, AtStep, GradFn, Mode, PyTree, Scheme
from gradreg_optax._validation import check_choice, check_inexact, check_like, is_inexact


class Point(NamedTuple):
    """Where H d is estimated.

    Attributes:
      grad_fn: ``params -> (gradient, aux)``.
      params: the parameters.
      gradient: the gradient at the parameters, or None, to evaluate it.
      step: the step that schedules go by, or None.
      ascent: the state of the ascent direction.
    """

    grad_fn: GradFn
    params: PyTree
    gradient: PyTree = None
    step: Any = None
    ascent: optax.OptState = ()


class Estimate(NamedTuple):
    """What an estimator makes of a point.

    Attributes:
      gradient: the gradient at the parameters.
      aux: what the loss returned beside it, or None where the gradient was given.
      product: the estimate of H d, leaf by leaf in float32 or wider.
      ascent: the state of the ascent direction afterwards.
    """

    gradient: PyTree
    aux: Any
    product: PyTree
    ascent: optax.OptState


class Estimator(NamedTuple):
    """A pair of functions: ``init(params) -> ascent state``, ``estimate(point) -> Estimate``."""

    init: Callable[[PyTree], optax.OptState]
    estimate: Callable[[Point], Estimate]


# The direction to climb along: (point, gradient) -> (direction, state)
Direction: TypeAlias = Callable[[Point, PyTree], tuple[PyTree, optax.OptState]]


def difference(caller: str, epsilon: AtStep, scheme: Scheme, ascent: Ascent | None) -> Estimator:
    r"""Estimates :math:`H d` by a finite difference of gradients.

    ========  =================================================================  ========  =====
    scheme    estimate                                                           gradients error
    ========  =================================================================  ========  =====
    forward   :math:`(\nabla L(\theta + \epsilon d) - g) / \epsilon`             1         O(ε)
    backward  :math:`(g - \nabla L(\theta - \epsilon d)) / \epsilon`             1         O(ε)
    central   half the difference of the two :math:`\nabla L / \epsilon`         2         O(ε²)
    ========  =================================================================  ========  =====

    The gradients are those beyond :math:`g`; the difference is formed in float32 or wider. At
    ``epsilon == 0`` (a warm-up schedule that starts there) nothing is climbed, and the estimate is
    zero. A negative ``epsilon`` turns forward into backward.
    """
    check_choice(caller, "scheme", scheme, Scheme)
    init, direction_of = ascent_direction(caller, ascent)

    def estimate(point: Point) -> Estimate:
        grad_fn, params, gradient, aux = point.grad_fn, point.params, point.gradient, None
        if gradient is None:
            gradient, aux = grad_fn(params)
        (direction, state), width = direction_of(point, gradient), epsilon(point.step)
        ahead = behind = gradient
        if scheme != "backward":
            ahead = grad_fn(shift(params, direction, width))[0]
        if scheme != "forward":
            behind = grad_fn(shift(params, direction, -width))[0]
        inverse = functools.cache(functools.partial(_inverse, width, scheme == "central"))

        def quotient(p: Any, a: Any, b: Any) -> jax.Array:
            dtype = widen(p).dtype
            change = widen(a).astype(dtype) - widen(b).astype(dtype)
            return scale(inverse(change.real.dtype), change)

        return Estimate(gradient, aux, jax.tree.map(quotient, params, ahead, behind), state)

    return Estimator(init, estimate)


def product(caller: str, mode: Mode, ascent: Ascent | None) -> Estimator:
    r"""Evaluates :math:`H d` exactly, and the gradient with it.

    ``forward_over_reverse`` linearizes the gradient; ``reverse_over_reverse`` pulls back through
    it, which is the double backpropagation of :math:`\tfrac12\|\nabla L\|^2` to the letter and
    needs no forward-mode rules. Both cost one gradient, whose primal pass is shared with a gradient
    that is evaluated anyway under one ``jit``, and about one more. A loss without a second
    derivative is a TypeError.
    """
    check_choice(caller, "mode", mode, Mode)
    init, direction_of = ascent_direction(caller, ascent)

    def estimate(point: Point) -> Estimate:
        params, forward = point.params, mode == "forward_over_reverse"
        transform: Any = jax.linearize if forward else jax.vjp
        with _second_derivative(caller, point, mode):
            evaluated, multiply, aux = transform(point.grad_fn, params, has_aux=True)
        gradient = evaluated if point.gradient is None else point.gradient
        direction, state = direction_of(point, gradient)
        with _second_derivative(caller, point, mode):
            image = multiply(jax.tree.map(cast, direction, params))
        return Estimate(gradient, aux, image if forward else image[0], state)

    return Estimator(init, estimate)


def ascent_direction(
    caller: str, ascent: Ascent | None
) -> tuple[Callable[[PyTree], optax.OptState], Direction]:
    """The direction of steepest ascent, or what ``ascent`` makes of it, with its state.

    JAX's gradient of a real loss with respect to complex parameters is the conjugate of the
    direction of steepest ascent, so the conjugate is taken here, before ``ascent`` sees it, in
    float32 or wider. A function ``(gradient, params) -> direction`` is a transformation without
    state.
    """
    if not (ascent is None or callable(ascent) or isinstance(ascent, optax.GradientTransformation)):
        raise TypeError(
            f"{caller}: ascent must be a function (gradient, params) -> direction, got"
            f" {type(ascent).__name__}: for a mask use ascent=masked(mask), and for one with state"
            " an Optax transformation."
        )
    tx = ascent if isinstance(ascent, optax.GradientTransformation) else None

    def init(params: PyTree) -> optax.OptState:
        # gradients are accumulated as they come: wide
        return () if tx is None else tx.init(jax.tree.map(widen, params))

    def direction_of(point: Point, gradient: PyTree) -> tuple[PyTree, optax.OptState]:
        steepest = jax.tree.map(conjugate, gradient)
        direction, state = steepest, point.ascent
        if tx is not None:
            direction, state = tx.update(steepest, point.ascent, point.params)
            state = jax.tree.map(_kept, state, point.ascent)
        elif callable(ascent):
            direction = ascent(steepest, point.params)
        if ascent is not None:
            check_like(caller, "the direction returned by ascent", direction, point.params)
        return direction, state

    return init, direction_of


def without_state(caller: str, estimator: Estimator, params: PyTree) -> optax.OptState:
    """The state of an ascent that keeps none, where there is no place for one."""
    state = estimator.init(params)
    if jax.tree.leaves(state):
        raise TypeError(
            f"{caller}: the ascent keeps state from step to step, which has no place here: use the"
            " transformation of the same family, fd_gradreg(..., ascent=ascent)."
        )
    return state


def shift(params: PyTree, direction: PyTree, epsilon: jax.Array) -> PyTree:
    r"""Returns :math:`\theta + \epsilon d`, formed wide and cast to the parameters' dtypes."""

    def moved(p: Any, d: Any) -> jax.Array:
        start = widen(p)
        return cast(start + scale(epsilon, widen(d).astype(start.dtype)), p)

    return jax.tree.map(moved, params, direction)


def add_penalty(updates: PyTree, gamma: jax.Array, product: PyTree) -> PyTree:
    r"""Returns :math:`g + \gamma H d`, formed in float32 or wider, in the dtypes of ``updates``.

    Where gamma is zero nothing is added, not even what overflowed at the point climbed to.
    """
    something = gamma != 0

    def add(u: Any, p: Any) -> jax.Array:
        gradient = widen(u)
        image = widen(p).astype(gradient.dtype)
        image = jnp.where(something | jnp.isfinite(image), image, 0)
        return cast(gradient + scale(gamma, image), u)

    return jax.tree.map(add, updates, product)


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
    leaves = [widen(x) for x in jax.tree.leaves(tree)]
    dtype = np.result_type(np.float32, *(x.real.dtype for x in leaves))
    squares = (jnp.sum(x.real**2 + x.imag**2).astype(dtype) for x in leaves)
    square = sum(squares, start=jnp.zeros([], dtype))
    return jnp.where(square != 0, jnp.sqrt(jnp.where(square != 0, square, 1)), 0)


@contextlib.contextmanager
def _second_derivative(caller: str, point: Point, mode: Mode) -> Iterator[None]:
    """Says in one sentence that the loss has no second derivative, if that is what went wrong."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        point.grad_fn(point.params)  # a mistake in the loss itself shows here, as it is
        raise TypeError(
            f"{caller}: the gradient of this loss cannot be differentiated"
            f" {mode.replace('_', ' ')}: try the other mode, or use fd_gradreg or"
            f" fd_value_and_grad, which need first derivatives only ({error})."
        ) from error


def _inverse(width: jax.Array, halved: bool, dtype: Any) -> jax.Array:
    """``1 / width``, or half of it, and 0 where nothing is climbed."""
    width = within(width, dtype)
    climbs = jnp.abs(width) >= np.finfo(dtype).tiny  # below it 1 / width overflows
    return jnp.where(climbs, (0.5 if halved else 1) / jnp.where(climbs, width, 1), 0)


def _kept(new: Any, old: Any) -> Any:
    """A leaf of a state in the dtype that it had before."""
    return cast(new, old) if is_inexact(old) else new
