"""Transformations of JAX, Flax NNX and Equinox around and inside the gradient of our losses.

Every kind of leaf on its own, every pair and every entry point: ``pytest -m slow``. More generated
stacks: ``GRADREG_CASES=5000 pytest tests/test_transformations.py`` for 500 of them.
"""

import itertools
import os

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.interpreters import ad

import gradreg_optax as gr
import stacks
from stacks import FD, LEAVES, TRANSFORMATIONS, WAYS, assert_same, batch_of, close, params_of


@pytest.fixture
def without_foreign_rules(monkeypatch):
    """JAX alone: lineax, once imported, adds a transposition to it, which hides errors."""
    for primitive in list(ad.primitive_transposes):
        if primitive.name == "stop_gradient":
            monkeypatch.delitem(ad.primitive_transposes, primitive)


pytestmark = pytest.mark.usefixtures("x64", "without_foreign_rules")

PAIRS = list(itertools.product(TRANSFORMATIONS, repeat=2))
ALL, FEW = list(LEAVES), ["float", "integer", "key"]
SOME = [
    # entry point; stack around the gradient, between gradient and loss, inside of the loss; kinds
    # of the arguments, and of what the loss closes over
    ("regularized_loss", ["checkpoint"], ["scan"], [], ALL, FEW),
    ("regularized_loss", [], ["jit", "map"], [], FEW, ALL),
    ("regularized_loss", [], ["vmap"], ["cond"], ALL, FEW),
    ("regularized_loss", [], ["switch"], [], FEW, ALL),
    ("microbatched", ["jit"], ["scan"], [], ALL, []),
    ("microbatched", [], ["switch"], ["vmap"], [], FEW),
    ("nnx_regularized_loss", [], ["jit"], [], FEW, FEW),
    ("Equinox", [], ["jit"], ["checkpoint"], FEW, FEW),
    ("micro-batches regularized", [], ["map"], [], [], FEW),
    ("regularized micro-batches", [], ["cond"], [], FEW, []),
    ("product", [], ["checkpoint", "jit"], [], FEW, FEW),
]


@pytest.mark.parametrize(("way", "around", "between", "inside", "leaf", "closed"), SOME)
def test_a_stack_of_a_loss_with_all_kinds_of_leaves_is_that_in_python(
    way, around, between, inside, leaf, closed
):
    assert_same(way, (around, between, inside), *map(stacks.leaves_of, (leaf, closed)))


@pytest.mark.parametrize(
    ("way", "name", "leaf", "closed"),
    [("regularized_loss", "vmap", [], ["float"]), ("microbatched", "checkpoint", ["integer"], [])],
)
def test_without_a_jit_around_it_a_transformation_is_the_same(way, name, leaf, closed):
    leaves = map(stacks.leaves_of, (leaf, closed))
    assert_same(way, ([], [name], []), *leaves, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_transformation_is_the_same_for_every_kind_of_leaf_alone(way, name):
    for kind in LEAVES:
        leaf = stacks.leaves_of([kind])
        assert_same(way, ([], [name], []), leaf)
        assert_same(way, ([], [name], []), None, leaf)


@pytest.mark.slow
@pytest.mark.parametrize(("outer", "inner"), PAIRS)
@pytest.mark.parametrize("way", WAYS)
def test_every_two_transformations_are_those_in_python_around_and_inside(way, outer, inner):
    leaves = [stacks.leaves_of(["float", "integer", "bool", "key", "None"])] * 2
    assert_same(way, ([outer], [inner], []), *leaves)
    assert_same(way, ([], [outer, inner], []), *leaves)


names = st.lists(st.sampled_from(list(TRANSFORMATIONS)), max_size=2)
leaves = st.sets(st.sampled_from([kind for kind in LEAVES if kind not in ("old key", "Python")]))
CASES = int(os.environ.get("GRADREG_CASES", "40")) // 10


@hypothesis.settings(max_examples=max(CASES, 1))
@given(st.sampled_from([*WAYS, *stacks.OTHERS]), names, names, names, leaves, leaves, st.booleans())
def test_a_generated_stack_of_a_loss_an_update_or_a_step_is_that_in_python(
    way, around, between, inside, leaf, closed, compiled
):
    hypothesis.assume(len(around) + len(between) + len(inside) <= 3)
    stack, given_leaves = (around, between, inside), map(stacks.leaves_of, (leaf, closed))
    assert_same(way, stack, *given_leaves, compiled=compiled)


@pytest.mark.parametrize(
    ("way", "wrap"), [("regularized_loss", jax.checkpoint), ("microbatched", jax.jit)]
)
def test_a_word_may_be_a_static_argument(way, wrap):
    (ours, reference), args = WAYS[way], (params_of(), batch_of(), None, "sin")
    gradients = (jax.grad(wrap(f(stacks.loss_fn), static_argnums=3)) for f in (ours, reference))
    close(*(gradient(*args) for gradient in gradients))


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


NNX = {  # nnx.jit and nnx.remat: see integration/test_nnx_loss.py
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
    "jit of checkpoint": lambda f: eqx.filter_jit(eqx.filter_checkpoint(f)),
    "vmap": lambda f: (
        lambda model, x: jnp.sum(eqx.filter_vmap(f, in_axes=(None, 0))(model, x[None]))
    ),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_a_transformation_of_equinox_is_that_of_the_plain_loss(name):
    x, model = batch_of()["x"], stacks.Tree(params_of()["w"], "word", jnp.asarray(2), jnp.tanh)

    def loss(model, x):
        return jnp.mean(model.function(x @ model.w * model.count) ** 2)

    def of_parts(params, static, x):
        return loss(eqx.combine(params, static), x)

    found = eqx.filter_grad(EQUINOX[name](gr.regularized_loss(loss, FD)))(model, x)
    parts = eqx.partition(model, eqx.is_inexact_array)
    expected = jax.grad(stacks.penalised(of_parts))(*parts, x)
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

    @jax.jit
    def derivatives(params):
        hessians = jax.hessian(loss)(params), jax.jacrev(jax.jacrev(loss))(params)
        return by_hand(params), jax.jacfwd(by_hand)(params), jax.jacfwd(loss)(params), hessians

    expected, hessian, gradient, hessians = derivatives(params)
    close(gradient, expected)
    close(hessians, (hessian, hessian))
    close(jax.jvp(loss, (params,), (along,))[1], expected @ along)
    close(jax.linearize(jax.jit(loss), params)[1](along), expected @ along)


# --- cost and leaks


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def dense_loss(kernels, x):
    for kernel in kernels:
        x = jax.nn.gelu(x @ kernel)
    return jnp.mean(x**2)


def test_a_jit_inside_of_the_gradient_costs_nothing():
    args = [jnp.ones((16, 16))] * 2, jnp.ones((32, 16))
    by_function = gr.fd_value_and_grad(dense_loss, gamma=stacks.GAMMA, epsilon=stacks.EPSILON)
    loss, pieces = gr.regularized_loss(dense_loss, FD), gr.microbatched(dense_loss, 2)
    for f, plain in (
        (loss, lambda *args: by_function(*args)[1]),
        (pieces, jax.grad(pieces)),
    ):
        inside = flops(jax.grad(jax.jit(f)), *args)
        assert inside == pytest.approx(flops(plain, *args), rel=0.005)
    assert flops(jax.grad(loss), *args) <= 1.005 * flops(by_function, *args)


def test_no_tracer_leaks():
    """One argument and one closed-over value, both differentiated."""

    def total(params, factor):
        loss = WAYS["micro-batches regularized"][0](lambda p, x: jnp.sum((p * x * factor) ** 2))
        return jax.jit(loss)(params, jnp.ones(2))

    with jax.checking_leaks():
        jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(2.0, 3.0)
