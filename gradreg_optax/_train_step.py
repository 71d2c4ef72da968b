"""Train steps: a regularizer, an optimizer and a loss in one jitted function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax import _validation as validation
from gradreg_optax._arguments import Offer, accepts, named_arguments, signature_of
from gradreg_optax._batching import split_batch
from gradreg_optax._loss import with_weight
from gradreg_optax._numerics import ASCENT_GROUPS, cast, global_norm, owned, widen
from gradreg_optax._regularized_pass import (
    REGULARIZER_STATES,
    Call,
    Pass,
    RegularizedPass,
    check_once,
)
from gradreg_optax._types import Args, Kwargs, LossFn, PyTree


class TrainState(NamedTuple):
    """State of a train step.

    Attributes:
      params: the parameters.
      opt_state: the pair (regularizer's state, optimizer's state), as in ``optax.chain``.
      step: number of steps taken; shape (), int32.
    """

    params: PyTree
    opt_state: optax.OptState
    step: jax.Array


class StepInfo(NamedTuple):
    """Metrics of a step, at the parameters before the step.

    Attributes:
      loss: the loss on the batch, without the penalty; shape ().
      grad_norm: the norm of its gradient; shape (). With ``ascent_groups`` it is the root mean
        square of the gradient norms of the groups, which is the penalised quantity then and needs
        no further communication.
      aux: aux of the loss, or None; with ``ascent_groups`` stacked along a leading axis.
    """

    loss: jax.Array
    grad_norm: jax.Array
    aux: Any


class TrainStep(NamedTuple):
    """The pair of functions that :func:`make_train_step` returns.

    Attributes:
      init: ``init(params) -> state``, a :class:`TrainState`.
      step: ``step(state, batch, *args, **kwargs) -> (state, info)``, jitted, with a
        :class:`StepInfo`.
    """

    init: Callable[[PyTree], TrainState]
    step: Callable[..., tuple[TrainState, StepInfo]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    regularizer: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
    penalty_fraction: float = 1.0,
    ascent_groups: int = 1,
    donate: bool = True,
    static_argnames: str | Sequence[str] = (),
) -> TrainStep:
    r"""Return a jitted train step that chains a regularizer with any Optax optimizer.

    A step evaluates :math:`L` and :math:`g = \nabla L` on the batch. The regularizer replaces
    :math:`g` by the regularized gradient, and the optimizer receives the result, together with
    Optax's ``value``, ``grad`` and ``value_fn`` of the unregularized loss. Both passes use the same
    batch and arguments, such as a dropout key. Loss, gradient norm and aux (such as BatchNorm
    statistics) come from the first pass, at the parameters before the step.

    Cost:
      One gradient, and the n gradients that the regularizer adds. With ``interval`` = k that is
      1 + n/k per step, and with ``penalty_fraction`` = f < 1 as well it is 1 + (n + 1) f/k: F-GR
      costs 1 + 2f/k.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs)``, which returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      optimizer: any Optax optimizer.
      regularizer: ``fd_gradreg(...)``, ``dbp_gradreg(...)``, ``flooding(...)``, a chain of them, or
        None. It uses ``loss_fn``, unless it was constructed with another loss. In that case pass
        ``reuse_updates=False`` to it, because the incoming gradient is that of ``loss_fn``; its
        loss gets its arguments by name from those of ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: evaluate the penalty on the first f of the batch's leading axis (rounded
        up), with the gradient of that sub-batch; with ``ascent_groups``, on the first f of every
        group. Arguments after the batch are not split: write ``loss_fn(params, (x, y))``. On b
        samples the penalised quantity is :math:`\|g\|^2 + \operatorname{tr}\Sigma / b` on average,
        with the covariance :math:`\Sigma` of the per-sample gradients. So a smaller f needs a
        smaller gamma (see :func:`~gradreg_optax.curvature.penalty_scale`). Needs a transformation
        of this package.
      ascent_groups: split the batch into m groups, perturb each along its own gradient, and average
        the results (m-sharpness). On a data-parallel mesh, with m a multiple of the number of
        devices, this needs one all-reduce instead of two. The penalised quantity is the mean of
        :math:`\|g_m\|^2` over the groups, which is larger than :math:`\|g\|^2`. If the groups have
        different weights (a mean over unpadded tokens), return ``Weighted`` from the loss. State of
        a regularizer other than its counter is averaged as well.
      donate: whether the step reuses the memory of the state that it receives. Do not use that
        state afterwards.
      static_argnames: names of further arguments of the loss that are not arrays (a mode, a
        configuration), as in ``jax.jit``. They must be hashable.

    Returns:
      ``TrainStep(init, step)``. The keyword ``held_out=batch`` of ``step`` is not passed to
      ``loss_fn``: it is for a regularizer with a self-tuned strength.

    Raises:
      ValueError: penalty_fraction outside (0, 1], ascent_groups < 1, or one of them without a
        regularizer; an unknown name in static_argnames; at ``init``, a regularizer in place of the
        optimizer, or in two places; at a step, a batch that cannot be split.
      TypeError: an optimizer or regularizer that is not an Optax transformation; a state that is
        not a TrainState; integer parameters; penalty_fraction with a regularizer of another
        package; ``held_out=`` without a self-tuned strength, or as an argument of the loss.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gradreg_optax import fd_gradreg, make_train_step
      >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2) / 2
      >>> init, step = make_train_step(loss_fn, optax.sgd(0.1), fd_gradreg(gamma=0.5, epsilon=0.1))
      >>> state, info = step(init(jnp.ones(2)), jnp.eye(2))
      >>> print(info.loss, state.params.round(4))  # 1 - 0.1 * (0.5 + 0.5 * 0.25)
      0.5 [0.9375 0.9375]

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
      m-sharpness: Foret et al., ICLR 2021.
    """
    caller = "make_train_step"
    validation.check_transformation(caller, "optimizer", optimizer)
    groups = validation.whole_number(caller, "ascent_groups", ascent_groups)
    donated = (0,) if validation.flag(caller, "donate", donate) else ()
    kept = validation.fraction(caller, "penalty_fraction", penalty_fraction)
    regularized = RegularizedPass(caller, regularizer, kept, groups)
    loss = with_weight(caller, loss_fn, has_aux, compiled=True, in_parts=groups > 1)
    second = optax.with_extra_args_support(optimizer)
    static = static_arguments(caller, loss_fn, static_argnames)

    def offer(args: Args, kwargs: Kwargs) -> Offer:
        return named_arguments(loss_fn, (None, *args), kwargs)

    def init(params: PyTree) -> TrainState:
        validation.check_inexact(caller, "the parameters", params)
        params = owned(params)
        opt_state = regularized.init(params), second.init(params)
        _check_optimizer(caller, opt_state[1])
        check_once(caller, loss_fn, params, *opt_state)
        return TrainState(*owned((params, opt_state, jnp.zeros([], jnp.int32))))

    # Not "state": a loss may have an argument of that name, which a call passes by keyword.
    def step(
        before: TrainState, /, batch: PyTree, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> tuple[TrainState, StepInfo]:
        validation.check_state(caller, before, TrainState)
        params, (first_state, second_state) = before.params, before.opt_state
        call = Call(loss, (batch, *args), kwargs, offer)

        def on(batch: PyTree) -> Pass:
            return regularized.run(call.on(batch), params, first_state, held_out)

        outcome, grad_norm = _mean_over_groups(caller, on, batch, groups)
        value_fn = call.bound(params, outcome.gradient)
        extra = {"value": outcome.value, "grad": outcome.gradient, "value_fn": value_fn}
        updates, second_state = second.update(outcome.updates, second_state, params, **extra)
        params = optax.apply_updates(params, updates)
        state = TrainState(params, (outcome.state, second_state), optax.safe_increment(before.step))
        return state, StepInfo(outcome.value, grad_norm, outcome.aux)

    return TrainStep(init, jax.jit(step, donate_argnums=donated, **static))


def static_arguments(
    caller: str, loss_fn: LossFn, names: str | Sequence[str], *, added: int = 0
) -> dict[str, Any]:
    """Check the names of a loss's arguments; return ``jax.jit``'s keywords for the static ones.

    The step has the argument positions of the loss, and ``added`` more after the parameters.
    """
    static = (names,) if isinstance(names, str) else tuple(names)
    parameters = list(signature_of(loss_fn).parameters)
    if "held_out" in parameters:
        raise TypeError(
            f"{caller}: the argument 'held_out' of the loss is a name of the step. Rename it."
        )
    if not all(accepts(loss_fn, name) and name not in parameters[:1] for name in static):
        raise ValueError(
            f"{caller}: static_argnames must name arguments of the loss after its parameters, got"
            f" {static!r}. Choose from {parameters[1:]}."
        )
    numbers = tuple(i + added for i, name in enumerate(parameters) if name in static)
    return {"static_argnames": static, "static_argnums": numbers} if static else {}


def _check_optimizer(caller: str, state: optax.OptState) -> None:
    """Check by its state that the optimizer is not a regularizer."""
    if isinstance(state, REGULARIZER_STATES):
        raise ValueError(
            f"{caller}: optimizer must take steps, got a regularizer alone. Write"
            f" {caller}(loss_fn, optimizer, regularizer)."
        )


def _mean_over_groups(
    caller: str, on: Callable[[PyTree], Pass], batch: PyTree, groups: int
) -> tuple[Pass, jax.Array]:
    """Average the passes of the groups by weight; also return the RMS of their gradient norms.

    Numbers in a regularizer's state are averaged. Counters and keys must be the same in all groups.
    """
    if groups == 1:
        outcome = on(batch)
        return outcome, global_norm(outcome.gradient)
    parts, evaluated = split_batch(caller, "ascent_groups", batch, groups), False

    def separated(group: PyTree) -> tuple[Pass, optax.OptState]:
        nonlocal evaluated
        outcome, evaluated = on(group), True
        numbers = jax.tree.map(lambda x: x if validation.is_inexact(x) else None, outcome.state)
        counters = jax.tree.map(lambda x: None if validation.is_inexact(x) else x, outcome.state)
        return outcome._replace(state=numbers), counters

    try:
        outcome, counters = jax.vmap(separated, out_axes=(0, None), axis_name=ASCENT_GROUPS)(parts)
    except ValueError as error:
        if not evaluated:  # raised by the loss or the regularizer
            raise
        raise ValueError(
            f"{caller}: with ascent_groups, counters and keys in the regularizer's state must be"
            " the same for every group. Put the transformation that keeps them behind the"
            f" regularizer, in the optimizer ({error})."
        ) from error

    def mean(x: jax.Array) -> jax.Array:
        return cast(_average(widen(x), outcome.weight), x)

    def combined(counter: Any, number: Any) -> Any:
        return number if counter is None else counter

    averaged = jax.tree.map(mean, outcome._replace(aux=None, weight=None))
    state = jax.tree.map(combined, counters, averaged.state, is_leaf=lambda x: x is None)
    grad_norm = jnp.sqrt(mean(jax.vmap(global_norm)(outcome.gradient) ** 2))
    return averaged._replace(aux=outcome.aux, state=state), grad_norm


def _average(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Return the weighted mean over the leading axis; zero if all weights are zero."""
    if weight is None:
        return jnp.mean(x, axis=0)
    total = jnp.sum(weight)
    shares = (weight / jnp.where(total == 0, 1, total)).astype(x.real.dtype)
    return jnp.tensordot(shares, x, axes=1)
