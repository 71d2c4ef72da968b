"""Flax linen: the stock ``TrainState``, and what a second pass at another mask would do."""

from typing import Any

import jax
import optax
import pytest
from flax.training import train_state

import gradreg_optax as gr
from frameworks import (
    KEY,
    PENALTY,
    RATE,
    LinenNet,
    batch,
    by_hand,
    cross_entropy,
    gradient_of_step,
    linen,
)
from problems import relative_error


class TrainState(train_state.TrainState):
    batch_stats: Any


def stock_train_state(tx):
    _, params, stats = linen()
    return TrainState.create(apply_fn=LinenNet().apply, params=params, tx=tx, batch_stats=stats)


def test_the_stock_train_state_takes_the_gradient_function():
    loss_fn, params, stats = linen()

    @jax.jit
    def step(state):
        value_and_grad = gr.fd_value_and_grad(loss_fn, **PENALTY, has_aux=True)
        (_, new_stats), grads = value_and_grad(state.params, batch(), state.batch_stats, KEY)
        return state.apply_gradients(grads=grads, batch_stats=new_stats)

    state = step(stock_train_state(optax.sgd(RATE)))
    _, gradient, new_stats = by_hand(loss_fn, params, batch(), stats, KEY)
    # 1e-5: rounding of gradient differences in float32, times gamma / epsilon = 5
    assert relative_error(gradient_of_step(params, state.params), gradient) < 1e-5
    assert relative_error(state.batch_stats, new_stats) < 1e-6


@pytest.mark.parametrize("mistake", ["another dropout key", "evaluation mode"])
def test_the_second_pass_must_see_the_same_dropout_mask_and_mode(mistake):
    """What the tests of one step would report if the second pass saw another function: an error of
    100% and more, not of a few percent."""
    loss_fn, params, stats = linen()
    x, labels = batch()
    gradient, right, _ = by_hand(loss_fn, params, batch(), stats, KEY)

    def evaluated(params):
        logits = LinenNet().apply({"params": params, "batch_stats": stats}, x, train=False)
        return cross_entropy(logits, labels)

    def with_another_key(params):
        return loss_fn(params, batch(), stats, jax.random.key(3))[0]

    second = evaluated if mistake == "evaluation mode" else with_another_key
    tx = gr.fd_gradreg(**PENALTY)
    wrong, _ = jax.jit(lambda: tx.update(gradient, tx.init(params), params, value_fn=second))()
    penalty = optax.tree.sub(right, gradient)
    assert relative_error(optax.tree.sub(wrong, gradient), penalty) > 1.0


def test_apply_gradients_does_not_forward_arguments_to_the_chain():
    """Why linen's stock TrainState takes the gradient function: extra arguments would be taken for
    fields of the state."""
    state = stock_train_state(optax.chain(gr.fd_gradreg(**PENALTY), optax.sgd(RATE)))
    with pytest.raises(ValueError, match="fd_gradreg: update needs a loss"):
        state.apply_gradients(grads=state.params)
    with pytest.raises(ValueError, match="fd_gradreg: update needs a loss"):
        state.apply_gradients(grads=state.params, value_fn=lambda p: 0.0)
