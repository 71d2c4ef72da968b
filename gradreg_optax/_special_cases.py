"""Special cases of gradient regularization under their own names: SAM, ASAM, GNP, flooding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradreg_optax import _validation as validation
from gradreg_optax._ascent import adaptive, ascent_transformation, normalized
from gradreg_optax._estimators import shift
from gradreg_optax._loss import late_loss
from gradreg_optax._numerics import cast, scale, widen
from gradreg_optax._transforms import (
    Evaluation,
    GradregState,
    Penalised,
    Penalty,
    Schedule,
    advanced,
    difference_penalty,
    initial_state,
    penalized,
)
from gradreg_optax._types import AscentFn, LossFn, PyTree, ScalarOrSchedule, Scheme


def sam(
    loss_fn: LossFn | None = None,
    *,
    rho: ScalarOrSchedule,
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization (SAM): the gradient at the perturbed parameters.

    Replaces :math:`g` by :math:`\nabla L(\theta + \rho\, g/\|g\|)`. It is :func:`fd_gradreg` along
    :func:`normalized` with :math:`\gamma = \epsilon = \rho`, for which :math:`g` cancels. A zero
    gradient stays zero. With ``interval`` = k, every k-th update is
    :math:`g + k(\nabla L(\theta + \rho\, g/\|g\|) - g)`.

    Cost:
      One gradient in addition to :math:`g`. Without ``interval`` only one gradient is in memory at
      a time.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      rho: the radius :math:`\rho \ge 0`, in units of the parameters; a number or a schedule. Zero
        gives the plain gradient.
      interval: as for :func:`fd_gradreg`.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: rho < 0 or interval < 1 (if concrete); otherwise as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import sam
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = sam(rho=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # params + 0.5 * [0.6, 0.8]
      [3.3 4.4]

    References:
      Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
      2021.
    """
    caller = "sam"
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    penalty = _sharpness_penalty(caller, rho, normalized, schedule)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def asam(
    loss_fn: LossFn | None = None,
    *,
    rho: ScalarOrSchedule,
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM (ASAM), which is invariant to a rescaling of layers.

    Replaces :math:`g` by :math:`\nabla L(\theta + \rho\, \theta^2 g / \||\theta| g\|)`.
    It is :func:`fd_gradreg` along :func:`adaptive` with :math:`\gamma = \epsilon = \rho`.

    Cost:
      One gradient in addition to :math:`g`.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      rho: the radius :math:`\rho \ge 0`, relative to the parameters; a number or a schedule. Zero
        gives the plain gradient.
      interval: as for :func:`fd_gradreg`.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: rho < 0 or interval < 1 (if concrete); otherwise as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import asam
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 0.0])
      >>> tx = asam(rho=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # 3 (1 + 0.5)
      [4.5 0. ]

    References:
      Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks*, ICML 2021.
    """
    caller = "asam"
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    penalty = _sharpness_penalty(caller, rho, adaptive, schedule)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def gradient_norm_penalty(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    epsilon: ScalarOrSchedule,
    scheme: Scheme = "forward",
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalty on the gradient norm, not squared (GNP), by a finite difference.

    Estimates the gradient of :math:`L(\theta) + \gamma \|\nabla L(\theta)\|`. It is
    :func:`fd_gradreg` along :func:`normalized`. With the forward scheme the result is
    :math:`g + \frac{\gamma}{\epsilon}(\nabla L(\theta + \epsilon g/\|g\|) - g)`, which is
    :func:`sam` for :math:`\gamma = \epsilon`.

    Cost:
      As for :func:`fd_gradreg`.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      gamma: the coefficient of the norm :math:`\gamma \ge 0`, in units of the parameters; a number
        or a schedule.
      epsilon: the length of the ascent step :math:`\epsilon > 0`, in units of the parameters; a
        number or a schedule.
      scheme: "forward", "backward" or "central".
      interval: as for :func:`fd_gradreg`.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import gradient_norm_penalty
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = gradient_norm_penalty(gamma=1.0, epsilon=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # g + H g / |g|
      [3.6 4.8]

    References:
      Zhao, Zhang, Hu, *Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning*, ICML 2022.
    """
    caller = "gradient_norm_penalty"
    gamma_at = validation.hyperparameter(caller, "gamma", gamma)
    epsilon_at = validation.hyperparameter(caller, "epsilon", epsilon)
    validation.check_choice(caller, "scheme", scheme, Scheme)
    tx = ascent_transformation(caller, normalized)
    penalty = difference_penalty(gamma_at, epsilon_at, scheme, tx)
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def flooding(
    loss_fn: LossFn | None = None, *, level: ScalarOrSchedule, has_aux: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Flooding: gradient descent above the flood level, gradient ascent below it.

    Multiplies the updates by :math:`\operatorname{sign}(L(\theta) - b)`. The result is the gradient
    of :math:`|L(\theta) - b| + b`. For plain SGD on one batch, an ascent step and the descent step
    after it are together a step of gradient regularization: with step size :math:`\eta` they move
    :math:`\theta` by :math:`-\eta^2 (\nabla L(\theta + \eta g) - g)/\eta`, which is F-GR's
    correction with :math:`\epsilon = \eta`. Descent followed by ascent gives B-GR's. With different
    batches or with momentum this identity does not hold.

    Cost:
      No gradient. Without ``value=`` in ``update``, one evaluation of the loss.

    Args:
      loss_fn: as for :func:`fd_gradreg`. It is not needed if ``update`` receives ``value=``, the
        loss at the parameters.
      level: the flood level :math:`b`, in units of the loss; a number or a schedule of the
        transformation's step counter.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: at ``update``, neither ``value=`` nor a loss.
      TypeError: a level or a loss that is not a real scalar, or integer updates.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import flooding
      >>> tx, params = flooding(level=0.3), jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params), params, value=0.1)
      >>> print(updates)  # below the level
      [-0.5  0.5]

    References:
      Ishida et al., *Do We Need Zero Training Loss After Achieving Zero Training Error?*, ICML
      2020. Karakida et al., ICML 2023.
    """
    caller = "flooding"
    level_at = validation.hyperparameter(caller, "level", level)
    bind = late_loss(caller, loss_fn, has_aux)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Penalised:
        validation.check_same_state(caller, state, initial_state())
        validation.check_inexact(caller, "updates", updates)
        value = extra.get("value")
        if value is None and loss_fn is None and extra.get("value_fn") is None:
            raise ValueError(
                "flooding: update needs a loss, got neither value= nor value_fn=. Call"
                " update(grads, state, params, value=loss), or write flooding(loss_fn, ...)."
            )
        if value is None:
            value = bind(params, extra)(params)
        loss = widen(validation.scalar(caller, "value", value))
        sign = jnp.sign(loss - level_at(state.step).astype(loss.dtype))
        flooded = jax.tree.map(lambda u: cast(scale(sign, jnp.asarray(u)), u), updates)
        return flooded, state._replace(step=advanced(state.step))

    # With value= the update needs no parameters, so optax.masked(flooding(...), mask) works.
    return optax.GradientTransformationExtraArgs(lambda params: initial_state(), update)


def _sharpness_penalty(
    caller: str, rho: ScalarOrSchedule, ascent: AscentFn, schedule: Schedule
) -> Penalty:
    """The forward difference with gamma = epsilon = rho: the gradient at the perturbed parameters.

    The incoming gradient cancels. If every update applies the penalty, the incoming gradient is not
    stored while the other is evaluated, which saves the memory of one gradient.
    """
    rho_at = validation.hyperparameter(caller, "rho", rho)
    tx = ascent_transformation(caller, ascent)
    by_difference = difference_penalty(rho_at, rho_at, "forward", tx)

    def penalize(at: Evaluation, updates: PyTree, state: GradregState) -> Penalised:
        if at.gradient(updates) is not updates or not schedule.always:
            return by_difference.penalize(at, updates, state)
        direction, _ = tx.update(updates, state.ascent, at.params)
        ahead, _ = at.grad_fn(shift(at.params, direction, at.gamma))
        return jax.tree.map(cast, ahead, updates), state

    return by_difference._replace(penalize=penalize)
