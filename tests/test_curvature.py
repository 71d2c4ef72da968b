"""Curvature against dense Hessians; estimates against their own errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import curvature
from gradreg_optax.curvature import (
    difference_error,
    gradient_norm,
    hessian_trace,
    hessian_vector_product,
    perturbed_sharpness,
    top_hessian_eigenvalue,
)

KEY = jax.random.key(0)


def value_fn(params):
    inputs = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)))
    return jnp.mean((jnp.tanh(inputs @ params["kernel"]) @ params["out"] - 1) ** 2)


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=4))}


def dense_hessian(value_fn, params):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda x: value_fn(unravel(x))))(flat))


def quadratic(hessian):
    return lambda x: x @ jnp.asarray(hessian) @ x / 2


def test_product_and_norm_are_those_of_the_dense_derivatives(x64):
    params, vector = params_of(), params_of(1)
    product = hessian_vector_product(value_fn, params, vector)
    expected = dense_hessian(value_fn, params) @ ravel_pytree(vector)[0]
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, rtol=1e-12, atol=1e-14)
    gradient = ravel_pytree(jax.grad(value_fn)(params))[0]
    np.testing.assert_allclose(
        gradient_norm(value_fn, params), np.linalg.norm(gradient), rtol=1e-14
    )


def test_the_top_eigenvalue_is_that_of_the_dense_hessian(x64):
    top = jax.jit(lambda p: top_hessian_eigenvalue(value_fn, p, KEY))
    for seed in range(3):
        value, residual = top(params_of(seed))
        np.testing.assert_allclose(
            value, np.linalg.eigvalsh(dense_hessian(value_fn, params_of(seed)))[-1], rtol=1e-12
        )
        assert residual < 1e-11  # rounding of the iteration over the whole space


rng = np.random.default_rng(1)
ROTATION, _ = np.linalg.qr(rng.normal(size=(40, 40)))
SPECTRA = {
    "zero": np.zeros(5),
    "identity": np.ones(5),
    "negative multiple of the identity": -2 * np.ones(3),
    "one parameter": np.asarray([-3.0]),
    "negative definite": -1 - np.arange(6.0),
    "indefinite": np.asarray([-7.0, -1.0, 0.5, 3.0]),
    "repeated top": np.asarray([2.0, 2.0, 2.0, -5.0, 1.0]),
    "projection": np.asarray([100.0] * 15 + [0.0] * 15),
    "low rank": np.asarray([4.0, -9.0] + [0.0] * 38),
    "negative of low rank": np.asarray([-4.0] + [0.0] * 39),
    "tiny": 1e-12 * np.asarray([1.0, 1.0, -2.0]),
    "huge": 1e12 * np.asarray([1.0, 1.0, -2.0]),
    "few distinct, larger than the Krylov space": np.repeat([3.0, -2.0, 1.0, 0.0], 10),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("wide", "rotated"), [(True, False), (False, True)])
def test_the_iteration_survives_spectra_that_exhaust_the_krylov_space(name, wide, rotated):
    spectrum = SPECTRA[name]
    size = len(spectrum)
    basis = np.linalg.qr(ROTATION[:size, :size])[0] if rotated else np.eye(size)
    with jax.enable_x64(wide):
        hessian = jnp.asarray(basis * spectrum @ basis.T)
        value, residual = jax.jit(
            lambda h, k: top_hessian_eigenvalue(quadratic(h), jnp.ones(size), k)
        )(hessian, KEY)
        scale = np.abs(spectrum).max()
        rounding = (
            50 * float(jnp.finfo(value.dtype).eps) * scale
        )  # of a product of 40 terms, and of the rotation
        np.testing.assert_allclose(value, spectrum.max(), rtol=0, atol=rounding)
        assert residual <= rounding


@given(seed=st.integers(0, 2**32 - 1))
def test_an_eigenvalue_lies_within_the_residual_and_none_is_overestimated(seed):
    with jax.enable_x64(True):
        root = np.random.default_rng(seed).normal(size=(40, 40))
        spectrum = np.linalg.eigvalsh(root + root.T)
        value, residual = few_steps(jnp.asarray(root + root.T), jax.random.key(seed))
        assert np.abs(spectrum - float(value)).min() <= residual + 1e-12
        assert value <= spectrum[-1] + 1e-12
        assert (
            residual > 1e-6
        )  # six steps in forty dimensions cannot be exact, and the residual shows it


@jax.jit
def few_steps(hessian, key):
    return top_hessian_eigenvalue(quadratic(hessian), jnp.ones(40), key, num_matvecs=6)


def complex_loss(params):
    return jnp.sum(jnp.abs(params["z"] ** 2 + params["w"]) ** 2)


def test_complex_parameters_count_as_pairs_of_real_ones(x64):
    params = {"z": jnp.asarray([0.5 + 1j, -0.3 + 0.2j]), "w": jnp.asarray([0.7, -1.0])}
    parts = {"w": params["w"], "x": params["z"].real, "y": params["z"].imag}

    def real_loss(p):
        return complex_loss({"z": p["x"] + 1j * p["y"], "w": p["w"]})

    hessian = dense_hessian(real_loss, parts)
    value, residual = jax.jit(lambda p: top_hessian_eigenvalue(complex_loss, p, KEY))(params)
    np.testing.assert_allclose(value, np.linalg.eigvalsh(hessian)[-1], rtol=1e-12)
    assert residual < 1e-11
    mean, error = jax.jit(lambda p: hessian_trace(complex_loss, p, KEY, num_samples=400))(params)
    assert abs(mean - np.trace(hessian)) < 4 * error  # four standard errors
    vector = {"z": jnp.asarray([1.0 - 2j, 0.5j]), "w": jnp.asarray([0.3, 0.1])}
    product = hessian_vector_product(complex_loss, params, vector)
    expected = hessian @ np.concatenate([vector["w"], vector["z"].real, vector["z"].imag])
    np.testing.assert_allclose(product["w"], expected[:2], rtol=1e-12)
    np.testing.assert_allclose(
        product["z"], expected[2:4] - 1j * expected[4:], rtol=1e-12
    )  # JAX's convention for gradients
    np.testing.assert_allclose(
        gradient_norm(complex_loss, params),
        np.linalg.norm(ravel_pytree(jax.grad(real_loss)(parts))[0]),
        rtol=1e-13,
    )
    assert perturbed_sharpness(complex_loss, params, 1e-3) > 0


def test_the_trace_lies_within_its_standard_error(x64):
    params = params_of()
    exact = np.trace(dense_hessian(value_fn, params))
    estimate = jax.jit(lambda k: hessian_trace(value_fn, params, k, num_samples=100))
    scores = []
    for seed in range(10):
        mean, error = estimate(jax.random.key(seed))
        scores.append((mean - exact) / error)
    assert np.abs(scores).max() < 4  # ten draws of a standard normal
    assert (
        0.4 < np.sqrt(np.mean(np.square(scores))) < 1.8
    )  # chi-square with ten degrees of freedom, at 1e-3 on either side


def test_the_trace_of_a_diagonal_hessian_is_exact(x64):
    mean, error = hessian_trace(
        lambda p: jnp.sum(jnp.asarray([1.0, -2.0, 5.0]) * p**2), jnp.ones(3), KEY, num_samples=2
    )
    assert (mean, error) == (8, 0)


def test_the_standard_error_falls_with_the_root_of_the_samples(x64):
    errors = [hessian_trace(value_fn, params_of(), KEY, num_samples=n)[1] for n in (50, 800)]
    assert 2.8 < errors[0] / errors[1] < 5.7  # 4, with the error's own error of 1 / sqrt(2 * 50)


def test_narrow_parameters_get_estimates_in_float32():
    params = jnp.asarray([1.0, 2.0], jnp.bfloat16)
    loss = quadratic(np.diag([2.0, 4.0]).astype(np.float32))

    def value_fn(p):
        return loss(p.astype(jnp.float32))

    estimates = [
        top_hessian_eigenvalue(value_fn, params, KEY).value,
        hessian_trace(value_fn, params, KEY).mean,
    ]
    assert {e.dtype for e in estimates} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(estimates, [4.0, 6.0], rtol=2e-2)  # a few eps(bfloat16)
    assert gradient_norm(value_fn, params).dtype == jnp.float32
    assert hessian_vector_product(value_fn, params, jnp.ones(2)).dtype == jnp.bfloat16


def test_everything_can_be_jitted_and_vmapped(x64):
    members = jax.tree.map(lambda *x: jnp.stack(x), params_of(1), params_of(2))
    functions = {
        "norm": lambda p: gradient_norm(value_fn, p),
        "top": lambda p: top_hessian_eigenvalue(value_fn, p, KEY),
        "trace": lambda p: hessian_trace(value_fn, p, KEY),
        "sharpness": lambda p: perturbed_sharpness(value_fn, p, 0.1),
        "difference": lambda p: difference_error(value_fn, p, 0.1),
    }
    for name, function in functions.items():
        together = jax.jit(jax.vmap(function))(members)
        alone = jax.jit(function)(params_of(2))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(
                a[1], b, rtol=1e-9, atol=1e-10, err_msg=name
            )  # residuals are rounding themselves


def test_sharpness_is_the_rise_along_the_unit_gradient(x64):
    params = params_of()
    gradient = jax.grad(value_fn)(params)
    norm = np.linalg.norm(ravel_pytree(gradient)[0])
    for rho in (0.3, 1, -0.2):
        shifted = jax.tree.map(lambda p, g, rho=rho: p + rho * g / norm, params, gradient)
        np.testing.assert_allclose(
            perturbed_sharpness(value_fn, params, rho),
            value_fn(shifted) - value_fn(params),
            rtol=1e-12,
        )
    assert perturbed_sharpness(lambda p: jnp.sum(p**2), jnp.zeros(3), 0.1) == 0


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_the_difference_error_falls_with_the_order_of_the_scheme(x64, scheme, order):
    errors = [
        difference_error(value_fn, params_of(), epsilon, scheme).relative_error
        for epsilon in (1e-2, 1e-3)
    ]
    np.testing.assert_allclose(
        errors[0] / errors[1], 10**order, rtol=0.1
    )  # up to the next order, O(epsilon)
    # L = x^3 / 3 at 1: the difference along g is 2 + epsilon, the product 2
    np.testing.assert_allclose(
        difference_error(lambda x: x**3 / 3, jnp.asarray(1.0), 0.5).relative_error, 0.25, rtol=1e-14
    )


def test_the_difference_error_sees_steps_lost_in_rounding():
    params = jnp.asarray([1.0, 1.0, 1.0, 1.0])

    def loss(p):
        return jnp.sum(jnp.asarray([1.0, 1e-9, 0.0, -1e-9]) * p)

    assert difference_error(loss, params, 0.1).unmoved == np.float32(
        2 / 3
    )  # of the three with a gradient
    narrow = difference_error(
        lambda p: jnp.sum(p.astype(jnp.float32) ** 2), params.astype(jnp.bfloat16), 1e-4
    )
    assert narrow.unmoved == 1
    assert narrow.relative_error == 1  # a difference of nothing
    moved = jnp.asarray([1.0 - 2**-24])  # backward: a step up would be lost, one down is not
    assert difference_error(lambda p: jnp.sum(p) * 2**-24, moved, 1.0, "backward").unmoved == 0


def test_the_difference_error_is_finite_at_a_zero_gradient():
    assert difference_error(lambda p: jnp.sum(p**2), jnp.zeros(3), 0.1) == (0, 0)
    assert difference_error(lambda p: jnp.sum(p), jnp.zeros(3), 0.1) == (0, 0)


def test_the_unmoved_share_is_that_of_the_step_that_the_scheme_takes():
    # Below one float32 numbers lie twice as dense as above: a step of 4e-8 is lost upwards (spacing
    # 1.2e-7) and not downwards (6e-8).
    unmoved = {
        s: float(difference_error(lambda p: jnp.sum(p**2) / 2, jnp.ones(3), 4e-8, s).unmoved)
        for s in ("forward", "backward")
    }
    assert unmoved == {"forward": 1.0, "backward": 0.0}


def test_a_parameter_that_does_not_move_is_lost_even_if_it_is_the_only_one():
    found = difference_error(lambda p: p**2, jnp.asarray(1.0), 1e-12)
    assert float(found.unmoved) == 1.0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "num_matvecs",
            lambda n: top_hessian_eigenvalue(value_fn, params_of(), KEY, num_matvecs=n),
        ),
        ("num_samples", lambda n: hessian_trace(value_fn, params_of(), KEY, num_samples=n)),
    ],
)
def test_a_number_that_shapes_the_program_cannot_be_traced(name, call):
    with pytest.raises(TypeError, match=f"{name} must be a concrete number, got a traced one"):
        jax.jit(call)(4)


def test_where_the_product_is_zero_the_error_is_absolute():
    found = difference_error(lambda p: p + p**3, jnp.zeros([]), 0.1)
    np.testing.assert_allclose(found.relative_error, 0.3, rtol=1e-5)  # 3 (epsilon g)^2 / epsilon


def test_sharpness_climbs_along_the_conjugate_of_the_gradient():
    z, target = jnp.asarray([0.5 + 1j, -0.3 + 0.2j]), jnp.asarray([1j, 2.0])

    def loss(z):  # conj(gradient) = z - target
        return jnp.sum(jnp.abs(z - target) ** 2) / 2

    # (|d| + rho)^2 / 2 - |d|^2 / 2
    distance = float(jnp.linalg.norm(z - target))
    expected = ((distance + 0.1) ** 2 - distance**2) / 2
    np.testing.assert_allclose(curvature.perturbed_sharpness(loss, z, 0.1), expected, rtol=1e-4)


def test_the_standard_error_is_that_of_the_samples():
    """Of [[0, 1], [1, 0]] a sample is 2 or -2: of n with mean m the variance is
    (4 - m^2) n / (n - 1)."""
    count = 9
    mean, error = curvature.hessian_trace(
        lambda p: p[0] * p[1], two.P, jax.random.key(0), num_samples=count
    )
    expected = np.sqrt((4 - float(mean) ** 2) / (count - 1))
    assert expected > 0
    np.testing.assert_allclose(error, expected, rtol=1e-5)


@pytest.mark.parametrize("leaf", [1, True, jnp.asarray(1), np.bool_(True), jax.random.key(0)])
def test_leaves_without_a_gradient_are_named_by_every_curvature(leaf):
    params, key = {"w": two.P, "n": leaf}, jax.random.key(0)

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    for name, call in {
        "hessian_vector_product": lambda: curvature.hessian_vector_product(loss, params, params),
        "gradient_norm": lambda: curvature.gradient_norm(loss, params),
        "top_hessian_eigenvalue": lambda: curvature.top_hessian_eigenvalue(loss, params, key),
        "hessian_trace": lambda: curvature.hessian_trace(loss, params, key),
        "perturbed_sharpness": lambda: curvature.perturbed_sharpness(loss, params, 0.1),
        "difference_error": lambda: curvature.difference_error(loss, params, 0.1),
        "fd_value_and_grad": lambda: gr.fd_value_and_grad(loss, **two.PENALTY)(params),
        "fd_gradreg": lambda: two.FD.init(params),
        "make_train_step": lambda: gr.make_train_step(loss, optax.sgd(0.1)).init(params),
    }.items():
        with two.says(TypeError, f"{name}: the parameters['n'] has dtype", "have a gradient"):
            call()


@pytest.mark.parametrize("rho", [[0.1, 0.2], True, 1j, float("nan"), float("inf"), None, "0.1"])
def test_a_radius_of_sharpness_is_a_finite_real_scalar(rho):
    with two.says((TypeError, ValueError), "perturbed_sharpness: rho must be"):
        curvature.perturbed_sharpness(two.quartic, two.P, rho)


def test_without_parameters_there_is_no_hessian_and_nothing_to_penalise():
    key = jax.random.key(0)
    for call in (
        lambda: curvature.top_hessian_eigenvalue(lambda p: 1.0, {}, key),
        lambda: curvature.hessian_trace(lambda p: 1.0, {}, key),
    ):
        with two.says(ValueError, "the parameters must not be empty"):
            call()
    nothing = curvature.penalty_scale(lambda p, b: jnp.mean(b), {}, two.BATCH, penalty_fraction=0.5)
    assert nothing == (1, 0, 0)


@pytest.mark.parametrize("key", [0, None, 1.5, jax.random.split(jax.random.key(0), 3), two.P])
def test_a_key_is_a_single_random_key(key):
    for name in ("top_hessian_eigenvalue", "hessian_trace"):
        with two.says(TypeError, f"{name}: key must be a single random key", "jax.random.key(0)"):
            getattr(curvature, name)(two.quartic, two.P, key)
