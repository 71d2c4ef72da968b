import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import models


@pytest.mark.parametrize(("name", "shape"), [("mlp", (6,)), ("cnn", (1, 5, 3))])
def test_every_network_gives_one_logit_per_class(name, shape):
    model = models.build(name, shape, 4, width=3, depth=2)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    logits = jax.jit(model.apply)(params, x)
    assert logits.shape == (2, 4)
    assert np.isfinite(logits).all()
    # no sample sees another one; float32 rounding of a few layers
    np.testing.assert_allclose(
        jax.jit(model.apply)(params, x[::-1])[0], logits[1], rtol=1e-4, atol=1e-5
    )


def test_the_convolution_is_the_convolution_of_jax(x64):
    kernel, bias, x = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(3, 3, 2, 5), (5,), (4, 6, 7, 2)])
    )
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = (
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        + bias[None, None, None]
    )
    found = models._convolution({"kernel": kernel.reshape(18, 5), "bias": bias}, x)
    np.testing.assert_allclose(
        found, expected, rtol=1e-12, atol=1e-12
    )  # rounding of sums of 18 products in float64


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_networks_have_no_kinks(name, x64):
    """Along a line, the second difference of a smooth function falls with the square of the step; a
    kink leaves it first order."""
    model = models.build(name, (4, 4, 1), 3, width=4)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    along = jax.jit(
        lambda t: jnp.sum(
            model.apply(jax.tree.map(lambda p, d: p + t * d, params, direction), x) ** 2
        )
    )
    steps = np.array([4e-3, 2e-3])
    second = [abs(along(h) - 2 * along(0.0) + along(-h)) for h in steps]
    assert second[0] / second[1] == pytest.approx(4, rel=0.05)  # the next term is relative O(h^2)


def test_an_mlp_has_the_sizes_it_says():
    params = models.build("mlp", (8, 8, 1), 10, width=64, depth=1).init(jax.random.key(0))
    assert [layer["kernel"].shape for layer in params] == [(64, 64), (64, 10)]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("vit", (8, 8, 1), "unknown model 'vit'"), ("cnn", (64,), "cnn needs images")],
)
def test_a_wrong_network_is_named(name, shape, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, shape, 10)
