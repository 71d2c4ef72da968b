"""Train steps: a regularizer, an optimizer and a loss in one jitted function."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax._batch import first_fraction, split_batch
from gradreg_optax._loss import RESERVED, with_aux
from gradreg_optax._typing import LossFn, PyTree
from gradreg_optax.penalty import global_norm
from gradreg_optax.transforms import GradregState


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
        None. It needs no loss of its own; if it has one, its arguments are picked by name from
        those of ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: take the penalty on the first f of the batch's leading axis (rounded up),
        with that sub-batch's own gradient. A sub-batch of b samples penalises
        :math:`\|g\|^2 + \operatorname{tr}\Sigma / b` on average, with :math:`\Sigma` the covariance
        of the samples' gradients, so a smaller f wants a smaller gamma.
      ascent_groups: split the batch into m groups, each of which climbs along its own gradient, and
        average the results (m-sharpness). On a data-parallel mesh with m a multiple of the devices
        this takes one all-reduce where the global ascent takes two. It regularizes the mean of the
        groups' :math:`\|g_m\|^2`, which is larger than :math:`\|g\|^2`.
      donate: let the step reuse the memory of the state it is given, which must not be used
        afterwards.

    Returns:
      ``TrainStep(init, step)``.

    Raises:
      ValueError: penalty_fraction outside (0, 1], ascent_groups < 1, or either without a
        regularizer; at the first step, a batch that cannot be split.

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
    function = "make_train_step"
    _check_split(function, regularizer, penalty_fraction, ascent_groups)
    loss = with_aux(function, loss_fn, has_aux)
    first = optax.with_extra_args_support(optax.identity() if regularizer is None else regularizer)
    second = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> TrainState:
        params = _owned(params)
        return TrainState(
            *_owned((params, (first.init(params), second.init(params)), jnp.zeros([], jnp.int32)))
        )

    def step(
        state: TrainState, batch: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[TrainState, StepInfo]:
        params, (first_state, second_state) = state.params, state.opt_state

        def regularized(batch: PyTree) -> tuple[Any, PyTree, PyTree, optax.OptState]:
            output, gradient = jax.value_and_grad(loss, has_aux=True)(
                params, batch, *args, **kwargs
            )
            part, own = batch, dict[str, Any]()
            if penalty_fraction < 1:
                part, own = (
                    first_fraction(function, "penalty_fraction", batch, penalty_fraction),
                    {"reuse_updates": False},
                )
            extra = _named_arguments(loss_fn, (params, part, *args), kwargs) | own
            updates, new_state = first.update(
                gradient,
                first_state,
                params,
                value=output[0],
                value_fn=lambda p: loss(p, part, *args, **kwargs)[0],
                **extra,
            )
            return output, gradient, updates, new_state

        if ascent_groups == 1:
            (value, aux), gradient, updates, first_state = regularized(batch)
            grad_norm = global_norm(gradient)
        else:
            groups = split_batch(function, "ascent_groups", batch, int(ascent_groups))
            # The regularizer's state may depend on no group: every group counts the same step.
            (values, aux), gradients, updates, first_state = jax.vmap(
                regularized, out_axes=(0, 0, 0, None)
            )(groups)
            value, gradient, updates = jax.tree.map(
                lambda x: jnp.mean(x, axis=0).astype(x.dtype), (values, gradients, updates)
            )
            grad_norm = jnp.sqrt(jnp.mean(jax.vmap(global_norm)(gradients) ** 2))

        updates, second_state = second.update(
            updates,
            second_state,
            params,
            value=value,
            grad=gradient,
            value_fn=lambda p: loss(p, batch, *args, **kwargs)[0],
        )
        params = optax.apply_updates(params, updates)
        state = TrainState(params, (first_state, second_state), optax.safe_increment(state.step))
        return state, StepInfo(value, grad_norm, aux)

    return TrainStep(init, jax.jit(step, donate_argnums=(0,) if donate else ()))


def make_nnx_train_step(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
    penalty_fraction: float = 1.0,
) -> Callable[..., StepInfo]:
    r"""Builds a train step for Flax NNX modules and the stock ``nnx.Optimizer``.

    The regularizer stands in the optimizer's chain, or is given here. The clean pass updates the
    module (BatchNorm's statistics, dropout's counters) once; the passes of the regularizer run on
    copies of the state *before* it, so that they see the same function.

    Cost: as for :func:`make_train_step`. The bookkeeping of ``nnx.jit`` makes a step on a small
    module several times slower than a functional step; where that matters, split the module once
    and use :func:`make_train_step`.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      regularizer: a transformation of this package, or a chain of them; its step counter is the
        optimizer's.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: as for :func:`make_train_step`; the batch is the first argument after the
        model. Needs the regularizer here.

    Returns:
      ``step(model, optimizer, *args, **kwargs) -> StepInfo``, which updates model and optimizer in
      place; ``optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)``.

    Raises:
      ImportError: flax is not installed.
      ValueError: penalty_fraction outside (0, 1] or without a regularizer, or a regularizer that
        keeps more state than a step counter.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from gradreg_optax import fd_gradreg, make_nnx_train_step
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.chain(fd_gradreg(gamma=0.5, epsilon=0.1), optax.sgd(0.1)), wrt=nnx.Param)
      >>> step = make_nnx_train_step(lambda model, x: jnp.mean(model(x) ** 2))
      >>> step(model, optimizer, jnp.eye(2)).loss > step(model, optimizer, jnp.eye(2)).loss
      Array(True, dtype=bool)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(
            'make_nnx_train_step needs flax: pip install "gradreg-optax[flax]".'
        ) from error

    function = "make_nnx_train_step"
    _check_split(function, regularizer, penalty_fraction, 1)
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    loss = with_aux(function, loss_fn, has_aux)
    first = optax.with_extra_args_support(optax.identity() if regularizer is None else regularizer)

    @nnx.jit
    def step(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> StepInfo:
        graphdef, *states = nnx.split(model, optimizer.wrt, ...)
        params, rest = map(pure, states)  # before the clean pass moves counters and statistics

        def value_of(params: PyTree, arguments: Sequence[Any]) -> jax.Array:
            return loss(nnx.merge(graphdef, params, rest), *arguments, **kwargs)[0]

        (value, aux), gradient = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, optimizer.wrt), has_aux=True
        )(model, *args, **kwargs)
        part, own = list(args), dict[str, Any]()
        if penalty_fraction < 1:
            own = {"reuse_updates": False}
            part[0] = first_fraction(function, "penalty_fraction", args[0], penalty_fraction)
        plain = pure(gradient)
        counters = _counting(function, first.init(params), optimizer.step[...])
        updates, _ = first.update(
            plain, counters, params, value=value, value_fn=lambda p: value_of(p, part), **own
        )
        updates = jax.tree.unflatten(
            jax.tree.structure(gradient), jax.tree.leaves(updates)
        )  # nnx.Optimizer wants Variables
        optimizer.update(
            model, updates, value=value, grad=plain, value_fn=lambda p: value_of(p, args)
        )
        return StepInfo(value, global_norm(plain), aux)

    return step


def _owned(tree: PyTree) -> PyTree:
    """Copies, since a donated buffer may be neither the caller's nor in the state twice; without
    weak types, which would trace twice.
    """
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)


def _check_split(
    function: str, regularizer: Any, penalty_fraction: float, ascent_groups: int
) -> None:
    if not 0 < penalty_fraction <= 1:
        raise ValueError(
            f"{function}: penalty_fraction must lie in (0, 1], got {penalty_fraction}: 1 takes the"
            " whole batch."
        )
    if ascent_groups < 1 or ascent_groups != int(ascent_groups):
        raise ValueError(
            f"{function}: ascent_groups must be a whole number >= 1, got {ascent_groups}: 1 is the"
            " global ascent."
        )
    if regularizer is None and (penalty_fraction < 1 or ascent_groups > 1):
        raise ValueError(
            f"{function}: penalty_fraction and ascent_groups concern the regularizer: pass one as"
            " regularizer=."
        )


def _named_arguments(
    loss_fn: LossFn, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The loss's arguments by name, for a regularizer that has a loss of its own."""
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # a builtin without a signature
        return dict(kwargs)
    bound = signature.bind(*args, **kwargs).arguments
    named = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(bound.get(parameter.name, {}))
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name in bound:
            named[parameter.name] = bound[parameter.name]
    return {name: value for name, value in named.items() if name not in RESERVED}


def _counting(function: str, state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The state of a regularizer at ``step``: nothing but step counters."""

    def counter(leaf: Any) -> GradregState:
        if not isinstance(leaf, GradregState):
            raise ValueError(
                f"{function}: the regularizer keeps state of its own beside a step counter, which"
                " has no place here: put it in front of the optimizer, nnx.Optimizer(model,"
                " optax.chain(regularizer, tx), wrt=nnx.Param)."
            )
        return GradregState(step=step.astype(leaf.step.dtype))

    return jax.tree.map(counter, state, is_leaf=lambda s: isinstance(s, GradregState))
