"""Train steps: the loop written by hand, without its mistakes."""

import functools

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


def hand_loop(optimizer, batches, gammas, kept=None, **kwargs):
    """Parameters after each step of ``g + gamma R``, the penalty on the first samples."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, inputs):
        (params, state), (batch, gamma) = carry, inputs
        value_fn = functools.partial(loss_fn, batch=batch, **kwargs)
        value, gradient = jax.value_and_grad(value_fn)(params)
        part = jax.tree.map(lambda x: x[:kept], batch)
        updates = add(gradient, correction(params, part, gamma, **kwargs))
        extra = {"value": value, "grad": gradient, "value_fn": value_fn}
        updates, state = optimizer.update(updates, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, optax.tree.norm(gradient), params)

    inputs = jax.tree.map(lambda *x: jnp.stack(x), *batches), jnp.asarray(gammas)
    start = params_of(), optimizer.init(params_of())
    trace = jax.jit(lambda inputs: jax.lax.scan(step, start, inputs)[1])(inputs)
    return [jax.tree.map(lambda x, i=i: x[i], trace) for i in range(len(batches))]


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
STEPS = {  # (the optimizer, the regularizer, gamma at each step)
    "adamw": (optax.adamw(1e-2), FD, [0.3] * 3),
    "schedule_free": (optax.contrib.schedule_free(SGD, learning_rate=0.1), FD, [0.3] * 3),
    "polyak": (optax.polyak_sgd(max_learning_rate=0.1), FD, [0.3] * 3),
    "line search": (optax.chain(SGD, optax.scale_by_backtracking_linesearch(5)), FD, [0.3] * 3),
    "no regularizer": (SGD, None, [0.0] * 3),
    "interval and schedule": (SGD, RAMP, [0.2, 0.0, 0.6]),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_loop_written_by_hand(x64, name):
    optimizer, regularizer, gammas = STEPS[name]
    batches = [batch_of(i) for i in range(3)]
    steps = make_train_step(loss_fn, optimizer, regularizer)
    assert isinstance(steps, gr.TrainStep)
    assert_same(train(steps, batches), hand_loop(optimizer, batches, gammas))


# in binary numbers 100 * 0.07 is more than 7, and 11 * (1 / 11) in decimal ones more than 1
PARTS = [(8, 0.7, 6), (7, 1e-12, 1), (100, 0.07, 7), (100, np.float16(0.07), 7), (11, 1 / 11, 1)]


@pytest.mark.parametrize(("size", "fraction", "kept"), PARTS)
def test_penalty_fraction_takes_the_first_samples_rounded_up(x64, size, fraction, kept):
    batches = [batch_of(i, size) for i in range(3)]
    regularizer = fd_gradreg(gamma=0.3, epsilon=0.2, interval=2)
    steps = make_train_step(loss_fn, SGD, regularizer, penalty_fraction=fraction)
    assert_same(train(steps, batches), hand_loop(SGD, batches, [0.6, 0.0, 0.6], kept))


@pytest.mark.parametrize("tx", [FD, sam(rho=0.1), gr.relative_gradreg()])
def test_behind_another_transformation_a_penalty_starts_from_the_gradient_of_the_loss(x64, tx):
    def moved(*optimizer_and_regularizer):
        init, step = make_train_step(loss_fn, *optimizer_and_regularizer)
        return flat(params_of()) - flat(step(init(params_of()), batch_of())[0].params)

    flipped, plain = optax.chain(optax.scale(-1.0), tx), moved(SGD)
    for found in (moved(SGD, flipped), moved(optax.chain(flipped, SGD))):
        np.testing.assert_allclose(found + plain, moved(SGD, tx) - plain, rtol=1e-9, atol=1e-12)


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
    expected = hand_loop(SGD, batches, [0.3] * 2, shift=0.7)

    def other(updates, state, params, *, batch, shift, **_):  # of another package
        return updates, state

    regularizer = optax.chain(FD, optax.GradientTransformationExtraArgs(lambda p: (), other))
    assert_same(train(make_train_step(loss_fn, SGD, FD), batches, 0.7), expected)
    assert_same(train(make_train_step(loss_fn, SGD, regularizer), batches, shift=0.7), expected)


def test_a_regularizer_with_its_own_loss_gets_its_arguments_by_name(x64):
    def other_loss(params, shift, batch):
        out = params["out"]
        return jnp.sum(out**4) / 4 * shift + jnp.mean(batch["y"]) * jnp.sum(out)

    @jax.jit
    def expected(params, batch):
        grad, part = jax.grad(other_loss), jax.tree.map(lambda x: x[:4], batch)
        own = grad(params, 0.5, part)
        change = add(grad(add(params, own, 0.2), 0.5, part), own, -1.0)
        return add(params, add(jax.grad(loss_fn)(params, batch, 0.5), change, 1.5), -0.1)

    def by_keywords(params, batch, **options):
        return loss_fn(params, batch, options["shift"])

    regularizer = fd_gradreg(other_loss, gamma=0.3, epsilon=0.2, reuse_updates=False)
    init, step = make_train_step(loss_fn, SGD, regularizer, penalty_fraction=0.5)
    _, other = make_train_step(by_keywords, SGD, regularizer, penalty_fraction=0.5)
    after = expected(params_of(), batch_of())
    close(step(init(params_of()), batch_of(), 0.5)[0].params, after)
    close(other(init(params_of()), batch_of(), shift=0.5)[0].params, after)


def test_flooding_and_chains_of_regularizers_take_the_value_of_the_step(counter):
    regularizer = optax.chain(FD, flooding(level=100.0))
    state, info = one_step(counter.wrap(loss_fn), regularizer)
    assert counter.read() == (2, 2)
    assert info.loss < 100
    gradient = jax.jit(problems.regularized)(params_of(), batch_of())
    close(state.params, add(params_of(), gradient, 0.1), rtol=1e-5, atol=0)  # float32


LAZY = fd_gradreg(gamma=0.3, epsilon=0.2, interval=3)
CENTRAL = fd_gradreg(gamma=0.3, epsilon=0.2, interval=3, scheme="central")
COUNTS = {  # (gradients on a step that takes the penalty, on one that skips it) for interval 3
    "central": (CENTRAL, {}, (3, 1)),
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
    for _ in range(4):
        state, _ = step(state, batch)
        counts.append(counter.read()[1])
    assert counts == [taken, skipped, skipped, taken]


def test_ten_steps_trace_once_whatever_the_parameters_are_made_of():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return jnp.sum((params["numpy"] * params["python"]) ** 2) * batch + params["jax"] ** 2

    params = {"numpy": np.ones(3, np.float32), "python": 2.0, "jax": jnp.asarray(1.0)}
    init, step = make_train_step(counted, optax.adam(1e-3), sam(rho=0.1))
    state = init(params)
    for _ in range(10):
        state, _ = step(state, 1.0)
    assert (len(traces), step._cache_size()) == (1, 1)
    assert (int(state.step), int(state.opt_state[0].step)) == (10, 10)


ALIASING = {
    "schedule_free": optax.contrib.schedule_free(SGD, learning_rate=0.1),
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
        for _ in range(2):
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
    expected = hand_loop(SGD, [batch] * 3, [0.3] * 3)
    close(last.params, expected[-1][2], rtol=1e-10)
    np.testing.assert_allclose(infos.loss, [value for value, _, _ in expected], rtol=1e-10)
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), state, init(params_of(2)))
    together, _ = jax.vmap(lambda s: step(s, batch))(ensemble)
    np.testing.assert_allclose(together.params["out"][0], expected[0][2]["out"], rtol=1e-10)


def test_gamma_can_be_traced_through_a_step(x64):
    def after(gamma):
        return one_step(regularizer=fd_gradreg(gamma=gamma, epsilon=0.2), donate=False)[0].params

    slope = jax.jit(jax.jacobian(after))(0.3)
    expected = jax.jit(correction)(params_of(), batch_of(), 1.0)
    close(slope, jax.tree.map(lambda c: -0.1 * c, expected), rtol=1e-10)


def test_penalty_fraction_takes_a_batch_of_symbolic_size(x64):
    init, step = make_train_step(loss_fn, SGD, FD, penalty_fraction=0.5, donate=False)
    state = init(params_of())
    shapes = jax.export.symbolic_args_specs((state, batch_of()), ("...", "n, ..."))
    exported = jax.export.export(step)(*shapes)
    batch = batch_of(size=3)
    found, expected = exported.call(state, batch)[0], step(state, batch)[0]
    close(found.params, expected.params, rtol=1e-12, atol=1e-14)


def test_a_word_among_the_arguments_is_static():
    seen = []

    def loss_with_mode(params, batch, mode="eval"):
        seen.append(mode)
        return two.mean_square(params, batch)

    options = {"penalty_fraction": 0.5, "static_argnames": ("mode",)}
    init, step = make_train_step(loss_with_mode, SGD, two.FD, **options, donate=False)
    for args, kwargs in ((("train",), {}), ((), {"mode": "train"})):
        _, info = step(init(two.P), two.BATCH, *args, **kwargs)
        assert set(seen) == {"train"}
        np.testing.assert_allclose(info.loss, two.mean_square(two.P, two.BATCH), rtol=1e-6)


def counting_signs(updates, state, params=None):
    return updates, jnp.any(updates > 0).astype(jnp.int32)


def with_held_out(params, batch, held_out=0.0):
    return two.mean_square(params, batch) + held_out


def held_out(regularizer, loss=two.mean_square, batch=two.BATCH):
    init, step = make_train_step(loss, SGD, regularizer)
    step(init(two.P), two.BATCH, held_out=batch)


def chained(*several, **options):
    return functools.partial(two.one_step, optimizer=optax.chain(*several, SGD), **options)


SIGNS = optax.GradientTransformation(lambda params: jnp.int32(0), counting_signs)
FOREIGN = optax.with_extra_args_support(optax.identity())
PENALISED = gr.regularized_loss(two.mean_square, two.FD)
IN_THE_LOSS = {"loss": PENALISED, "regularizer": None}
TUNED, ODD = gr.relative_gradreg(strength=None), two.BATCH[:3]
IN_PARTS = gr.microbatched(two.mean_square, 2)
in_the_loss = functools.partial(two.one_step, regularizer=sam(rho=0.1))
REFUSED = {  # an error and its text -> calls
    (TypeError, "train_step: ... held_out="): [
        lambda: held_out(gr.relative_gradreg(strength=0.5)),
        lambda: held_out(None),
    ],
    (ValueError, "held_out=: microbatched: count"): [lambda: held_out(TUNED, IN_PARTS, ODD)],
    (ValueError, "train_step: ... with ascent_groups, counters and keys in the ... state must"): [
        lambda: two.one_step(regularizer=optax.chain(two.FD, SIGNS), ascent_groups=2)
    ],
    (TypeError, "train_step: ... penalty_fraction needs a transformation of this package"): [
        lambda: two.one_step(regularizer=FOREIGN, penalty_fraction=0.5)
    ],
    (ValueError, "train_step: ... penalise twice ... optax.chain"): [
        chained(gr.relative_gradreg()),
        chained(optax.chain(optax.identity(), two.FD)),
    ],
    (ValueError, "train_step: ... penalise twice ... Remove one"): [
        lambda: in_the_loss(jax.jit(PENALISED)),
        lambda: in_the_loss(jax.checkpoint(PENALISED)),
        chained(two.FD, **IN_THE_LOSS),
    ],
    (TypeError, "train_step: ... argument 'held_out' ... Rename"): [
        lambda: make_train_step(with_held_out, SGD),
        lambda: gr.make_nnx_train_step(with_held_out),
    ],
}


@pytest.mark.parametrize(("error", "text"), REFUSED)
def test_what_a_step_cannot_do_is_refused(error, text):
    for call in REFUSED[error, text]:
        with two.says(error, *text.split(" ... ")):
            call()


def test_a_penalty_in_the_loss_or_in_the_optimizer_alone_is_that_of_the_step():
    expected, _ = two.one_step()
    for options in (
        IN_THE_LOSS,
        {"optimizer": optax.chain(two.FD, SGD), "regularizer": None},
        # no penalty in the loss
        {"loss": gr.regularized_loss(two.mean_square, optax.clip(100.0))},
    ):
        found, _ = two.one_step(**options)
        np.testing.assert_allclose(found.params, expected.params, rtol=1e-6)
