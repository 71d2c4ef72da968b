"""Flax NNX: a train step for modules and the stock ``nnx.Optimizer``, and a regularized loss."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from gradreg_optax import _validation as validation
from gradreg_optax._arguments import signature_of
from gradreg_optax._batching import batch_size
from gradreg_optax._leaves import identical
from gradreg_optax._loss import TransformedLoss, with_weight
from gradreg_optax._microbatching import MicrobatchedLoss, pieces_of
from gradreg_optax._numerics import global_norm
from gradreg_optax._regularized_loss import RegularizedLoss, bind_step
from gradreg_optax._regularized_pass import (
    Call,
    RegularizedPass,
    check_once,
    counting,
    is_penalized,
    penalty_arguments,
)
from gradreg_optax._train_step import StepInfo, static_arguments
from gradreg_optax._types import Loss, LossFn, PyTree, Transformation, Weighted

_LOSS = "nnx_regularized_loss"


def make_nnx_train_step(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
    penalty_fraction: float = 1.0,
    static_argnames: str | Sequence[str] = (),
) -> Callable[..., StepInfo]:
    r"""Build a train step for Flax NNX modules and the stock ``nnx.Optimizer``.

    The regularizer is the first transformation of the optimizer's chain, or an argument here. The
    first pass of a step updates the model and every other NNX object among the arguments (BatchNorm
    statistics, dropout counters, ``nnx.Rngs``, metrics, a teacher) once, in place. The passes of
    the regularizer use copies of the state before the step, so that they evaluate the same
    function.

    Cost:
      As for :func:`make_train_step`. For a small module, the overhead of ``nnx.jit`` makes a step
      several times slower than a functional step; to avoid it, split the module once and use
      :func:`make_train_step`. ``ascent_groups`` is available only there, because each group would
      produce its own statistics.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``. Any argument may be, or contain, an NNX object.
      regularizer: a transformation of this package, or a chain of them. It uses the step counter of
        the optimizer. Put a regularizer with further state into the optimizer's chain.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.
      penalty_fraction: as for :func:`make_train_step`. The batch is the first argument after the
        model, passed by position or by name. With the regularizer in the optimizer's chain, a line
        search in the chain evaluates the part of the batch as well.
      static_argnames: as for :func:`make_train_step`.

    Returns:
      ``step(model, optimizer, *args, **kwargs) -> StepInfo``, which updates model and optimizer in
      place; ``optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)``. The keyword ``held_out=batch``
      is not passed to ``loss_fn``: it is for a regularizer that tunes its strength on held-out
      samples.

    Raises:
      ImportError: flax is not installed.
      TypeError: the regularizer is not an Optax transformation; the loss has an argument
        ``held_out``.
      ValueError: penalty_fraction outside (0, 1]; an unknown name in static_argnames; at the first
        step, a regularizer in both places or in neither, an optimizer in place of the regularizer,
        a regularizer argument with more state than a step counter, or a loss that changes the
        structure of an NNX object.

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
    nnx, kept = _flax(caller), validation.fraction(caller, "penalty_fraction", penalty_fraction)
    # The part of the batch is for the regularizer, in the step or in the optimizer's chain.
    kept_here, kept_there = (1.0, kept) if regularizer is None else (kept, 1.0)
    here = RegularizedPass(caller, regularizer, kept_here)
    loss, signature = _pure_loss(caller, nnx, loss_fn, has_aux), signature_of(loss_fn)
    static = static_arguments(caller, loss_fn, static_argnames, added=1)  # the optimizer

    def step(
        model: Any, optimizer: Any, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> StepInfo:
        bound = signature.bind(model, *args, **kwargs)
        arguments, keywords = (*bound.args, *bound.kwargs.values()), tuple(bound.kwargs)
        _check_optimizer(caller, nnx, optimizer)
        _check_batch(caller, arguments[1:2], kept, held_out)
        params = _pure(nnx, nnx.state(model, optimizer.wrt))
        state = here.init(params)
        check_once(caller, loss_fn, params, state, optimizer.opt_state)
        _check_place(caller, regularizer is not None, state, optimizer.opt_state)
        before, *values = nnx.clone(arguments)
        on_copies = functools.partial(loss, before, _of_model(nnx, optimizer.wrt), keywords)
        call = Call(on_copies, tuple(values), {})
        with _explained(caller, lambda: call.value_fn(params)):
            outcome = here.run(call, params, counting(caller, state, optimizer.step[...]))
        aux, changes = outcome.aux
        validation.check_arrays(caller, "aux", aux)
        _write(nnx, arguments, changes)
        updates = _refilled(nnx.state(model, optimizer.wrt), outcome.updates)
        value_fn = call.bound(params, outcome.gradient)
        with (
            penalty_arguments(caller, call, value_fn, kept_there, held_out) as extra,
            _explained(caller, lambda: call.value_fn(params)),
        ):
            optimizer.update(model, updates, value=outcome.value, grad=outcome.gradient, **extra)
        return StepInfo(outcome.value, global_norm(outcome.gradient), aux)

    jitted: Callable[..., StepInfo] = nnx.jit(step, **static)
    return jitted


def nnx_regularized_loss(
    loss_fn: Loss,
    regularizer: optax.GradientTransformation,
    *,
    wrt: Any = None,
    has_aux: bool = False,
) -> Loss:
    r"""Return the loss of an NNX module with the regularized gradient, for ``nnx.value_and_grad``.

    As in :func:`regularized_loss`, value and aux are those of ``loss_fn``, and ``nnx.grad`` returns
    the output of ``regularizer`` for the gradient. Any argument may be, or contain, an NNX object
    (``nnx.Rngs``, a metric, a teacher, a cache). After a call, each object is in the state that one
    call of ``loss_fn`` would leave. The passes of the regularizer start from the state before the
    call. For a loss in micro-batches (:func:`microbatched`), statistics are averaged over the
    micro-batches.

    Cost:
      An evaluation costs the same as that of the loss, and a gradient the same as the
      transformation.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``.
      regularizer: as for :func:`regularized_loss`. For one with more state than a step counter,
        such as :func:`relative_gradreg`, use the optimizer's chain and :func:`make_nnx_train_step`.
      wrt: a filter for the parameters that are penalised, ``nnx.Param`` by default; the same as in
        ``nnx.value_and_grad(..., argnums=nnx.DiffState(0, wrt))``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A loss with the signature of ``loss_fn`` and a further argument ``step``, if ``loss_fn`` has
      none. An argument ``step`` of ``loss_fn`` is passed to it, and the regularizer uses it as well
      if it is a whole number. For ``nnx.vmap`` and ``nnx.scan`` of the loss, ``in_axes`` must
      include the added argument: ``nnx.vmap(loss, in_axes=(0, None, None))(models, x, step)``.

    Raises:
      ImportError: flax is not installed.
      ValueError: as for :func:`regularized_loss`; a loss that changes the structure of an object.
      TypeError: as for :func:`regularized_loss`.

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
    _flax(_LOSS)
    validation.check_transformation(_LOSS, "regularizer", regularizer)
    return cast(Loss, NNXRegularizedLoss(loss_fn, has_aux, regularizer, wrt))


class NNXRegularizedLoss(TransformedLoss):
    """The loss that :func:`nnx_regularized_loss` returns."""

    def __init__(
        self, loss_fn: LossFn, has_aux: bool, regularizer: Transformation, wrt: Any
    ) -> None:
        """Store the regularizer and the filter; add ``step`` to the signature if it is missing."""
        super().__init__(loss_fn, has_aux)
        self.regularizer, self._nnx = regularizer, _flax(_LOSS)
        self._selected = _of_model(self._nnx, wrt or self._nnx.Param)
        self._loss = _pure_loss(_LOSS, self._nnx, loss_fn, has_aux)
        self.__signature__, self._adds_step = _with_step(signature_of(loss_fn))

    def evaluate(self, /, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array | None, Any]:
        """Return the mean with the regularized gradient, its weight and aux."""
        nnx, bound = self._nnx, self.__signature__.bind(*args, **kwargs)
        added = {"step": bound.arguments.pop("step", None)} if self._adds_step else {}
        args, kwargs, step = bind_step(_LOSS, self.loss_fn, bound.args, bound.kwargs | added)
        arguments = *args, *kwargs.values()
        graphdef, variables, rest = nnx.split(arguments, self._selected, ...)
        params, structure = _pure(nnx, variables), jax.tree.structure(variables)
        validation.check_params(_LOSS, params)
        init = optax.with_extra_args_support(self.regularizer).init
        state = jax.eval_shape(init, params)
        check_once(_LOSS, self.loss_fn, params, state)
        counting(_LOSS, state, step)

        # *rest has no name, so that the loss of a regularizer does not pick it by name.
        def of_arrays(params: PyTree, *rest: PyTree) -> tuple[Weighted, Any]:
            variables = jax.tree.unflatten(structure, jax.tree.leaves(params))
            model, *values = nnx.merge(graphdef, variables, *rest)
            return self._loss(model, self._selected, tuple(kwargs), params, *values)

        with _explained(_LOSS, lambda: of_arrays(params, rest)):
            regularized = RegularizedLoss(of_arrays, True, self.regularizer, 0)
            value, weight, (aux, changes) = regularized.evaluate(params, rest, step=step)
        _write(nnx, arguments, changes)
        return value, weight, aux


def _pure_loss(
    caller: str, nnx: Any, loss_fn: LossFn, has_aux: bool
) -> Callable[..., tuple[Weighted, Any]]:
    """Return a loss of ``(model, selected, keywords, params, *values)`` without side effects.

    ``params`` replace the selected variables, and ``keywords`` are the names of the last values.
    Its aux is ``(aux, changes)``, where ``changes`` maps the index of a variable among those of the
    arguments to its new arrays.
    """
    one, count = pieces_of(loss_fn)
    whole = with_weight(caller, one, has_aux)

    def loss(
        model: Any, selected: Any, keywords: Sequence[str], params: PyTree, *values: Any
    ) -> tuple[Weighted, Any]:
        arguments = nnx.clone((model, *values))
        nnx.update(arguments, _refilled(nnx.state(arguments, selected), params))
        objects = _objects(nnx, arguments)
        graphdef, before = nnx.graphdef(objects), _arrays(nnx, objects)
        positional = len(arguments) - len(keywords)
        named = dict(zip(keywords, arguments[positional:], strict=True))
        mean, aux = whole(*arguments[:positional], **named)
        if nnx.graphdef(objects) != graphdef:
            raise ValueError(
                f"{caller}: the loss must leave the structure of its NNX objects as it is, got one"
                " that adds variables (nnx.sow, a cache) or sets attributes (model.eval()). Do this"
                " before the step, or return nnx.pop(model, nnx.Intermediate) as aux."
            )
        pairs = enumerate(zip(before, _arrays(nnx, objects), strict=True))
        changes = {i: new for i, (old, new) in pairs if not identical(old, new)}
        return mean, (aux, changes)

    def in_pieces(*split: Any) -> tuple[Weighted, Any]:
        *fixed, params, batch = split[:5]

        def piece(params: PyTree, batch: PyTree) -> tuple[Weighted, Any]:
            return loss(*fixed, params, batch, *split[5:])

        mean, (aux, changes) = MicrobatchedLoss(piece, True, count).weighted(params, batch)
        return mean, (aux, jax.tree.map(_merged, changes))

    return loss if count == 1 else in_pieces


def _of_model(nnx: Any, wrt: Any) -> Callable[[Any, Any], bool]:
    """Return a filter for ``(model, *values)``: the variables of the model that ``wrt`` selects."""
    selects = nnx.filterlib.to_predicate(wrt)
    return lambda path, leaf: path[0] == 0 and selects(path[1:], leaf)


def _objects(nnx: Any, arguments: PyTree) -> list[Any]:
    """Return the NNX objects among the leaves of the arguments."""

    def is_object(x: Any) -> bool:
        return isinstance(x, nnx.Variable) or nnx.graph.is_graph_node(x)

    return list(filter(is_object, jax.tree.leaves(arguments, is_leaf=is_object)))


def _arrays(nnx: Any, objects: list[Any]) -> list[list[Any]]:
    """Return the arrays of each variable of the objects."""
    return [jax.tree.leaves(leaf) for _, leaf in nnx.to_flat_state(nnx.state(objects))]


def _write(nnx: Any, arguments: PyTree, changes: Mapping[int, list[Any]]) -> None:
    """Write the changes of a loss into the objects among the arguments."""
    objects = _objects(nnx, arguments)
    variables = list(nnx.to_flat_state(nnx.state(objects)))
    changed = [(variables[i][0], _refilled(variables[i][1], new)) for i, new in changes.items()]
    nnx.update(objects, nnx.from_flat_state(changed))


def _refilled(tree: PyTree, arrays: PyTree) -> PyTree:
    """Return the first tree, which may have NNX variables, with the leaves of the second."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


def _pure(nnx: Any, state: Any) -> Any:
    return (getattr(nnx, "as_pure", None) or nnx.pure)(state)  # the older name, before 0.12.8


def _merged(stacked: jax.Array) -> jax.Array:
    """Average the statistics of the micro-batches; take counters and keys from one of them."""
    if validation.is_inexact(stacked):
        return jnp.mean(stacked, axis=0).astype(stacked.dtype)
    return stacked[0]


def _with_step(signature: inspect.Signature) -> tuple[inspect.Signature, bool]:
    """Add an argument ``step`` if the loss has none; return whether it was added.

    It is positional if possible, because nnx.grad passes all arguments by position.
    """
    parameters = list(signature.parameters.values())
    kinds = [p.kind for p in parameters]
    if "step" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return signature, False
    step = inspect.Parameter("step", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        step = step.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    parameters = sorted([*parameters, step], key=lambda p: p.kind)
    return signature.replace(parameters=parameters), True


def _check_optimizer(caller: str, nnx: Any, optimizer: Any) -> None:
    keeps_model = isinstance(optimizer, getattr(nnx, "ModelAndOptimizer", ()))  # deprecated
    if keeps_model or not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"{caller}: the second argument of the step must be an nnx.Optimizer(model, tx,"
            f" wrt=nnx.Param), got {type(optimizer).__name__}. Call step(model, optimizer, ...)."
        )


def _check_batch(caller: str, batch: Sequence[Any], kept: float, held_out: PyTree) -> None:
    """Check for a batch that can be split, if an option needs it."""
    if not batch and (kept < 1 or held_out is not None):
        raise TypeError(
            f"{caller}: penalty_fraction and held_out= need a batch, the first argument of the loss"
            " after the model, got none. Pass the batch to the loss."
        )
    if kept < 1:
        batch_size(caller, "penalty_fraction", batch[0])


def _check_place(caller: str, here: bool, state: optax.OptState, chain: optax.OptState) -> None:
    """Check that the step or the optimizer has a regularizer."""
    if here and not is_penalized(state):
        raise ValueError(
            f"{caller}: the regularizer must be a transformation of this package, got another one"
            f" (an optimizer?). Write {caller}(loss_fn, fd_gradreg(...)), and put the optimizer in"
            " nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )
    if not (here or is_penalized(chain)):
        raise ValueError(
            f"{caller}: the step needs a regularizer, here or in the optimizer's chain, got"
            f" neither. Write {caller}(loss_fn, fd_gradreg(...)) or nnx.Optimizer(model,"
            " optax.chain(fd_gradreg(...), tx), wrt=nnx.Param). To train without a regularizer, use"
            " nnx.value_and_grad."
        )


@contextlib.contextmanager
def _explained(caller: str, clean: Callable[[], Any]) -> Iterator[None]:
    """Name the caller in an error of an update; ``clean`` raises an error of the loss."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        clean()
        raise TypeError(
            f"{caller}: the regularizer or the optimizer raised an error: {str(error).rstrip('.')}."
            f" The regularizer needs no loss, because {caller} passes one. Write"
            " fd_gradreg(gamma=..., epsilon=...)."
        ) from error


def _flax(caller: str) -> Any:
    try:
        return importlib.import_module("flax.nnx")
    except ImportError as error:
        raise ImportError(
            f'{caller}: Flax is not installed. Run pip install "gradreg-optax[flax]".'
        ) from error
