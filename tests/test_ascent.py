"""Ascent directions with state: an Optax transformation as ``ascent=``.

Every run is compared with the loop written by hand, over several steps of plain descent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from problems import flat, update_of

GAMMA, EPSILON, RATE, STEPS = 0.3, 0.2, 0.1, 5


def loss_fn(params, batch=1.0):
    return jnp.mean(jnp.sin(3 * params["w"] * batch) + params["w"] ** 2 / 2) + params["b"] ** 4


def initial():
    params = {"w": np.linspace(-1.0, 1.0, 6), "b": np.asarray(0.7)}  # no weak type: one trace
    return jax.tree.map(jnp.asarray, params)


ASCENTS = {
    "momentum": optax.trace(0.9),
    "Adam's moments": optax.scale_by_adam(eps=1e-3),
    "clipped": optax.clip_by_global_norm(0.5),
    "noisy": optax.add_noise(0.1, 0.5, key=jax.random.key(7, impl="unsafe_rbg")),
    "trust ratio": optax.scale_by_trust_ratio(),
    "unit momentum": optax.chain(optax.trace(0.9), optax.stateless(gr.normalized)),
}
fd = functools.partial(gr.fd_gradreg, gamma=GAMMA, epsilon=EPSILON)
dbp = functools.partial(gr.dbp_gradreg, gamma=GAMMA)
CASES = {  # ascent -> (regularizer, interval, start)
    "momentum": (dbp, 1, 0),
    "Adam's moments": (fd, 3, 1),
    "clipped": (functools.partial(fd, scheme="backward"), 1, 0),
    "noisy": (fd, 1, 0),
    "trust ratio": (functools.partial(fd, scheme="central"), 1, 0),
    "unit momentum": (fd, 2, 0),
}


@pytest.mark.parametrize("name", ASCENTS)
def test_every_ascent_is_the_one_written_by_hand_and_advances_with_the_penalty(x64, name):
    """By hand: the penalty without state, along the direction that the ascent makes."""
    ascent, (make, interval, start) = ASCENTS[name], CASES[name]
    tx = make(ascent=ascent, interval=interval, start=start)

    def step(carry, i):
        params, state, expected, memory = carry
        gradient = jax.grad(loss_fn)(params)
        updates, state = tx.update(gradient, state, params, value_fn=loss_fn)
        params = optax.tree.add_scale(params, -RATE, updates)

        gradient, due = jax.grad(loss_fn)(expected), (i >= start) & ((i - start) % interval == 0)
        direction, after = ascent.update(gradient, memory, expected)
        alone = make(gamma=due * interval * GAMMA, ascent=lambda *_: direction)
        updates = update_of(alone, gradient, expected, value_fn=loss_fn)
        expected = optax.tree.add_scale(expected, -RATE, updates)
        memory = jax.tree.map(lambda new, old: jnp.where(due, new, old), after, memory)
        return (params, state, expected, memory), None

    start_of_all = initial(), tx.init(initial()), initial(), ascent.init(initial())
    steps = jax.jit(lambda: jax.lax.scan(step, start_of_all, jnp.arange(STEPS))[0])
    found, state, expected, _ = steps()
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)
    assert int(state.step) == STEPS


SUMMED = optax.GradientTransformation(
    lambda params: jnp.zeros([], jnp.bfloat16),
    lambda gradient, state, params=None: (gradient, state + optax.tree.sum(gradient)),
)


@pytest.mark.parametrize("ascent", [*map(ASCENTS.get, ["noisy", "Adam's moments"]), SUMMED])
def test_the_state_keeps_its_structure_and_its_dtypes(ascent):
    """Sums are wide, where the ascent does not begin with a narrow one."""
    params = jax.eval_shape(lambda: jax.tree.map(lambda p: p.astype(jnp.bfloat16), initial()))
    tx = fd(ascent=ascent, interval=2, start=1)
    state = jax.eval_shape(tx.init, params)
    update = functools.partial(tx.update, value_fn=loss_fn)
    assert jax.eval_shape(update, params, state, params) == (params, state)
    dtypes = {x.dtype for x in jax.tree.leaves(state.ascent)}
    assert (jnp.dtype(jnp.bfloat16) in dtypes) == (ascent is SUMMED)


@pytest.mark.parametrize(
    ("tx", "counts"),
    [
        (fd(ascent=ASCENTS["momentum"], scheme="central", start=1, interval=2), [0, 2, 0, 2]),
        (gr.relative_gradreg(strength=0.5, start=2), [0, 0, 1, 1]),
    ],
    ids=["central", "relative"],
)
def test_before_its_start_a_penalty_evaluates_nothing(counter, tx, counts):
    loss, params = counter.wrap(loss_fn), initial()
    gradient = jax.jit(jax.grad(loss_fn))(params)
    update = jax.jit(lambda state: tx.update(gradient, state, params, value_fn=loss))
    state = tx.init(params)
    for count in counts:
        updates, state = update(state)
        assert counter.read() == (count, count)
        if not count:
            np.testing.assert_array_equal(flat(updates), flat(gradient))
    assert int(state.step) == len(counts)


def test_the_groups_of_a_train_step_share_their_mean_and_a_bad_one_keeps_all_from_contributing():
    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params) - 1) ** 2)

    batch = jax.random.normal(jax.random.key(0), (8, 3))
    guarded = optax.apply_if_finite(optax.sgd(RATE), 3)
    tx = fd(ascent=ASCENTS["momentum"])
    init, step = gr.make_train_step(loss, guarded, tx, ascent_groups=4, donate=False)
    state, trace, grad = init(jnp.ones(3)), np.zeros(3), jax.jit(jax.grad(loss))
    for _ in range(2):
        trace = np.asarray(grad(state.params, batch)) + 0.9 * trace
        state, _ = step(state, batch)
    np.testing.assert_allclose(state.opt_state[0].ascent.trace, trace, rtol=1e-5)
    after, _ = step(state, batch.at[3, 1].set(jnp.nan))
    np.testing.assert_array_equal(after.params, state.params)
    before, now = state.opt_state[0].ascent, after.opt_state[0].ascent
    np.testing.assert_array_equal(now.trace, before.trace)
    assert int(after.opt_state[0].step) == 3


def as_numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def poisoned(params, bad):
    """The loss, and NaN on a bad batch."""
    return loss_fn(params) * jnp.where(bad, jnp.nan, 1.0)


@pytest.mark.parametrize(
    "tx",
    [
        fd(ascent=ASCENTS["noisy"], interval=2),
        gr.relative_gradreg(strength=None, ascent=ASCENTS["momentum"]),
    ],
    ids=["lazy noise", "self-tuned momentum"],
)
def test_a_bad_batch_leaves_no_trace_but_in_the_counter(x64, tx):
    """With NaN at a step that takes the penalty the update is NaN, so that a guard behind it skips
    the step, and state and parameters continue as if that batch had not been.
    """
    chain = optax.chain(tx, optax.apply_if_finite(optax.sgd(RATE), 3))

    @jax.jit
    def step(params, state, bad):
        value, gradient = jax.value_and_grad(poisoned)(params, bad)
        loss = functools.partial(poisoned, bad=bad)
        extra = {"value": value, "value_fn": loss, "held_out_fn": loss}
        updates, state = chain.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def along(batches):
        params, state = initial(), chain.init(initial())
        for bad in batches:
            if bad is None:  # as if that batch had not been: only the counter advances
                state = state[0]._replace(step=state[0].step + 1), state[1]
            else:
                params, state = step(params, state, bad)
        return params, state

    params, (state, guard) = along([False] * 2 + [True] + [False] * 3)
    expected, (state_without, _) = along([False] * 2 + [None] + [False] * 3)
    assert int(guard.total_notfinite) == 1
    ends = (params, state), (expected, state_without)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(*map(as_numbers, (a, b)))
        if jnp.issubdtype(a.dtype, jnp.inexact):
            assert np.isfinite(a).all()
    assert step._cache_size() == 1


@pytest.mark.parametrize("make", [fd, dbp, gr.relative_gradreg], ids=["fd", "dbp", "relative"])
def test_what_is_not_finite_does_not_enter_wherever_it_comes_from(x64, make):
    """In the first batch, an infinity of which clipping would make a finite direction, or only at
    the perturbed parameters.
    """
    tx = make(ascent=optax.chain(optax.clip(1.0), optax.scale_by_adam()))
    params, gradient = two.P, jax.grad(two.quartic)(two.P)

    @jax.jit
    def update(state, added, ahead):
        def loss(p):
            return two.quartic(p) + jnp.where(p[0] == params[0], 0.0, ahead) * p[0]

        return tx.update(gradient + added, state, params, value_fn=loss)

    places = {"first": (jnp.nan, 0.0), "infinite": (jnp.inf, 0.0), "ahead": (0.0, jnp.inf)}
    if make is dbp:
        del places["ahead"]  # it evaluates nothing there
    state = tx.init(params)
    for where, bad in places.items():
        updates, after = update(state, *bad)
        if make is fd or where != "ahead":  # relative_gradreg passes the updates through there
            assert not np.isfinite(updates).all()
        np.testing.assert_array_equal(flat(after.ascent), flat(state.ascent))
        assert int(after.step) == 1


def test_an_infinity_that_was_there_from_the_start_may_stay_and_go(x64):
    def update(gradient, state, params=None):
        least = jnp.minimum(state["least"], optax.tree.norm(gradient))
        return gradient, {"least": least, "none yet": state["none yet"]}

    def init(params):
        return {"least": jnp.asarray(jnp.inf), "none yet": jnp.asarray(jnp.nan)}

    tx = fd(ascent=optax.GradientTransformation(init, update))
    gradient = jax.grad(two.quartic)(two.P)
    advance = functools.partial(tx.update, params=two.P, value_fn=two.quartic)
    _, state = advance(gradient * jnp.nan, tx.init(two.P))
    assert state.ascent["least"] == jnp.inf
    _, state = advance(gradient, state)
    np.testing.assert_allclose(state.ascent["least"], np.linalg.norm(gradient))


def test_a_memory_that_would_overflow_stays_as_it_was():
    grows = optax.GradientTransformation(
        lambda params: jnp.float32(1e30), lambda gradient, state, _=None: (gradient, state * state)
    )
    tx = fd(ascent=grows)
    updates, after = tx.update(two.P, tx.init(two.P), two.P, value_fn=two.quartic)
    assert np.isfinite(updates).all()
    assert after.ascent == np.float32(1e30)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_an_ascent_is_handed_the_steepest_direction_in_float32_or_wider(dtype):
    seen = []

    def ascent(gradient, params):
        seen.append((gradient.dtype, params.dtype))
        return gradient

    def loss(params):
        return jnp.sum(jnp.abs(params.astype(jnp.result_type(dtype, jnp.float32))) ** 2)

    tx = gr.fd_gradreg(**two.PENALTY, ascent=ascent)
    jax.eval_shape(lambda params: two.updated(tx, params, loss), jnp.ones(2, dtype))
    wide = jnp.dtype(jnp.promote_types(dtype, jnp.float32))
    assert set(seen) == {(wide, jnp.dtype(dtype))}
