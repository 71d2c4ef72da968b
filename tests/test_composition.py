"""Inside Optax's combinators: what works, what is documented to differ, and what JAX's
transformations leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax
from gradreg_optax import GradregState, dbp_gradreg, fd_gradreg, flooding, masked, sam
from problems import add, batch_of, flat, loss_fn, params_of, regularized, relative_error


def descend(params, gradients, rate=0.1):
    return add(params, gradients, -rate)


def run(tx, steps=3, batches=None, with_value=False, **fixed):
    """``steps`` updates under jit with ``value_fn=`` a new lambda at every trace."""
    params = params_of()

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        extra = {"value": value, "grad": gradient} if with_value else {}
        updates, state = tx.update(
            gradient, state, params, value_fn=lambda p: loss_fn(p, batch), **extra, **fixed
        )
        return optax.apply_updates(params, updates), state

    state, trace = tx.init(params), [params]
    for i in range(steps):
        params, state = step(params, state, batch_of() if batches is None else batches[i])
        trace.append(params)
    # the state of optax's line searches changes its weak types once
    assert step._cache_size() == 1 or with_value
    return trace, state


def by_hand(steps=3, batches=None, **settings):
    trace = [params_of()]
    for i in range(steps):
        trace.append(
            descend(
                trace[-1],
                regularized(trace[-1], batch_of() if batches is None else batches[i], **settings),
            )
        )
    return trace


fd = fd_gradreg(gamma=0.3, epsilon=0.2)
sgd = optax.sgd(0.1)
ROUNDING = {"rtol": 1e-11, "atol": 1e-13}  # three steps of eps(float64) |g| gamma / epsilon


MEAN = {"rtol": 1e-7}  # the running mean of MultiSteps divides in float32


# Every wrapper that forwards extra arguments, around or behind a transformation T in chain(T, sgd):
# no rearrangement changes the answer.
WRAPPERS = {
    "named_chain": lambda make, options, sgd: optax.named_chain(
        ("gradreg", make(**options)), ("sgd", sgd)
    ),
    "nested chain": lambda make, options, sgd: optax.chain(
        optax.chain(optax.identity(), make(**options)), sgd
    ),
    "inject_hyperparams": lambda make, options, sgd: optax.chain(
        optax.inject_hyperparams(make)(**options), sgd
    ),
    "inject_hyperparams around a factory": lambda make, options, sgd: optax.inject_hyperparams(
        lambda rate: optax.chain(make(**options), optax.sgd(rate))
    )(rate=0.1),
    "conditionally_transform": lambda make, options, sgd: optax.chain(
        optax.conditionally_transform(make(**options), lambda step: step >= 0), sgd
    ),
    "conditionally_mask": lambda make, options, sgd: optax.chain(
        make(**options), optax.conditionally_mask(sgd, lambda step: step >= 0)
    ),
    "apply_if_finite behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.apply_if_finite(sgd, 3)
    ),
    "clip behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.clip_by_global_norm(1e3), sgd
    ),
    "masked behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.masked(sgd, True)
    ),
    "partition behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.partition({"x": sgd, "y": sgd}, {"kernel": "x", "out": "y"})
    ),
    "flatten behind": lambda make, options, sgd: optax.chain(make(**options), optax.flatten(sgd)),
    "MultiSteps of one around": lambda make, options, sgd: _forwarding(
        optax.MultiSteps(optax.chain(make(**options), sgd), 1)
    ),
    "MultiSteps of one behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.MultiSteps(sgd, 1).gradient_transformation()
    ),
    "reduce_on_plateau behind": lambda make, options, sgd: optax.chain(
        make(**options), sgd, optax.contrib.reduce_on_plateau()
    ),
    "split_real_and_imaginary behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.contrib.split_real_and_imaginary(sgd)
    ),
}


def _forwarding(multi_steps):
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)


FAMILIES = {
    "fd_gradreg": {"gamma": 0.3, "epsilon": 0.2},
    "dbp_gradreg": {"gamma": 0.3},
    "gradient_norm_penalty": {"gamma": 0.3, "epsilon": 0.2},
    "sam": {"rho": 0.2},
    "asam": {"rho": 0.2},
    "flooding": {"level": 100.0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def in_a_chain(request):
    """(transformation, its options, the parameters after two steps of chain(transformation,
    sgd))."""
    make, options = getattr(gradreg_optax, request.param), FAMILIES[request.param]
    with jax.enable_x64(True):
        trace, _ = run(optax.chain(make(**options), sgd), steps=2, with_value=True)
        plain, _ = run(sgd, steps=2)
        assert relative_error(trace[-1], plain[-1]) > 1e-2
    return make, options, trace[-1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_transformation_in_every_wrapper_is_the_one_in_a_chain(x64, in_a_chain, wrapper):
    make, options, expected = in_a_chain
    trace, _ = run(WRAPPERS[wrapper](make, options, sgd), steps=2, with_value=True)
    np.testing.assert_allclose(flat(trace[-1]), flat(expected), **ROUNDING)


def test_lookahead_passes_nothing_on_and_takes_a_loss_of_the_parameters_alone():
    """Its update has no extra arguments: a loss at construction works, ``value_fn=`` does not."""
    params, batch = optax.LookaheadParams(params_of(), params_of()), batch_of()
    regularizer = fd_gradreg(lambda p: loss_fn(p, batch), gamma=0.3, epsilon=0.2)
    tx = optax.lookahead(optax.chain(regularizer, sgd), 5, 0.5)
    updates, _ = tx.update(jax.grad(loss_fn)(params.fast, batch), tx.init(params), params)
    expected = regularized(params.fast, batch)
    np.testing.assert_allclose(flat(updates.fast), -0.1 * flat(expected), rtol=1e-5)


def test_regularizers_can_be_chained_with_flooding_behind(x64):
    batch, params = batch_of(), params_of()
    level = 2 * float(loss_fn(params, batch))
    trace, _ = run(optax.chain(fd, flooding(level=level), sgd), steps=1, with_value=True)
    np.testing.assert_allclose(
        flat(trace[-1]), flat(descend(params, regularized(params, batch), -0.1)), **ROUNDING
    )


def test_injected_hyperparameters_can_be_changed_between_steps(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    tx = optax.inject_hyperparams(fd_gradreg, static_args=("loss_fn",))(
        loss_fn, gamma=0.3, epsilon=0.2, interval=2
    )
    update = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch))
    state = tx.init(params)
    assert set(state.hyperparams) == {"gamma", "epsilon", "interval", "start"}
    first, state = update(state)
    # interval gamma
    np.testing.assert_allclose(flat(first), flat(regularized(params, batch, gamma=0.6)), **ROUNDING)
    second, state = update(state)
    np.testing.assert_array_equal(flat(second), flat(gradient))
    state.hyperparams["gamma"], state.hyperparams["epsilon"] = (
        jnp.asarray(0.1, jnp.float64),
        jnp.asarray(0.4, jnp.float64),
    )
    state.hyperparams["interval"] = jnp.asarray(1)
    third, state = update(state)
    np.testing.assert_allclose(
        flat(third), flat(regularized(params, batch, gamma=0.1, epsilon=0.4)), **ROUNDING
    )
    assert update._cache_size() == 1
    # without jit the values are concrete, and checked
    tx.update(gradient, state, params, batch=batch)
    state.hyperparams["gamma"] = jnp.asarray(-1.0)
    with pytest.raises(ValueError, match="fd_gradreg: gamma must be finite and >= 0, got -1"):
        tx.update(gradient, state, params, batch=batch)


@pytest.mark.parametrize(
    "static", [{"ascent": masked({"kernel": True, "out": False})}, {"reuse_updates": False}]
)
def test_injected_transformations_take_functions_and_flags_as_static(x64, static):
    names = ("loss_fn", "ascent") if "ascent" in static else "loss_fn"
    injected = optax.inject_hyperparams(fd_gradreg, static_args=names)(
        loss_fn, gamma=0.3, epsilon=0.2, **static
    )
    plain = fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2, **static)
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    a, b = (
        jax.jit(lambda tx=tx: tx.update(gradient, tx.init(params), params, batch=batch)[0])()
        for tx in (injected, plain)
    )
    np.testing.assert_allclose(flat(a), flat(b), **ROUNDING)


def test_injected_schedules_and_other_families_work(x64):
    ramp = optax.linear_schedule(0.0, 0.2, 2)
    for factory in (
        lambda s: optax.inject_hyperparams(sam)(rho=s),
        lambda s: optax.inject_hyperparams(dbp_gradreg)(gamma=s),
    ):
        trace, state = run(optax.chain(factory(ramp), sgd))
        assert np.isfinite(flat(trace[-1])).all()
        np.testing.assert_allclose(
            flat(trace[1]),
            flat(descend(trace[0], jax.grad(loss_fn)(trace[0], batch_of()))),
            **ROUNDING,
        )
        assert int(state[0].count) == 3


def test_accumulation_behind_us_is_the_mean_of_regularized_gradients(x64):
    batches = [batch_of(1), batch_of(2)]
    trace, state = run(
        optax.chain(fd, optax.MultiSteps(sgd, 2).gradient_transformation()),
        steps=2,
        batches=batches,
    )
    grads = [regularized(trace[0], b) for b in batches]
    np.testing.assert_array_equal(flat(trace[1]), flat(trace[0]))
    np.testing.assert_allclose(
        flat(trace[2]),
        flat(descend(trace[0], jax.tree.map(lambda a, b: (a + b) / 2, *grads))),
        **MEAN,
    )
    assert int(state[0].step) == 2
    # the mean of the micro-batches' penalties is not the penalty of their mean
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    mean = jax.tree.map(lambda p, q: (p - q) / 0.1, trace[0], trace[2])
    assert relative_error(mean, regularized(trace[0], both)) > 0.1


def test_accumulation_around_us_takes_the_loss_of_the_last_micro_batch(x64):
    batches = [batch_of(1), batch_of(2)]
    trace, _ = run(optax.MultiSteps(optax.chain(fd, sgd), 2), steps=2, batches=batches)
    mean = jax.tree.map(
        lambda a, b: (a + b) / 2, *[jax.grad(loss_fn)(trace[0], b) for b in batches]
    )
    # g of the mean, g' of the last: not a difference of one function, which is why the
    # documentation says reuse_updates=False
    ahead = jax.grad(loss_fn)(jax.tree.map(lambda p, g: p + 0.2 * g, trace[0], mean), batches[1])
    wrong = jax.tree.map(lambda m, a: m + 1.5 * (a - m), mean, ahead)
    np.testing.assert_allclose(flat(trace[2]), flat(descend(trace[0], wrong)), **MEAN)
    own = fd_gradreg(gamma=0.3, epsilon=0.2, reuse_updates=False)
    trace, _ = run(optax.MultiSteps(optax.chain(own, sgd), 2), steps=2, batches=batches)
    correction = flat(regularized(trace[0], batches[1])) - flat(
        jax.grad(loss_fn)(trace[0], batches[1])
    )
    np.testing.assert_allclose(
        flat(trace[2]), flat(trace[0]) - 0.1 * (flat(mean) + correction), **MEAN
    )


def test_a_difference_that_is_not_finite_is_caught_by_apply_if_finite_behind_us():
    def explosive(params):
        return jnp.sum(jnp.where(params < 2, params**2, jnp.nan * params))

    params = jnp.asarray([1.0, 1.5])
    tx = optax.chain(fd_gradreg(explosive, gamma=1.0, epsilon=1.0), optax.apply_if_finite(sgd, 5))
    updates, state = tx.update(jax.grad(explosive)(params), tx.init(params), params)
    assert not np.asarray(updates).any()
    assert not bool(state[1].last_finite)


def test_conditionally_transform_evaluates_only_when_it_fires(counter):
    loss, params, batch = counter.wrap(loss_fn), params_of(), batch_of()
    tx = optax.conditionally_transform(
        fd_gradreg(loss, gamma=0.3, epsilon=0.2), lambda step: step % 3 == 0
    )
    update, state = jax.jit(lambda s: tx.update(params, s, params, batch=batch)), tx.init(params)
    for _ in range(4):
        _, state = update(state)
    assert counter.read()[1] == 2
    assert int(state.inner_state.step) == 2  # its counter sees the updates that reach it


def test_freezing_behind_a_mask_leaves_the_frozen_parameters_alone(x64):
    params, batch, mask = params_of(), batch_of(), {"kernel": True, "out": False}
    freeze = optax.partition(
        {"train": sgd, "freeze": optax.set_to_zero()}, {"kernel": "train", "out": "freeze"}
    )
    trace, _ = run(
        optax.chain(fd_gradreg(gamma=0.3, epsilon=0.2, ascent=masked(mask)), freeze), steps=1
    )
    np.testing.assert_array_equal(trace[1]["out"], params["out"])
    alone = {"kernel": params["kernel"]}  # as if the frozen parameters were constants of the loss

    def partial_loss(kernel):
        return loss_fn(kernel | {"out": params["out"]}, batch)

    tx = fd_gradreg(gamma=0.3, epsilon=0.2)
    updates, _ = tx.update(
        jax.grad(partial_loss)(alone), tx.init(alone), alone, value_fn=partial_loss
    )
    np.testing.assert_allclose(
        trace[1]["kernel"], params["kernel"] - 0.1 * updates["kernel"], **ROUNDING
    )


@pytest.mark.parametrize(
    "search", [optax.lbfgs(), optax.chain(sgd, optax.scale_by_backtracking_linesearch(5))]
)
def test_line_searches_share_our_arguments(x64, search):
    trace, _ = run(optax.chain(fd, search), steps=4, with_value=True)
    assert loss_fn(trace[-1], batch_of()) < loss_fn(trace[0], batch_of()) / 2


def test_our_own_further_arguments_reach_our_loss_and_nobody_elses(x64):
    params, batch = params_of(), batch_of()
    tx = optax.chain(
        fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2), optax.contrib.reduce_on_plateau(), sgd
    )
    value, gradient = jax.value_and_grad(loss_fn)(params, batch)
    updates, _ = tx.update(
        gradient, tx.init(params), params, value=value, batch=batch, meant_for_others=object()
    )
    np.testing.assert_allclose(flat(updates), -0.1 * flat(regularized(params, batch)), **ROUNDING)


def test_schedule_free_may_stand_on_either_side(x64):
    inside, _ = run(optax.contrib.schedule_free(optax.chain(fd, sgd), learning_rate=0.1))
    behind, state = run(optax.chain(fd, optax.contrib.schedule_free(sgd, learning_rate=0.1)))
    np.testing.assert_allclose(flat(inside[-1]), flat(behind[-1]), **ROUNDING)
    assert np.isfinite(flat(optax.contrib.schedule_free_eval_params(state[1], behind[-1]))).all()


@pytest.mark.skipif(not hasattr(optax, "snapshot"), reason="optax.snapshot came with 0.2.6")
def test_snapshot_and_tree_get_read_our_surroundings(x64):
    tx = optax.chain(
        optax.snapshot("before", optax.tree.norm), fd, optax.snapshot("after", optax.tree.norm), sgd
    )
    _, state = run(tx, steps=1)
    np.testing.assert_allclose(
        float(optax.tree.get(state, "after")),
        np.linalg.norm(flat(regularized(params_of(), batch_of()))),
        rtol=1e-12,
    )
    assert int(optax.tree.get(state, "step")) == 1


def test_updates_scan_and_their_state_has_a_fixed_type(x64):
    tx, params, batch = (
        optax.chain(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2, interval=2), sgd),
        params_of(),
        batch_of(),
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), params

    (last, state), trace = jax.jit(lambda c: jax.lax.scan(step, c, length=4))(
        (params, tx.init(params))
    )
    expected = params
    for i in range(4):
        gradient = (
            jax.grad(loss_fn)(expected, batch) if i % 2 else regularized(expected, batch, gamma=0.6)
        )
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x, i=i: x[i], trace)), flat(expected), **ROUNDING
        )
        expected = descend(expected, gradient)
    np.testing.assert_allclose(flat(last), flat(expected), **ROUNDING)
    assert state[0] == GradregState(step=4)


def test_updates_can_be_donated():
    tx, params, batch = (
        optax.chain(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2), sgd),
        params_of(),
        batch_of(),
    )

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    kept, _ = jax.jit(step)(params, tx.init(params))
    donated, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    np.testing.assert_array_equal(flat(kept), flat(donated))


def test_members_of_a_vmapped_ensemble_do_not_see_each_other(x64):
    tx, batch, members = (
        sam(loss_fn, rho=0.2, interval=2),
        batch_of(),
        [params_of(s) for s in (1, 2)],
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)

    def update(params):
        return tx.update(jax.grad(loss_fn)(params, batch), tx.init(params), params, batch=batch)[0]

    together = jax.jit(jax.vmap(update))(stacked)
    for i, params in enumerate(members):
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x, i=i: x[i], together)), flat(update(params)), **ROUNDING
        )
