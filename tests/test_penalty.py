"""The mathematics in float64: differences, products, ascent directions; and what is left of it in
low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradreg_optax import (
    adaptive,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    masked,
    normalized,
    sam,
)
from gradreg_optax._numerics import global_norm
from problems import MODES, SCHEMES, add, batch_of, flat, loss_fn, params_of


def smooth_loss(params):
    """Smooth, not a quadratic, of mixed curvature."""
    return loss_fn(params, batch_of())


def distance(a, b):
    return float(np.linalg.norm(flat(a) - flat(b)))


def penalized_gradient(loss, params, gamma):
    """The oracle: JAX's gradient of L + gamma/2 |grad L|^2 for real parameters."""

    def penalized(params):
        gradient = jax.grad(loss)(params)
        return loss(params) + gamma / 2 * sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))

    return jax.grad(penalized)(params)


@jax.jit
def on_a_quadratic(hessian, linear, x, gamma, epsilon):
    def loss(x):
        return x @ hessian @ x / 2 + linear @ x

    options = {"gamma": gamma, "epsilon": epsilon}
    return [fd_value_and_grad(loss, scheme=scheme, **options)(x)[1] for scheme in SCHEMES]


def test_every_scheme_is_exact_on_indefinite_quadratics(x64):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        root, linear, x = rng.normal(size=(5, 5)), rng.normal(size=5), rng.normal(size=5)
        gamma, epsilon = rng.uniform(0, 2), 10 ** rng.uniform(-3, 1)
        hessian = root + root.T
        expected = hessian @ x + linear + gamma * hessian @ (hessian @ x + linear)
        # rounding of the difference: eps(float64) |g'| gamma / epsilon, |g'| up to a few hundred
        tolerance = {"rtol": 1e-12, "atol": 1e-13 * (1 + gamma / epsilon)}
        for gradient in on_a_quadratic(hessian, linear, x, gamma, epsilon):
            np.testing.assert_allclose(gradient, expected, **tolerance)


def test_error_of_a_difference_has_its_order_in_epsilon(x64):
    epsilons = np.geomspace(1e-3, 3e-2, 6)

    @jax.jit
    def corrections(params):
        def correction(epsilon, scheme):
            options = {"gamma": 1.0, "epsilon": epsilon, "scheme": scheme}
            gradient = fd_value_and_grad(smooth_loss, **options)(params)[1]
            return ravel_pytree(gradient)[0]

        exact = ravel_pytree(dbp_value_and_grad(smooth_loss, gamma=1.0)(params)[1])[0]
        return exact, [jax.vmap(lambda e, s=s: correction(e, s))(epsilons) for s in SCHEMES]

    exact, found = corrections(params_of())
    for order, differences in zip((1, 1, 2), found, strict=True):
        errors = np.linalg.norm(differences - exact[None, :], axis=1)
        slope = np.polyfit(np.log(epsilons), np.log(errors), 1)[0]
        assert abs(slope - order) < 0.05  # the next order contributes a relative O(epsilon) = 3e-2


def test_double_backpropagation_is_the_gradient_of_the_penalized_loss(x64):
    @jax.jit
    def exact_and_its_oracle(params, gamma):
        found = [dbp_value_and_grad(smooth_loss, gamma=gamma, mode=mode)(params) for mode in MODES]
        return found, (smooth_loss(params), penalized_gradient(smooth_loss, params, gamma))

    for seed, gamma in enumerate((0.0, 0.3, 3.0)):
        found, (value, expected) = exact_and_its_oracle(params_of(seed), gamma)
        for own_value, gradient in found:
            assert distance(gradient, expected) <= 1e-12 * np.linalg.norm(flat(expected))
            np.testing.assert_allclose(own_value, value, rtol=1e-15)


def complex_loss(params):
    z, w = params["z"], params["w"]
    return jnp.sum(jnp.abs(jnp.sin(z) * w[:, None] + z**2) ** 2) + jnp.real(
        jnp.sum(jnp.exp(1j * z))
    ) * jnp.sum(w**3)


def complex_params():
    rng = np.random.default_rng(3)
    z = 0.4 * (rng.normal(size=(2, 2)) + 1j * rng.normal(size=(2, 2)))
    return {"z": jnp.asarray(z), "w": jnp.asarray(rng.normal(size=2))}


def parts_of(tree):
    return {"x": tree["z"].real, "y": tree["z"].imag, "w": tree["w"]}


def adaptive_parts(gradient, parts):
    """ASAM's direction of both parts: |z|^2 = x^2 + y^2 belongs to either."""
    length = jnp.hypot(parts["x"], parts["y"])
    size = {"w": jnp.abs(parts["w"]), "x": length, "y": length}
    norm = jnp.sqrt(sum(jnp.sum((size[k] * gradient[k]) ** 2) for k in size))
    return {k: size[k] ** 2 * gradient[k] / norm for k in size}


def penalties(**options):
    """Gradient functions by a difference and, without a direction, by both products."""

    def gradients(loss):
        ascent = options.get("ascent")
        functions = [fd_value_and_grad(loss, gamma=0.3, epsilon=0.1, **options)]
        if ascent is None:
            functions += [dbp_value_and_grad(loss, gamma=0.3, mode=mode) for mode in MODES]
        return lambda params: [function(params)[1] for function in functions]

    return gradients


COMPLEX = {
    "forward and products": ({}, {}),
    "backward, normalized": ({"scheme": "backward", "ascent": normalized},) * 2,
    "central, adaptive": (
        {"scheme": "central", "ascent": adaptive},
        {"scheme": "central", "ascent": adaptive_parts},
    ),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_parameters_are_the_pairs_of_their_parts_and_climbed_along_the_conjugate(x64, name):
    ours, reference = (penalties(**options) for options in COMPLEX[name])

    @jax.jit
    def both(params):
        parts = parts_of(params)
        real = reference(lambda p: complex_loss({"z": p["x"] + 1j * p["y"], "w": p["w"]}))(parts)
        return [parts_of(tree) for tree in ours(complex_loss)(params)], real

    for found, expected in zip(*both(complex_params()), strict=True):
        # in JAX's convention d/dx - i d/dy; of a difference: rounding of g' over epsilon
        expected["y"] = -expected["y"]
        assert distance(found, expected) <= 1e-12 * np.linalg.norm(flat(expected))


def test_a_mask_selects_its_coordinates():
    params = params_of()
    masks = [
        {"kernel": True, "out": False},  # whole leaves
        {"kernel": np.arange(12).reshape(3, 4) % 2 == 0, "out": np.asarray([True, False] * 2)},
        lambda p: jax.tree.map(lambda x: x > 0, p),
        {"kernel": np.False_, "out": np.True_},
        True,
        False,
    ]
    for mask in masks:
        full = mask(params) if callable(mask) else jax.tree.broadcast(mask, params)
        full = jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape), full, params)
        traced = jax.jit(lambda full: masked(full)(params, params))
        for direction in (masked(mask)(params, params), traced(full)):
            np.testing.assert_array_equal(flat(direction), flat(full) * flat(params))


def test_masks_compose_with_other_directions(x64):
    """The mask's coordinates are perturbed, and the gradient of all is corrected."""
    mask = {"kernel": True, "out": False}

    def direction(gradient, params):
        return normalized(masked(mask)(gradient, params), params)

    @jax.jit
    def both(params):
        options = {"gamma": 0.2, "epsilon": 0.2, "ascent": direction}
        gradient = jax.grad(smooth_loss)(params)["kernel"]
        kernel = params["kernel"] + 0.2 * gradient / jnp.linalg.norm(gradient)
        ahead = jax.grad(smooth_loss)(params | {"kernel": kernel})
        return fd_value_and_grad(smooth_loss, **options)(params)[1], ahead

    # g cancels up to a rounding of |g| = O(1)
    assert distance(*both(params_of())) <= 1e-13


def test_adaptive_is_its_formula_and_invariant_under_rescaling(x64):
    params, gradient = params_of(1), params_of(2)
    p, g = flat(params), flat(gradient)
    expected = p**2 * g / np.linalg.norm(p * g)
    direction = jax.jit(adaptive)
    np.testing.assert_allclose(flat(direction(gradient, params)), expected, atol=1e-14)
    # theta -> c theta with L unchanged sends g -> g / c, and the relative step d / theta stays
    scaled = direction(add(gradient, gradient, 1 / 7 - 1), add(params, params, 6.0))
    np.testing.assert_allclose(flat(scaled), 7 * expected, atol=1e-13)


DIRECTIONS = {"normalized": jax.jit(normalized), "adaptive": jax.jit(adaptive)}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.complex128])
def test_directions_keep_dtypes_and_are_zero_at_zero(x64, dtype):
    zero, params = np.zeros((2, 3), dtype), np.ones((2, 3), dtype)
    for ascent in (*DIRECTIONS.values(), masked(True), masked(False)):
        direction = ascent(zero, params)
        assert direction.dtype == dtype
        assert not np.any(direction)
    assert not np.any(DIRECTIONS["adaptive"](params, zero))  # |theta| g = 0 as well


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_directions_and_norm_are_right_wherever_squares_are(size):
    gradient = {"a": np.float32([3.0 * size, 0.0]), "b": np.float32(-2.0 * size)}
    params = {"a": np.float32([1.0, 2.0]), "b": np.float32(1.0)}
    root = np.sqrt(13.0)
    for ascent in DIRECTIONS.values():
        expected = np.array([3.0, 0.0, -2.0]) / root
        np.testing.assert_allclose(flat(ascent(gradient, params)), expected, rtol=1e-6)
    np.testing.assert_allclose(global_norm(gradient), root * np.float64(size), rtol=1e-6)


@pytest.mark.parametrize("ascent", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_are_finite_where_squares_underflow_or_overflow(ascent):
    for size in (1e-37, 1e-25, 1e-20):
        direction = ascent(np.float32([3.0 * size, -4.0 * size]), np.ones(2, np.float32))
        np.testing.assert_array_equal(np.sign(direction), [1, -1])
        assert 0 < np.linalg.norm(direction) <= 1 + 1e-6  # eps(float32)
    for size in (1e20, 1e30, 1e37):
        assert np.isfinite(ascent(np.full(2, size, np.float32), np.ones(2, np.float32))).all()
    narrow = np.asarray([6e-8, 0], np.float16)
    for gradient in (np.float32([3e-40, 4e-40]), narrow, np.zeros(0), {}):
        assert np.isfinite(flat([np.zeros(0), ascent(gradient, gradient)])).all()
    # the smallest float16 is no small number in float32
    np.testing.assert_array_equal(normalized(narrow, None), np.asarray([1, 0], np.float16))


def test_norm_of_a_float16_gradient_that_overflows_in_float16_is_right():
    gradient = jnp.full(100, 3e4, jnp.float16)
    expected = float(gradient[0]) * 10
    np.testing.assert_allclose(global_norm(gradient), expected, rtol=1e-6)  # eps(float32)
    # eps(float16) / 2
    np.testing.assert_allclose(normalized(gradient, None), np.full(100, 0.1), rtol=5e-4)
    tx = sam(lambda p: 3e4 * jnp.sum(p.astype(jnp.float32)), rho=0.1)
    updates, _ = tx.update(gradient, tx.init(gradient), jnp.ones(100, jnp.float16))
    np.testing.assert_array_equal(updates, gradient)  # a linear loss has no curvature


def test_the_norm_has_a_derivative_and_it_is_zero_at_zero(x64):
    derivative = jax.jit(jax.grad(global_norm))
    for at, expected in (([0.0, 0.0], [0.0, 0.0]), ([3.0, 4.0], [0.6, 0.8])):
        np.testing.assert_allclose(derivative(np.asarray(at)), expected, rtol=1e-15)


def test_a_zero_gradient_has_a_zero_correction():
    def loss(params):
        return jnp.sum(params**2)

    functions = (
        fd_value_and_grad(loss, gamma=1.0, epsilon=0.1, ascent=normalized),
        fd_value_and_grad(loss, gamma=1.0, epsilon=0.1, scheme="central", ascent=adaptive),
        dbp_value_and_grad(loss, gamma=1.0, ascent=normalized),
    )
    for gradient in jax.jit(lambda p: [function(p)[1] for function in functions])(np.zeros(3)):
        np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_difference_of_narrow_gradients_is_formed_in_float32(dtype):
    def loss(params):
        return jnp.sum(jnp.sin(params))

    params, gradient_of = jnp.linspace(-1.0, 1.0, 50, dtype=dtype), jax.grad(loss)
    before = gradient_of(params)
    wide = [x.astype(np.float32) for x in (params, before)]
    after = gradient_of(add(*wide, 3.0).astype(dtype))
    tx = fd_gradreg(loss, gamma=3.0, epsilon=3.0, reuse_updates=False)
    updates, _ = tx.update(np.zeros(50, np.float32), tx.init(params), params)
    assert updates.dtype == jnp.float32
    # eps(float32); eps(dtype) is 1e-3 or more
    np.testing.assert_allclose(flat(updates), flat(after) - flat(before), rtol=1e-6)


def test_a_large_gamma_over_epsilon_does_not_cancel_in_bfloat16():
    # (1 - c) g + c g' at c = 5000 loses every digit; g + c (g' - g) loses none
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.bfloat16)
    tx = fd_gradreg(lambda p: jnp.sum(p * gradient), gamma=5000.0, epsilon=1.0)
    updates, _ = tx.update(gradient, tx.init(gradient), gradient)
    np.testing.assert_array_equal(flat(updates), flat(gradient))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_updates_of_wide_parameters_keep_their_dtype_and_the_wide_difference(dtype):
    params = jnp.linspace(-1.0, 1.0, 50)
    wide = jax.grad(lambda p: jnp.sum(jnp.sin(p)))(params)
    narrow = wide.astype(dtype)
    tx = fd_gradreg(lambda p: jnp.sum(jnp.sin(p)), gamma=1.0, epsilon=0.5)
    updates, _ = tx.update(narrow, tx.init(params), params)
    assert updates.dtype == dtype
    base = flat(narrow)
    expected = base + 2 * (np.cos(flat(params) + 0.5 * base) - base)
    # one rounding
    np.testing.assert_allclose(flat(updates), expected, rtol=0.51 * float(jnp.finfo(dtype).eps))


def test_norms_and_directions_of_leaves_of_several_widths_need_no_promotion(x64):
    tree = [np.full(3, 2.0, np.float32), np.full(2, 2.0), np.ones(5, np.float16)]
    narrow = [leaf.astype(np.float16) for leaf in tree]
    with jax.numpy_dtype_promotion("strict"):
        norm, unit = jax.jit(global_norm)(tree), DIRECTIONS["normalized"](tree, tree)
        adapted = DIRECTIONS["adaptive"](tree, narrow)
    assert norm.dtype == jnp.float64
    np.testing.assert_allclose(norm, 5.0)
    for direction, power, length in ((unit, 1, 5.0), (adapted, 3, 85.0**0.5)):
        for leaf, d in zip(tree, direction, strict=True):
            assert d.dtype == leaf.dtype
            np.testing.assert_allclose(d, leaf.astype(float) ** power / length, rtol=1e-3)
    # a wide leaf whose squares only float64 holds
    tiny, ones = [np.zeros(2, np.float32), np.full(2, 1e-150)], [np.ones(2, np.float32), np.ones(2)]
    for ascent in DIRECTIONS.values():
        direction = ascent(tiny, ones)
        np.testing.assert_allclose(flat(direction), [0, 0, 0.5**0.5, 0.5**0.5], rtol=1e-15)
        assert direction[0].dtype == jnp.float32
