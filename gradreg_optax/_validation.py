"""What is wrong is said at once, in a sentence that names the caller, the value and the remedy.

Values are checked where they are concrete; a tracer passes, so that everything can be jitted,
vmapped and differentiated. Every argument becomes a function here that knows who asked for it and
checks itself, so that nobody below carries names or checks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax._numerics import default_float
from gradreg_optax._types import AtStep, PyTree


class Rule(NamedTuple):
    """What an argument must be.

    Attributes:
      holds: a predicate of (number, smallest normal number of its width).
      says: the same in words, after "must".
      remedy: what to do instead.
      from_zero: a step, which as a JAX array may also be zero, and as a schedule zero or negative:
        a warm-up starts there.
    """

    holds: Callable[[float, float], bool]
    says: str
    remedy: str
    from_zero: bool = False


def _ascent_step(remedy: str) -> Rule:
    remedy = f'for a difference on the descent side use scheme="backward"; {remedy}'
    return Rule(lambda x, tiny: tiny <= x < math.inf, "be finite and > 0", remedy, from_zero=True)


RULES = {
    "gamma": Rule(
        lambda x, tiny: 0 <= x < math.inf,
        "be finite and >= 0",
        "it weighs a penalty; to reward large gradients negate the loss instead",
    ),
    "epsilon": _ascent_step("for no penalty gamma=0; for the limit epsilon -> 0 dbp_gradreg"),
    "fd_value_and_grad: epsilon": _ascent_step(
        "for no penalty gamma=0; for the limit epsilon -> 0 dbp_value_and_grad"
    ),
    "gradient_norm_penalty: epsilon": _ascent_step(
        "for no penalty gamma=0; for the limit epsilon -> 0 dbp_gradreg(..., ascent=normalized)"
    ),
    "difference_error: epsilon": _ascent_step("for the limit epsilon -> 0 hessian_vector_product"),
    "rho": Rule(
        lambda x, tiny: 0 <= x < math.inf,
        "be finite and >= 0",
        'for a difference on the descent side use gradient_norm_penalty(..., scheme="backward")',
        from_zero=True,
    ),
    "reach": _ascent_step("for no penalty strength=0")._replace(from_zero=False),
    "perturbed_sharpness: rho": Rule(
        lambda x, tiny: math.isfinite(x), "be finite", "negative steps descend"
    ),
    "level": Rule(lambda x, tiny: x == x, "be a number", "it is a value of the loss"),
    "strength": Rule(
        lambda x, tiny: 0 <= x < math.inf,
        "be finite and >= 0",
        "it is the penalty's share of the step, 0 to 1",
    ),
    "decay": Rule(
        lambda x, tiny: 0 <= x < 1, "lie in [0, 1)", "it is the memory of a running mean; try 0.9"
    ),
    "penalty_fraction": Rule(
        lambda x, tiny: 0 < x <= 1,
        "lie in (0, 1]",
        "1 takes the whole batch, and gamma=0 no penalty",
    ),
}


class Whole(NamedTuple):
    """What a whole number must be.

    Attributes:
      least: the smallest that is allowed.
      remedy: what it means, or what to do instead.
      shapes: whether it shapes the program, so that it cannot be traced.
    """

    least: int
    remedy: str
    shapes: bool = False


WHOLE_NUMBERS = {
    "interval": Whole(1, "1 applies the penalty on every update"),
    "start": Whole(0, "0 applies the penalty from the first update on"),
    "step": Whole(0, "0 is the first step"),
    "ascent_groups": Whole(1, "1 is the global ascent", shapes=True),
    "count": Whole(1, "1 is the whole batch", shapes=True),
    "num_matvecs": Whole(1, "30 is the default", shapes=True),
    "num_samples": Whole(2, "one sample carries no error", shapes=True),
}
_LARGEST = 2**31 - 1  # the range of a step counter


def scalar(
    caller: str,
    name: str,
    value: Any,
    *,
    wanted: str = "a real number",
    scheduled: bool = False,
) -> jax.Array:
    """``value`` as a real scalar of the default float width (or its own, if wider) by its rule.

    A number stays on the host: a transformation may be built before
    ``jax.distributed.initialize()``, which must come first of all that touches a device.
    """
    array = _real(caller, name, value, wanted)
    if array.shape:
        raise ValueError(
            f"{caller}: {name} must be a scalar, got shape {array.shape}: use jax.vmap for several"
            " values."
        )
    dtype, rule = _float_dtype(array.dtype), RULES.get(f"{caller}: {name}", RULES.get(name))
    with np.errstate(over="ignore"):  # what is too large becomes inf, which the rule refuses
        number: jax.Array = array.astype(dtype)
        concrete = np.nan if is_traced(value) else float(np.asarray(value).astype(dtype))
    if rule is None or is_traced(value) or (scheduled and rule.from_zero):
        return number
    warm_up = rule.from_zero and isinstance(value, jax.Array) and concrete == 0
    if not (warm_up or rule.holds(concrete, float(np.finfo(dtype).tiny))):
        got = value if rule.from_zero else f"{concrete:g}"
        raise ValueError(f"{caller}: {name} must {rule.says}, got {got}: {rule.remedy}.")
    return number


def hyperparameter(
    caller: str, name: str, value: Any, *, wanted: str = "a real number or a schedule"
) -> AtStep:
    """A number, checked now, or a schedule, checked when called: as a function of the step."""
    if not callable(value):
        scalar(caller, name, value, wanted=wanted)
        return lambda step: scalar(caller, name, value, wanted=wanted)

    def at_step(step: Any) -> jax.Array:
        number = value(check_step(caller, step))
        return scalar(caller, name, number, wanted=wanted, scheduled=True)

    return at_step


def constant(caller: str, name: str, value: Any) -> AtStep:
    """A hyperparameter of a function that counts no steps."""
    if callable(value):
        raise TypeError(
            f"{caller}: {name} is a schedule, but a gradient function counts no steps: pass"
            f" {name}=schedule(step), or use the transformation of the same family."
        )
    return hyperparameter(caller, name, value, wanted="a real number")


def whole_number(caller: str, name: str, value: Any) -> Any:
    """An int where the value is concrete; a traced one as it came, in the counter's int32."""
    least, remedy, shapes = WHOLE_NUMBERS[name]
    wanted = f"{caller}: {name} must be a whole number >= {least}"
    if callable(value):
        raise TypeError(
            f"{caller}: {name} must be a whole number, got a schedule: schedule gamma instead."
        )
    array = _real(caller, name, value, f"a whole number >= {least}")
    if array.shape:
        raise ValueError(f"{wanted}, got shape {array.shape}.")
    if is_traced(value) and shapes:
        raise TypeError(f"{caller}: {name} shapes the program and cannot be traced: pass a number.")
    if is_traced(value):
        return jnp.maximum(array.astype(jnp.int32), least)  # out of range it counts as the least
    number = np.asarray(value)[()]
    if not (least <= number <= _LARGEST and number == np.floor(number)):
        shown = f"{number:g}" if isinstance(number, np.floating) else number
        limit = f"the largest is {_LARGEST}" if number > _LARGEST else remedy
        raise ValueError(f"{wanted}, got {shown}: {limit}.")
    return int(number)


def fraction(caller: str, name: str, value: Any) -> float:
    """A part of the batch as the decimal that was written, whatever float it came in."""
    if is_traced(value):
        raise TypeError(f"{caller}: {name} shapes the program and cannot be traced: pass a number.")
    number = np.asarray(scalar(caller, name, value))
    return float(str(np.asarray(value)[()])) if number < 1 else 1.0


def check_choice(caller: str, name: str, value: Any, choices: Any) -> None:
    """One of the strings of a ``Literal``."""
    allowed = get_args(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{caller}: unknown {name} {value!r}, choose one of {', '.join(map(repr, allowed))}."
        )


def flag(caller: str, name: str, value: Any) -> bool:
    """A bool, known now: a word like "no" would count as True."""
    of_bools = isinstance(value, bool) or getattr(value, "dtype", None) == np.dtype(bool)
    if not of_bools or np.shape(value) or is_traced(value):
        traced = ", known before the program runs" if is_traced(value) else ""
        raise TypeError(f"{caller}: {name} must be True or False{traced}, got {value!r}.")
    return bool(value)


def check_transformation(caller: str, name: str, value: Any) -> None:
    """An Optax transformation, made already."""
    pair = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    if isinstance(value, type) or not pair:
        made = ", made by calling it" if callable(value) else ""
        got = getattr(value, "__name__", type(value).__name__)
        ours = name == "regularizer"
        example = "fd_gradreg(gamma=..., epsilon=...)" if ours else "optax.adam(1e-3)"
        raise TypeError(
            f"{caller}: {name} must be an Optax transformation{made}, got {got}: write"
            f" {name}={example}."
        )


def check_step(caller: str, step: Any) -> Any:
    """The step is counted."""
    if step is None:
        raise TypeError(
            f"{caller}: a schedule, start or interval > 1 needs the step, which a loss does not"
            " count: call loss(..., step=step) with a whole number."
        )
    return step


def check_state(caller: str, state: Any, kind: type) -> None:
    """The state is what ``init`` made, not what became of it in a file."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{caller}: the state must be the {kind.__name__} that init made, got"
            f" {type(state).__name__}: call init(params), or restore a checkpoint with"
            " init(params) as its target."
        )


def check_same_state(caller: str, state: Any, expected: Any) -> None:
    """The state, but for its counter, has the structure that ``init`` gives it."""
    check_state(caller, state, type(expected))
    for name in expected._fields:
        given: Any = jax.tree.structure(getattr(state, name))
        made: Any = jax.tree.structure(getattr(expected, name))
        if given != made and name != "step":
            raise TypeError(
                f"{caller}: the state must be the {type(expected).__name__} that init made, got one"
                f" of other options: its {name} is {given}, not {made}: call init(params)."
            )


def check_params(caller: str, params: PyTree) -> None:
    """Parameters are there, differentiable, and none is hidden by ``optax.masked`` around us."""
    if params is None:
        raise ValueError(f"{caller}: needs the parameters: call update(grads, state, params).")
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{caller}: some parameters are hidden (MaskedNode) by optax.masked or optax.partition"
            f" around it, so the loss cannot be evaluated: put it in front, as in"
            f" optax.chain({caller}(...), optax.masked(tx, mask)), and to climb in some parameters"
            " only give fd_gradreg or dbp_gradreg ascent=masked(mask)."
        )
    check_inexact(caller, "the parameters", params)


def check_inexact(caller: str, name: str, tree: PyTree) -> None:
    """All leaves are real or complex numbers: nothing else has a gradient."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_inexact(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} has dtype {kind}, and only real and"
                " complex numbers have a gradient: cast it, close over it, or pass it as a further"
                " argument of the loss."
            )


def check_like(caller: str, name: str, tree: PyTree, params: PyTree) -> None:
    """``tree`` has the structure and shapes of the parameters, and numbers that can be added."""
    given: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if given != expected:
        raise ValueError(
            f"{caller}: {name} and the parameters differ in structure: {given} against {expected}."
        )
    leaves, parameters = jax.tree.leaves_with_path(tree), jax.tree.leaves(params)
    for (path, leaf), parameter in zip(leaves, parameters, strict=True):
        if jnp.shape(leaf) != jnp.shape(parameter):
            raise ValueError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, its"
                f" parameter {jnp.shape(parameter)}."
            )
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(parameter):
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} is complex, its parameter real: take"
                " its real part."
            )
    check_inexact(caller, name, tree)


def check_arrays(caller: str, name: str, tree: PyTree) -> None:
    """All leaves are numbers or arrays, which can leave a compiled program."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        try:
            jax.typeof(leaf)
        except TypeError as error:
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} is of type {type(leaf).__name__},"
                " and a compiled program returns arrays only: leave it out of what the loss"
                " returns."
            ) from error


def check_key(caller: str, key: Any) -> None:
    """A single random key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key) if hasattr(key, "shape") else None
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == np.uint32 and len(shape or ()) == 1):
        got = f"{dtype} of shape {shape}" if dtype is not None else repr(key)
        raise TypeError(
            f"{caller}: key must be a single random key, got {got}: write jax.random.key(0), and"
            " use jax.vmap for several."
        )


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is made of real or complex numbers, no wider than JAX knows them."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    widest = 16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize <= widest


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def _real(caller: str, name: str, value: Any, wanted: str) -> Any:
    """``value`` as an array, JAX's where it is one already and NumPy's otherwise."""
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    floating, integer = (jnp.issubdtype(array.dtype, t) for t in (jnp.floating, jnp.integer))
    if not (floating or integer) or array.dtype.kind == "m" or array.dtype.itemsize > 8:
        raise TypeError(f"{caller}: {name} must be {wanted}, got {value!r}.")
    return array


def _float_dtype(dtype: Any) -> Any:
    """The default float dtype, or ``dtype`` itself if that is wider and switched on."""
    default = default_float()
    if not jnp.issubdtype(dtype, jnp.floating):
        return default
    own = jax.dtypes.canonicalize_dtype(dtype)
    return own if jnp.finfo(own).bits > jnp.finfo(default).bits else default
