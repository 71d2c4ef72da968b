"""The gradient functions replace ``jax.value_and_grad``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import dbp_value_and_grad, fd_value_and_grad, normalized
from problems import batch_of, flat, loss_fn, params_of


def arguments():
    return params_of(), batch_of()


FAMILIES = {
    "forward": functools.partial(fd_value_and_grad, gamma=0.3, epsilon=0.2),
    "backward": functools.partial(fd_value_and_grad, gamma=0.3, epsilon=0.2, scheme="backward"),
    "central": functools.partial(fd_value_and_grad, gamma=0.3, epsilon=0.2, scheme="central"),
    "product": functools.partial(dbp_value_and_grad, gamma=0.3),
    "product, reverse": functools.partial(
        dbp_value_and_grad, gamma=0.3, mode="reverse_over_reverse"
    ),
    "sam": functools.partial(fd_value_and_grad, gamma=0.3, epsilon=0.3, ascent=normalized),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_value_and_aux_are_those_of_the_clean_pass(x64, name):
    params, batch = arguments()

    def with_aux(params, *args, **kwargs):
        value = loss_fn(params, *args, **kwargs)
        return value, {"loss": value, "label": "text", "none": None}

    plain, _ = jax.value_and_grad(loss_fn)(params, batch, 0.5, scale=2.0)
    value, grad = FAMILIES[name](loss_fn)(params, batch, 0.5, scale=2.0)
    (again, aux), same = FAMILIES[name](with_aux, has_aux=True)(params, batch, shift=0.5, scale=2.0)
    np.testing.assert_allclose([value, again, aux["loss"]], float(plain), rtol=1e-14)
    assert (aux["label"], aux["none"]) == ("text", None)
    np.testing.assert_allclose(flat(grad), flat(same), rtol=1e-12)
    closed, closed_grad = FAMILIES[name](lambda p: loss_fn(p, batch, 0.5, scale=2.0))(params)
    np.testing.assert_allclose(closed, plain, rtol=1e-14)
    np.testing.assert_allclose(flat(closed_grad), flat(grad), rtol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluations_are_those_of_the_table(counter, name):
    params, batch = arguments()
    jax.jit(FAMILIES[name](counter.wrap(loss_fn)))(params, batch)
    # the product differentiates its one gradient
    gradients = {"product": 1, "product, reverse": 1, "central": 3}.get(name, 2)
    assert counter.read() == (gradients, gradients)


@pytest.mark.parametrize("gamma", [0.0, 0, np.float64(0)])
def test_without_a_penalty_the_gradient_is_the_plain_one(gamma):
    params, batch = arguments()
    plain = jax.grad(loss_fn)(params, batch)
    for grad in (
        fd_value_and_grad(loss_fn, gamma=gamma, epsilon=0.1)(params, batch)[1],
        dbp_value_and_grad(loss_fn, gamma=gamma)(params, batch)[1],
    ):
        np.testing.assert_array_equal(flat(grad), flat(plain))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_have_the_dtypes_of_the_parameters(name, dtype):
    params, batch = jax.tree.map(lambda a: a.astype(dtype), arguments())
    with jax.enable_x64(True):  # where a strong float64 scalar would widen everything
        make = functools.partial(
            FAMILIES[name],
            **{k: np.float64(0.3) for k in ("gamma", "epsilon") if k in FAMILIES[name].keywords},
        )
        value, grad = make(loss_fn)(params, batch)
    assert {g.dtype for g in jax.tree.leaves(grad)} == {jnp.dtype(dtype)}
    assert value.dtype == dtype


def test_gamma_and_epsilon_are_traced_vmapped_and_differentiated(x64):
    params, batch = arguments()

    def correction(gamma, epsilon):
        return fd_value_and_grad(loss_fn, gamma=gamma, epsilon=epsilon)(params, batch)[1]

    row = jax.jit(jax.vmap(correction, in_axes=(0, None)))(jnp.asarray([0.0, 1.0]), 0.1)
    unit = jax.tree.map(lambda g: g[1] - g[0], row)
    # rounding over epsilon
    np.testing.assert_allclose(
        flat(jax.jacobian(correction)(0.7, 0.1)), flat(unit), rtol=1e-10, atol=1e-12
    )
    exact = jax.jacobian(lambda g: dbp_value_and_grad(loss_fn, gamma=g)(params, batch)[1])(0.7)
    product = dbp_value_and_grad(loss_fn, gamma=1.0)(params, batch)[1]
    np.testing.assert_allclose(
        flat(exact), flat(product) - flat(jax.grad(loss_fn)(params, batch)), rtol=1e-12, atol=1e-14
    )


def test_both_passes_see_the_same_key_and_the_aux_of_the_second_is_thrown_away(x64):
    params, batch = arguments()

    def masked(batch, key):
        return batch | {"x": batch["x"] * jax.random.bernoulli(key, 0.5, batch["x"].shape)}

    def dropout(params, batch, key, statistics):
        return loss_fn(params, masked(batch, key)), 0.9 * statistics + 0.1 * params["out"].sum()

    key = jax.random.key(3)
    (value, statistics), grad = fd_value_and_grad(dropout, gamma=0.3, epsilon=1e-4, has_aux=True)(
        params, batch, key, 1.0
    )
    exact = dbp_value_and_grad(loss_fn, gamma=0.3)(params, masked(batch, key))
    # O(epsilon); another mask would differ by 1 / epsilon
    np.testing.assert_allclose(flat(grad), flat(exact[1]), atol=1e-3)
    np.testing.assert_allclose(statistics, 0.9 + 0.1 * params["out"].sum(), rtol=1e-15)
    np.testing.assert_allclose(value, exact[0], rtol=1e-14)


@pytest.mark.parametrize("name", FAMILIES)
def test_integers_have_no_gradient_and_are_named(name):
    with pytest.raises(TypeError, match=r"_value_and_grad: the parameters\['n'\] has dtype int32"):
        FAMILIES[name](lambda p: p["x"] * p["n"])({"x": jnp.ones([]), "n": jnp.asarray(2)})


@pytest.mark.parametrize("family", [fd_value_and_grad, dbp_value_and_grad])
def test_an_ascent_in_several_stages_is_the_direction_that_they_make(family):
    options = {"gamma": 0.3} | ({"epsilon": 0.2} if family is fd_value_and_grad else {})
    ascents = (
        optax.chain(optax.scale(2.0), optax.clip(0.3)),
        lambda g, p: optax.tree.clip(optax.tree.scale(2.0, g), -0.3, 0.3),
    )
    grads = [family(loss_fn, **options, ascent=ascent)(*arguments())[1] for ascent in ascents]
    np.testing.assert_allclose(*map(flat, grads), rtol=1e-6)
