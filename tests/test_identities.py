"""Identities between transformations, gradient functions, formulas and Optax's own SAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import asam, fd_gradreg, gradient_norm_penalty, sam
from problems import GRADIENT_FUNCTIONS, REGULARIZERS, batch_of, flat, loss_fn, params_of, update_of


@pytest.mark.parametrize("name", REGULARIZERS)
def test_transformation_and_gradient_function_agree(x64, name):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    value, expected = jax.jit(GRADIENT_FUNCTIONS[name](loss_fn))(params, batch)
    tx = REGULARIZERS[name](loss_fn)
    updates = jax.jit(lambda: update_of(tx, gradient, params, batch=batch))()
    # rounding of the difference
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(value, loss_fn(params, batch), rtol=1e-14)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_sam_is_optax_sam_over_fifty_steps_with_momentum(x64):
    batch, lr, rho = batch_of(), 0.05, 0.1
    ours = optax.chain(sam(rho=rho), optax.sgd(lr, momentum=0.9))
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    theirs = optax.contrib.sam(optax.sgd(lr, momentum=0.9), adversary, opaque_mode=True)

    def loss(params):
        return loss_fn(params, batch)

    def our_step(carry, _):
        params, state = carry
        updates, state = ours.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), loss(params)

    def their_step(carry, _):
        params, state = carry
        updates, state = theirs.update(
            jax.grad(loss)(params), state, params, grad_fn=lambda p, _: jax.grad(loss)(p)
        )
        return (optax.apply_updates(params, updates), state), loss(params)

    params = params_of()
    (a, _), losses = jax.jit(lambda c: jax.lax.scan(our_step, c, length=50))(
        (params, ours.init(params))
    )
    (b, _), expected = jax.jit(lambda c: jax.lax.scan(their_step, c, length=50))(
        (params, theirs.init(params))
    )
    # 50 roundings of 1e-16, amplified by the dynamics
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-11)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    assert losses[-1] < losses[0] / 2


def test_sam_is_the_gradient_at_the_worst_point_nearby(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    norm = optax.tree.norm(gradient)
    shifted = jax.tree.map(lambda p, g: p + 0.2 * g / norm, params, gradient)
    expected = flat(jax.grad(loss_fn)(shifted, batch))
    tolerance = {"rtol": 1e-13, "atol": 1e-14}  # g cancels up to a rounding
    np.testing.assert_allclose(
        flat(update_of(sam(loss_fn, rho=0.2), gradient, params, batch=batch)), expected, **tolerance
    )
    penalty = gradient_norm_penalty(loss_fn, gamma=0.2, epsilon=0.2)
    np.testing.assert_allclose(
        flat(update_of(penalty, gradient, params, batch=batch)), expected, **tolerance
    )


def test_gradient_norm_penalty_tends_to_the_gradient_of_the_norm(x64):
    params, batch = params_of(), batch_of()

    def penalized(params):
        return loss_fn(params, batch) + 0.3 * optax.tree.norm(jax.grad(loss_fn)(params, batch))

    gradient, expected = jax.grad(loss_fn)(params, batch), jax.grad(penalized)(params)
    tx = gradient_norm_penalty(loss_fn, gamma=0.3, epsilon=1e-5, scheme="central")
    # epsilon^2, and eps / epsilon
    np.testing.assert_allclose(
        flat(update_of(tx, gradient, params, batch=batch)), flat(expected), atol=1e-8
    )


@pytest.mark.parametrize("tx", [sam(rho=0.3), asam(rho=0.3)], ids=["sam", "asam"])
def test_what_comes_in_drops_out_of_sam_but_for_its_direction(tx):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    doubled = jax.tree.map(lambda g: 2 * g, gradient)
    value_fn = functools.partial(loss_fn, batch=batch)
    np.testing.assert_array_equal(
        flat(update_of(tx, doubled, params, value_fn=value_fn)),
        flat(update_of(tx, gradient, params, value_fn=value_fn)),
    )
    narrow = update_of(
        tx, jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient), params, value_fn=value_fn
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_unnormalised_sam_is_the_forward_difference_with_gamma_equal_epsilon(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    shifted = jax.tree.map(lambda p, g: p + 0.3 * g, params, gradient)
    updates = update_of(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.3), gradient, params, batch=batch)
    # g cancels
    np.testing.assert_allclose(
        flat(updates), flat(jax.grad(loss_fn)(shifted, batch)), rtol=1e-13, atol=1e-14
    )


def test_asam_is_its_formula(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    norm = np.sqrt(np.sum((flat(params) * flat(gradient)) ** 2))
    shifted = jax.tree.map(lambda p, g: p + 0.2 * p**2 * g / norm, params, gradient)
    updates = update_of(asam(loss_fn, rho=0.2), gradient, params, batch=batch)
    # g cancels
    np.testing.assert_allclose(
        flat(updates), flat(jax.grad(loss_fn)(shifted, batch)), rtol=1e-13, atol=1e-14
    )
