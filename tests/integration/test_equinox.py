"""Equinox: partitioned modules with None leaves, ``eqx.nn.State`` and dropout keys."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr

GAMMA, EPSILON, RATE = 0.05, 0.01, 0.1


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear
    depth: int  # not an array: None after the partition

    def __init__(self, key):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(8, 16, key=first)
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="ema")
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(16, 3, use_bias=False, key=last)  # its bias is None
        self.depth = 2

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jax.nn.gelu(x), key=key)), state


def loss_fn(params, batch, static, net_state, key):
    """Called ``net_state`` because ``state`` is Optax's own name in ``update``."""
    x, y = batch
    model = eqx.combine(params, static)
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    logits, new_state = forward(x, net_state, jax.random.split(key, len(x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new_state


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32), jnp.asarray(rng.integers(0, 3, 32))
    model, net_state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    key = jax.random.key(1)
    # Statistics that have seen a batch: a second update would show.
    _, net_state = eqx.filter_jit(loss_fn)(params, (batch[0] + 1, batch[1]), static, net_state, key)
    return params, batch, static, net_state, key


@eqx.filter_jit
def by_hand(params, *args):
    (_, new_state), g = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
    g_ahead = jax.grad(loss_fn, has_aux=True)(
        jax.tree.map(lambda p, d: p + EPSILON * d, params, g), *args
    )[0]
    return jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, g_ahead), new_state


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def gradient_function(params, batch, static, net_state, key):
    value_and_grad = gr.fd_value_and_grad(loss_fn, gamma=GAMMA, epsilon=EPSILON, has_aux=True)
    (_, new_state), grads = value_and_grad(params, batch, static, net_state, key)
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads), new_state


def transformation_in_a_chain(params, batch, static, net_state, key):
    tx = optax.chain(
        gr.fd_gradreg(loss_fn, gamma=GAMMA, epsilon=EPSILON, has_aux=True), optax.sgd(RATE)
    )
    (_, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, batch, static, net_state, key
    )
    updates, _ = tx.update(
        grads, tx.init(params), params, batch=batch, static=static, net_state=net_state, key=key
    )
    return eqx.apply_updates(params, updates), new_state


def train_step(params, batch, static, net_state, key):
    def closed(
        params, batch, net_state, key
    ):  # activation functions and integers do not pass through jax.jit
        return loss_fn(params, batch, static, net_state, key)

    init, step = gr.make_train_step(
        closed, optax.sgd(RATE), gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON), has_aux=True
    )
    state, info = step(init(params), batch, net_state, key)
    return state.params, info.aux


@pytest.mark.parametrize("way", [gradient_function, transformation_in_a_chain, train_step])
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(problem, way):
    params, batch, static, net_state, key = problem
    regularized, new_state = by_hand(*problem)
    found, found_state = (way if way is train_step else eqx.filter_jit(way))(
        params, batch, static, net_state, key
    )
    step = jax.tree.map(lambda p, q: (p - q) / RATE, params, found)
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters they
    # moved.
    assert relative(step, regularized) < 1e-5
    leaves = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(s)])
        for s in (found_state, new_state, net_state)
    ]
    np.testing.assert_allclose(leaves[0], leaves[1], rtol=1e-6, atol=1e-7)
    assert np.abs(leaves[1] - leaves[2]).max() > 1e-4
    assert eqx.combine(found, static).depth == 2


def test_what_is_partitioned_away_is_neither_perturbed_nor_moved(problem):
    """Freezing by a partition: the penalty is that of the rest of the parameters alone, as in the
    reference on the same partition."""
    params, batch, static, net_state, key = problem
    frozen = eqx.tree_at(
        lambda p: (p.first.weight, p.first.bias),
        jax.tree.map(lambda _: True, params),
        (False, False),
    )
    trained, fixed = eqx.partition(params, frozen)
    static = eqx.combine(static, fixed)
    found, _ = eqx.filter_jit(gradient_function)(trained, batch, static, net_state, key)
    assert found.first.weight is None
    step = jax.tree.map(lambda p, q: (p - q) / RATE, trained, found)
    assert relative(step, by_hand(trained, batch, static, net_state, key)[0]) < 1e-5
