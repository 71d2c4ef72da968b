"""Convolutions inside conditionals and loops, where XLA's CPU backend leaves them slow.

That backend has a fast kernel for inputs in the order NHWC and kernels in the order HWIO. XLA brings other convolutions into this
order, but only at the outermost level of a program: under ``lax.cond`` or ``lax.scan`` the gradient of a convolution, which never comes
in this order, runs five to ten times slower (https://github.com/jax-ml/jax/issues/12868). ``canonical_convolutions`` does in the branch
or the body what XLA does outside.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core.primitives import conv_general_dilated_p
from jax.lax import ConvDimensionNumbers

_F = TypeVar("_F", bound=Callable[..., Any])
_JAXPRS: Any = (ClosedJaxpr, Jaxpr)


def canonical_convolutions(fun: _F) -> _F:
    """The same function of arrays, whose convolutions a CPU gets in its own order; other platforms get them as they are."""

    @functools.wraps(fun)
    def canonical(*args: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        leaves = jaxpr_as_fun(_rewritten(jaxpr, {}))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return canonical  # type: ignore[return-value]


def _rewritten(value: Any, seen: dict[Any, Any]) -> Any:
    """A jaxpr, or a tuple of them, with the convolutions replaced at every depth; any other parameter of an equation as it is."""
    if isinstance(value, tuple) and any(isinstance(branch, ClosedJaxpr) for branch in value):
        return tuple(_rewritten(branch, seen) for branch in value)
    if not isinstance(value, _JAXPRS):
        return value
    if value not in seen:  # what is shared is still compiled once
        closed = isinstance(value, ClosedJaxpr)
        inside = {"jaxpr": _rewritten(value.jaxpr, seen)} if closed else {"eqns": [_replaced(eqn, seen) for eqn in value.eqns]}
        seen[value] = value.replace(**inside)
    return seen[value]


def _replaced(eqn: Any, seen: dict[Any, Any]) -> Any:
    """An equation with its jaxprs rewritten, or the call of a function that stands for a convolution."""
    if eqn.primitive.name == "shard_map":  # its body can be traced only where its mesh axes are
        return eqn
    if eqn.primitive is not conv_general_dilated_p:
        return eqn.replace(params={name: _rewritten(value, seen) for name, value in eqn.params.items()})
    convolution = functools.partial(_convolution, parameters=tuple(eqn.params.items()))
    (call,) = jax.make_jaxpr(convolution)(*(operand.aval for operand in eqn.invars)).eqns
    return eqn.replace(primitive=call.primitive, params=call.params)


@functools.partial(jax.jit, static_argnames="parameters")
def _convolution(lhs: jax.Array, rhs: jax.Array, *, parameters: tuple[tuple[str, Any], ...]) -> jax.Array:
    given = dict(parameters)
    (n, c, *space), (o, i, *window), (out_n, out_c, *out_space) = given["dimension_numbers"]  # batch and channels come before space
    rank = len(space) + 2
    nhwc, hwio = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))

    def as_it_is(lhs: jax.Array, rhs: jax.Array) -> Any:
        return conv_general_dilated_p.bind(lhs, rhs, **given)

    def canonical(lhs: jax.Array, rhs: jax.Array) -> Any:
        lhs, rhs = jax.lax.transpose(lhs, (n, *space, c)), jax.lax.transpose(rhs, (*window, i, o))
        order = ConvDimensionNumbers(nhwc, hwio, nhwc)
        out = conv_general_dilated_p.bind(lhs, rhs, **given | {"dimension_numbers": order})
        return jax.lax.transpose(out, np.argsort((out_n, *out_space, out_c)))

    result: jax.Array = jax.lax.platform_dependent(lhs, rhs, cpu=canonical, default=as_it_is)
    return result
