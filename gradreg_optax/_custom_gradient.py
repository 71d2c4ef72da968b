"""A function with a gradient of its own, under every transformation of JAX."""

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
from gradreg_optax._types import PyTree
from gradreg_optax._validation import is_inexact, is_traced

Leaves: TypeAlias = list[Any]
Plain: TypeAlias = Callable[[Leaves], tuple[jax.Array, Leaves]]  # -> (value, arrays)
# -> ((value, arrays), gradients of the penalised leaves)
Regularized: TypeAlias = Callable[[Leaves], tuple[tuple[jax.Array, Leaves], Leaves]]


def with_gradient(
    plain: Plain, regularized: Regularized, leaves: Leaves, penalised: Sequence[bool]
) -> tuple[jax.Array, Leaves]:
    """Evaluate ``plain``; its gradient in the penalised leaves is that of ``regularized``.

    The derivative in the other leaves, that of the arrays, and the derivative in whatever ``plain``
    closes over are those of ``plain``. Forward and reverse mode work, and further derivatives. Each
    function is evaluated only where its result is needed.

    Where the call is recorded (inside ``jax.jit``, ``jax.lax.scan``, ...) its derivative may be
    taken after the recording has ended, so that no function may close over a traced value. The
    functions are then traced here, and the values they close over become arguments.
    """
    if isinstance(jax.lax.add(0.0, 0.0), jax.core.Tracer):  # recorded
        return _with_arguments(plain, regularized, leaves, penalised)
    try:
        return _with_gradient(plain, lambda some, _: regularized(some), leaves, penalised, ())
    except jax.errors.UnexpectedTracerError:  # a function closes over a differentiated value
        return _with_arguments(plain, regularized, leaves, penalised)


class ArrayArguments(NamedTuple):
    """The arguments of a call, split into arrays and constants.

    Attributes:
      leaves: the traced leaves; the others have known values and no derivative.
      penalised: whether a traced leaf is a number and belongs to the parameters.
      call: ``leaves -> (args, kwargs)`` with these leaves in place.
      numbers_of: ``(args, kwargs) -> the penalised leaves`` of a call of the same structure.
    """

    leaves: Leaves
    penalised: list[bool]
    call: Callable[[Leaves], tuple[tuple[Any, ...], dict[str, Any]]]
    numbers_of: Callable[[Any], Leaves]

    @classmethod
    def of(cls, argnums: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ArrayArguments":
        """Split the arguments of a call whose parameters are at ``argnums``."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [is_traced(leaf) for leaf in leaves]
        arrays, constants = partition(leaves, is_array)
        marks, others = jax.tree.unflatten(structure, [False] * len(leaves))
        params, put = arguments_at("", argnums, marks)
        marked = jax.tree.leaves((put(jax.tree.map(lambda _: True, params)), others))
        penalised = [
            m and is_traced(x) and is_inexact(x) for m, x in zip(marked, leaves, strict=True)
        ]

        def call(arrays: Leaves) -> Any:
            return jax.tree.unflatten(structure, combine(arrays, constants, is_array))

        def numbers_of(call: Any) -> Leaves:
            return partition(jax.tree.leaves(call), penalised)[0]

        return cls(arrays, partition(penalised, is_array)[0], call, numbers_of)


class StaticPart:
    """Carry what a loss returns around a function that may return arrays only."""

    def __init__(self) -> None:
        """Hold nothing until a tree has been split."""
        self._split: Any = None

    def arrays(self, tree: PyTree) -> Leaves:
        """Return the arrays of a tree, and keep the rest."""
        leaves, structure = jax.tree.flatten(tree)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays, others = partition(leaves, is_array)
        self._split = structure, others, is_array
        return arrays

    def whole(self, arrays: Leaves) -> PyTree:
        """Return the tree with these arrays in it."""
        structure, others, is_array = self._split
        return jax.tree.unflatten(structure, combine(arrays, others, is_array))


def _with_arguments(
    plain: Plain, regularized: Regularized, leaves: Leaves, penalised: Sequence[bool]
) -> tuple[jax.Array, Leaves]:
    """Apply ``with_gradient`` to functions that close over nothing that is traced."""
    count = len(leaves)
    explicit, constants = _closed(plain, leaves)
    gradient, further = _closed(regularized, leaves)
    return _with_gradient(
        lambda some: explicit(some[:count], some[count:]),
        lambda some, further: gradient(some[:count], further),
        [*leaves, *constants],
        [*penalised, *(False for _ in constants)],
        further,
    )


def _with_gradient(
    plain: Plain,
    regularized: Callable[[Leaves, Sequence[Any]], tuple[tuple[jax.Array, Leaves], Leaves]],
    leaves: Leaves,
    penalised: Sequence[bool],
    constants: Sequence[Any],
) -> tuple[jax.Array, Leaves]:
    """Apply a custom derivative; ``constants`` are arguments of ``regularized`` alone."""

    @jax.custom_jvp
    def evaluate(leaves: Leaves, constants: Sequence[Any]) -> tuple[jax.Array, Leaves]:
        return plain(leaves)

    @functools.partial(evaluate.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        (leaves, constants), tangents = primals, tangents[0]
        asked = [_is_asked(x, t) for x, t in zip(leaves, tangents, strict=True)]
        if any(a and p for a, p in zip(asked, penalised, strict=True)):
            output, gradients = _recomputed(regularized)(leaves, constants)
        else:
            output, gradients = plain(leaves), [None for p in penalised if p]
        others = [a and not p for a, p in zip(asked, penalised, strict=True)]
        _, of_others = partition(_gradient(plain, leaves, others), penalised)
        gradients = combine(gradients, of_others, penalised)
        of_value = _inner_product(gradients, tangents, asked).astype(output[0].dtype)
        return output, (of_value, _tangents_of_arrays(plain, leaves, tangents, asked, output[1]))

    inexact = [is_inexact(leaf) for leaf in leaves]
    numbers, others = partition(leaves, inexact)
    leaves = combine(varying(numbers, axes_of_value(plain, leaves)), others, inexact)
    output: tuple[jax.Array, Leaves] = evaluate(leaves, constants)
    return output


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with a derivative that evaluates it again instead of storing it.

    JAX drops ``jax.checkpoint`` inside the known part of a rule; beside a tangent it stays.
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


def _closed(function: Callable[[Leaves], Any], leaves: Leaves) -> tuple[Any, Sequence[Any]]:
    """Return ``function`` of (leaves, arrays that it closed over), and these arrays."""
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(leaves)

    def explicit(leaves: Leaves, constants: Sequence[Any]) -> Any:
        outputs = jax.core.eval_jaxpr(jaxpr.jaxpr, constants, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return explicit, jaxpr.consts


def _is_asked(leaf: Any, tangent: Any) -> bool:
    return is_inexact(leaf) and not isinstance(tangent, SymbolicZero)


def _gradient(plain: Plain, leaves: Leaves, asked: list[bool]) -> Leaves:
    """Return the gradient of ``plain`` in the leaves that are asked for, None for the others."""
    chosen, others = partition(leaves, asked)
    if not chosen:
        return [None for _ in leaves]
    gradient, _ = jax.grad(lambda some: plain(combine(some, others, asked)), has_aux=True)(chosen)
    return combine(gradient, [None for _ in others], asked)


def _inner_product(gradients: Leaves, tangents: Leaves, asked: list[bool]) -> jax.Array:
    """Return the derivative along the tangents; the transpose multiplies the gradients."""
    pairs = [(g, t) for g, t, a in zip(gradients, tangents, asked, strict=True) if a]
    products = [jnp.sum((widen(g) * widen(t).astype(widen(g).dtype)).real) for g, t in pairs]
    return functools.reduce(jnp.add, products, jnp.zeros([]))


def _tangents_of_arrays(
    plain: Plain, leaves: Leaves, tangents: Leaves, asked: list[bool], arrays: Leaves
) -> PyTree:
    """Return the tangents of the arrays beside the value, evaluated where they are used.

    Reverse mode records the inner ``jit`` without running it, and drops it if no array is
    differentiated.
    """
    zeros = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in arrays]
    inexact = [is_inexact(x) for x in arrays]
    if not (any(inexact) and any(asked)):
        return zeros

    @jax.jit
    def of_arrays(leaves: Leaves, tangents: Leaves) -> Leaves:
        chosen, others = partition(leaves, asked)

        def some_arrays(chosen: Leaves) -> Leaves:
            return partition(plain(combine(chosen, others, asked))[1], inexact)[0]

        return jax.jvp(some_arrays, (chosen,), (tangents,))[1]

    found = of_arrays(leaves, partition(tangents, asked)[0])
    return combine(found, partition(zeros, inexact)[1], inexact)
