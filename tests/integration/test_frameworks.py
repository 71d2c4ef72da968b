"""One step of a network with BatchNorm and dropout, in every framework and by every entry point."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.training import train_state

import gradreg_optax as gr
from frameworks import FRAMEWORKS, KEY, PENALTY, RATE, LinenNet, batch, by_hand, gradient_of_step
from problems import flat, relative_error


class TrainState(train_state.TrainState):
    batch_stats: Any


def gradient_function(framework, batch, net_state, key):
    """In the stock ``TrainState`` of linen."""

    @jax.jit
    def step(state):
        value_and_grad = gr.fd_value_and_grad(framework.loss_fn, **PENALTY, has_aux=True)
        (_, new_stats), grads = value_and_grad(state.params, batch, state.batch_stats, key)
        return state.apply_gradients(grads=grads, batch_stats=new_stats)

    state = step(stock_train_state(optax.sgd(RATE)))
    return state.params, state.batch_stats


def transformation_in_a_chain(framework, batch, net_state, key):
    tx = optax.chain(gr.fd_gradreg(framework.loss_fn, **PENALTY, has_aux=True), optax.sgd(RATE))
    value_and_grad = jax.value_and_grad(framework.loss_fn, has_aux=True)
    extra = {"batch": batch, "net_state": net_state, "key": key}

    @jax.jit
    def step(params):
        (_, new_state), gradient = value_and_grad(params, **extra)
        updates, _ = tx.update(gradient, tx.init(params), params, **extra)
        return optax.apply_updates(params, updates), new_state

    return step(framework.params)


def train_step(framework, *args):
    init, step = gr.make_train_step(
        framework.loss_fn, optax.sgd(RATE), gr.fd_gradreg(**PENALTY), has_aux=True
    )
    state, info = step(init(framework.params), *args)
    return state.params, info.aux


def statistics(net_state):
    """The floating point leaves: no keys, no counters."""
    leaves = jax.tree.leaves(net_state)
    return flat([leaf for leaf in leaves if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)])


WAYS = gradient_function, transformation_in_a_chain, train_step


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(name):
    """By every entry point for linen, by the train step for all."""
    framework = FRAMEWORKS[name]()
    args = batch(), framework.net_state, KEY
    _, expected, new_state = by_hand(framework.loss_fn, framework.params, *args)
    for way in WAYS if name == "linen" else [train_step]:
        params, state = way(framework, *args)
        # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters
        # they moved
        assert relative_error(gradient_of_step(framework.params, params), expected) < 1e-5
        # the running statistics are those of one clean pass in training mode
        np.testing.assert_allclose(statistics(state), statistics(new_state), rtol=1e-6, atol=1e-7)
        assert np.abs(statistics(state) - statistics(framework.net_state)).max() > 1e-4


def stock_train_state(tx):
    _, params, stats = FRAMEWORKS["linen"]()
    return TrainState.create(apply_fn=LinenNet().apply, params=params, tx=tx, batch_stats=stats)


def test_apply_gradients_does_not_forward_arguments_to_the_chain():
    """Why linen's stock TrainState takes the gradient function: extra arguments would be taken for
    fields of the state."""
    state = stock_train_state(optax.chain(gr.fd_gradreg(**PENALTY), optax.sgd(RATE)))
    for extra in ({}, {"value_fn": lambda p: 0.0}):
        with pytest.raises(ValueError, match="fd_gradreg: update needs a loss"):
            state.apply_gradients(grads=state.params, **extra)
