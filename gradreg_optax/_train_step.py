"""Train steps: a regularizer, an optimizer and a loss in one jitted function."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax import _validation as validation
from gradreg_optax._batching import first_fraction, split_batch
from gradreg_optax._loss import (
    TransformedLoss,
    accepts,
    mean_of,
    named_arguments,
    signature_of,
    unreserved,
    with_weight,
)
from gradreg_optax._numerics import ASCENT_GROUPS, cast, global_norm, owned, widen
from gradreg_optax._relative import RelativeState
from gradreg_optax._transforms import GradregState
from gradreg_optax._types import LossFn, PyTree, Transformation, Weighted

_OURS = GradregState, RelativeState


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
        up), with the gradient of that sub-batch. On b samples the penalised quantity is
        :math:`\|g\|^2 + \operatorname{tr}\Sigma / b` on average, with the covariance :math:`\Sigma`
        of the per-sample gradients. So a smaller f needs a smaller gamma (see
        :func:`~gradreg_optax.curvature.penalty_scale`). Needs a transformation of this package.
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

    def init(params: PyTree) -> TrainState:
        validation.check_inexact(caller, "the parameters", params)
        params = owned(params)
        opt_state = regularized.init(params), second.init(params)
        _check_optimizer(caller, opt_state[1])
        check_once(caller, loss_fn, params, *opt_state)
        return TrainState(*owned((params, opt_state, jnp.zeros([], jnp.int32))))

    def step(
        state: TrainState, batch: PyTree, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> tuple[TrainState, StepInfo]:
        validation.check_state(caller, state, TrainState)
        params, (first_state, second_state) = state.params, state.opt_state
        call = Call(loss, (batch, *args), kwargs, loss_fn, held_out)

        def on(batch: PyTree) -> Pass:
            return regularized.run(call.on(batch), params, first_state)

        outcome, grad_norm = _mean_over_groups(caller, on, batch, groups)
        extra = {"value": outcome.value, "grad": outcome.gradient, "value_fn": call.value_fn}
        updates, second_state = second.update(outcome.updates, second_state, params, **extra)
        params = optax.apply_updates(params, updates)
        state = TrainState(params, (outcome.state, second_state), optax.safe_increment(state.step))
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
            f"{caller}: the loss has an argument 'held_out', a name that the step reserves. Rename"
            " the argument."
        )
    if not all(accepts(loss_fn, name) and name not in parameters[:1] for name in static):
        raise ValueError(
            f"{caller}: static_argnames must name arguments of the loss after its parameters, got"
            f" {static!r}. Choose from {parameters[1:]}."
        )
    numbers = tuple(i + added for i, name in enumerate(parameters) if name in static)
    return {"static_argnames": static, "static_argnums": numbers} if static else {}


class Call(NamedTuple):
    """A loss and its arguments, without the parameters.

    Attributes:
      loss: ``loss(params, *args, **kwargs) -> (Weighted, aux)``.
      args: the positional arguments, the batch first.
      kwargs: the keyword arguments.
      loss_fn: the user's loss, with the names of the arguments in its signature.
      held_out: another batch, for a regularizer with a self-tuned strength.
    """

    loss: Callable[..., tuple[Weighted, Any]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFn | None = None
    held_out: PyTree = None

    def on(self, batch: PyTree) -> "Call":
        """Return the call with another batch."""
        return self._replace(args=(batch, *self.args[1:]))

    def value_fn(self, params: PyTree) -> jax.Array:
        """Return the loss at ``params``."""
        return mean_of(self.loss(params, *self.args, **self.kwargs)[0])

    def value_and_more(self, params: PyTree) -> tuple[jax.Array, tuple[Any, Any]]:
        """Return the loss at ``params``, and (its weight, aux)."""
        mean, aux = self.loss(params, *self.args, **self.kwargs)
        return mean_of(mean), (mean.weight, aux)

    def named(self) -> dict[str, Any]:
        """Return the arguments by name, for a regularizer with its own loss."""
        if self.loss_fn is None:
            return unreserved(self.kwargs)
        return named_arguments(self.loss_fn, (None, *self.args), dict(self.kwargs))


class Pass(NamedTuple):
    """The results of a loss and a regularizer on a batch.

    Attributes:
      value: the loss.
      aux: aux of the loss.
      gradient: the gradient of the loss.
      updates: the regularized gradient.
      state: the new state of the regularizer.
      weight: the weight of the batch, or None.
    """

    value: jax.Array
    aux: Any
    gradient: PyTree
    updates: PyTree
    state: optax.OptState
    weight: jax.Array | None = None


class RegularizedPass:
    """A gradient evaluation followed by a regularizer, as in train steps and regularized losses."""

    def __init__(
        self, caller: str, regularizer: Transformation | None, kept: float = 1.0, groups: int = 1
    ) -> None:
        """Check the regularizer, which penalises the fraction ``kept`` of the batch."""
        self._caller, self._kept = caller, kept
        if regularizer is not None:
            validation.check_transformation(caller, "regularizer", regularizer)
        elif kept < 1 or groups > 1:
            raise ValueError(
                f"{caller}: penalty_fraction and ascent_groups need a regularizer, got None. Pass"
                " regularizer=."
            )
        self._tx = optax.with_extra_args_support(regularizer or optax.identity())

    def init(self, params: PyTree) -> optax.OptState:
        """Return the state of the regularizer."""
        state = self._tx.init(params)
        if self._kept < 1 and not is_penalized(state):
            raise TypeError(
                f"{self._caller}: penalty_fraction needs a transformation of this package, got"
                " another one, which would discard the gradient of the whole batch. Use"
                " fd_gradreg, dbp_gradreg, sam, ..., or penalty_fraction=1."
            )
        return state

    def run(self, call: Call, params: PyTree, state: optax.OptState) -> Pass:
        """Evaluate the loss and its gradient, and regularize it."""
        clean = jax.value_and_grad(call.value_and_more, has_aux=True)
        (value, (weight, aux)), gradient = clean(params)
        with penalty_arguments(self._caller, call, self._kept) as extra:
            updates, state = self._tx.update(gradient, state, params, value=value, **extra)
        return Pass(value, aux, gradient, updates, state, weight)


@contextlib.contextmanager
def penalty_arguments(caller: str, call: Call, kept: float) -> Iterator[dict[str, Any]]:
    """Provide the extra arguments of a regularizer: the loss on the samples that it penalises.

    Held-out samples that the regularizer has not evaluated are an error.
    """
    penalised, extra, evaluated = call, dict[str, Any](), False
    if kept < 1:
        penalised = call.on(first_fraction(caller, "penalty_fraction", call.args[0], kept))
        extra["reuse_updates"] = False

    def held_out_fn(params: PyTree) -> jax.Array:
        nonlocal evaluated
        evaluated = True
        try:
            return call.on(call.held_out).value_fn(params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"held_out=: {error}") from error

    if call.held_out is not None:
        extra["held_out_fn"] = held_out_fn
    yield penalised.named() | {"value_fn": penalised.value_fn} | extra
    if call.held_out is not None and not evaluated:
        raise TypeError(
            f"{caller}: held_out= needs a regularizer with a self-tuned strength, got none. Use"
            " relative_gradreg(strength=None), or remove held_out=."
        )


def is_penalized(state: optax.OptState) -> bool:
    """Whether a chain with this state contains a transformation of this package."""
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, _OURS))
    return any(isinstance(leaf, _OURS) for leaf in leaves)


def _check_optimizer(caller: str, state: optax.OptState) -> None:
    """Check by its state that the optimizer is not a regularizer."""
    if isinstance(state, _OURS):
        raise ValueError(
            f"{caller}: optimizer must take steps, got a regularizer alone. Write"
            f" {caller}(loss_fn, optimizer, regularizer)."
        )


def check_once(caller: str, loss_fn: LossFn, params: PyTree, *states: optax.OptState) -> None:
    """Check that only one transformation, or the loss, contains a regularizer."""
    of_loss = regularizer_of(loss_fn)
    if of_loss is not None:
        states = *states, of_loss.init(params)
    if sum(map(is_penalized, states)) > 1:
        raise ValueError(
            f"{caller}: there is a regularizer in more than one of the loss, the optimizer's chain"
            f" and {caller}, which would penalise twice. Remove one, or chain them:"
            " regularizer=optax.chain(...)."
        )


def regularizer_of(loss_fn: Any) -> optax.GradientTransformation | None:
    """Return the regularizer inside a loss, under any wrapper (``jax.jit``, a partial)."""
    while loss_fn is not None:
        if isinstance(loss_fn, TransformedLoss) and loss_fn.regularizer is not None:
            return loss_fn.regularizer
        loss_fn = getattr(loss_fn, "__wrapped__", getattr(loss_fn, "func", None))
    return None


def counting(caller: str, state: optax.OptState, step: Any) -> optax.OptState:
    """Return a regularizer's state at ``step``; raise an error if it is more than counters."""

    def counter(leaf: Any) -> GradregState:
        if not isinstance(leaf, GradregState) or jax.tree.leaves(leaf.ascent):
            raise ValueError(
                f"{caller}: the regularizer keeps more state than a step counter, which cannot be"
                " stored here. Put it in front of the optimizer, optax.chain(regularizer, tx), and"
                " train with make_train_step or make_nnx_train_step."
            )
        return leaf._replace(step=step)

    return jax.tree.map(counter, state, is_leaf=lambda s: isinstance(s, GradregState))


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
