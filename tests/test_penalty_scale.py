"""How gamma shrinks when the penalty is taken on a part of the batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax._numerics import global_norm
from gradreg_optax.curvature import penalty_scale


def linear_loss(params, batch):
    """Its gradient is the batch's mean, for any parameters."""
    return jnp.mean(batch @ params)


def distance_loss(params, batch):
    return jnp.mean(jnp.sum((params[None] - batch) ** 2, axis=-1)) / 2


def logistic_loss(params, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (jnp.tanh(x @ params["kernel"]) @ params["head"])))


compiled_scale = jax.jit(
    functools.partial(penalty_scale, logistic_loss), static_argnames="penalty_fraction"
)
compiled_gradient = jax.jit(jax.grad(logistic_loss))


@given(seed=st.integers(0, 2**16), parts=st.sampled_from([1, 2, 4, 8]), mean=st.floats(0.0, 3.0))
def test_the_factor_lies_in_the_unit_interval_and_the_whole_gradient_is_the_mean_of_the_parts(
    seed, parts, mean
):
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=5), jnp.float32),
    }
    batch = (
        jnp.asarray(mean + rng.normal(size=(16, 3)), jnp.float32),
        jnp.asarray(rng.choice([-1.0, 1.0], 16), jnp.float32),
    )
    found = compiled_scale(params, batch, penalty_fraction=1 / parts)
    whole = global_norm(compiled_gradient(params, batch)) ** 2
    # float32 rounding of 16 summed gradients, relative to the larger of the two norms
    np.testing.assert_allclose(found.whole, whole, rtol=1e-5, atol=1e-6 * float(found.part))
    assert 0 <= found.factor <= 1 + 1e-5
    np.testing.assert_allclose(found.factor, found.whole / found.part, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("mean", [0.0, 0.3, 2.0])
def test_on_average_the_norms_are_mean_squared_plus_trace_over_samples(fraction, mean):
    batches, size, dim = 4000, 16, 3
    samples = mean + jax.random.normal(jax.random.key(0), (batches, size, dim))
    found = jax.vmap(
        lambda batch: penalty_scale(linear_loss, jnp.zeros(dim), batch, penalty_fraction=fraction)
    )(samples)
    for values, count in ((found.whole, size), (found.part, fraction * size)):
        # four standard errors of the mean over batches
        error = float(jnp.std(values)) / math.sqrt(batches)
        assert abs(float(jnp.mean(values)) - (dim * mean**2 + dim / count)) < 4 * error


def test_the_factor_is_the_fraction_where_noise_dominates():
    # L = |theta - x|^2 / 2 with x ~ N(0, I): at theta = 0 only noise is left, so the factor is f.
    samples = jax.random.normal(jax.random.key(1), (4000, 16, 4))
    found = jax.vmap(
        lambda batch: penalty_scale(distance_loss, jnp.zeros(4), batch, penalty_fraction=0.25)
    )(samples)
    # the ratio of two averages over 4000 batches of chi-squares with 4 and 16 degrees of freedom: 4
    # standard errors, 4 sqrt(2.5/4/4000)
    assert abs(float(jnp.mean(found.whole) / jnp.mean(found.part)) - 0.25) < 0.25 * 0.05


def test_samples_that_agree_leave_gamma_as_it_is():
    batch = jnp.ones((8, 2))
    assert penalty_scale(linear_loss, jnp.zeros(2), batch, penalty_fraction=0.25).factor == 1


def test_without_a_gradient_the_factor_is_one_and_no_nan():
    assert (
        penalty_scale(linear_loss, jnp.zeros(2), jnp.zeros((8, 2)), penalty_fraction=0.25).factor
        == 1
    )


@pytest.mark.parametrize("fraction", [0.0, -0.5, 0.3, 1.5, 0.75])
def test_a_fraction_that_is_not_one_over_a_whole_number_is_named(fraction):
    with pytest.raises(
        ValueError,
        match=rf"penalty_scale: penalty_fraction must .*got {fraction:g}",
    ):
        penalty_scale(linear_loss, jnp.zeros(2), jnp.ones((8, 2)), penalty_fraction=fraction)


def test_a_batch_that_cannot_be_split_is_named():
    with pytest.raises(
        ValueError,
        match=r"penalty_scale: 1 / penalty_fraction must .* divide the batch size 6, got 4",
    ):
        penalty_scale(linear_loss, jnp.zeros(2), jnp.ones((6, 2)), penalty_fraction=0.25)
