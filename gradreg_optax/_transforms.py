"""Optax transformations: gradient regularization in a chain.

The loss is ``loss_fn`` given at construction, with its further arguments picked by name from
``update``'s extra arguments, or Optax's ``value_fn=``. By default the incoming updates must be the
gradient of that loss, so these transformations come first in a chain. With ``reuse_updates=False``
they evaluate the gradient themselves and add the penalty to the incoming updates. Train steps and
regularized losses know the gradient of their loss, so that there a finite difference may stand
anywhere in a chain.
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
from gradreg_optax._arguments import known_gradient
from gradreg_optax._ascent import ascent_transformation
from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._estimators import Estimate, Point, add_penalty, difference, product
from gradreg_optax._guard import compare
from gradreg_optax._loss import gradient_fn, late_loss
from gradreg_optax._numerics import keep_finite, owned
from gradreg_optax._types import (
    Ascent,
    AtStep,
    GradFn,
    LateLoss,
    LossFn,
    Mode,
    PyTree,
    ScalarOrSchedule,
    Scheme,
    Transformation,
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
    penalty = difference_penalty(gamma_at, epsilon_at, scheme, tx)
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
        gradient = updates if at.reuse_updates else None
        estimate = product(caller, at.point(tx, state.ascent, gradient), mode=mode)
        return _add(updates, state, at.gamma, estimate)

    penalty = Penalty(lambda params: initial_state(tx.init(params)), gamma_at, penalize)
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
      known: the gradient, if a step knows it and has not passed it as the updates; else None.
      extra_args: the extra arguments of ``update``.
    """

    grad_fn: GradFn
    params: PyTree
    gamma: jax.Array
    reuse_updates: bool
    known: PyTree
    extra_args: Mapping[str, Any]

    def gradient(self, updates: PyTree) -> PyTree:
        """Return the gradient of the loss, or None if it must be evaluated."""
        if not self.reuse_updates:
            return None
        return updates if self.known is None else self.known

    def point(self, tx: Transformation, state: optax.OptState, gradient: PyTree) -> Point:
        """Return where to estimate the product, with the ascent of ``tx`` and a known gradient."""

        def climb(gradient: PyTree) -> tuple[PyTree, Any]:
            return tx.update(gradient, state, self.params)

        return Point(self.grad_fn, self.params, climb, gradient)


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
        known = known_gradient(extra, params, updates)
        at = Evaluation(grad_fn, params, gamma, reuse, known, extra)
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


def difference_penalty(
    gamma_at: AtStep, epsilon_at: AtStep, scheme: Scheme, tx: Transformation
) -> Penalty:
    """Add gamma times the finite difference along the ascent of ``tx``."""

    def penalize(at: Evaluation, updates: PyTree, state: GradregState) -> Penalised:
        point = at.point(tx, state.ascent, at.gradient(updates))
        estimate = difference(point, epsilon=epsilon_at(state.step), scheme=scheme)
        return _add(updates, state, at.gamma, estimate)

    return Penalty(lambda params: initial_state(tx.init(params)), gamma_at, penalize)


def _add(updates: PyTree, state: GradregState, gamma: jax.Array, estimate: Estimate) -> Penalised:
    """Add gamma H d. If the result is not finite, the state of the ascent does not advance."""
    penalised = add_penalty(updates, gamma, estimate.product)
    ascent = keep_finite(estimate.ascent, state.ascent, penalised, estimate.product)
    return penalised, state._replace(ascent=ascent)


def initial_state(ascent: optax.OptState = ()) -> GradregState:
    return GradregState(jnp.zeros([], jnp.int32), ascent)
