"""A loss of two parameters, a batch, and one train step with both."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import gradreg_optax as gr

P = jnp.asarray([1.0, 2.0])
BATCH = jnp.asarray([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]])
PENALTY = {"gamma": 0.1, "epsilon": 0.1}
FD = gr.fd_gradreg(**PENALTY)


def mean_square(params, batch):
    return jnp.mean((batch @ params) ** 2)


def quartic(params):
    return jnp.sum(params**4)


def updated(tx, params=P, loss=quartic, **extra):
    gradient = jax.grad(loss)(params)
    return tx.update(gradient, tx.init(params), params, value_fn=loss, **extra)[0]


def says(error, *parts):
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def one_step(loss=mean_square, optimizer=None, regularizer=FD, batch=BATCH, **options):
    init, step = gr.make_train_step(loss, optimizer or optax.sgd(0.1), regularizer, **options)
    return step(init(P), batch)
