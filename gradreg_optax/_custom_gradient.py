"""A function with a custom gradient, under every transformation of JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradreg_optax._leaves import combine, partition, split
from gradreg_optax._numerics import widen
from gradreg_optax._sharding import axes_of, axes_of_value, varying
from gradreg_optax._types import PyTree
from gradreg_optax._validation import is_inexact

Leaves: TypeAlias = list[Any]
Output: TypeAlias = tuple[jax.Array, Leaves]  # (value, further arrays)
Plain: TypeAlias = Callable[[Leaves], Output]


class Rule(NamedTuple):
    """The custom gradient with respect to the numbers of the parameters.

    Attributes:
      function: with ``from_gradient``, ``(numbers, value, gradients) -> gradients``, a function of
        the value and its gradient; otherwise ``numbers -> (output, gradients)``, which evaluates
        both.
      from_gradient: which of the two.
    """

    function: Callable[..., Any]
    from_gradient: bool


def with_gradient(plain: Plain, rule: Rule, numbers: Leaves) -> tuple[jax.Array, Leaves]:
    """Evaluate ``plain``, with a custom gradient with respect to its argument ``numbers``.

    Derivatives of the further arrays, and derivatives with respect to values that ``plain`` closes
    over, are those of ``plain``. Forward mode, reverse mode and higher derivatives work. Each
    function is evaluated only if its result is needed.

    In a call under ``jax.jit``, ``jax.lax.scan``, ... the derivative may be taken after tracing has
    ended, so no function may close over a traced value. The functions are then traced here, and the
    values that they close over become arguments. In ``jax.shard_map`` the numbers are cast to vary
    over the axes of the value, so that their gradients sum over devices.
    """
    numbers = varying(numbers, axes_of_value(plain, numbers))
    if isinstance(jax.lax.add(0.0, 0.0), jax.core.Tracer):  # under jit, scan, ...
        return _with_arguments(plain, rule, numbers)
    try:
        return _with_gradient(plain, rule, numbers, [True for _ in numbers])
    except jax.errors.UnexpectedTracerError:  # a function closes over a differentiated value
        return _with_arguments(plain, rule, numbers)


class StaticPart:
    """The non-array part of the output of a function that may return arrays only.

    Attributes:
      whole: a function from the arrays to the output.
    """

    whole: Callable[[Leaves], PyTree]

    def arrays(self, tree: PyTree) -> Leaves:
        """Return the arrays of a tree, and store the rest."""
        arrays, self.whole = split(tree, lambda leaf: isinstance(leaf, jax.Array))
        return arrays


def _with_arguments(plain: Plain, rule: Rule, numbers: Leaves) -> Output:
    """Evaluate with functions whose closed-over arrays have become arguments."""
    explicit, constants, (value, _) = _closed(plain, numbers)
    count, last = len(numbers), len(numbers) + len(constants)  # closures must not hold the tracers
    inputs = (value, numbers) if rule.from_gradient else ()
    function, further, _ = _closed(rule.function, numbers, *inputs)

    def of_arguments(leaves: Leaves, *inputs: Any) -> Any:
        return function(leaves[last:], leaves[:count], *inputs)

    return _with_gradient(
        lambda leaves: explicit(leaves[count:last], leaves[:count]),
        rule._replace(function=of_arguments),
        [*numbers, *constants, *further],
        [*(True for _ in numbers), *(False for _ in (*constants, *further))],
    )


def _with_gradient(plain: Plain, rule: Rule, leaves: Leaves, penalised: Sequence[bool]) -> Output:
    evaluate = jax.custom_jvp(plain)

    @functools.partial(evaluate.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        (leaves,), (tangents,) = primals, tangents
        asked = [_is_asked(x, t) for x, t in zip(leaves, tangents, strict=True)]
        if not any(a and p for a, p in zip(asked, penalised, strict=True)):
            output, gradients, push = _linearized(plain, leaves, asked)
        elif rule.from_gradient:
            output, gradients, push = _regularized(plain, rule, leaves, penalised, asked)
        else:
            output, gradients, push = _accumulated(plain, rule, leaves, penalised, asked)
        of_value = _along(push, gradients, asked, tangents, leaves, value=output[0])
        return output, (of_value, _of_arrays(push, asked, tangents, leaves, output[1]))

    output: Output = evaluate(leaves)
    return output


# A pushforward: tangents of all leaves -> tangents of the output
_Push: TypeAlias = Callable[[Leaves], Output]


def _linearized(
    plain: Plain, leaves: Leaves, chosen: Sequence[bool]
) -> tuple[Output, Leaves, _Push]:
    """Return the output, its gradient (None for leaves not chosen) and its pushforward."""
    some, others = partition(leaves, chosen)
    output, linear = jax.linearize(lambda some: plain(combine(some, others, chosen)), some)
    (gradient,) = jax.linear_transpose(lambda some: linear(some)[0], some)(jnp.ones_like(output[0]))
    full = combine(gradient, [None for _ in others], chosen)
    return output, full, lambda tangents: linear(partition(tangents, chosen)[0])


def _regularized(
    plain: Plain, rule: Rule, leaves: Leaves, penalised: Sequence[bool], asked: Sequence[bool]
) -> tuple[Output, Leaves, _Push]:
    """Evaluate ``plain``, and apply the rule to its gradient in the penalised leaves."""
    needed = [a or p for a, p in zip(asked, penalised, strict=True)]
    output, gradients, push = _linearized(plain, leaves, needed)
    penalty, others = partition(gradients, penalised)
    penalty = rule.function(leaves, output[0], penalty)
    return output, combine(penalty, others, penalised), push


def _accumulated(
    plain: Plain, rule: Rule, leaves: Leaves, penalised: Sequence[bool], asked: Sequence[bool]
) -> tuple[Output, Leaves, _Push]:
    """Evaluate output and gradient together; other derivatives evaluate ``plain`` again."""
    output, gradients = _recomputed(rule.function)(leaves)
    others = [a and not p for a, p in zip(asked, penalised, strict=True)]
    _, of_others, _ = _linearized(plain, leaves, others) if any(others) else (0, leaves, 0)
    full = combine(gradients, partition(of_others, penalised)[1], penalised)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def along(leaves: Leaves, given: Leaves) -> Output:
        chosen, rest = partition(leaves, asked)
        moved: Output
        moved = jax.jvp(lambda some: plain(combine(some, rest, asked)), (chosen,), (given,))[1]
        return moved

    return output, full, lambda tangents: along(leaves, partition(tangents, asked)[0])


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with a derivative that evaluates it again instead of storing it.

    JAX ignores ``jax.checkpoint`` in the primal part of a rule, and applies it to the tangent part.
    """
    evaluate = jax.custom_jvp(function)

    @functools.partial(evaluate.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        leaves, structure = jax.tree.flatten(primals)
        given = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
        asked = [_is_asked(x, t) for x, t in zip(leaves, given, strict=True)]
        chosen, others = partition(leaves, asked)

        def of_chosen(chosen: Leaves) -> Any:
            return function(*jax.tree.unflatten(structure, combine(chosen, others, asked)))

        return function(*primals), jax.jvp(of_chosen, (chosen,), (partition(given, asked)[0],))[1]

    return evaluate


def _closed(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Sequence[Any], Any]:
    """Trace ``function``: return it with its closed-over arrays as arguments, these, its shape."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*inputs)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)

    def explicit(constants: Sequence[Any], *inputs: Any) -> Any:
        outputs = jax.core.eval_jaxpr(jaxpr, constants, *jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, outputs)

    return explicit, closed.consts, shape


def _is_asked(leaf: Any, tangent: Any) -> bool:
    return is_inexact(leaf) and not isinstance(tangent, SymbolicZero)


def _along(
    push: _Push,
    gradients: Leaves,
    asked: Sequence[bool],
    tangents: Leaves,
    leaves: Leaves,
    *,
    value: jax.Array,
) -> jax.Array:
    """Return the derivative of the value along the tangents, whose transpose is the gradients.

    In ``jax.shard_map``, if the value differs between devices and a leaf does not, the gradient in
    this leaf is a sum over devices, but the derivative is that of each device: it is pushed
    forward.
    """
    axes = axes_of(value)
    summed = [a and bool(axes - axes_of(x)) for a, x in zip(asked, leaves, strict=True)]
    products = jnp.zeros([])
    for gradient, tangent, a, s in zip(gradients, tangents, asked, summed, strict=True):
        if a and not s:
            wide = widen(gradient)
            local = jnp.sum((wide * widen(tangent).astype(wide.dtype)).real)
            more = axes_of(local) - axes  # the leaf differs between devices, and the value does not
            products = jnp.add(products, jax.lax.psum(local, tuple(more)) if more else local)
    of_value = products.astype(value.dtype)
    return of_value + push(_chosen(summed, tangents, leaves))[0] if any(summed) else of_value


def _of_arrays(
    push: _Push, asked: Sequence[bool], tangents: Leaves, leaves: Leaves, arrays: Leaves
) -> list[Any]:
    """Return the tangents of the further arrays."""
    zeros = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in arrays]
    inexact = list(map(is_inexact, arrays))
    if not (any(inexact) and any(asked)):
        return zeros
    moved = push(_chosen(asked, tangents, leaves))[1]
    return combine(partition(moved, inexact)[0], partition(zeros, inexact)[1], inexact)


def _chosen(chosen: Sequence[bool], tangents: Leaves, leaves: Leaves) -> Leaves:
    """Return the chosen tangents, and zeros in place of the others."""
    return [t if c else _zeros_like(x) for t, x, c in zip(tangents, leaves, chosen, strict=True)]


def _zeros_like(leaf: Any) -> Any:
    return varying(jnp.zeros_like(leaf), axes_of(leaf)) if is_inexact(leaf) else leaf
