"""The frame of every penalised transformation: which loss, which gradient, on which updates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._estimators import Point
from gradreg_optax._guard import compare
from gradreg_optax._numerics import keep_finite, owned
from gradreg_optax._types import AtStep, GradFn, LateLoss, PyTree
from gradreg_optax._validation import (
    check_like,
    check_params,
    check_same_state,
    check_step,
    flag,
    whole_number,
)


class Timing(NamedTuple):
    """The updates that take a penalty: ``start``, and every ``interval``-th from there on."""

    interval: Any
    start: Any

    @property
    def always(self) -> bool:
        """Whether it is every update, known before the program runs."""
        return isinstance(self.interval, int) and self.interval == 1 and self._from_the_first

    @property
    def _from_the_first(self) -> bool:
        return isinstance(self.start, int) and self.start == 0

    def due(self, step: jax.Array) -> jax.Array:
        """Whether the update at ``step`` takes it."""
        interval, start = (jnp.asarray(n, step.dtype) for n in self)
        due: jax.Array = (step - start) % interval == 0
        return due if self._from_the_first else due & (step >= start)

    def weigh(self, weight: jax.Array) -> jax.Array:
        """``weight`` times the interval, so that the average over the updates stays."""
        if isinstance(self.interval, int) and self.interval == 1:
            return weight
        interval = jnp.asarray(self.interval, weight.dtype)
        largest = float(np.finfo(weight.dtype).max) / 2
        return jnp.minimum(weight, largest / interval) * interval


class Penalty(NamedTuple):
    """What a transformation does on the updates that are due.

    Attributes:
      state: the type of its state, a NamedTuple with a counter called ``step``.
      init: ``params -> state``.
      weight: the factor at a step, evaluated on every update.
      apply: ``(updates, state, point, weight, extra_args) -> (updates, state, estimate of H d)``;
        the counter is not its business.
    """

    state: type
    init: Callable[[PyTree], Any]
    weight: AtStep
    apply: Callable[..., tuple[PyTree, Any, PyTree]]


def timing(caller: str, interval: Any, start: Any) -> Timing:
    """When a penalty is due, checked."""
    return Timing(whole_number(caller, "interval", interval), whole_number(caller, "start", start))


def penalized(
    caller: str, bind: LateLoss, penalty: Penalty, when: Timing, reuse_updates: bool
) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies ``penalty`` on the updates that are due."""
    reuse_by_default = flag(caller, "reuse_updates", reuse_updates)

    def init(params: PyTree) -> Any:
        check_params(caller, params)
        return owned(penalty.init(params))

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        reuse_updates: bool = reuse_by_default,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        grad_fn = gradient_of(caller, bind, updates, params, extra_args)
        check_same_state(caller, state, jax.eval_shape(penalty.init, params))
        reuse = flag(caller, "reuse_updates", reuse_updates)
        weight = when.weigh(penalty.weight(state.step))
        branch_grad_fn = grad_fn if when.always else jax.jit(grad_fn)  # a branch traces it once

        def penalize(updates: PyTree, state: Any) -> tuple[PyTree, Any]:
            gradient = updates if reuse else None
            if reuse:
                compare(caller, branch_grad_fn, params, updates, due)
            point = Point(branch_grad_fn, params, gradient, state.step)
            penalised, after, estimate = penalty.apply(updates, state, point, weight, extra_args)
            return penalised, _kept(after, state, penalised, estimate)

        due = True if when.always else when.due(check_step(caller, state.step))
        if when.always:
            updates, state = penalize(updates, state)
        else:
            branch = canonical_convolutions(jax.jit(penalize))
            updates, state = jax.lax.cond(due, branch, lambda *given: given, updates, state)
        return updates, state._replace(step=advanced(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(after: Any, state: Any, *evaluated: PyTree) -> Any:
    """The state after an update; as before if it, or what was evaluated, is not finite."""
    numbers, before = after._replace(step=None), state._replace(step=None)
    if not jax.tree.leaves(numbers):
        return after
    return keep_finite(numbers, before, *evaluated)._replace(step=after.step)


def gradient_of(
    caller: str, bind: LateLoss, updates: PyTree, params: PyTree, extra_args: Mapping[str, Any]
) -> GradFn:
    """The gradient of this update's loss, ``params -> (gradient, None)``."""
    grad = jax.grad(bind(params, extra_args))
    check_like(caller, "updates", updates, params)
    return lambda point: (grad(point), None)


def advanced(step: jax.Array | None) -> jax.Array | None:
    """The counter of the next update; None where nobody counts."""
    return None if step is None else optax.safe_increment(step)
