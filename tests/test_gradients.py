"""The gradient functions replace ``jax.value_and_grad``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import dbp_value_and_grad, fd_value_and_grad
from problems import EXTRA_GRADIENTS, GRADIENT_FUNCTIONS, batch_of, flat, loss_fn, params_of


@pytest.mark.parametrize("name", ["fd central", "dbp forward_over_reverse"])
def test_arguments_value_and_aux_are_those_of_the_clean_pass(x64, name):
    make = GRADIENT_FUNCTIONS[name]

    def with_aux(params, *args, **kwargs):
        value = loss_fn(params, *args, **kwargs)
        return value, {"loss": value, "label": "text", "none": None}

    @jax.jit
    def ways(params, batch):
        plain = jax.value_and_grad(loss_fn)(params, batch, 0.5, scale=2.0)[0]
        positional = make(loss_fn)(params, batch, 0.5, scale=2.0)
        (value, aux), gradient = make(with_aux, has_aux=True)(params, batch, shift=0.5, scale=2.0)
        assert (aux["label"], aux["none"]) == ("text", None)
        closed = make(lambda p: loss_fn(p, batch, 0.5, scale=2.0))(params)
        return plain, aux["loss"], [positional, (value, gradient), closed]

    plain, logged, found = ways(params_of(), batch_of())
    np.testing.assert_allclose(logged, plain, rtol=1e-14)
    for value, gradient in found:
        np.testing.assert_allclose(value, plain, rtol=1e-14)
        np.testing.assert_allclose(flat(gradient), flat(found[0][1]), rtol=1e-12)


@pytest.mark.parametrize("name", GRADIENT_FUNCTIONS)
def test_evaluations_are_those_of_the_table(counter, name):
    jax.jit(GRADIENT_FUNCTIONS[name](counter.wrap(loss_fn)))(params_of(), batch_of())
    # the product differentiates its one gradient
    gradients = EXTRA_GRADIENTS[name] + (not name.startswith("dbp"))
    assert counter.read() == (gradients, gradients)


@pytest.mark.parametrize("name", GRADIENT_FUNCTIONS)
def test_gradients_have_the_dtypes_of_the_parameters(name):
    make = GRADIENT_FUNCTIONS[name]
    wide = {key: np.float64(0.3) for key in ("gamma", "epsilon") if key in make.keywords}
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        args = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), (params_of(), batch_of()))
        with jax.enable_x64(True):  # where a strong float64 scalar would widen everything
            found = jax.eval_shape(functools.partial(make, **wide)(loss_fn), *args)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


def test_both_passes_see_the_same_key_and_the_aux_of_the_second_is_thrown_away(x64):
    params, batch, key = params_of(), batch_of(), jax.random.key(3)

    def masked(batch, key):
        return batch | {"x": batch["x"] * jax.random.bernoulli(key, 0.5, batch["x"].shape)}

    def dropout(params, batch, key, statistics):
        return loss_fn(params, masked(batch, key)), 0.9 * statistics + 0.1 * params["out"].sum()

    by_difference = fd_value_and_grad(dropout, gamma=0.3, epsilon=1e-4, has_aux=True)
    (value, statistics), grad = jax.jit(by_difference)(params, batch, key, 1.0)
    exact = jax.jit(dbp_value_and_grad(loss_fn, gamma=0.3))(params, masked(batch, key))
    # O(epsilon); another mask would differ by 1 / epsilon
    np.testing.assert_allclose(flat(grad), flat(exact[1]), atol=1e-3)
    np.testing.assert_allclose(statistics, 0.9 + 0.1 * params["out"].sum(), rtol=1e-15)
    np.testing.assert_allclose(value, exact[0], rtol=1e-14)


@pytest.mark.parametrize("name", ["fd forward", "dbp forward_over_reverse"])
def test_an_ascent_in_several_stages_is_the_direction_that_they_make(name):
    ascents = (
        optax.chain(optax.scale(2.0), optax.clip(0.3)),
        lambda g, p: optax.tree.clip(optax.tree.scale(2.0, g), -0.3, 0.3),
    )

    @jax.jit
    def gradients(*args):
        return [GRADIENT_FUNCTIONS[name](loss_fn, ascent=ascent)(*args)[1] for ascent in ascents]

    np.testing.assert_allclose(*map(flat, gradients(params_of(), batch_of())), rtol=1e-6)
