"""Orbax: a run that stops and resumes is, bit for bit, the run that did not stop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradreg_optax as gr

RISING = optax.linear_schedule(0.0, 0.2, 12)


def loss_fn(params, batch, key):
    x, y = batch
    h = jnp.tanh(x @ params["w1"])
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0)
    return jnp.mean((h @ params["w2"] - y) ** 2)


def fresh():
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(8, 16)) / 3, rng.normal(size=(16, 2)) / 4
    return {"w1": jnp.float32(w1), "w2": jnp.float32(w2)}, jax.random.key(1)


def batch(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)


@functools.cache
def train_step_run():
    """A self-tuned strength: its state remembers norms and losses."""
    tuned, adam = gr.relative_gradreg(strength=None, interval=3), optax.adamw(RISING)
    init, step_fn = gr.make_train_step(loss_fn, adam, tuned)

    def start():
        params, key = fresh()
        return {"train": init(params), "key": key}

    def step(state, number):
        key, dropout_key = jax.random.split(state["key"])
        held_out = batch(number + 1000)
        train, _ = step_fn(state["train"], batch(number), dropout_key, held_out=held_out)
        return {"train": train, "key": key}

    return start, step


@functools.cache
def chain_run():
    """A chain in a named_chain, with gamma as an injected hyperparameter: the largest state that
    one is likely to meet."""
    fd = optax.inject_hyperparams(gr.fd_gradreg, static_args=("interval",))
    inner = fd(gamma=RISING, epsilon=0.01, interval=3)
    tx = optax.named_chain(
        ("gradreg", inner), ("flooding", gr.flooding(level=0.01)), ("adam", optax.adam(1e-2))
    )

    def start():
        params, key = fresh()
        return {"params": params, "opt_state": tx.init(params), "key": key}

    @jax.jit
    def advance(state, batch):
        key, dropout_key = jax.random.split(state["key"])
        params, opt_state = state["params"], state["opt_state"]

        def value_fn(params):
            return loss_fn(params, batch, dropout_key)

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "key": key}

    return start, lambda state, number: advance(state, batch(number))


def bits(state):
    keys = jax.dtypes.prng_key
    leaves = jax.tree.leaves(state)
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for x in leaves]


@pytest.mark.parametrize("run", [train_step_run, chain_run])
def test_resuming_after_five_steps_is_bitwise_the_uninterrupted_run(run, tmp_path):
    start, step = run()
    state = start()
    with ocp.StandardCheckpointer() as checkpointer:
        for number in range(5):
            state = step(state, number)
        checkpointer.save(tmp_path / "5", state)
        checkpointer.wait_until_finished()  # the next step reuses the state's memory
        # What a new process has: the same code, the shapes of a fresh state, and nothing else.
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, start())
        resumed = checkpointer.restore(tmp_path / "5", target)
    for number in range(5, 12):
        state, resumed = step(state, number), step(resumed, number)
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    for found, expected in zip(bits(resumed), bits(state), strict=True):
        np.testing.assert_array_equal(found, expected)
