"""Flax linen: the stock ``TrainState``, BatchNorm and dropout.

Written out by hand, one regularized gradient of a network with BatchNorm statistics s and dropout
key k is g + (gamma / epsilon) (grad L(theta + epsilon g; s, k) - g): both passes in training mode,
with the same statistics and the same key, and the new statistics are those of the first pass.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import gradreg_optax as gr

GAMMA, EPSILON = 0.05, 0.01
RATE = 0.1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.gelu(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


NET = Net()


def loss_fn(params, batch, batch_stats, dropout_key):
    x, y = batch
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = NET.apply(
        variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32), jnp.asarray(rng.integers(0, 3, 32))
    variables = jax.jit(lambda key: NET.init(key, batch[0], train=False))(jax.random.key(1))
    # Statistics that have seen a few batches, so that a second update would show.
    stats = jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])
    return variables["params"], batch, stats, jax.random.key(2)


@jax.jit
def by_hand(params, batch, stats, key):
    """(gradient, regularized gradient, new statistics) from two calls of jax.grad."""
    (_, new_stats), g = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, stats, key)
    ahead = jax.tree.map(lambda p, d: p + EPSILON * d, params, g)
    g_ahead = jax.grad(loss_fn, has_aux=True)(ahead, batch, stats, key)[0]
    return g, jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, g_ahead), new_stats


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def stock_train_state(problem):
    params, batch, stats, key = problem

    @jax.jit
    def step(state):
        value_and_grad = gr.fd_value_and_grad(loss_fn, gamma=GAMMA, epsilon=EPSILON, has_aux=True)
        (_, new_stats), grads = value_and_grad(state.params, batch, state.batch_stats, key)
        return state.apply_gradients(grads=grads, batch_stats=new_stats)

    state = step(
        TrainState.create(apply_fn=NET.apply, params=params, tx=optax.sgd(RATE), batch_stats=stats)
    )
    return state.params, state.batch_stats


def transformation_in_a_chain(problem):
    params, batch, stats, key = problem
    tx = optax.chain(
        gr.fd_gradreg(loss_fn, gamma=GAMMA, epsilon=EPSILON, has_aux=True), optax.sgd(RATE)
    )

    @jax.jit
    def step(params, opt_state):
        (_, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, stats, key)
        updates, _ = tx.update(
            grads, opt_state, params, batch=batch, batch_stats=stats, dropout_key=key
        )
        return optax.apply_updates(params, updates), new_stats

    return step(params, tx.init(params))


def train_step(problem):
    params, batch, stats, key = problem
    init, step = gr.make_train_step(
        loss_fn, optax.sgd(RATE), gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON), has_aux=True
    )
    state, info = step(init(params), batch, batch_stats=stats, dropout_key=key)
    return state.params, info.aux


@pytest.mark.parametrize("way", [stock_train_state, transformation_in_a_chain, train_step])
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(problem, way):
    params, *_ = problem
    _, gradient, new_stats = by_hand(*problem)
    found, found_stats = way(problem)
    step = jax.tree.map(lambda p, q: (p - q) / RATE, params, found)
    # 1e-5: rounding of gradient differences in float32, times gamma / epsilon = 5, and of
    # parameters of order one.
    assert relative(step, gradient) < 1e-5
    # The running statistics are those of one clean pass in training mode.
    assert relative(found_stats, new_stats) < 1e-6
    assert relative(new_stats, problem[2]) > 1e-3


@pytest.mark.parametrize("mistake", ["another dropout key", "evaluation mode"])
def test_the_second_pass_must_see_the_same_dropout_mask_and_mode(problem, mistake):
    """What the tests above would report if the second pass saw another function: an error of 100%
    and more, not of a few percent."""
    params, batch, stats, _ = problem
    g, right, _ = by_hand(*problem)

    def evaluated(params):
        logits = NET.apply({"params": params, "batch_stats": stats}, batch[0], train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    second = (
        evaluated
        if mistake == "evaluation mode"
        else lambda p: loss_fn(p, batch, stats, jax.random.key(3))[0]
    )
    tx = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
    wrong, _ = jax.jit(lambda: tx.update(g, tx.init(params), params, value_fn=second))()
    penalty = optax.tree.sub(right, g)
    assert relative(optax.tree.sub(wrong, g), penalty) > 1.0


def test_apply_gradients_does_not_forward_arguments_to_the_chain(problem):
    """Why linen's stock TrainState takes the gradient function: extra arguments would be taken for
    fields of the state."""
    params, _, stats, _ = problem
    tx = optax.chain(gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON), optax.sgd(RATE))
    state = TrainState.create(apply_fn=NET.apply, params=params, tx=tx, batch_stats=stats)
    with pytest.raises(ValueError, match="fd_gradreg: has no loss"):
        state.apply_gradients(grads=params)
    with pytest.raises(ValueError, match="fd_gradreg: has no loss"):
        state.apply_gradients(grads=params, value_fn=lambda p: 0.0)
