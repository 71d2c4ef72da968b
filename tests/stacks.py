"""Stacks of transformations of a loss with arguments of every kind, and their references.

The reference of a stack is the same stack in Python: loops, conditions and no transformation at
all. The reference of a regularized loss needs no rule of its own: with R the penalty's gradient by
hand, the function ``loss(p) + sum(stop_gradient(R) * (p - stop_gradient(p)))`` has the value of the
loss, its gradient plus R for the parameters, and its gradient for everything else.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradreg_optax as gr

GAMMA, EPSILON = 0.1, 0.2
FD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
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
}


def leaves_of(kinds):
    return {kind: LEAVES[kind]() for kind in sorted(kinds)}


def factor(leaf):
    """What a leaf multiplies the parameters by."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)[-1]
    return (leaf * (1 + 0.5j)).real + 0.5


def loss_fn(params, batch, leaf=None, activation="tanh"):
    w = params["w"]
    for each in jax.tree.leaves(leaf):
        w = w * factor(each)
    outputs = getattr(jax.lax, activation)(batch["x"] @ w + batch["y"])
    return ((outputs * (0.5 + batch["seen"])) ** 2).mean()


def params_of():
    return {"w": jnp.asarray([0.5, -1.0, 0.3])}


def batch_of():
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    return {"x": x, "y": np.arange(4) % 2, "seen": np.asarray([True, False, True, True])}


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

    ours = gr.nnx_regularized_loss(of_module, FD)
    return lambda params, *args, **kwargs: ours(Module(params["w"]), *args, **kwargs)


class Tree(eqx.Module):
    w: jax.Array
    word: str
    count: jax.Array
    function: object


def of_equinox_module(loss):
    """``regularized_loss`` of a module whose leaves are not all arrays of numbers."""

    def of_model(model, *args, **kwargs):
        assert (model.word, model.function) == ("word", jnp.tanh)
        return loss({"w": model.w * model.count}, *args, **kwargs)

    ours = gr.regularized_loss(of_model, FD)

    def of_params(params, *args, **kwargs):
        return ours(Tree(params["w"], "word", jnp.asarray(1), jnp.tanh), *args, **kwargs)

    return of_params


# entry point -> (ours, the reference)
WAYS = {
    "regularized_loss": (lambda f: gr.regularized_loss(f, FD), penalised),
    "nnx_regularized_loss": (of_nnx_module, penalised),
    "Equinox": (of_equinox_module, penalised),
    "microbatched": (lambda f: gr.microbatched(f, 2), in_two_parts),
    "micro-batches regularized": (
        lambda f: gr.regularized_loss(gr.microbatched(f, 2), FD),
        lambda f: penalised(in_two_parts(f)),
    ),
    "regularized micro-batches": (
        lambda f: gr.microbatched(gr.regularized_loss(f, FD), 2),
        lambda f: in_two_parts(penalised(f)),
    ),
    "product": (
        lambda f: gr.regularized_loss(f, gr.dbp_gradreg(gamma=GAMMA)),
        functools.partial(penalised, hessian_product=True),
    ),
}


def chained(tx):
    """One update of a chain."""

    def way(loss):
        def update(params, *args):
            optimizer = optax.chain(tx, optax.sgd(0.5))
            value, grads = jax.value_and_grad(loss)(params, *args)
            extra = {"value": value, "value_fn": lambda p: loss(p, *args)}
            return optimizer.update(grads, optimizer.init(params), params, **extra)[0]

        return update

    return way


def train_step(loss):
    """One step of ``make_train_step``."""
    init, step = gr.make_train_step(loss, optax.sgd(0.5), FD)

    def parameters_after(params, *args):
        state, info = step(init(params), *args)
        return info.loss, state.params

    return parameters_after


def step_by_hand(loss):
    """What a step is made of."""

    def parameters_after(params, *args):
        updates = chained(FD)(loss)(params, *args)
        return loss(params, *args), optax.apply_updates(params, updates)

    return parameters_after


FAMILIES = {
    "fd_gradreg": FD,
    "central": gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, scheme="central"),
    "dbp_gradreg": gr.dbp_gradreg(gamma=GAMMA),
    "sam": gr.sam(rho=EPSILON),
    "asam": gr.asam(rho=EPSILON),
    "gradient_norm_penalty": gr.gradient_norm_penalty(gamma=GAMMA, epsilon=EPSILON),
    "relative_gradreg": gr.relative_gradreg(),
    "flooding": gr.flooding(level=10.0),
}
# what is no loss -> (ours, the reference): a formula, or itself
OTHERS = {
    "fd_value_and_grad": (
        lambda loss: gr.fd_value_and_grad(loss, gamma=GAMMA, epsilon=EPSILON),
        lambda loss: jax.value_and_grad(penalised(loss)),
    ),
    "make_train_step": (train_step, step_by_hand),
    **{name: (chained(tx), chained(tx)) for name, tx in FAMILIES.items()},
}

# --- transformations of f(params, batch, ...), whose result may be any tree of numbers

SCALES = (1.0, 0.5)


def each(apply):
    """The sum over two scales of the parameters; all other arguments vary with the scale."""

    def transform(f):
        def transformed(*args):
            def at(inputs):
                scale, *others = inputs
                return f(jax.tree.map(lambda p: p * scale, args[0]), *others)

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
    def transformed(*args):
        index = jnp.sum(args[1]["y"]) % 3
        return jax.lax.switch(index, [f, twice(f), scaled(f)], *args)

    return transformed


def each_in_python(f):
    def transformed(params, *args):
        results = [f(jax.tree.map(lambda p, s=s: p * s, params), *args) for s in SCALES]
        return jax.tree.map(lambda *x: sum(x), *results)

    return transformed


def cond_in_python(f):
    return lambda *args: (f if np.any(args[1]["seen"]) else twice(f))(*args)


def switch_in_python(f):
    return lambda *args: [f, twice(f), scaled(f)][np.sum(args[1]["y"]) % 3](*args)


TRANSFORMATIONS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": each(lambda f, xs: jax.lax.scan(lambda c, x: (c, f(x)), None, xs)[1]),
    "map": each(jax.lax.map),
    "vmap": each(lambda f, xs: jax.vmap(f)(xs)),
    "cond": lambda f: lambda *args: jax.lax.cond(jnp.any(args[1]["seen"]), f, twice(f), *args),
    "switch": switch,
}


IN_PYTHON = {
    **dict.fromkeys(("jit", "checkpoint"), lambda f: f),
    **dict.fromkeys(("scan", "map", "vmap"), each_in_python),
    "cond": cond_in_python,
    "switch": switch_in_python,
}


def stacked(transformations, names, f):
    """The transformations around f, the first outermost."""
    return functools.reduce(lambda g, name: transformations[name](g), reversed(names), f)


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


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **ROUNDING)


def assert_same(way, stack, leaf=None, closed=None, compiled=True):
    """Compare a stack with that in Python.

    Args:
      way: one of ``WAYS``, which is differentiated, or of ``OTHERS``.
      stack: names of the transformations around the gradient, between the gradient and the way,
        and inside of the way.
      leaf: an argument of the loss.
      closed: what the loss closes over, inside of the transformations.
      compiled: whether in one program, or operation by operation.
    """
    around, between, inside = stack
    ours, reference = (WAYS | OTHERS)[way]
    args = params_of(), batch_of(), leaf, closed

    def applied(make, transformations):
        def of_all(params, batch, leaf, closed):
            def loss(params, batch, leaf):
                return loss_fn(params, batch, (leaf, closed))

            return make(stacked(transformations, inside, loss))(params, batch, leaf)

        function = stacked(transformations, between, of_all)
        function = gradient(function) if way in WAYS else function
        return stacked(transformations, around, function)(*args)

    def both():
        return applied(ours, TRANSFORMATIONS), applied(reference, IN_PYTHON)

    close(*(jax.jit(both)() if compiled else both()))
