"""The relative strength: its definition, its invariances, and the self-tuned one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import (
    _self_tuning,
    adaptive,
    make_train_step,
    masked,
    normalized,
    relative_gradreg,
)

KEY = jax.random.key(0)


def network_loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def network(key: jax.Array = KEY) -> Any:
    first, second = jax.random.split(key)
    return {"in": jax.random.normal(first, (4, 8)) / 2, "out": jax.random.normal(second, (8,)) / 3}


def batches(count: int, size: int = 16) -> Any:
    x = jax.random.normal(KEY, (count, size, 4))
    noise = 0.3 * jax.random.normal(jax.random.key(1), (count, size))
    return x, jnp.sin(jnp.sum(x, axis=-1)) + noise


def train(
    tx: Any, rate: float, data: Any, params: Any, scale: float = 1.0, size: float = 1.0
) -> Any:
    """Parameters along SGD on ``scale`` times the loss of parameters that are ``size`` times as
    long, brought back to their own length.
    """

    def loss(params: Any, batch: Any) -> jax.Array:
        return scale * network_loss(jax.tree.map(lambda p: p / size, params), batch)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        gradient = jax.grad(loss)(params, batch)
        updates, state = tx.update(
            gradient,
            state,
            params,
            value_fn=lambda p: loss(p, batch),
            held_out_fn=lambda p: loss(p, jax.tree.map(lambda x: x[::-1] * 0.9, batch)),
        )
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, state), (params, state.strength)

    start = jax.tree.map(lambda p: p * size, params)
    _, (path, strength) = jax.jit(lambda c: jax.lax.scan(step, c, data))((start, tx.init(start)))
    return jax.tree.map(lambda p: p / size, path), strength


@pytest.mark.usefixtures("x64")
@given(
    seed=st.integers(0, 99),
    dim=st.integers(1, 5),
    curvature=st.floats(1e-3, 1e3),
    strength=st.floats(0.0, 1.5),
    interval=st.integers(1, 4),
    scheme=st.sampled_from(["forward", "backward", "central"]),
)
def test_on_an_isotropic_quadratic_the_update_is_one_plus_strength_times_the_gradient(
    seed: int, dim: int, curvature: float, strength: float, interval: int, scheme: Any
) -> None:
    params = jnp.asarray(np.random.default_rng(seed).normal(size=dim))
    tx = relative_gradreg(strength=strength, scheme=scheme, interval=interval)
    state, gradient = tx.init(params), curvature * params
    update = jax.jit(
        lambda state: tx.update(
            gradient, state, params, value_fn=lambda x: curvature * jnp.sum(x**2) / 2
        )
    )
    for step in range(interval + 1):
        updates, state = update(state)
        factor = 1 + interval * strength * (step % interval == 0)
        # rounding of a difference over a hundredth of the parameters' length
        np.testing.assert_allclose(updates, factor * gradient, rtol=1e-10)


@pytest.mark.parametrize("strength", [0.5, None])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("interval", [1, 3])
def test_units_of_the_loss_and_of_the_parameters_do_not_matter(
    strength: float | None, factor: float, interval: int
) -> None:
    tx = relative_gradreg(strength=strength, interval=interval)
    data, params = batches(12), network()
    reference = train(tx, 0.1, data, params)
    scaled_loss = train(tx, 0.1 / factor, data, params, scale=factor)
    scaled_parameters = train(tx, 0.1 * factor**2, data, params, size=factor)
    # the rounding of float32 over twelve steps, as the acceptance has it
    for other in (scaled_loss, scaled_parameters):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), reference, other
        )


def test_the_length_of_the_ascent_direction_does_not_matter() -> None:
    data, params = batches(12), network()
    path, _ = train(relative_gradreg(strength=0.5, decay=0.0), 0.1, data, params)
    unit, _ = train(relative_gradreg(strength=0.5, decay=0.0, ascent=normalized), 0.1, data, params)
    # from the second step on the reach is that of the step before, in other units of the direction
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=1e-4), path, unit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), path, unit)


@pytest.mark.parametrize(("fraction", "interval"), [(1.0, 1), (0.25, 4)])
def test_the_correction_has_the_strength_as_its_share_on_average(
    fraction: float, interval: int
) -> None:
    strength, (x, y), params = 0.4, batches(240), network()
    tx = relative_gradreg(strength=strength, interval=interval, reuse_updates=False)
    part = int(16 * fraction)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        gradient = jax.grad(network_loss)(params, batch)
        few = jax.tree.map(lambda b: b[:part], batch)
        updates, state = tx.update(gradient, state, params, value_fn=lambda p: network_loss(p, few))
        correction = optax.tree.norm(jax.tree.map(jnp.subtract, updates, gradient))
        params = jax.tree.map(lambda p, u: p - 0.02 * u, params, updates)
        return (params, state), (correction, optax.tree.norm(gradient))

    _, (corrections, norms) = jax.lax.scan(step, (params, tx.init(params)), (x, y))
    # the bound of a single step takes a few percent off, the sampling of the batches another few
    assert np.mean(corrections) / np.mean(norms) == pytest.approx(strength, rel=0.15)
    assert np.all(corrections <= 2 * interval * strength * norms * (1 + 1e-4))


def test_a_flat_batch_does_not_carry_the_scale_away() -> None:
    params, tx = jnp.array([1.0, 2.0]), relative_gradreg(strength=0.5)
    state = tx.init(params)
    flat, steep = 1e-4, 1.0
    for curvature in (steep, flat, steep):
        # a slope that stays, so that the ratio |g| / |R| of the flat batch is huge

        def loss(p: Any, c: float = curvature) -> Any:
            return c * jnp.sum(p**2) / 2 + jnp.sum(p)

        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value_fn=loss)
        share = jnp.linalg.norm(updates - gradient) / jnp.linalg.norm(gradient)
        assert share <= 0.5 * 2 + 1e-3
    assert state.scale < 3  # the mean of the three ratios is in the thousands


@given(seed=st.integers(0, 99), strength=st.floats(0.0, 1.0))
def test_up_to_one_the_update_does_not_ascend_where_the_scale_is_exact(
    seed: int, strength: float
) -> None:
    params = network(jax.random.key(seed))
    x, y = batches(1)

    def value_fn(p: Any) -> Any:
        return -network_loss(p, (x[0], y[0]))  # concave in places

    gradient, tx = jax.grad(value_fn)(params), relative_gradreg(strength=strength, decay=0.0)
    updates, _ = tx.update(gradient, tx.init(params), params, value_fn=value_fn)
    inner = optax.tree.vdot(gradient, updates)
    assert inner >= -1e-4 * optax.tree.vdot(gradient, gradient)


def _finite_then(kind: str) -> Any:
    if kind == "zero":
        return lambda p: 0.0 * jnp.sum(p)
    if kind == "linear":
        return lambda p: jnp.sum(p)
    return lambda p: jnp.sum(p) + jnp.where(jnp.sum(p) > 3.0, jnp.inf, 0.0) * jnp.sum(p)


@pytest.mark.parametrize("kind", ["zero", "linear", "infinite ahead"])
def test_a_ratio_that_is_zero_or_not_finite_changes_nothing(kind: str) -> None:
    params, tx = jnp.array([1.0, 2.0]), relative_gradreg(strength=0.5)

    def square(p: Any) -> Any:
        return jnp.sum(p**2) / 2

    _, state = tx.update(params, tx.init(params), params, value_fn=square)
    loss = _finite_then(kind)
    gradient = jax.grad(loss)(params)
    updates, after = tx.update(gradient, state, params, value_fn=loss)
    np.testing.assert_array_equal(updates, gradient)
    assert (after.scale, after.norms) == (state.scale, state.norms)


def test_parameters_of_zero_length_wait_for_the_first_step() -> None:
    params, tx = jnp.zeros(2), relative_gradreg(strength=0.5)

    def loss(p: Any) -> Any:
        return jnp.sum((p - 1.0) ** 2) / 2

    updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    np.testing.assert_array_equal(updates, [-1.0, -1.0])
    moved = params - 0.1 * updates
    updates, _ = tx.update(jax.grad(loss)(moved), state, moved, value_fn=loss)
    np.testing.assert_allclose(updates, 1.5 * (moved - 1.0), rtol=1e-4)


def _bowl(params: Any) -> Any:
    return jnp.sum(params**2)


@jax.jit
def _strengths(losses: Any) -> Any:
    tx, params = relative_gradreg(strength=None), jnp.array([1.0, 2.0])

    def step(state: Any, losses: Any) -> Any:
        own, other = losses
        extra = {"value": own, "value_fn": _bowl, "held_out_fn": lambda p: other}
        _, state = tx.update(2 * params, state, params, **extra)
        return state, state.strength

    return jax.lax.scan(step, tx.init(params), losses)[1]


def _tuned(training: Any, held_out: Any) -> Any:
    """Strengths that self-tuning finds for given losses."""
    return np.asarray(_strengths((jnp.asarray(training), jnp.asarray(held_out))))


FALLING = [2.3 * 0.99**i for i in range(400)]


def test_where_all_progress_carries_over_the_penalty_fades() -> None:
    assert _tuned(FALLING, FALLING)[-1] < 0.01


def test_where_nothing_carries_over_the_penalty_is_full() -> None:
    assert _tuned(FALLING, [2.3] * 400)[-1] > 0.99


@pytest.mark.usefixtures("x64")  # the first progress is the difference of almost equal losses
@pytest.mark.parametrize(("a", "b"), [(1e-3, 0.0), (1e3, 0.0), (1.0, 3.0), (2.0, -5.0)])
def test_units_and_offsets_of_the_losses_do_not_matter_to_the_strength(a: float, b: float) -> None:
    held_out = [x + 0.1 * (1 - 0.99**i) for i, x in enumerate(FALLING)]
    expected = _tuned(FALLING, held_out)
    moved = _tuned([a * (x + b) for x in FALLING], [a * (x + b) for x in held_out])
    assert expected[4] == 0  # so far it may be noise
    assert 0.2 < expected[-1] < 0.8
    np.testing.assert_allclose(moved, expected, atol=1e-9)


def test_a_gap_is_known_as_well_as_its_standard_error_says() -> None:
    """Over many trainings on one and the same loss but for normal noise, of different size on both
    sets of samples, the gap between the running means spreads by the error that each estimates.
    """
    noise = jax.random.normal(jax.random.key(0), (1000, 200, 2)) * jnp.array([[[0.3, 0.1]]])

    @jax.jit
    @jax.vmap
    def along(losses: Any) -> Any:
        def step(state: Any, pair: Any) -> Any:
            state = _self_tuning._update_losses(state, *pair)
            gap = state.recent[1] - state.recent[0]
            return state, (gap, _self_tuning._gap_error(state))

        state = relative_gradreg(strength=None).init(jnp.zeros(1)).losses
        return jax.lax.scan(step, state, losses)[1]

    gaps, errors = along(1.0 + noise)
    for n in (20, 60, 200):
        spread, estimated = float(np.std(gaps[:, n - 1])), float(np.mean(errors[:, n - 1]))
        assert estimated == pytest.approx(spread, rel=0.1), n


def test_a_gap_within_its_noise_asks_for_nothing() -> None:
    """All progress carries over, with few held-out samples: without the standard error a
    strength would be found in one update of seven.
    """
    noise = np.random.default_rng(0).normal(size=(20, 2, 400)) * np.array([[[0.1], [0.3]]])
    found = np.stack([_tuned(*(np.array(FALLING) + pair)) for pair in noise])
    assert np.mean(found > 0) < 0.02


@given(
    seed=st.integers(0, 99),
    size=st.floats(1e-3, 1e2),
    level=st.floats(-9.0, 9.0),
    gap=st.floats(0, 1),
)
def test_on_a_plateau_the_strength_is_zero_whatever_the_gap(
    seed: int, size: float, level: float, gap: float
) -> None:
    # batches of one and the same loss but for their noise, the held-out loss above it
    noise = np.random.default_rng(seed).uniform(-1, 1, size=(2, 400))
    training, held_out = level + size * noise
    assert not _tuned(list(training), list(held_out + gap * size)).any()


def test_a_plateau_that_is_left_is_no_hindrance() -> None:
    plateau = list(2.3 + np.random.default_rng(0).uniform(-0.02, 0.02, size=200))
    found = _tuned(plateau + FALLING, [2.3] * 600)
    assert not found[:200].any()
    assert found[240] == found[-1] == 1


def test_the_strength_answers_within_the_memory_of_the_losses() -> None:
    learnt = [2.3 - 1.3 * min(i / 100, 1) for i in range(1000)]  # carries over, and then no more
    memory = [x - 0.9 * max(0, min((i - 800) / 40, 1)) for i, x in enumerate(learnt)]
    noise = np.random.default_rng(0).normal(size=(2, 1000)) / 20
    found = _tuned(memory + noise[0], learnt + noise[1])
    assert found[800] < 0.1
    assert found[860] == 1


def test_a_gap_before_anything_is_learnt_counts_for_nothing() -> None:
    noise = np.random.default_rng(0).normal(size=60) / 100
    warming_up = list(2.3 + noise)
    found = _tuned(warming_up + FALLING, [x + 0.3 for x in warming_up + FALLING])
    assert (
        not found.any()
    )  # as it falls with the training loss, it is no recent memorisation either


def test_a_held_out_set_that_is_harder_by_itself_is_not_taken_for_memory() -> None:
    harder = [x + min(0.6, 6 * (2.3 - x)) for x in FALLING]  # a gap of its own, soon there
    assert _tuned(FALLING, harder)[-1] < 0.05
    remembered = [2.3 - 0.4 * (2.3 - x) for x in FALLING]  # a gap that grows with the progress
    assert _tuned(FALLING, remembered)[-1] > 0.95


def test_a_small_share_of_the_progress_may_be_memorised() -> None:
    last = [max(x, 0.08) for x in FALLING]  # recently nothing carries over, and it is little
    assert _tuned(FALLING, last)[-1] < 0.05


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing(lost: float) -> None:
    held_out = [2.3] * 60
    (*_, before), (*_, after) = (
        _tuned(training, held)
        for training, held in (
            (FALLING[:60], held_out),
            ([*FALLING[:60], lost, 1.0], [*held_out, 2.3, lost]),
        )
    )
    assert before == after


@given(
    st.lists(st.sampled_from([-1e3, 0.0, 0.1, 2.3, 1e3, np.inf, np.nan]), min_size=8, max_size=8)
)
def test_the_strength_stays_between_zero_and_one_whatever_the_losses(losses: list[float]) -> None:
    found = _tuned(losses, losses[::-1])
    assert np.all((found >= 0) & (found <= 1))


def test_what_a_step_evaluates_is_what_the_docstring_counts(counter: Any) -> None:
    training, held_out = counter.wrap(lambda p: jnp.sum(p**4)), type(counter)()
    other = held_out.wrap(lambda p: jnp.sum(p**4))
    params, tx = jnp.array([1.0, 2.0]), relative_gradreg(strength=None, interval=4, start=1)
    state = tx.init(params)
    update = jax.jit(
        lambda state, value: tx.update(
            4 * params**3, state, params, value=value, value_fn=training, held_out_fn=other
        )[1]
    )
    counts = []
    for _ in range(6):
        state = update(state, 17.0)
        counts.append((counter.read()[1], *held_out.read()))
    idle, due = (0, 0, 0), (1, 1, 0)  # gradients of the loss; evaluations, gradients held out
    assert counts == [idle, due, idle, idle, idle, due]


@pytest.mark.parametrize("strength", [0.5, None])
def test_one_trace_and_a_state_that_keeps_its_form(strength: float | None) -> None:
    tx, params, traces = relative_gradreg(strength=strength, interval=2), network(), []
    data = batches(10)

    @jax.jit
    def update(state: Any, batch: Any) -> Any:
        traces.append(1)
        gradient = jax.grad(network_loss)(params, batch)

        def loss(p: Any) -> Any:
            return network_loss(p, batch)

        return tx.update(gradient, state, params, value_fn=loss, held_out_fn=loss)[1]

    state = tx.init(params)
    form = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(10):
        state = update(state, jax.tree.map(lambda x, i=i: x[i], data))
    assert (len(traces), int(state.step)) == (1, 10)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == form


def test_lanes_of_a_vmap_over_strength_are_single_runs() -> None:
    data, params = batches(6), network()

    def run(strength: Any) -> Any:
        return train(relative_gradreg(strength=strength), 0.1, data, params)[0]["out"]

    together = jax.vmap(run)(jnp.array([0.0, 0.5, 1.0]))
    for lane, strength in zip(together, (0.0, 0.5, 1.0), strict=True):
        np.testing.assert_allclose(lane, run(strength), rtol=1e-4, atol=1e-5)


def test_the_state_reads_the_strength_of_a_schedule() -> None:
    tx, params = relative_gradreg(strength=lambda step: 0.1 * step), jnp.array([1.0, 2.0])
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(params, state, params, value_fn=lambda p: jnp.sum(p**2) / 2)
        assert optax.tree.get(state, "strength") == pytest.approx(0.1 * step)
        np.testing.assert_allclose(updates, (1 + 0.1 * step) * params, rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "ascent", [None, normalized, adaptive, masked(jnp.array([True, False, True]))]
)
def test_the_correction_goes_along_the_product_with_the_ascent_direction(ascent: Any) -> None:
    root = np.random.default_rng(0).normal(size=(3, 3))
    hessian, params = root @ root.T, jnp.array([1.0, -2.0, 0.5])
    gradient = hessian @ params
    product = hessian @ (gradient if ascent is None else ascent(gradient, params))
    size = jnp.linalg.norm(gradient) / jnp.linalg.norm(product)
    tx = relative_gradreg(strength=0.3, decay=0.0, ascent=ascent)
    updates, _ = tx.update(
        gradient, tx.init(params), params, value_fn=lambda p: p @ hessian @ p / 2
    )
    np.testing.assert_allclose(updates, gradient + 0.3 * size * product, rtol=1e-9)


def test_equal_groups_are_the_whole_batch_and_a_part_is_a_penalty_on_its_own_gradient() -> None:
    x, y = jax.tree.map(lambda b: b[0], batches(1))
    twice = jax.tree.map(lambda b: jnp.concatenate([b, b]), (x, y))
    found = {}
    for name, options in {
        "whole": {},
        "groups": {"ascent_groups": 2},
        "part": {"penalty_fraction": 0.5},  # the first half, which is the same samples
    }.items():
        init, step = make_train_step(network_loss, optax.sgd(0.1), relative_gradreg(), **options)
        state = init(network())
        for _ in range(5):
            state, _ = step(state, twice)
        found[name] = state
    for name in ("groups", "part"):
        jax.tree.map(
            # float32: the same sums in another order, over five steps
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            found[name].params,
            found["whole"].params,
        )
    scales = [optax.tree.get(state.opt_state, "scale") for state in found.values()]
    np.testing.assert_allclose(scales[1:], scales[0], rtol=1e-3)


def test_the_train_step_hands_it_the_held_out_batch_and_the_part() -> None:
    x, y = batches(40)
    init, step = make_train_step(
        network_loss,
        optax.adam(0.01),
        relative_gradreg(strength=None, interval=2),
        penalty_fraction=0.25,
    )
    state = init(network())
    for _ in range(40):
        state, _ = step(state, (x[0], y[0]), held_out=(x[1], y[1]))
    assert float(optax.tree.get(state.opt_state, "strength")) >= 0.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"strength": -0.1}, "strength must be finite and >= 0"),
        ({"reach": 0.0}, "reach must be finite and > 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"interval": 0}, "interval must be a whole number >= 1"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"relative_gradreg: {sentence}"):
        relative_gradreg(**arguments)


def test_a_strength_that_tunes_itself_says_what_it_needs() -> None:
    tx, params = relative_gradreg(strength=None), jnp.array([1.0, 2.0])
    with pytest.raises(TypeError, match=r"relative_gradreg: .*held_out_fn=.*held_out="):
        tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))


def test_an_update_without_a_gradient_is_not_remembered():
    def loss(p):
        return jnp.sum(p**4)

    tx = relative_gradreg(loss)
    params = jnp.asarray([1.0, 2.0])
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    flat = jnp.zeros(2)
    updates, after = tx.update(flat, state, flat)
    np.testing.assert_array_equal(updates, flat)
    assert after.norms == state.norms


def test_narrow_and_wide_leaves_need_no_promotion(x64):
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.float16)}

    def loss(p):
        return sum(jnp.sum(x.astype(jnp.float32) ** 4) for x in jax.tree.leaves(p))

    tx = relative_gradreg(loss)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)


def test_an_update_of_zero_is_not_remembered_where_the_gradient_is_evaluated_anew():
    def loss(p):
        return jnp.sum(p**4)

    tx, params = relative_gradreg(loss, reuse_updates=False), jnp.asarray([1.0, 2.0])
    _, state = tx.update(params, tx.init(params), params)
    _, after = tx.update(jnp.zeros(2), state, params)
    assert after.norms == state.norms


def test_a_state_made_before_x64_keeps_its_dtypes():
    params = jnp.asarray([1.0, 2.0])
    tx = relative_gradreg()
    state = tx.init(params)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        _, after = tx.update(params, state, params, value_fn=lambda p: jnp.sum(p**4) / 4)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@jax.custom_vjp
def scale_cotangent(x: Any, factor: Any) -> Any:
    """``x``, whose cotangent is multiplied by ``factor``."""
    return x


def _scaled_back(factor: Any, cotangent: Any) -> Any:
    return jax.tree.map(lambda c: c * factor, cotangent), None


scale_cotangent.defvjp(lambda x, factor: (x, factor), _scaled_back)
SCALES = {
    "constant": [2.0**10] * 12,
    "doubles twice": [1.0] * 4 + [2.0] * 4 + [4.0] * 4,
    "falls by 16": [16.0] * 6 + [1.0] * 6,
    "halves again and again": [2.0 ** (10 - min(i, 10)) for i in range(12)],
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strength", [0.5, None])
@pytest.mark.parametrize("name", SCALES)
def test_a_loss_scale_that_changes_belongs_inside_the_loss(
    name: str, strength: float | None
) -> None:
    """The scale multiplies what goes back through the network, and is divided out at the
    parameters: loss and gradient are those without a scale, and so is the trajectory.
    """
    seen: list[float] = []

    def loss(params: Any, batch: Any) -> Any:
        *batch, scale = batch
        params = scale_cotangent(params, 1 / scale)
        hidden = jnp.tanh(batch[0] @ params["in"])

        @jax.custom_vjp
        def seeing(x: Any) -> Any:
            return x

        def back(_: None, cotangent: Any) -> Any:
            jax.debug.callback(lambda c: seen.append(float(jnp.abs(c).max())), cotangent)
            return (cotangent,)

        seeing.defvjp(lambda x: (x, None), back)
        value = jnp.mean((seeing(hidden) @ params["out"] - batch[1]) ** 2)
        return scale_cotangent(value, scale)

    def run(loss: Any, data: Any) -> Any:
        tx = relative_gradreg(strength=strength)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            extra = dict.fromkeys(["value_fn", "held_out_fn"], lambda p: loss(p, batch))
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params, **extra)
            return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), None

        start = network(), tx.init(network())
        return jax.lax.scan(step, start, data)[0][0]

    x, y = batches(12)
    scaled = run(loss, (x, y, jnp.asarray(SCALES[name])))
    jax.effects_barrier()
    largest = max(seen)
    plain = run(network_loss, (x, y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), scaled, plain)
    seen.clear()
    run(loss, (x, y, jnp.ones(12)))
    jax.effects_barrier()
    assert largest > 1.5 * max(seen)  # what went back was scaled


def test_the_ascent_step_follows_the_norms_of_the_penalised_gradient(x64):
    """Incoming updates of another length change the scale, and not epsilon."""
    params, updates = jnp.asarray([1.0, -0.5, 2.0]), jnp.asarray([30.0, 0.0, -40.0])
    grad = jax.grad(lambda p: jnp.sum(p**4) / 4)
    tx = relative_gradreg(lambda p: jnp.sum(p**4) / 4, strength=0.5, reuse_updates=False)
    _, state = tx.update(updates, tx.init(params), params)
    found, _ = tx.update(updates, state, params)

    own, products, norm = grad(params), [], np.linalg.norm
    for epsilon in (0.01 * norm(params) / norm(own), None):
        step = norm(own) / norm(products[0]) if epsilon is None else epsilon
        products.append((grad(params + step * own) - own) / step)
    lengths = [norm(product) for product in products]
    scale = 1.9 * norm(updates) / (0.9 * lengths[0] + lengths[1])
    scale = min(scale, 2 * norm(updates) / lengths[1])
    np.testing.assert_allclose(found, updates + 0.5 * scale * products[1], rtol=1e-6)


def test_a_stateful_ascent_advances_with_the_updates_that_take_the_penalty() -> None:
    """Momentum of the gradient: 0.9 g1 + g3, since the second update is skipped."""
    grad = jax.grad(lambda p: jnp.sum(p**4) / 4)
    tx = relative_gradreg(
        lambda p: jnp.sum(p**4) / 4, strength=0.5, ascent=optax.trace(0.9), interval=2
    )
    params = [jnp.asarray([1.0, -0.5]), jnp.asarray([5.0, 5.0]), jnp.asarray([0.5, 2.0])]
    state = tx.init(params[0])
    for p in params:
        _, state = tx.update(grad(p), state, p)
    np.testing.assert_allclose(state.ascent.trace, 0.9 * grad(params[0]) + grad(params[2]), 1e-6)
