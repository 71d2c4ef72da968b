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
    @jax.jit
    def both(params, batch):
        tx = REGULARIZERS[name](loss_fn)
        plain = jax.value_and_grad(loss_fn)(params, batch)
        updates = update_of(tx, plain[1], params, batch=batch)
        return (plain[0], updates), GRADIENT_FUNCTIONS[name](loss_fn)(params, batch)

    (plain, updates), (value, expected) = both(params_of(), batch_of())
    # rounding of the difference
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(value, plain, rtol=1e-14)
    assert jax.tree.structure(updates) == jax.tree.structure(params_of())


def test_sam_is_optax_sam_over_fifty_steps_with_momentum(x64):
    batch, lr, rho = batch_of(), 0.05, 0.1
    ours = optax.chain(sam(rho=rho), optax.sgd(lr, momentum=0.9))
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    theirs = optax.contrib.sam(optax.sgd(lr, momentum=0.9), adversary, opaque_mode=True)

    def loss(params):
        return loss_fn(params, batch)

    def fifty_steps(tx, **extra):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradient, state, params, **extra)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params_of(), tx.init(params_of())), length=50)

    @jax.jit
    def both():
        their_gradient = {"grad_fn": lambda params, _: jax.grad(loss)(params)}
        return fifty_steps(ours, value_fn=loss), fifty_steps(theirs, **their_gradient)

    ((params, _), losses), ((expected, _), their_losses) = both()
    # 50 roundings of 1e-16, amplified by the dynamics
    np.testing.assert_allclose(flat(params), flat(expected), rtol=1e-11)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-11)
    assert losses[-1] < losses[0] / 2


def test_where_gamma_is_epsilon_the_result_is_the_gradient_at_the_perturbed_parameters(x64):
    """SAM, its penalty of the norm, unnormalised SAM and ASAM, each by its formula."""

    @jax.jit
    def updates_and_gradients(params, batch):
        grad = jax.grad(functools.partial(loss_fn, batch=batch))
        gradient = grad(params)
        norm = optax.tree.norm(gradient)
        size = optax.tree.norm(jax.tree.map(jnp.multiply, params, gradient))
        adapted = jax.tree.map(lambda p, g: p**2 * g / size, params, gradient)
        cases = [
            (sam(loss_fn, rho=0.2), 0.2 / norm, gradient),
            (gradient_norm_penalty(loss_fn, gamma=0.2, epsilon=0.2), 0.2 / norm, gradient),
            (fd_gradreg(loss_fn, gamma=0.3, epsilon=0.3), 0.3, gradient),
            (asam(loss_fn, rho=0.2), 0.2, adapted),
        ]
        found = [update_of(tx, gradient, params, batch=batch) for tx, _, _ in cases]
        ahead = [optax.tree.add_scale(params, radius, way) for _, radius, way in cases]
        return list(zip(found, map(grad, ahead), strict=True))

    for updates, expected in updates_and_gradients(params_of(), batch_of()):
        # g cancels up to a rounding
        np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-13, atol=1e-14)


def test_gradient_norm_penalty_tends_to_the_gradient_of_the_norm(x64):
    tx = gradient_norm_penalty(loss_fn, gamma=0.3, epsilon=1e-5, scheme="central")

    @jax.jit
    def both(params, batch):
        def penalized(params):
            return loss_fn(params, batch) + 0.3 * optax.tree.norm(jax.grad(loss_fn)(params, batch))

        gradient = jax.grad(loss_fn)(params, batch)
        return update_of(tx, gradient, params, batch=batch), jax.grad(penalized)(params)

    updates, expected = both(params_of(), batch_of())
    np.testing.assert_allclose(flat(updates), flat(expected), atol=1e-8)  # epsilon^2, eps / epsilon


@pytest.mark.parametrize("tx", [sam(rho=0.3), asam(rho=0.3)], ids=["sam", "asam"])
def test_what_comes_in_drops_out_of_sam_but_for_its_direction(tx):
    params, value_fn = params_of(), functools.partial(loss_fn, batch=batch_of())
    gradient = jax.jit(jax.grad(value_fn))(params)
    update = jax.jit(lambda gradient: update_of(tx, gradient, params, value_fn=value_fn))
    doubled = update(jax.tree.map(lambda g: 2 * g, gradient))
    np.testing.assert_array_equal(flat(doubled), flat(update(gradient)))
    narrow = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient)
    found = jax.tree.leaves(jax.eval_shape(update, narrow))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
