"""Which gradient a transformation starts from, how long it may be and how narrow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import (
    asam,
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    gradient_norm_penalty,
    normalized,
    sam,
)
from problems import (
    GRADIENT_FUNCTIONS,
    REGULARIZERS,
    batch_of,
    flat,
    loss_fn,
    params_of,
    update_of,
)


def test_reuse_updates_false_adds_the_penalty_to_whatever_comes_in(x64):
    params, batch, other = params_of(), batch_of(), batch_of(7)
    gradient, incoming = jax.grad(loss_fn)(params, batch), jax.grad(loss_fn)(params, other)
    for name in ("fd central", "dbp forward_over_reverse", "asam"):
        correction = flat(jax.jit(GRADIENT_FUNCTIONS[name](loss_fn))(params, batch)[1]) - flat(
            gradient
        )
        for tx, extra in [
            (REGULARIZERS[name](loss_fn, reuse_updates=False), {}),
            (REGULARIZERS[name](loss_fn), {"reuse_updates": False}),  # for one call
        ]:
            updates = jax.jit(
                lambda tx=tx, extra=extra: update_of(tx, incoming, params, batch=batch, **extra)
            )()
            # rounding over epsilon
            np.testing.assert_allclose(flat(updates) - flat(incoming), correction, atol=1e-12)
        again = REGULARIZERS[name](loss_fn, reuse_updates=False)
        np.testing.assert_allclose(
            flat(update_of(again, gradient, params, batch=batch, reuse_updates=True))
            - flat(gradient),
            correction,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    "first", [optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.5), optax.trace(0.9)]
)
def test_reuse_updates_false_repairs_a_regularizer_that_is_not_first(x64, first):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    clean, _ = first.update(gradient, first.init(params), params)
    expected = (
        flat(clean)
        + flat(
            update_of(fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1), gradient, params, batch=batch)
        )
        - flat(gradient)
    )
    tx = optax.chain(first, fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1, reuse_updates=False))
    # rounding over epsilon
    np.testing.assert_allclose(
        flat(update_of(tx, gradient, params, batch=batch)), expected, atol=1e-12
    )


def test_tiny_and_huge_gradients_are_climbed_in_the_right_direction():
    for size in (1e-17, 1e-10, 1e17):
        slope = jnp.asarray([3.0, -4.0]) * size
        params = jnp.asarray([1.0, 1.0])

        # a linear term of any size, and a curvature that the difference must find
        def loss(p, slope=slope):
            return jnp.sum(slope * p) + jnp.sum((p - 1) ** 2) * jnp.max(jnp.abs(slope))

        gradient = jax.grad(loss)(params)
        for tx in (sam(rho=0.1), asam(rho=0.1), gradient_norm_penalty(gamma=0.1, epsilon=0.1)):
            updates = np.asarray(update_of(tx, gradient, params, value_fn=loss), np.float64)
            expected = np.asarray([3.0, -4.0]) + 2 * 4 * 0.1 * np.asarray([0.6, -0.8])
            # rounding of 1 + 0.06
            np.testing.assert_allclose(updates / np.float64(np.float32(size)), expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["fd forward", "fd central", "dbp forward_over_reverse", "asam"])
def test_narrow_trees_come_back_narrow_and_near_the_wide_result(name, dtype):
    params, batch = params_of(dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), batch_of())
    gradient = jax.grad(loss_fn)(params, batch)
    tx = REGULARIZERS[name](loss_fn, interval=2)
    updates, state = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch))(tx.init(params))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    wide = [
        jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (gradient, params, batch)
    ]
    reference = flat(update_of(tx, wide[0], wide[1], batch=wide[2]))
    error = np.abs(flat(updates) - reference).max() / np.abs(reference).max()
    # rounding of g', divided by epsilon / (interval gamma) = 1/3 and summed
    assert error < 100 * float(jnp.finfo(dtype).eps)
    assert int(state.step) == 1


def test_the_exact_product_follows_the_ascent_it_is_given(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = dbp_value_and_grad(loss_fn, gamma=0.3, ascent=normalized)(params, batch)[1]
    for reuse in (True, False):
        tx = dbp_gradreg(loss_fn, gamma=0.3, ascent=normalized, reuse_updates=reuse)
        np.testing.assert_allclose(
            flat(update_of(tx, gradient, params, batch=batch)),
            flat(expected),
            rtol=1e-12,
            atol=1e-14,
        )
