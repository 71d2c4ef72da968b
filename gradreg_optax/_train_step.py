"""Train steps: a regularizer, an optimizer and a loss in one jitted function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax._batching import first_fraction, split_batch
from gradreg_optax._loss import (
    TransformedLoss,
    check_own_keyword,
    mean_of,
    named_arguments,
    signature_of,
    unreserved,
    with_array_aux,
)
from gradreg_optax._numerics import ASCENT_GROUPS, cast, global_norm, widen
from gradreg_optax._relative import RelativeState
from gradreg_optax._transforms import GradregState
from gradreg_optax._types import LossFn, PyTree, Weighted
from gradreg_optax._validation import (
    check_inexact,
    check_state,
    check_transformation,
    flag,
    fraction,
    is_inexact,
    whole_number,
)

_OURS = GradregState, RelativeState


class TrainState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the parameters.
      opt_state: the pair (regularizer's state, optimizer's state), as ``optax.chain`` keeps it.
      step: number of steps taken; shape (), int32.
    """

    params: PyTree
    opt_state: optax.OptState
    step: jax.Array


class StepInfo(NamedTuple):
    """What is merely interesting about a step, all of it at the parameters before the step.

    Attributes:
      loss: the loss on the batch, without any penalty; shape ().
      grad_norm: norm of its gradient; shape (). With ``ascent_groups`` the root mean square of the
        groups' gradient norms, which is what is regularized then, and needs no further
        communication.
      aux: the loss function's aux, or None; with ``ascent_groups`` stacked along a leading axis.
    """

    loss: jax.Array
    grad_norm: jax.Array
    aux: Any


class TrainStep(NamedTuple):
    """A pair of functions: ``init(params) -> state`` and the jitted ``step(state, batch, *args,
    **kwargs) -> (state, info)``.
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
    r"""Builds a jitted train step that chains a regularizer with any Optax optimizer.

    One step evaluates :math:`L` and :math:`g = \nabla L` on the batch, lets the regularizer turn
    :math:`g` into the regularized gradient, and hands that to the optimizer together with Optax's
    ``value``, ``grad`` and ``value_fn`` of the unregularized loss. Loss, gradient norm and aux
    (BatchNorm's running statistics, say) are those at the parameters before the step; the second
    pass sees the same batch and arguments, a dropout key among them.

    Cost: one gradient and what the regularizer adds; with ``penalty_fraction`` = f that addition is
    f times (the regularizer's gradients + 1), on the steps that its ``interval`` takes: F-GR costs
    1 + 2f/k gradients a step.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      optimizer: any Optax optimizer.
      regularizer: ``fd_gradreg(...)``, ``dbp_gradreg(...)``, ``flooding(...)``, a chain of them, or
        None. It needs no loss of its own. If it has another one, say ``reuse_updates=False`` there,
        since the gradient that comes in is that of ``loss_fn``; its arguments are picked by name
        from those of ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: take the penalty on the first f of the batch's leading axis (rounded up),
        with that sub-batch's own gradient. A sub-batch of b samples penalises
        :math:`\|g\|^2 + \operatorname{tr}\Sigma / b` on average, with :math:`\Sigma` the covariance
        of the samples' gradients, so a smaller f needs a smaller gamma. Only transformations of
        this package know what to do with a part.
      ascent_groups: split the batch into m groups, each of which climbs along its own gradient, and
        average the results (m-sharpness). On a data-parallel mesh with m a multiple of the devices
        this takes one all-reduce where the global ascent takes two. It regularizes the mean of the
        groups' :math:`\|g_m\|^2`, which is larger than :math:`\|g\|^2`. Where the groups weigh
        differently (a mean over unpadded tokens), let the loss return ``Weighted``. What a
        regularizer keeps in addition to its counter is averaged as well.
      donate: let the step reuse the memory of the state it is given, which must not be used
        afterwards.
      static_argnames: names of further arguments of the loss that are not arrays (a mode, a
        configuration), as in ``jax.jit``; they must be hashable.

    Returns:
      ``TrainStep(init, step)``. A keyword ``held_out=batch`` of ``step`` is not for ``loss_fn``,
      but for a regularizer that finds its strength on held-out samples.

    Raises:
      ValueError: penalty_fraction outside (0, 1], ascent_groups < 1, or either without a
        regularizer; at ``init`` an optimizer that is a regularizer alone, or regularizers in both
        places; at a step a batch that cannot be split.
      TypeError: what should be an Optax transformation, or a TrainState, is none; integer
        parameters; penalty_fraction with a regularizer that is not of this package.

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
    check_transformation(caller, "optimizer", optimizer)
    groups = whole_number(caller, "ascent_groups", ascent_groups)
    donated = (0,) if flag(caller, "donate", donate) else ()
    regularized = regularized_pass(caller, regularizer, penalty_fraction, groups)
    loss = with_array_aux(caller, loss_fn, has_aux, in_parts=groups > 1)
    second = optax.with_extra_args_support(optimizer)
    check_own_keyword(caller, "held_out", loss_fn)
    static = static_arguments(caller, loss_fn, static_argnames)

    def init(params: PyTree) -> TrainState:
        check_inexact(caller, "the parameters", params)
        params = _owned(params)
        opt_state = regularized.init(params), second.init(params)
        _check_optimizer(caller, opt_state[1])
        check_once(caller, loss_fn, params, *opt_state)
        return TrainState(*_owned((params, opt_state, jnp.zeros([], jnp.int32))))

    def step(
        state: TrainState, batch: PyTree, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> tuple[TrainState, StepInfo]:
        check_state(caller, state, TrainState)
        params, (first_state, second_state) = state.params, state.opt_state
        call = Call(loss, (batch, *args), kwargs, loss_fn, held_out)

        def on(batch: PyTree) -> Pass:
            return regularized.run(call.on(batch), params, first_state)

        if groups == 1:
            outcome = on(batch)
            grad_norm = global_norm(outcome.gradient)
        else:
            parts = split_batch(caller, "ascent_groups", batch, groups)
            outcome, grad_norm = _mean_over_groups(caller, on, parts)
        extra = {"value": outcome.value, "grad": outcome.gradient, "value_fn": call.value_fn}
        updates, second_state = second.update(outcome.updates, second_state, params, **extra)
        params = optax.apply_updates(params, updates)
        state = TrainState(params, (outcome.state, second_state), optax.safe_increment(state.step))
        return state, StepInfo(outcome.value, grad_norm, outcome.aux)

    return TrainStep(init, jax.jit(step, donate_argnums=donated, **static))


def static_arguments(caller: str, loss_fn: LossFn, names: str | Sequence[str]) -> dict[str, Any]:
    """Return the static arguments of a step, whose arguments stand where those of the loss do."""
    static = (names,) if isinstance(names, str) else tuple(names)
    signature = signature_of(loss_fn)
    parameters = {} if signature is None else dict(signature.parameters)
    variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in static if name not in parameters and not variadic]
    if unknown or any(name in list(parameters)[:1] for name in static):
        raise ValueError(
            f"{caller}: static_argnames must name arguments of the loss after its parameters, got"
            f" {static!r}. Its arguments are {list(parameters)[1:]}."
        )
    numbers = tuple(i for i, name in enumerate(parameters) if name in static)
    return {"static_argnames": static, "static_argnums": numbers} if static else {}


class HeldOut:
    """The loss on held-out samples, which records whether a regularizer evaluates it."""

    def __init__(self, call: "Call") -> None:
        """Take the loss and its arguments from ``call``, with the held-out batch."""
        self._value_fn, self.evaluated = call.value_fn, False

    def __call__(self, params: PyTree) -> jax.Array:
        """Return the loss on the held-out samples."""
        self.evaluated = True
        try:
            return self._value_fn(params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"held_out=: {error}") from error


def check_held_out(caller: str, extra_args: Mapping[str, Any]) -> None:
    """Refuse held-out samples that no regularizer has evaluated."""
    held_out_fn = extra_args.get("held_out_fn")
    if isinstance(held_out_fn, HeldOut) and not held_out_fn.evaluated:
        raise TypeError(
            f"{caller}: held_out= is for a regularizer that tunes its strength on held-out samples,"
            " and none does. Pass relative_gradreg(strength=None), or leave held_out= away."
        )


class Call(NamedTuple):
    """A loss and the arguments that it is called with, but for the parameters.

    Attributes:
      loss: ``loss(params, *args, **kwargs) -> (Weighted, aux)``.
      args: the positional arguments, the batch first.
      kwargs: the keyword arguments.
      loss_fn: the loss as the user wrote it, which knows the names of its arguments.
      held_out: another batch, for a regularizer that asks for one.
    """

    loss: Callable[..., tuple[Weighted, Any]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFn | None = None
    held_out: PyTree = None

    def on(self, batch: PyTree) -> "Call":
        """The same on another batch."""
        return self._replace(args=(batch, *self.args[1:]))

    def value_fn(self, params: PyTree) -> jax.Array:
        """The loss as a function of the parameters."""
        return mean_of(self.loss(params, *self.args, **self.kwargs)[0])

    def value_and_more(self, params: PyTree) -> tuple[jax.Array, tuple[Any, Any]]:
        """The loss, and (its weight, aux)."""
        mean, aux = self.loss(params, *self.args, **self.kwargs)
        return mean_of(mean), (mean.weight, aux)

    def named(self) -> dict[str, Any]:
        """The arguments by name, for a regularizer that has a loss of its own."""
        if self.loss_fn is None:
            return unreserved(self.kwargs)
        return named_arguments(self.loss_fn, (None, *self.args), dict(self.kwargs))


class Pass(NamedTuple):
    """What a loss and a regularizer make of a batch.

    Attributes:
      value: the loss.
      aux: what it returns with its value.
      gradient: its gradient.
      updates: what the regularizer makes of the gradient.
      state: the regularizer's state afterwards.
      weight: the weight of the batch, if its loss has one.
    """

    value: jax.Array
    aux: Any
    gradient: PyTree
    updates: PyTree
    state: optax.OptState
    weight: jax.Array | None = None


class RegularizedPass(NamedTuple):
    """A clean pass and the regularizer on it.

    Attributes:
      init: ``params -> state``.
      run: ``(call, params, state) -> Pass``.
      regularize: ``(call, params, state, value, gradient) -> (updates, state)``, its second half.
    """

    init: Callable[[PyTree], optax.OptState]
    run: Callable[[Call, PyTree, optax.OptState], Pass]
    regularize: Callable[..., tuple[PyTree, optax.OptState]]


def regularized_pass(
    caller: str,
    regularizer: optax.GradientTransformation | None,
    penalty_fraction: Any = 1.0,
    groups: int = 1,
) -> RegularizedPass:
    """What train steps and regularized losses share: one clean pass, and the regularizer on it."""
    kept = fraction(caller, "penalty_fraction", penalty_fraction)
    if regularizer is None and (kept < 1 or groups > 1):
        raise ValueError(
            f"{caller}: penalty_fraction and ascent_groups concern the regularizer: pass one as"
            " regularizer=."
        )
    if regularizer is not None:
        check_transformation(caller, "regularizer", regularizer)
    tx = optax.with_extra_args_support(optax.identity() if regularizer is None else regularizer)

    def init(params: PyTree) -> optax.OptState:
        state = tx.init(params)
        if kept < 1 and not is_penalized(state):
            raise TypeError(
                f"{caller}: penalty_fraction needs a transformation of this package, which adds its"
                " penalty to the whole batch's gradient: another one would throw that away. Wrap"
                " fd_gradreg, dbp_gradreg, sam, ..., or leave penalty_fraction at 1."
            )
        return state

    def regularize(
        call: Call, params: PyTree, state: optax.OptState, value: jax.Array, gradient: PyTree
    ) -> tuple[PyTree, optax.OptState]:
        extra = penalty_arguments(caller, call, kept)
        updates, state = tx.update(gradient, state, params, value=value, **extra)
        check_held_out(caller, extra)
        return updates, state

    def run(call: Call, params: PyTree, state: optax.OptState) -> Pass:
        clean = jax.value_and_grad(call.value_and_more, has_aux=True)
        (value, (weight, aux)), gradient = clean(params)
        updates, state = regularize(call, params, state, value, gradient)
        return Pass(value, aux, gradient, updates, state, weight)

    return RegularizedPass(init, run, regularize)


def penalty_arguments(caller: str, call: Call, kept: float) -> dict[str, Any]:
    """Return the extra arguments of a regularizer: the loss that it penalises, on which samples."""
    penalised, flags = call, dict[str, Any]()
    if kept < 1:
        penalised = call.on(first_fraction(caller, "penalty_fraction", call.args[0], kept))
        flags = {"reuse_updates": False}
    if call.held_out is not None:
        flags["held_out_fn"] = HeldOut(call.on(call.held_out))
    return penalised.named() | {"value_fn": penalised.value_fn} | flags


def is_penalized(state: optax.OptState) -> bool:
    """Whether a transformation of this package is in the chain that has this state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, _OURS))
    return any(isinstance(leaf, _OURS) for leaf in leaves)


def _check_optimizer(caller: str, state: optax.OptState) -> None:
    """The optimizer takes steps; by its state."""
    if isinstance(state, _OURS):
        raise ValueError(
            f"{caller}: the optimizer is a regularizer alone, which takes no step: write"
            f" {caller}(loss_fn, optimizer, regularizer)."
        )


def check_once(caller: str, loss_fn: LossFn, params: PyTree, *states: optax.OptState) -> None:
    """A penalty stands in one place: in one transformation, known by its state, or in the loss."""
    of_loss = regularizer_of(loss_fn)
    if of_loss is not None:
        states = *states, of_loss.init(params)
    if sum(map(is_penalized, states)) > 1:
        raise ValueError(
            f"{caller}: there is a regularizer in more than one of the loss, the optimizer's chain"
            f" and {caller}, which would penalise twice: take one away, or chain them,"
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
    """The state of a regularizer at ``step``, where nothing but its counters has a place."""

    def counter(leaf: Any) -> GradregState:
        if not isinstance(leaf, GradregState) or jax.tree.leaves(leaf.ascent):
            raise ValueError(
                f"{caller}: the regularizer keeps more state than a step counter, which has"
                " no place here: put it in front of the optimizer, optax.chain(regularizer, tx),"
                " and train with make_train_step or make_nnx_train_step."
            )
        return leaf._replace(step=step)

    return jax.tree.map(counter, state, is_leaf=lambda s: isinstance(s, GradregState))


def _mean_over_groups(
    caller: str, on: Callable[[PyTree], Pass], groups: PyTree
) -> tuple[Pass, jax.Array]:
    """The groups' passes averaged by weight, and the root mean square of their gradients' norms.

    Of a regularizer's state numbers are averaged; counters and keys may depend on no group.
    """
    structures: list[Any] = []

    def separated(group: PyTree) -> tuple[Pass, list[Any]]:
        outcome = on(group)
        leaves, structure = jax.tree.flatten(outcome.state)
        structures.append(structure)
        numbers = [leaf if is_inexact(leaf) else None for leaf in leaves]
        return outcome._replace(state=numbers), [None if is_inexact(x) else x for x in leaves]

    try:
        outcome, counters = jax.vmap(separated, out_axes=(0, None), axis_name=ASCENT_GROUPS)(groups)
    except ValueError as error:
        if not structures:  # raised by the loss or a regularizer
            raise
        raise ValueError(
            f"{caller}: with ascent_groups, counters and keys in the regularizer's state must be"
            " the same for every group. Put the transformation that keeps them behind the"
            f" regularizer, in the optimizer ({error})."
        ) from error

    def mean(x: jax.Array) -> jax.Array:
        return cast(_average(widen(x), outcome.weight), x)

    numbers = [None if x is None else mean(x) for x in outcome.state]
    leaves = [c if n is None else n for n, c in zip(numbers, counters, strict=True)]
    averaged = (outcome.value, outcome.gradient, outcome.updates)
    value, gradient, updates = jax.tree.map(mean, averaged)
    grad_norm = jnp.sqrt(mean(jax.vmap(global_norm)(outcome.gradient) ** 2))
    state = jax.tree.unflatten(structures[-1], leaves)
    return Pass(value, outcome.aux, gradient, updates, state), grad_norm


def _average(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """The mean over the leading axis; where nothing weighs anything, zero."""
    if weight is None:
        return jnp.mean(x, axis=0)
    total = jnp.sum(weight)
    shares = (weight / jnp.where(total == 0, 1, total)).astype(x.real.dtype)
    return jnp.tensordot(shares, x, axes=1)


def _owned(tree: PyTree) -> PyTree:
    """Copies without weak types.

    A donated buffer may be neither the caller's nor in the state twice, and a weak type would be
    traced twice.
    """
    return jax.tree.map(_copied, tree)


def _copied(x: Any) -> jax.Array:
    return jnp.array(x, dtype=jax.typeof(x).dtype, copy=True)
