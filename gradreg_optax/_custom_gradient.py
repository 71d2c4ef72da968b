"""A function with a custom gradient, under every transformation of JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradreg_optax._numerics import widen
from gradreg_optax._sharding import axes_of, axes_of_value, varying
from gradreg_optax._tracing import Leaves, is_tracing
from gradreg_optax._validation import is_inexact

Output: TypeAlias = tuple[jax.Array, Leaves]  # (value, further arrays)
Plain: TypeAlias = Callable[[Leaves], Output]
Rule: TypeAlias = Callable[[Leaves], tuple[Output, Leaves]]  # -> (output, custom gradient)


def with_gradient(plain: Plain, rule: Rule, numbers: Leaves) -> Output:
    """Evaluate ``plain``, with the gradient of ``rule`` with respect to its argument ``numbers``.

    Derivatives of the further arrays, and derivatives with respect to values that ``plain`` closes
    over, are those of ``plain``. Forward mode, reverse mode and higher derivatives work. Each
    function is evaluated only if its result is needed.

    In a call under ``jax.jit``, ``jax.lax.scan``, ... the derivative may be taken after tracing has
    ended, so no function may close over a traced value. The functions are then traced here, and the
    values that they close over become arguments. In ``jax.shard_map`` the numbers are cast to vary
    over the axes of the value, so that their gradients sum over devices.
    """
    numbers = varying(numbers, axes_of_value(plain, numbers))
    if is_tracing():
        return _with_arguments(plain, rule, numbers)
    try:
        return _with_gradient(plain, rule, numbers, len(numbers))
    except jax.errors.UnexpectedTracerError:  # a function closes over a differentiated value
        return _with_arguments(plain, rule, numbers)


def _with_arguments(plain: Plain, rule: Rule, numbers: Leaves) -> Output:
    """Evaluate with functions whose closed-over arrays have become arguments."""
    plain_of, constants = _closed(plain, numbers)
    rule_of, further = _closed(rule, numbers)
    count, last = len(numbers), len(numbers) + len(constants)  # closures must not hold the tracers
    return _with_gradient(
        lambda leaves: plain_of(leaves[count:last], leaves[:count]),
        lambda leaves: rule_of(leaves[last:], leaves[:count]),
        [*numbers, *constants, *further],
        count,
    )


def _with_gradient(plain: Plain, rule: Rule, leaves: Leaves, count: int) -> Output:
    """Evaluate ``plain``, with the gradient of ``rule`` in the first ``count`` leaves."""
    evaluate = jax.custom_jvp(plain)

    @functools.partial(evaluate.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        (leaves,), (tangents,) = primals, tangents
        asked = {i: t for i, t in enumerate(tangents) if _is_asked(t)}
        others = [i for i in asked if i >= count]
        if len(others) == len(asked):
            output, gradients = _gradient(plain, leaves, others)
        else:
            output, own = _recomputed(rule)(leaves)
            gradients = _gradient(plain, leaves, others)[1] if others else {}
            gradients |= dict(enumerate(own))
        value, arrays = output
        # evaluated again where the result is used, because most callers discard it
        push = jax.checkpoint(functools.partial(_pushed, plain), prevent_cse=False)
        # gradients in these are sums over devices, and the derivative is that of each device
        summed = {i: t for i, t in asked.items() if axes_of(value) - axes_of(leaves[i])}
        along = _inner([(gradients[i], t) for i, t in asked.items() if i not in summed], value)
        if summed:
            along += push(leaves, summed)[0]
        moved = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in arrays]
        if any(map(is_inexact, arrays)):
            moved = push(leaves, asked)[1]
        return output, (along, moved)

    output: Output = evaluate(leaves)
    return output


def _gradient(
    plain: Plain, leaves: Leaves, chosen: Sequence[int]
) -> tuple[Output, dict[int, jax.Array]]:
    """Return the output, and the gradient in the leaves of these indices."""
    some = {i: leaves[i] for i in chosen}
    value, pull, arrays = jax.vjp(lambda some: plain(_put(leaves, some)), some, has_aux=True)
    (gradient,) = pull(jnp.ones_like(value))
    return (value, arrays), gradient


def _pushed(function: Callable[[Leaves], Any], leaves: Leaves, tangents: dict[int, Any]) -> Any:
    """Return the derivative along the tangents of the leaves of these indices."""
    some = {i: leaves[i] for i in tangents}
    return jax.jvp(lambda some: function(_put(leaves, some)), (some,), (tangents,))[1]


def _put(leaves: Leaves, some: dict[int, Any]) -> Leaves:
    return [some.get(i, leaf) for i, leaf in enumerate(leaves)]


def _recomputed(rule: Rule) -> Rule:
    """Return ``rule`` with a derivative that evaluates it again instead of storing it.

    JAX ignores ``jax.checkpoint`` in the primal part of a rule, and applies it to the tangent part.
    """
    evaluate = jax.custom_jvp(rule)

    @functools.partial(evaluate.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        (leaves,), (tangents,) = primals, tangents
        asked = {i: t for i, t in enumerate(tangents) if _is_asked(t)}
        return rule(leaves), _pushed(rule, leaves, asked)

    return evaluate


def _closed(function: Callable[[Leaves], Any], numbers: Leaves) -> tuple[Any, Sequence[Any]]:
    """Trace ``function``; return it with its closed-over arrays as an argument, and these."""
    closed, shape = jax.make_jaxpr(jax.jit(function), return_shape=True)(numbers)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)

    def explicit(constants: Sequence[Any], numbers: Leaves) -> Any:
        return jax.tree.unflatten(structure, jax.core.eval_jaxpr(jaxpr, constants, *numbers))

    return explicit, closed.consts


def _is_asked(tangent: Any) -> bool:
    return is_inexact(tangent) and not isinstance(tangent, SymbolicZero)


def _inner(pairs: Sequence[tuple[Any, Any]], value: jax.Array) -> jax.Array:
    """Return the derivative of the value, from pairs of a gradient and a tangent."""
    products = jnp.zeros([])
    for gradient, tangent in pairs:
        local = jnp.sum((widen(gradient) * widen(tangent)).real)
        more = axes_of(local) - axes_of(value)  # of a leaf that differs between devices
        products = jnp.add(products, jax.lax.psum(local, tuple(more)) if more else local)
    return products.astype(value.dtype)
