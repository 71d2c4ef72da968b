"""Which loss, with which arguments.

Inside the package a loss is always a function of the parameters that returns ``(value, aux)``, with
``value`` a real scalar.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax._checks import check_loss, check_params
from gradreg_optax._typing import LossFn, PyTree, ValueFn

# Names that Optax's update, or its line searches, keep for themselves: a loss cannot receive them
# by name.
RESERVED = frozenset({"updates", "state", "params", "value", "grad", "value_fn", "reuse_updates"})


def with_aux(function: str, loss_fn: LossFn, has_aux: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """``loss_fn`` as a function that returns ``(value, aux)`` and says what is wrong with its
    value.
    """
    check_loss(function, loss_fn)

    def loss(params: PyTree, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        output = loss_fn(params, *args, **kwargs)
        if not has_aux:
            return _real_scalar(function, output), None
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"{function}: with has_aux=True the loss must return (value, aux), got"
                f" {type(output).__name__}."
            )
        return _real_scalar(function, output[0]), output[1]

    return loss


def bind(
    function: str,
    loss_fn: LossFn | None,
    has_aux: bool,
    params: PyTree,
    extra_args: Mapping[str, Any],
) -> ValueFn:
    """The loss of this update as a function of the parameters alone.

    It is ``loss_fn`` if there is one, and Optax's ``value_fn=`` otherwise; further arguments are
    picked from ``extra_args`` by name.
    """
    check_params(function, params)
    if loss_fn is None:
        loss_fn, has_aux = extra_args.get("value_fn"), False
    if loss_fn is None:
        raise ValueError(
            f"{function}: has no loss: give it at construction, {function}(loss_fn, ...), or pass "
            "update(grads, state, params, value_fn=loss_of_params)."
        )
    loss = with_aux(function, loss_fn, has_aux)
    arguments = pick_arguments(function, loss_fn, extra_args)
    return lambda params: loss(params, **arguments)[0]


def pick_arguments(function: str, loss_fn: LossFn, available: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``loss_fn`` after its first, taken from ``available`` by name."""
    offered = {name: value for name, value in available.items() if name not in RESERVED}
    wanted = _parameters_after_first(loss_fn)
    if any(p.kind is p.VAR_KEYWORD for p in wanted):
        picked = offered
    else:
        picked = {p.name: offered[p.name] for p in wanted if p.name in offered}
    named = [
        p
        for p in wanted
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty
    ]
    missing = [p.name for p in named if p.kind is p.POSITIONAL_ONLY or p.name not in picked]
    if missing:
        raise TypeError(
            f"{function}: the loss needs {', '.join(map(repr, missing))},"
            f" {_remedy(missing, named)}."
        )
    return picked


def _remedy(missing: list[str], named: list[inspect.Parameter]) -> str:
    if RESERVED.intersection(missing):
        return (
            "a name that Optax's update keeps for itself: rename the argument, or pass value_fn="
            " with it closed over"
        )
    if any(p.kind is p.POSITIONAL_ONLY and p.name in missing for p in named):
        return (
            "which is positional-only and cannot be picked by name: pass value_fn= with it closed"
            " over"
        )
    call = ", ".join(f"{name}=..." for name in missing)
    return f"which update was not given: call update(grads, state, params, {call})"


def _parameters_after_first(loss_fn: LossFn) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except ValueError:  # a builtin without a signature takes the parameters alone
        return []
    first_is_variadic = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return parameters if first_is_variadic else parameters[1:]


def _real_scalar(function: str, value: Any) -> jax.Array:
    if isinstance(value, tuple):
        raise TypeError(
            f"{function}: the loss returned a tuple: if it is (value, aux), pass has_aux=True;"
            " value_fn= returns the value alone."
        )
    if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int | complex):
        raise TypeError(
            f"{function}: the loss must return a real scalar, got {type(value).__name__}."
        )
    array = jnp.asarray(value)
    if array.shape:
        raise TypeError(
            f"{function}: the loss must return a real scalar, got shape {array.shape}: take its"
            " mean or sum."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{function}: the loss must return a real scalar, got dtype {array.dtype}: take its"
            " real part or cast it."
        )
    return array
