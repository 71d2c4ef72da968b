"""Inside Optax's combinators: what works, what is documented to differ, and what JAX's
transformations leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import GradregState, dbp_gradreg, fd_gradreg, flooding, masked, sam


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def batch_of(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(size, 3))), "y": jnp.asarray(rng.normal(size=size))}


def params_of(seed=1):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=4))}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def regularized(params, batch, gamma=0.3, epsilon=0.2):
    """The forward difference by hand."""
    gradient = jax.grad(loss_fn)(params, batch)
    ahead = jax.grad(loss_fn)(jax.tree.map(lambda p, g: p + epsilon * g, params, gradient), batch)
    return jax.tree.map(lambda g, a: g + gamma / epsilon * (a - g), gradient, ahead)


def descend(params, gradients, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients)


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
    assert (
        step._cache_size() == 1 or with_value
    )  # the state of optax's line searches changes its weak types once
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


WRAPPERS = {
    "chain": optax.chain(fd, sgd),
    "named_chain": optax.named_chain(("gradreg", fd), ("sgd", sgd)),
    "nested chain": optax.chain(optax.chain(optax.identity(), fd), sgd),
    "apply_if_finite behind": optax.chain(fd, optax.apply_if_finite(sgd, 3)),
    "conditionally_transform, always": optax.chain(
        optax.conditionally_transform(fd, lambda step: step >= 0), sgd
    ),
    "partition behind": optax.chain(
        fd, optax.partition({"a": sgd, "b": optax.sgd(0.1)}, {"kernel": "a", "out": "b"})
    ),
    "masked behind": optax.chain(fd, optax.masked(optax.scale(-0.1), True)),
    "flatten behind": optax.chain(fd, optax.flatten(sgd)),
    "inject_hyperparams": optax.chain(
        optax.inject_hyperparams(fd_gradreg)(gamma=0.3, epsilon=0.2), sgd
    ),
    "inject_hyperparams around a factory": optax.inject_hyperparams(
        lambda gamma, rate: optax.chain(fd_gradreg(gamma=gamma, epsilon=0.2), optax.sgd(rate))
    )(gamma=0.3, rate=0.1),
    "MultiSteps of one": optax.MultiSteps(optax.chain(fd, sgd), 1).gradient_transformation(),
    "skip_not_finite": optax.chain(
        fd, optax.apply_if_finite(optax.chain(optax.identity(), sgd), 1)
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_nothing(x64, name):
    tx = WRAPPERS[name]
    if name == "MultiSteps of one":
        tx = optax.MultiSteps(optax.chain(fd, sgd), 1)
    trace, _ = run(tx)
    np.testing.assert_allclose(flat(trace[-1]), flat(by_hand()[-1]), **ROUNDING)


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
    np.testing.assert_allclose(
        flat(first), flat(regularized(params, batch, gamma=0.6)), **ROUNDING
    )  # interval gamma
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
    tx.update(
        gradient, state, params, batch=batch
    )  # without jit the values are concrete, and checked
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
