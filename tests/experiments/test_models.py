import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import models


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (6,)),
        ("cnn", (1, 5, 3)),
        ("cnn", (9,)),
        ("resnet", (5, 4, 3)),
        pytest.param("resnet", (9,), marks=pytest.mark.slow),
        pytest.param("resnet", (4, 3, 5, 2), marks=pytest.mark.slow),
    ],
)
def test_every_network_gives_one_logit_per_class(name, shape):
    model = models.build(name, shape, 4, width=3, depth=1 if name == "resnet" else 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0))  # to draw the weights takes seconds
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(w.dtype) / 4, shapes)
    logits = jax.jit(functools.partial(model.apply, params))
    found = np.asarray(logits(x))
    assert found.shape == (2, 4)
    assert np.isfinite(found).all()
    # no sample sees another one; float32 rounding of a few layers
    np.testing.assert_allclose(logits(x[::-1])[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "dimensions"),
    [((6,), ("NWC", "WIO", "NWC")), ((6, 7), ("NHWC", "HWIO", "NHWC"))],
)
def test_the_convolution_is_the_convolution_of_jax(sides, dimensions, x64):
    rng, ones = np.random.default_rng(0), (1,) * len(sides)
    kernel, bias, x = (
        rng.normal(size=shape) for shape in ((*[3] * len(sides), 2, 5), (5,), (4, *sides, 2))
    )
    expected = bias + np.asarray(
        jax.lax.conv_general_dilated(x, kernel, ones, "SAME", dimension_numbers=dimensions)
    )
    layer = {"kernel": jnp.asarray(kernel.reshape(-1, 5)), "bias": jnp.asarray(bias)}
    for convolution in (models._convolution, models._primitive)[: len(sides)]:
        # rounding of sums of 18 products in float64
        found = jax.jit(convolution)(layer, x)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_pooling_halves_every_side_that_can_be(x64):
    x = np.random.default_rng(0).normal(size=(3, 5, 1, 4, 2))
    found = np.asarray(jax.jit(models._pool)(x))
    assert found.shape == (3, 2, 1, 2, 2)
    np.testing.assert_allclose(found[:, 1, 0, 0], np.mean(x[:, 2:4, 0, :2], axis=(1, 2)))


def test_a_residual_block_adds_to_its_input_what_is_normalized(x64):
    """With a last convolution of zero it is the identity; else what it adds does not depend on the
    scale of a sample.
    """
    (block,) = models._stage(jax.random.key(0), 3, 3, 1, 2)
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3))
    nothing = {"kernel": jnp.zeros((27, 3)), "bias": jnp.zeros(3)}
    residual = jax.jit(functools.partial(models._residual, models._convolution))
    np.testing.assert_array_equal(residual(block | {"second": nothing}, x), x)
    added = [residual(block, scale * x) - scale * x for scale in (1.0, 100.0)]
    np.testing.assert_allclose(*added, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_networks_have_no_kinks(name, x64):
    """Along a line, the second difference of a smooth function falls with the square of the step; a
    kink leaves it first order."""
    model = models.build(name, (4, 4, 1), 3, width=4)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)

    @jax.jit
    def along(t):
        moved = jax.tree.map(lambda p, d: p + t * d, params, direction)
        return jnp.sum(model.apply(moved, x) ** 2)

    second = [abs(along(h) - 2 * along(0.0) + along(-h)) for h in (4e-3, 2e-3)]
    assert second[0] / second[1] == pytest.approx(4, rel=0.05)  # the next term is relative O(h^2)


def test_an_mlp_has_the_given_sizes_and_outputs_of_order_one():
    init, apply = models.build("mlp", (8, 8, 1), 10, width=64, depth=1)
    params = init(jax.random.key(0))
    assert [layer["kernel"].shape for layer in params] == [(64, 64), (64, 10)]
    logits = apply(params, np.random.default_rng(0).normal(size=(50, 8, 8, 1)))
    assert 0.3 < np.std(logits) < 1
