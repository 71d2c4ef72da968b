"""Which gradient a transformation starts from, how long it may be and how narrow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import asam, dbp_gradreg, fd_gradreg, gradient_norm_penalty, normalized, sam
from problems import (
    GRADIENT_FUNCTIONS,
    REGULARIZERS,
    batch_of,
    flat,
    loss_fn,
    params_of,
    update_of,
)


@pytest.mark.parametrize("name", ["fd central", "dbp forward_over_reverse", "asam"])
def test_reuse_updates_false_adds_the_penalty_to_whatever_comes_in(x64, name):
    make = REGULARIZERS[name]

    @jax.jit
    def corrections(params, batch, other):
        gradient, incoming = (jax.grad(loss_fn)(params, b) for b in (batch, other))
        own, off, on = make(loss_fn, reuse_updates=False), {"reuse_updates": False}, True
        updates = [
            (incoming, update_of(own, incoming, params, batch=batch)),
            (incoming, update_of(make(loss_fn), incoming, params, batch=batch, **off)),
            (gradient, update_of(own, gradient, params, batch=batch, reuse_updates=on)),
        ]
        return (gradient, GRADIENT_FUNCTIONS[name](loss_fn)(params, batch)[1]), updates

    (gradient, penalised), updates = corrections(params_of(), batch_of(), batch_of(7))
    expected = flat(penalised) - flat(gradient)
    for given, updated in updates:
        # rounding over epsilon
        np.testing.assert_allclose(flat(updated) - flat(given), expected, atol=1e-12)


def test_reuse_updates_false_repairs_a_regularizer_that_is_not_first(x64):
    firsts = [optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.5), optax.trace(0.9)]
    options = {"gamma": 0.5, "epsilon": 0.1}

    @jax.jit
    def repaired(params, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        own = fd_gradreg(loss_fn, **options, reuse_updates=False)
        found = [
            (
                update_of(optax.chain(first, own), gradient, params, batch=batch),
                update_of(first, gradient, params),
            )
            for first in firsts
        ]
        return (
            gradient,
            update_of(fd_gradreg(loss_fn, **options), gradient, params, batch=batch),
            found,
        )

    gradient, penalised, found = repaired(params_of(), batch_of())
    for updates, clean in found:
        # rounding over epsilon
        expected = flat(clean) + flat(penalised) - flat(gradient)
        np.testing.assert_allclose(flat(updates), expected, atol=1e-12)


def test_tiny_and_huge_gradients_are_climbed_in_the_right_direction():
    families = sam(rho=0.1), asam(rho=0.1), gradient_norm_penalty(gamma=0.1, epsilon=0.1)

    @jax.jit
    def updates(size):
        slope, params = jnp.asarray([3.0, -4.0]) * size, jnp.asarray([1.0, 1.0])

        # a linear term of any size, and a curvature that the difference must find
        def loss(p):
            return jnp.sum(slope * p) + jnp.sum((p - 1) ** 2) * jnp.max(jnp.abs(slope))

        gradient = jax.grad(loss)(params)
        return [update_of(tx, gradient, params, value_fn=loss) for tx in families]

    for size in (1e-17, 1e-10, 1e17):
        expected = np.asarray([3.0, -4.0]) + 2 * 4 * 0.1 * np.asarray([0.6, -0.8])
        for update in updates(size):
            # rounding of 1 + 0.06
            np.testing.assert_allclose(
                flat(update) / np.float64(np.float32(size)), expected, rtol=2e-6
            )


@pytest.mark.parametrize("name", ["fd central", "dbp forward_over_reverse", "asam"])
def test_narrow_trees_come_back_narrow_and_near_the_wide_result(name):
    tx = REGULARIZERS[name](loss_fn, interval=2)

    @jax.jit
    def update(params, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        return tx.update(gradient, tx.init(params), params, batch=batch)

    def of_dtype(dtype):
        return jax.tree.map(lambda x: x.astype(dtype), (params_of(), batch_of()))

    reference = flat(update(*of_dtype(jnp.float32))[0])
    for dtype in (jnp.bfloat16, jnp.float16):
        updates, state = update(*of_dtype(dtype))
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        error = np.abs(flat(updates) - reference).max() / np.abs(reference).max()
        # rounding of g and g', divided by epsilon / (interval gamma) = 1/3 and summed
        assert error < 100 * float(jnp.finfo(dtype).eps)
        assert int(state.step) == 1


def test_the_exact_product_follows_the_ascent_it_is_given(x64):
    options = {"gamma": 0.3, "ascent": normalized}

    @jax.jit
    def ways(params, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        found = [
            update_of(
                dbp_gradreg(loss_fn, **options, reuse_updates=reuse), gradient, params, batch=batch
            )
            for reuse in (True, False)
        ]
        unit = normalized(gradient, params)
        product = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (unit,))[1]
        return found, optax.tree.add_scale(gradient, 0.3, product)

    found, expected = ways(params_of(), batch_of())
    for updates in found:
        np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-12, atol=1e-14)
