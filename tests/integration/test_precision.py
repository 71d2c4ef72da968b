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
from problems import relative_error

GAMMA = 0.1


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((64, 16), (64, 4), (16, 64), (64, 64), (64, 4))]
    x, y, *params = (array.astype(np.float32) for array in arrays)
    return [w / np.float32(w.shape[0] ** 0.5) for w in params], x, y


def loss_in(dtype, factor=1.0):
    """The usual mixed precision: float32 parameters are cast, the network runs in ``dtype``, the
    loss is taken in float32."""

    def loss_fn(params, x, y):
        h = x.astype(dtype)
        for w in params[:-1]:
            h = jnp.tanh(h @ w.astype(dtype))
        # The last cast hands a cotangent in dtype to the network: here a tiny one underflows.
        return factor * jnp.mean(((h @ params[-1].astype(dtype)).astype(jnp.float32) - y) ** 2)

    return loss_fn


@functools.partial(jax.jit, static_argnames=("dtype", "method"))
def regularized(dtype, factor=1.0, method=gr.fd_value_and_grad, **options):
    """(gradient, regularized gradient)."""
    loss_fn = loss_in(dtype, factor)
    return jax.grad(loss_fn)(*problem()), method(loss_fn, **options)(*problem())[1]


def exact(dtype):
    return regularized(dtype, method=gr.dbp_value_and_grad, gamma=GAMMA)


def penalty_error(pair):
    """The error of gamma H g; in float32 the exact product has one of about 1e-6."""
    plain, whole = exact(jnp.float32)
    return relative_error(optax.tree.sub(pair[1], pair[0]), optax.tree.sub(whole, plain))


def test_bfloat16_compute_drowns_a_small_ascent_step_in_rounding_and_two_recipes_help():
    """Float32 parameters do not help: the noise is that of the bfloat16 passes, divided by
    epsilon."""
    assert penalty_error(regularized(jnp.bfloat16, gamma=GAMMA, epsilon=1e-3)) > 1.0
    assert penalty_error(regularized(jnp.float32, gamma=GAMMA, epsilon=1e-3)) < 0.05
    # The exact product has bfloat16's rounding, 2**-8, through a few layers, and no 1 / epsilon.
    assert penalty_error(exact(jnp.bfloat16)) < 0.1
    # A long step: its rounding is below its truncation, which F-GR needs in any case.
    assert penalty_error(regularized(jnp.bfloat16, gamma=GAMMA, epsilon=0.3)) < 0.4


def test_difference_error_tells_in_one_call_whether_epsilon_is_lost_in_rounding():
    params, x, y = problem()

    @functools.partial(jax.jit, static_argnames="dtype")
    def error(dtype, params, epsilon):
        return curvature.difference_error(lambda p: loss_in(dtype)(p, x, y), params, epsilon)

    for dtype, epsilon, lost in (
        (jnp.float32, 1e-2, False),
        (jnp.float32, 1e-7, True),
        (jnp.bfloat16, 0.3, False),
        (jnp.bfloat16, 1e-3, True),
    ):
        assert (error(dtype, params, epsilon).relative_error > 0.5) == lost


TINY = 1e-7  # the cotangents of such a loss are lost in float16, whose smallest number is 6e-8


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_scale_divides_gamma_and_epsilon(scale):
    """With S L in place of L, gamma / S and epsilon / S, what comes out is S (g + gamma H g):
    unscale it as usual.

    theta + (epsilon / S) S g is the same point, and (gamma / S) H(S L) (S g) = S gamma H g. A power
    of two rounds nothing.
    """
    # Of a loss that is 1e-7 times as large, the same relative penalty has a gamma and an epsilon
    # that are 1e7 times as large.
    whole = {"gamma": GAMMA / TINY, "epsilon": 0.1 / TINY}
    divided = {name: value / scale for name, value in whole.items()}
    _, grads = regularized(jnp.float16, TINY * scale, **divided)
    _, expected = regularized(jnp.float32, TINY, **whole)
    found = jax.tree.map(lambda g: g / scale, grads)
    # float16 rounds to 2**-11, the difference multiplies that by gamma / epsilon = 1.
    assert (relative_error(found, expected) < 0.02) == (scale > 1)


def test_a_count_in_float16_does_not_end_at_65504():
    def loss(params):
        return gr.Weighted(params * jnp.asarray(60000.0, jnp.float16), 120000)

    value, _ = gr.fd_value_and_grad(loss, **two.PENALTY)(jnp.asarray(1.0, jnp.float16))
    np.testing.assert_allclose(value, 0.5, rtol=2e-3)


def test_narrow_gradients_of_groups_are_averaged_in_float32():
    x = jax.random.normal(jax.random.key(0), (8, 50)).astype(jnp.bfloat16)
    weight = jnp.asarray([1.0, 2, 4, 1, 2, 1, 1, 1])  # powers of two: the gradients are exact

    def loss(params, batch):
        x, weight = batch
        total = jnp.sum(weight.astype(x.dtype)[:, None] * x * params)
        return gr.Weighted(total, jnp.sum(weight))

    regularizer = gr.fd_gradreg(gamma=0.0, epsilon=0.1)
    init, step = gr.make_train_step(loss, optax.sgd(1.0), regularizer, ascent_groups=8)
    state, _ = step(init(jnp.zeros(50, jnp.bfloat16)), (x, weight))
    expected = -np.average(np.asarray(x, np.float32), axis=0, weights=weight)
    np.testing.assert_array_equal(state.params, expected.astype(jnp.bfloat16))


def test_a_derivative_along_narrow_tangents_is_summed_in_float32():
    x = jnp.full(50, 1 + 2**-7, jnp.bfloat16)  # its square is not a bfloat16

    def loss(params):
        return jnp.sum(params.astype(jnp.float32) * x.astype(jnp.float32))

    regularized = gr.regularized_loss(loss, gr.fd_gradreg(gamma=0.0, epsilon=0.1))
    with jax.numpy_dtype_promotion("strict"):
        _, along = jax.jvp(regularized, (jnp.zeros_like(x),), (x,))
    assert along == 50 * (1 + 2**-7) ** 2
