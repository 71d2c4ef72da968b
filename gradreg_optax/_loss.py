"""Normalise user losses: one form of output, with a weight and aux; a loss bound late."""

import abc
import contextvars
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._arguments import keeps_signature, pick_arguments
from gradreg_optax._numerics import default_float, wide
from gradreg_optax._types import GradFn, LateLoss, LossFn, PyTree, ValueFn, Weighted
from gradreg_optax._validation import check_arrays, check_params, flag, is_traced


def check_loss(caller: str, loss_fn: Any) -> None:
    """Check that a loss is a function."""
    if not callable(loss_fn):
        raise TypeError(
            f"{caller}: the loss must be a function of the parameters, got"
            f" {type(loss_fn).__name__}. Pass the function, not its value."
        )


# Weights of the means that losses of this package returned inside the loss under evaluation.
_DROPPED_WEIGHTS: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "weights", default=None
)


class TransformedLoss(abc.ABC):
    """A loss of this package that wraps a user's loss, with its name and signature.

    Attributes:
      loss_fn: the wrapped loss.
      has_aux: whether both return ``(value, aux)``.
      regularizer: the transformation whose output is its gradient, or None.
    """

    regularizer: optax.GradientTransformation | None = None

    def __init__(self, loss_fn: LossFn, has_aux: bool) -> None:
        """Copy name, docstring and signature of ``loss_fn``."""
        self.loss_fn, self.has_aux = loss_fn, has_aux
        keeps_signature(self, loss_fn)

    def __get__(self, instance: Any, owner: Any) -> Any:
        """Bind the loss of a class, as for any method."""
        return self if instance is None else types.MethodType(self, instance)

    @abc.abstractmethod
    def evaluate(self, /, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array | None, Any]:
        """Return the mean, its weight (or None) and aux."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the mean, or ``(mean, aux)``."""
        mean, weight, aux = self.evaluate(*args, **kwargs)
        dropped = _DROPPED_WEIGHTS.get()
        if weight is not None and dropped is not None:
            dropped.append(weight)
        return (mean, aux) if self.has_aux else mean

    def weighted(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the mean as a ``Weighted``, for a loss that wraps this one."""
        mean, weight, aux = self.evaluate(*args, **kwargs)
        total = mean
        if weight is not None:
            total = mean.astype(weight.dtype) * jnp.where(weight == 0, 1, weight)
        output = Weighted(total, weight)
        return (output, aux) if self.has_aux else output


def with_aux(caller: str, loss_fn: LossFn, has_aux: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """Return ``loss_fn`` as a function that returns ``(value, aux)`` and checks both."""
    weighted = with_weight(caller, loss_fn, has_aux)

    def loss(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        mean, aux = weighted(*args, **kwargs)
        return mean_of(mean), aux

    return loss


def with_weight(
    caller: str, loss_fn: LossFn, has_aux: bool, *, compiled: bool = False, in_parts: bool = False
) -> Callable[..., tuple[Weighted, Any]]:
    """Return ``loss_fn`` as a function that returns ``(Weighted(total, weight), aux)``.

    A plain scalar becomes a total whose weight is None, which counts as 1. With ``compiled``, aux
    must consist of arrays, because it leaves a compiled program. A loss that is evaluated
    ``in_parts`` must not return the mean of a weighted loss, because the parts need the weight.
    """
    check_loss(caller, loss_fn)
    has_aux = flag(caller, "has_aux", has_aux)
    jitted = isinstance(loss_fn, jax.stages.Wrapped)
    inner = getattr(loss_fn, "__wrapped__", loss_fn) if jitted else loss_fn
    evaluate = inner.weighted if isinstance(inner, TransformedLoss) else loss_fn

    def loss(*args: Any, **kwargs: Any) -> tuple[Weighted, Any]:
        outer, dropped = _DROPPED_WEIGHTS.get(), list[Any]()
        _DROPPED_WEIGHTS.set(dropped)
        try:
            output, aux = evaluate(*args, **kwargs), None
        finally:
            _DROPPED_WEIGHTS.set(outer)
        if has_aux:
            output, aux = _pair(caller, output)
        if compiled:
            check_arrays(caller, "aux", aux)
        if not isinstance(output, Weighted):
            if in_parts and dropped:
                raise TypeError(
                    f"{caller}: parts of the batch need the weight of the loss, got the mean of a"
                    " weighted loss. Pass the result of microbatched or regularized_loss without a"
                    " function around it, or return Weighted(total, weight)."
                )
            return Weighted(_real_scalar(caller, output), None), aux
        total = _real_scalar(caller, output.total, cast=True)
        return Weighted(total, _weight(caller, output.weight, total)), aux

    return loss


def _pair(caller: str, output: Any) -> tuple[Any, Any]:
    if isinstance(output, Weighted) or not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"{caller}: with has_aux=True the loss must return (value, aux), got"
            f" {type(output).__name__}. Return both, or use has_aux=False."
        )
    return output


def _weight(caller: str, weight: Any, total: jax.Array) -> jax.Array | None:
    """Return the weight without a derivative, in float32 or wider, where large counts fit."""
    if weight is None:
        return None
    array = _real_scalar(caller, weight, cast=True)
    if not (is_traced(weight) or 0 <= np.asarray(weight) < math.inf):
        raise ValueError(
            f"{caller}: Weighted.weight must be finite and >= 0, got {weight}. Return the sum of"
            " the weights of the samples."
        )
    return jax.lax.stop_gradient(array.astype(wide(total.dtype)))


def mean_of(mean: Weighted) -> jax.Array:
    """Return the mean in the dtype of the total; with weight 0, the total."""
    if mean.weight is None:
        return mean.total
    total = mean.total.astype(mean.weight.dtype)
    return (total / jnp.where(mean.weight == 0, 1, mean.weight)).astype(mean.total.dtype)


def late_loss(caller: str, loss_fn: LossFn | None, has_aux: bool) -> LateLoss:
    """Return ``(params, extra_args) -> value_fn``, the loss of an update as a function of params.

    The loss is ``loss_fn``, or Optax's ``value_fn=`` if ``loss_fn`` is None. Its further arguments
    are picked from ``extra_args`` by name.
    """
    has_aux = flag(caller, "has_aux", has_aux)
    if loss_fn is not None:
        check_loss(caller, loss_fn)

    def bind(params: PyTree, extra_args: Mapping[str, Any]) -> ValueFn:
        check_params(caller, params)
        given = extra_args.get("value_fn") if loss_fn is None else loss_fn
        if given is None:
            raise ValueError(
                f"{caller}: update needs a loss, got none. Write {caller}(loss_fn, ...), or call"
                " update(grads, state, params, value_fn=loss_of_params), as make_train_step and"
                " make_nnx_train_step do. For a trainer that passes no value_fn=, use"
                " regularized_loss."
            )
        loss = with_aux(caller, given, has_aux and loss_fn is not None)
        arguments = pick_arguments(caller, given, extra_args)
        return lambda params: loss(params, **arguments)[0]

    return bind


def gradient_fn(loss: ValueFn) -> GradFn:
    """Return the gradient of a loss without aux, in the form that the estimates need."""
    grad = jax.grad(loss)
    return lambda params: (grad(params), None)


def _real_scalar(caller: str, value: Any, *, cast: bool = False) -> jax.Array:
    """Check for a real scalar; with ``cast``, convert integers and bools to floats."""
    must = f"{caller}: the loss must return a real scalar, got"
    if isinstance(value, tuple):
        raise TypeError(
            f"{must} a tuple. If it returns (value, aux), pass has_aux=True; value_fn= must return"
            " the value alone; return a sum and its weight as Weighted(total, weight)."
        )
    if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int | complex):
        raise TypeError(f"{must} {type(value).__name__}. Return a number.")
    array = jnp.asarray(value)
    if array.shape:
        raise TypeError(f"{must} shape {array.shape}. Take its mean or sum.")
    if cast and array.dtype.kind in "iub":
        return array.astype(default_float())
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{must} dtype {array.dtype}. Take its real part, or cast it.")
    return array
