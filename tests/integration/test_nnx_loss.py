"""Flax NNX: ``nnx_regularized_loss`` in ``nnx.grad``, for losses of modules and other objects."""

import functools
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradreg_optax as gr
import nnx_cases as cases
from gradreg_optax import nnx_regularized_loss
from nnx_cases import FD, X, linear, mean_square
from problems import relative_error


@pytest.mark.parametrize(
    ("name", "wrt"),
    [
        ("BatchNorm, dropout and LoRA", nnx.LoRAParam),
        ("objects", nnx.Param),
        ("keys shared with the model", nnx.Param),
        ("models in a tree, and aux", nnx.Param),
    ],
)
def test_value_gradient_and_every_object_are_those_by_hand(name, wrt):
    """Both gradients of the penalty are taken at the state from before the call, and the selected
    parameters alone are perturbed."""
    loss_fn, make, has_aux = cases.CASES[name]
    args, kwargs = make()
    loss = nnx_regularized_loss(loss_fn, FD, wrt=wrt, has_aux=has_aux)
    transform = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt), has_aux=has_aux)
    by_position = inspect.signature(loss_fn).bind(*args, **kwargs).args
    output, gradient = nnx.jit(lambda *args: transform(*args))(*by_position)
    expected = cases.by_hand(name, wrt)
    cases.assert_as_by_hand(expected, output, cases.numbers(gradient), (args, kwargs))


def compiled(loss, *args, **options):
    return nnx.jit(lambda *args: nnx.grad(loss, **options)(*args))(*args)


TRANSFORMED = {
    "jit(grad(jit(remat)))": lambda loss, *args: compiled(nnx.jit(nnx.remat(loss)), *args),
    "tree mode": functools.partial(compiled, graph=False, allow_int=True),
    "no graph updates": functools.partial(compiled, graph_updates=False, allow_int=True),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_transformations_of_nnx_go_around_a_regularized_loss(name):
    loss_fn, make, _ = cases.CASES["keys"]
    args, kwargs = make()
    gradient = TRANSFORMED[name](nnx_regularized_loss(loss_fn, FD), *args)
    expected = cases.by_hand("keys")
    found = cases.numbers(nnx.state(gradient, nnx.Param))
    cases.assert_as_by_hand(expected, expected.output, found, (args, kwargs))


def test_vmap_over_models_is_every_model_and_counts_the_added_step_as_an_argument():
    def make(key):
        return cases.Small(key, rngs=nnx.Rngs(key))

    keys, loss = jax.random.split(jax.random.key(0)), nnx_regularized_loss(mean_square, FD)
    models, several = nnx.vmap(make)(keys), nnx.vmap(loss, in_axes=(0, None, None))
    found = [compiled(lambda models: several(models, X, None).sum(), models), models]
    for i, model in enumerate(map(make, keys)):
        expected = [compiled(loss, model, X), model]
        one = jax.tree.map(lambda a, i=i: a[i], cases.numbers(found))
        cases.assert_close(one, cases.numbers(expected))


@pytest.mark.slow
def test_an_evaluation_costs_that_of_the_loss_and_moves_the_model_as_the_loss_does(counter):
    def counted(model, x):
        model.dropout.rngs.count[...] += 1
        return counter.wrap(lambda w: cases.square(x @ w))(model.first.kernel[...])

    model, other = cases.Small(rngs=nnx.Rngs(1)), cases.Small(rngs=nnx.Rngs(1))
    loss = nnx_regularized_loss(counted, FD)
    assert loss(model, X) == counted(other, X)
    assert counter.read() == (2, 0)
    cases.assert_close(cases.numbers(model), cases.numbers(other))
    compiled(loss, model, X)
    assert counter.read() == (2, 2)


def test_micro_batches_of_a_module_average_statistics_and_gradients_and_move_counters_once():
    def loss(model, x):
        model.norm(model.first(x)), model.dropout(x)  # which the output does not use
        return cases.square(jnp.tanh(model.first(x)) - 1)

    models = cases.Net(), cases.Net()
    grads = [
        compiled(nnx_regularized_loss(f, FD), model, X)
        for f, model in zip((loss, gr.microbatched(loss, 4)), models, strict=True)
    ]
    assert relative_error(*map(cases.numbers, grads)) < 1e-5
    assert [int(model.dropout.rngs.count[...]) for model in models] == [1, 1]
    np.testing.assert_allclose(*(m.norm.mean[...] for m in models), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "loss_fn"),
    [
        ("(model, x, step=None)", lambda model, x: 0.0),
        ("(model, x, step=0)", lambda model, x, step=0: 0.0),
        ("(model, x, step=None, *, mode)", lambda model, x, *, mode: 0.0),
        ("(model, *batches, step=None)", lambda model, *batches: 0.0),
    ],
)
def test_the_signature_is_that_of_the_loss_and_a_step(text, loss_fn):
    """Positional, because nnx.grad takes no keyword-only arguments."""
    assert str(inspect.signature(nnx_regularized_loss(loss_fn, FD))) == text


def test_a_step_of_the_call_reaches_the_schedule_and_a_loss_that_has_one():
    def without(weights, x):
        return cases.square(x @ weights[...])

    def own(weights, x, step=0):
        return without(weights, x) * (1 + step)

    def any_keywords(weights, x, **more):
        return own(weights, x, **more)

    weights, x = nnx.Param(jnp.ones(2)), jnp.eye(2)
    start = gr.fd_gradreg(gamma=0.5, epsilon=0.1, start=3)
    # The Hessian is 1 + step, or 1.
    for f, before, after in ((without, 1.0, 1.5), (own, 3.0, 12.0), (any_keywords, 3.0, 12.0)):
        late = nnx_regularized_loss(f, start)
        gradient = nnx.grad(lambda weights, step, late=late: late(weights, x, step=step))
        found = [gradient(weights, step)[...] for step in (2, 3)]
        np.testing.assert_allclose(found, [[before] * 2, [after] * 2], rtol=1e-5)


@pytest.mark.parametrize("count", [None, 2])
def test_a_weighted_mean_keeps_its_weight(count):
    """Of micro-batches as of the whole, where the halves weigh differently."""
    mask = np.asarray([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], np.float32)

    def mean(model, pair):
        return jnp.sum(model(pair[0])[:, 0] ** 2 * pair[1]) / jnp.sum(pair[1])

    def weighted(model, pair):
        weight = jnp.sum(pair[1])
        return gr.Weighted(mean(model, pair) * weight, weight)

    loss, batch = weighted if count is None else gr.microbatched(weighted, count), (X[:8], mask)
    found, expected = (
        cases.numbers(nnx.value_and_grad(nnx_regularized_loss(f, FD))(linear(), batch))
        for f in (loss, mean)
    )
    assert relative_error(found, expected) < 1e-5


def test_a_function_around_a_loss_in_micro_batches_is_another_loss():
    inner = gr.microbatched(mean_square, 2)
    doubled = functools.wraps(inner)(lambda model, x: 2 * inner(model, x))
    one, two = (nnx_regularized_loss(f, FD)(linear(), X) for f in (inner, doubled))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def distance(model, teacher, x):
    return cases.square(model(x) - teacher(x))


def test_other_arguments_have_the_gradient_of_the_loss():
    """Gradients of a teacher, if requested, and of an array; the model's stays regularized."""

    other = nnx.Linear(3, 1, rngs=nnx.Rngs(5))
    regularized, three = nnx_regularized_loss(distance, FD), (0, 1, 2)
    plain, found = (compiled(f, linear(), other, X, argnums=three) for f in (distance, regularized))
    alone = compiled(regularized, linear(), other, X)
    cases.assert_close(cases.numbers(found[1:]), cases.numbers(plain[1:]))
    cases.assert_close(cases.numbers(found[0]), cases.numbers(alone))
    assert relative_error(cases.numbers(found[0]), cases.numbers(plain[0])) > 0.01


def test_an_object_from_outside_is_read_and_its_change_refused_as_by_the_plain_loss():
    model, rngs, teacher = cases.Small(), nnx.Rngs(1), nnx.Linear(3, 1, rngs=nnx.Rngs(5))
    for f in (cases.with_keys, nnx_regularized_loss(cases.with_keys, FD)):
        with pytest.raises(flax.errors.TraceContextError):
            nnx.grad(lambda model, f=f: f(model, rngs, X))(model)
    loss = nnx_regularized_loss(distance, FD)
    outside = nnx.grad(lambda model: loss(model, teacher, X))(linear())
    inside = nnx.grad(loss)(linear(), teacher, X)
    cases.assert_close(cases.numbers(outside), cases.numbers(inside))


def test_parameters_without_a_gradient_are_refused():
    model = linear()
    model.kernel = nnx.Param(jnp.arange(3).reshape(3, 1))
    with pytest.raises(TypeError, match=r"nnx_regularized_loss: the parameters.*kernel.* int32"):
        nnx_regularized_loss(mean_square, FD)(model, X)


@pytest.mark.parametrize("evaluate", [lambda f: f, jax.grad, jax.jit], ids=["value", "grad", "jit"])
def test_micro_batches_of_a_loss_that_changes_its_model_need_a_wrapper_for_modules(evaluate):
    model, loss = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), gr.microbatched(mean_square, 2)
    with pytest.raises(ValueError, match=r"first argument unchanged.*nnx_regularized_loss"):
        evaluate(loss)(model, X)
