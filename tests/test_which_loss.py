"""Which loss a transformation differentiates, and which arguments it hands to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import (
    Weighted,
    dbp_gradreg,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    make_train_step,
)
from problems import batch_of, flat, loss_fn, params_of, update_of


class Model:
    def loss(self, params, batch):
        return loss_fn(params, batch)

    def __call__(self, params, batch):
        return loss_fn(params, batch)

    def closed(self, params):
        return loss_fn(params, batch_of())


def with_keyword_only(params, *, batch):
    return loss_fn(params, batch)


def with_any_keywords(params, **kwargs):
    assert set(kwargs) == {"batch", "meant_for_others"}
    return loss_fn(params, kwargs["batch"])


LOSSES = {
    "with defaults": loss_fn,
    "function": lambda params, batch: loss_fn(params, batch),
    "keyword-only": with_keyword_only,
    "partial": functools.partial(loss_fn, scale=1.0),
    "partial of the batch": functools.partial(loss_fn, batch=batch_of()),
    "bound method": Model().loss,
    "closed bound method": Model().closed,
    "callable object": Model(),
    "jitted": jax.jit(loss_fn),
    "checkpointed": jax.checkpoint(loss_fn),
    "any keywords": with_any_keywords,
    "positional rest": lambda *args, batch: loss_fn(args[0], batch),
}


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_of_the_loss_are_picked_by_name(name):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = update_of(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2), gradient, params, batch=batch)
    extra = {"batch": batch, "meant_for_others": 7, "value": 1.0, "grad": gradient}
    tx = fd_gradreg(LOSSES[name], gamma=0.3, epsilon=0.2)
    # the loss of construction wins
    updates = update_of(tx, gradient, params, value_fn=lambda p: 1 / 0, **extra)
    # eps(float32) / epsilon
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4, atol=1e-5)
    tx = fd_gradreg(gamma=0.3, epsilon=0.2)
    updates = update_of(tx, gradient, params, value_fn=LOSSES[name], **extra)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4, atol=1e-5)


def test_optional_arguments_are_picked_where_they_are_given():
    params, batch = params_of(), batch_of()
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = fd_gradreg(loss_fn, gamma=0.5, epsilon=0.5, reuse_updates=False)
    small = flat(update_of(tx, zero, params, batch=batch))
    large = flat(update_of(tx, zero, params, batch=batch, scale=0.0, shift=3.0))
    assert np.abs(small).max() > 0
    assert not large.any()


def test_has_aux_speaks_of_the_loss_and_never_of_value_fn():
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = update_of(dbp_gradreg(loss_fn, gamma=0.3), gradient, params, batch=batch)

    def with_aux(params, batch):
        return loss_fn(params, batch), {"anything": "at all"}

    for make in (
        functools.partial(dbp_gradreg, gamma=0.3),
        functools.partial(fd_gradreg, gamma=0.3, epsilon=1e-2, scheme="central"),
    ):
        for updates in (
            update_of(make(with_aux, has_aux=True), gradient, params, batch=batch),
            update_of(make(has_aux=True), gradient, params, value_fn=lambda p: loss_fn(p, batch)),
        ):
            # float32: eps / epsilon and epsilon^2
            np.testing.assert_allclose(flat(updates), flat(expected), atol=1e-3)
    assert update_of(flooding(with_aux, level=1e3, has_aux=True), 1.0, params, batch=batch) == -1.0


def test_a_loss_of_the_regularizer_finds_what_the_loss_of_the_step_takes_as_keywords():
    def own(params, batch, temperature):
        return loss_fn(params, batch, scale=temperature)

    def of_step(params, batch, **options):
        return loss_fn(params, batch, scale=options["temperature"])

    params, batch = params_of(), batch_of()
    updates = []
    for regularizer in (
        fd_gradreg(gamma=0.3, epsilon=0.2),
        fd_gradreg(own, gamma=0.3, epsilon=0.2, reuse_updates=False),
    ):
        init, step = make_train_step(of_step, optax.sgd(0.1), regularizer)
        state, _ = step(init(params), batch, temperature=2.0)
        updates.append(flat(state.params))
    np.testing.assert_allclose(*updates, rtol=1e-6)


def test_a_narrow_weight_does_not_narrow_the_total():
    def loss(params):
        return Weighted(params * jnp.float32(200000.0), jnp.asarray(2.0, jnp.float16))

    value, _ = fd_value_and_grad(loss, gamma=0.1, epsilon=0.1)(jnp.float32(1.0))
    assert float(value) == 100000.0
