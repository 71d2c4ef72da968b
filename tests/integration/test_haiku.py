"""Haiku: ``transform_with_state``, with an argument that is not called ``state``."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr

GAMMA, EPSILON, RATE = 0.05, 0.01, 0.1


@hk.transform_with_state
def net(x, is_training):
    x = hk.Linear(16)(x)
    x = jax.nn.gelu(hk.BatchNorm(True, True, 0.9)(x, is_training))
    x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
    return hk.Linear(3)(x)


def loss_fn(params, batch, net_state, key):
    logits, new_state = net.apply(params, net_state, key, batch[0], True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), new_state


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32), jnp.asarray(rng.integers(0, 3, 32))
    params, net_state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), batch[0], True)
    return params, batch, net_state, jax.random.key(1)


@jax.jit
def by_hand(params, *args):
    (_, new_state), g = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
    g_ahead = jax.grad(loss_fn, has_aux=True)(
        jax.tree.map(lambda p, d: p + EPSILON * d, params, g), *args
    )[0]
    return jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, g_ahead), new_state


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def transformation_in_a_chain(params, batch, net_state, key):
    tx = optax.chain(
        gr.fd_gradreg(loss_fn, gamma=GAMMA, epsilon=EPSILON, has_aux=True), optax.sgd(RATE)
    )

    @jax.jit
    def step(params):
        (_, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch, net_state, key
        )
        updates, _ = tx.update(
            grads, tx.init(params), params, batch=batch, net_state=net_state, key=key
        )
        return optax.apply_updates(params, updates), new_state

    return step(params)


def train_step(params, batch, net_state, key):
    init, step = gr.make_train_step(
        loss_fn, optax.sgd(RATE), gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON), has_aux=True
    )
    state, info = step(init(params), batch, net_state, key)
    return state.params, info.aux


@pytest.mark.parametrize("way", [transformation_in_a_chain, train_step])
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(way):
    params, *args = problem()
    regularized, new_state = by_hand(params, *args)
    found, found_state = way(params, *args)
    step = jax.tree.map(lambda p, q: (p - q) / RATE, params, found)
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters they
    # moved.
    assert relative(step, regularized) < 1e-5
    assert relative(found_state, new_state) < 1e-6
    assert relative(new_state, args[1]) > 1e-3


def test_a_loss_argument_called_state_is_refused_with_the_remedy():
    """Optax's update has a ``state`` of its own: the loss would never receive Haiku's."""

    def with_reserved_name(params, state):
        return jnp.sum(params["w"] ** 2) * state

    params = {"w": jnp.ones(2)}
    tx = gr.fd_gradreg(with_reserved_name, gamma=GAMMA, epsilon=EPSILON)
    message = (
        "fd_gradreg: the loss needs 'state', a name that Optax's update keeps for itself: rename"
        " the argument"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.update(params, tx.init(params), params)
