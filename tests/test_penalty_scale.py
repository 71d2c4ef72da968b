"""How gamma shrinks when the penalty is taken on a part of the batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import Weighted
from gradreg_optax._numerics import global_norm
from gradreg_optax.curvature import penalty_scale
from problems import batch_of, loss_fn, params_of


def linear_loss(params, batch):
    """Its gradient is the batch's mean, for any parameters."""
    return jnp.mean(batch @ params)


compiled_scale = jax.jit(
    functools.partial(penalty_scale, loss_fn), static_argnames="penalty_fraction"
)
compiled_gradient = jax.jit(jax.grad(loss_fn))


@given(seed=st.integers(0, 2**16), parts=st.sampled_from([1, 4]), mean=st.floats(0.0, 3.0))
def test_the_factor_lies_in_the_unit_interval_and_the_whole_gradient_is_the_mean_of_the_parts(
    seed, parts, mean
):
    params, batch = params_of(seed), batch_of(seed, size=16)
    batch |= {"y": batch["y"] + mean}
    found = compiled_scale(params, batch, penalty_fraction=1 / parts)
    whole = global_norm(compiled_gradient(params, batch)) ** 2
    # float32 rounding of 16 summed gradients, relative to the larger of the two norms
    np.testing.assert_allclose(found.whole, whole, rtol=1e-5, atol=1e-6 * float(found.part))
    assert 0 <= found.factor <= 1 + 1e-5
    np.testing.assert_allclose(found.factor, found.whole / found.part, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="fraction")
def over_batches(samples, fraction):
    scale = functools.partial(penalty_scale, linear_loss, penalty_fraction=fraction)
    return jax.vmap(lambda batch: scale(jnp.zeros(samples.shape[-1]), batch))(samples)


@pytest.mark.parametrize("fraction", [0.5, 0.125])
def test_on_average_the_norms_are_mean_squared_plus_trace_over_samples(fraction):
    batches, size, dim = 4000, 16, 3
    noise = np.random.default_rng(0).normal(size=(batches, size, dim)).astype(np.float32)
    for mean in (0.0, 0.3, 2.0):
        found = over_batches(np.float32(mean) + noise, fraction)
        for values, count in ((found.whole, size), (found.part, fraction * size)):
            # four standard errors of the mean over batches
            error = float(np.std(values)) / math.sqrt(batches)
            assert abs(float(np.mean(values)) - (dim * mean**2 + dim / count)) < 4 * error
        if mean == 0:
            # Only noise is left, so the factor is the fraction: the ratio of two averages over 4000
            # batches of chi-squares, with 4 standard errors of at most 0.0125 each.
            assert abs(np.mean(found.whole) / np.mean(found.part) / fraction - 1) < 0.05


@pytest.mark.parametrize("batch", [np.ones((8, 2)), np.zeros((8, 2))], ids=["ones", "zeros"])
def test_samples_that_agree_or_have_no_gradient_leave_gamma_as_it_is(batch):
    batch = jnp.asarray(batch)
    assert penalty_scale(linear_loss, jnp.zeros(2), batch, penalty_fraction=0.25).factor == 1


@pytest.mark.parametrize("fraction", [0.0, -0.5, 0.3, 1.5, 0.75])
def test_a_fraction_that_is_not_one_over_a_whole_number_is_named(fraction):
    says = rf"penalty_scale: penalty_fraction must .*got {fraction:g}"
    with pytest.raises(ValueError, match=says):
        penalty_scale(linear_loss, jnp.zeros(2), jnp.ones((8, 2)), penalty_fraction=fraction)


def test_a_batch_that_cannot_be_split_is_named():
    says = r"penalty_scale: 1 / penalty_fraction must .* divide the batch size 6, got 4"
    with pytest.raises(ValueError, match=says):
        penalty_scale(linear_loss, jnp.zeros(2), jnp.ones((6, 2)), penalty_fraction=0.25)


def test_parts_of_a_weighted_loss_count_by_their_weight():
    def weighted(params, batch):
        x, mask = batch
        return Weighted(jnp.sum(mask * (x @ params)), jnp.sum(mask))

    x, mask = jnp.asarray([[1.0], [1.0], [7.0], [9.0]]), jnp.asarray([1.0, 1.0, 1.0, 0.0])
    found = penalty_scale(weighted, jnp.zeros(1), (x, mask), penalty_fraction=0.5)
    # the gradient is the mean of the unmasked samples: 1 and 7 in the parts, 9 / 3 in the whole
    np.testing.assert_allclose([found.whole, found.part], [9.0, (1 + 49) / 2], rtol=1e-6)
