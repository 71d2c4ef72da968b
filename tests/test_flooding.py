"""Flooding: the gradient of the flooded loss, at the cost of a sign."""

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax import flooding
from problems import batch_of, flat, loss_fn, params_of, update_of


def test_flooding_is_the_gradient_of_the_flooded_loss():
    params, batch = params_of(), batch_of()
    value, gradient = jax.value_and_grad(loss_fn)(params, batch)
    for level in (float(value) / 2, float(value) * 2):
        expected = jax.grad(lambda p, level=level: jnp.abs(loss_fn(p, batch) - level) + level)(
            params
        )
        for extra in ({"value": value}, {"value_fn": lambda p: loss_fn(p, batch)}):
            # float32
            np.testing.assert_allclose(
                flat(update_of(flooding(level=level), gradient, params, **extra)),
                flat(expected),
                rtol=1e-5,
            )
        np.testing.assert_array_equal(
            flat(update_of(flooding(loss_fn, level=level), gradient, params, batch=batch)),
            flat(expected),
        )
    assert not flat(update_of(flooding(level=value), gradient, params, value=value)).any()


def test_flooding_level_may_be_a_schedule_and_updates_any_array():
    tx = flooding(level=lambda step: jnp.where(step < 1, 0.0, 2.0))
    state, signs = tx.init(1.0), []
    for _ in range(3):
        update, state = tx.update(1.0, state, 1.0, value=1)
        signs.append(float(update))
    assert signs == [1.0, -1.0, -1.0]
    assert (
        update_of(
            flooding(level=0.3), jnp.ones(2, jnp.bfloat16), jnp.ones(2), value=jnp.bfloat16(1)
        ).dtype
        == jnp.bfloat16
    )
    assert update_of(
        flooding(level=0.3), np.ones(2, np.float32), np.ones(2, np.float32), value=np.float64(0.1)
    ).tolist() == [-1.0, -1.0]


def test_flooding_with_a_value_evaluates_no_loss_and_without_it_one(counter):
    params, batch = params_of(), batch_of()
    tx = flooding(counter.wrap(loss_fn), level=0.1)
    update = jax.jit(lambda value: update_of(tx, params, params, value=value, batch=batch))
    update(0.2)
    assert counter.read() == (0, 0)
    jax.jit(lambda: update_of(tx, params, params, batch=batch))()
    assert counter.read() == (1, 0)
