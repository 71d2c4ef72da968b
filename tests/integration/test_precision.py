"""Low precision: which ascent step survives rounding, what to do where none does, and how a loss
scale goes with a penalty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import curvature
from gradreg_optax._estimators import difference

GAMMA = 0.1


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    sizes = ((16, 64), (64, 64), (64, 4))
    params = [jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32) for shape in sizes]
    return (
        params,
        jnp.asarray(rng.normal(size=(64, 16)), jnp.float32),
        jnp.asarray(rng.normal(size=(64, 4)), jnp.float32),
    )


def loss_in(dtype):
    """The usual mixed precision: float32 parameters are cast, the network runs in ``dtype``, the
    loss is taken in float32."""

    def loss_fn(params, x, y):
        h = x.astype(dtype)
        for w in params[:-1]:
            h = jnp.tanh(h @ w.astype(dtype))
        return jnp.mean(((h @ params[-1].astype(dtype)).astype(jnp.float32) - y) ** 2)

    return loss_fn


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


@functools.cache
def exact_penalty():
    """gamma H g in float32, whose own error of about 1e-6 does not count here."""
    params, x, y = problem()
    loss_fn = loss_in(jnp.float32)
    _, regularized = jax.jit(gr.dbp_value_and_grad(loss_fn, gamma=GAMMA))(params, x, y)
    return optax.tree.sub(regularized, jax.grad(loss_fn)(params, x, y))


def penalty_error(value_and_grad, dtype):
    params, x, y = problem()
    found = jax.jit(
        lambda p: optax.tree.sub(value_and_grad(p, x, y)[1], jax.grad(loss_in(dtype))(p, x, y))
    )(params)
    return relative(found, exact_penalty())


def test_bfloat16_compute_drowns_a_small_ascent_step_in_rounding():
    """Float32 parameters do not help: the noise is that of the bfloat16 passes, divided by
    epsilon."""
    small = gr.fd_value_and_grad(loss_in(jnp.bfloat16), gamma=GAMMA, epsilon=1e-3)
    assert penalty_error(small, jnp.bfloat16) > 1.0
    assert (
        penalty_error(
            gr.fd_value_and_grad(loss_in(jnp.float32), gamma=GAMMA, epsilon=1e-3), jnp.float32
        )
        < 0.05
    )


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        # The exact product has bfloat16's rounding, 2**-8, through a few layers, and no 1 /
        # epsilon.
        (gr.dbp_value_and_grad(loss_in(jnp.bfloat16), gamma=GAMMA), 0.1),
        # A long step: its rounding is below its truncation, which F-GR needs in any case.
        (gr.fd_value_and_grad(loss_in(jnp.bfloat16), gamma=GAMMA, epsilon=0.3), 0.4),
    ],
    ids=["exact product", "long step"],
)
def test_recipes_for_bfloat16_compute(recipe, bound):
    assert penalty_error(recipe, jnp.bfloat16) < bound


@pytest.mark.parametrize(
    ("dtype", "epsilon", "lost"),
    [
        (jnp.float32, 1e-2, False),
        (jnp.float32, 1e-7, True),
        (jnp.bfloat16, 0.3, False),
        (jnp.bfloat16, 1e-3, True),
    ],
)
def test_difference_error_tells_in_one_call_whether_epsilon_is_lost_in_rounding(
    dtype, epsilon, lost
):
    params, x, y = problem()
    error = jax.jit(
        lambda p: curvature.difference_error(lambda p: loss_in(dtype)(p, x, y), p, epsilon)
    )(params)
    assert (error.relative_error > 0.5) == lost


def test_difference_error_counts_bfloat16_parameters_that_do_not_move():
    params, x, y = problem()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def unmoved(epsilon):
        return jax.jit(
            lambda p: curvature.difference_error(
                lambda p: loss_in(jnp.bfloat16)(p, x, y), p, epsilon
            )
        )(params).unmoved

    assert unmoved(1e-3) > 0.9
    assert unmoved(3.0) < 0.5


TINY = 1e-7  # the cotangents of such a loss are lost in float16, whose smallest number is 6e-8


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_scale_divides_gamma_and_epsilon(scale):
    """With S L in place of L, gamma / S and epsilon / S, what comes out is S (g + gamma H g):
    unscale it as usual.

    theta + (epsilon / S) S g is the same point, and (gamma / S) H(S L) (S g) = S gamma H g. A power
    of two rounds nothing.
    """
    params, x, y = problem()
    # Of a loss that is 1e-7 times as large, the same relative penalty has a gamma and an epsilon
    # that are 1e7 times as large.
    gamma, epsilon = GAMMA / TINY, 0.1 / TINY

    def tiny(dtype, factor):
        def loss_fn(params, x, y):
            h = x.astype(dtype)
            for w in params[:-1]:
                h = jnp.tanh(h @ w.astype(dtype))
            # The last cast hands a cotangent in dtype to the network: here it is that underflow
            # happens.
            return factor * jnp.mean(((h @ params[-1].astype(dtype)).astype(jnp.float32) - y) ** 2)

        return loss_fn

    scaled = gr.fd_value_and_grad(
        tiny(jnp.float16, TINY * scale), gamma=gamma / scale, epsilon=epsilon / scale
    )
    _, grads = jax.jit(scaled)(params, x, y)
    found = jax.tree.map(lambda g: g / scale, grads)
    _, expected = jax.jit(
        gr.fd_value_and_grad(tiny(jnp.float32, TINY), gamma=gamma, epsilon=epsilon)
    )(params, x, y)
    # float16 rounds to 2**-11, the difference multiplies that by gamma / epsilon = 1.
    assert (relative(found, expected) < 0.02) == (scale > 1)


def test_a_count_in_float16_does_not_end_at_65504():
    def loss(params):
        return gr.Weighted(params * jnp.asarray(60000.0, jnp.float16), 120000)

    value, _ = gr.fd_value_and_grad(loss, **two.PENALTY)(jnp.asarray(1.0, jnp.float16))
    np.testing.assert_allclose(value, 0.5, rtol=2e-3)


def test_a_difference_of_narrow_gradients_is_not_rounded_before_it_is_divided():
    """Gradients 258 and 0.25 differ by 257.75, which in bfloat16 is 258."""
    ahead, here = jnp.asarray(258.0, jnp.bfloat16), jnp.asarray(0.25, jnp.bfloat16)
    loss = jax.custom_vjp(lambda p: p)
    loss.defvjp(lambda p: (p, p), lambda p, c: (jnp.where(p > 1, ahead, here) * c,))
    params = jnp.asarray(1.0, jnp.bfloat16)
    estimate = difference(
        lambda p: (jax.grad(loss)(p), None),
        params,
        lambda gradient: (gradient, ()),
        epsilon=jnp.float32(0.3),
        scheme="forward",
    )
    product = estimate.product
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, 257.75 / 0.3, rtol=1e-6)
