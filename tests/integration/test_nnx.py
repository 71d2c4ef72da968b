"""Flax NNX: ``make_nnx_train_step`` with the stock ``nnx.Optimizer``, BatchNorm and dropout.

The reference is written by hand on the pure function: the module is split into parameters theta and
the rest r (statistics and dropout counters), loss(theta, r) returns the new rest, and both
gradients are taken at the same r, the one from before the step.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import frameworks
import gradreg_optax as gr
from frameworks import (
    EPSILON,
    GAMMA,
    KEY,
    PENALTY,
    RATE,
    NnxNet,
    batch,
    cross_entropy,
    functional_nnx,
    gradient_of_step,
)
from problems import relative_error

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8


def loss_fn(model, x, y):
    return cross_entropy(model(x), y)


def loss_with_aux(model, x, y):
    logits = model(x)
    return cross_entropy(logits, y), logits


def split(model, wrt=nnx.Param):
    graphdef, params, rest = nnx.split(model, wrt, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def model_and_optimizer(tx, wrt=nnx.Param):
    model = NnxNet(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=wrt)


@functools.cache
def by_hand(wrt=nnx.Param, part=None):
    """(gradient, regularized gradient, rest after one clean pass), with the penalty on the first
    ``part`` samples."""
    pure_loss, params, rest = functional_nnx(wrt)
    return frameworks.by_hand(pure_loss, params, batch(), rest, KEY, part=part)


def assert_rest_moved_once(model):
    """Running statistics to 1e-6, dropout counters exactly: those of one clean pass."""
    found, expected = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))), by_hand()[2]
    assert relative_error(found["norm"], expected["norm"]) < 1e-6
    assert int(found["dropout"]["rngs"]["count"]) == int(expected["dropout"]["rngs"]["count"]) == 1


@pytest.mark.parametrize("place", ["in the chain", "in the step"])
@pytest.mark.parametrize("has_aux", [False, True])
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(place, has_aux):
    fd = gr.fd_gradreg(**PENALTY)
    chained = place == "in the chain"
    model, optimizer = model_and_optimizer(
        optax.chain(fd, optax.sgd(RATE)) if chained else optax.sgd(RATE)
    )
    _, before, _ = split(model)
    step = gr.make_nnx_train_step(
        loss_with_aux if has_aux else loss_fn, None if chained else fd, has_aux=has_aux
    )
    info = step(model, optimizer, *batch())
    g, regularized, _ = by_hand()
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters they
    # moved.
    assert relative_error(gradient_of_step(before, split(model)[1]), regularized) < 1e-5
    assert abs(float(info.grad_norm / optax.tree.norm(g)) - 1) < 1e-6
    assert info.aux is None if not has_aux else info.aux.shape == (32, 3)
    assert_rest_moved_once(model)


@pytest.mark.parametrize("mistake", ["live variables", "state after the clean pass"])
def test_state_from_after_the_clean_pass_is_a_silent_error_of_hundreds_of_percent(mistake):
    """The mistake that make_nnx_train_step exists to prevent: the second pass draws the next
    dropout mask."""
    model, _ = model_and_optimizer(optax.sgd(RATE))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = pure(params)
    # moves the counters that `rest` refers to
    grads = pure(nnx.jit(nnx.grad(loss_fn))(model, *batch()))
    if mistake == "state after the clean pass":
        _, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params):
        return loss_fn(nnx.merge(graphdef, params, pure(rest)), *batch())

    tx = gr.fd_gradreg(**PENALTY)
    wrong, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params, value_fn=value_fn))()
    assert relative_error(nnx.to_pure_dict(wrong), by_hand()[1]) > 1.0


def test_the_penalty_on_a_fraction_of_the_batch_is_the_one_written_by_hand():
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    _, before, _ = split(model)
    step = gr.make_nnx_train_step(
        lambda model, pair: loss_fn(model, *pair), gr.fd_gradreg(**PENALTY), penalty_fraction=0.25
    )
    step(model, optimizer, batch())
    assert relative_error(gradient_of_step(before, split(model)[1]), by_hand(part=8)[1]) < 1e-5
    assert_rest_moved_once(model)


def test_a_subset_of_the_parameters_is_perturbed_and_moved_alone():
    wrt = nnx.All(nnx.Param, nnx.PathContains("last"))
    model, optimizer = model_and_optimizer(
        optax.chain(gr.fd_gradreg(**PENALTY), optax.sgd(RATE)), wrt
    )
    (_, before, _), (_, _, others) = split(model, wrt), split(model, wrt)
    gr.make_nnx_train_step(loss_fn)(model, optimizer, *batch())
    _, after, others_after = split(model, wrt)
    assert relative_error(gradient_of_step(before, after), by_hand(wrt)[1]) < 1e-5
    np.testing.assert_array_equal(others["first"]["kernel"], others_after["first"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["in the chain", "in the step", "cached"])
def test_interval_counts_the_steps_of_the_optimizer(place):
    """With interval=2 the first and the third step carry a doubled penalty, the second none."""
    fd = gr.fd_gradreg(interval=2, **PENALTY)
    chained = place != "in the step"
    model, optimizer = model_and_optimizer(
        optax.chain(fd, optax.sgd(RATE)) if chained else optax.sgd(RATE)
    )
    step = functools.partial(
        gr.make_nnx_train_step(loss_fn, None if chained else fd), model, optimizer
    )
    if place == "cached":  # NNX's own way to pay less for its bookkeeping
        step = nnx.cached_partial(step.func, model, optimizer)
    pure_loss, params, rest = functional_nnx()

    @jax.jit
    def functional(params, rest, gamma):
        value_and_grad = gr.fd_value_and_grad(pure_loss, gamma=gamma, epsilon=EPSILON, has_aux=True)
        (_, rest), grads = value_and_grad(params, batch(), rest, KEY)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest

    for gamma in (2 * GAMMA, 0.0, 2 * GAMMA):
        step(*batch())
        params, rest = functional(params, rest, gamma)
        assert relative_error(split(model)[1], params) < 1e-5
    assert int(optimizer.step[...]) == 3


def test_a_regularizer_with_state_of_its_own_is_refused_with_the_remedy():
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    step = gr.make_nnx_train_step(loss_fn, optax.chain(gr.fd_gradreg(**PENALTY), optax.trace(0.9)))
    with pytest.raises(
        ValueError,
        match=r"make_nnx_train_step: the regularizer keeps more state than.*Put it in front",
    ):
        step(model, optimizer, *batch())


def pair_loss(model, pair):
    return loss_fn(model, *pair)


def test_a_strength_that_tunes_itself_sees_the_held_out_batch_and_moves_no_statistics():
    tx = optax.chain(gr.relative_gradreg(strength=None), optax.sgd(0.3))
    model, optimizer = model_and_optimizer(tx)
    graphdef, _, _ = nnx.split(model, nnx.Param, ...)
    _, params, rest = split(model)
    x, y = batch()
    held_out = (-x, y)
    step = gr.make_nnx_train_step(pair_loss)

    def pure_loss(params, rest, pair):
        net = nnx.merge(graphdef, nnx.State(params), nnx.State(rest))
        return pair_loss(net, pair), nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))

    @jax.jit
    def functional(params, rest, state):
        (value, after), g = jax.value_and_grad(pure_loss, has_aux=True)(params, rest, (x, y))

        def loss_on(pair):
            return lambda p: pure_loss(p, rest, pair)[0]

        fns = {"value_fn": loss_on((x, y)), "held_out_fn": loss_on(held_out)}
        updates, state = tx.update(g, state, params, value=value, **fns)
        return optax.apply_updates(params, updates), after, state

    state = tx.init(params)
    for _ in range(40):
        step(model, optimizer, (x, y), held_out=held_out)
        params, rest, state = functional(params, rest, state)
    assert relative_error(split(model)[1], params) < 1e-3  # float32 over forty steps
    assert relative_error(split(model)[2]["norm"], rest["norm"]) < 1e-3
    assert float(optax.tree.get(state, "strength")) > 0.1


def test_a_relative_penalty_in_the_nnx_step_itself_is_refused():
    """It keeps more than a counter, which has a place in the optimizer alone."""
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    step = gr.make_nnx_train_step(pair_loss, gr.relative_gradreg())
    with pytest.raises(ValueError, match=r"more state than.*optax\.chain"):
        step(model, optimizer, batch())


def refused(tx, step, error, sentence):
    model, optimizer = model_and_optimizer(tx)
    with pytest.raises(error, match=sentence):
        step(model, optimizer, *batch())


def test_model_and_optimizer_come_in_their_order():
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    step = gr.make_nnx_train_step(loss_fn, gr.fd_gradreg(**PENALTY))
    with pytest.raises(TypeError, match=r"must be an nnx\.Optimizer\(.*, got NnxNet"):
        step(optimizer, model, *batch())


def test_a_regularizer_stands_in_one_place():
    fd, sgd = gr.fd_gradreg(**PENALTY), optax.sgd(RATE)
    make = gr.make_nnx_train_step
    refused(optax.chain(fd, sgd), make(loss_fn, fd), ValueError, "nnx_train_step.*penalise twice")
    penalised = gr.nnx_regularized_loss(loss_fn, fd)
    refused(sgd, make(penalised, fd), ValueError, "nnx_train_step.*penalise twice")
    refused(optax.chain(fd, sgd), make(penalised), ValueError, "nnx_train_step.*penalise twice")
    refused(sgd, make(loss_fn), ValueError, r"needs a regularizer.*, got neither\. Write")
    refused(sgd, make(loss_fn, optax.adam(0.1)), ValueError, r"an optimizer\?.*nnx\.Optimizer")


@pytest.mark.parametrize("place", ["in the chain", "in the step"])
@pytest.mark.parametrize("of", ["module", "state"])
def test_a_regularizer_with_a_loss_of_its_own_is_told_that_it_needs_none(place, of):
    """It gets no module, and asks for arguments that only the train step could pass."""
    own = loss_fn if of == "module" else lambda model: model(batch()[0]).mean()
    fd, sgd = gr.fd_gradreg(own, **PENALTY), optax.sgd(RATE)
    chained = place == "in the chain"
    step = gr.make_nnx_train_step(loss_fn, None if chained else fd)
    tx = optax.chain(fd, sgd) if chained else sgd
    refused(tx, step, TypeError, "make_nnx_train_step: .*needs no loss")


def test_a_mistake_in_the_loss_of_a_module_shows_as_itself():
    def wrong(model, x, y):
        raise TypeError("the loss needs a rest")

    step = gr.make_nnx_train_step(wrong, gr.fd_gradreg(**PENALTY))
    refused(optax.sgd(RATE), step, TypeError, "^the loss needs a rest")


@pytest.mark.slow
def test_micro_batches_take_a_module_with_dropout_keys():
    """Of one micro-batch the step is that of the batch; of two, the statistics are averaged and the
    counters move once."""
    ends = []
    for count in (None, 1, 2):
        model, optimizer = model_and_optimizer(optax.sgd(RATE))
        loss = pair_loss if count is None else gr.microbatched(pair_loss, count)
        step = gr.make_nnx_train_step(loss, gr.fd_gradreg(**PENALTY))
        info = step(model, optimizer, batch())
        assert np.isfinite(float(info.loss))
        assert int(model.dropout.rngs.count[...]) == 1
        ends.append(split(model)[1])
    assert relative_error(ends[1], ends[0]) < 1e-5


def test_text_in_aux_of_a_step_is_named():
    def loss(model, pair):
        return pair_loss(model, pair), {"word": "text"}

    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    step = gr.make_nnx_train_step(loss, gr.fd_gradreg(**PENALTY), has_aux=True)
    with pytest.raises(
        TypeError, match=r"make_nnx_train_step: aux\['word'\] must be an array, got str"
    ):
        step(model, optimizer, batch())


@pytest.mark.parametrize("by_keyword", [False, True])
def test_the_batch_is_the_first_argument_after_the_model_however_it_is_passed(by_keyword):
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    _, before, _ = split(model)

    def scaled(model, pair, *, scale):
        return scale * pair_loss(model, pair)

    step = gr.make_nnx_train_step(scaled, gr.fd_gradreg(**PENALTY), penalty_fraction=0.25)
    if by_keyword:
        step(model, optimizer, scale=1.0, pair=batch())
    else:
        step(model, optimizer, batch(), scale=1.0)
    assert relative_error(gradient_of_step(before, split(model)[1]), by_hand(part=8)[1]) < 1e-5


@pytest.mark.slow
def test_held_out_samples_go_with_a_batch_by_keyword():
    tx = optax.chain(gr.relative_gradreg(strength=None), optax.sgd(0.3))
    ends = []
    for by_keyword in (False, True):
        model, optimizer = model_and_optimizer(tx)
        step = gr.make_nnx_train_step(pair_loss)
        args, kwargs = ((), {"pair": batch()}) if by_keyword else ((batch(),), {})
        step(model, optimizer, *args, **kwargs, held_out=batch())
        ends.append(split(model)[1])
    assert relative_error(*ends) == 0


def test_a_part_of_a_batch_that_is_not_there_is_refused():
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    fixed = functools.partial(pair_loss, pair=batch())

    def loss(model):
        return fixed(model)

    step = gr.make_nnx_train_step(loss, gr.fd_gradreg(**PENALTY), penalty_fraction=0.25)
    with pytest.raises(TypeError, match=r"make_nnx_train_step: penalty_fraction .* need a batch"):
        step(model, optimizer)


def in_mode(model, pair, mode, config=()):
    assert mode == "train"
    return pair_loss(model, pair) * (1.0 if config == ("plain",) else 2.0)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_static_arguments_of_the_loss_are_no_arrays(by_keyword):
    model, optimizer = model_and_optimizer(optax.sgd(RATE))
    _, before, _ = split(model)
    static = ("mode", "config")
    step = gr.make_nnx_train_step(in_mode, gr.fd_gradreg(**PENALTY), static_argnames=static)
    if by_keyword:
        step(model, optimizer, batch(), mode="train", config=("plain",))
    else:
        step(model, optimizer, batch(), "train", ("plain",))
    assert relative_error(gradient_of_step(before, split(model)[1]), by_hand()[1]) < 1e-5


@pytest.mark.parametrize("name", ["node", "model"])
def test_a_static_argument_that_the_loss_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=rf"make_nnx_train_step: static_argnames .*'{name}'"):
        gr.make_nnx_train_step(in_mode, gr.fd_gradreg(**PENALTY), static_argnames=name)
