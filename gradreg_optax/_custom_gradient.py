"""A function with a custom gradient, under every transformation of JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradreg_optax._leaves import combine, partition
from gradreg_optax._loss import arguments_at
from gradreg_optax._numerics import widen
from gradreg_optax._sharding import axes_of_value, varying
from gradreg_optax._types import Argnums, PyTree
from gradreg_optax._validation import is_inexact, is_traced

Leaves: TypeAlias = list[Any]
Output: TypeAlias = tuple[jax.Array, Leaves]  # (value, further arrays)
Plain: TypeAlias = Callable[[Leaves], Output]


class Rule(NamedTuple):
    """The custom gradient with respect to the penalised leaves.

    Attributes:
      function: with ``from_gradient``, ``(leaves, value, gradients) -> gradients``, a function of
        the value and its gradient; otherwise ``leaves -> (output, gradients)``, which evaluates
        both.
      from_gradient: which of the two.
    """

    function: Callable[..., Any]
    from_gradient: bool


def with_gradient(
    plain: Plain, rule: Rule, leaves: Leaves, penalised: Sequence[bool]
) -> tuple[jax.Array, Leaves]:
    """Evaluate ``plain``, with a custom gradient with respect to the penalised leaves.

    Derivatives with respect to other leaves, derivatives of the further arrays, and derivatives
    with respect to values that ``plain`` closes over are those of ``plain``. Forward mode, reverse
    mode and higher derivatives work. Each function is evaluated only if its result is needed.

    In a call under ``jax.jit``, ``jax.lax.scan``, ... the derivative may be taken after tracing has
    ended, so no function may close over a traced value. The functions are then traced here, and the
    values that they close over become arguments.
    """
    leaves = _varying_like_the_value(plain, leaves)
    if isinstance(jax.lax.add(0.0, 0.0), jax.core.Tracer):  # under jit, scan, ...
        return _with_arguments(plain, rule, leaves, penalised)
    try:
        return _with_gradient(plain, rule, leaves, penalised)
    except jax.errors.UnexpectedTracerError:  # a function closes over a differentiated value
        return _with_arguments(plain, rule, leaves, penalised)


class ArrayArguments:
    """The arguments of a call, split into arrays and constants.

    Attributes:
      leaves: the traced leaves and the parameters; other leaves are constants.
      penalised: for each of these, whether it is a number of the parameters.
    """

    def __init__(self, argnums: Argnums, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Split the arguments of a call whose parameters are at ``argnums``."""
        leaves, self._structure = jax.tree.flatten((args, kwargs))
        marks, others = jax.tree.unflatten(self._structure, [False] * len(leaves))
        params, put = arguments_at("", argnums, marks)
        marked = jax.tree.leaves((put(jax.tree.map(lambda _: True, params)), others))
        self._numbers = [m and is_inexact(x) for m, x in zip(marked, leaves, strict=True)]
        self._is_array = [n or is_traced(x) for n, x in zip(self._numbers, leaves, strict=True)]
        self.leaves, self._constants = partition(leaves, self._is_array)
        self.penalised = partition(self._numbers, self._is_array)[0]

    def call(self, leaves: Leaves) -> Any:
        """Return ``(args, kwargs)`` with these leaves."""
        full = combine(leaves, self._constants, self._is_array)
        return jax.tree.unflatten(self._structure, full)

    def replaced(self, leaves: Leaves, numbers: Leaves) -> Leaves:
        """Return the leaves with these numbers as the penalised ones."""
        return combine(numbers, partition(leaves, self.penalised)[1], self.penalised)

    def numbers_of(self, call: Any) -> Leaves:
        """Return the penalised leaves of a call of the same structure."""
        return partition(jax.tree.leaves(call), self._numbers)[0]


class StaticPart:
    """The non-array part of the output of a function that may return arrays only."""

    def __init__(self) -> None:
        """Start without a tree."""
        self._split: Any = None

    def arrays(self, tree: PyTree) -> Leaves:
        """Return the arrays of a tree, and store the rest."""
        leaves, structure = jax.tree.flatten(tree)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays, others = partition(leaves, is_array)
        self._split = structure, others, is_array
        return arrays

    def whole(self, arrays: Leaves) -> PyTree:
        """Return the tree with these arrays."""
        structure, others, is_array = self._split
        return jax.tree.unflatten(structure, combine(arrays, others, is_array))


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


def _varying_like_the_value(plain: Plain, leaves: Leaves) -> Leaves:
    """Cast numbers to vary over the mesh axes of the value; their gradients sum over devices."""
    inexact = [is_inexact(leaf) for leaf in leaves]
    numbers, others = partition(leaves, inexact)
    return combine(varying(numbers, axes_of_value(plain, leaves)), others, inexact)


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
