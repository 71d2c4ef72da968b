"""Flax NNX: ``make_nnx_train_step`` with the stock ``nnx.Optimizer``."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import gradreg_optax as gr
import nnx_cases as cases
from nnx_cases import FD, X, linear, mean_square
from problems import relative_error

SGD = optax.sgd(cases.RATE)
CHAIN = optax.chain(FD, SGD)


def optimizer_of(model, tx=SGD):
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize(
    ("name", "wrt", "chained"),
    [
        ("BatchNorm, dropout and LoRA", cases.FIRST, True),
        ("objects", nnx.Param, True),
        ("keys shared with the model", nnx.Param, False),
        ("layer shared with the model", nnx.Param, False),
        ("models in a tree, and aux", nnx.Param, False),
    ],
)
def test_a_step_moves_parameters_and_every_object_as_by_hand(name, wrt, chained):
    """BatchNorm, dropout counters and other objects move once; parameters that are not selected
    stay."""
    loss_fn, make, has_aux = cases.CASES[name]
    args, kwargs = make()
    model, expected = args[0], cases.by_hand(name, wrt)
    optimizer = nnx.Optimizer(model, CHAIN if chained else SGD, wrt=wrt)
    step = gr.make_nnx_train_step(loss_fn, None if chained else FD, has_aux=has_aux)
    before = cases.pure(nnx.state(model, wrt))
    info = step(model, optimizer, *args[1:], **kwargs)
    after = cases.pure(nnx.state(model, wrt))
    gradient = jax.tree.leaves(jax.tree.map(lambda a, b: (a - b) / cases.RATE, before, after))
    nnx.update(model, before)  # what else it holds is compared with one evaluation
    cases.assert_as_by_hand(expected, (info.loss, info.aux), gradient, (args, kwargs))
    np.testing.assert_allclose(info.grad_norm, expected.norm, rtol=1e-6)


def descended(kernel, gamma, part=None):
    """One step on ``mean_square``, a quadratic function, with the penalty of the first samples."""
    few = X[:part]
    hessian, of_part = 2 * X.T @ X / len(X), 2 * few.T @ few / len(few)
    return kernel - cases.RATE * (hessian @ kernel + gamma * of_part @ of_part @ kernel)


@pytest.mark.parametrize("by_name", [False, True])
def test_batch_and_static_arguments_may_be_passed_by_position_and_by_name(by_name):
    """The batch is the first argument after the model: of a part of it is the penalty."""

    def loss_fn(model, x, mode, config=()):
        assert mode == "train"
        return mean_square(model, x) * (1.0 if config == ("plain",) else 2.0)

    model, static = linear(), {"mode": "train", "config": ("plain",)}
    step = gr.make_nnx_train_step(loss_fn, FD, penalty_fraction=0.25, static_argnames=tuple(static))
    expected = descended(model.kernel[...], cases.GAMMA, 4)
    args, kwargs = ((), {"x": X} | static) if by_name else ((X, *static.values()), {})
    step(model, optimizer_of(model), *args, **kwargs)
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)


@pytest.mark.parametrize("place", ["in the step", "in the chain", "cached"])
def test_interval_counts_the_steps_of_the_optimizer(place):
    """With interval=2 the first and the third step carry a doubled penalty, the second none."""
    fd = gr.fd_gradreg(gamma=cases.GAMMA, epsilon=cases.EPSILON, interval=2)
    in_step, model = place == "in the step", linear()
    optimizer = optimizer_of(model, SGD if in_step else optax.chain(fd, SGD))
    step = gr.make_nnx_train_step(mean_square, fd if in_step else None)
    # cached_partial is NNX's own way to pay less for its bookkeeping
    bind = nnx.cached_partial if place == "cached" else functools.partial
    step, expected = bind(step, model, optimizer), model.kernel[...]
    for gamma in (2 * cases.GAMMA, 0.0, 2 * cases.GAMMA):
        step(X)
        expected = descended(expected, gamma)
        np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)
    assert int(optimizer.step[...]) == 3


def test_a_strength_that_tunes_itself_sees_the_held_out_batch_and_moves_no_statistics():
    tuned, sgd = gr.relative_gradreg(strength=None), optax.sgd(0.3)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_arrays(params, batch, rest):
        model = nnx.merge(graphdef, params, rest)
        return cases.cross_entropy(model, batch), cases.pure(nnx.state(model, nnx.BatchStat))

    init, of_state = gr.make_train_step(of_arrays, sgd, tuned, has_aux=True)
    state, rest = init(cases.pure(params)), cases.pure(rest)
    optimizer = optimizer_of(model, optax.chain(tuned, sgd))
    step, batch, held_out = gr.make_nnx_train_step(cases.cross_entropy), (X, cases.Y), (-X, cases.Y)
    for number in range(20):
        args, kwargs = ((), {"pair": batch}) if number == 0 else ((batch,), {})
        step(model, optimizer, *args, **kwargs, held_out=held_out)
        state, info = of_state(state, batch, rest, held_out=held_out)
        rest = info.aux
    assert relative_error(cases.pure(nnx.state(model, nnx.Param)), state.params) < 1e-3  # float32
    assert relative_error(cases.pure(nnx.state(model, nnx.BatchStat)), rest) < 1e-3
    assert float(optax.tree.get(state.opt_state, "strength")) > 0.01


def with_text(model, x):
    return mean_square(model, x), {"word": "text"}


def without_batch(model):
    return mean_square(model, X)


def with_a_mistake(model, x):
    raise TypeError("the loss needs a rest")


def with_an_attribute(model, x):
    model.mode = "eval"
    return mean_square(model, x)


def sown(model, x):
    model.hidden = nnx.Intermediate(model(x))
    return mean_square(model, x)


OWN, OF_STATE = (
    gr.fd_gradreg(f, gamma=0.5, epsilon=0.1) for f in (mean_square, lambda model: model(X).mean())
)
PENALISED, PART = gr.nnx_regularized_loss(mean_square, FD), {"penalty_fraction": 0.25}
STATE = (
    r"^make_nnx_train_step: the regularizer keeps more state than.*Put it in front.*optax\.chain"
)
TWICE, NO_LOSS = "nnx_train_step.*penalise twice", "make_nnx_train_step: .*needs no loss"
STRUCTURE = "make_nnx_train_step: .*must leave the structure"
REFUSED = [  # loss, regularizer, optimizer, options, kind and text of the error
    (mean_square, FD, CHAIN, {}, ValueError, TWICE),
    (PENALISED, FD, SGD, {}, ValueError, TWICE),
    (mean_square, None, SGD, {}, ValueError, r"needs a regularizer.*, got neither\. Write"),
    (mean_square, optax.adam(0.1), SGD, {}, ValueError, r"an optimizer\?.*nnx\.Optimizer"),
    (mean_square, gr.relative_gradreg(), SGD, {}, ValueError, STATE),
    (mean_square, OWN, SGD, {}, TypeError, NO_LOSS),
    (mean_square, None, optax.chain(OF_STATE, SGD), {}, TypeError, NO_LOSS),
    (with_a_mistake, FD, SGD, {}, TypeError, "^the loss needs a rest"),
    (with_text, FD, SGD, {"has_aux": True}, TypeError, r"aux\['word'\] must be an array, got str"),
    (without_batch, FD, SGD, PART, TypeError, "step: penalty_fraction .* need a batch"),
    (with_an_attribute, FD, SGD, {}, ValueError, STRUCTURE),
    (sown, FD, SGD, {}, ValueError, STRUCTURE),
]


@pytest.mark.parametrize(("loss_fn", "regularizer", "tx", "options", "error", "text"), REFUSED)
def test_a_step_that_cannot_be_right_is_refused_with_the_remedy(
    loss_fn, regularizer, tx, options, error, text
):
    model = linear()
    step = gr.make_nnx_train_step(loss_fn, regularizer, **options)
    with pytest.raises(error, match=text):
        step(model, optimizer_of(model, tx), *([] if loss_fn is without_batch else [X]))


MOMENTUM = gr.fd_gradreg(gamma=0.5, epsilon=0.1, ascent=optax.trace(0.9))
LAZY = gr.fd_gradreg(gamma=0.5, epsilon=0.1, interval=2)


@pytest.mark.parametrize(
    ("loss_fn", "regularizer", "error", "remedy"),
    [
        (mean_square, LAZY, TypeError, r"Call loss\(\.\.\., step="),
        (mean_square, MOMENTUM, ValueError, "make_nnx_train_step"),
        (with_an_attribute, FD, ValueError, "must leave the structure"),
        (sown, FD, ValueError, "must leave the structure"),
    ],
)
def test_a_regularized_loss_refuses_what_would_be_lost(loss_fn, regularizer, error, remedy):
    """A counter, further state, and a change of the model's structure."""
    with pytest.raises(error, match=rf"^nnx_regularized_loss: .*{remedy}"):
        nnx.grad(gr.nnx_regularized_loss(loss_fn, regularizer))(linear(), X)


def test_what_is_no_optimizer_no_batch_and_no_argument_is_named():
    model = linear()
    optimizer, step = optimizer_of(model), gr.make_nnx_train_step(mean_square, FD)
    with pytest.raises(TypeError, match=r"must be an nnx\.Optimizer\(.*, got Linear"):
        step(optimizer, model, X)
    owner = nnx.ModelAndOptimizer(model, SGD, wrt=nnx.Param)  # its update takes no model
    with pytest.raises(TypeError, match=r"must be an nnx\.Optimizer\(.*, got ModelAndOptimizer"):
        step(model, owner, X)
    step = gr.make_nnx_train_step(lambda model, batch: model(batch["x"]).sum(), FD, **PART)
    with pytest.raises(TypeError, match=r"^make_nnx_train_step: .*cannot split a Rngs"):
        step(model, optimizer, {"x": X, "more": [nnx.Rngs(1), None]})
    for name in ("node", "model"):
        with pytest.raises(ValueError, match=rf"make_nnx_train_step: static_argnames .*'{name}'"):
            gr.make_nnx_train_step(mean_square, FD, static_argnames=name)


def test_a_loss_may_take_values_out_of_its_batch():
    def loss_fn(model, batch):
        return cases.square(model(batch.pop("x")) - batch.pop("target"))

    model, expected = linear(), mean_square(linear(), X)
    step = gr.make_nnx_train_step(loss_fn, FD)
    info = step(model, optimizer_of(model), {"x": X, "target": 0.0})
    np.testing.assert_allclose(info.loss, expected, rtol=1e-6)
    value = gr.nnx_regularized_loss(loss_fn, FD)(linear(), {"x": X, "target": 0.0})
    np.testing.assert_allclose(value, expected, rtol=1e-6)
