"""Optax transformations: gradient regularization in a chain.

The loss is ``loss_fn`` given at construction, with its further arguments picked by name from
``update``'s extra arguments, or Optax's ``value_fn=``. By default the incoming updates must be the
gradient of that loss, so these transformations come first in a chain. With ``reuse_updates=False``
they evaluate the gradient themselves and add the penalty to the incoming updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gradreg_optax import _validation as validation
from gradreg_optax._ascent import adaptive, ascent_transformation, normalized
from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._estimators import Climb, Estimate, add_penalty, difference, product, shift
from gradreg_optax._guard import compare
from gradreg_optax._loss import gradient_fn, late_loss
from gradreg_optax._numerics import cast, keep_finite, owned, scale, widen
from gradreg_optax._types import (
    Ascent,
    AscentFn,
    AtStep,
    GradFn,
    LateLoss,
    LossFn,
    Mode,
    PyTree,
    ScalarOrSchedule,
    Scheme,
)


class GradregState(NamedTuple):
    """State of every transformation with a fixed strength.

    Attributes:
      step: number of updates so far, including those without a penalty; shape (), int32. Schedules,
        ``start`` and ``interval`` use it.
      ascent: the state of an ``ascent`` that is an Optax transformation; otherwise without leaves.
    """

    step: jax.Array
    ascent: optax.OptState = ()


def fd_gradreg(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    epsilon: ScalarOrSchedule,
    scheme: Scheme = "forward",
    ascent: Ascent | None = None,
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient regularization by a finite difference (F-GR, B-GR, C-GR).

    Replaces the gradient :math:`g = \nabla L(\theta)` by an estimate of the gradient of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`. The parameters are perturbed along
    :math:`d`, which is :math:`g` or the direction that ``ascent`` computes from it:

    ========  =====================================================================  ====  =====
    scheme    result                                                                 cost  error
    ========  =====================================================================  ====  =====
    forward   :math:`g + \tfrac{\gamma}{\epsilon}(\nabla L(\theta+\epsilon d) - g)`  1     O(ε)
    backward  :math:`g + \tfrac{\gamma}{\epsilon}(g - \nabla L(\theta-\epsilon d))`  1     O(ε)
    central   the mean of these two                                                  2     O(ε²)
    ========  =====================================================================  ====  =====

    Cost:
      The gradient evaluations of the table in addition to :math:`g`, and one more with
      ``reuse_updates=False``. Updates without a penalty (``interval``, ``start``) evaluate no
      gradient. They are skipped by ``lax.cond``, so a ``vmap`` over the step counter evaluates both
      branches.

    Args:
      loss_fn: ``loss_fn(params, ...)``, which returns a real scalar, or ``(scalar, aux)`` with
        ``has_aux``. Its further arguments are picked by name from ``update``'s extra arguments.
        Without ``loss_fn``, pass ``value_fn=``, the loss as a function of the parameters, to
        ``update``.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature; a
        number or a schedule of the transformation's step counter.
      epsilon: the ascent step :math:`\epsilon > 0`, in the same units; a number or a schedule. A
        negative traced or scheduled value gives the backward difference, and zero no correction.
      scheme: "forward" (the paper's choice), "backward" or "central".
      ascent: the direction :math:`d`; by default the gradient. Either a function ``(gradient,
        params) -> direction``, such as ``normalized``, ``adaptive`` or ``masked(mask)``, or an
        Optax transformation of the gradient (momentum, ``scale_by_rms``, ``clip_by_global_norm``,
        ``add_noise``), whose state advances on the updates that apply the penalty. For complex
        parameters it receives the direction of steepest ascent, the conjugate of JAX's gradient.
      interval: apply the penalty on every ``interval``-th update, the first included, with
        ``gamma * interval``; a whole number up to 2**31 - 1, the range of the counter.
      start: apply the penalty from this update on; ``interval`` counts from here.
      reuse_updates: whether the incoming updates are :math:`g`. With False the transformation
        evaluates :math:`g` and adds the penalty to the incoming updates: for a penalty after
        clipping, on another batch, or with accumulated gradients. The keyword ``reuse_updates=`` of
        ``update`` overrides this for one call.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``; ``value_fn`` always returns the value
        alone.

    Returns:
      A transformation with state :class:`GradregState`. Updates keep their structure, shapes and
      dtypes; the difference is formed in float32 or wider.

    Raises:
      ValueError: gamma < 0, epsilon <= 0 or interval < 1 (if concrete); an unknown scheme; at
        ``update``, missing parameters, a missing loss, or parameters hidden by ``optax.masked``.
      TypeError: a loss that is not a real scalar, a missing argument of the loss, or a wrong
        ``has_aux``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gradreg_optax import fd_gradreg
      >>> def loss_fn(params, x):
      ...     return jnp.sum((params * x) ** 2) / 2
      >>> tx = optax.chain(fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1), optax.sgd(0.1))
      >>> params, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params, x=x)
      >>> print(updates.round(3))  # -0.1 (g + 0.5 H g)
      [-0.15 -2.4 ]

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
    """
    caller = "fd_gradreg"
    gamma_at = validation.hyperparameter(caller, "gamma", gamma)
    epsilon_at = validation.hyperparameter(caller, "epsilon", epsilon)
    validation.check_choice(caller, "scheme", scheme, Scheme)
    tx = ascent_transformation(caller, ascent)
    penalty = _difference_penalty(gamma_at, epsilon_at, scheme, tx)
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def dbp_gradreg(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    mode: Mode = "forward_over_reverse",
    ascent: Ascent | None = None,
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient regularization by double backpropagation (DB), exact.

    Replaces :math:`g = \nabla L(\theta)` by :math:`g + \gamma H d`, where :math:`d` is :math:`g` or
    the direction that ``ascent`` computes from it. Without ``ascent`` the result is the gradient of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`.

    Cost:
      One Hessian-vector product, about two gradients in addition to :math:`g`. Under one ``jit``
      its primal half is shared with :math:`g`.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature; a
        number or a schedule.
      mode: "forward_over_reverse" (``jvp`` of ``grad``), or "reverse_over_reverse", the literal
        double backpropagation, for functions without a forward-mode rule.
      ascent: as for :func:`fd_gradreg`.
      interval: as for :func:`fd_gradreg`.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`. The product is linear in :math:`d`, so with clipped
        incoming updates the correction is scaled as they are.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: gamma < 0 or interval < 1 (if concrete); an unknown mode; at ``update`` as for
        :func:`fd_gradreg`.
      TypeError: a loss whose gradient JAX cannot differentiate; otherwise as for
        :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import dbp_gradreg
      >>> loss = lambda params: jnp.sum(params**4) / 4
      >>> tx, params = dbp_gradreg(gamma=0.5), jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # p**3 + 0.5 * 3 p**2 * p**3
      [ 2.5 56. ]

    References:
      Drucker and LeCun, *Improving generalization performance using double backpropagation*, 1992.
      Karakida et al., ICML 2023.
    """
    caller = "dbp_gradreg"
    gamma_at = validation.hyperparameter(caller, "gamma", gamma)
    validation.check_choice(caller, "mode", mode, Mode)
    tx = ascent_transformation(caller, ascent)

    def penalize(at: Evaluation, updates: PyTree, state: GradregState) -> Penalised:
        climb, gradient = at.climb(tx, state.ascent), updates if at.reuse_updates else None
        estimate = product(caller, at.grad_fn, at.params, climb, mode=mode, gradient=gradient)
        return _add(updates, state, at.gamma, estimate)

    penalty = Penalty(lambda params: _initial_state(tx.init(params)), gamma_at, penalize)
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
        validation.check_same_state(caller, state, _initial_state())
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
    return optax.GradientTransformationExtraArgs(lambda params: _initial_state(), update)


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
    penalty = _difference_penalty(gamma_at, epsilon_at, scheme, tx)
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


class Schedule(NamedTuple):
    """The updates that apply the penalty: ``start``, and every ``interval``-th after it."""

    interval: Any
    start: Any

    @classmethod
    def of(cls, caller: str, interval: Any, start: Any) -> Schedule:
        """Validate both numbers."""
        interval = validation.whole_number(caller, "interval", interval)
        return cls(interval, validation.whole_number(caller, "start", start))

    @property
    def always(self) -> bool:
        """Whether every update applies the penalty, known at trace time."""
        return self._every_update and self._from_the_first

    @property
    def _every_update(self) -> bool:
        return isinstance(self.interval, int) and self.interval == 1

    @property
    def _from_the_first(self) -> bool:
        return isinstance(self.start, int) and self.start == 0

    def due(self, step: jax.Array) -> jax.Array:
        """Whether the update at ``step`` applies the penalty."""
        interval, start = (jnp.asarray(n, step.dtype) for n in self)
        due: jax.Array = (step - start) % interval == 0
        return due if self._from_the_first else due & (step >= start)

    def times_interval(self, gamma: jax.Array) -> jax.Array:
        """Return ``gamma * interval``, so that the average over all updates is ``gamma``."""
        if self._every_update:
            return gamma
        interval = jnp.asarray(self.interval, gamma.dtype)
        largest = float(np.finfo(gamma.dtype).max) / 2
        return jnp.minimum(gamma, largest / interval) * interval


class Evaluation(NamedTuple):
    """The inputs of a penalty at one update.

    Attributes:
      grad_fn: ``params -> (gradient, aux)``.
      params: the parameters.
      gamma: the coefficient of this update, multiplied by the interval.
      reuse_updates: whether the incoming updates are the gradient.
      extra_args: the extra arguments of ``update``.
    """

    grad_fn: GradFn
    params: PyTree
    gamma: jax.Array
    reuse_updates: bool
    extra_args: Mapping[str, Any]

    def climb(self, tx: optax.GradientTransformation, state: optax.OptState) -> Climb:
        """Return the ascent direction as a function of the gradient."""
        return lambda gradient: tx.update(gradient, state, self.params)


Penalised: TypeAlias = tuple[PyTree, Any]  # updates, state


class Penalty(NamedTuple):
    """A penalty, without its schedule.

    Attributes:
      init: ``params -> state``, a NamedTuple with a counter called ``step``.
      gamma_at: the coefficient at a step, evaluated on every update.
      penalize: ``(evaluation, updates, state) -> (updates, state)``, which does not advance the
        counter.
    """

    init: Callable[[PyTree], Any]
    gamma_at: AtStep
    penalize: Callable[[Evaluation, PyTree, Any], Penalised]


def penalized(
    caller: str, bind: LateLoss, penalty: Penalty, schedule: Schedule, reuse_updates: bool
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that applies ``penalty`` on the updates of ``schedule``."""
    validation.flag(caller, "reuse_updates", reuse_updates)

    def init(params: PyTree) -> Any:
        validation.check_params(caller, params)
        return owned(penalty.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Penalised:
        reuse = validation.flag(caller, "reuse_updates", extra.pop("reuse_updates", reuse_updates))
        grad_fn = gradient_fn(bind(params, extra))
        validation.check_like(caller, "updates", updates, params)
        validation.check_same_state(caller, state, jax.eval_shape(penalty.init, params))
        gamma = schedule.times_interval(penalty.gamma_at(state.step))
        due = True if schedule.always else schedule.due(validation.check_step(caller, state.step))
        if reuse:
            compare(caller, grad_fn, params, updates, due)
        # Inside a branch, jit makes sure that the gradient is traced only once.
        grad_fn = grad_fn if schedule.always else jax.jit(grad_fn)
        at = Evaluation(grad_fn, params, gamma, reuse, extra)
        penalize = functools.partial(penalty.penalize, at)
        if schedule.always:
            updates, state = penalize(updates, state)
        else:
            branch = canonical_convolutions(jax.jit(penalize))
            updates, state = jax.lax.cond(due, branch, lambda *given: given, updates, state)
        return updates, state._replace(step=advanced(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def advanced(step: jax.Array | None) -> jax.Array | None:
    """Return the counter of the next update; None for a loss without a step."""
    return None if step is None else optax.safe_increment(step)


def _difference_penalty(
    gamma_at: AtStep, epsilon_at: AtStep, scheme: Scheme, tx: optax.GradientTransformation
) -> Penalty:
    """Add gamma times the finite difference along the ascent of ``tx``."""

    def penalize(at: Evaluation, updates: PyTree, state: GradregState) -> Penalised:
        climb, epsilon = at.climb(tx, state.ascent), epsilon_at(state.step)
        gradient = updates if at.reuse_updates else None
        estimate = difference(
            at.grad_fn, at.params, climb, epsilon=epsilon, scheme=scheme, gradient=gradient
        )
        return _add(updates, state, at.gamma, estimate)

    return Penalty(lambda params: _initial_state(tx.init(params)), gamma_at, penalize)


def _sharpness_penalty(
    caller: str, rho: ScalarOrSchedule, ascent: AscentFn, schedule: Schedule
) -> Penalty:
    """The forward difference with gamma = epsilon = rho: the gradient at the perturbed parameters.

    The incoming gradient cancels. If every update applies the penalty, the incoming gradient is not
    stored while the other is evaluated, which saves the memory of one gradient.
    """
    rho_at = validation.hyperparameter(caller, "rho", rho)
    tx = ascent_transformation(caller, ascent)
    by_difference = _difference_penalty(rho_at, rho_at, "forward", tx)

    def penalize(at: Evaluation, updates: PyTree, state: GradregState) -> Penalised:
        if not (at.reuse_updates and schedule.always):
            return by_difference.penalize(at, updates, state)
        direction, _ = at.climb(tx, state.ascent)(updates)
        ahead, _ = at.grad_fn(shift(at.params, direction, at.gamma))
        return jax.tree.map(cast, ahead, updates), state

    return by_difference._replace(penalize=penalize)


def _add(updates: PyTree, state: GradregState, gamma: jax.Array, estimate: Estimate) -> Penalised:
    """Add gamma H d. If the result is not finite, the state of the ascent does not advance."""
    penalised = add_penalty(updates, gamma, estimate.product)
    ascent = keep_finite(estimate.ascent, state.ascent, penalised, estimate.product)
    return penalised, state._replace(ascent=ascent)


def _initial_state(ascent: optax.OptState = ()) -> GradregState:
    return GradregState(jnp.zeros([], jnp.int32), ascent)
