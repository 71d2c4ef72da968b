"""A loss with the regularized gradient, for trainers that take a loss."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import _validation as validation
from gradreg_optax._arguments import accepts, arguments_at, named_arguments, signature_of
from gradreg_optax._custom_gradient import with_gradient
from gradreg_optax._leaves import split
from gradreg_optax._loss import TransformedLoss, with_weight
from gradreg_optax._regularized_pass import Call, RegularizedPass, check_once, counting
from gradreg_optax._tracing import StaticPart
from gradreg_optax._types import (
    Argnums,
    Args,
    Kwargs,
    Loss,
    LossFn,
    PyTree,
    Transformation,
    Weighted,
)

_CALLER = "regularized_loss"


def regularized_loss(
    loss_fn: Loss,
    regularizer: optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Loss:
    r"""Return the same loss with the regularized gradient, for any trainer that takes a loss.

    Value and aux are those of ``loss_fn``, bit for bit. The gradient with respect to the parameters
    is the output of ``regularizer`` for :math:`\nabla L`, such as
    :math:`g + \frac{\gamma}{\epsilon}(\nabla L(\theta + \epsilon g) - g)`. Gradients with respect
    to other arguments are those of the loss. So ``jax.grad``, ``jax.value_and_grad`` and every
    trainer that uses them train with the regularizer. Both passes use the same arguments, and aux
    is that of the first pass. A factor outside the loss, such as a loss scale, multiplies the
    regularized gradient.

    The loss determines the units: for a *sum* over n tokens, divide gamma and epsilon of the mean
    by n. A trainer that accumulates gradients of micro-batches averages their regularized
    gradients.

    Cost:
      An evaluation costs the same as that of the loss, and a gradient the same as the
      transformation. Gradients with respect to other arguments are computed only if requested.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, which returns a real scalar, or ``(scalar,
        aux)`` with ``has_aux``.
      regularizer: ``fd_gradreg(...)``, ``dbp_gradreg(...)``, ``sam(...)``, ``flooding(...)``, or a
        chain of them. It uses ``loss_fn``, unless it was constructed with another loss, whose
        arguments are picked by name from those of ``loss_fn``. The loss keeps no state between
        calls: with a schedule, ``start`` or ``interval`` > 1 call ``loss(..., step=step)``. A
        regularizer with more state than a counter is an error.
      argnums: the position of the parameters in the signature of ``loss_fn``, or a tuple of
        positions. With a tuple, the penalty is on the norm of all gradients together. Leaves of the
        parameters that are not arrays of real or complex numbers (the functions, integers and
        Python floats of an Equinox module) are constants.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A loss with the signature of ``loss_fn`` and a further keyword ``step``.

    Raises:
      ValueError: a regularizer with more state than a counter; a loss that is already regularized;
        an argnums without an argument.
      TypeError: a regularizer that is not an Optax transformation; a missing ``step``; a loss that
        is not a real scalar; parameters without real or complex numbers.

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
    validation.check_transformation(_CALLER, "regularizer", regularizer)
    return cast(Loss, RegularizedLoss(loss_fn, has_aux, regularizer, argnums))


class RegularizedLoss(TransformedLoss):
    """The loss that :func:`regularized_loss` returns."""

    def __init__(
        self, loss_fn: LossFn, has_aux: bool, regularizer: Transformation, argnums: Argnums
    ) -> None:
        """Store the regularizer and the positions of the parameters."""
        super().__init__(loss_fn, has_aux)
        self.regularizer, self._argnums = regularizer, argnums
        self._loss = with_weight(_CALLER, loss_fn, has_aux)
        self._pass = RegularizedPass(_CALLER, regularizer)

    def evaluate(self, /, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array | None, Any]:
        """Return the mean with the regularized gradient, its weight and aux."""
        args, kwargs, step = bind_step(_CALLER, self.loss_fn, args, kwargs)
        params, put = arguments_at(_CALLER, self._argnums, args)
        numbers, whole = split(params, validation.is_parameter)
        if numbers:
            params = jax.tree.map(lambda x: x if validation.is_parameter(x) else None, params)
        validation.check_params(_CALLER, params)
        check_once(_CALLER, self.loss_fn, params, jax.eval_shape(self._pass.init, params))
        offer = named_arguments(self.loss_fn, args, kwargs, self._argnums)

        def loss(params: PyTree) -> tuple[Weighted, Any]:
            return self._loss(*put(whole(jax.tree.leaves(params))), **kwargs)

        call, static = Call(loss, (), {}, lambda *_: offer), StaticPart()
        tree = functools.partial(jax.tree.unflatten, jax.tree.structure(params))

        def plain(numbers: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
            value, further = call.value_and_more(tree(numbers))
            return value, static.arrays(further)

        def regularized(numbers: list[Any]) -> Any:
            params = tree(numbers)
            state = counting(_CALLER, self._pass.init(params), step)
            outcome = self._pass.run(call, params, state)
            output = outcome.value, static.arrays((outcome.weight, outcome.aux))
            return output, jax.tree.leaves(outcome.updates)

        value, arrays = with_gradient(plain, regularized, numbers)
        weight, aux = static.whole(arrays)
        return value, weight, aux


def bind_step(
    caller: str, loss_fn: LossFn, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs, jax.Array | None]:
    """Bind a call of a regularized loss: ``(args, kwargs, step of the regularizer)``.

    If the loss has an argument ``step``, it receives the value, and the regularizer uses it as well
    if it is a whole number >= 0. A loss with ``**kwargs`` receives ``step`` too. Otherwise only the
    regularizer receives it.
    """
    signature, step = signature_of(loss_fn), kwargs.get("step")
    if not accepts(loss_fn, "step"):
        kwargs = {name: value for name, value in kwargs.items() if name != "step"}
    bound = signature.bind(*args, **kwargs)
    step = bound.arguments.get("step", step)
    if step is None or ("step" in signature.parameters and not whole_step(step)):
        return bound.args, bound.kwargs, None
    step = jnp.asarray(validation.whole_number(caller, "step", step), jnp.int32)
    return bound.args, bound.kwargs, step


def whole_step(step: Any) -> bool:
    """Return whether the argument ``step`` of the loss can be a step counter as well."""
    dtype = getattr(step, "dtype", np.dtype(int) if type(step) is int else np.dtype(bool))
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.shape(step):
        return False
    return validation.is_traced(step) or int(step) >= 0
