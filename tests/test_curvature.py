"""Curvature against dense Hessians; estimates against their own errors."""

import functools

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
from gradreg_optax.curvature import hessian_trace, top_hessian_eigenvalue
from problems import batch_of, flat, loss_fn, params_of

KEY, RADII = jax.random.key(0), (1, -0.2)


def value_fn(params):
    return loss_fn(params, batch_of())


@functools.cache
def dense(value_fn):
    """The flat gradient and the Hessian by JAX."""

    @jax.jit
    def derivatives(params):
        x, unravel = ravel_pytree(params)

        def loss(x):
            return value_fn(unravel(x))

        return jax.grad(loss)(x), jax.hessian(loss)(x)

    return lambda params: map(np.asarray, derivatives(params))


def quadratic(hessian):
    return lambda x: x @ jnp.asarray(hessian) @ x / 2


def every_measure(loss, params, vector):
    """Each measure once, as one program."""
    return {
        "product": curvature.hessian_vector_product(loss, params, vector),
        "norm": curvature.gradient_norm(loss, params),
        "top": top_hessian_eigenvalue(loss, params, KEY),
        "trace": hessian_trace(loss, params, KEY),
        "sharpness": [curvature.perturbed_sharpness(loss, params, rho) for rho in RADII],
        "difference": curvature.difference_error(loss, params, 0.1),
    }


def test_every_measure_is_that_of_the_dense_derivatives_and_the_same_in_vmap(x64):
    measure, value_of = functools.partial(every_measure, value_fn), jax.jit(value_fn)
    several = [(params_of(seed), params_of(seed + 2)) for seed in range(2)]
    together = jax.jit(jax.vmap(measure))(*jax.tree.map(lambda *x: jnp.stack(x), *several))
    alone = jax.jit(measure)
    for i, (params, vector) in enumerate(several):
        found, (gradient, hessian) = alone(params, vector), dense(value_fn)(params)
        product = hessian @ flat(vector)
        np.testing.assert_allclose(flat(found["product"]), product, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found["norm"], np.linalg.norm(gradient), rtol=1e-14)
        value, residual = found["top"]
        np.testing.assert_allclose(value, np.linalg.eigvalsh(hessian)[-1], rtol=1e-12)
        assert residual < 1e-11  # rounding of the iteration over the whole space
        unit = gradient / np.linalg.norm(gradient)
        for rho, rise in zip(RADII, found["sharpness"], strict=True):
            shifted = ravel_pytree(params)[1](flat(params) + rho * unit)
            np.testing.assert_allclose(rise, value_of(shifted) - value_of(params), rtol=1e-12)
        for a, b in zip(*map(jax.tree.leaves, (together, found)), strict=True):
            # residuals are rounding themselves
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-10)


rng = np.random.default_rng(1)
ROTATION, _ = np.linalg.qr(rng.normal(size=(40, 40)))
SPECTRA = {
    "one parameter": np.asarray([-3.0]),
    "zero": np.zeros(5),
    "negative multiple of the identity": -2 * np.ones(5),
    "repeated top": np.asarray([2.0, 2.0, 2.0, -5.0, 1.0]),
    "tiny": 1e-12 * np.asarray([1.0, 1.0, -2.0, -2.0, -2.0]),
    "huge": 1e12 * np.asarray([1.0, 1.0, -2.0, -2.0, -2.0]),
    "projection": np.asarray([100.0] * 15 + [0.0] * 25),
    "negative of low rank": np.asarray([-4.0] + [0.0] * 39),
    "few distinct, larger than the Krylov space": np.repeat([3.0, -2.0, 1.0, 0.0], 10),
}


@pytest.mark.parametrize(("wide", "rotated"), [(True, False), (False, True)])
@pytest.mark.parametrize("size", sorted({len(s) for s in SPECTRA.values()}))
def test_the_iteration_survives_spectra_that_exhaust_the_krylov_space(size, wide, rotated):
    chosen = {name: s for name, s in SPECTRA.items() if len(s) == size}
    basis = np.linalg.qr(ROTATION[:size, :size])[0] if rotated else np.eye(size)
    with jax.enable_x64(wide):
        hessians = jnp.asarray([basis * spectrum @ basis.T for spectrum in chosen.values()])
        x = jnp.ones(size, hessians.dtype)
        top = jax.jit(jax.vmap(lambda h: top_hessian_eigenvalue(quadratic(h), x, KEY)))
        for name, value, residual in zip(chosen, *top(hessians), strict=True):
            # of a product of 40 terms, and of the rotation
            scale = np.abs(chosen[name]).max()
            rounding = 50 * float(jnp.finfo(value.dtype).eps) * scale
            assert abs(value - chosen[name].max()) <= rounding, name
            assert residual <= rounding, name


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


def parts_of(tree):
    return {"w": tree["w"], "x": tree["z"].real, "y": tree["z"].imag}


def test_complex_parameters_count_as_pairs_of_real_ones(x64):
    params = {"z": np.asarray([0.5 + 1j, -0.3 + 0.2j]), "w": np.asarray([0.7, -1.0])}
    vector = {"z": np.asarray([1.0 - 2j, 0.5j]), "w": np.asarray([0.3, 0.1])}

    def real_loss(p):
        return complex_loss({"z": p["x"] + 1j * p["y"], "w": p["w"]})

    @jax.jit
    def measured(*trees):
        trace = hessian_trace(complex_loss, params, KEY, num_samples=400)
        real = every_measure(real_loss, *map(parts_of, trees))
        return every_measure(complex_loss, *trees), real, trace

    found, real, (mean, error) = measured(params, vector)
    product = found["product"] | {"z": jnp.conj(found["product"]["z"])}  # JAX's convention
    found["product"] = parts_of(product)
    for name in ("product", "norm", "sharpness"):
        np.testing.assert_allclose(flat(found[name]), flat(real[name]), rtol=1e-12)
    np.testing.assert_allclose(found["top"].value, real["top"].value, rtol=1e-12)
    assert found["top"].residual < 1e-11
    _, hessian = dense(real_loss)(parts_of(params))
    assert abs(mean - np.trace(hessian)) < 4 * error  # four standard errors


def test_the_trace_of_a_diagonal_hessian_is_exact(x64):
    loss = quadratic(np.diag([2.0, -4.0, 10.0]))
    assert jax.jit(lambda p: hessian_trace(loss, p, KEY, num_samples=2))(np.ones(3)) == (8, 0)


def test_narrow_parameters_get_estimates_in_float32():
    params = jnp.asarray([1.0, 2.0], jnp.bfloat16)
    loss = quadratic(np.diag([2.0, 4.0]).astype(np.float32))
    measure = functools.partial(every_measure, lambda p: loss(p.astype(jnp.float32)))
    found = jax.jit(measure)(params, np.ones(2, np.float32))
    assert found.pop("product").dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    estimates = [found["top"].value, found["trace"].mean]
    np.testing.assert_allclose(estimates, [4.0, 6.0], rtol=2e-2)  # a few eps(bfloat16)


def square(p):
    return jnp.sum(p.astype(jnp.float32) ** 2) / 2


ONE, ONES, ZEROS = jnp.asarray(1.0), jnp.ones(3), jnp.zeros(3)
SLOPES = jnp.asarray([1.0, 1e-9, 0.0, -1e-9])
DIFFERENCES = {  # (loss, parameters, epsilon, scheme), (relative error, share that does not move)
    "x^3 / 3 at 1: 2 + epsilon for 2": ((lambda x: x**3 / 3, ONE, 0.5), (0.25, 0)),
    # 3 (epsilon g)^2 / epsilon
    "absolute where the product is zero": ((lambda p: p + p**3, 0 * ONE, 0.1), (0.3, 0)),
    "two of three with a gradient": ((lambda p: p @ SLOPES, jnp.ones(4), 0.1), (0, 2 / 3)),
    "a difference of nothing": ((square, ONES.astype(jnp.bfloat16), 1e-4), (1, 1)),
    "the only parameter": ((square, ONE, 1e-12), (1, 1)),
    "no gradient": ((square, ZEROS, 0.1), (0, 0)),
    "no curvature": ((jnp.sum, ZEROS, 0.1), (0, 0)),
    # below one float32 numbers lie twice as dense as above: spacing 6e-8, and 1.2e-7
    "a step up is lost": ((square, ONES, 4e-8, "forward"), (1, 1)),
    "one down is not": ((square, ONES, 4e-8, "backward"), (None, 0)),
}


def test_the_difference_error_is_that_of_the_step_taken_and_finite_everywhere():
    cases = DIFFERENCES.values()
    found = jax.jit(lambda: [curvature.difference_error(*arguments) for arguments, _ in cases])()
    for name, (relative_error, unmoved) in zip(DIFFERENCES, found, strict=True):
        error, share = DIFFERENCES[name][1]
        assert unmoved == np.float32(share), name
        if error is not None:
            np.testing.assert_allclose(relative_error, error, rtol=1e-5, err_msg=name)


def test_a_number_that_shapes_the_program_cannot_be_traced():
    for function, name in ((top_hessian_eigenvalue, "num_matvecs"), (hessian_trace, "num_samples")):
        with two.says(TypeError, f"{name} must be a concrete number, got a traced one"):
            jax.jit(lambda n, f=function, k=name: f(two.quartic, two.P, KEY, **{k: n}))(4)


def test_the_standard_error_is_that_of_the_samples():
    """Of [[0, 1], [1, 0]] a sample is 2 or -2: of n with mean m the variance is
    (4 - m^2) n / (n - 1)."""
    count = 9
    loss = functools.partial(hessian_trace, lambda p: p[0] * p[1], num_samples=count)
    mean, error = jax.jit(loss)(two.P, KEY)
    expected = np.sqrt((4 - float(mean) ** 2) / (count - 1))
    assert expected > 0
    np.testing.assert_allclose(error, expected, rtol=1e-5)


@pytest.mark.parametrize("leaf", [1, True, jnp.asarray(1), np.bool_(True), jax.random.key(0)])
def test_leaves_without_a_gradient_are_named_by_every_curvature(leaf):
    params, loss = {"w": two.P, "n": leaf}, two.quartic  # never evaluated
    calls = {
        "hessian_vector_product": lambda p: curvature.hessian_vector_product(loss, p, p),
        "gradient_norm": lambda p: curvature.gradient_norm(loss, p),
        "top_hessian_eigenvalue": lambda p: top_hessian_eigenvalue(loss, p, KEY),
        "hessian_trace": lambda p: hessian_trace(loss, p, KEY),
        "perturbed_sharpness": lambda p: curvature.perturbed_sharpness(loss, p, 0.1),
        "difference_error": lambda p: curvature.difference_error(loss, p, 0.1),
        "fd_value_and_grad": gr.fd_value_and_grad(loss, **two.PENALTY),
        "fd_gradreg": two.FD.init,
        "make_train_step": gr.make_train_step(loss, optax.sgd(0.1)).init,
    }
    for name, call in calls.items():
        with two.says(TypeError, f"{name}: the parameters['n'] has dtype", "have a gradient"):
            call(params)


@pytest.mark.parametrize("rho", [[0.1, 0.2], True, 1j, float("nan"), float("inf"), None, "0.1"])
def test_a_radius_of_sharpness_is_a_finite_real_scalar(rho):
    with two.says((TypeError, ValueError), "perturbed_sharpness: rho must be"):
        curvature.perturbed_sharpness(two.quartic, two.P, rho)


def test_without_parameters_there_is_no_hessian_and_nothing_to_penalise():
    for function in (top_hessian_eigenvalue, hessian_trace):
        with two.says(ValueError, "the parameters must not be empty"):
            function(lambda p: 1.0, {}, KEY)
    nothing = curvature.penalty_scale(lambda p, b: jnp.mean(b), {}, two.BATCH, penalty_fraction=0.5)
    assert nothing == (1, 0, 0)


@pytest.mark.parametrize("key", [0, None, 1.5, jax.random.split(jax.random.key(0), 3), two.P])
def test_a_key_is_a_single_random_key(key):
    for name in ("top_hessian_eigenvalue", "hessian_trace"):
        with two.says(TypeError, f"{name}: key must be a single random key", "jax.random.key(0)"):
            getattr(curvature, name)(two.quartic, two.P, key)
