"""Inside Optax's combinators: what works, what is documented to differ, and what JAX's
transformations leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax
from gradreg_optax import fd_gradreg, masked
from problems import add, batch_of, flat, loss_fn, params_of, regularized, update_of

fd = fd_gradreg(gamma=0.3, epsilon=0.2)
sgd = optax.sgd(0.1)
ROUNDING = {"rtol": 1e-11, "atol": 1e-13}  # three steps of eps(float64) |g| gamma / epsilon
MEAN = {"rtol": 1e-7}  # the running mean of MultiSteps divides in float32
gradient_of = jax.jit(jax.grad(loss_fn))
regularized = jax.jit(regularized)


def mean_of(a, b):
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


def steps_of(tx, params, batches):
    """The parameters after each of some updates, stacked, and the last state."""

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        extra = {"value": value, "grad": gradient, "value_fn": lambda p: loss_fn(p, batch)}
        updates, state = tx.update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), trace = jax.lax.scan(step, (params, tx.init(params)), batches)
    return trace, state


def run(tx, batches=None, steps=3):
    """The parameters before and after each of ``steps`` updates, and the state."""
    batches = [batch_of()] * steps if batches is None else batches
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    trace, state = jax.jit(lambda: steps_of(tx, params_of(), stacked))()
    after = [jax.tree.map(lambda x, i=i: x[i], trace) for i in range(len(batches))]
    return [params_of(), *after], state


BEHIND = {
    "conditionally_mask": optax.conditionally_mask(sgd, lambda step: step >= 0),
    "apply_if_finite": optax.apply_if_finite(sgd, 3),
    "masked": optax.masked(sgd, True),
    "partition": optax.partition({"x": sgd, "y": sgd}, {"kernel": "x", "out": "y"}),
    "MultiSteps of one": optax.MultiSteps(sgd, 1).gradient_transformation(),
    "reduce_on_plateau": optax.chain(sgd, optax.contrib.reduce_on_plateau()),
}


def wrapped(make, options):
    """Every wrapper that forwards extra arguments, around or behind T in chain(T, sgd)."""
    tx = make(**options)
    fired = optax.conditionally_transform(tx, lambda step: step >= 0)
    return {
        "inject_hyperparams": optax.chain(optax.inject_hyperparams(make)(**options), sgd),
        "conditionally_transform": optax.chain(fired, sgd),
        "MultiSteps of one around": optax.MultiSteps(optax.chain(tx, sgd), 1),
        "named_chain": optax.named_chain(("gradreg", tx), ("sgd", sgd)),
        "nested chain": optax.chain(optax.chain(optax.identity(), tx), sgd),
        "inject_hyperparams around a factory": optax.inject_hyperparams(
            lambda rate: optax.chain(make(**options), optax.sgd(rate))
        )(rate=0.1),
        **{f"{name} behind": optax.chain(tx, behind) for name, behind in BEHIND.items()},
    }


FAMILIES = {
    "fd_gradreg": {"gamma": 0.3, "epsilon": 0.2},
    "dbp_gradreg": {"gamma": 0.3},
    "sam": {"rho": 0.2},
    "flooding": {"level": 100.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_transformation_in_every_wrapper_is_the_one_in_a_chain(x64, family):
    make, options = getattr(gradreg_optax, family), FAMILIES[family]
    # the others have the update and the state of the first one: the wrappers around them are enough
    several = list(wrapped(make, options).items())[: None if family == "fd_gradreg" else 3]
    several += [("plain", sgd), ("chain", optax.chain(make(**options), sgd))]
    batches = jax.tree.map(lambda x: np.stack([x, x]), batch_of())
    found = jax.jit(lambda: [steps_of(tx, params_of(), batches)[0] for _, tx in several])()
    *found, plain, expected = (flat(jax.tree.map(lambda x: x[-1], trace)) for trace in found)
    assert np.abs(plain - expected).max() > 1e-2
    for (name, _), params in zip(several, found, strict=False):
        np.testing.assert_allclose(params, expected, **ROUNDING, err_msg=name)


def test_lookahead_passes_nothing_on_and_takes_a_loss_of_the_parameters_alone():
    """Its update has no extra arguments: a loss at construction works, ``value_fn=`` does not."""
    params, batch = optax.LookaheadParams(params_of(), params_of()), batch_of()
    regularizer = fd_gradreg(lambda p: loss_fn(p, batch), gamma=0.3, epsilon=0.2)
    tx = optax.lookahead(optax.chain(regularizer, sgd), 5, 0.5)
    updates, _ = jax.jit(tx.update)(gradient_of(params.fast, batch), tx.init(params), params)
    expected = regularized(params.fast, batch)
    np.testing.assert_allclose(flat(updates.fast), -0.1 * flat(expected), rtol=1e-5)


def test_injected_hyperparameters_can_be_changed_between_steps(x64):
    params, batch = params_of(), batch_of()
    gradient = gradient_of(params, batch)
    mask = masked({"kernel": True, "out": True})  # a function and a flag are static
    tx = optax.inject_hyperparams(fd_gradreg, static_args=("loss_fn", "ascent"))(
        loss_fn, gamma=0.3, epsilon=0.2, interval=2, ascent=mask, reuse_updates=False
    )
    update = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch))
    state = tx.init(params)
    assert set(state.hyperparams) == {"gamma", "epsilon", "interval", "start"}
    first, state = update(state)
    expected = flat(regularized(params, batch, gamma=0.6))  # interval gamma
    np.testing.assert_allclose(flat(first), expected, **ROUNDING)
    second, state = update(state)
    np.testing.assert_array_equal(flat(second), flat(gradient))
    changed = {"gamma": jnp.float64(0.1), "epsilon": jnp.float64(0.4), "interval": jnp.asarray(1)}
    state.hyperparams.update(changed)
    third, state = update(state)
    expected = flat(regularized(params, batch, gamma=0.1, epsilon=0.4))
    np.testing.assert_allclose(flat(third), expected, **ROUNDING)
    assert update._cache_size() == 1


def test_accumulation_behind_us_is_the_mean_of_regularized_gradients(x64):
    batches = [batch_of(1), batch_of(2)]
    behind = optax.MultiSteps(sgd, 2).gradient_transformation()
    trace, state = run(optax.chain(fd, behind), batches)
    grads = [regularized(trace[0], b) for b in batches]
    np.testing.assert_array_equal(flat(trace[1]), flat(trace[0]))
    expected = add(trace[0], mean_of(*grads), -0.1)
    np.testing.assert_allclose(flat(trace[2]), flat(expected), **MEAN)
    assert int(state[0].step) == 2
    # the mean of the micro-batches' penalties is not the penalty of their mean
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    penalised, mean = flat(regularized(trace[0], both)), flat(add(trace[0], trace[2], -1)) / 0.1
    assert np.linalg.norm(mean - penalised) > 0.1 * np.linalg.norm(penalised)


def test_accumulation_around_us_takes_the_loss_of_the_last_micro_batch(x64):
    batches = [batch_of(1), batch_of(2)]
    trace, _ = run(optax.MultiSteps(optax.chain(fd, sgd), 2), batches)
    grads = [gradient_of(trace[0], b) for b in batches]
    mean = mean_of(*grads)
    # g of the mean, g' of the last: not a difference of one function, which is why the
    # documentation says reuse_updates=False
    ahead = gradient_of(add(trace[0], mean, 0.2), batches[1])
    wrong = add(mean, add(ahead, mean, -1), 1.5)
    np.testing.assert_allclose(flat(trace[2]), flat(add(trace[0], wrong, -0.1)), **MEAN)
    own = fd_gradreg(gamma=0.3, epsilon=0.2, reuse_updates=False)
    trace, _ = run(optax.MultiSteps(optax.chain(own, sgd), 2), batches)
    correction = flat(regularized(trace[0], batches[1])) - flat(grads[1])
    expected = flat(trace[0]) - 0.1 * (flat(mean) + correction)
    np.testing.assert_allclose(flat(trace[2]), expected, **MEAN)


def test_conditionally_transform_evaluates_only_when_it_fires(counter):
    loss, params, batch = counter.wrap(loss_fn), params_of(), batch_of()
    tx = optax.conditionally_transform(fd, lambda step: step % 3 == 0)
    value_fn, state = lambda p: loss(p, batch), tx.init(params)
    update = jax.jit(lambda s: tx.update(params, s, params, value_fn=value_fn))
    for _ in range(4):
        _, state = update(state)
    assert counter.read()[1] == 2
    assert int(state.inner_state.step) == 2  # its counter sees the updates that reach it


def test_freezing_behind_a_mask_leaves_the_frozen_parameters_alone(x64):
    params, mask = params_of(), {"kernel": True, "out": False}
    freeze = optax.partition(
        {"train": sgd, "freeze": optax.set_to_zero()}, {"kernel": "train", "out": "freeze"}
    )
    regularizer = fd_gradreg(gamma=0.3, epsilon=0.2, ascent=masked(mask))
    (_, after), _ = run(optax.chain(regularizer, freeze), steps=1)
    np.testing.assert_array_equal(after["out"], params["out"])

    @jax.jit
    def update_alone(kernel):  # as if the frozen parameters were constants of the loss
        def partial_loss(kernel):
            return loss_fn(kernel | {"out": params["out"]}, batch_of())

        return update_of(fd, jax.grad(partial_loss)(kernel), kernel, value_fn=partial_loss)

    alone = update_alone({"kernel": params["kernel"]})
    expected = params["kernel"] - 0.1 * alone["kernel"]
    np.testing.assert_allclose(after["kernel"], expected, **ROUNDING)


def test_schedule_free_may_stand_on_either_side(x64):
    inside, _ = run(optax.contrib.schedule_free(optax.chain(fd, sgd), learning_rate=0.1))
    behind, state = run(optax.chain(fd, optax.contrib.schedule_free(sgd, learning_rate=0.1)))
    np.testing.assert_allclose(flat(inside[-1]), flat(behind[-1]), **ROUNDING)
    assert np.isfinite(flat(optax.contrib.schedule_free_eval_params(state[1], behind[-1]))).all()


@pytest.mark.skipif(not hasattr(optax, "snapshot"), reason="optax.snapshot came with 0.2.6")
def test_snapshot_and_tree_get_read_our_surroundings(x64):
    _, state = run(optax.chain(fd, optax.snapshot("after", optax.tree.norm), sgd), steps=1)
    expected = np.linalg.norm(flat(regularized(params_of(), batch_of())))
    np.testing.assert_allclose(optax.tree.get(state, "after"), expected, rtol=1e-12)
    assert int(optax.tree.get(state, "step")) == 1
