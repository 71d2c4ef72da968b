"""The penalty relative to the gradient: one number to choose, or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradreg_optax._estimators import (
    Direction,
    Point,
    add_penalty,
    ascent_direction,
    difference,
    global_norm,
)
from gradreg_optax._loss import late_loss, with_aux
from gradreg_optax._numerics import default_float, keep_finite
from gradreg_optax._penalized import Penalty, penalized, timing
from gradreg_optax._types import Ascent, AtStep, LateLoss, LossFn, PyTree, ScalarOrSchedule, Scheme
from gradreg_optax._validation import check_choice, hyperparameter, scalar

_CALLER = "relative_gradreg"
_FIRST_REACH = 0.01  # of the length of the parameters: the first step knows no curvature yet
_BOUND = 2.0  # times its share is the most that the penalty takes of any single step
_MEMORY = 0.98  # of the losses, per update that takes the penalty
_NOISE = 4.5  # times the change of the loss from batch to batch: less progress says nothing
_ERRORS = 2.0  # standard errors by which a gap has to be more than noise
_TOLERATED = 0.01  # the share of the progress that need not carry over
_GAIN = 12.0  # of the strength, where it is more


class Norms(NamedTuple):
    """Sums of norms over the updates that took the penalty, older ones weighing less.

    Attributes:
      gradient: of the incoming updates, |g|; shape ().
      own: of the gradient that the penalty is taken of, |d|; shape ().
      product: of the difference estimate, |R|; shape (). Zero before the first.
    """

    gradient: jax.Array
    own: jax.Array
    product: jax.Array


class Losses(NamedTuple):
    """What a strength that tunes itself remembers.

    Attributes:
      start: the training loss where the penalty began; shape ().
      taken: number of updates that took the penalty; shape ().
      past: means over these updates of the training and the held-out loss; shape (2,).
      recent: running means of both; shape (2,).
      last: the last losses; shape (2,).
      change: running means of how much they change from one such update to the next; shape (2,).
    """

    start: jax.Array
    taken: jax.Array
    past: jax.Array
    recent: jax.Array
    last: jax.Array
    change: jax.Array


class RelativeState(NamedTuple):
    """State of :func:`relative_gradreg`.

    Attributes:
      step: number of updates so far, skipped ones included; shape (), int32.
      strength: the penalty's share of the step, as last used; shape ().
      scale: the coefficient of a penalty of strength one, as last used; shape ().
      norms: what the scale is made of.
      losses: what a strength that tunes itself is made of; of another it has no leaves.
      ascent: the state of an ``ascent`` that is an Optax transformation.
    """

    step: jax.Array
    strength: jax.Array
    scale: jax.Array
    norms: Norms
    losses: Losses | tuple[()] = ()
    ascent: optax.OptState = ()


# What the strength is: (state, point, extra_args) -> state with the strength of this update
_Strength: TypeAlias = Callable[[RelativeState, Point, Mapping[str, Any]], RelativeState]


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
    r"""Gradient regularization whose share of the step is chosen, or finds itself.

    With :math:`g` the incoming gradient, :math:`d` the gradient that the penalty is taken of (the
    same, or that of a part of the batch) and :math:`R` the difference estimate of :math:`H d`
    (along what ``ascent`` makes of it), the result is

    .. math::

        g + r \tau R, \qquad \tau = \frac{\sum \|g\|}{\sum \|R\|}, \qquad
        \epsilon = s\, \frac{\sum \|d\|}{\sum \|R\|},

    sums over the updates that take the penalty, in which each counts ``decay`` times as much as
    the next: running means of :math:`\|g\|/\|R\|` and :math:`\|d\|/\|R\|` in which a batch counts
    by its :math:`\|R\|`, so that a flat one, whose ratio is huge, cannot carry them away. So the
    correction has :math:`r` times the norm of the gradient on average, whatever the network, the
    optimizer, the part of the batch and the interval; in no step has it more than twice that. Up to
    :math:`r = 1` the result is a direction of descent, and beyond it training breaks down. The
    trajectory stays the same when the loss is multiplied by a constant and the learning rate
    divided by it, and in parameters that are scaled by a constant.

    In the terms of :func:`fd_gradreg`, :math:`\gamma = r\tau`; with ``strength = reach = 1`` the
    result is the gradient at :math:`\theta + \tau g`, that of SAM with a radius
    :math:`\rho = \tau\|g\|` set by the curvature.

    **Strength None** tunes itself on held-out samples. It measures which share of the progress on
    the training loss does not carry over to them: of all progress since the penalty began, at a
    loss :math:`L_0`, and of that of late, by which the running means have come below the means
    :math:`\hat L` over the whole past,

    .. math::

        S = \min\Big( \frac{\bar L_\text{held out} - \bar L - 2\sigma}{L_0 - \bar L},\;
        1 - \frac{\hat L_\text{held out} - \bar L_\text{held out}}{\hat L - \bar L} \Big),

    with :math:`\sigma` the standard error of the gap between the two, known from how much the
    losses change from one update to the next. The strength is :math:`r = 12 (S - 0.01)`, kept
    within [0, 1], once the training loss has come down by 4.5 times as much as it changes from one
    batch to the next, and zero before: on a plateau, where a training may begin, S is noise, and a
    penalty would hold it there. Running means are over some fifty penalised updates. What is
    memorised is penalised; while a model still learns what holds elsewhere too, or where every
    sample is seen once, there is no penalty. The held-out samples are evaluated, not
    differentiated; take as many of them in an update as a batch has, drawn anew each time: with
    fewer, the gap is noise for longer. They should come from where the training samples do: a set
    that is harder by itself reads as if its difference had been memorised. Where all samples are in
    every batch there is no noise to tell a plateau by: let the training leave it first, with
    ``start``.

    Cost: as for :func:`fd_gradreg`, and norms. A strength that tunes itself adds two evaluations of
    the loss (one where ``update`` is given ``value=``, or where the compiler shares it with the
    gradient), each a third of a gradient, on the updates that take the penalty.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      strength: the penalty's share of the step :math:`r`, from 0 to 1; a number, an array, a
        schedule, or None. More than 1 is allowed, and past the point where the penalty can outweigh
        the loss. With None ``update`` needs ``held_out_fn=``, the loss of the parameters on
        held-out samples (the train step makes it of ``held_out=batch``).
      reach: the ascent step relative to the scale, :math:`s > 0`; a number or a schedule.
      decay: the memory of the sums, in [0, 1); 0 takes the share of every single step.
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
      ValueError: strength < 0, reach <= 0, decay outside [0, 1) (where concrete); otherwise as for
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
      scale and the strength are this package's own.
    """
    check_choice(_CALLER, "scheme", scheme, Scheme)
    bind, when = late_loss(_CALLER, loss_fn, has_aux), timing(_CALLER, interval, start)
    given = None if strength is None else hyperparameter(_CALLER, "strength", strength)
    strengthen = _self_tuned(bind) if given is None else _given(given)
    rates = hyperparameter(_CALLER, "reach", reach), hyperparameter(_CALLER, "decay", decay)
    ascending = ascent_direction(_CALLER, ascent)
    init, apply = _initial(given, ascending[0]), _applied(strengthen, rates, scheme, ascending[1])
    penalty = Penalty(RelativeState, init, lambda _: jnp.ones([], default_float()), apply)
    return penalized(_CALLER, bind, penalty, when, reuse_updates)


def _initial(
    given: AtStep | None, init_ascent: Callable[[PyTree], optax.OptState]
) -> Callable[[PyTree], RelativeState]:
    """The state before the first update; without a given strength it is zero."""

    def init(params: PyTree) -> RelativeState:
        step, zero = jnp.zeros([], jnp.int32), jnp.zeros([], default_float())
        return RelativeState(
            step=step,
            strength=zero if given is None else jnp.asarray(given(step), zero.dtype),
            scale=zero,
            norms=Norms(zero, zero, zero),
            losses=_no_losses(zero) if given is None else (),
            ascent=init_ascent(params),
        )

    return init


def _applied(
    strengthen: _Strength, rates: tuple[AtStep, AtStep], scheme: Scheme, direction_of: Direction
) -> Callable[..., tuple[PyTree, RelativeState, PyTree]]:
    """Adds the penalty, its share of the step measured."""

    def apply(
        updates: PyTree,
        state: RelativeState,
        point: Point,
        weight: jax.Array,
        extra_args: Mapping[str, Any],
    ) -> tuple[PyTree, RelativeState, PyTree]:
        state = strengthen(state, point, extra_args)
        dtype = state.scale.dtype
        reach, decay = (at(point.step).astype(dtype) for at in rates)
        gradient = point.grad_fn(point.params)[0] if point.gradient is None else point.gradient
        direction, ascent = direction_of(point._replace(ascent=state.ascent), gradient)
        epsilon = _epsilon(state.norms, reach, point.params, direction)
        along = difference(_CALLER, lambda _: epsilon, scheme, lambda *_: direction)
        product = along.estimate(point._replace(gradient=gradient)).product
        now = Norms(*(global_norm(x).astype(dtype) for x in (updates, gradient, product)))
        state, gamma = _measured(state._replace(ascent=ascent), now, decay)
        return add_penalty(updates, weight.astype(dtype) * gamma, product), state, product

    return apply


def _measured(
    state: RelativeState, now: Norms, decay: jax.Array
) -> tuple[RelativeState, jax.Array]:
    """The scale with this update's norms, and gamma; zero where their ratio says nothing."""
    bound = _BOUND * _ratio(now.gradient, now.product)
    norms = _remembered(state.norms, now, decay)
    scale = jnp.minimum(_ratio(norms.gradient, norms.product), bound)
    scale = jnp.where(bound > 0, scale, state.scale)
    gamma = jnp.where(bound > 0, state.strength * scale, 0)
    return state._replace(scale=scale, norms=norms), gamma


def _epsilon(norms: Norms, reach: jax.Array, params: PyTree, direction: PyTree) -> jax.Array:
    """The ascent step; the first is a hundredth of the length of the parameters."""
    first = _ratio(*(global_norm(x).astype(reach.dtype) for x in (params, direction)))
    known = norms.product > 0
    return jnp.where(known, reach * _ratio(norms.own, norms.product), _FIRST_REACH * first)


def _remembered(norms: Norms, now: Norms, decay: jax.Array) -> Norms:
    """The sums with this update's norms; as they were, if a ratio is zero or not finite."""
    counts = (_ratio(now.gradient, now.product) > 0) & (_ratio(now.own, now.product) > 0)
    return Norms(
        *(jnp.where(counts, decay * old + new, old) for old, new in zip(norms, now, strict=True))
    )


def _ratio(length: jax.Array, by: jax.Array) -> jax.Array:
    """``length / by``, and zero where that is not a finite number."""
    sound = jnp.isfinite(length) & jnp.isfinite(by) & (by > 0)
    ratio = jnp.where(sound, length, 0) / jnp.where(sound, by, 1)
    return jnp.where(jnp.isfinite(ratio), ratio, 0)


def _given(strength: AtStep) -> _Strength:
    """A strength that the user chose."""

    def strengthen(state: RelativeState, point: Point, _: Mapping[str, Any]) -> RelativeState:
        return state._replace(strength=strength(point.step).astype(state.strength.dtype))

    return strengthen


def _self_tuned(bind: LateLoss) -> _Strength:
    """A strength that follows the share of the progress that does not carry over."""

    def strengthen(
        state: RelativeState, point: Point, extra_args: Mapping[str, Any]
    ) -> RelativeState:
        held_out_fn, value = extra_args.get("held_out_fn"), extra_args.get("value")
        if held_out_fn is None:
            raise TypeError(
                f"{_CALLER}: strength=None tunes itself on held-out samples: pass update(...,"
                " held_out_fn=) with their loss as a function of the parameters, or"
                " step(..., held_out=batch) to the train step, or choose a strength from 0 to 1."
            )
        if value is None:
            value = bind(point.params, extra_args)(point.params)
        value = scalar(_CALLER, "value", value)
        held_out, _ = with_aux(_CALLER, held_out_fn, has_aux=False)(point.params)
        dtype = state.strength.dtype
        return _learnt(state, value.astype(dtype), held_out.astype(dtype))

    return strengthen


def _no_losses(zero: jax.Array) -> Losses:
    pair = jnp.zeros(2, zero.dtype)
    return Losses(start=zero, taken=zero, past=pair, recent=pair, last=pair, change=pair)


def _learnt(state: RelativeState, training: jax.Array, held_out: jax.Array) -> RelativeState:
    """The losses remembered and the strength that follows them; nothing of one that is not finite.

    The smaller of the two shares counts: the first alone takes a held-out set that is harder from
    the start for something memorised, the second alone forgets what has been memorised.
    """
    old: Any = state.losses
    now, taken = jnp.stack([training, held_out]), old.taken + 1
    step = (1 - _MEMORY) / (1 - _MEMORY**taken)
    change = jnp.where(old.taken > 0, jnp.abs(now - old.last), 0)
    losses = Losses(
        start=jnp.where(old.taken > 0, old.start, training),
        taken=taken,
        past=old.past + (now - old.past) / taken,
        recent=old.recent + (now - old.recent) * step,
        last=now,
        change=old.change + (change - old.change) * step,
    )
    losses = keep_finite(losses, old)
    progress = losses.start - losses.recent[0]
    asked = jnp.clip(_GAIN * (_lost(losses, progress) - _TOLERATED), 0, 1)
    strength = jnp.where(_ratio(progress, losses.change[0]) > _NOISE, asked, 0)
    return state._replace(strength=strength, losses=losses)


def _lost(losses: Losses, progress: jax.Array) -> jax.Array:
    """The share of the progress on the training loss, of all and of late, that is memory."""
    gap = losses.recent[1] - losses.recent[0] - _ERRORS * _error(losses)
    fallen = losses.past - losses.recent
    return jnp.minimum(_ratio(gap, progress), _ratio(fallen[0] - fallen[1], fallen[0]))


def _error(losses: Losses) -> jax.Array:
    """The standard error of the difference of the two running means.

    Noise of deviation s changes by 2s / sqrt(pi) on average, if it is normal.
    """
    left = _MEMORY ** jnp.maximum(losses.taken, 1)  # of the weight of what was before the first
    fewer = (1 - _MEMORY) * (1 + left) / ((1 + _MEMORY) * (1 - left))
    return jnp.sqrt(fewer * math.pi / 4 * jnp.sum(losses.change**2))
