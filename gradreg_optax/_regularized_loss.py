"""A loss whose gradient is the regularized one, for trainers that keep the rest to themselves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradreg_optax._cotangents import scaled, with_aux_cotangent
from gradreg_optax._leaves import apart
from gradreg_optax._loss import (
    arguments_at,
    keeps_signature,
    mean_of,
    named_arguments,
    signature_of,
    with_weight,
)
from gradreg_optax._sharding import axes_of_value, varying
from gradreg_optax._train_step import Call, Pass, counting, regularized_pass
from gradreg_optax._types import LossFn, PyTree, Weighted
from gradreg_optax._validation import check_params, check_transformation, is_inexact, whole_number


def regularized_loss(
    loss_fn: LossFn,
    regularizer: optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> LossFn:
    r"""The same loss with the regularized gradient, for any trainer that takes a loss.

    Its value, and its aux, are those of ``loss_fn``, bit for bit. Its gradient with respect to the
    parameters is what ``regularizer`` makes of :math:`\nabla L`, such as
    :math:`g + \frac{\gamma}{\epsilon}(\nabla L(\theta + \epsilon g) - g)`; with respect to other
    arguments it is that of the loss. So ``jax.grad``, ``jax.value_and_grad`` and every trainer that
    calls them train with the regularizer. Both passes see the same arguments, and aux is the clean
    pass's. Factors of the trainer's own, a loss scale say, multiply the regularized gradient.

    The loss sets the units: of a *sum* over n tokens gamma and epsilon are those of the mean
    divided by n. A trainer that adds up the gradients of micro-batches averages their regularized
    gradients.

    Cost: of an evaluation, that of the loss; of a gradient, that of the transformation. Gradients
    with respect to other arguments cost nothing where nobody asks for them.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a real scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      regularizer: ``fd_gradreg(...)``, ``dbp_gradreg(...)``, ``sam(...)``, ``flooding(...)``, or a
        chain of them. It needs no loss of its own; one that it has gets its arguments by name from
        those of ``loss_fn``. A loss keeps no state from call to call: one with a schedule,
        ``start`` or ``interval`` > 1 needs the step, ``loss(..., step=step)``, and one with more
        state than a counter is refused.
      argnums: which argument, or arguments, of ``loss_fn`` are the parameters, counted in its
        signature; of several, all together are penalised.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A loss with the signature of ``loss_fn`` and a further keyword ``step``.

    Raises:
      ValueError: a regularizer with state of its own; an argument that the call does not have.
      TypeError: the regularizer is no Optax transformation, or needs the step; a loss that is no
        real scalar; parameters that are no real or complex numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import fd_gradreg, regularized_loss
      >>> loss_fn = lambda params, x: jnp.sum((params * x) ** 2) / 2
      >>> loss = regularized_loss(loss_fn, fd_gradreg(gamma=0.5, epsilon=0.25))
      >>> params, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
      >>> print(loss(params, x), jax.grad(loss)(params, x))  # the Hessian is diag(1, 4)
      8.5 [ 1.5 24. ]

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
    """
    caller = "regularized_loss"
    check_transformation(caller, "regularizer", regularizer)
    regularized = regularized_pass(caller, regularizer)
    loss, signature = with_weight(caller, loss_fn, has_aux), signature_of(loss_fn)
    asks_for_step = signature is not None and "step" in signature.parameters

    def wrapped(*args: Any, step: Any = None, **kwargs: Any) -> Any:
        if asks_for_step and step is not None:
            kwargs["step"] = step
        if signature is not None:
            bound = signature.bind(*args, **kwargs)
            args, kwargs = bound.args, dict(bound.kwargs)
            step = bound.arguments.get("step", step)
        step = None if asks_for_step and not _counts(step) else step
        if step is not None:
            step = jnp.asarray(whole_number(caller, "step", step), jnp.int32)
        check_params(caller, arguments_at(caller, argnums, args)[0])

        def update(args: Any, kwargs: Any) -> tuple[Pass, tuple[Any, ...]]:
            params, put = arguments_at(caller, argnums, args)
            named = named_arguments(loss_fn, args, kwargs, argnums)
            call = Call(lambda p, **_: loss(*put(p), **kwargs), (), named)
            state = counting(caller, regularized.init(params), step)
            outcome = regularized.run(call, params, state)
            return outcome, put(outcome.updates)

        value, aux = _evaluated(loss, Arguments.of(argnums, args, kwargs), update)
        return (value, aux) if has_aux else value

    return keeps_signature(wrapped, loss_fn, regularizer=regularizer)


def _counts(step: Any) -> bool:
    """Whether an argument called ``step`` may be a counter's: else it is the loss's alone."""
    dtype = getattr(step, "dtype", None)
    if dtype is None:
        return isinstance(step, int) and not isinstance(step, bool)
    return jnp.issubdtype(dtype, jnp.integer)


class Arguments(NamedTuple):
    """The arguments of a call, taken apart into the numbers among their leaves and the rest.

    Attributes:
      numbers: the leaves that are real or complex, which have a gradient.
      penalised: of each number, whether it belongs to the parameters.
      call: ``numbers -> (args, kwargs)`` with these numbers in them.
      numbers_of: ``(args, kwargs) -> numbers``, of a call of the same structure.
    """

    numbers: list[Any]
    penalised: list[bool]
    call: Callable[[Sequence[Any]], Any]
    numbers_of: Callable[[Any], list[Any]]

    @classmethod
    def of(cls, argnums: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Takes the arguments of a call apart."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        numeric = [is_inexact(leaf) for leaf in leaves]
        numbers, put = apart(leaves, numeric)
        marks, others = jax.tree.unflatten(structure, [False] * len(leaves))
        params, put_params = arguments_at("", argnums, marks)
        marked = put_params(jax.tree.map(lambda _: True, params)), others

        def numbers_of(call: Any) -> list[Any]:
            return apart(jax.tree.leaves(call), numeric)[0]

        def call(numbers: Sequence[Any]) -> Any:
            return jax.tree.unflatten(structure, put(numbers))

        return cls(numbers, numbers_of(marked), call, numbers_of)


def _evaluated(
    loss: Callable[..., tuple[Weighted, Any]],
    arguments: Arguments,
    update: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Pass, tuple[Any, ...]]],
) -> tuple[jax.Array, Any]:
    """(value, aux), with the regularized gradient behind them.

    ``update`` makes of ``(args, kwargs)`` the clean pass, and the arguments with the regularized
    gradient in the place of the parameters.
    """
    aux = Aside()

    def plain(numbers: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        args, kwargs = arguments.call(numbers)
        mean, more = loss(*args, **kwargs)
        return mean_of(mean), aux.arrays(more)

    def forward(numbers: list[Any]) -> tuple[Any, Any]:
        values = [number.value for number in numbers]
        asked = [number.perturbed for number in numbers]
        chosen = list(zip(asked, arguments.penalised, strict=True))
        gradient = _gradient(plain, values, [a and not p for a, p in chosen])
        if not any(a and p for a, p in chosen):
            return plain(values), (values, gradient)
        args, kwargs = arguments.call(values)
        outcome, updated = update(args, kwargs)
        # in the order of the arguments, which need not be that of argnums
        updates, _ = apart(arguments.numbers_of((updated, kwargs)), arguments.penalised)
        _, put = apart(gradient, arguments.penalised)
        return (outcome.value, aux.arrays(outcome.aux)), (values, put(updates))

    def backward(residual: Any, cotangent: tuple[Any, Any]) -> tuple[list[Any]]:
        (values, gradient), (of_value, of_aux) = residual, cotangent
        of_numbers = scaled(of_value, gradient)
        return (with_aux_cotangent(of_numbers, lambda n: plain(n)[1], values, of_aux),)

    function = jax.custom_vjp(plain)
    function.defvjp(forward, backward, symbolic_zeros=True)
    numbers = varying(arguments.numbers, axes_of_value(plain, arguments.numbers))
    value, arrays = function(numbers)
    return value, aux.whole(arrays)


def _gradient(
    plain: Callable[[list[Any]], Any], values: list[Any], asked: list[bool]
) -> list[jax.Array]:
    """The gradient of the loss itself in the numbers that are asked for, zeros in the others."""
    zeros = [jnp.zeros_like(value) for value in values]
    if not any(asked):
        return zeros

    chosen, put = apart(values, asked)
    gradient, _ = jax.grad(lambda some: plain(put(some)), has_aux=True)(chosen)
    return apart(zeros, asked)[1](gradient)


class Aside:
    """Carries what a loss returns around a function that may return arrays only."""

    def __init__(self) -> None:
        """Nothing has been returned yet."""
        self._structure: Any = None
        self._put: Callable[[Sequence[Any]], list[Any]] = list

    def arrays(self, tree: PyTree) -> list[jax.Array]:
        """The arrays of JAX in a tree; the rest of it is kept aside."""
        leaves, self._structure = jax.tree.flatten(tree)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays, self._put = apart(leaves, is_array)
        return arrays

    def whole(self, arrays: list[jax.Array]) -> PyTree:
        """The tree with these arrays in it."""
        return jax.tree.unflatten(self._structure, self._put(arrays))
