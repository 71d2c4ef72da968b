"""The state: a counter, by which schedules and intervals go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import GradregState, fd_gradreg, flooding
from problems import REGULARIZERS, batch_of, flat, loss_fn, params_of, update_of


def test_schedules_go_by_a_counter_that_advances_on_skipped_updates_too():
    params, batch, seen = params_of(), batch_of(), []

    def gamma(step):
        jax.debug.callback(lambda s: seen.append(int(s)), step)
        return 0.1 * (1 + step)

    tx = fd_gradreg(loss_fn, gamma=gamma, epsilon=0.1, interval=3)
    gradient = jax.grad(loss_fn)(params, batch)
    unit = flat(
        update_of(fd_gradreg(loss_fn, gamma=1.0, epsilon=0.1), gradient, params, batch=batch)
    ) - flat(gradient)
    update, state = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch)), tx.init(params)
    for step in range(5):
        updates, state = update(state)
        expected = 3 * 0.1 * (1 + step) * unit if step % 3 == 0 else 0 * unit
        # eps(float32) gamma interval / epsilon
        np.testing.assert_allclose(flat(updates) - flat(gradient), expected, atol=1e-5)
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3, 4]


def test_epsilon_schedules_see_the_same_counter(x64):
    params = jnp.asarray(1.0)
    tx = fd_gradreg(lambda p: p**3 / 3, gamma=1.0, epsilon=lambda step: 0.5 * (1 + step))
    state, corrections = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(jnp.asarray(1.0), state, params)
        corrections.append(float(updates) - 1)
    # H g + epsilon, see test_penalty
    np.testing.assert_allclose(corrections, [2.5, 3.0, 3.5], rtol=1e-14)


def test_the_state_is_a_counter_of_fixed_type():
    params = params_of()
    for tx in [make(loss_fn) for make in REGULARIZERS.values()] + [flooding(level=0.1)]:
        state = tx.init(params)
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        assert isinstance(state, GradregState)
        assert state.step.dtype == jnp.int32
        assert state.step.shape == ()
        after = jax.eval_shape(
            lambda s, tx=tx: tx.update(params, s, params, batch=batch_of(), value=0.1)[1], state
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    full = GradregState(step=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    assert int(tx.update(params, full, params, value=0.1)[1].step) == np.iinfo(np.int32).max
