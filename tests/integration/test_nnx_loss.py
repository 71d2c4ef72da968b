"""Flax NNX: ``nnx_regularized_loss`` in ``nnx.grad``, for losses of modules and other objects."""

import functools
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradreg_optax as gr
import nnx_cases as cases
from gradreg_optax import nnx_regularized_loss
from nnx_cases import FD, X
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


def ensemble(loss, model, rngs, x):
    """The loss of two equal models with equal keys, in one vmap."""

    @nnx.vmap(in_axes=(0, 0, None))
    def call(model, rngs, x):
        return loss(model, rngs, x)

    graphdef, state = nnx.split((model, rngs))
    models = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.stack([a, a]), state))
    gradient = nnx.grad(lambda models, x: call(*models, x).sum())(models, x)
    nnx.update((model, rngs), jax.tree.map(lambda a: a[1], nnx.state(models)))
    return jax.tree.map(lambda a: a[1], nnx.state(gradient)[0])


def compiled(loss, *args, **options):
    return nnx.jit(lambda *args: nnx.grad(loss, **options)(*args))(*args)


TRANSFORMED = {
    "jit(grad(jit(remat)))": lambda loss, *args: compiled(nnx.jit(nnx.remat(loss)), *args),
    "jit(grad(vmap))": nnx.jit(ensemble, static_argnums=0),
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


MOMENTUM = gr.fd_gradreg(gamma=0.5, epsilon=0.1, ascent=optax.trace(0.9))


@pytest.mark.parametrize(
    ("regularizer", "error", "remedy"),
    [
        (gr.fd_gradreg(gamma=0.5, epsilon=0.1, start=2), TypeError, r"Call loss\(\.\.\., step="),
        (gr.fd_gradreg(gamma=0.5, epsilon=0.1, interval=2), TypeError, r"Call loss\(\.\.\., step="),
        (gr.fd_gradreg(gamma=lambda _: 0.5, epsilon=0.1), TypeError, r"Call loss\(\.\.\., step="),
        (MOMENTUM, ValueError, "make_nnx_train_step"),
        (gr.relative_gradreg(), ValueError, "make_nnx_train_step"),
    ],
)
def test_a_regularizer_that_counts_asks_for_the_step_and_one_with_state_for_a_train_step(
    regularizer, error, remedy
):
    loss = nnx_regularized_loss(lambda model, x: cases.square(model(x)), regularizer)
    with pytest.raises(error, match=rf"^nnx_regularized_loss: .*{remedy}"):
        nnx.grad(loss)(linear(), X)


def test_the_signature_is_that_of_the_loss_and_a_step():
    """Positional, because nnx.grad takes no keyword-only arguments."""

    def with_step(model, x, step=0):
        return 0.0

    def with_keyword(model, x, *, mode):
        return 0.0

    def with_more(model, *batches):
        return 0.0

    losses = cases.with_keys, with_step, with_keyword, with_more
    assert [str(inspect.signature(nnx_regularized_loss(f, FD))) for f in losses] == [
        "(model, rngs, x, step=None)",
        "(model, x, step=0)",
        "(model, x, step=None, *, mode)",
        "(model, *batches, step=None)",
    ]


def test_a_step_of_the_call_reaches_the_schedule_and_a_loss_that_has_one():
    """Both kinds: a counter, by which the regularizer counts as well, and one that is none."""

    def without(weights, x):
        return cases.square(x @ weights[...])

    def loss(weights, x, step=0):
        return without(weights, x) * (1 + jnp.mean(jnp.asarray(step)))

    def with_any_keywords(weights, x, **more):
        return without(weights, x) * (1 + more.get("step", 0))

    weights, x, several = nnx.Param(jnp.ones(2)), jnp.eye(2), jnp.asarray([1, 5])
    plain = nnx_regularized_loss(loss, gr.fd_gradreg(gamma=0.0, epsilon=0.1))
    assert plain(weights, x) == 1.0
    assert plain(weights, x, step=3) == plain(weights, x, step=several) == 4.0
    assert nnx_regularized_loss(with_any_keywords, FD)(weights, x, step=3) == 4.0
    start = gr.fd_gradreg(gamma=0.5, epsilon=0.1, start=3)
    late = nnx_regularized_loss(loss, start)
    # The Hessian is 1 + step, or 1.
    for f, step, factor in ((late, 2, 3.0), (late, 3, 12.0), (without, 2, 1.0), (without, 3, 1.5)):
        f = nnx_regularized_loss(without, start) if f is without else f
        found = nnx.grad(f)(weights, x, step=step)[...]
        np.testing.assert_allclose(found, [factor, factor], rtol=1e-5)
    with pytest.raises(TypeError, match=r"nnx_regularized_loss: .*step"):
        nnx.grad(late)(weights, x, step=several)


def linear():
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("count", [None, 2])
def test_a_weighted_mean_keeps_its_weight(count):
    """Of micro-batches as of the whole, where the halves weigh differently."""
    mask = np.asarray([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], np.float32)

    def weighted(model, pair):
        return gr.Weighted(jnp.sum(model(pair[0])[:, 0] ** 2 * pair[1]), jnp.sum(pair[1]))

    def mean(model, pair):
        return jnp.sum(model(pair[0])[:, 0] ** 2 * pair[1]) / jnp.sum(pair[1])

    loss = weighted if count is None else gr.microbatched(weighted, count)
    found, expected = (
        compiled(nnx_regularized_loss(f, FD), linear(), (X[:8], mask)) for f in (loss, mean)
    )
    assert relative_error(cases.numbers(found), cases.numbers(expected)) < 1e-5
    value = nnx_regularized_loss(loss, FD)(linear(), (X[:8], mask))
    np.testing.assert_allclose(value, mean(linear(), (X[:8], mask)), rtol=1e-6)


def test_a_function_around_a_loss_in_micro_batches_is_another_loss():
    inner = gr.microbatched(lambda model, x: cases.square(model(x)), 2)

    @functools.wraps(inner)
    def doubled(model, x):
        return 2 * inner(model, x)

    one, two = (nnx_regularized_loss(f, FD)(linear(), X) for f in (inner, doubled))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_vmap_over_models_counts_the_added_step_as_an_argument():
    make = nnx.vmap(lambda key: nnx.Linear(3, 1, rngs=nnx.Rngs(key)))
    models = make(jax.random.split(jax.random.key(0), 3))

    def plain(model, x):
        return cases.square(model(x))

    values = nnx.vmap(nnx_regularized_loss(plain, FD), in_axes=(0, None, None))(models, X, None)
    np.testing.assert_array_equal(values, nnx.vmap(plain, in_axes=(0, None))(models, X))


def test_other_arguments_have_the_gradient_of_the_loss():
    """Gradients of a teacher, if requested, and of an array; the model's stays regularized."""

    def distance(model, teacher, x):
        return cases.square(model(x) - teacher(x))

    other = nnx.Linear(3, 1, rngs=nnx.Rngs(5))
    regularized, three = nnx_regularized_loss(distance, FD), (0, 1, 2)
    plain, found = (compiled(f, linear(), other, X, argnums=three) for f in (distance, regularized))
    alone = compiled(regularized, linear(), other, X)
    cases.assert_close(cases.numbers(found[1:]), cases.numbers(plain[1:]))
    cases.assert_close(cases.numbers(found[0]), cases.numbers(alone))
    assert relative_error(cases.numbers(found[0]), cases.numbers(plain[0])) > 0.01


def test_an_object_from_outside_is_read_and_its_change_refused_as_by_the_plain_loss():
    def with_noise(model, rngs, x):
        return cases.square(model(x) + jax.random.normal(rngs(), x.shape))

    def with_teacher(model, x, teacher):
        return cases.square(model(x) - teacher(x))

    model, rngs = linear(), nnx.Rngs(1)
    for f in (with_noise, nnx_regularized_loss(with_noise, FD)):
        with pytest.raises(flax.errors.TraceContextError):
            nnx.grad(lambda model, f=f: f(model, rngs, X))(model)
    teacher = nnx.Linear(3, 1, rngs=nnx.Rngs(5))
    loss = nnx_regularized_loss(with_teacher, FD)
    outside = nnx.grad(lambda model: loss(model, X, teacher))(model)
    cases.assert_close(cases.numbers(outside), cases.numbers(nnx.grad(loss)(model, X, teacher)))


@pytest.mark.parametrize("evaluate", [lambda f: f, jax.grad, jax.jit], ids=["value", "grad", "jit"])
def test_micro_batches_of_a_loss_that_changes_its_model_need_a_wrapper_for_modules(evaluate):
    model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    loss = gr.microbatched(lambda model, x: cases.square(model(x)), 2)
    with pytest.raises(
        ValueError, match=r"leave its first argument unchanged.*nnx_regularized_loss"
    ):
        evaluate(loss)(model, x)
