"""Gradient functions: regularization for any training loop, in place of ``jax.value_and_grad``."""

from collections.abc import Callable
from typing import Any

import jax

from gradreg_optax._checks import (
    check_ascent,
    check_constant,
    check_epsilon,
    check_gamma,
    check_mode,
    check_scheme,
)
from gradreg_optax._loss import with_aux
from gradreg_optax._typing import AscentFn, LossFn, Mode, PyTree, Scalar, Scheme
from gradreg_optax.penalty import add_penalty, ascent_direction, difference_product, exact_product


def fd_value_and_grad(
    loss_fn: LossFn,
    *,
    gamma: Scalar,
    epsilon: Scalar,
    scheme: Scheme = "forward",
    ascent: AscentFn | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The loss and its gradient, regularized by a finite difference of gradients.

    The value is :math:`L(\theta)`, and the gradient estimates that of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`:

    .. math::

        g + \frac{\gamma}{\epsilon} \big(\nabla L(\theta + \epsilon d) - g\big), \qquad g = \nabla
        L(\theta), \quad d = g,

    and correspondingly for the other schemes, see :func:`gradreg_optax.fd_gradreg`. Value and aux
    are those at :math:`\theta`; the loss at the perturbed parameters sees the same arguments
    (batch, dropout key), and its aux is thrown away.

    Cost: two gradients ("forward", "backward") or three ("central").

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature.
      epsilon: the ascent step :math:`\epsilon > 0`, in the same units.
      scheme: "forward", "backward" or "central".
      ascent: the direction :math:`d` as a function ``(gradient, params) -> direction``; by default
        the gradient itself.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A function ``f(params, *args, **kwargs) -> (value, grad)``, or ``((value, aux), grad)`` with
      ``has_aux``; ``grad`` has the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: gamma < 0, epsilon <= 0 (where concrete), or an unknown scheme.
      TypeError: a schedule for gamma or epsilon, or a loss that is no real scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import fd_value_and_grad
      >>> loss_fn = lambda params, x: jnp.sum((params * x) ** 2) / 2
      >>> params, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
      >>> value, grad = jax.jit(fd_value_and_grad(loss_fn, gamma=0.5, epsilon=0.25))(params, x)
      >>> print(value, grad)  # the Hessian is diag(1, 4): g + 0.5 H g
      8.5 [ 1.5 24. ]

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
    """
    function = "fd_value_and_grad"
    check_scheme(function, scheme)
    check_ascent(function, ascent)
    check_constant(function, "gamma", gamma, check_gamma)
    check_constant(function, "epsilon", epsilon, check_epsilon)
    loss = with_aux(function, loss_fn, has_aux)

    def value_and_grad(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        def grad_fn(point: PyTree) -> PyTree:
            return jax.grad(loss, has_aux=True)(point, *args, **kwargs)[0]

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, *args, **kwargs)
        direction = ascent_direction(function, gradient, params, ascent)
        product = difference_product(
            grad_fn,
            params,
            gradient,
            direction,
            check_epsilon(function, "epsilon", epsilon),
            scheme,
        )
        return ((value, aux) if has_aux else value), add_penalty(
            gradient, check_gamma(function, "gamma", gamma), product
        )

    return value_and_grad


def dbp_value_and_grad(
    loss_fn: LossFn,
    *,
    gamma: Scalar,
    mode: Mode = "forward_over_reverse",
    ascent: AscentFn | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The loss and its gradient, regularized exactly, by double backpropagation.

    The value is :math:`L(\theta)`, and the gradient that of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`, which is :math:`g + \gamma H g`;
    with an ascent direction :math:`d` it is :math:`g + \gamma H d`.

    Cost: one gradient and one Hessian-vector product, about three gradients. The loss must have
      second derivatives.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature.
      mode: "forward_over_reverse", or "reverse_over_reverse" for a loss without forward-mode rules.
      ascent: the direction :math:`d` as a function ``(gradient, params) -> direction``; by default
        the gradient itself.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A function ``f(params, *args, **kwargs) -> (value, grad)``, or ``((value, aux), grad)`` with
      ``has_aux``.

    Raises:
      ValueError: gamma < 0 (where concrete), or an unknown mode.
      TypeError: a schedule for gamma, a loss that is no real scalar, or one that has no second
        derivative.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import dbp_value_and_grad
      >>> value, grad = dbp_value_and_grad(lambda p: jnp.sum(p**4) / 4, gamma=0.5)(jnp.array([1.0, 2.0]))
      >>> print(value, grad)  # p**3 + 0.5 * 3 p**2 * p**3
      4.25 [ 2.5 56. ]

    References:
      Drucker and LeCun, *Improving generalization performance using double backpropagation*, 1992.
      Karakida et al., ICML 2023.
    """
    function = "dbp_value_and_grad"
    check_mode(function, mode)
    check_ascent(function, ascent)
    check_constant(function, "gamma", gamma, check_gamma)
    loss = with_aux(function, loss_fn, has_aux)

    def value_and_grad(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        def grad_fn(point: PyTree) -> tuple[PyTree, Any]:
            (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(point, *args, **kwargs)
            return gradient, (value, aux)

        gradient, (value, aux), product = exact_product(function, grad_fn, params, mode)
        direction = ascent_direction(function, gradient, params, ascent)
        regularized = add_penalty(
            gradient, check_gamma(function, "gamma", gamma), product(direction)
        )
        return ((value, aux) if has_aux else value), regularized

    return value_and_grad
