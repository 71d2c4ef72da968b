"""What is wrong is said at once, in a sentence that names the function, the value and the remedy.

Values are checked where they are concrete; a tracer passes, so that everything can be jitted,
vmapped and differentiated.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gradreg_optax._typing import AscentFn, Mode, PyTree, Scheme

Check: TypeAlias = Callable[[str, str, Any], jax.Array]

_EPSILON_REMEDY = (
    'for a difference on the descent side use scheme="backward"; for the limit epsilon -> 0 use'
    " dbp_gradreg"
)
_RADIUS_REMEDY = (
    'for a difference on the descent side use gradient_norm_penalty(..., scheme="backward")'
)


def check_scalar(function: str, name: str, value: ArrayLike) -> jax.Array:
    """Returns ``value`` as a real scalar of the default float width (or its own, if wider).

    A number stays on the host: a transformation may be built before
    ``jax.distributed.initialize()``, which must come first of all that touches a device.
    """
    array = _as_array(value)
    if array is None or not (
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(f"{function}: {name} must be a real number or a schedule, got {value!r}.")
    if array.shape:
        raise ValueError(
            f"{function}: {name} must be a scalar, got shape {array.shape}: use jax.vmap for"
            " several values."
        )
    scalar: jax.Array = array.astype(
        jnp.promote_types(jnp.result_type(array), jnp.result_type(float))
    )
    return scalar


def check_gamma(function: str, name: str, value: ArrayLike) -> jax.Array:
    """A regularization coefficient: finite and not negative."""
    array = check_scalar(function, name, value)
    number = _concrete(value, array.dtype)
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(
            f"{function}: {name} must be finite and >= 0, got {number:g}: it weighs a penalty; "
            "to reward large gradients negate the loss instead."
        )
    return array


def check_epsilon(function: str, name: str, value: ArrayLike) -> jax.Array:
    """An ascent step: finite and positive; as a JAX array also zero, where a warm-up by
    ``optax.inject_hyperparams`` starts.
    """
    array = check_scalar(function, name, value)
    number = _concrete(value, array.dtype)
    if number == 0 and isinstance(value, jax.Array):
        return array
    if number is not None and not np.finfo(array.dtype).tiny <= number < math.inf:
        remedy = _RADIUS_REMEDY if name == "rho" else _EPSILON_REMEDY
        raise ValueError(f"{function}: {name} must be finite and > 0, got {value}: {remedy}.")
    return array


def check_interval(function: str, interval: ArrayLike) -> ArrayLike:
    """A whole number of updates, at least one."""
    if callable(interval):
        raise TypeError(
            f"{function}: interval must be a whole number, got a schedule: schedule gamma instead."
        )
    number = _concrete(interval, check_scalar(function, "interval", interval).dtype)
    if number is None:
        return interval
    if not 1 <= number < math.inf or number != int(number):
        raise ValueError(
            f"{function}: interval must be a whole number >= 1, got {number:g}: 1 applies the"
            " penalty on every update."
        )
    return int(number)


def check_choice(function: str, name: str, value: Any, choices: Any) -> None:
    """One of the strings of a ``Literal``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(
            f"{function}: unknown {name} {value!r}, choose one of {', '.join(map(repr, allowed))}."
        )


def check_scheme(function: str, scheme: Scheme) -> None:
    """A finite-difference scheme."""
    check_choice(function, "scheme", scheme, Scheme)


def check_mode(function: str, mode: Mode) -> None:
    """An order of differentiation."""
    check_choice(function, "mode", mode, Mode)


def check_ascent(function: str, ascent: AscentFn | None) -> None:
    """An ascent direction is a function."""
    if ascent is not None and not callable(ascent):
        raise TypeError(
            f"{function}: ascent must be a function (gradient, params) -> direction, got"
            f" {type(ascent).__name__}: for a mask use ascent=masked(mask)."
        )


def check_loss(function: str, loss_fn: Any) -> None:
    """A loss is a function, or left to ``update``."""
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"{function}: the loss must be a function of the parameters, got"
            f" {type(loss_fn).__name__}."
        )


def check_constant(function: str, name: str, value: Any, check: Check) -> None:
    """A gradient function has no step counter, so it takes no schedules."""
    if callable(value):
        raise TypeError(
            f"{function}: {name} is a schedule, but a gradient function counts no steps: pass"
            f" {name}=schedule(step), or use the transformation of the same family."
        )
    check(function, name, value)


def check_schedule(function: str, name: str, value: Any, check: Check) -> None:
    """A transformation takes a number, checked at once, or a schedule, checked when it is
    called.
    """
    if not callable(value):
        check(function, name, value)


def check_params(function: str, params: PyTree) -> None:
    """Parameters are there, and none of them is hidden by ``optax.masked`` around us."""
    if params is None:
        raise ValueError(f"{function}: needs the parameters: call update(grads, state, params).")
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{function}: some parameters are hidden (MaskedNode) by optax.masked or"
            " optax.partition around it, so the loss cannot be evaluated: put it in front, as in"
            f" optax.chain({function}(...), optax.masked(tx, mask)), and to climb in some"
            " parameters only give fd_gradreg or dbp_gradreg ascent=masked(mask)."
        )


def check_like(function: str, name: str, tree: PyTree, params: PyTree) -> None:
    """``tree`` has the structure and shapes of the parameters."""
    found: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(
            f"{function}: {name} and the parameters differ in structure: {found} against"
            f" {expected}."
        )
    for (path, leaf), parameter in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(parameter):
            raise ValueError(
                f"{function}: {name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, its"
                f" parameter {jnp.shape(parameter)}."
            )


def at_step(function: str, name: str, value: Any, check: Check, step: jax.Array) -> jax.Array:
    """The value of a number or schedule at ``step``, checked; a scheduled ascent step may be zero
    or negative.
    """
    if not callable(value):
        return check(function, name, value)
    return (
        check_scalar(function, name, value(step))
        if check is check_epsilon
        else check(function, name, value(step))
    )


def _as_array(value: Any) -> Any:
    """``value`` as an array, JAX's where it is one already and NumPy's otherwise; None where it
    holds no numbers.
    """
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.number) else None


def _concrete(value: Any, dtype: Any) -> float | None:
    """The number that ``value`` is once rounded to ``dtype``; None while it is traced."""
    return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value).astype(dtype))
