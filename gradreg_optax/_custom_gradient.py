"""A function with a custom gradient, under every transformation of JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradreg_optax._leaves import combine, partition, split
from gradreg_optax._numerics import widen
from gradreg_optax._sharding import axes_of_value, varying
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


def with_gradient(
    plain: Plain, rule: Rule, numbers: Leaves, inputs: PyTree
) -> tuple[jax.Array, Leaves]:
    """Evaluate ``plain``, with a custom gradient with respect to ``numbers``.

    Derivatives of the further arrays, and derivatives with respect to values that ``plain`` closes
    over, are those of ``plain``. Forward mode, reverse mode and higher derivatives work. Each
    function is evaluated only if its result is needed.

    In a call under ``jax.jit``, ``jax.lax.scan``, ... the derivative may be taken after tracing has
    ended, so no function may close over a traced value. The functions are then traced here, and the
    values that they close over become arguments.

    Args:
      plain: ``numbers -> (value, arrays)``.
      rule: the custom gradient.
      numbers: real or complex arrays.
      inputs: the arguments of the call. If they vary over the axes of a mesh, the numbers are cast
        to vary over those of the value, and their gradients sum over devices.
    """
    numbers = varying(numbers, axes_of_value(plain, numbers, inputs))
    penalised = [True for _ in numbers]
    if isinstance(jax.lax.add(0.0, 0.0), jax.core.Tracer):  # under jit, scan, ...
        return _with_arguments(plain, rule, numbers, penalised)
    try:
        return _with_gradient(plain, rule, numbers, penalised)
    except jax.errors.UnexpectedTracerError:  # a function closes over a differentiated value
        return _with_arguments(plain, rule, numbers, penalised)


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


def _with_arguments(plain: Plain, rule: Rule, leaves: Leaves, penalised: Sequence[bool]) -> Output:
    """Evaluate with functions whose closed-over arrays have become arguments."""
    explicit, constants, (value, _) = _closed(plain, leaves)
    count, last = len(leaves), len(leaves) + len(constants)  # closures must not hold the tracers
    inputs = (value, partition(leaves, penalised)[0]) if rule.from_gradient else ()
    function, further, _ = _closed(rule.function, leaves, *inputs)

    def of_arguments(leaves: Leaves, *inputs: Any) -> Any:
        return function(leaves[last:], leaves[:count], *inputs)

    return _with_gradient(
        lambda leaves: explicit(leaves[count:last], leaves[:count]),
        rule._replace(function=of_arguments),
        [*leaves, *constants, *further],
        [*penalised, *(False for _ in (*constants, *further))],
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
        of_value = _inner_product(gradients, tangents, asked).astype(output[0].dtype)
        return output, (of_value, _tangents_of_arrays(push, leaves, tangents, asked, output[1]))

    output: Output = evaluate(leaves)
    return output


# A pushforward: tangents of the leaves, including zeros -> tangents of the arrays
_Push: TypeAlias = Callable[[Leaves], Leaves]


def _linearized(
    plain: Plain, leaves: Leaves, chosen: Sequence[bool]
) -> tuple[Output, Leaves, _Push]:
    """Return the output, its gradient (None for leaves not chosen) and its pushforward."""
    some, others = partition(leaves, chosen)
    output, linear = jax.linearize(lambda some: plain(combine(some, others, chosen)), some)
    transposed = jax.linear_transpose(lambda some: linear(some)[0], some)
    (gradient,) = transposed(jnp.ones_like(output[0]))

    def push(tangents: Leaves) -> Leaves:
        arrays: Leaves = linear(partition(tangents, chosen)[0])[1]
        return arrays

    return output, combine(gradient, [None for _ in others], chosen), push


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
    def along(leaves: Leaves, given: Leaves) -> Leaves:
        chosen, rest = partition(leaves, asked)
        arrays: Leaves
        arrays = jax.jvp(lambda some: plain(combine(some, rest, asked))[1], (chosen,), (given,))[1]
        return arrays

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


def _inner_product(gradients: Leaves, tangents: Leaves, asked: list[bool]) -> jax.Array:
    """Return the derivative along the tangents, whose transpose returns the gradients."""
    pairs = [(widen(g), t) for g, t, a in zip(gradients, tangents, asked, strict=True) if a]
    products = [jnp.sum((g * widen(t).astype(g.dtype)).real) for g, t in pairs]
    return functools.reduce(jnp.add, products, jnp.zeros([]))


def _tangents_of_arrays(
    push: _Push, leaves: Leaves, tangents: Leaves, asked: list[bool], arrays: Leaves
) -> list[Any]:
    """Return the tangents of the arrays."""
    zeros = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in arrays]
    inexact = [is_inexact(x) for x in arrays]
    if not (any(inexact) and any(asked)):
        return zeros
    triples = zip(leaves, tangents, asked, strict=True)
    full = [t if a or not is_inexact(x) else jnp.zeros_like(x) for x, t, a in triples]
    return combine(partition(push(full), inexact)[0], partition(zeros, inexact)[1], inexact)
