"""NumPyro's SVI: a regularized ELBO, after ``docs/how-to/numpyro.md``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from problems import relative_error

numpyro = pytest.importorskip("numpyro")
dist = pytest.importorskip("numpyro.distributions")
infer = pytest.importorskip("numpyro.infer")
autoguide = pytest.importorskip("numpyro.infer.autoguide")

GAMMA, EPSILON, RATE, STEPS = 1e-3, 1e-3, 1e-3, 4


def model(x, y):
    weight = numpyro.sample("weight", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ weight), 0.5), obs=y)


def data():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    return x, jnp.tanh(x @ jnp.array([1.0, -1.0, 0.5]))


def regularized(optim, regularizer):
    """A NumPyro optimizer that descends the regularized objective."""
    optim = numpyro.optim.optax_to_numpyro(optim)
    evaluate = optim.eval_and_update

    def eval_and_update(fn, state, **options):
        return evaluate(gr.regularized_loss(fn, regularizer, has_aux=True), state, **options)

    optim.eval_and_update = eval_and_update
    return optim


def fitted(optim):
    guide = autoguide.AutoNormal(model)
    svi = infer.SVI(model, guide, optim, infer.Trace_ELBO())
    state = svi.init(jax.random.key(0), *data())
    losses = []
    for _ in range(STEPS):
        state, loss = svi.update(state, *data())
        losses.append(loss)
    return svi, state, losses


def test_svi_descends_the_objective_with_the_same_key_in_both_passes():
    svi, found, losses = fitted(
        regularized(optax.sgd(RATE), gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON))
    )
    state = svi.init(jax.random.key(0), *data())
    params, key = svi.optim.get_params(state.optim_state), state.rng_key
    for step in range(STEPS):
        key, now = jax.random.split(key)

        def objective(p, now=now):
            return svi.loss.loss(now, svi.constrain_fn(p), svi.model, svi.guide, *data())

        value, g = jax.value_and_grad(objective)(params)
        ahead = jax.grad(objective)(optax.tree.add_scale(params, EPSILON, g))
        g = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, ahead)
        params = optax.tree.add_scale(params, -RATE, g)
        np.testing.assert_allclose(losses[step], value, rtol=1e-5)
    assert relative_error(svi.optim.get_params(found.optim_state), params) < 1e-4


def test_flooding_works_unchanged():
    _, _, losses = fitted(optax.sgd(RATE))
    level = float(losses[0]) + 1e3  # everything lies below it: ascent
    _, state, _ = fitted(optax.chain(gr.flooding(level=level), optax.sgd(RATE)))
    _, opposite, _ = fitted(optax.sgd(-RATE))
    assert relative_error(state.optim_state[1][0], opposite.optim_state[1][0]) < 1e-5
