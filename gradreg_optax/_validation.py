"""Argument validation: errors that name the function, the value and the remedy.

Only concrete values are checked. Tracers pass, so that everything can be jitted, vmapped and
differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._numerics import default_float
from gradreg_optax._types import AtStep, PyTree

Rule: TypeAlias = tuple[Callable[[float, float], bool], str, str]

_BACKWARD = 'Use scheme="backward" for a step in the descent direction'
_ZERO = f"{_BACKWARD}, gamma=0 for no penalty, or for the limit epsilon -> 0"


def _positive(remedy: str) -> Rule:
    return lambda x, tiny: tiny <= x < math.inf, "be finite and > 0", remedy


def _not_negative(remedy: str) -> Rule:
    return lambda x, _: 0 <= x < math.inf, "be finite and >= 0", remedy


# (a predicate of the number and the smallest normal number of its dtype, its wording, a remedy)
RULES: dict[str, Rule] = {
    "gamma": _not_negative("To reward large gradients, negate the loss"),
    "epsilon": _positive(f"{_ZERO} dbp_gradreg"),
    "fd_value_and_grad: epsilon": _positive(f"{_ZERO} dbp_value_and_grad"),
    "gradient_norm_penalty: epsilon": _positive(f"{_ZERO} dbp_gradreg(..., ascent=normalized)"),
    "difference_error: epsilon": _positive(
        f"{_BACKWARD}, or for the limit epsilon -> 0 hessian_vector_product"
    ),
    "rho": _not_negative(
        'Use gradient_norm_penalty(..., scheme="backward") for a step in the descent direction, or'
        " rho=0 for none"
    ),
    "perturbed_sharpness: rho": (
        lambda x, _: math.isfinite(x),
        "be finite",
        "Use a length in units of the parameters",
    ),
    "reach": _positive(f"{_BACKWARD}, or strength=0 for no penalty"),
    "level": (lambda x, _: x == x, "be a number", "Use a value of the loss"),
    "strength": _not_negative("Use a relative strength from 0 to 1"),
    "decay": (lambda x, _: 0 <= x < 1, "lie in [0, 1)", "Try 0.9"),
    "penalty_fraction": (lambda x, _: 0 < x <= 1, "lie in (0, 1]", "Use 1 for the whole batch"),
}
# A schedule of these may be zero or negative, and an array may be zero (the start of a warm-up).
_STEPS = {"epsilon", "rho"}
WHOLE_NUMBERS = {  # (the least allowed value, a remedy)
    "interval": (1, "Use 1 for a penalty on every update"),
    "start": (0, "Use 0 for a penalty from the first update on"),
    "step": (0, "Use 0 for the first step"),
    "ascent_groups": (1, "Use 1 for the global ascent"),
    "count": (1, "Use 1 for the whole batch"),
    "num_matvecs": (1, "Use 30, the default"),
    "num_samples": (2, "One sample has no standard error"),
}
_COUNTERS = {"interval", "start", "step"}  # may be traced; the others determine shapes
_LARGEST = 2**31 - 1  # the range of a step counter


def scalar(
    caller: str, name: str, value: Any, *, wanted: str = "a real number", scheduled: bool = False
) -> jax.Array:
    """Convert ``value`` to a real scalar of the default float dtype, or of its own wider one.

    A Python number becomes a NumPy array: a transformation may be created before
    ``jax.distributed.initialize()``, which must run before any use of a device.
    """
    array = _real(caller, name, value, wanted)
    if array.shape:
        raise ValueError(
            f"{caller}: {name} must be a scalar, got shape {array.shape}. Use jax.vmap for several"
            " values."
        )
    dtype, rule = _float_dtype(array.dtype), RULES.get(f"{caller}: {name}", RULES.get(name))
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the rule rejects
        number: jax.Array = array.astype(dtype)
        concrete = np.nan if is_traced(value) else float(np.asarray(value).astype(dtype))
    if rule is None or is_traced(value) or (scheduled and name in _STEPS):
        return number
    holds, says, remedy = rule
    warm_up = name in _STEPS and isinstance(value, jax.Array) and concrete == 0
    if not (warm_up or holds(concrete, float(np.finfo(dtype).tiny))):
        got = value if name in _STEPS else f"{concrete:g}"
        raise ValueError(f"{caller}: {name} must {says}, got {got}. {remedy}.")
    return number


def hyperparameter(
    caller: str, name: str, value: Any, *, wanted: str = "a real number or a schedule"
) -> AtStep:
    """Return a function of the step for a number, checked now, or a schedule, checked per call."""
    if not callable(value):
        scalar(caller, name, value, wanted=wanted)
        return lambda step: scalar(caller, name, value, wanted=wanted)

    def at_step(step: Any) -> jax.Array:
        number = value(check_step(caller, step))
        return scalar(caller, name, number, wanted=wanted, scheduled=True)

    return at_step


def constant(caller: str, name: str, value: Any) -> AtStep:
    """Return a hyperparameter of a function without a step counter; it cannot be a schedule."""
    if callable(value):
        raise TypeError(
            f"{caller}: {name} must be a number, got a schedule. A gradient function has no step"
            f" counter. Pass {name}=schedule(step), or use the transformation of the same family."
        )
    return hyperparameter(caller, name, value, wanted="a real number")


def whole_number(caller: str, name: str, value: Any) -> Any:
    """Convert a concrete value to an int, and a traced one to the counter's int32."""
    least, remedy = WHOLE_NUMBERS[name]
    must = f"{caller}: {name} must be a whole number"
    if callable(value):
        raise TypeError(f"{must}, got a schedule. Schedule gamma instead.")
    array = _real(caller, name, value, f"a whole number >= {least}")
    if array.shape:
        raise ValueError(f"{must} >= {least}, got shape {array.shape}.")
    if is_traced(value):
        _check_traceable(caller, name, name in _COUNTERS)
        return jnp.maximum(array.astype(jnp.int32), least)  # an error cannot depend on a tracer
    number = np.asarray(value)[()]
    if not (least <= number <= _LARGEST and number == np.floor(number)):
        shown = f"{number:g}" if isinstance(number, np.floating) else number
        limit = f"The largest is {_LARGEST}" if number > _LARGEST else remedy
        raise ValueError(f"{must} >= {least}, got {shown}. {limit}.")
    return int(number)


def fraction(caller: str, name: str, value: Any) -> float:
    """Convert a fraction of the batch to the float that prints as the decimal that was given."""
    _check_traceable(caller, name, not is_traced(value))
    number = np.asarray(scalar(caller, name, value))
    return float(str(np.asarray(value)[()])) if number < 1 else 1.0


def check_choice(caller: str, name: str, value: Any, choices: Any) -> None:
    """Check that a value is one of the strings of a ``Literal``."""
    allowed = get_args(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{caller}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
        )


def flag(caller: str, name: str, value: Any) -> bool:
    """Return a concrete bool; reject strings, since "no" would count as True."""
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == np.dtype(bool)
    if not is_bool or np.shape(value) or is_traced(value):
        traced = ", known before the program runs" if is_traced(value) else ""
        raise TypeError(f"{caller}: {name} must be True or False{traced}, got {value!r}.")
    return bool(value)


def check_transformation(caller: str, name: str, value: Any) -> None:
    """Check for an Optax transformation, not the function that creates one."""
    methods = (callable(getattr(value, method, None)) for method in ("init", "update"))
    if isinstance(value, type) or not all(methods):
        made = ", made by calling it" if callable(value) else ""
        got = getattr(value, "__name__", type(value).__name__)
        example = {"regularizer": "fd_gradreg(gamma=..., epsilon=...)"}.get(
            name, "optax.adam(1e-3)"
        )
        raise TypeError(
            f"{caller}: {name} must be an Optax transformation{made}, got {got}. Write"
            f" {name}={example}."
        )


def check_step(caller: str, step: Any) -> Any:
    """Check that there is a step."""
    if step is None:
        raise TypeError(
            f"{caller}: a schedule, start or interval > 1 needs the step, got none. A loss does not"
            " count steps. Call loss(..., step=step) with a whole number."
        )
    return step


def check_state(caller: str, state: Any, kind: type) -> None:
    """Check for a state of the type that ``init`` returns."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{caller}: the state must be the {kind.__name__} that init made, got"
            f" {type(state).__name__}. Call init(params), or restore a checkpoint with"
            " init(params) as its target."
        )


def check_same_state(caller: str, state: Any, expected: Any) -> None:
    """Check for a state of the structure that ``init`` returns; the counter may differ."""
    check_state(caller, state, type(expected))
    for name in expected._fields:
        given: Any = jax.tree.structure(getattr(state, name))
        made: Any = jax.tree.structure(getattr(expected, name))
        if given != made and name != "step":
            raise TypeError(
                f"{caller}: the state must be the {type(expected).__name__} that init made, got one"
                f" with other options: its {name} is {given}, not {made}. Call init(params)."
            )


def check_params(caller: str, params: PyTree) -> None:
    """Check that the parameters have a gradient and are not hidden by ``optax.masked``."""
    if params is None:
        raise ValueError(
            f"{caller}: update needs the parameters, got None. Call update(grads, state, params)."
        )
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{caller}: some parameters are hidden (MaskedNode) by optax.masked or optax.partition"
            " around it, so the loss cannot be evaluated. Put it in front of them, as in"
            f" optax.chain({caller}(...), optax.masked(tx, mask)). To perturb some parameters only,"
            " use fd_gradreg or dbp_gradreg with ascent=masked(mask)."
        )
    check_inexact(caller, "the parameters", params)


def check_inexact(caller: str, name: str, tree: PyTree) -> None:
    """Check that all leaves are real or complex numbers, which have a gradient."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_inexact(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} has dtype {kind}, and only real and"
                " complex numbers have a gradient. Cast it, close over it, or pass it as a further"
                " argument of the loss."
            )


def check_like(caller: str, name: str, tree: PyTree, params: PyTree) -> None:
    """Check that a tree can be added to the parameters: structure, shapes, real or complex."""
    given: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if given != expected:
        raise ValueError(
            f"{caller}: {name} must have the structure of the parameters, {expected}, got {given}."
        )
    leaves, parameters = jax.tree.leaves_with_path(tree), jax.tree.leaves(params)
    for (path, leaf), parameter in zip(leaves, parameters, strict=True):
        where = f"{caller}: {name}{jax.tree_util.keystr(path)}"
        if jnp.shape(leaf) != jnp.shape(parameter):
            wanted = f"the shape {jnp.shape(parameter)} of its parameter"
            raise ValueError(f"{where} must have {wanted}, got {jnp.shape(leaf)}.")
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(parameter):
            raise TypeError(
                f"{where} must be real, like its parameter, got a complex array. Take .real."
            )
    check_inexact(caller, name, tree)


def check_arrays(caller: str, name: str, tree: PyTree) -> None:
    """Check that a compiled program can return all leaves: numbers and arrays."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        try:
            jax.typeof(leaf)
        except TypeError as error:
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} must be an array, got"
                f" {type(leaf).__name__}. A compiled program returns arrays only. Leave it out of"
                " the output of the loss."
            ) from error


def check_key(caller: str, key: Any) -> None:
    """Check for a single random key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == np.uint32 and len(shape or ()) == 1):
        got = f"{dtype} of shape {shape}" if dtype is not None else repr(key)
        raise TypeError(
            f"{caller}: key must be a single random key, got {got}. Use jax.random.key(0), or"
            " jax.vmap for several keys."
        )


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf contains real or complex numbers of a width that JAX supports."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    widest = 16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize <= widest


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers; a Python number is a constant."""
    return is_inexact(leaf) and hasattr(leaf, "dtype")


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def _check_traceable(caller: str, name: str, traceable: bool) -> None:
    if not traceable:
        raise TypeError(
            f"{caller}: {name} must be a concrete number, got a traced one. It determines shapes:"
            " pass a Python number (jax.jit: static_argnames)."
        )


def _real(caller: str, name: str, value: Any, wanted: str) -> Any:
    """Return a JAX array as it is, and any other real number as a NumPy array."""
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not real or array.dtype.kind == "m" or array.dtype.itemsize > 8:
        raise TypeError(f"{caller}: {name} must be {wanted}, got {value!r}.")
    return array


def _float_dtype(dtype: Any) -> Any:
    """Return the default float dtype, or ``dtype`` itself if it is wider and enabled."""
    default = default_float()
    if not jnp.issubdtype(dtype, jnp.floating):
        return default
    own = jax.dtypes.canonicalize_dtype(dtype)
    return own if jnp.finfo(own).bits > jnp.finfo(default).bits else default
