"""Train steps: the loop written by hand, without its mistakes."""

import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import problems
import two_parameters as two
from gradreg_optax import (
    StepInfo,
    TrainState,
    TrainStep,
    asam,
    dbp_gradreg,
    fd_gradreg,
    flooding,
    make_train_step,
    microbatched,
    regularized_loss,
    relative_gradreg,
    sam,
)
from gradreg_optax._batching import first_fraction
from gradreg_optax._validation import fraction
from problems import add, batch_of, correction, flat, loss_fn


def params_of(seed=1):
    """With a leaf that is None, which a step must pass by."""
    return problems.params_of(seed) | {"none": None}


def hand_loop(optimizer, batches, penalty, **kwargs):
    """Parameters after each step of ``g + penalty(params, batch, step)``."""
    params, trace = params_of(), []
    state = optimizer.init(params)
    for i, batch in enumerate(batches):
        value, gradient = jax.value_and_grad(loss_fn)(params, batch, **kwargs)
        extra = {
            "value": value,
            "grad": gradient,
            "value_fn": lambda p, b=batch: loss_fn(p, b, **kwargs),
        }
        optimizer = optax.with_extra_args_support(optimizer)
        updates, state = optimizer.update(
            add(gradient, penalty(params, batch, i)), state, params, **extra
        )
        params = optax.apply_updates(params, updates)
        trace.append((value, optax.tree.norm(gradient), params))
    return trace


def train(init_and_step, batches, *args, **kwargs):
    init, step = init_and_step
    state, trace = init(params_of()), []
    for batch in batches:
        state, info = step(state, batch, *args, **kwargs)
        trace.append((info.loss, info.grad_norm, jax.tree.map(np.array, state.params)))
    assert step._cache_size() == 1
    return trace


def assert_same(trace, expected):
    for ours, theirs in zip(trace, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # a few steps of eps(float64) gamma / epsilon
            np.testing.assert_allclose(flat(a), flat(b), rtol=1e-10, atol=1e-12)


BATCHES = range(5)
FD = {"gamma": 0.3, "epsilon": 0.2}
OPTIMIZERS = {
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [True, False])
def test_a_step_is_the_loop_written_by_hand(x64, name, donate):
    batches = [batch_of(i) for i in BATCHES]
    expected = hand_loop(OPTIMIZERS[name](), batches, lambda p, b, i: correction(p, b))
    steps = make_train_step(loss_fn, OPTIMIZERS[name](), fd_gradreg(**FD), donate=donate)
    assert isinstance(steps, TrainStep)
    assert_same(train(steps, batches), expected)


def test_without_a_regularizer_it_is_the_plain_step(x64):
    batches = [batch_of(i) for i in BATCHES]
    expected = hand_loop(optax.sgd(0.1), batches, lambda p, b, i: jax.tree.map(jnp.zeros_like, p))
    assert_same(train(make_train_step(loss_fn, optax.sgd(0.1)), batches), expected)


def test_interval_and_schedules_go_by_the_step(x64):
    batches = [batch_of(i) for i in BATCHES]
    regularizer = fd_gradreg(gamma=lambda step: 0.1 * (step + 1), epsilon=0.2, interval=2)
    expected = hand_loop(
        optax.sgd(0.1),
        batches,
        lambda p, b, i: correction(p, b, gamma=0.2 * (i + 1) if i % 2 == 0 else 0.0),
    )
    assert_same(train(make_train_step(loss_fn, optax.sgd(0.1), regularizer), batches), expected)


@pytest.mark.parametrize(
    ("size", "fraction"), [(8, 0.25), (10, 0.7), (7, 0.5), (3, 0.1), (4, 1e-12), (5, 1.0)]
)
@pytest.mark.parametrize("interval", [1, 2])
def test_penalty_fraction_takes_the_first_samples_rounded_up(x64, size, fraction, interval):
    batches = [batch_of(i, size) for i in range(3)]
    kept = {(8, 0.25): 2, (10, 0.7): 7, (7, 0.5): 4, (3, 0.1): 1, (4, 1e-12): 1, (5, 1.0): 5}[
        size, fraction
    ]

    def penalty(params, batch, i):
        part = jax.tree.map(lambda x: x[:kept], batch)
        return correction(params, part, gamma=0.3 * interval if i % interval == 0 else 0.0)

    expected = hand_loop(optax.sgd(0.1), batches, penalty)
    steps = make_train_step(
        loss_fn, optax.sgd(0.1), fd_gradreg(**FD, interval=interval), penalty_fraction=fraction
    )
    assert_same(train(steps, batches), expected)


@pytest.mark.parametrize(
    "make", [lambda: dbp_gradreg(gamma=0.3), lambda: sam(rho=0.2), lambda: asam(rho=0.2)]
)
def test_penalty_fraction_is_that_of_the_sub_batch_for_every_family(x64, make):
    batch, params = batch_of(), params_of()
    part, tx = jax.tree.map(lambda x: x[:2], batch), make()
    gradient, own = jax.grad(loss_fn)(params, batch), jax.grad(loss_fn)(params, part)
    regularized, _ = tx.update(own, tx.init(params), params, value_fn=lambda p: loss_fn(p, part))
    expected = flat(params) - 0.1 * (flat(gradient) + flat(regularized) - flat(own))
    init, step = make_train_step(loss_fn, optax.sgd(0.1), make(), penalty_fraction=0.25)
    # rounding over epsilon
    np.testing.assert_allclose(
        flat(step(init(params), batch)[0].params), expected, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_ascent_groups_average_the_updates_of_the_groups(x64, groups):
    batch, params = batch_of(), params_of()
    parts = [
        jax.tree.map(lambda x, i=i: x.reshape(groups, 8 // groups, *x.shape[1:])[i], batch)
        for i in range(groups)
    ]
    mean = jax.tree.map(
        lambda *x: sum(x) / groups,
        *[add(jax.grad(loss_fn)(params, b), correction(params, b)) for b in parts],
    )
    init, step = make_train_step(
        loss_fn, optax.sgd(0.1), fd_gradreg(**FD, interval=3), ascent_groups=groups
    )
    first = add(
        jax.grad(loss_fn)(params, batch), add(mean, jax.grad(loss_fn)(params, batch), -1.0), 3.0
    )
    state, info = step(init(params), batch)
    # rounding over epsilon
    np.testing.assert_allclose(
        flat(state.params), flat(add(params, first, -0.1)), rtol=1e-11, atol=1e-12
    )
    np.testing.assert_allclose(info.loss, loss_fn(params, batch), rtol=1e-13)
    squares = [optax.tree.norm(jax.grad(loss_fn)(params, b)) ** 2 for b in parts]
    np.testing.assert_allclose(info.grad_norm, np.sqrt(np.mean(squares)), rtol=1e-13)


def test_fraction_and_groups_together_take_the_first_samples_of_each_group(x64):
    batch, params = batch_of(), params_of()
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 1], batch) for i in range(2)]
    penalty = jax.tree.map(lambda *x: sum(x) / 2, *[correction(params, b) for b in halves])
    init, step = make_train_step(
        loss_fn, optax.sgd(0.1), fd_gradreg(**FD), ascent_groups=2, penalty_fraction=0.25
    )
    expected = add(params, add(jax.grad(loss_fn)(params, batch), penalty), -0.1)
    np.testing.assert_allclose(
        flat(step(init(params), batch)[0].params), flat(expected), rtol=1e-11, atol=1e-12
    )


def test_aux_is_that_of_the_clean_pass():
    def with_aux(params, batch, scale):
        return scale * loss_fn(params, batch), {
            "mean": jnp.mean(params["out"]),
            "batch": batch["y"],
        }

    batch, params = batch_of(), params_of()
    for split in ({}, {"penalty_fraction": 0.5}):
        init, step = make_train_step(
            with_aux, optax.sgd(0.1), fd_gradreg(**FD), has_aux=True, **split
        )
        _, info = step(init(params), batch, scale=2.0)
        assert isinstance(info, StepInfo)
        np.testing.assert_array_equal(info.aux["mean"], jnp.mean(params["out"]))
        np.testing.assert_array_equal(info.aux["batch"], batch["y"])
        # a few eps(float32)
        np.testing.assert_allclose(info.loss, 2 * loss_fn(params, batch), rtol=1e-6)
    init, step = make_train_step(
        with_aux, optax.sgd(0.1), fd_gradreg(**FD), has_aux=True, ascent_groups=2
    )
    assert step(init(params), batch, 2.0)[1].aux["batch"].shape == (2, 4)
    assert make_train_step(loss_fn, optax.sgd(0.1)).step(init(params), batch)[1].aux is None


def test_further_arguments_reach_both_passes(x64):
    batches = [batch_of(i) for i in range(2)]
    expected = hand_loop(
        optax.sgd(0.1), batches, lambda p, b, i: correction(p, b, shift=0.7), shift=0.7
    )
    steps = make_train_step(loss_fn, optax.sgd(0.1), fd_gradreg(**FD))
    assert_same(train(steps, batches, 0.7), expected)
    assert_same(
        train(make_train_step(loss_fn, optax.sgd(0.1), fd_gradreg(**FD)), batches, shift=0.7),
        expected,
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_regularizer_with_its_own_loss_gets_its_arguments_by_name(x64, fraction):
    def other_loss(params, shift, batch):
        return jnp.sum(params["out"] ** 4) / 4 * shift + jnp.mean(batch["y"]) * jnp.sum(
            params["out"]
        )

    batch, params = batch_of(), params_of()
    regularizer = fd_gradreg(other_loss, **FD, reuse_updates=False)
    init, step = make_train_step(loss_fn, optax.sgd(0.1), regularizer, penalty_fraction=fraction)
    part = jax.tree.map(lambda x: x[: math.ceil(8 * fraction)], batch)
    own = jax.grad(other_loss)(params, 0.5, part)
    ahead = jax.grad(other_loss)(add(params, own, 0.2), 0.5, part)
    expected = add(
        params, add(jax.grad(loss_fn)(params, batch, 0.5), add(ahead, own, -1.0), 1.5), -0.1
    )
    np.testing.assert_allclose(
        flat(step(init(params), batch, 0.5)[0].params), flat(expected), rtol=1e-11, atol=1e-12
    )


def test_flooding_and_chains_of_regularizers_take_the_value_of_the_step(counter):
    batch, params = batch_of(), params_of()
    level = 2 * float(loss_fn(params, batch))
    init, step = make_train_step(
        counter.wrap(loss_fn), optax.sgd(0.1), optax.chain(fd_gradreg(**FD), flooding(level=level))
    )
    state, _ = step(init(params), batch)
    assert counter.read() == (2, 2)
    gradient = add(jax.grad(loss_fn)(params, batch), correction(params, batch))
    # eps(float32) gamma / epsilon
    np.testing.assert_allclose(flat(state.params), flat(add(params, gradient, 0.1)), rtol=1e-5)


COUNTS = {  # (gradients on a step that takes the penalty, on one that skips it) for interval 3
    "none": (None, {}, (1, 1)),
    "forward": (fd_gradreg(**FD, interval=3), {}, (2, 1)),
    "central": (fd_gradreg(**FD, interval=3, scheme="central"), {}, (3, 1)),
    "sam": (sam(rho=0.1, interval=3), {}, (2, 1)),
    "dbp": (dbp_gradreg(gamma=0.1, interval=3), {}, (2, 1)),
    "flooding": (flooding(level=0.1), {}, (1, 1)),
    "forward, fraction": (fd_gradreg(**FD, interval=3), {"penalty_fraction": 0.25}, (3, 1)),
    "dbp, fraction": (dbp_gradreg(gamma=0.1, interval=3), {"penalty_fraction": 0.25}, (2, 1)),
    # each over both groups at once
    "forward, groups": (
        fd_gradreg(**FD, interval=3),
        {"ascent_groups": 2},
        (2, 1),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_per_step_are_counted(counter, name):
    regularizer, split, (taken, skipped) = COUNTS[name]
    init, step = make_train_step(counter.wrap(loss_fn), optax.sgd(0.01), regularizer, **split)
    state, batch, counts = init(params_of()), batch_of(), []
    for _ in range(5):
        state, _ = step(state, batch)
        counts.append(counter.read()[1])
    assert counts == [taken, skipped, skipped, taken, skipped]


def test_ten_steps_trace_once_whatever_the_parameters_are_made_of():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return jnp.sum((params["numpy"] * params["python"]) ** 2) * batch + params["jax"] ** 2

    params = {"numpy": np.ones(3, np.float32), "python": 2.0, "jax": jnp.asarray(1.0)}
    init, step = make_train_step(counted, optax.adam(1e-3), sam(rho=0.1))
    state, _ = step(init(params), 1.0)
    first = len(traces)
    for _ in range(9):
        state, _ = step(state, 1.0)
    assert len(traces) == first
    assert step._cache_size() == 1
    assert int(state.step) == 10
    assert int(state.opt_state[0].step) == 10


ALIASING = {
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "trace": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "ema": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "keeps the parameters": optax.GradientTransformation(
        lambda params: (params, params), lambda u, s, p: (u, (p, s[0]))
    ),
}


@pytest.mark.parametrize("name", ALIASING)
def test_donation_neither_eats_the_callers_parameters_nor_breaks_aliases(name):
    params, batch = params_of(), batch_of()
    before = jax.tree.map(np.array, params)
    traces = [
        train(
            make_train_step(loss_fn, ALIASING[name], fd_gradreg(**FD), donate=donate), [batch] * 4
        )
        for donate in (True, False)
    ]
    assert_same(*traces)
    init, step = make_train_step(loss_fn, ALIASING[name], fd_gradreg(**FD))
    state = init(params)
    for _ in range(3):
        state, _ = step(state, batch)
    np.testing.assert_array_equal(flat(params), flat(before))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_donation_reuses_the_memory_of_the_state_only_where_asked():
    batch = batch_of()
    for donate in (True, False):
        init, step = make_train_step(loss_fn, optax.adam(0.1), fd_gradreg(**FD), donate=donate)
        state = init(params_of())
        step(state, batch)
        assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(state.params))


def test_a_step_can_be_lowered_scanned_and_vmapped(x64):
    batch, params = batch_of(), params_of()
    init, step = make_train_step(loss_fn, optax.sgd(0.1), fd_gradreg(**FD), donate=False)
    state = init(params)
    assert isinstance(state, TrainState)
    assert step.lower(state, batch).compile().cost_analysis()["flops"] > 0
    last, infos = jax.lax.scan(lambda state, _: step(state, batch), state, length=3)
    expected = hand_loop(optax.sgd(0.1), [batch] * 3, lambda p, b, i: correction(p, b))
    np.testing.assert_allclose(flat(last.params), flat(expected[-1][2]), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(infos.loss, [value for value, _, _ in expected], rtol=1e-10)
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), init(params_of(1)), init(params_of(2)))
    together, _ = jax.vmap(lambda s: step(s, batch))(ensemble)
    np.testing.assert_allclose(together.params["out"][0], expected[0][2]["out"], rtol=1e-10)


def test_gamma_can_be_traced_through_a_step(x64):
    batch, params = batch_of(), params_of()

    def after(gamma):
        init, step = make_train_step(
            loss_fn, optax.sgd(0.1), fd_gradreg(gamma=gamma, epsilon=0.2), donate=False
        )
        return step(init(params), batch)[0].params

    slope = jax.jacobian(after)(0.3)
    np.testing.assert_allclose(
        flat(slope), -0.1 * flat(correction(params, batch, gamma=1.0)), rtol=1e-10, atol=1e-12
    )


def test_line_searches_find_what_they_need():
    init, step = make_train_step(loss_fn, optax.lbfgs(), fd_gradreg(gamma=0.01, epsilon=0.1))
    state, batch, losses = init(params_of()), batch_of(), []
    for _ in range(5):
        state, info = step(state, batch)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] / 2


def test_held_out_samples_that_nobody_evaluates_are_refused():
    batch = batch_of()
    for regularizer in (fd_gradreg(**FD), relative_gradreg(strength=0.5), None):
        init, step = make_train_step(loss_fn, optax.sgd(0.1), regularizer)
        with pytest.raises(TypeError, match=r"make_train_step: held_out="):
            step(init(params_of()), batch, held_out=batch)


def test_a_held_out_batch_that_does_not_divide_is_named():
    batch = batch_of()
    init, step = make_train_step(
        microbatched(loss_fn, 2), optax.sgd(0.1), relative_gradreg(strength=None)
    )
    with pytest.raises(ValueError, match=r"held_out"):
        step(init(params_of()), batch, held_out=jax.tree.map(lambda x: x[:3], batch))


def test_penalty_fraction_takes_a_batch_of_symbolic_size(x64):
    init, step = make_train_step(
        loss_fn, optax.sgd(0.1), fd_gradreg(**FD), penalty_fraction=0.5, donate=False
    )
    state, (size,) = init(params_of()), jax.export.symbolic_shape("n")
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch_of()))
    symbolic = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), structs[1]
    )
    exported = jax.export.export(step)(structs[0], symbolic)
    for n in (1, 3, 4, 8):
        batch = batch_of(size=n)
        found, _ = exported.call(state, batch)
        np.testing.assert_allclose(
            flat(found.params), flat(step(state, batch)[0].params), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, functools.partial])
def test_a_second_penalty_behind_a_wrapper_is_seen(wrap):
    loss = wrap(regularized_loss(loss_fn, fd_gradreg(**FD)))
    init, _ = make_train_step(loss, optax.sgd(0.1), fd_gradreg(**FD))
    with pytest.raises(ValueError, match=r"make_train_step: .*more than one"):
        init(params_of())


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("option", [{}, {"penalty_fraction": 0.5}, {"ascent_groups": 2}])
def test_a_word_among_the_arguments_is_static(by, option):
    seen = []

    def loss_with_mode(params, batch, mode="eval"):
        seen.append(mode)
        return loss_fn(params, batch)

    init, step = make_train_step(
        loss_with_mode, optax.sgd(0.1), fd_gradreg(**FD), static_argnames=("mode",), **option
    )
    args, kwargs = (("train",), {}) if by == "position" else ((), {"mode": "train"})
    _, info = step(init(params_of()), batch_of(), *args, **kwargs)
    assert set(seen) == {"train"}
    np.testing.assert_allclose(info.loss, loss_fn(params_of(), batch_of()), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.float32])
def test_a_fraction_is_the_decimal_that_was_written(dtype):
    """Of n samples the first percent * n / 100 are kept, rounded up, in whole numbers."""
    for size in (1, 3, 7, 10, 64, 100, 999, 1000):
        batch = np.arange(size)
        for percent in range(1, 101):
            kept = fraction("f", "penalty_fraction", dtype(percent / 100))
            part = first_fraction("f", "penalty_fraction", batch, kept)
            assert len(part) == -(-percent * size // 100), (size, percent)


def test_what_groups_cannot_share_is_named():
    def update(updates, state, params=None):
        return updates, jnp.any(updates > 0).astype(jnp.int32)

    other = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    with two.says(
        ValueError, "with ascent_groups, counters and keys in the regularizer's state must"
    ):
        two.one_step(regularizer=optax.chain(two.FD, other), ascent_groups=2)


def test_a_part_of_the_batch_needs_a_transformation_of_ours():
    own = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params, **_: (updates, state)
    )
    with two.says(TypeError, "penalty_fraction needs a transformation of this package"):
        two.one_step(regularizer=own, penalty_fraction=0.5)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)])
def test_a_penalty_in_the_optimizer_and_in_the_step_is_refused(wrap):
    for ours in (two.FD, gr.sam(rho=0.1), gr.relative_gradreg()):
        with two.says(ValueError, "make_train_step: ", "penalise twice", "optax.chain"):
            two.one_step(optimizer=optax.chain(wrap(ours), optax.sgd(0.1)))
    two.one_step(optimizer=optax.chain(two.FD, optax.sgd(0.1)), regularizer=None)


def test_a_penalty_in_the_loss_and_in_the_step_is_refused():
    loss = gr.regularized_loss(two.mean_square, two.FD)
    for places in (
        {"regularizer": gr.sam(rho=0.1)},
        {"optimizer": optax.chain(two.FD, optax.sgd(1.0))},
    ):
        with two.says(ValueError, "make_train_step: ", "penalise twice", "Remove one"):
            two.one_step(loss, **{"regularizer": None} | places)
    in_the_loss, _ = two.one_step(loss, regularizer=None)
    in_the_step, _ = two.one_step(two.mean_square)
    np.testing.assert_allclose(in_the_loss.params, in_the_step.params, rtol=1e-6)
    two.one_step(gr.regularized_loss(two.mean_square, optax.clip(0.1)))  # no penalty in the loss


def test_an_argument_of_the_loss_that_a_step_keeps_for_itself_is_refused():
    def loss(params, batch, held_out=0.0):
        return two.mean_square(params, batch) + held_out

    for make in (
        functools.partial(gr.make_train_step, optimizer=optax.sgd(0.1)),
        gr.make_nnx_train_step,
    ):
        with two.says(TypeError, "train_step: the loss has an argument 'held_out'", "Rename"):
            make(loss)
