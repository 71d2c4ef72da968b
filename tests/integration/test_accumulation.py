"""``optax.microbatching`` does for a gradient function what ``microbatched`` does for a loss."""

import jax
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from problems import batch_of, loss_fn, params_of, relative_error

GAMMA, EPSILON = 0.5, 0.05


@pytest.mark.skipif(not hasattr(optax, "microbatching"), reason="it came with optax 0.2.7")
def test_optax_microbatching_does_the_same_for_a_gradient_function():
    """It accumulates a gradient, which serves the difference: that needs nothing but gradients."""
    params = params_of(dtype=np.float32)
    batch = jax.tree.map(lambda x: x.astype(np.float32), batch_of(size=32))
    grad_fn = optax.microbatching.microbatch(
        jax.grad(lambda p, x, y: loss_fn(p, {"x": x, "y": y})),
        argnums=(),
        argnames=("x", "y"),
        microbatch_size=8,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )

    @jax.jit
    def by_hand(params):
        gradient = grad_fn(params, **batch)
        ahead = grad_fn(jax.tree.map(lambda p, g: p + EPSILON * g, params, gradient), **batch)
        return jax.tree.map(lambda g, a: g + GAMMA / EPSILON * (a - g), gradient, ahead)

    value_and_grad = gr.fd_value_and_grad(gr.microbatched(loss_fn, 4), gamma=GAMMA, epsilon=EPSILON)
    # float32, times gamma / epsilon = 10: another order of summation
    assert relative_error(jax.jit(value_and_grad)(params, batch)[1], by_hand(params)) < 1e-5
