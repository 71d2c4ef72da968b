"""Transformations of JAX, Flax NNX and Equinox around and inside the gradient of our losses.

A stack of transformations of our loss equals the same stack of the reference of ``stacks.py``.
Every kind of leaf on its own, every pair and every entry point: ``pytest -m slow``.
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gradreg_optax as gr
import stacks
from stacks import FD, FORMS, TRANSFORMATIONS, WAYS, batch_of, close, gradient, params_of, stacked

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def expected_of(reference, kind, orders):
    return results_of(reference, kind, orders)


def results_of(way, kind, orders):
    """What each of the stacks that ``orders`` makes of a loss returns."""
    f, args = FORMS[kind](way)(stacks.loss_fn), (params_of(), batch_of(), stacks.leaf_of(kind))
    return stacks.interpreted(lambda: [stack(*args) for stack in orders(f)])


def failures(way, kinds, orders):
    """The kinds for which ours differs from the reference, with what went wrong."""
    ours, reference = WAYS[way]
    wrong = {}
    for kind in kinds:
        expected = expected_of(reference, kind, orders)
        try:
            close(results_of(ours, kind, orders), expected)
        except Exception as error:
            wrong[kind] = f"{type(error).__name__}: {error}"[:300]
    return wrong


SINGLE = [(), *((name,) for name in TRANSFORMATIONS)]
PAIRS = list(itertools.product(TRANSFORMATIONS, repeat=2))
SOME = [  # the pairs below have all kinds of leaves as arguments
    *(
        ("regularized_loss", (name,), "closed-over all")
        for name in ("jit", "map", "vmap", "switch")
    ),
    ("microbatched", ("scan",), "closed-over all"),
    *((way, ("jit",), "all") for way in WAYS if way not in ("regularized_loss", "microbatched")),
]
SOME_PAIRS = [
    ("regularized_loss", ("checkpoint", "scan")),
    ("regularized_loss", ("vmap", "cond")),
    ("microbatched", ("scan", "jit")),
    ("microbatched", ("switch", "vmap")),
]
NOT_COMPILED = [  # (entry point, transformation, kind of leaf)
    ("regularized_loss", "vmap", "closed-over float"),
    ("microbatched", "checkpoint", "integer"),
]


def cells(several):
    """Of an entry point, a stack and a kind of leaf each, with names that can be read."""
    return [
        pytest.param(*cell, id=", ".join([" of ".join(cell[1]) or "none", cell[0], *cell[2:]]))
        for cell in several
    ]


@functools.cache
def inside(names):
    """The gradient of a stack."""
    return lambda f: [gradient(stacked(names, f))]


@functools.cache
def around_and_inside(outer, inner):
    """Two transformations, both inside of the gradient and one on each side of it."""
    return lambda f: [
        stacked([outer], gradient(stacked([inner], f))),
        gradient(stacked([outer, inner], f)),
    ]


@pytest.mark.parametrize(("way", "names", "kind"), cells(SOME))
def test_a_transformation_of_our_loss_is_that_of_the_plain_one(way, names, kind):
    assert failures(way, [kind], inside(names)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "names"), cells(itertools.product(WAYS, SINGLE)))
def test_a_transformation_is_that_of_the_plain_loss_for_every_kind_of_leaf(way, names):
    assert failures(way, FORMS, inside(names)) == {}


@pytest.mark.parametrize(("way", "names"), cells(SOME_PAIRS))
def test_two_transformations_are_those_of_the_plain_loss_around_and_inside(way, names):
    assert failures(way, ["all"], around_and_inside(*names)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "names"), cells(itertools.product(WAYS, PAIRS)))
def test_every_two_transformations_are_those_of_the_plain_loss_for_every_way_in(way, names):
    assert failures(way, ["all", "closed-over all"], around_and_inside(*names)) == {}


@pytest.mark.parametrize(("way", "name", "kind"), NOT_COMPILED)
def test_without_a_jit_around_it_a_transformation_is_the_same(way, name, kind):
    (ours, reference), args = WAYS[way], (params_of(), batch_of(), stacks.leaf_of(kind))
    (expected,) = expected_of(reference, kind, inside((name,)))
    close(gradient(stacked([name], FORMS[kind](ours)(stacks.loss_fn)))(*args), expected)


def with_activation(params, batch, leaf, activation):
    return stacks.loss_fn(params, batch, leaf, activation=activation)


@pytest.mark.parametrize(
    ("way", "wrap"), [("regularized_loss", jax.checkpoint), ("microbatched", jax.jit)]
)
def test_a_word_may_be_a_static_argument(way, wrap):
    (ours, reference), args = WAYS[way], (params_of(), batch_of(), stacks.leaf_of("all"), "sin")
    found = jax.grad(wrap(ours(with_activation), static_argnums=3))(*args)
    close(found, jax.jit(jax.grad(reference(with_activation)), static_argnums=3)(*args))


# --- the frameworks' own transformations


class Counted(nnx.Module):
    """Every call counts, the count enters the loss, and a mean of the inputs is kept."""

    def __init__(self):
        self.w = nnx.Param(params_of()["w"])
        self.count, self.mean = nnx.BatchStat(jnp.asarray(0)), nnx.BatchStat(jnp.asarray(0.0))

    def __call__(self, x):
        self.count[...] += 1
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * jnp.mean(x)
        return jnp.tanh(x @ self.w[...]) * (1 + 0.1 * self.count[...])


def counted_loss(model, x):
    return jnp.mean(model(x) ** 2)


def over_batches(f):
    """The sum over two batches, with all of the module as the carry."""

    def total(model, x):
        axes = nnx.StateAxes({...: nnx.Carry}), 0
        body = nnx.scan(lambda model, x: f(model, x), in_axes=axes, out_axes=0)
        return jnp.sum(body(model, jnp.stack([x, 0.5 * x])))

    return total


NNX = {
    "nnx.jit": nnx.jit,
    "nnx.remat": nnx.remat,
    "nnx.cond": lambda f: lambda m, x: nnx.cond(jnp.any(x > 0), f, lambda m, x: 2 * f(m, x), m, x),
    "nnx.scan": over_batches,
}


@pytest.mark.parametrize("name", NNX)
def test_a_transformation_of_nnx_leaves_gradient_and_state_of_the_plain_loss(name):
    x, count, mean, calls = batch_of()["x"], 0, 0.0, 2 if name == "nnx.scan" else 1

    def value(params, x, count):
        return jnp.mean((jnp.tanh(x @ params["w"]) * (1 + 0.1 * (count + 1))) ** 2)

    total = (0.0, {"w": jnp.zeros(3)})
    for part in (x, 0.5 * x)[:calls]:
        one = jax.jit(jax.value_and_grad(stacks.penalised(value)))(params_of(), part, count)
        total = jax.tree.map(jnp.add, total, one)
        count, mean = count + 1, 0.9 * mean + 0.1 * jnp.mean(part)
    model, loss = Counted(), NNX[name](gr.nnx_regularized_loss(counted_loss, FD))
    found, grads = nnx.value_and_grad(loss)(model, x)
    close((found, {"w": grads.w[...]}), total)
    close((model.count[...], model.mean[...]), (count, mean))


EQUINOX = {
    "eqx.filter_jit": eqx.filter_jit,
    "eqx.filter_checkpoint": eqx.filter_checkpoint,
    "eqx.filter_vmap": lambda f: (
        lambda model, x: jnp.sum(eqx.filter_vmap(f, in_axes=(None, 0))(model, x[None]))
    ),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_a_transformation_of_equinox_is_that_of_the_plain_loss(name):
    x, model = batch_of()["x"], stacks.Tree(params_of()["w"], "word", jnp.asarray(2), jnp.tanh)

    def of_parts(params, static, x):
        model = eqx.combine(params, static)
        return jnp.mean(model.function(x @ model.w * model.count) ** 2)

    def of_model(loss):
        return lambda model, x: loss(*eqx.partition(model, eqx.is_inexact_array), x)

    found = eqx.filter_grad(EQUINOX[name](of_model(gr.regularized_loss(of_parts, FD))))(model, x)
    expected = eqx.filter_jit(eqx.filter_grad(of_model(stacks.penalised(of_parts))))(model, x)
    close(found.w, expected.w)


# --- forward mode and further derivatives: those of the gradient


def small_loss(params, x):
    return jnp.mean(jnp.tanh(x @ params) ** 2)


@pytest.mark.parametrize(
    "way", ["regularized_loss", "microbatched", pytest.param("product", marks=pytest.mark.slow)]
)
def test_forward_mode_and_further_derivatives_are_those_of_the_gradient(way):
    """The reference differentiates the gradient by hand, which has no rule either."""
    params, x, along = params_of()["w"], batch_of()["x"], jnp.asarray([1.0, 0.5, -2.0])
    gradient_of = jax.grad(lambda p: small_loss(p, x))

    def by_hand(params):
        gradient = gradient_of(params)
        ahead = gradient_of(params + stacks.EPSILON * gradient)
        product = jax.jvp(gradient_of, (params,), (gradient,))[1]
        penalty = {"regularized_loss": (ahead - gradient) / stacks.EPSILON, "product": product}
        return gradient + stacks.GAMMA * penalty.get(way, 0.0)

    def loss(params):
        return WAYS[way][0](small_loss)(params, x)

    expected, hessian = stacks.interpreted(lambda: (by_hand(params), jax.jacfwd(by_hand)(params)))
    close(jax.jvp(loss, (params,), (along,))[1], expected @ along)
    close(jax.jvp(jax.jit(loss), (params,), (along,))[1], expected @ along)
    close(jax.linearize(loss, params)[1](along), expected @ along)
    close(stacks.interpreted(lambda: jax.jacfwd(loss)(params)), expected)
    close(stacks.interpreted(lambda: jax.hessian(loss)(params)), hessian)
    close(stacks.interpreted(lambda: jax.jacrev(jax.jacrev(loss))(params)), hessian)


# --- cost and leaks


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def dense_loss(kernels, x):
    for kernel in kernels:
        x = jax.nn.gelu(x @ kernel)
    return jnp.mean(x**2)


def test_a_jit_or_checkpoint_inside_of_the_gradient_costs_nothing():
    args = [jnp.ones((16, 16))] * 2, jnp.ones((32, 16))
    loss = gr.regularized_loss(dense_loss, FD)
    by_function = gr.fd_value_and_grad(dense_loss, gamma=stacks.GAMMA, epsilon=stacks.EPSILON)
    expected = flops(lambda *args: by_function(*args)[1], *args)
    for stack in (jax.grad(loss), jax.grad(jax.jit(loss)), jax.jit(jax.grad(loss))):
        assert flops(stack, *args) == pytest.approx(expected, rel=0.005)
    pieces = gr.microbatched(dense_loss, 2)
    one = flops(jax.grad(pieces), *args)
    assert flops(jax.grad(jax.jit(pieces)), *args) == pytest.approx(one, rel=0.005)


@pytest.mark.parametrize("way", ["regularized_loss", "microbatched"])
def test_no_tracer_leaks(way):
    """One argument and one closed-over value, both differentiated."""

    def total(params, factor):
        loss = WAYS[way][0](lambda p, x: jnp.sum((p * x * factor) ** 2))
        return jax.jit(loss)(params, jnp.ones(2))

    with jax.checking_leaks():
        jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(2.0, 3.0)
