"""Gradient functions: replacements of ``jax.value_and_grad`` for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from gradreg_optax._arguments import arguments_at, keeps_signature
from gradreg_optax._ascent import ascent_transformation, stateless
from gradreg_optax._estimators import Point, add_penalty, difference, product
from gradreg_optax._loss import with_aux
from gradreg_optax._types import Argnums, Ascent, GradFn, LossFn, Mode, PyTree, Scalar, Scheme
from gradreg_optax._validation import check_choice, check_inexact, constant

_Penalize: TypeAlias = Callable[[GradFn, PyTree], tuple[PyTree, Any]]  # -> (gradient, aux)


def fd_value_and_grad(
    loss_fn: LossFn,
    *,
    gamma: Scalar,
    epsilon: Scalar,
    scheme: Scheme = "forward",
    ascent: Ascent | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""Return a function that computes the loss and its gradient with a finite-difference penalty.

    The value is :math:`L(\theta)`. The gradient is an estimate of the gradient of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`:

    .. math::

        g + \frac{\gamma}{\epsilon} \big(\nabla L(\theta + \epsilon d) - g\big),
        \qquad g = \nabla L(\theta), \quad d = g.

    For the other schemes see :func:`gradreg_optax.fd_gradreg`. Value and aux are those at
    :math:`\theta`. Both passes use the same arguments (batch, dropout key), and aux of the second
    one is discarded.

    Cost:
      Two gradients ("forward", "backward") or three ("central").

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature.
      epsilon: the ascent step :math:`\epsilon > 0`, in the same units.
      scheme: "forward", "backward" or "central".
      ascent: the direction :math:`d` as a function ``(gradient, params) -> direction``, or an Optax
        transformation without state; by default the gradient.
      argnums: the position of the parameters, or a tuple of positions, as for ``jax.grad``. With a
        tuple, the penalty is on the norm of all gradients together, and ``grad`` is a tuple.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A function ``f(params, *args, **kwargs) -> (value, grad)``, or ``((value, aux), grad)`` with
      ``has_aux``; ``grad`` has the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: gamma < 0 or epsilon <= 0 (if concrete); an unknown scheme.
      TypeError: a schedule for gamma or epsilon, an ascent with state, parameters that are not real
        or complex numbers, or a loss that is not a real scalar.

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
    caller = "fd_value_and_grad"
    gamma_at = constant(caller, "gamma", gamma)
    epsilon_at = constant(caller, "epsilon", epsilon)
    check_choice(caller, "scheme", scheme, Scheme)
    tx = ascent_transformation(caller, ascent)

    def penalize(grad_fn: GradFn, params: PyTree) -> tuple[PyTree, Any]:
        at = Point(grad_fn, params, stateless(caller, tx, params))
        estimate = difference(at, epsilon=epsilon_at(None), scheme=scheme)
        return add_penalty(estimate.gradient, gamma_at(None), estimate.product), estimate.aux

    return _value_and_grad(caller, loss_fn, penalize, argnums, has_aux)


def dbp_value_and_grad(
    loss_fn: LossFn,
    *,
    gamma: Scalar,
    mode: Mode = "forward_over_reverse",
    ascent: Ascent | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""Return a function that computes the loss and the exact gradient with the penalty.

    The value is :math:`L(\theta)`. The gradient is that of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`, which is :math:`g + \gamma H g`,
    by double backpropagation. With an ascent direction :math:`d` it is :math:`g + \gamma H d`. The
    loss must have a second derivative.

    Cost:
      One gradient and one Hessian-vector product, about three gradients.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature.
      mode: "forward_over_reverse", or "reverse_over_reverse" for a loss without forward-mode rules.
      ascent: as for :func:`fd_value_and_grad`.
      argnums: as for :func:`fd_value_and_grad`.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A function as for :func:`fd_value_and_grad`.

    Raises:
      ValueError: gamma < 0 (if concrete); an unknown mode.
      TypeError: a loss without a second derivative; otherwise as for :func:`fd_value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import dbp_value_and_grad
      >>> loss_fn, params = lambda p: jnp.sum(p**4) / 4, jnp.array([1.0, 2.0])
      >>> value, grad = dbp_value_and_grad(loss_fn, gamma=0.5)(params)
      >>> print(value, grad)  # p**3 + 0.5 * 3 p**2 * p**3
      4.25 [ 2.5 56. ]

    References:
      Drucker and LeCun, *Improving generalization performance using double backpropagation*, 1992.
      Karakida et al., ICML 2023.
    """
    caller = "dbp_value_and_grad"
    gamma_at = constant(caller, "gamma", gamma)
    check_choice(caller, "mode", mode, Mode)
    tx = ascent_transformation(caller, ascent)

    def penalize(grad_fn: GradFn, params: PyTree) -> tuple[PyTree, Any]:
        at = Point(grad_fn, params, stateless(caller, tx, params))
        estimate = product(caller, at, mode=mode)
        return add_penalty(estimate.gradient, gamma_at(None), estimate.product), estimate.aux

    return _value_and_grad(caller, loss_fn, penalize, argnums, has_aux)


def _value_and_grad(
    caller: str, loss_fn: LossFn, penalize: _Penalize, argnums: Argnums, has_aux: bool
) -> Callable[..., tuple[Any, PyTree]]:
    loss = with_aux(caller, loss_fn, has_aux)

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        params, put = arguments_at(caller, argnums, args)
        check_inexact(caller, "the parameters", params)

        def grad_fn(params: PyTree) -> tuple[PyTree, Any]:
            evaluate = jax.value_and_grad(lambda p: loss(*put(p), **kwargs), has_aux=True)
            output, gradient = evaluate(params)
            return gradient, output

        gradient, (value, aux) = penalize(grad_fn, params)
        return ((value, aux) if has_aux else value), gradient

    return keeps_signature(value_and_grad, loss_fn)
