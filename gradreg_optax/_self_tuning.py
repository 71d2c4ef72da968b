"""The self-tuned strength of ``relative_gradreg(strength=None)``. Experimental."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradreg_optax._loss import with_aux
from gradreg_optax._numerics import keep_finite, ratio
from gradreg_optax._transforms import Evaluation
from gradreg_optax._types import LateLoss
from gradreg_optax._validation import scalar

_MEMORY = 0.98  # decay of the running means, per update that applies the penalty
_NOISE = 4.5  # a smaller decrease, in units of the change from batch to batch, may be noise
_ERRORS = 2.0  # standard errors that are subtracted from the gap
_TOLERATED = 0.01  # the fraction of the decrease that may be a generalization gap
_GAIN = 12.0  # the strength per unit of a larger fraction


class Losses(NamedTuple):
    """Statistics of the training and the held-out loss.

    Attributes:
      start: the training loss at the first penalty; shape ().
      taken: number of updates that applied the penalty; shape ().
      past: means of the training and the held-out loss over these updates; shape (2,).
      recent: running means of both; shape (2,).
      last: the last losses; shape (2,).
      change: running means of their absolute change between two such updates; shape (2,).
    """

    start: jax.Array
    taken: jax.Array
    past: jax.Array
    recent: jax.Array
    last: jax.Array
    change: jax.Array


def no_losses(dtype: Any) -> Losses:
    """Return the statistics before the first update."""
    zeros = (jnp.zeros(shape, dtype) for shape in ((), (), 2, 2, 2, 2))
    return Losses(*zeros)


def self_tuned(caller: str, bind: LateLoss, losses: Any, at: Evaluation) -> dict[str, Any]:
    """Return the strength and the new statistics of an update."""
    held_out_fn, value = at.extra_args.get("held_out_fn"), at.extra_args.get("value")
    if held_out_fn is None:
        raise TypeError(
            f"{caller}: strength=None needs held-out samples, got no held_out_fn. Call"
            " update(..., held_out_fn=) with their loss as a function of the parameters, or the"
            " train step with step(..., held_out=batch), or choose a strength from 0 to 1."
        )
    if value is None:
        value = bind(at.params, at.extra_args)(at.params)
    held_out, _ = with_aux(caller, held_out_fn, has_aux=False)(at.params)
    dtype = losses.start.dtype
    training = scalar(caller, "value", value).astype(dtype)
    losses = _update_losses(losses, training, held_out.astype(dtype))
    return {"strength": _strength(losses), "losses": losses}


def _update_losses(old: Losses, training: jax.Array, held_out: jax.Array) -> Losses:
    """Add the losses of this update to the statistics, unless one is not finite."""
    now, taken = jnp.stack([training, held_out]), old.taken + 1
    rate = (1 - _MEMORY) / (1 - _MEMORY**taken)
    change = jnp.where(old.taken > 0, jnp.abs(now - old.last), 0)
    new = Losses(
        start=jnp.where(old.taken > 0, old.start, training),
        taken=taken,
        past=old.past + (now - old.past) / taken,
        recent=old.recent + (now - old.recent) * rate,
        last=now,
        change=old.change + (change - old.change) * rate,
    )
    return keep_finite(new, old)


def _strength(losses: Losses) -> jax.Array:
    """Return the strength, which is zero while the decrease of the training loss may be noise."""
    progress = losses.start - losses.recent[0]
    wanted = jnp.clip(_GAIN * (_generalization_gap_share(losses, progress) - _TOLERATED), 0, 1)
    return jnp.where(ratio(progress, losses.change[0]) > _NOISE, wanted, 0)


def _generalization_gap_share(losses: Losses, progress: jax.Array) -> jax.Array:
    """The fraction of the decrease of the training loss that does not appear on held-out samples.

    It is the smaller of two fractions, of the total and of the recent decrease. The total alone
    would confuse a harder held-out set with memorisation. The recent alone would ignore earlier
    memorisation.
    """
    gap = losses.recent[1] - losses.recent[0] - _ERRORS * _gap_error(losses)
    fallen = losses.past - losses.recent
    return jnp.minimum(ratio(gap, progress), ratio(fallen[0] - fallen[1], fallen[0]))


def _gap_error(losses: Losses) -> jax.Array:
    """The standard error of the difference of the two running means.

    Between two samples, normal noise of standard deviation s changes by 2s / sqrt(pi) on average.
    """
    left = _MEMORY ** jnp.maximum(losses.taken, 1)  # weight that no update has filled yet
    fewer = (1 - _MEMORY) * (1 + left) / ((1 + _MEMORY) * (1 - left))
    return jnp.sqrt(fewer * math.pi / 4 * jnp.sum(losses.change**2))
