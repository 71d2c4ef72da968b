"""Orbax: a run that stops and resumes is, bit for bit, the run that did not stop."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradreg_optax as gr
import problems

RISING = optax.linear_schedule(0.0, 0.2, 12)
INJECTED = optax.inject_hyperparams(gr.fd_gradreg, static_args=("interval",))
# The largest state that one is likely to meet: a named chain, gamma as an injected hyperparameter.
CHAIN = optax.named_chain(
    ("gradreg", INJECTED(gamma=RISING, epsilon=0.01, interval=3)),
    ("flooding", gr.flooding(level=0.01)),
    ("adam", optax.adam(1e-2)),
)
RUNS = {  # optimizer, regularizer; the state of a self-tuned strength remembers norms and losses
    "self-tuned": (optax.adamw(RISING), gr.relative_gradreg(strength=None, interval=3)),
    "chain": (CHAIN, None),
}


def loss_fn(params, batch, key):
    return problems.loss_fn(params, batch, shift=jax.random.normal(key))


def bits(state):
    keys = jax.dtypes.prng_key
    leaves = jax.tree.leaves(state)
    return [jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, keys) else x for x in leaves]


@pytest.mark.parametrize("name", RUNS)
def test_resuming_after_five_steps_is_bitwise_the_uninterrupted_run(name, tmp_path):
    optimizer, regularizer = RUNS[name]
    init, step_fn = gr.make_train_step(loss_fn, optimizer, regularizer)

    def start():
        return {"train": init(problems.params_of(dtype=np.float32)), "key": jax.random.key(1)}

    def step(state, number):
        key, noise_key = jax.random.split(state["key"])
        held_out = {"held_out": problems.batch_of(number + 1000)} if regularizer else {}
        train, _ = step_fn(state["train"], problems.batch_of(number), noise_key, **held_out)
        return {"train": train, "key": key}

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
