"""The mathematics in float64: differences, products, ascent directions; and what is left of it in
low precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from gradreg_optax._estimators import add_penalty, difference
from gradreg_optax._numerics import global_norm

SCHEMES = ("forward", "backward", "central")
MODES = ("forward_over_reverse", "reverse_over_reverse")
seeds = st.integers(0, 2**32 - 1)


def smooth_loss(params):
    """A small tanh network on fixed inputs: smooth, not a quadratic, of mixed curvature."""
    rng = np.random.default_rng(5)
    inputs, targets = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6,)))
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None, :])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


def smooth_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4))),
        "bias": jnp.asarray(rng.normal(size=(4,))),
        "out": jnp.asarray(rng.normal(size=(4,))),
    }


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(lambda x, y: x - y, a, b)))


def penalized_gradient(loss, params, gamma):
    """The oracle: JAX's gradient of L + gamma/2 |grad L|^2 for real parameters."""

    def penalized(params):
        gradient = jax.grad(loss)(params)
        return loss(params) + gamma / 2 * sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))

    return jax.grad(penalized)(params)


@jax.jit
def all_schemes_on_a_quadratic(hessian, linear, x, gamma, epsilon):
    def loss(x):
        return x @ hessian @ x / 2 + linear @ x

    return [
        fd_value_and_grad(loss, gamma=gamma, epsilon=epsilon, scheme=scheme)(x)
        for scheme in SCHEMES
    ]


@given(
    seed=seeds,
    dim=st.sampled_from([1, 2, 5]),
    gamma=st.floats(0.0, 2.0),
    epsilon=st.floats(1e-3, 10.0),
)
def test_every_scheme_is_exact_on_indefinite_quadratics(seed, dim, gamma, epsilon):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    with jax.enable_x64(True):
        hessian, linear, x = root + root.T, rng.normal(size=dim), rng.normal(size=dim)
        gradient = hessian @ x + linear
        expected = gradient + gamma * hessian @ gradient
        for value, grad in all_schemes_on_a_quadratic(hessian, linear, x, gamma, epsilon):
            # rounding of the difference: eps(float64) |g'| gamma / epsilon, with |g'| up to a few
            # hundred
            np.testing.assert_allclose(
                grad, expected, rtol=1e-12, atol=1e-13 * (1 + gamma / epsilon)
            )
            np.testing.assert_allclose(
                value, x @ hessian @ x / 2 + linear @ x, atol=1e-13
            )  # sums of a few terms of O(1)


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_error_of_a_difference_has_its_order_in_epsilon(x64, scheme, order):
    params, epsilons = smooth_params(), np.geomspace(1e-3, 3e-2, 6)
    _, exact = dbp_value_and_grad(smooth_loss, gamma=1.0)(params)
    difference = jax.jit(
        lambda epsilon: fd_value_and_grad(smooth_loss, gamma=1.0, epsilon=epsilon, scheme=scheme)(
            params
        )[1]
    )
    errors = [distance(difference(e), exact) for e in epsilons]
    slope = np.polyfit(np.log(epsilons), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.05  # the next order contributes a relative O(epsilon) = 3e-2


@jax.jit
def all_schemes_on_a_network(params, epsilon):
    return [
        fd_value_and_grad(smooth_loss, gamma=0.7, epsilon=epsilon, scheme=s)(params)[1]
        for s in SCHEMES
    ]


@given(seed=seeds, epsilon=st.floats(1e-2, 1.0))
def test_the_mean_of_forward_and_backward_is_central(seed, epsilon):
    with jax.enable_x64(True):
        params = smooth_params(seed)
        forward, backward, central = all_schemes_on_a_network(params, epsilon)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, forward, backward)
        assert distance(mean, central) <= 1e-13 / epsilon * (
            1 + float(optax.tree.norm(central))
        )  # rounding of g' over epsilon


def test_the_two_sides_of_a_difference_are_on_their_own_sides(x64):
    # L = x^3/3 at x = 1: g = 1, H g = 2, and (grad L(1 +- e) - 1) / +-e = 2 +- e exactly
    grads = [
        fd_value_and_grad(lambda x: x**3 / 3, gamma=1.0, epsilon=0.5, scheme=s)(jnp.asarray(1.0))[1]
        for s in SCHEMES
    ]
    np.testing.assert_allclose(grads, [3.5, 2.5, 3.0], rtol=1e-15)


@partial(jax.jit, static_argnames="mode")
def exact_and_its_oracle(params, gamma, mode):
    return *dbp_value_and_grad(smooth_loss, gamma=gamma, mode=mode)(params), penalized_gradient(
        smooth_loss, params, gamma
    )


@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds, gamma=st.floats(0.0, 3.0))
def test_double_backpropagation_is_the_gradient_of_the_penalized_loss(mode, seed, gamma):
    with jax.enable_x64(True):
        params = smooth_params(seed)
        value, grad, expected = exact_and_its_oracle(params, gamma, mode)
        assert distance(grad, expected) <= 1e-12 * float(optax.tree.norm(expected))
        np.testing.assert_allclose(value, smooth_loss(params), rtol=1e-15)


def complex_loss(params):
    z, w = params["z"], params["w"]
    return jnp.sum(jnp.abs(jnp.sin(z) * w[:, None] + z**2) ** 2) + jnp.real(
        jnp.sum(jnp.exp(1j * z))
    ) * jnp.sum(w**3)


def complex_params(dtype=jnp.complex128):
    rng = np.random.default_rng(3)
    z = 0.4 * (rng.normal(size=(2, 2)) + 1j * rng.normal(size=(2, 2)))
    return {
        "z": jnp.asarray(z, dtype),
        "w": jnp.asarray(rng.normal(size=2), jnp.finfo(dtype).dtype),
    }


def split_oracle(gradient_of, params):
    """What ``gradient_of(loss, real params)`` says of the real and imaginary parts, in JAX's
    convention d/dx - i d/dy."""
    parts = {"x": params["z"].real, "y": params["z"].imag, "w": params["w"]}
    real = gradient_of(lambda p: complex_loss({"z": p["x"] + 1j * p["y"], "w": p["w"]}), parts)
    return {"z": real["x"] - 1j * real["y"], "w": real["w"]}


@pytest.mark.parametrize("mode", MODES)
def test_double_backpropagation_of_complex_parameters_is_that_of_their_parts(x64, mode):
    params = complex_params()
    expected = jax.jit(
        lambda params: split_oracle(lambda loss, p: penalized_gradient(loss, p, 0.3), params)
    )(params)
    _, grad = jax.jit(dbp_value_and_grad(complex_loss, gamma=0.3, mode=mode))(params)
    assert distance(grad, expected) <= 1e-12 * float(optax.tree.norm(expected))


@pytest.mark.parametrize(
    ("scheme", "ascent"), [("forward", None), ("backward", normalized), ("central", adaptive)]
)
def test_differences_of_complex_parameters_climb_along_the_conjugate(x64, scheme, ascent):
    params = complex_params()

    def with_settings(loss, params, ascent=ascent):
        return fd_value_and_grad(loss, gamma=0.3, epsilon=0.1, scheme=scheme, ascent=ascent)(
            params
        )[1]

    def adaptive_parts(gradient, parts):  # |z|^2 = x^2 + y^2 belongs to both parts
        size = {
            "x": jnp.hypot(parts["x"], parts["y"]),
            "y": jnp.hypot(parts["x"], parts["y"]),
            "w": jnp.abs(parts["w"]),
        }
        norm = jnp.sqrt(
            sum(
                jnp.sum((s * g) ** 2)
                for s, g in zip(size.values(), [gradient[k] for k in size], strict=True)
            )
        )
        return {k: size[k] ** 2 * gradient[k] / norm for k in size}

    of_parts = adaptive_parts if ascent is adaptive else ascent
    expected = jax.jit(
        lambda params: split_oracle(lambda loss, p: with_settings(loss, p, of_parts), params)
    )(params)
    # rounding of g' over epsilon
    assert distance(
        jax.jit(lambda p: with_settings(complex_loss, p))(params), expected
    ) <= 1e-12 * float(optax.tree.norm(expected))


def masks_of(params):
    half = np.arange(12).reshape(3, 4) % 2 == 0
    return {
        "whole leaves": {"kernel": True, "bias": False, "out": True},
        "single coordinates": {
            "kernel": half,
            "bias": jnp.asarray([True, False, False, True]),
            "out": False,
        },
        "function of the parameters": lambda p: jax.tree.map(lambda x: x > 0, p),
        "numpy bools": {"kernel": np.bool_(False), "bias": np.True_, "out": np.False_},
        "one bool for all": True,
        "nothing": False,
    }


@pytest.mark.parametrize("name", list(masks_of(None)))
def test_a_mask_perturbs_its_coordinates_and_corrects_all(x64, name):
    params = smooth_params()
    mask = masks_of(params)[name]
    flat, unravel = ravel_pytree(params)

    def flat_loss(x):
        return smooth_loss(unravel(x))

    full = mask(params) if callable(mask) else jax.tree.broadcast(mask, params)
    diagonal = ravel_pytree(
        jax.tree.map(lambda m, p: jnp.broadcast_to(m, p.shape) * 1.0, full, params)
    )[0]
    gradient, hessian = jax.jit(lambda x: (jax.grad(flat_loss)(x), jax.hessian(flat_loss)(x)))(flat)
    expected = unravel(gradient + 0.7 * hessian @ (diagonal * gradient))
    scale = float(optax.tree.norm(expected))
    for mode in MODES:
        _, exact = jax.jit(
            dbp_value_and_grad(smooth_loss, gamma=0.7, mode=mode, ascent=masked(mask))
        )(params)
        assert distance(exact, expected) <= 1e-12 * scale
    difference = jax.jit(
        lambda epsilon: fd_value_and_grad(
            smooth_loss, gamma=0.7, epsilon=epsilon, ascent=masked(mask)
        )(params)[1]
    )
    errors = [distance(difference(epsilon), expected) for epsilon in (1e-3, 1e-4)]
    assert errors[0] <= 1e-2 * scale  # O(epsilon), with a third derivative of a few units
    assert errors[1] <= 0.11 * errors[0] + 1e-11  # and of order one, down to rounding


def test_a_masked_penalty_moves_parameters_outside_the_mask():
    _, grad = fd_value_and_grad(
        lambda p: p["a"] * p["b"], gamma=0.5, epsilon=0.1, ascent=masked({"a": True, "b": False})
    )({"a": jnp.asarray(2.0), "b": jnp.asarray(3.0)})
    # H M g = [[0, 1], [1, 0]] (3, 0) = (0, 3); g = (3, 2)
    np.testing.assert_allclose(
        [grad["a"], grad["b"]], [3.0, 3.5], rtol=1e-5
    )  # eps(float32) gamma / epsilon


def test_masks_compose_with_other_directions(x64):
    params, mask = smooth_params(), {"kernel": True, "bias": False, "out": False}

    def direction(gradient, params):
        return normalized(masked(mask)(gradient, params), params)

    _, grad = fd_value_and_grad(smooth_loss, gamma=0.2, epsilon=0.2, ascent=direction)(params)
    gradient = jax.grad(smooth_loss)(params)
    shifted = params | {
        "kernel": params["kernel"] + 0.2 * gradient["kernel"] / jnp.linalg.norm(gradient["kernel"])
    }
    assert (
        distance(grad, jax.grad(smooth_loss)(shifted)) <= 1e-14 * 10
    )  # g cancels up to a rounding of |g| = O(1)


def test_adaptive_is_its_formula_and_invariant_under_rescaling(x64):
    params, gradient = smooth_params(1), smooth_params(2)
    norm = jnp.sqrt(
        sum(
            jnp.sum((p * g) ** 2)
            for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True)
        )
    )
    expected = jax.tree.map(lambda p, g: p**2 * g / norm, params, gradient)
    assert distance(adaptive(gradient, params), expected) <= 1e-15 * 10
    # theta -> c theta with L unchanged sends g -> g / c, and the relative step d / theta stays
    scaled = adaptive(
        jax.tree.map(lambda g: g / 7, gradient), jax.tree.map(lambda p: 7 * p, params)
    )
    assert distance(scaled, jax.tree.map(lambda d: 7 * d, expected)) <= 1e-14 * 10


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.complex128])
def test_directions_keep_dtypes_and_are_zero_at_zero(x64, dtype):
    zero, params = (
        {"a": jnp.zeros((2, 3), dtype), "b": jnp.zeros((), dtype)},
        {"a": jnp.ones((2, 3), dtype), "b": jnp.ones((), dtype)},
    )
    for ascent in (normalized, adaptive, masked(True), masked(False)):
        direction = ascent(zero, params)
        assert {k: d.dtype for k, d in direction.items()} == {"a": dtype, "b": dtype}
        assert all(bool(jnp.all(d == 0)) for d in jax.tree.leaves(direction))
    assert float(optax.tree.norm(adaptive(params, zero))) == 0  # |theta| g = 0 as well


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_directions_and_norm_are_right_wherever_squares_are(size):
    gradient = {"a": jnp.asarray([3.0, 0.0]) * size, "b": -2.0 * jnp.asarray(size)}
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(1.0)}
    root = np.sqrt(13.0)
    unit = normalized(gradient, params)
    np.testing.assert_allclose(
        np.append(unit["a"], unit["b"]), np.array([3.0, 0.0, -2.0]) / root, rtol=1e-6
    )  # a few eps(float32)
    unit = adaptive(gradient, params)
    np.testing.assert_allclose(
        np.append(unit["a"], unit["b"]), np.array([3.0, 0.0, -2.0]) / root, rtol=1e-6
    )
    np.testing.assert_allclose(global_norm(gradient), root * np.float64(size), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e-20])
def test_directions_shrink_to_zero_where_squares_underflow(size):
    gradient = jnp.asarray([3.0, -4.0]) * size
    for direction in (normalized(gradient, None), adaptive(gradient, jnp.ones(2))):
        np.testing.assert_array_equal(jnp.sign(direction), [1, -1])
        assert 0 < float(optax.tree.norm(direction)) <= 1 + 1e-6  # eps(float32)


@pytest.mark.parametrize("size", [1e20, 1e30, 1e37])
def test_directions_are_finite_where_squares_overflow(size):
    for direction in (
        normalized(jnp.full(3, size), None),
        adaptive(jnp.full(3, size), jnp.ones(3)),
    ):
        assert bool(jnp.all(jnp.isfinite(direction)))


def test_directions_of_leaves_of_different_widths_are_finite(x64):
    tree = {"narrow": jnp.zeros(2, jnp.float32), "wide": jnp.full(2, 1e-150)}
    for ascent in (normalized, adaptive):
        direction = ascent(tree, {"narrow": jnp.ones(2, jnp.float32), "wide": jnp.ones(2)})
        np.testing.assert_allclose(
            np.concatenate(list(direction.values())), [0, 0, 0.5**0.5, 0.5**0.5], rtol=1e-15
        )
        assert direction["narrow"].dtype == jnp.float32


def test_directions_of_subnormal_and_empty_gradients_are_finite():
    for gradient in (
        jnp.asarray([3e-40, 4e-40]),
        jnp.zeros((0,)),
        {},
        jnp.asarray([6e-8, 0], jnp.float16),
    ):
        for ascent in (normalized, adaptive):
            assert all(
                bool(jnp.all(jnp.isfinite(d))) for d in jax.tree.leaves(ascent(gradient, gradient))
            )
    # the smallest float16 is no small number in float32
    np.testing.assert_array_equal(
        normalized(jnp.asarray([6e-8, 0], jnp.float16), None), np.asarray([1, 0], np.float16)
    )


def test_norm_of_a_float16_gradient_that_overflows_in_float16_is_right():
    gradient = jnp.full(100, 3e4, jnp.float16)
    np.testing.assert_allclose(
        global_norm(gradient), float(gradient[0]) * 10, rtol=1e-6
    )  # eps(float32)
    np.testing.assert_allclose(
        normalized(gradient, None), np.full(100, 0.1), rtol=5e-4
    )  # eps(float16) / 2
    tx = sam(lambda p: 3e4 * jnp.sum(p.astype(jnp.float32)), rho=0.1)
    updates, _ = tx.update(gradient, tx.init(gradient), jnp.ones(100, jnp.float16))
    np.testing.assert_array_equal(updates, gradient)  # a linear loss has no curvature


def test_the_norm_has_a_derivative_and_it_is_zero_at_zero(x64):
    np.testing.assert_array_equal(jax.grad(global_norm)(jnp.zeros(3)), np.zeros(3))
    np.testing.assert_allclose(
        jax.grad(global_norm)(jnp.asarray([3.0, 4.0])), [0.6, 0.8], rtol=1e-15
    )


@pytest.mark.parametrize(
    ("scheme", "ascent"), [("forward", None), ("backward", normalized), ("central", adaptive)]
)
def test_a_zero_gradient_has_a_zero_correction(scheme, ascent):
    for make in (
        lambda **kw: fd_value_and_grad(**kw, epsilon=0.1, scheme=scheme),
        dbp_value_and_grad,
    ):
        _, grad = make(loss_fn=lambda p: jnp.sum(p**2), gamma=1.0, ascent=ascent)(jnp.zeros(3))
        np.testing.assert_array_equal(grad, np.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_difference_of_narrow_gradients_is_formed_in_float32(dtype):
    rng = np.random.default_rng(0)
    before = jnp.asarray(rng.normal(size=200), dtype)
    after = before + jnp.asarray(0.01 * rng.normal(size=200), dtype)
    step, gamma = jnp.float32(0.3), jnp.float32(0.7)
    estimate = difference(
        lambda _: (after, None),
        before,
        lambda gradient: (gradient, ()),
        epsilon=step,
        scheme="forward",
        gradient=before,
    )
    product = estimate.product
    assert product.dtype == jnp.float32
    exact = (np.asarray(after, np.float64) - np.asarray(before, np.float64)) / 0.3
    np.testing.assert_allclose(
        product, exact, rtol=1e-6
    )  # a few eps(float32); eps(dtype) is 1e-3 or more
    combined = np.asarray(before, np.float64) + 0.7 * exact
    result = add_penalty(before, gamma, product)
    assert result.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(result, np.float64), combined, rtol=float(jnp.finfo(dtype).eps), atol=1e-7
    )  # one rounding


def test_a_large_gamma_over_epsilon_does_not_cancel_in_bfloat16():
    # (1 - c) g + c g' at c = 5000 loses every digit; g + c (g' - g) loses none
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.bfloat16)
    tx = fd_gradreg(lambda p: jnp.sum(p * gradient), gamma=5000.0, epsilon=1.0)
    updates, _ = tx.update(gradient, tx.init(gradient), gradient)
    np.testing.assert_array_equal(np.asarray(updates, np.float32), np.asarray(gradient, np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_updates_of_wide_parameters_keep_their_dtype_and_the_wide_difference(dtype):
    params = jnp.linspace(-1.0, 1.0, 7)
    wide = jax.grad(lambda p: jnp.sum(jnp.sin(p)))(params)
    narrow = wide.astype(dtype)
    tx = fd_gradreg(lambda p: jnp.sum(jnp.sin(p)), gamma=0.1, epsilon=0.5)
    updates, _ = tx.update(narrow, tx.init(params), params)
    assert updates.dtype == dtype
    base = np.asarray(narrow, np.float64)
    expected = base + 0.2 * (np.cos(np.asarray(params, np.float64) + 0.5 * base) - base)
    np.testing.assert_allclose(
        np.asarray(updates, np.float64), expected, rtol=float(jnp.finfo(dtype).eps)
    )  # one rounding


def test_norms_and_directions_of_leaves_of_several_widths_need_no_promotion(x64):
    tree = [jnp.full(3, 2.0, jnp.float32), jnp.full(2, 2.0), jnp.ones(5, jnp.float16)]
    narrow = [leaf.astype(jnp.float16) for leaf in tree]
    with jax.numpy_dtype_promotion("strict"):
        norm, unit, adapted = global_norm(tree), normalized(tree, tree), adaptive(tree, narrow)
    assert norm.dtype == jnp.float64
    np.testing.assert_allclose(norm, 5.0)
    for direction, power, length in ((unit, 1, 5.0), (adapted, 3, 85.0**0.5)):
        for leaf, d in zip(tree, direction, strict=True):
            assert d.dtype == leaf.dtype
            np.testing.assert_allclose(d, np.asarray(leaf, float) ** power / length, rtol=1e-3)
