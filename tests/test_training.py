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
from gradreg_optax import dbp_gradreg, fd_gradreg, flooding, make_train_step, sam
from gradreg_optax._batching import first_fraction
from gradreg_optax._validation import fraction
from problems import add, batch_of, correction, flat, loss_fn

SGD = optax.sgd(0.1)
FD = fd_gradreg(gamma=0.3, epsilon=0.2)


def params_of(seed=1):
    """With a leaf that is None, which a step must pass by."""
    return problems.params_of(seed) | {"none": None}


def close(found, expected, rtol=1e-11, atol=1e-12):
    """Up to the rounding over epsilon."""
    np.testing.assert_allclose(flat(found), flat(expected), rtol=rtol, atol=atol)


def one_step(loss=loss_fn, regularizer=FD, args=(), **options):
    """The state and the info of a step, of the parameters of ``params_of()``."""
    init, step = make_train_step(loss, SGD, regularizer, **options)
    return step(init(params_of()), batch_of(), *args)


def hand_loop(optimizer, batches, penalty, **kwargs):
    """Parameters after each step of ``g + penalty(params, batch, step)``."""
    params, trace, optimizer = params_of(), [], optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)
    for i, batch in enumerate(batches):
        value, gradient = jax.value_and_grad(loss_fn)(params, batch, **kwargs)
        value_fn = functools.partial(loss_fn, batch=batch, **kwargs)
        extra = {"value": value, "grad": gradient, "value_fn": value_fn}
        updates = add(gradient, penalty(params, batch, i))
        updates, state = optimizer.update(updates, state, params, **extra)
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
            close(a, b, rtol=1e-10)  # a few steps of eps(float64) gamma / epsilon


RAMP = fd_gradreg(gamma=lambda step: 0.1 * (step + 1), epsilon=0.2, interval=2)
PLATEAU = optax.contrib.reduce_on_plateau(patience=1)
STEPS = {  # (the optimizer, the regularizer, gamma at each step)
    "momentum": (optax.sgd(0.1, momentum=0.9), FD, lambda i: 0.3),
    "adamw": (optax.adamw(1e-2), FD, lambda i: 0.3),
    "schedule_free": (optax.contrib.schedule_free(SGD, learning_rate=0.1), FD, lambda i: 0.3),
    "polyak": (optax.polyak_sgd(max_learning_rate=0.1), FD, lambda i: 0.3),
    "plateau": (optax.chain(SGD, PLATEAU), FD, lambda i: 0.3),
    "no regularizer": (SGD, None, lambda i: 0.0),
    "interval and schedule": (SGD, RAMP, lambda i: 0.2 * (i + 1) if i % 2 == 0 else 0.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_loop_written_by_hand(x64, name):
    optimizer, regularizer, gamma = STEPS[name]
    batches = [batch_of(i) for i in range(4)]
    expected = hand_loop(optimizer, batches, lambda p, b, i: correction(p, b, gamma=gamma(i)))
    steps = make_train_step(loss_fn, optimizer, regularizer)
    assert isinstance(steps, gr.TrainStep)
    assert_same(train(steps, batches), expected)


@pytest.mark.parametrize(("size", "fraction", "kept"), [(8, 0.7, 6), (7, 1e-12, 1)])
def test_penalty_fraction_takes_the_first_samples_rounded_up(x64, size, fraction, kept):
    batches = [batch_of(i, size) for i in range(3)]

    def penalty(params, batch, i):
        part = jax.tree.map(lambda x: x[:kept], batch)
        return correction(params, part, gamma=0.6 if i % 2 == 0 else 0.0)

    regularizer = fd_gradreg(gamma=0.3, epsilon=0.2, interval=2)
    steps = make_train_step(loss_fn, SGD, regularizer, penalty_fraction=fraction)
    assert_same(train(steps, batches), hand_loop(SGD, batches, penalty))


@pytest.mark.parametrize("tx", [dbp_gradreg(gamma=0.3), gr.asam(rho=0.2)], ids=["dbp", "asam"])
def test_penalty_fraction_is_that_of_the_sub_batch_for_every_family(x64, tx):
    batch, params = batch_of(), params_of()
    part = jax.tree.map(lambda x: x[:2], batch)
    gradient, own = jax.grad(loss_fn)(params, batch), jax.grad(loss_fn)(params, part)
    regularized = problems.update_of(tx, own, params, value_fn=lambda p: loss_fn(p, part))
    state, _ = one_step(regularizer=tx, penalty_fraction=0.25)
    close(state.params, add(params, add(gradient, add(regularized, own, -1.0)), -0.1))


@pytest.mark.parametrize("groups", [1, 4])
def test_ascent_groups_average_the_updates_of_the_groups(x64, groups):
    batch, params = batch_of(), params_of()
    parts = [jax.tree.map(lambda x, i=i: jnp.split(x, groups)[i], batch) for i in range(groups)]
    gradients = [jax.grad(loss_fn)(params, part) for part in parts]
    penalties = [correction(params, part, gamma=0.9) for part in parts]
    mean = jax.tree.map(lambda *x: sum(x) / groups, *map(add, gradients, penalties))
    regularizer = fd_gradreg(gamma=0.3, epsilon=0.2, interval=3)
    state, info = one_step(regularizer=regularizer, ascent_groups=groups)
    close(state.params, add(params, mean, -0.1))
    close(info.loss, loss_fn(params, batch), rtol=1e-13, atol=0)
    squares = [optax.tree.norm(gradient) ** 2 for gradient in gradients]
    close(info.grad_norm, np.sqrt(np.mean(squares)), rtol=1e-13, atol=0)


def test_aux_is_that_of_the_clean_pass():
    def with_aux(params, batch, scale):
        aux = {"mean": jnp.mean(params["out"]), "batch": batch["y"]}
        return scale * loss_fn(params, batch), aux

    batch, params = batch_of(), params_of()
    for split in ({}, {"penalty_fraction": 0.5}, {"ascent_groups": 2}):
        _, info = one_step(with_aux, args=(2.0,), has_aux=True, **split)
        assert isinstance(info, gr.StepInfo)
        np.testing.assert_allclose(info.loss, 2 * loss_fn(params, batch), rtol=1e-6)
        np.testing.assert_array_equal(info.aux["batch"].ravel(), batch["y"])
        if "ascent_groups" in split:
            assert info.aux["batch"].shape == (2, 4)
        else:
            np.testing.assert_array_equal(info.aux["mean"], jnp.mean(params["out"]))
    assert one_step(regularizer=None)[1].aux is None


def test_further_arguments_reach_both_passes(x64):
    batches = [batch_of(i) for i in range(2)]
    expected = hand_loop(SGD, batches, lambda p, b, i: correction(p, b, shift=0.7), shift=0.7)
    assert_same(train(make_train_step(loss_fn, SGD, FD), batches, 0.7), expected)
    assert_same(train(make_train_step(loss_fn, SGD, FD), batches, shift=0.7), expected)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_regularizer_with_its_own_loss_gets_its_arguments_by_name(x64, fraction):
    def other_loss(params, shift, batch):
        out = params["out"]
        return jnp.sum(out**4) / 4 * shift + jnp.mean(batch["y"]) * jnp.sum(out)

    batch, params = batch_of(), params_of()
    regularizer = fd_gradreg(other_loss, gamma=0.3, epsilon=0.2, reuse_updates=False)
    part = jax.tree.map(lambda x: x[: math.ceil(8 * fraction)], batch)
    own = jax.grad(other_loss)(params, 0.5, part)
    ahead = jax.grad(other_loss)(add(params, own, 0.2), 0.5, part)
    gradient = add(jax.grad(loss_fn)(params, batch, 0.5), add(ahead, own, -1.0), 1.5)
    state, _ = one_step(regularizer=regularizer, args=(0.5,), penalty_fraction=fraction)
    close(state.params, add(params, gradient, -0.1))


def test_flooding_and_chains_of_regularizers_take_the_value_of_the_step(counter):
    batch, params = batch_of(), params_of()
    level = 2 * float(loss_fn(params, batch))
    state, _ = one_step(counter.wrap(loss_fn), optax.chain(FD, flooding(level=level)))
    assert counter.read() == (2, 2)
    gradient = add(jax.grad(loss_fn)(params, batch), correction(params, batch))
    close(state.params, add(params, gradient, 0.1), rtol=1e-5, atol=0)  # float32


LAZY = fd_gradreg(gamma=0.3, epsilon=0.2, interval=3)
CENTRAL = fd_gradreg(gamma=0.3, epsilon=0.2, interval=3, scheme="central")
COUNTS = {  # (gradients on a step that takes the penalty, on one that skips it) for interval 3
    "none": (None, {}, (1, 1)),
    "forward": (LAZY, {}, (2, 1)),
    "central": (CENTRAL, {}, (3, 1)),
    "dbp": (dbp_gradreg(gamma=0.1, interval=3), {}, (2, 1)),
    "flooding": (flooding(level=0.1), {}, (1, 1)),
    "forward, fraction": (LAZY, {"penalty_fraction": 0.25}, (3, 1)),
    "dbp, fraction": (dbp_gradreg(gamma=0.1, interval=3), {"penalty_fraction": 0.25}, (2, 1)),
    "forward, groups": (LAZY, {"ascent_groups": 2}, (2, 1)),  # each over both groups at once
}


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_per_step_are_counted(counter, name):
    regularizer, split, (taken, skipped) = COUNTS[name]
    init, step = make_train_step(counter.wrap(loss_fn), SGD, regularizer, **split)
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
    assert (len(traces), step._cache_size()) == (first, 1)
    assert (int(state.step), int(state.opt_state[0].step)) == (10, 10)


ALIASING = {
    "schedule_free": optax.contrib.schedule_free(SGD, learning_rate=0.1),
    "trace": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "keeps the parameters": optax.GradientTransformation(
        lambda params: (params, params), lambda u, s, p: (u, (p, s[0]))
    ),
}


@pytest.mark.parametrize("name", ALIASING)
def test_donation_neither_eats_the_callers_parameters_nor_breaks_aliases(name):
    """It reuses the memory of the state only where asked."""
    params, batch, ends = params_of(), batch_of(), []
    before = jax.tree.map(np.array, params)
    for donate in (True, False):
        init, step = make_train_step(loss_fn, ALIASING[name], FD, donate=donate)
        first = state = init(params)
        for _ in range(3):
            state, info = step(state, batch)
        assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(first.params))
        ends.append((info.loss, info.grad_norm, state.params))
    assert_same(*[[end] for end in ends])
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(flat(params), flat(before))


def test_a_step_can_be_lowered_scanned_and_vmapped(x64):
    batch, params = batch_of(), params_of()
    init, step = make_train_step(loss_fn, SGD, FD, donate=False)
    state = init(params)
    assert isinstance(state, gr.TrainState)
    assert step.lower(state, batch).compile().cost_analysis()["flops"] > 0
    last, infos = jax.lax.scan(lambda state, _: step(state, batch), state, length=3)
    expected = hand_loop(SGD, [batch] * 3, lambda p, b, i: correction(p, b))
    close(last.params, expected[-1][2], rtol=1e-10)
    np.testing.assert_allclose(infos.loss, [value for value, _, _ in expected], rtol=1e-10)
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), state, init(params_of(2)))
    together, _ = jax.vmap(lambda s: step(s, batch))(ensemble)
    np.testing.assert_allclose(together.params["out"][0], expected[0][2]["out"], rtol=1e-10)


def test_gamma_can_be_traced_through_a_step(x64):
    def after(gamma):
        return one_step(regularizer=fd_gradreg(gamma=gamma, epsilon=0.2), donate=False)[0].params

    slope = jax.jacobian(after)(0.3)
    expected = correction(params_of(), batch_of(), gamma=1.0)
    close(slope, jax.tree.map(lambda c: -0.1 * c, expected), rtol=1e-10)


def test_line_searches_find_what_they_need():
    init, step = make_train_step(loss_fn, optax.lbfgs(), fd_gradreg(gamma=0.01, epsilon=0.1))
    state, losses = init(params_of()), []
    for _ in range(5):
        state, info = step(state, batch_of())
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] / 2


def test_held_out_samples_that_nobody_evaluates_are_refused():
    for regularizer in (two.FD, gr.relative_gradreg(strength=0.5), None):
        init, step = make_train_step(two.mean_square, SGD, regularizer)
        with two.says(TypeError, "make_train_step: held_out="):
            step(init(two.P), two.BATCH, held_out=two.BATCH)


def test_a_held_out_batch_that_does_not_divide_is_named():
    parts, tuned = gr.microbatched(two.mean_square, 2), gr.relative_gradreg(strength=None)
    init, step = make_train_step(parts, SGD, tuned)
    with two.says(ValueError, "held_out"):
        step(init(two.P), two.BATCH, held_out=two.BATCH[:3])


def test_penalty_fraction_takes_a_batch_of_symbolic_size(x64):
    init, step = make_train_step(loss_fn, SGD, FD, penalty_fraction=0.5, donate=False)
    state, (size,) = init(params_of()), jax.export.symbolic_shape("n")
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch_of()))
    symbolic = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), structs[1]
    )
    exported = jax.export.export(step)(structs[0], symbolic)
    for n in (1, 3):
        batch = batch_of(size=n)
        found, expected = exported.call(state, batch)[0], step(state, batch)[0]
        close(found.params, expected.params, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, functools.partial])
def test_a_second_penalty_behind_a_wrapper_is_seen(wrap):
    init, _ = make_train_step(wrap(gr.regularized_loss(loss_fn, FD)), SGD, FD)
    with two.says(ValueError, "make_train_step: ", "more than one"):
        init(params_of())


@pytest.mark.parametrize(
    ("args", "kwargs", "option"),
    [
        (("train",), {}, {}),
        (("train",), {}, {"penalty_fraction": 0.5}),
        ((), {"mode": "train"}, {"ascent_groups": 2}),
    ],
    ids=["position", "position, part", "keyword, groups"],
)
def test_a_word_among_the_arguments_is_static(args, kwargs, option):
    seen = []

    def loss_with_mode(params, batch, mode="eval"):
        seen.append(mode)
        return two.mean_square(params, batch)

    init, step = make_train_step(loss_with_mode, SGD, two.FD, static_argnames=("mode",), **option)
    _, info = step(init(two.P), two.BATCH, *args, **kwargs)
    assert set(seen) == {"train"}
    np.testing.assert_allclose(info.loss, two.mean_square(two.P, two.BATCH), rtol=1e-6)


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
    must = "with ascent_groups, counters and keys in the regularizer's state must"
    with two.says(ValueError, must):
        two.one_step(regularizer=optax.chain(two.FD, other), ascent_groups=2)


def test_a_part_of_the_batch_needs_a_transformation_of_ours():
    own = optax.with_extra_args_support(optax.identity())
    with two.says(TypeError, "penalty_fraction needs a transformation of this package"):
        two.one_step(regularizer=own, penalty_fraction=0.5)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)])
def test_a_penalty_in_the_optimizer_and_in_the_step_is_refused(wrap):
    for ours in (two.FD, sam(rho=0.1), gr.relative_gradreg()):
        with two.says(ValueError, "make_train_step: ", "penalise twice", "optax.chain"):
            two.one_step(optimizer=optax.chain(wrap(ours), SGD))
    two.one_step(optimizer=optax.chain(two.FD, SGD), regularizer=None)


def test_a_penalty_in_the_loss_and_in_the_step_is_refused():
    loss = gr.regularized_loss(two.mean_square, two.FD)
    in_the_chain = {"optimizer": optax.chain(two.FD, optax.sgd(1.0))}
    for places in ({"regularizer": sam(rho=0.1)}, in_the_chain):
        with two.says(ValueError, "make_train_step: ", "penalise twice", "Remove one"):
            two.one_step(loss, **{"regularizer": None} | places)
    in_the_loss, _ = two.one_step(loss, regularizer=None)
    in_the_step, _ = two.one_step(two.mean_square)
    np.testing.assert_allclose(in_the_loss.params, in_the_step.params, rtol=1e-6)
    two.one_step(gr.regularized_loss(two.mean_square, optax.clip(0.1)))  # no penalty in the loss


def test_an_argument_of_the_loss_that_a_step_keeps_for_itself_is_refused():
    def loss(params, batch, held_out=0.0):
        return two.mean_square(params, batch) + held_out

    for make in (functools.partial(make_train_step, optimizer=SGD), gr.make_nnx_train_step):
        with two.says(TypeError, "train_step: the loss has an argument 'held_out'", "Rename"):
            make(loss)
