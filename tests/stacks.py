"""Stacks of transformations of a loss with arguments of every kind, and their references.

The reference of a regularized loss needs no rule of its own: with R the penalty's gradient by hand,
the function ``loss(p) + sum(stop_gradient(R) * (p - stop_gradient(p)))`` has the value of the loss,
its gradient plus R for the parameters, and its gradient for everything else.
"""

import functools

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gradreg_optax import (
    dbp_gradreg,
    fd_gradreg,
    microbatched,
    nnx_regularized_loss,
    regularized_loss,
)

GAMMA, EPSILON = 0.1, 0.2
FD = fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}  # gradients of some ten operations, of size one

# --- the loss, with further arguments of every kind

LEAVES = {
    "float": lambda: jnp.asarray([0.5, 1.0, 2.0]),
    "complex": lambda: jnp.asarray([0.5, 1.0 + 1.0j, -2.0j]),
    "integer": lambda: jnp.arange(3),
    "bool": lambda: jnp.asarray([True, False, True]),
    "key": lambda: jax.random.key(1),
    "old key": lambda: jax.random.PRNGKey(1)[1:],
    "None": lambda: None,
    "NumPy": lambda: np.arange(3),
    "Python": lambda: (2, 0.5, True),
    "all": lambda: {name: LEAVES[name]() for name in ("float", "integer", "bool", "key", "None")},
}


def factor(leaf):
    """What a leaf multiplies the parameters by."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)[-1]
    return (leaf * (1 + 0.5j)).real + 0.5


def loss_fn(params, batch, leaf=None, *, activation="tanh"):
    w = params["w"]
    for each in jax.tree.leaves(leaf):
        w = w * factor(each)
    outputs = getattr(jax.lax, activation)(batch["x"] @ w + batch["y"])
    return ((outputs * (0.5 + batch["seen"])) ** 2).mean()


def params_of():
    return {"w": jnp.asarray([0.5, -1.0, 0.3])}


def batch_of():
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    return {"x": x, "y": jnp.arange(4) % 2, "seen": jnp.asarray([True, False, True, True])}


def penalised(loss, hessian_product=False):
    """The loss with the regularized gradient of its first argument, without a rule of its own."""

    def surrogate(params, *args, **kwargs):
        fixed = jax.lax.stop_gradient(params)
        gradient_of = jax.grad(lambda p: loss(p, *args, **kwargs))
        gradient = gradient_of(fixed)
        if hessian_product:
            product = jax.jvp(gradient_of, (fixed,), (gradient,))[1]
        else:
            ahead = gradient_of(jax.tree.map(lambda p, g: p + EPSILON * g, fixed, gradient))
            product = jax.tree.map(lambda a, g: (a - g) / EPSILON, ahead, gradient)
        moved = jax.tree.map(lambda p, f: p - f, params, fixed)
        pull = optax.tree.vdot(jax.lax.stop_gradient(product), moved)
        return loss(params, *args, **kwargs) + GAMMA * pull

    return surrogate


def in_two_parts(loss):
    """The mean over the micro-batches, whose stacks may take other branches than the batch's."""

    def mean(params, batch, *args, **kwargs):
        parts = [jax.tree.map(lambda x, j=j: x[j::2], batch) for j in range(2)]
        return sum(loss(params, part, *args, **kwargs) for part in parts) / 2

    return mean


class Module(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)


def of_nnx_module(loss):
    """``nnx_regularized_loss`` as a function of the parameters."""

    def of_module(model, *args, **kwargs):
        return loss({"w": model.w[...]}, *args, **kwargs)

    ours = nnx_regularized_loss(of_module, FD)
    return lambda params, *args, **kwargs: ours(Module(params["w"]), *args, **kwargs)


class Tree(eqx.Module):
    w: jax.Array
    word: str
    count: jax.Array
    function: object


def of_equinox_module(loss):
    """``regularized_loss`` of a partitioned module, whose static part is an argument."""

    def of_parts(params, static, *args, **kwargs):
        model = eqx.combine(params, static)
        assert (model.word, model.function) == ("word", jnp.tanh)
        return loss({"w": model.w * model.count}, *args, **kwargs)

    ours = regularized_loss(of_parts, FD)

    def of_params(params, *args, **kwargs):
        model = Tree(params["w"], "word", jnp.asarray(1), jnp.tanh)
        return ours(*eqx.partition(model, eqx.is_inexact_array), *args, **kwargs)

    return of_params


# entry point -> (ours, the reference)
WAYS = {
    "regularized_loss": (lambda f: regularized_loss(f, FD), penalised),
    "nnx_regularized_loss": (of_nnx_module, penalised),
    "Equinox": (of_equinox_module, penalised),
    "microbatched": (lambda f: microbatched(f, 2), in_two_parts),
    "micro-batches regularized": (
        lambda f: regularized_loss(microbatched(f, 2), FD),
        lambda f: penalised(in_two_parts(f)),
    ),
    "regularized micro-batches": (
        lambda f: microbatched(regularized_loss(f, FD), 2),
        lambda f: in_two_parts(penalised(f)),
    ),
    "product": (
        lambda f: regularized_loss(f, dbp_gradreg(gamma=GAMMA)),
        functools.partial(penalised, hessian_product=True),
    ),
}

# --- transformations of f(params, batch, leaf), whose result may be any tree of numbers

SCALES = (1.0, 0.5)


def each(apply):
    """The sum over two scales of the parameters; batch and leaf vary with the scale."""

    def transform(f):
        def transformed(*args):
            def at(inputs):
                scale, batch, leaf = inputs
                return f(jax.tree.map(lambda p: p * scale, args[0]), batch, leaf)

            stacked = jax.tree.map(lambda x: jnp.stack([x, x]), args[1:])
            results = apply(at, (jnp.asarray(SCALES), *stacked))
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), results)

        return transformed

    return transform


def twice(f):
    return lambda *args: jax.tree.map(lambda x: 2 * x, f(*args))


def scaled(f):
    return lambda params, *args: f(jax.tree.map(lambda p: 0.5 * p, params), *args)


def switch(f):
    def transformed(params, batch, leaf):
        index = jnp.sum(batch["y"]) % 3
        return jax.lax.switch(index, [f, twice(f), scaled(f)], params, batch, leaf)

    return transformed


TRANSFORMATIONS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": each(lambda f, xs: jax.lax.scan(lambda c, x: (c, f(x)), None, xs)[1]),
    "map": each(jax.lax.map),
    "vmap": each(lambda f, xs: jax.vmap(f)(xs)),
    "cond": lambda f: lambda *args: jax.lax.cond(jnp.any(args[1]["seen"]), f, twice(f), *args),
    "switch": switch,
}


def stacked(names, f):
    """The transformations around f, the first outermost."""
    return functools.reduce(lambda g, name: TRANSFORMATIONS[name](g), reversed(names), f)


def gradient(f):
    """``(value, gradient)`` in all leaves that are real or complex numbers."""

    def value_and_grad(*args):
        leaves, structure = jax.tree.flatten(args)
        numeric = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

        def of_numbers(numbers):
            given = iter(numbers)
            filled = [next(given) if n else x for x, n in zip(leaves, numeric, strict=True)]
            return f(*jax.tree.unflatten(structure, filled))

        numbers = [jnp.asarray(x) for x, n in zip(leaves, numeric, strict=True) if n]
        return jax.value_and_grad(of_numbers)(numbers)

    return value_and_grad


def close(found, expected, **message):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **ROUNDING, **message)


def with_word(way):
    """A word among the arguments."""
    return lambda loss: functools.partial(way(loss), activation="sin")


def closing_inside(way):
    """The leaf is closed over by the loss, inside of the transformations."""
    return lambda loss: (
        lambda params, batch, leaf: way(lambda p, b: loss(p, b, leaf))(params, batch)
    )


def leaf_of(kind):
    return LEAVES.get(kind.removeprefix("closed-over "), lambda: None)()


# kind of leaf -> what becomes of a entry point
FORMS = {kind: lambda way: way for kind in LEAVES} | {"static": with_word}
FORMS |= {f"closed-over {kind}": closing_inside for kind in LEAVES}


def interpreted(f):
    """``f()`` by its jaxpr, operation by operation: a program that runs once is not compiled."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shape), evaluated(closed.jaxpr, closed.consts))


def evaluated(jaxpr, constants, *args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, jax.extend.core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        outputs = applied(equation, [read(v) for v in equation.invars])
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(v) for v in jaxpr.outvars]


def applied(equation, inputs):
    """The results of an operation, of a loop or of a call."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return scanned(inputs, **params)
    if name == "cond":
        inner, inputs = params["branches"][int(inputs[0])], inputs[1:]
    else:
        kinds = jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr
        inner = next((p for p in params.values() if isinstance(p, kinds)), None)
    if inner is None:
        outputs = equation.primitive.bind(*inputs, **params)
        return outputs if equation.primitive.multiple_results else [outputs]
    return evaluated(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *inputs)


def scanned(inputs, *, jaxpr, length, reverse, num_consts, num_carry, **_):
    fixed, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    rows, outputs = inputs[num_consts + num_carry :], []
    for i in reversed(range(length)) if reverse else range(length):
        results = evaluated(jaxpr.jaxpr, jaxpr.consts, *fixed, *carry, *(x[i] for x in rows))
        carry, outputs = results[:num_carry], [*outputs, results[num_carry:]]
    ordered = outputs[::-1] if reverse else outputs
    return [*carry, *(jnp.stack(column) for column in zip(*ordered, strict=True))]
