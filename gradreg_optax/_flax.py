"""Flax NNX: a train step for modules and the stock ``nnx.Optimizer``, and a regularized loss."""

import contextlib
import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from gradreg_optax._loss import TransformedLoss, check_own_keyword, signature_of, with_weight
from gradreg_optax._microbatching import MicrobatchedLoss, pieces_of
from gradreg_optax._numerics import global_norm
from gradreg_optax._regularized_loss import RegularizedLoss, whole_step
from gradreg_optax._train_step import (
    Call,
    StepInfo,
    check_held_out,
    check_once,
    counting,
    is_penalized,
    penalty_arguments,
    regularized_pass,
)
from gradreg_optax._types import Loss, LossFn, PyTree, Weighted
from gradreg_optax._validation import (
    check_arrays,
    check_params,
    check_transformation,
    flag,
    fraction,
    is_inexact,
    whole_number,
)


def make_nnx_train_step(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation | None = None,
    *,
    has_aux: bool = False,
    penalty_fraction: float = 1.0,
    static_argnames: str | Sequence[str] = (),
) -> Callable[..., StepInfo]:
    r"""Build a train step for Flax NNX modules and the stock ``nnx.Optimizer``.

    The regularizer is the first transformation of the optimizer's chain, or is passed here. Each
    step makes one clean pass, which updates the model and every other NNX object among the
    arguments (BatchNorm statistics, dropout counters, ``nnx.Rngs``, metrics, a teacher) once, in
    place. The passes of the regularizer run on copies of the state before the step, so that they
    evaluate the same function.

    Cost: as for :func:`make_train_step`. On a small module the bookkeeping of ``nnx.jit`` makes a
    step several times slower than a functional step. Where that matters, split the module once and
    use :func:`make_train_step`. That function also has ``ascent_groups``, which this one has not:
    each group would leave its own statistics.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``. Any argument may be, or contain, an NNX object.
      regularizer: a transformation of this package, or a chain of them. Its step counter is the
        optimizer's. A regularizer with further state belongs in the optimizer's chain.
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
      ValueError: penalty_fraction outside (0, 1]; a static argument that the loss does not have; at
        the first step a regularizer in both places or in neither, an optimizer in place of the
        regularizer, a regularizer here that has more state than a step counter, or a loss that
        changes the structure of an object.

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
    # A regularizer in the optimizer's chain is given the part there, one in the step here.
    here = regularized_pass(caller, regularizer, 1.0 if regularizer is None else kept)
    loss, signature = _split_loss(caller, loss_fn, has_aux), _signature(loss_fn)
    static = _static(caller, static_argnames, signature)
    check_own_keyword(caller, "held_out", loss_fn)

    def step(
        model: Any, optimizer: Any, *args: Any, held_out: PyTree = None, **kwargs: Any
    ) -> StepInfo:
        _check_optimizer(caller, nnx, optimizer)
        split = _Split.of(nnx, optimizer.wrt, signature.bind(model, *args, **kwargs))
        _check_batch(caller, split.values, kept < 1 or held_out is not None)
        state = here.init(split.params)
        check_once(caller, loss_fn, split.params, state, optimizer.opt_state)
        _check_place(caller, regularizer is not None, state, optimizer.opt_state)
        call = Call(functools.partial(loss, split), split.values, {}, held_out=held_out)
        clean = call if regularizer is not None else call._replace(held_out=None)
        with _explained(caller, lambda: call.value_fn(split.params)):
            outcome = here.run(clean, split.params, counting(caller, state, optimizer.step[...]))
        aux, changes = outcome.aux
        check_arrays(caller, "aux", aux)
        split.put_back(changes)
        extra = {"value_fn": call.value_fn}
        if regularizer is None:
            extra = penalty_arguments(caller, call, kept)
        updates = _refilled(nnx.state(model, optimizer.wrt), outcome.updates)
        with _explained(caller, lambda: call.value_fn(split.params)):
            optimizer.update(model, updates, value=outcome.value, grad=outcome.gradient, **extra)
        check_held_out(caller, extra)
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
    what ``regularizer`` makes of the gradient. Any argument may be, or contain, an NNX object
    (``nnx.Rngs``, a metric, a teacher, a cache). A call leaves each object as one call of
    ``loss_fn`` leaves it; the passes of the regularizer start from the state before the call. A
    loss in micro-batches (:func:`microbatched`) averages what its micro-batches leave.

    Cost: of an evaluation, that of the loss; of a gradient, that of the transformation.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``.
      regularizer: as for :func:`regularized_loss`. One with more state than a step counter, such as
        :func:`relative_gradreg`, belongs in the optimizer's chain, with
        :func:`make_nnx_train_step`.
      wrt: a filter for the parameters that are penalised, ``nnx.Param`` by default; the same as in
        ``nnx.value_and_grad(..., argnums=nnx.DiffState(0, wrt))``.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A loss with the signature of ``loss_fn`` and a further argument ``step``, if ``loss_fn`` has
      none. An argument ``step`` of ``loss_fn`` is passed to it, and the regularizer counts by it
      too if it is a whole number.

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
    caller = "nnx_regularized_loss"
    _flax(caller)
    check_transformation(caller, "regularizer", regularizer)
    loss: Any = _NNXRegularizedLoss(loss_fn, flag(caller, "has_aux", has_aux), regularizer, wrt)
    return cast(Loss, loss)


class _NNXRegularizedLoss(TransformedLoss):
    """The loss that :func:`nnx_regularized_loss` returns."""

    def __init__(
        self, loss_fn: Any, has_aux: bool, regularizer: optax.GradientTransformation, wrt: Any
    ) -> None:
        """Store the regularizer and the filter; add ``step`` to the signature if it is missing."""
        super().__init__(loss_fn, has_aux)
        self.regularizer, self._wrt = regularizer, wrt
        self._caller = "nnx_regularized_loss"
        self._loss = _split_loss(self._caller, loss_fn, has_aux)
        signature = _signature(loss_fn)
        self._takes_step = _takes(signature, "step")
        self.__signature__ = signature if self._takes_step else _with_step(signature)

    def evaluate(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array | None, Any]:
        """Return the value with the regularized gradient, its weight and aux."""
        nnx, bound = _flax(self._caller), self.__signature__.bind(*args, **kwargs)
        step = _step(self._caller, bound, self._takes_step)
        split = _Split.of(nnx, self._wrt or nnx.Param, bound)
        check_params(self._caller, split.params)
        init = optax.with_extra_args_support(self.regularizer).init
        counting(self._caller, jax.eval_shape(init, split.params), step)

        def of_arrays(params: PyTree, rest: PyTree, values: Any) -> tuple[Any, Any]:
            return self._loss(split._replace(rest=rest), params, *values)

        arrays = split.params, split.rest, split.values
        with _explained(self._caller, lambda: of_arrays(*arrays)):
            pure = RegularizedLoss(of_arrays, True, self.regularizer, 0)
            value, weight, (aux, changes) = pure.evaluate(*arrays, step=step)
        split.put_back(changes)
        return value, weight, aux


class _Split(NamedTuple):
    """The arguments of a loss, split into the state of their NNX objects and everything else.

    Attributes:
      nnx: the module ``flax.nnx``.
      objects: ``(model, *values)``, of each argument the NNX objects alone.
      graphdef: the static part of the objects.
      selected: the structure of the selected parameters, with NNX's variables.
      params: their arrays, by their path in the model.
      rest: the other state of the objects before the call, and what the model contains apart from
        objects.
      values: the arguments after the model without their objects, the batch first.
      names: the keywords of the last of them.
    """

    nnx: Any
    objects: tuple[Any, ...]
    graphdef: Any
    selected: Any
    params: PyTree
    rest: tuple[PyTree, PyTree]
    values: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, nnx: Any, wrt: Any, bound: inspect.BoundArguments) -> "_Split":
        """Split the arguments of a call; ``wrt`` selects the parameters of the model."""
        arguments, is_object = (*bound.args, *bound.kwargs.values()), _is_object(nnx)
        objects = tuple(_objects_of(argument, is_object) for argument in arguments)
        model, *values = jax.tree.map(
            lambda x: None if is_object(x) else x, arguments, is_leaf=is_object
        )
        selects = nnx.filterlib.to_predicate(wrt)
        graphdef, params, state = nnx.split(
            objects, lambda path, leaf: path[0] == 0 and selects(path[1:], leaf), ...
        )
        pure = (getattr(nnx, "as_pure", None) or nnx.pure)(params)  # older than 0.12.8: pure
        snapshot = jax.tree.map(lambda x: x, state)  # nnx.split returns the variables themselves
        fixed = (nnx, objects, graphdef, jax.tree.structure(params))
        params, rest = pure.get(0, nnx.State({})), (snapshot, model)
        return cls(*fixed, params, rest, tuple(values), tuple(bound.kwargs))

    def merged(self, params: PyTree) -> tuple[Any, ...]:
        """Return copies of the objects with these parameters."""
        variables = jax.tree.unflatten(self.selected, jax.tree.leaves(params))
        objects: tuple[Any, ...]
        objects = self.nnx.merge(self.graphdef, variables, self.rest[0], copy=True)
        return objects

    def called(self, loss_fn: LossFn, objects: tuple[Any, ...], values: Sequence[Any]) -> Any:
        """Call a loss with these objects among the arguments."""
        is_object, arguments = _is_object(self.nnx), [self.rest[1], *values]
        arguments = jax.tree.map(
            lambda o, x: x if o is None else o,
            list(objects),
            arguments,
            is_leaf=lambda x: x is None or is_object(x),
        )
        positional = len(arguments) - len(self.names)
        keywords = dict(zip(self.names, arguments[positional:], strict=True))
        return loss_fn(*arguments[:positional], **keywords)

    def variables(self, objects: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        """Return the pairs (path, variable or array) of the state of these objects."""
        return list(self.nnx.to_flat_state(self.nnx.state(objects)))

    def put_back(self, changes: Mapping[int, list[Any]]) -> None:
        """Write the changes of a call, by the number of the variable, into the objects."""
        variables = self.variables(self.objects)
        changed = [(variables[i][0], _refilled(variables[i][1], new)) for i, new in changes.items()]
        self.nnx.update(self.objects, self.nnx.from_flat_state(changed))


def _split_loss(caller: str, loss_fn: LossFn, has_aux: bool) -> Callable[..., tuple[Weighted, Any]]:
    """Return the loss of ``(split, params, *values)``; its aux is (aux, changes of the state)."""
    one, count = pieces_of(loss_fn)
    whole = with_weight(caller, one, has_aux)

    def loss(split: _Split, params: PyTree, *values: Any) -> tuple[Weighted, Any]:
        objects = split.merged(params)
        before = [jax.tree.leaves(leaf) for _, leaf in split.variables(objects)]
        mean, aux = split.called(whole, objects, values)
        _check_structure(caller, split, objects)
        after = [jax.tree.leaves(leaf) for _, leaf in split.variables(objects)]
        pairs = enumerate(zip(before, after, strict=True))
        return mean, (aux, {i: new for i, (old, new) in pairs if not _same(old, new)})

    def in_pieces(split: _Split, params: PyTree, *values: Any) -> tuple[Weighted, Any]:
        def piece(params: PyTree, *values: Any, rest: Any) -> tuple[Weighted, Any]:
            return loss(split._replace(rest=rest), params, *values)

        parts = MicrobatchedLoss(piece, True, count)
        mean, (aux, changes) = parts.weighted(params, *values, rest=split.rest)
        return mean, (aux, jax.tree.map(_merged, changes))

    return loss if count == 1 else in_pieces


def _merged(stacked: jax.Array) -> jax.Array:
    """Average the statistics of the micro-batches; take counters and keys from one of them."""
    if is_inexact(stacked):
        return jnp.mean(stacked, axis=0).astype(stacked.dtype)
    return stacked[0]


def _same(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _refilled(tree: PyTree, arrays: PyTree) -> PyTree:
    """Return the structure of the first tree, NNX's variables in it, with the second's leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


def _is_object(nnx: Any) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, nnx.Variable) or nnx.graph.is_graph_node(x)


def _objects_of(argument: PyTree, is_object: Callable[[Any], bool]) -> PyTree:
    """Return the argument with None in place of all leaves but objects, None if it has none."""
    tree = jax.tree.map(lambda x: x if is_object(x) else None, argument, is_leaf=is_object)
    return tree if jax.tree.leaves(tree, is_leaf=is_object) else None


def _signature(loss_fn: LossFn) -> inspect.Signature:
    return signature_of(loss_fn) or inspect.signature(lambda *args, **kwargs: None)


def _takes(signature: inspect.Signature, name: str) -> bool:
    """Return whether a function with this signature takes a keyword."""
    kinds = [p.kind for p in signature.parameters.values()]
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _with_step(signature: inspect.Signature) -> inspect.Signature:
    """Add an argument ``step``, positional where it can be: nnx.grad takes no keyword-only ones."""
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind < inspect.Parameter.VAR_POSITIONAL]
    others = parameters[len(positional) :]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in others)
    kind = inspect.Parameter.KEYWORD_ONLY if variadic else inspect.Parameter.POSITIONAL_OR_KEYWORD
    step = inspect.Parameter("step", kind, default=None)
    parameters = [*parameters, step] if variadic else [*positional, step, *others]
    return signature.replace(parameters=parameters)


def _step(caller: str, bound: inspect.BoundArguments, takes_step: bool) -> Any:
    """Return the step of the regularizer; remove it from the arguments if the loss has none."""
    step = bound.kwargs.get("step", bound.arguments.get("step"))
    if not takes_step:
        bound.arguments.pop("step", None)
    if step is None or (takes_step and not whole_step(step)):
        return None
    return whole_number(caller, "step", step)


def _static(
    caller: str, names: str | Sequence[str], signature: inspect.Signature
) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of nnx.jit that make arguments of the loss static."""
    names = (names,) if isinstance(names, str) else tuple(names)
    model, *known = [*signature.parameters]
    for name in names:
        if name == model or (name not in known and not _takes(signature, name)):
            raise ValueError(
                f"{caller}: static_argnames must name arguments of the loss after the model, got"
                f" {name!r}. Choose from {known}."
            )
    numbers = tuple(known.index(name) + 2 for name in names if name in known)
    return {"static_argnames": names, "static_argnums": numbers} if names else {}


def _check_structure(caller: str, split: _Split, objects: tuple[Any, ...]) -> None:
    """Check that the loss changed arrays only."""
    if split.nnx.graphdef(objects) != split.graphdef:
        raise ValueError(
            f"{caller}: the loss must leave the structure of its NNX objects as it is, but adds or"
            " removes variables (nnx.sow, a cache) or sets attributes (model.eval()). Do so before"
            " the step; return intermediate values as aux, nnx.pop(model, nnx.Intermediate)."
        )


def _check_optimizer(caller: str, nnx: Any, optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"{caller}: step(model, optimizer, ...) takes an nnx.Optimizer(model, tx,"
            f" wrt=nnx.Param) in the second place, got {type(optimizer).__name__}."
        )


def _check_batch(caller: str, values: tuple[Any, ...], needed: bool) -> None:
    if needed and not values:
        raise TypeError(
            f"{caller}: penalty_fraction and held_out= need a batch, the first argument of the loss"
            " after the model. Pass the batch to the loss."
        )


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
    """Name the caller in an error of the regularizer; ``clean`` raises those of the loss."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        clean()
        raise TypeError(
            f"{caller}: the regularizer failed: {error} {caller} passes it the loss, so that it"
            " needs no loss of its own: write fd_gradreg(gamma=..., epsilon=...)."
        ) from error


def _flax(caller: str) -> Any:
    try:
        return importlib.import_module("flax.nnx")
    except ImportError as error:
        raise ImportError(f'{caller} needs flax: pip install "gradreg-optax[flax]".') from error
