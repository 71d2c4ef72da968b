"""A penalty relative to the gradient: gamma and epsilon follow from measured norms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradreg_optax._ascent import ascent_transformation
from gradreg_optax._estimators import add_penalty, difference
from gradreg_optax._loss import late_loss
from gradreg_optax._numerics import default_float, global_norm, keep_finite, ratio
from gradreg_optax._self_tuning import Losses, no_losses, self_tuned
from gradreg_optax._transforms import Evaluation, Penalised, Penalty, Schedule, penalized
from gradreg_optax._types import Ascent, LossFn, PyTree, ScalarOrSchedule, Scheme
from gradreg_optax._validation import check_choice, hyperparameter

_FIRST_REACH = 0.01  # the first ascent step, in units of the norm of the parameters
_BOUND = 2.0  # the largest correction of a step, in units of strength * gradient norm


class Norms(NamedTuple):
    """Decaying sums of norms over the updates that took the penalty.

    Attributes:
      gradient: of the incoming updates, |g|; shape ().
      own: of the gradient that the penalty is taken of, |d|; shape ().
      product: of the difference estimate, |R|; shape (). Zero before the first.
    """

    gradient: jax.Array
    own: jax.Array
    product: jax.Array


class RelativeState(NamedTuple):
    """State of :func:`relative_gradreg`.

    Attributes:
      step: number of updates so far, skipped ones included; shape (), int32.
      strength: the relative strength, as last used; shape ().
      scale: the coefficient of a penalty of strength one, as last used; shape ().
      norms: the sums that determine the scale.
      losses: the statistics of a self-tuned strength; without leaves for a given strength.
      ascent: the state of an ``ascent`` that is an Optax transformation.
    """

    step: jax.Array
    strength: jax.Array
    scale: jax.Array
    norms: Norms
    losses: Losses | tuple[()] = ()
    ascent: optax.OptState = ()


def relative_gradreg(
    loss_fn: LossFn | None = None,
    *,
    strength: ScalarOrSchedule | None = 0.5,
    reach: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    scheme: Scheme = "forward",
    ascent: Ascent | None = None,
    interval: ArrayLike = 1,
    start: ArrayLike = 0,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient regularization scaled relative to the gradient norm.

    Let :math:`g` be the incoming gradient, :math:`d` the gradient that the penalty is taken of (the
    same, or that of a part of the batch) and :math:`R` the difference estimate of :math:`H d`
    (along what ``ascent`` makes of :math:`d`). The result is

    .. math::

        g + r \tau R, \qquad \tau = \frac{\sum \|g\|}{\sum \|R\|}, \qquad
        \epsilon = s\, \frac{\sum \|d\|}{\sum \|R\|},

    that is, :func:`fd_gradreg` with :math:`\gamma = r\tau`. The sums are over the updates that take
    the penalty, and each counts ``decay`` times as much as the next. They are running means of
    :math:`\|g\|/\|R\|` and :math:`\|d\|/\|R\|` in which a batch has the weight :math:`\|R\|`, so
    that a flat batch, whose ratio is huge, has little influence. The correction has on average
    :math:`r` times the norm of the gradient, for every network, optimizer, part of the batch and
    interval, and in no step more than twice that. Up to :math:`r = 1` the result is a descent
    direction. Beyond it training breaks down. With ``strength = reach = 1`` the result is the
    gradient at :math:`\theta + \tau g`, which is SAM with the radius :math:`\rho = \tau\|g\|`.

    **Scale.** The trajectory does not change when the loss is multiplied by a constant and the
    learning rate divided by it, nor when the parameters are scaled by a constant. A loss scale that
    changes between steps (dynamic scaling) looks like losses that change: multiply inside the loss
    and divide at the parameters, so that this transformation receives the unscaled gradient and an
    unscaled loss. The backward pass of this loss is scaled, and its value and gradient are not:

    .. code-block:: python

        @jax.custom_vjp
        def scale_cotangent(x, factor):
            return x

        scale_cotangent.defvjp(
            lambda x, factor: (x, factor),
            lambda factor, ct: (jax.tree.map(lambda c: c * factor, ct), None),
        )

        def scaled(params, batch, scale):
            return scale_cotangent(loss_fn(scale_cotangent(params, 1 / scale), batch), scale)

    **Strength None** is self-tuned on held-out samples and experimental. It follows the share of
    the progress on the training loss that does not appear on held-out samples. That share is
    measured on all progress since the penalty began, at a loss :math:`L_0`, and on recent progress,
    by which the running means :math:`\bar L` have fallen below the means :math:`\hat L` over the
    whole past:

    .. math::

        S = \min\Big( \frac{\bar L_\text{held out} - \bar L - 2\sigma}{L_0 - \bar L},\;
        1 - \frac{\hat L_\text{held out} - \bar L_\text{held out}}{\hat L - \bar L} \Big),

    with :math:`\sigma` the standard error of the gap between the two, estimated from the change of
    the losses between updates. The strength is :math:`r = 12 (S - 0.01)`, clipped to [0, 1], once
    the training loss has fallen by 4.5 times its change from batch to batch, and zero before: on an
    initial plateau S is noise, and a penalty would keep training there. Running means are over some
    fifty penalised updates. Memorisation is penalised; an underfitting model, and single-epoch
    training, are not. The held-out samples are evaluated, not differentiated. In each update take
    as many as a batch has, drawn anew; with fewer the gap stays noisy for longer. They should have
    the distribution of the training samples: the difference to a harder set is mistaken for
    memorisation. Full-batch training has no noise that would reveal a plateau; let it leave the
    plateau first, with ``start``.

    Cost: as for :func:`fd_gradreg`, and norms. A self-tuned strength adds two evaluations of the
    loss (one where ``update`` is given ``value=``, or where the compiler shares it with the
    gradient), each a third of a gradient, on the updates that take the penalty.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      strength: the relative strength :math:`r`, the norm of the correction relative to that of the
        gradient, from 0 to 1; a number, an array, a schedule, or None. More than 1 is allowed, and
        the penalty can outweigh the loss there. With None ``update`` needs ``held_out_fn=``, the
        loss of the parameters on held-out samples (the train step makes it of ``held_out=batch``).
      reach: the ascent step relative to the scale, :math:`s > 0`; a number or a schedule.
      decay: the decay of the sums, in [0, 1); with 0 every step is scaled by its own norms.
      scheme: as for :func:`fd_gradreg`.
      ascent: as for :func:`fd_gradreg`. The length of the direction does not matter.
      interval: as for :func:`fd_gradreg`, with the penalty weighted by it.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`; ``held_out_fn`` returns the value alone.

    Returns:
      A transformation with state :class:`RelativeState`; ``optax.tree.get(state, "strength")``
      reads the strength that was used. Where a ratio is zero or not finite, the updates pass
      through and the scale stays as it was.

    Raises:
      ValueError: strength < 0, reach <= 0, decay outside [0, 1) (if concrete); otherwise as for
        :func:`fd_gradreg`.
      TypeError: strength is None and ``update`` was given no ``held_out_fn=``; otherwise as for
        :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import relative_gradreg
      >>> loss, params = lambda params: jnp.sum(params**2), jnp.array([1.0, 2.0])
      >>> tx = relative_gradreg(strength=0.5)
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates.round(2), state.scale.round(2))  # (1 + 0.5) g; H is 2
      [3. 6.] 0.5

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023. The
      scale and the strength are specific to this package.
    """
    caller = "relative_gradreg"
    check_choice(caller, "scheme", scheme, Scheme)
    loss, schedule = late_loss(caller, loss_fn, has_aux), Schedule.of(caller, interval, start)
    strength_at = hyperparameter(caller, "strength", 0.0 if strength is None else strength)
    reach_at = hyperparameter(caller, "reach", reach)
    decay_at = hyperparameter(caller, "decay", decay)
    tx = ascent_transformation(caller, ascent)
    self_tune = self_tuned(caller, loss)

    def init(params: PyTree) -> RelativeState:
        step, dtype = jnp.zeros([], jnp.int32), default_float()
        first = jnp.asarray(strength_at(step), dtype)
        norms = Norms(*(jnp.zeros([], dtype) for _ in Norms._fields))
        losses = no_losses(dtype) if strength is None else ()
        return RelativeState(step, first, jnp.zeros([], dtype), norms, losses, tx.init(params))

    def penalize(at: Evaluation, updates: PyTree, before: RelativeState) -> Penalised:
        state, dtype = before, before.scale.dtype
        if strength is None:
            state = state._replace(**self_tune(state.losses, at))
        else:
            state = state._replace(strength=strength_at(state.step).astype(dtype))
        gradient = updates if at.reuse_updates else at.grad_fn(at.params)[0]
        direction, ascent = tx.update(gradient, state.ascent, at.params)
        epsilon = _epsilon(state.norms, reach_at(state.step).astype(dtype), at.params, direction)
        estimate = difference(
            at.grad_fn,
            at.params,
            lambda _: (direction, ascent),
            epsilon=epsilon,
            scheme=scheme,
            gradient=gradient,
        )
        now = Norms(*(global_norm(x).astype(dtype) for x in (updates, gradient, estimate.product)))
        state, gamma = _measured(
            state._replace(ascent=ascent), now, decay_at(state.step).astype(dtype)
        )
        penalised = add_penalty(updates, at.gamma.astype(dtype) * gamma, estimate.product)
        return penalised, keep_finite(state, before, now)  # a norm is finite where its tree is

    penalty = Penalty(init, lambda _: jnp.ones([], default_float()), penalize)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def _measured(
    state: RelativeState, now: Norms, decay: jax.Array
) -> tuple[RelativeState, jax.Array]:
    """The scale with this update's norms, and gamma; zero where their ratio is not finite."""
    bound = _BOUND * ratio(now.gradient, now.product)
    norms = _remembered(state.norms, now, decay)
    scale = jnp.minimum(ratio(norms.gradient, norms.product), bound)
    scale = jnp.where(bound > 0, scale, state.scale)
    gamma = jnp.where(bound > 0, state.strength * scale, 0)
    return state._replace(scale=scale, norms=norms), gamma


def _epsilon(norms: Norms, reach: jax.Array, params: PyTree, direction: PyTree) -> jax.Array:
    """The ascent step; the first is a hundredth of the length of the parameters."""
    first = ratio(*(global_norm(x).astype(reach.dtype) for x in (params, direction)))
    known = norms.product > 0
    return jnp.where(known, reach * ratio(norms.own, norms.product), _FIRST_REACH * first)


def _remembered(norms: Norms, now: Norms, decay: jax.Array) -> Norms:
    """The sums with this update's norms; as they were, if a ratio is zero or not finite."""
    counts = (ratio(now.gradient, now.product) > 0) & (ratio(now.own, now.product) > 0)
    return Norms(
        *(jnp.where(counts, decay * old + new, old) for old, new in zip(norms, now, strict=True))
    )
