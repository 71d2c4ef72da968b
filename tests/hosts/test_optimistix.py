"""Optimistix passes ``value_fn=`` on, so chains work unchanged: ``docs/how-to/optimistix.md``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr

optimistix = pytest.importorskip("optimistix")
GAMMA, EPSILON, RATE = 0.1, 0.1, 0.05


def loss_fn(y, scale):
    return jnp.sum(scale * jnp.sin(2 * y) ** 2 + y**2 / 8)


def test_a_chain_works_unchanged():
    tx = optax.chain(gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON), optax.sgd(RATE))
    start = jnp.array([0.9, -0.6])
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
    found = optimistix.minimise(loss_fn, solver, start, args=2.0, max_steps=8, throw=False).value
    y = start
    for _ in range(8):
        g = jax.grad(loss_fn)(y, 2.0)
        ahead = jax.grad(loss_fn)(y + EPSILON * g, 2.0)
        y = y - RATE * (g + GAMMA / EPSILON * (ahead - g))
    np.testing.assert_allclose(found, y, rtol=1e-5)
