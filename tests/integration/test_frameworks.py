"""One step of a network with BatchNorm and dropout, in every framework.

Written out by hand, its regularized gradient at statistics s and dropout key k is
g + (gamma / epsilon) (grad L(theta + epsilon g; s, k) - g): both passes in training mode, with the
same statistics and the same key, and the new statistics are those of the first pass.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from problems import flat, relative_error

GAMMA, EPSILON, RATE = 0.05, 0.01, 0.1
PENALTY = {"gamma": GAMMA, "epsilon": EPSILON}
KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
BATCH = RNG.normal(size=(32, 8)).astype(np.float32), RNG.integers(0, 3, 32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))
        return nn.Dense(3)(x)


def linen():
    net = LinenNet()

    def loss_fn(params, batch, net_state, key):
        variables, rngs = {"params": params, "batch_stats": net_state}, {"dropout": key}
        logits, new = net.apply(variables, batch[0], True, mutable=["batch_stats"], rngs=rngs)
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    variables = jax.jit(net.init, static_argnums=2)(KEY, BATCH[0], False)
    return loss_fn, variables["params"], variables["batch_stats"]


def equinox_loss(params, batch, static, net_state, key):
    """With the static part as an argument, as ``eqx.filter_jit`` allows."""
    model = eqx.combine(params, static)

    @functools.partial(jax.vmap, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    def forward(x, state, key):
        return model(x, state, key=key)

    logits, new_state = forward(batch[0], net_state, jax.random.split(key, len(batch[0])))
    return cross_entropy(logits, batch[1]), new_state


@functools.cache
def partitioned_equinox():
    """(parameters, everything else of the module, its state)."""

    def network(first, last):
        layers = [
            eqx.nn.Linear(8, 16, key=first),
            eqx.nn.BatchNorm(16, axis_name="batch", mode="ema"),
            eqx.nn.Lambda(jax.nn.gelu),  # not an array: None after the partition
            eqx.nn.Dropout(0.5),
            eqx.nn.Linear(16, 3, use_bias=False, key=last),  # its bias is None
        ]
        return eqx.nn.Sequential(layers)

    model, net_state = eqx.nn.make_with_state(network)(*jax.random.split(KEY))
    return *eqx.partition(model, eqx.is_inexact_array), net_state


def equinox():
    params, static, net_state = partitioned_equinox()

    # activation functions and integers do not pass through jax.jit
    def loss_fn(params, batch, net_state, key):
        return equinox_loss(params, batch, static, net_state, key)

    return loss_fn, params, net_state


def haiku():
    @hk.transform_with_state
    def net(x):
        x = jax.nn.gelu(hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training=True))
        return hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.5, x))

    def loss_fn(params, batch, net_state, key):
        logits, new_state = net.apply(params, net_state, key, batch[0])
        return cross_entropy(logits, batch[1]), new_state

    return loss_fn, *jax.jit(net.init)(KEY, BATCH[0])


@functools.partial(jax.jit, static_argnames="loss_fn")
def by_hand(loss_fn, params, *args):
    """(regularized gradient, new state) from calls of ``jax.grad`` alone."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    gradient, new_state = grad_fn(params, *args)
    ahead, _ = grad_fn(jax.tree.map(lambda p, g: p + EPSILON * g, params, gradient), *args)
    ratio = GAMMA / EPSILON
    return jax.tree.map(lambda g, a: g + ratio * (a - g), gradient, ahead), new_state


def gradient_of_step(before, after):
    """The gradient that SGD took."""
    return jax.tree.map(lambda p, q: (p - q) / RATE, before, after)


def statistics(net_state):
    """The floating point leaves: no keys, no counters."""
    leaves = jax.tree.leaves(net_state)
    return flat([leaf for leaf in leaves if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)])


@pytest.mark.parametrize("framework", [linen, equinox, haiku])
def test_one_step_with_batchnorm_and_dropout_is_the_one_written_by_hand(framework):
    """By the loss and by the train step. ``net_state`` has this name because ``state`` is Optax's
    own in ``update``."""
    loss_fn, params, net_state = framework()
    regularizer = gr.fd_gradreg(**PENALTY)
    # statistics that have seen another batch, so that a second update would show
    _, net_state = jax.jit(loss_fn)(params, (BATCH[0] + 1, BATCH[1]), net_state, KEY)
    args = BATCH, net_state, KEY
    expected, new_state = by_hand(loss_fn, params, *args)
    loss = gr.regularized_loss(loss_fn, regularizer, has_aux=True)
    gradient, aux = jax.jit(jax.grad(loss, has_aux=True))(params, *args)
    init, step = gr.make_train_step(loss_fn, optax.sgd(RATE), regularizer, has_aux=True)
    after, info = step(init(params), *args)
    for found, state in ((gradient, aux), (gradient_of_step(params, after.params), info.aux)):
        # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters
        # they moved
        assert relative_error(found, expected) < 1e-5
        # the running statistics are those of one clean pass in training mode
        np.testing.assert_allclose(statistics(state), statistics(new_state), rtol=1e-6, atol=1e-7)
        assert np.abs(statistics(state) - statistics(net_state)).max() > 1e-4


def test_what_is_partitioned_away_in_equinox_is_neither_perturbed_nor_moved():
    """Freezing by a partition: the penalty is that of the rest of the parameters alone. The static
    part goes through ``eqx.filter_jit`` and ``update`` as an argument."""
    params, static, net_state = partitioned_equinox()
    frozen = jax.tree.map(lambda _: False, params.layers[0])
    which = eqx.tree_at(lambda p: p.layers[0], jax.tree.map(lambda _: True, params), frozen)
    trained, fixed = eqx.partition(params, which)
    static = eqx.combine(static, fixed)
    tx = optax.chain(gr.fd_gradreg(equinox_loss, **PENALTY, has_aux=True), optax.sgd(RATE))

    @eqx.filter_jit
    def step(params, **extra):
        gradient, _ = jax.grad(equinox_loss, has_aux=True)(params, **extra)
        updates, _ = tx.update(gradient, tx.init(params), params, **extra)
        return eqx.apply_updates(params, updates)

    after = step(trained, batch=BATCH, static=static, net_state=net_state, key=KEY)

    def loss_fn(params, batch):
        return equinox_loss(params, batch, static, net_state, KEY)

    assert after.layers[0].weight is None
    assert eqx.combine(after, static).layers[2].fn is jax.nn.gelu
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters
    expected, _ = by_hand(loss_fn, trained, BATCH)
    assert relative_error(gradient_of_step(trained, after), expected) < 1e-5
