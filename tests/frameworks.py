"""One network with BatchNorm and dropout in three frameworks, each behind the same three names.

Written out by hand, its regularized gradient at statistics s and dropout key k is
g + (gamma / epsilon) (grad L(theta + epsilon g; s, k) - g): both passes in training mode, with the
same statistics and the same key, and the new statistics are those of the first pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import numpy as np
import optax

GAMMA, EPSILON, RATE = 0.05, 0.01, 0.1
PENALTY = {"gamma": GAMMA, "epsilon": EPSILON}


class Framework(NamedTuple):
    """``loss_fn(params, batch, net_state, key)``, which returns the new state with the loss.

    The argument is called ``net_state`` because ``state`` is Optax's own name in ``update``.
    """

    loss_fn: Callable[..., Any]
    params: Any
    net_state: Any


KEY = jax.random.key(2)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 8)).astype(np.float32), rng.integers(0, 3, 32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))
        return nn.Dense(3)(x)


@functools.cache
def linen():
    net = LinenNet()

    def loss_fn(params, batch, net_state, key):
        variables = {"params": params, "batch_stats": net_state}
        logits, new = net.apply(
            variables, batch[0], train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    variables = jax.jit(lambda key: net.init(key, batch()[0], train=False))(jax.random.key(1))
    # statistics that have seen a batch, so that a second update would show
    statistics = jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])
    return Framework(loss_fn, variables["params"], statistics)


class EquinoxNet(eqx.Module):
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


def equinox_loss(params, batch, static, net_state, key):
    """With the static part as an argument, as ``eqx.filter_jit`` allows."""
    model = eqx.combine(params, static)
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    logits, new_state = forward(batch[0], net_state, jax.random.split(key, len(batch[0])))
    return cross_entropy(logits, batch[1]), new_state


@functools.cache
def partitioned_equinox():
    """(parameters, everything else of the module, its state)."""
    model, net_state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    return *eqx.partition(model, eqx.is_inexact_array), net_state


@functools.cache
def equinox():
    params, static, net_state = partitioned_equinox()

    # activation functions and integers do not pass through jax.jit
    def loss_fn(params, batch, net_state, key):
        return equinox_loss(params, batch, static, net_state, key)

    x, labels = batch()
    _, net_state = jax.jit(loss_fn)(params, (x + 1, labels), net_state, KEY)
    return Framework(loss_fn, params, net_state)


@hk.transform_with_state
def haiku_net(x, is_training):
    x = hk.Linear(16)(x)
    x = jax.nn.gelu(hk.BatchNorm(True, True, 0.9)(x, is_training))
    x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
    return hk.Linear(3)(x)


@functools.cache
def haiku():
    def loss_fn(params, batch, net_state, key):
        logits, new_state = haiku_net.apply(params, net_state, key, batch[0], True)
        return cross_entropy(logits, batch[1]), new_state

    init = jax.jit(haiku_net.init, static_argnums=2)
    return Framework(loss_fn, *init(jax.random.key(0), batch()[0], True))


FRAMEWORKS = {"linen": linen, "equinox": equinox, "haiku": haiku}


@functools.partial(jax.jit, static_argnames="loss_fn")
def by_hand(loss_fn, params, *args):
    """(gradient, regularized gradient, new state) from calls of ``jax.grad`` alone."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    gradient, new_state = grad_fn(params, *args)
    shifted = jax.tree.map(lambda p, g: p + EPSILON * g, params, gradient)
    ahead, _ = grad_fn(shifted, *args)
    ratio = GAMMA / EPSILON
    regularized = jax.tree.map(lambda g, a: g + ratio * (a - g), gradient, ahead)
    return gradient, regularized, new_state


def gradient_of_step(before, after):
    """The gradient that SGD took."""
    return jax.tree.map(lambda p, q: (p - q) / RATE, before, after)
