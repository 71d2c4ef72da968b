"""One may differentiate through every family: meta-learning, learnt strengths, whole trainings.

Against central differences of the same function in float64, whose error is of the order of
h² = 1e-10 for a step h of 1e-5, plus rounding / h = 1e-11.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from problems import REGULARIZERS, batch_of, loss_fn, params_of

RATE, STEPS, STEP = 0.1, 2, 1e-5
OTHERS = {
    "momentum": lambda gamma: gr.fd_gradreg(gamma=gamma, epsilon=0.1, ascent=optax.trace(0.9)),
    "lazy": lambda gamma: gr.fd_gradreg(gamma=gamma, epsilon=0.1, interval=2),
    "relative": lambda gamma: gr.relative_gradreg(strength=gamma),
    "flooding": lambda gamma: gr.flooding(level=0.01),
}


@pytest.fixture(autouse=True)
def _in_float64(x64):
    """The mathematics, not the rounding."""


def family(name, gamma):
    strength = "rho" if name in ("sam", "asam") else "gamma"
    return OTHERS[name](gamma) if name in OTHERS else REGULARIZERS[name](**{strength: gamma})


def adapted(tx, params):
    """The parameters after an inner training of a few steps, in ``scan``."""
    batch = batch_of()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        extra = {"value": value, "value_fn": lambda p: loss_fn(p, batch)}
        updates, state = tx.update(gradient, state, params, **extra)
        return (optax.tree.add_scale(params, -RATE, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0][0]


def adapted_loss(name, params, gamma):
    """What meta-learning descends: another loss of the adapted parameters."""
    return loss_fn(adapted(family(name, gamma), params), batch_of(7))


def along(function, point, direction):
    """The central difference of a function along a direction."""
    ahead, behind = (function(optax.tree.add_scale(point, s, direction)) for s in (STEP, -STEP))
    return (ahead - behind) / (2 * STEP)


def random_like(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=jnp.shape(x))), tree)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [*REGULARIZERS, *OTHERS])
@pytest.mark.slow
def test_the_derivative_through_a_training_in_the_initial_parameters_and_in_gamma(name):
    """MAML and learnt strengths: reverse mode and forward mode, against numbers."""
    params, gamma = params_of(), jnp.asarray(0.2)

    @jax.jit
    def outer(point):
        return adapted_loss(name, *point)

    direction = random_like((params, gamma))

    @jax.jit
    def both(point):
        _, forward = jax.jvp(outer, (point,), (direction,))
        return optax.tree.vdot(jax.grad(outer)(point), direction), forward

    numerical = along(outer, (params, gamma), direction)
    for found in both((params, gamma)):
        assert_close(found, numerical)


@pytest.mark.parametrize(
    "name", [pytest.param("fd forward", marks=pytest.mark.slow), "dbp forward_over_reverse"]
)
def test_it_may_be_done_twice(name):
    """The Hessian of the adapted loss times a vector, forward over reverse."""
    params, vector = params_of(), random_like(params_of(), seed=2)
    direction = random_like(params, seed=3)
    gradient = jax.grad(lambda p: adapted_loss(name, p, 0.2))

    @jax.jit
    def both(params, vector):
        product = jax.jvp(gradient, (params,), (vector,))[1]
        numerical = along(lambda p: optax.tree.vdot(gradient(p), direction), params, vector)
        return optax.tree.vdot(product, direction), numerical

    assert_close(*both(params, vector))


FUNCTIONS = {
    "central": functools.partial(gr.fd_value_and_grad, epsilon=0.1, scheme="central"),
    "adaptive": functools.partial(gr.fd_value_and_grad, epsilon=0.1, ascent=gr.adaptive),
    "product": gr.dbp_value_and_grad,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacfwd_and_jacrev_of_a_gradient_function_agree_with_numbers(name):
    def gradient(gamma):
        return FUNCTIONS[name](loss_fn, gamma=gamma)(params_of(), batch_of())[1]["kernel"]

    @jax.jit
    def derivatives(gamma):
        numerical = along(gradient, gamma, 1.0)
        return numerical, jax.jacfwd(gradient)(gamma), jax.jacrev(gradient)(gamma)

    numerical, *found = derivatives(0.2)
    for derivative in found:
        assert_close(derivative, numerical)


@pytest.mark.parametrize(
    "name", [pytest.param("fd central", marks=pytest.mark.slow), "dbp forward_over_reverse", "sam"]
)
def test_the_gradient_of_a_regularized_loss_may_be_differentiated_in_reverse(name):
    """Its own derivative, once more: of a training on it, in the initial parameters."""
    params, batch = params_of(), batch_of()
    loss = gr.regularized_loss(loss_fn, family(name, 0.2))

    def outer(params):
        def step(params, _):
            return optax.tree.add_scale(params, -RATE, jax.grad(loss)(params, batch)), None

        return loss_fn(jax.lax.scan(step, params, length=STEPS)[0], batch_of(7))

    direction = random_like(params)

    @jax.jit
    def both(params):
        found = optax.tree.vdot(jax.grad(outer)(params), direction)
        return found, along(outer, params, direction)

    assert_close(*both(params))
