"""Flooding: the gradient of the flooded loss, at the cost of a sign."""

import jax
import jax.numpy as jnp
import numpy as np

import two_parameters as two
from gradreg_optax import flooding
from problems import update_of


def test_flooding_is_the_gradient_of_the_flooded_loss():
    value, gradient = jax.value_and_grad(two.quartic)(two.P)
    for level in (float(value) / 2, float(value) * 2):
        expected = jax.grad(lambda p, level=level: jnp.abs(two.quartic(p) - level) + level)(two.P)
        for extra in ({"value": value}, {"value_fn": two.quartic}):
            found = update_of(flooding(level=level), gradient, two.P, **extra)
            np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32
        found = update_of(flooding(two.quartic, level=level), gradient, two.P)
        np.testing.assert_array_equal(found, expected)
    assert not update_of(flooding(level=value), gradient, two.P, value=value).any()


def test_flooding_level_may_be_a_schedule_and_updates_any_array():
    tx = flooding(level=lambda step: jnp.where(step < 1, 0.0, 2.0))
    state, signs = tx.init(1.0), []
    for _ in range(3):
        update, state = tx.update(1.0, state, 1.0, value=1)
        signs.append(float(update))
    assert signs == [1.0, -1.0, -1.0]
    tx, narrow = flooding(level=0.3), jnp.ones(2, jnp.bfloat16)
    assert update_of(tx, narrow, jnp.ones(2), value=jnp.bfloat16(1)).dtype == jnp.bfloat16
    ones = np.ones(2, np.float32)
    assert update_of(tx, ones, ones, value=np.float64(0.1)).tolist() == [-1.0, -1.0]


def test_flooding_with_a_value_evaluates_no_loss_and_without_it_one(counter):
    tx = flooding(counter.wrap(two.quartic), level=0.1)
    jax.jit(lambda value: update_of(tx, two.P, two.P, value=value))(0.2)
    assert counter.read() == (0, 0)
    jax.jit(lambda: update_of(tx, two.P, two.P))()
    assert counter.read() == (1, 0)
