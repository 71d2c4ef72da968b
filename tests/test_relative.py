"""The relative strength: its definition, its invariances, and the self-tuned one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradreg_optax as gr
from gradreg_optax import _self_tuning, relative_gradreg
from problems import batch_of, flat, loss_fn, params_of

TWO = jnp.array([1.0, 2.0])
close = np.testing.assert_allclose


def batches(count):
    return jax.tree.map(lambda *x: np.stack(x), *(batch_of(i, size=16) for i in range(count)))


def train(tx, rate, data, scale=1.0, size=1.0):
    """Parameters along SGD on ``scale`` times the loss of parameters that are ``size`` times as
    long, brought back to their own length.
    """

    def loss(params, batch):
        return scale * loss_fn(jax.tree.map(lambda p: p / size, params), batch)

    def step(carry, batch):
        params, state = carry
        held_out = jax.tree.map(lambda x: x[::-1] * 0.9, batch)
        updates, state = tx.update(
            jax.grad(loss)(params, batch),
            state,
            params,
            value_fn=lambda p: loss(p, batch),
            held_out_fn=lambda p: loss(p, held_out),
        )
        params = optax.tree.add_scale(params, -rate, updates)
        return (params, state), (params, state.strength)

    start = jax.tree.map(lambda p: p * size, params_of())
    _, (path, strength) = jax.lax.scan(step, (start, tx.init(start)), data)
    return jax.tree.map(lambda p: p / size, path), strength


DIRECTIONS = {
    None: "central",
    gr.normalized: "forward",
    gr.adaptive: "backward",
    gr.masked(np.array([True, False, True])): "forward",
}


@jax.jit
def on_a_quadratic(hessian, params, strength, interval):
    """The updates of five steps at the same parameters, and the direction of each."""

    def updates(**options):
        tx = relative_gradreg(
            lambda p: p @ hessian @ p / 2, strength=strength, interval=interval, **options
        )

        def step(state, _):
            updates, state = tx.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), length=5)[1]

    gradient = hessian @ params
    return [
        (updates(ascent=ascent, scheme=scheme), ascent(gradient, params) if ascent else gradient)
        for ascent, scheme in DIRECTIONS.items()
    ]


@pytest.mark.usefixtures("x64")
@given(st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(0.0, 1.5), st.integers(1, 4))
def test_on_a_quadratic_the_correction_has_its_share_along_the_product_with_the_direction(
    seed, curvature, strength, interval
):
    rng = np.random.default_rng(seed)
    root, params = rng.normal(size=(2, 3, 3)), rng.normal(size=3)
    hessian = curvature * (np.eye(3) + root[0] @ root[0].T)
    gradient, due = hessian @ params, np.arange(5) % interval == 0
    size = np.linalg.norm(gradient)
    for found, direction in on_a_quadratic(hessian, params, strength, interval):
        product = hessian @ direction
        correction = np.outer(due * interval * strength, size / np.linalg.norm(product) * product)
        # rounding of a difference over a hundredth of the parameters' length
        close(found, gradient + correction, atol=1e-10 * size)


@pytest.mark.parametrize(("strength", "interval"), [(0.5, 3), (None, 1)])
def test_units_of_the_loss_and_of_the_parameters_do_not_matter(strength, interval):
    tx, data = relative_gradreg(strength=strength, interval=interval), batches(7)
    scale, size = jnp.array([[1.0, 1e-3, 1e3, 1.0, 1.0], [1.0, 1.0, 1.0, 1e-3, 1e3]])
    several = jax.vmap(lambda scale, size: train(tx, 0.1 / scale * size**2, data, scale, size))
    found = jax.jit(several)(scale, size)
    # the rounding of float32 over seven steps
    for leaf in jax.tree.leaves(found):
        close(leaf[1:], np.broadcast_to(leaf[:1], leaf[1:].shape), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("fraction", "interval"), [(1.0, 1), (0.25, 4)])
def test_the_correction_has_the_strength_as_its_share_on_average(fraction, interval):
    strength, params = 0.4, params_of()
    tx = relative_gradreg(strength=strength, interval=interval, reuse_updates=False)

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(loss_fn)(params, batch)
        few = jax.tree.map(lambda b: b[: int(16 * fraction)], batch)
        updates, state = tx.update(gradient, state, params, value_fn=lambda p: loss_fn(p, few))
        correction = optax.tree.norm(optax.tree.sub(updates, gradient))
        params = optax.tree.add_scale(params, -0.02, updates)
        return (params, state), (correction, optax.tree.norm(gradient))

    _, (corrections, norms) = jax.lax.scan(step, (params, tx.init(params)), batches(240))
    # the bound of a single step takes a few percent off, the sampling of the batches another few
    assert np.mean(corrections) / np.mean(norms) == pytest.approx(strength, rel=0.15)
    assert np.all(corrections <= 2 * interval * strength * norms * (1 + 1e-4))


def test_a_flat_batch_does_not_carry_the_scale_away():
    tx = relative_gradreg(strength=0.5)
    state, flat, steep = tx.init(TWO), 1e-4, 1.0

    @jax.jit
    def update(state, curvature):
        def loss(p):  # a slope that stays, so that the ratio |g| / |R| of the flat batch is huge
            return curvature * jnp.sum(p**2) / 2 + jnp.sum(p)

        gradient = jax.grad(loss)(TWO)
        return gradient, *tx.update(gradient, state, TWO, value_fn=loss)

    for curvature in (steep, flat, steep):
        gradient, updates, state = update(state, curvature)
        assert np.linalg.norm(updates - gradient) <= (0.5 * 2 + 1e-3) * np.linalg.norm(gradient)
    assert state.scale < 3  # the mean of the three ratios is in the thousands


@jax.jit
def along_the_gradient(params, strength):
    """The gradient's inner product with the updates and with itself, on a loss concave in places"""
    tx = relative_gradreg(strength=strength, decay=0.0)

    def value_fn(p):
        return -loss_fn(p, batch_of())

    gradient = jax.grad(value_fn)(params)
    updates, _ = tx.update(gradient, tx.init(params), params, value_fn=value_fn)
    return [optax.tree.vdot(gradient, other) for other in (updates, gradient)]


@given(seed=st.integers(0, 99), strength=st.floats(0.0, 1.0))
def test_up_to_one_the_update_does_not_ascend_where_the_scale_is_exact(seed, strength):
    inner, squared = along_the_gradient(params_of(seed), strength)
    assert inner >= -1e-4 * squared


LOSSES_WITHOUT_A_RATIO = {
    "zero": lambda p: 0.0 * jnp.sum(p),
    "linear": jnp.sum,
    "infinite ahead": lambda p: jnp.sum(p) + jnp.where(jnp.sum(p) > 3.0, jnp.inf, 0.0) * jnp.sum(p),
}


@pytest.mark.parametrize("kind", LOSSES_WITHOUT_A_RATIO)
def test_a_ratio_that_is_zero_or_not_finite_changes_nothing(kind):
    tx, loss = relative_gradreg(strength=0.5), LOSSES_WITHOUT_A_RATIO[kind]

    @jax.jit
    def two_updates():
        _, state = tx.update(TWO, tx.init(TWO), TWO, value_fn=lambda p: jnp.sum(p**2) / 2)
        gradient = jax.grad(loss)(TWO)
        return gradient, state, *tx.update(gradient, state, TWO, value_fn=loss)

    gradient, state, updates, after = two_updates()
    np.testing.assert_array_equal(updates, gradient)
    assert (after.scale, after.norms) == (state.scale, state.norms)


def test_parameters_of_zero_length_wait_for_the_first_step():
    params, tx = jnp.zeros(2), relative_gradreg(lambda p: jnp.sum((p - 1.0) ** 2) / 2, strength=0.5)
    update = jax.jit(tx.update)
    updates, state = update(params - 1.0, tx.init(params), params)
    np.testing.assert_array_equal(updates, [-1.0, -1.0])
    moved = params - 0.1 * updates
    updates, _ = update(moved - 1.0, state, moved)
    close(updates, 1.5 * (moved - 1.0), rtol=1e-4)


# --- the self-tuned strength, of given losses


@jax.jit
def _strengths(losses):
    tx = relative_gradreg(lambda p: jnp.sum(p**2), strength=None)

    def step(state, losses):
        own, other = losses
        _, state = tx.update(2 * TWO, state, TWO, value=own, held_out_fn=lambda p: other)
        return state, state.strength

    return jax.lax.scan(step, tx.init(TWO), losses)[1]


def tuned(training, held_out):
    """The strengths that self-tuning finds for given losses, 400 of each: one program."""
    return np.asarray(_strengths((jnp.asarray(training), jnp.asarray(held_out))))


FALLING = 2.3 * 0.99 ** np.arange(400)
CONSTANT = np.full(400, 2.3)
HARDER = FALLING + np.minimum(0.6, 6 * (2.3 - FALLING))  # a gap of its own, soon there
REMEMBERED = 2.3 - 0.4 * (2.3 - FALLING)  # a gap that grows with the progress


HELD_OUT = {  # losses, the strength that they lead to, and its tolerance
    "all progress carries over": (FALLING, 0, 0.01),
    "nothing carries over": (CONSTANT, 1, 0.01),
    "harder by itself": (HARDER, 0, 0.05),
    "a gap that grows": (REMEMBERED, 1, 0.05),
    # recently nothing carries over, and it is little
    "a small share is memorised": (np.maximum(FALLING, 0.08), 0, 0.05),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_strength_follows_what_does_not_carry_over(name):
    held_out, strength, tolerance = HELD_OUT[name]
    assert tuned(FALLING, held_out)[-1] == pytest.approx(strength, abs=tolerance)


@pytest.mark.usefixtures("x64")  # the first progress is the difference of almost equal losses
def test_units_and_offsets_of_the_losses_do_not_matter_to_the_strength():
    held_out = FALLING + 0.1 * (1 - 0.99 ** np.arange(400))
    expected = tuned(FALLING, held_out)
    assert expected[4] == 0  # so far it may be noise
    assert 0.2 < expected[-1] < 0.8
    for a, b in [(1e-3, 0.0), (1e3, 0.0), (1.0, 3.0), (2.0, -5.0)]:
        close(tuned(a * (FALLING + b), a * (held_out + b)), expected, atol=1e-9)


def test_a_gap_is_known_as_well_as_its_standard_error_says():
    """Over many trainings on one and the same loss but for normal noise, of different size on both
    sets of samples, the gap between the running means spreads by the error that each estimates.
    """
    noise = jax.random.normal(jax.random.key(0), (1000, 200, 2)) * jnp.array([[[0.3, 0.1]]])

    @jax.jit
    @jax.vmap
    def along(losses):
        def step(state, pair):
            state = _self_tuning._update_losses(state, *pair)
            gap = state.recent[1] - state.recent[0]
            return state, (gap, _self_tuning._gap_error(state))

        state = relative_gradreg(strength=None).init(jnp.zeros(1)).losses
        return jax.lax.scan(step, state, losses)[1]

    gaps, errors = along(1.0 + noise)
    for n in (20, 60, 200):
        spread, estimated = float(np.std(gaps[:, n - 1])), float(np.mean(errors[:, n - 1]))
        assert estimated == pytest.approx(spread, rel=0.1), n


def test_a_gap_within_its_noise_asks_for_nothing():
    """All progress carries over, with few held-out samples: without the standard error a
    strength would be found in one update of seven.
    """
    noise = np.random.default_rng(0).normal(size=(20, 2, 400)) * np.array([[[0.1], [0.3]]])
    found = np.stack([tuned(*(FALLING + pair)) for pair in noise])
    assert np.mean(found > 0) < 0.02


@given(
    seed=st.integers(0, 99),
    size=st.floats(1e-3, 1e2),
    level=st.floats(-9.0, 9.0),
    gap=st.floats(0, 1),
)
def test_on_a_plateau_the_strength_is_zero_whatever_the_gap(seed, size, level, gap):
    # batches of one and the same loss but for their noise, the held-out loss above it
    noise = np.random.default_rng(seed).uniform(-1, 1, size=(2, 400))
    training, held_out = level + size * noise
    assert not tuned(training, held_out + gap * size).any()


def test_a_plateau_that_is_left_is_no_hindrance():
    plateau = 2.3 + np.random.default_rng(0).uniform(-0.02, 0.02, size=200)
    found = tuned([*plateau, *FALLING[:200]], CONSTANT)
    assert not found[:200].any()
    assert found[240] == found[-1] == 1


def test_the_strength_answers_within_the_memory_of_the_losses():
    i, noise = np.arange(400), np.random.default_rng(0).normal(size=(2, 400)) / 20
    learnt = 2.3 - 1.3 * np.minimum(i / 40, 1)  # carries over, and then no more
    memory = learnt - 0.9 * np.clip((i - 320) / 16, 0, 1)
    found = tuned(memory + noise[0], learnt + noise[1])
    assert found[320] < 0.1
    assert found[344] == 1


def test_a_gap_before_anything_is_learnt_counts_for_nothing():
    warming_up = 2.3 + np.random.default_rng(0).normal(size=60) / 100
    losses = np.concatenate([warming_up, FALLING[:340]])
    # as it falls with the training loss, it is no recent memorisation either
    assert not tuned(losses, losses + 0.3).any()


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing(lost):
    training, held_out = FALLING.copy(), REMEMBERED.copy()
    training[60], held_out[61] = lost, lost
    found = tuned(training, held_out)
    assert 0 < found[59] == found[60] == found[61]


@given(
    st.lists(st.sampled_from([-1e3, 0.0, 0.1, 2.3, 1e3, np.inf, np.nan]), min_size=8, max_size=8)
)
def test_the_strength_stays_between_zero_and_one_whatever_the_losses(losses):
    found = tuned(losses * 50, losses[::-1] * 50)
    assert np.all((found >= 0) & (found <= 1))


# --- evaluations, state and arguments


def test_what_a_step_evaluates_is_what_the_docstring_counts(counter):
    training, held_out = counter.wrap(lambda p: jnp.sum(p**4)), type(counter)()
    other = held_out.wrap(lambda p: jnp.sum(p**4))
    tx, counts = relative_gradreg(training, strength=None, interval=4, start=1), []
    update = jax.jit(lambda s: tx.update(4 * TWO**3, s, TWO, value=17.0, held_out_fn=other)[1])
    state = tx.init(TWO)
    for _ in range(6):
        state = update(state)
        counts.append((counter.read()[1], *held_out.read()))
    idle, due = (0, 0, 0), (1, 1, 0)  # gradients of the loss; evaluations, gradients held out
    assert counts == [idle, due, idle, idle, idle, due]


def test_the_state_reads_the_strength_of_a_schedule():
    tx = relative_gradreg(lambda p: jnp.sum(p**2) / 2, strength=lambda step: 0.1 * step)
    state = tx.init(TWO)
    for step in range(3):
        updates, state = tx.update(TWO, state, TWO)
        assert optax.tree.get(state, "strength") == pytest.approx(0.1 * step)
        close(updates, (1 + 0.1 * step) * TWO, rtol=1e-4)


def test_equal_groups_are_the_whole_batch_and_a_part_is_a_penalty_on_its_own_gradient():
    twice, ends = jax.tree.map(lambda b: np.concatenate([b, b]), batch_of()), []
    # the part is the first half, which is the same samples
    for options in ({}, {"ascent_groups": 2}, {"penalty_fraction": 0.5}):
        init, step = gr.make_train_step(loss_fn, optax.sgd(0.1), relative_gradreg(), **options)
        state = init(params_of())
        for _ in range(3):
            state, _ = step(state, twice)
        ends.append((state.params, optax.tree.get(state.opt_state, "scale")))
    (whole, scale), *others = ends
    for params, other_scale in others:
        # float32: the same sums in another order, over three steps
        close(flat(params), flat(whole), rtol=1e-4, atol=1e-5)
        close(other_scale, scale, rtol=1e-3)


def test_the_train_step_hands_it_the_held_out_batch_and_the_part():
    tx, batch, held_out = relative_gradreg(strength=None), batch_of(0), batch_of(1)
    init, step = gr.make_train_step(loss_fn, optax.adam(0.01), tx, penalty_fraction=0.25)
    state, _ = step(init(params_of()), batch, held_out=held_out)
    expected = [loss_fn(params_of(), each) for each in (batch, held_out)]
    close(optax.tree.get(state.opt_state, "last"), expected, rtol=1e-6)


def fourth(p):
    return sum(jnp.sum(x.astype(jnp.float32) ** 4) / 4 for x in p)


def test_an_update_of_zero_is_not_remembered():
    for reuse in (True, False):
        tx, params = relative_gradreg(fourth, reuse_updates=reuse), [TWO]
        _, state = jax.jit(tx.update)([TWO**3], tx.init(params), params)
        updates, after = tx.update([jnp.zeros(2)], state, [jnp.zeros(2)] if reuse else params)
        assert not reuse or not np.asarray(updates).any()
        assert after.norms == state.norms


def test_narrow_and_wide_leaves_need_no_promotion(x64):
    params = [jnp.ones(3, jnp.float32), jnp.ones(2, jnp.float16)]
    tx = relative_gradreg(fourth)
    update = jax.jit(lambda state: tx.update(jax.grad(fourth)(params), state, params))
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(state)
    assert [x.dtype for x in updates] == [x.dtype for x in params]


def test_a_state_made_before_x64_keeps_its_dtypes():
    tx, params = relative_gradreg(fourth), [TWO]
    state = tx.init(params)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        _, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_the_ascent_step_follows_the_norms_of_the_penalised_gradient(x64):
    """Incoming updates of another length change the scale, and not epsilon."""
    params, updates = np.asarray([1.0, -0.5, 2.0]), jnp.asarray([30.0, 0.0, -40.0])
    tx = relative_gradreg(lambda p: jnp.sum(p**4) / 4, strength=0.5, reuse_updates=False)
    update = jax.jit(tx.update)
    _, state = update(updates, tx.init(params), params)
    found, _ = update(updates, state, params)

    own, products, norm = params**3, [], np.linalg.norm
    for epsilon in (0.01 * norm(params) / norm(own), None):
        step = norm(own) / norm(products[0]) if epsilon is None else epsilon
        products.append(((params + step * own) ** 3 - own) / step)
    lengths = [norm(product) for product in products]
    scale = 1.9 * norm(updates) / (0.9 * lengths[0] + lengths[1])
    scale = min(scale, 2 * norm(updates) / lengths[1])
    close(found, updates + 0.5 * scale * products[1], rtol=1e-6)


def test_a_stateful_ascent_advances_with_the_updates_that_take_the_penalty():
    """Momentum of the gradient: 0.9 g1 + g3, since the second update is skipped."""
    tx = relative_gradreg(fourth, strength=0.5, ascent=optax.trace(0.9), interval=2)
    several = np.asarray([[1.0, -0.5], [5.0, 5.0], [0.5, 2.0]], np.float32)
    update, state = jax.jit(tx.update), tx.init([several[0]])
    for p in several:
        _, state = update([p**3], state, [p])
    close(state.ascent.trace[0], 0.9 * several[0] ** 3 + several[2] ** 3, 1e-6)
