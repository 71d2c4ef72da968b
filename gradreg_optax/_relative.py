"""A penalty scaled relative to the gradient norm: gamma and epsilon follow from measured norms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradreg_optax._ascent import ascent_transformation
from gradreg_optax._estimators import Point, add_penalty, difference
from gradreg_optax._loss import late_loss
from gradreg_optax._numerics import default_float, global_norm, keep_finite, ratio
from gradreg_optax._self_tuning import Losses, no_losses, self_tuned
from gradreg_optax._transforms import Evaluation, Penalised, Penalty, Schedule, penalized
from gradreg_optax._types import Ascent, LossFn, PyTree, ScalarOrSchedule, Scheme
from gradreg_optax._validation import check_choice, hyperparameter

_FIRST_REACH = 0.01  # the first ascent step, in units of the norm of the parameters
_BOUND = 2.0  # the largest correction of a step, in units of strength * gradient norm


class Norms(NamedTuple):
    """Decaying sums of norms over the updates that applied the penalty.

    Attributes:
      gradient: of the incoming updates, |g|; shape ().
      own: of the penalised gradient, |d|; shape ().
      product: of the difference estimate, |R|; shape (). Zero before the first update.
    """

    gradient: jax.Array
    own: jax.Array
    product: jax.Array


class RelativeState(NamedTuple):
    """State of :func:`relative_gradreg`.

    Attributes:
      step: number of updates so far, including those without a penalty; shape (), int32.
      strength: the relative strength that was last used; shape ().
      scale: the last gamma of strength 1, so that gamma is strength times scale; shape ().
      norms: the sums that determine the scale.
      losses: the statistics of a self-tuned strength; without leaves for a fixed strength.
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

    Let :math:`g` be the incoming gradient, :math:`d` the penalised gradient (:math:`g`, or that of
    a part of the batch) and :math:`R` the finite-difference estimate of :math:`H d`, or of the
    product with the direction that ``ascent`` computes from :math:`d`. The result is

    .. math::

        g + r \tau R, \qquad \tau = \frac{\sum \|g\|}{\sum \|R\|}, \qquad
        \epsilon = s\, \frac{\sum \|d\|}{\sum \|R\|},

    that is, :func:`fd_gradreg` with :math:`\gamma = r\tau`. The sums run over the updates that
    apply the penalty, and decay by the factor ``decay`` per update. Their quotients are running
    means of :math:`\|g\|/\|R\|` and :math:`\|d\|/\|R\|` with the weights :math:`\|R\|`, so that a
    batch with small curvature, and a huge ratio, has little influence.

    The norm of the correction is on average :math:`r` times that of the gradient, for every
    network, optimizer, part of the batch and interval. In a single step it is at most twice that.
    Up to :math:`r = 1` the result is a descent direction. For :math:`r > 1` the penalty can
    outweigh the loss. With ``strength = reach = 1`` the result is the gradient at
    :math:`\theta + \tau g`, which is SAM with the radius :math:`\rho = \tau\|g\|`.

    **Scale.** The trajectory does not change if the loss is multiplied by a constant and the
    learning rate divided by it, or if the parameters are scaled by a constant. A loss scale that
    changes between steps (dynamic loss scaling) would change the measured norms. Apply it inside
    the loss: multiply the cotangent of the value, and divide the cotangent of the parameters. The
    backward pass of this loss is scaled, but its value and gradient are not:

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

    **Strength None** is experimental: the strength is self-tuned on held-out samples. On tasks
    that had no part in its design it kept 0 to 86 % of the gain of a tuned strength. It follows the
    fraction :math:`S` of the decrease of the training loss that does not appear on held-out
    samples. The fraction is measured on the total decrease since the first penalty, at the loss
    :math:`L_0`, and on the recent decrease, from the means :math:`\hat L` over all these updates to
    the running means :math:`\bar L`. The smaller of the two is used:

    .. math::

        S = \min\Big( \frac{\bar V - \bar L - 2\sigma}{L_0 - \bar L},\;
        1 - \frac{\hat V - \bar V}{\hat L - \bar L} \Big),

    where :math:`V` is the loss on held-out samples, and :math:`\sigma` the standard error of the
    gap, estimated from the changes of the losses. The strength is :math:`r = 12 (S - 0.01)`,
    clipped to [0, 1], after the training loss has decreased by 4.5 times its change from batch to
    batch. Before that it is zero: on an initial plateau :math:`S` is noise, and a penalty could
    prevent the escape. Running means cover about 50 penalised updates. The rule penalises
    memorisation. It does not penalise an underfitting model or single-epoch training.

    The held-out loss is evaluated, not differentiated. Use a new random sample of the held-out data
    in every update, as large as a batch; with fewer samples the gap is noisy for longer. The
    held-out data should have the distribution of the training data, because a harder set looks like
    memorisation. Full-batch training has no noise to detect a plateau by: use ``start`` to leave
    the plateau first.

    Cost:
      As for :func:`fd_gradreg`, and a few norms. On the updates that apply the penalty, a
      self-tuned strength adds two evaluations of the loss, each a third of a gradient; only one if
      ``update`` receives ``value=``, or if the compiler shares it with the gradient.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      strength: the relative strength :math:`r`, the norm of the correction divided by the norm of
        the gradient, from 0 to 1; a number, an array, a schedule, or None. Values above 1 are
        allowed. With None, ``update`` needs ``held_out_fn=``, the loss on held-out samples as a
        function of the parameters; the train step creates it from ``held_out=batch``.
      reach: the ascent step relative to the scale, :math:`s > 0`; a number or a schedule.
      decay: the decay of the sums, in [0, 1); with 0 every step is scaled by its own norms.
      scheme: as for :func:`fd_gradreg`.
      ascent: as for :func:`fd_gradreg`. The length of the direction does not matter.
      interval: as for :func:`fd_gradreg`. The penalty is multiplied by it.
      start: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`; ``held_out_fn`` returns the value alone.

    Returns:
      A transformation with state :class:`RelativeState`; ``optax.tree.get(state, "strength")``
      returns the strength that was used. If a ratio of norms is zero or not finite, the updates
      pass unchanged and the scale does not change.

    Raises:
      ValueError: strength < 0, reach <= 0, decay outside [0, 1) (if concrete); otherwise as for
        :func:`fd_gradreg`.
      TypeError: strength is None and ``update`` receives no ``held_out_fn=``; otherwise as for
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

    def init(params: PyTree) -> RelativeState:
        step, dtype = jnp.zeros([], jnp.int32), default_float()
        first = jnp.asarray(strength_at(step), dtype)
        norms = Norms(*(jnp.zeros([], dtype) for _ in Norms._fields))
        losses = no_losses(dtype) if strength is None else ()
        return RelativeState(step, first, jnp.zeros([], dtype), norms, losses, tx.init(params))

    def penalize(at: Evaluation, updates: PyTree, before: RelativeState) -> Penalised:
        state, dtype = before, before.scale.dtype
        if strength is None:
            state = state._replace(**self_tuned(caller, loss, state.losses, at))
        else:
            state = state._replace(strength=strength_at(state.step).astype(dtype))
        own = at.gradient(updates)
        if own is None:
            own, _ = at.grad_fn(at.params)
        climbed = tx.update(own, state.ascent, at.params)
        epsilon = _epsilon(state.norms, reach_at(state.step).astype(dtype), at.params, climbed[0])
        point = Point(at.grad_fn, at.params, lambda _: climbed, own)
        estimate = difference(point, epsilon=epsilon, scheme=scheme)
        now = Norms(*(global_norm(x).astype(dtype) for x in (updates, own, estimate.product)))
        state, gamma = _measured(
            state._replace(ascent=estimate.ascent), now, decay_at(state.step).astype(dtype)
        )
        penalised = add_penalty(updates, at.gamma.astype(dtype) * gamma, estimate.product)
        return penalised, keep_finite(state, before, now)  # a norm is finite where its tree is

    penalty = Penalty(init, lambda _: jnp.ones([], default_float()), penalize)
    return penalized(caller, loss, penalty, schedule, reuse_updates)


def _measured(
    state: RelativeState, now: Norms, decay: jax.Array
) -> tuple[RelativeState, jax.Array]:
    """Return the state with the new scale, and gamma.

    The norms are added to the sums unless a ratio is zero or not finite; gamma is 0 then.
    """
    bound = _BOUND * ratio(now.gradient, now.product)
    counts = (bound > 0) & (ratio(now.own, now.product) > 0)
    norms = jax.tree.map(lambda s, n: jnp.where(counts, decay * s + n, s), state.norms, now)
    scale = jnp.minimum(ratio(norms.gradient, norms.product), bound)
    scale = jnp.where(bound > 0, scale, state.scale)
    gamma = jnp.where(bound > 0, state.strength * scale, 0)
    return state._replace(scale=scale, norms=norms), gamma


def _epsilon(norms: Norms, reach: jax.Array, params: PyTree, direction: PyTree) -> jax.Array:
    """Return the ascent step; the first one moves the parameters by 1 % of their norm."""
    first = ratio(*(global_norm(x).astype(reach.dtype) for x in (params, direction)))
    known = norms.product > 0
    return jnp.where(known, reach * ratio(norms.own, norms.product), _FIRST_REACH * first)
