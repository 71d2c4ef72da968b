"""Which gradient a transformation starts from, how long it may be and how narrow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax import normalized
from problems import (
    GRADIENT_FUNCTIONS,
    REGULARIZERS,
    batch_of,
    flat,
    loss_fn,
    params_of,
    update_of,
)


@pytest.mark.parametrize(
    ("name", "options"),
    [("fd central", {}), ("dbp forward_over_reverse", {"ascent": normalized}), ("asam", {})],
)
def test_reuse_updates_false_adds_the_penalty_to_whatever_comes_in(x64, name, options):
    make = functools.partial(REGULARIZERS[name], **options)
    of_function = functools.partial(GRADIENT_FUNCTIONS[name], **options)

    @jax.jit
    def corrections(params, batch, other):
        gradient, incoming = (jax.grad(loss_fn)(params, b) for b in (batch, other))
        own, off, on = make(loss_fn, reuse_updates=False), {"reuse_updates": False}, True
        updates = [
            (incoming, update_of(own, incoming, params, batch=batch)),
            (incoming, update_of(make(loss_fn), incoming, params, batch=batch, **off)),
            (gradient, update_of(own, gradient, params, batch=batch, reuse_updates=on)),
        ]
        return (gradient, of_function(loss_fn)(params, batch)[1]), updates

    (gradient, penalised), updates = corrections(params_of(), batch_of(), batch_of(7))
    expected = flat(penalised) - flat(gradient)
    for given, updated in updates:
        # rounding over epsilon
        np.testing.assert_allclose(flat(updated) - flat(given), expected, atol=1e-12)


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
