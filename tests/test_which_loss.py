"""Which loss a transformation differentiates, and which arguments it hands to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import (
    Weighted,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    make_train_step,
    regularized_loss,
    sam,
)
from problems import REGULARIZERS, batch_of, flat, loss_fn, params_of, update_of


class Model:
    def loss(self, params, batch):
        return loss_fn(params, batch)

    def __call__(self, params, batch):
        return loss_fn(params, batch)


def with_keyword_only(params, *, batch):
    return loss_fn(params, batch)


def with_any_keywords(params, **kwargs):
    assert set(kwargs) == {"batch", "meant_for_others"}
    return loss_fn(params, kwargs["batch"])


LOSSES = {
    "with defaults": loss_fn,
    "keyword-only": with_keyword_only,
    "partial": functools.partial(loss_fn, scale=1.0),
    "partial of the batch": functools.partial(loss_fn, batch=batch_of()),
    "bound method": Model().loss,
    "callable object": Model(),
    "jitted": jax.jit(loss_fn),
    "checkpointed": jax.checkpoint(loss_fn),
    "any keywords": with_any_keywords,
    "positional rest": lambda *args, batch: loss_fn(args[0], batch),
    "closed": lambda params: loss_fn(params, batch_of()),
    "positional and closed": lambda *args: loss_fn(*args, batch_of()),
}


def test_arguments_of_the_loss_are_picked_by_name():
    def penalised(params, batch, loss=None, **extra):
        tx = fd_gradreg(loss, gamma=0.3, epsilon=0.2)
        gradient = jax.grad(loss_fn)(params, batch)
        return update_of(tx, gradient, params, batch=batch, **extra)

    @jax.jit
    def updates(params, batch):
        extra = {"meant_for_others": 7, "value": 1.0, "grad": params}
        wrong = {"value_fn": lambda p: 1 / 0}  # the loss of construction wins
        return penalised(params, batch, loss_fn), {
            name: (
                penalised(params, batch, loss, **extra, **wrong),
                penalised(params, batch, value_fn=loss, **extra),
            )
            for name, loss in LOSSES.items()
        }

    expected, found = updates(params_of(), batch_of())
    for name, pair in found.items():
        for update in pair:
            # eps(float32) / epsilon
            tolerance = {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(flat(update), flat(expected), **tolerance, err_msg=name)


def test_optional_arguments_are_picked_where_they_are_given():
    tx = fd_gradreg(loss_fn, gamma=0.5, epsilon=0.5, reuse_updates=False)

    @jax.jit
    def updates(params, batch):
        zero = jax.tree.map(jnp.zeros_like, params)
        flat_loss = {"scale": 0.0, "shift": 3.0}
        return [update_of(tx, zero, params, batch=batch, **e) for e in ({}, flat_loss)]

    small, large = map(flat, updates(params_of(), batch_of()))
    assert np.abs(small).max() > 0
    assert not large.any()


def test_has_aux_speaks_of_the_loss_and_never_of_value_fn():
    def with_aux(params, batch):
        return loss_fn(params, batch), {"anything": "at all"}

    @functools.partial(jax.jit, static_argnums=0)
    def updates(make, params, batch):
        value_fn = functools.partial(loss_fn, batch=batch)
        gradient, own = jax.grad(value_fn)(params), make(with_aux, has_aux=True)
        return (
            update_of(make(), gradient, params, value_fn=value_fn),
            update_of(make(has_aux=True), gradient, params, value_fn=value_fn),
            update_of(own, gradient, params, batch=batch),
        )

    for name in ("fd central", "dbp forward_over_reverse", "flooding"):
        make = REGULARIZERS.get(name, functools.partial(flooding, level=1e3))
        expected, *found = map(flat, updates(make, params_of(), batch_of()))
        for update in found:
            np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_a_narrow_weight_does_not_narrow_the_total():
    value_and_grad = fd_value_and_grad(
        lambda p: Weighted(p * 2e5, jnp.float16(2)), gamma=0.1, epsilon=0.1
    )
    assert float(value_and_grad(jnp.float32(1.0))[0]) == 1e5


def test_a_narrow_total_is_divided_without_a_promotion():
    loss = regularized_loss(
        lambda p: Weighted(jnp.sum(p), jnp.float32(2)), fd_gradreg(gamma=0.1, epsilon=0.1)
    )
    with jax.numpy_dtype_promotion("strict"):
        value = loss(jnp.ones(3, jnp.float16))
    assert (value, value.dtype) == (1.5, jnp.float16)


@pytest.mark.parametrize("name", ["value", "grad", "state", "params"])
def test_the_loss_of_a_regularizer_gets_an_argument_of_any_name_that_the_call_binds(name):
    loss = eval(f"lambda p, batch, {name}=1.0: {name} * loss_fn(p, batch)", {"loss_fn": loss_fn})
    tx, arguments = fd_gradreg(loss, gamma=0.3, epsilon=0.2), (params_of(), batch_of(), 2.0)
    init, step = make_train_step(loss, optax.sgd(1.0), tx, donate=False)
    after = step(init(arguments[0]), arguments[1], **{name: 2.0})[0].params
    expected = flat(jax.jit(fd_value_and_grad(loss, gamma=0.3, epsilon=0.2))(*arguments)[1])
    found = flat(jax.jit(jax.grad(regularized_loss(loss, tx)))(*arguments))
    for gradient in (found, flat(arguments[0]) - flat(after)):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_regularizer_gets_no_other_arguments():
    def own(params, **kwargs):
        assert set(kwargs) == {"batch"}
        return closed(params)

    closed, epsilon = functools.partial(loss_fn, batch=batch_of()), {"gamma": 0.3, "epsilon": 0.2}
    jax.grad(regularized_loss(loss_fn, fd_gradreg(own, **epsilon)))(params_of(), batch_of())
    regularized = regularized_loss(lambda *args: closed(*args), fd_gradreg(closed, **epsilon))
    jax.grad(regularized)(params_of())


def test_a_loss_may_look_at_values_where_nothing_is_compiled():
    def loss(params):
        return jnp.sum(params**2) if params[0] > 0 else 1 / 0

    jax.grad(regularized_loss(loss, sam(rho=0.1)))(jnp.ones(2))


def test_a_loss_of_a_class_is_a_method():
    class Task:
        @functools.partial(regularized_loss, regularizer=sam(rho=0.1), argnums=1)
        def loss(self, params, batch):
            return loss_fn(params, batch)

    given, expected = (params_of(), batch_of()), regularized_loss(loss_fn, sam(rho=0.1))
    np.testing.assert_array_equal(*(flat(jax.grad(f)(*given)) for f in (Task().loss, expected)))
    with pytest.raises(ValueError, match="penalise twice"):
        regularized_loss(Task().loss, sam(rho=0.1))(*given)
