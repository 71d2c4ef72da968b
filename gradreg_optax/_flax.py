"""Flax NNX: a train step for modules and the stock ``nnx.Optimizer``, and a regularized loss."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax._estimators import global_norm
from gradreg_optax._loss import check_own_keyword, keeps_signature, with_weight
from gradreg_optax._microbatching import microbatched, pieces_of
from gradreg_optax._regularized_loss import regularized_loss
from gradreg_optax._train_step import (
    Call,
    StepInfo,
    check_once,
    counting,
    is_penalized,
    penalty_arguments,
    regularized_pass,
)
from gradreg_optax._types import LossFn, PyTree, Weighted
from gradreg_optax._validation import check_arrays, check_transformation, fraction, is_inexact


def make_nnx_train_step(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
    penalty_fraction: float = 1.0,
) -> Callable[..., StepInfo]:
    r"""Builds a train step for Flax NNX modules and the stock ``nnx.Optimizer``.

    The regularizer stands in the optimizer's chain, first, or is given here. The clean pass updates
    the module (BatchNorm's statistics, dropout's counters) once; the passes of the regularizer run
    on copies of the state *before* it, so that they see the same function.

    Cost: as for :func:`make_train_step`. The bookkeeping of ``nnx.jit`` makes a step on a small
    module several times slower than a functional step; where that matters, split the module once
    and use :func:`make_train_step`, which also has ``ascent_groups``: here each group would leave
    statistics of its own.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      regularizer: a transformation of this package, or a chain of them; its step counter is the
        optimizer's. One that keeps more state goes into the optimizer's chain instead.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: as for :func:`make_train_step`; the batch is the first argument after the
        model. With the regularizer in the optimizer's chain a line search there sees the part too.

    Returns:
      ``step(model, optimizer, *args, **kwargs) -> StepInfo``, which updates model and optimizer in
      place; ``optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)``. A keyword ``held_out=batch``
      is not for ``loss_fn``, but for a regularizer that finds its strength on held-out samples.

    Raises:
      ImportError: flax is not installed.
      TypeError: the regularizer is no Optax transformation.
      ValueError: penalty_fraction outside (0, 1]; at the first step a regularizer in the chain and
        here, or in neither, an optimizer here, or a regularizer here that keeps more state than a
        step counter.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from gradreg_optax import fd_gradreg, make_nnx_train_step
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(fd_gradreg(gamma=0.5, epsilon=0.1), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step = make_nnx_train_step(lambda model, x: jnp.mean(model(x) ** 2))
      >>> step(model, optimizer, jnp.eye(2)).loss > step(model, optimizer, jnp.eye(2)).loss
      Array(True, dtype=bool)
    """
    caller = "make_nnx_train_step"
    nnx, kept = _flax(caller), fraction(caller, "penalty_fraction", penalty_fraction)
    # A regularizer in the optimizer's chain is told of the part there, one here is told here.
    here = regularized_pass(caller, regularizer, 1.0 if regularizer is None else kept)
    loss_of = _loss_of_split(caller, nnx, loss_fn, has_aux)
    check_own_keyword(caller, "held_out", loss_fn)

    def step(
        model: Any, optimizer: Any, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> StepInfo:
        if not isinstance(optimizer, nnx.Optimizer):
            raise TypeError(
                f"{caller}: step(model, optimizer, ...) takes an nnx.Optimizer(model, tx,"
                f" wrt=nnx.Param) in the second place, got {type(optimizer).__name__}."
            )
        split = _Split.of(nnx, model, optimizer.wrt)
        state = here.init(split.params)
        check_once(caller, loss_fn, split.params, state, optimizer.opt_state)
        _check_place(caller, regularizer is not None, state, optimizer.opt_state)
        call = Call(loss_of(split), args, kwargs, held_out=held_out)
        with _explained(caller, lambda: call.value_fn(split.params)):
            outcome = here.run(call, split.params, counting(caller, state, optimizer.step[...]))
        aux, rest = outcome.aux
        check_arrays(caller, "aux", aux)
        split.put_back(nnx, model, rest)
        extra = {"value_fn": call.value_fn}
        if regularizer is None:
            extra = penalty_arguments(caller, call, kept)
        updates = split.as_variables(outcome.updates)
        with _explained(caller, lambda: call.value_fn(split.params)):
            optimizer.update(model, updates, value=outcome.value, grad=outcome.gradient, **extra)
        return StepInfo(outcome.value, global_norm(outcome.gradient), aux)

    jitted: Callable[..., StepInfo] = nnx.jit(step)
    return jitted


def nnx_regularized_loss(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation,
    *,
    wrt: Any = None,
    has_aux: bool = False,
) -> LossFn:
    r"""The same loss of an NNX module with the regularized gradient, for ``nnx.value_and_grad``.

    As :func:`regularized_loss`: value and aux are those of ``loss_fn``, and ``nnx.grad`` of it is
    what ``regularizer`` makes of the gradient, for any trainer that differentiates a loss of a
    module. Statistics and counters (BatchNorm, dropout) are those of the clean pass, handed back to
    the model once; the regularizer's passes start from those before it.

    Cost: of an evaluation, that of the loss; of a gradient, that of the transformation.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      regularizer: as for :func:`regularized_loss`.
      wrt: a filter for the parameters that are penalised, ``nnx.Param`` by default; the same as in
        ``nnx.value_and_grad(..., argnums=nnx.DiffState(0, wrt))``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A loss with the signature of ``loss_fn`` and a further keyword ``step``.

    Raises:
      ImportError: flax is not installed.
      ValueError, TypeError: as for :func:`regularized_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gradreg_optax import fd_gradreg, nnx_regularized_loss
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> loss = nnx_regularized_loss(loss_fn, fd_gradreg(gamma=0.5, epsilon=0.1))
      >>> plain, steeper = (nnx.grad(f)(model, jnp.eye(2)).kernel[...] for f in (loss_fn, loss))
      >>> print((steeper / plain).round(4))  # the Hessian is 1
      [[1.5]
       [1.5]]
    """
    caller = "nnx_regularized_loss"
    nnx = _flax(caller)
    check_transformation(caller, "regularizer", regularizer)
    loss_of, penalised = _loss_of_split(caller, nnx, loss_fn, has_aux), wrt or nnx.Param

    def wrapped(model: Any, *args: Any, step: Any = None, **kwargs: Any) -> Any:
        split = _Split.of(nnx, model, penalised)

        def of_states(params: PyTree, rest: PyTree, args: Any, kwargs: Any) -> tuple[Any, Any]:
            mean, aux = loss_of(split._replace(rest=rest))(params, *args, **kwargs)
            return (mean.total if mean.weight is None else mean), aux

        loss = regularized_loss(of_states, regularizer, has_aux=True)
        with _explained(caller, lambda: loss_of(split)(split.params, *args, **kwargs)):
            value, (aux, rest) = loss(split.params, split.rest, args, kwargs, step=step)
        split.put_back(nnx, model, rest)
        return (value, aux) if has_aux else value

    return keeps_signature(wrapped, loss_fn, regularizer=regularizer)


class _Split(NamedTuple):
    """A module taken apart into pure arrays: its parameters, and everything else that it keeps.

    Attributes:
      graphdef: its static part.
      params: what is differentiated.
      rest: statistics, counters and keys, as they were before the step.
      structures: of both, the structures with NNX's variables in them.
      wrt: the filter that tells them apart.
    """

    graphdef: Any
    params: PyTree
    rest: PyTree
    structures: tuple[Any, Any]
    wrt: Any

    @classmethod
    def of(cls, nnx: Any, model: Any, wrt: Any) -> "_Split":
        """Takes a module apart."""
        graphdef, params, rest = nnx.split(model, wrt, ...)
        structures = jax.tree.structure(params), jax.tree.structure(rest)
        return cls(graphdef, _pure(nnx, params), _pure(nnx, rest), structures, wrt)

    def as_variables(self, params: PyTree) -> Any:
        """Updates as nnx.Optimizer wants them."""
        return jax.tree.unflatten(self.structures[0], jax.tree.leaves(params))

    def put_back(self, nnx: Any, model: Any, rest: PyTree) -> None:
        """Hands the statistics and counters of a pass back to the module."""
        nnx.update(model, jax.tree.unflatten(self.structures[1], jax.tree.leaves(rest)))


def _loss_of_split(
    caller: str, nnx: Any, loss_fn: LossFn, has_aux: bool
) -> Callable[[_Split], Callable[..., tuple[Weighted, Any]]]:
    """The loss of a split module's parameters; its aux is (aux, the rest after the pass)."""
    one, count = pieces_of(loss_fn)
    whole = with_weight(caller, one, has_aux)

    def loss_of(split: _Split) -> Callable[..., tuple[Weighted, Any]]:
        def loss(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Weighted, Any]:
            module = nnx.merge(split.graphdef, params, split.rest)
            mean, aux = whole(module, *args, **kwargs)
            _, _, rest = nnx.split(module, split.wrt, ...)
            if jax.tree.structure(rest) != split.structures[1]:
                raise ValueError(
                    f"{caller}: the loss adds variables to the module (nnx.sow, a cache), which a"
                    " train step cannot keep: take them out in the loss, nnx.pop(model,"
                    " nnx.Intermediate), and return them as aux."
                )
            return mean, (aux, _pure(nnx, rest))

        def in_pieces(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Weighted, Any]:
            def piece(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
                mean, more = loss(params, *args, **kwargs)
                return (mean.total if mean.weight is None else mean), more

            value, (aux, rests) = microbatched(piece, count, has_aux=True)(params, *args, **kwargs)
            return Weighted(value, None), (aux, jax.tree.map(_merged, rests))

        return loss if count == 1 else in_pieces

    return loss_of


def _merged(stacked: jax.Array) -> jax.Array:
    """What micro-batches leave behind: statistics averaged, counters and keys as one left them."""
    if is_inexact(stacked):
        return jnp.mean(stacked, axis=0).astype(stacked.dtype)
    return stacked[0]


def _check_place(caller: str, here: bool, state: optax.OptState, chain: optax.OptState) -> None:
    """There is a regularizer, and it is one."""
    chained = is_penalized(chain)
    if here and not is_penalized(state):
        raise ValueError(
            f"{caller}: what stands in the regularizer's place is no transformation of this package"
            f" (an optimizer?): write {caller}(loss_fn, fd_gradreg(...)), and leave the optimizer"
            " in nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )
    if not (here or chained):
        raise ValueError(
            f"{caller}: there is a regularizer neither in the optimizer's chain nor in {caller}:"
            f" write {caller}(loss_fn, fd_gradreg(...)) or nnx.Optimizer(model,"
            " optax.chain(fd_gradreg(...), tx), wrt=nnx.Param); to train without one use"
            " nnx.value_and_grad."
        )


@contextlib.contextmanager
def _explained(caller: str, clean: Callable[[], Any]) -> Iterator[None]:
    """A loss of the regularizer's own, which gets no module, is named where it fails."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if not any(sign in str(error) for sign in ("the loss needs", "State")):
            raise
        clean()  # a mistake in the loss itself shows here, as it is
        raise TypeError(
            f"{caller}: the regularizer failed ({error}). It needs no loss of its own, since"
            f" {caller} hands it one: write fd_gradreg(gamma=..., epsilon=...) without a loss."
        ) from error


def _pure(nnx: Any, state: Any) -> Any:
    return (getattr(nnx, "as_pure", None) or nnx.pure)(state)  # the older name, before 0.12.8


def _flax(caller: str) -> Any:
    try:
        return importlib.import_module("flax.nnx")
    except ImportError as error:
        raise ImportError(f'{caller} needs flax: pip install "gradreg-optax[flax]".') from error
