"""Orbax: a run that stops and resumes is, bit for bit, the run that did not stop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradreg_optax as gr


def loss_fn(params, batch, key):
    x, y = batch
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0)
    return jnp.mean((h @ params["w2"] - y) ** 2)


def fresh():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (8, 16)) / 3,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(keys[1], (16, 2)) / 4,
    }
    return params, keys[2]


def batch(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)


def regularizer():
    """Its penalty grows over all of the run, and falls on every third step: both go by the counter
    in its state."""
    return gr.fd_gradreg(gamma=optax.linear_schedule(0.0, 0.2, 40), epsilon=0.01, interval=3)


def train_step_run():
    init, step_fn = gr.make_train_step(
        loss_fn, optax.adamw(optax.cosine_decay_schedule(1e-2, 40)), regularizer()
    )

    def start():
        params, key = fresh()
        return {"train": init(params), "key": key}

    def step(state, number):
        key, dropout_key = jax.random.split(state["key"])
        train, _ = step_fn(state["train"], batch(number), dropout_key)
        return {"train": train, "key": key}

    return start, step


def chain_run():
    """A chain in a named_chain, with gamma as an injected hyperparameter: the largest state that
    one is likely to meet."""
    fd = optax.inject_hyperparams(gr.fd_gradreg, static_args=("interval",))
    inner = fd(gamma=optax.linear_schedule(0.0, 0.2, 40), epsilon=0.01, interval=3)
    tx = optax.named_chain(
        ("gradreg", inner), ("flooding", gr.flooding(level=0.01)), ("adam", optax.adam(1e-2))
    )

    def start():
        params, key = fresh()
        return {"params": params, "opt_state": tx.init(params), "key": key}

    @jax.jit
    def advance(state, batch):
        key, dropout_key = jax.random.split(state["key"])
        value, grads = jax.value_and_grad(loss_fn)(state["params"], batch, dropout_key)
        updates, opt_state = tx.update(
            grads,
            state["opt_state"],
            state["params"],
            value=value,
            value_fn=lambda p: loss_fn(p, batch, dropout_key),
        )
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "key": key,
        }

    return start, lambda state, number: advance(state, batch(number))


def relative_run():
    """A self-tuned strength: its state remembers norms and losses."""
    tx = gr.relative_gradreg(strength=None, interval=3)
    init, step_fn = gr.make_train_step(loss_fn, optax.adam(1e-2), tx)

    def start():
        params, key = fresh()
        return {"train": init(params), "key": key}

    def step(state, number):
        key, dropout_key = jax.random.split(state["key"])
        held_out = batch(number + 1000)
        train, _ = step_fn(state["train"], batch(number), dropout_key, held_out=held_out)
        return {"train": train, "key": key}

    return start, step


def bits(state):
    def plain(leaf):
        return np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    return [plain(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("run", [train_step_run, chain_run, relative_run])
def test_resuming_after_twenty_steps_is_bitwise_the_uninterrupted_run(run, tmp_path):
    start, step = run()
    state = start()
    with ocp.StandardCheckpointer() as checkpointer:
        for number in range(20):
            state = step(state, number)
        checkpointer.save(tmp_path / "20", state)
        checkpointer.wait_until_finished()  # the next step reuses the state's memory
        for number in range(20, 40):
            state = step(state, number)
        # What a new process does: the same code, the shapes of a fresh state, and nothing else.
        start, step = run()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, start())
        resumed = checkpointer.restore(tmp_path / "20", target)
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    for number in range(20, 40):
        resumed = step(resumed, number)
    for found, expected in zip(bits(resumed), bits(state), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lost", ["counter", "key"])
def test_a_checkpoint_without_the_counter_or_the_key_is_another_run(lost):
    """Both are part of the state: the test above would notice if either were lost."""
    start, step = train_step_run()
    state = start()
    for number in range(6):  # the seventh step carries a penalty
        state = step(state, number)
    kept = jax.tree.map(jnp.copy, state)
    if lost == "counter":
        (_, adam), params, taken = kept["train"].opt_state, kept["train"].params, kept["train"].step
        kept["train"] = gr.TrainState(params, (gr.GradregState(jnp.int32(0)), adam), taken)
    else:
        kept["key"] = jax.random.key(7)
    found, expected = step(kept, 6), step(state, 6)
    assert any(
        (a != b).any()
        for a, b in zip(bits(found["train"].params), bits(expected["train"].params), strict=True)
    )
