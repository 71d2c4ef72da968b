"""Flooding's two-step identities, their violations, and their measurement by the experiment."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import flooding, models, results
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.flooding import (
    BEYOND,
    ORDERS,
    Config,
    deviation,
    loss_fn,
    regularization,
    two_steps,
)

COMMITTED = Path(__file__).parents[2] / "notebooks/results/flooding"
SIZES = {"seeds": 2, "train_size": 64, "width": 8, "steps": 240, "records": 3, "batch_size": 16}
SMALL = Config(**SIZES, learning_rate=0.5, level=1.2, smaller=2)

traced_steps, traced_penalty = jax.jit(two_steps), jax.jit(regularization)
value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
slow = pytest.mark.slow
orders = st.sampled_from(sorted(ORDERS))
seeds = st.integers(0, 2**16)
steps = st.floats(1e-3, 1.0)


def problem(seed):
    """Weights of a small network, and two batches."""
    rng = np.random.default_rng(seed)
    params = models.build("mlp", (8, 8, 1), 10, width=3).init(jax.random.key(seed))
    batches = [(rng.normal(size=(6, 8, 8, 1)), rng.integers(0, 10, 6)) for _ in range(2)]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params), batches


@pytest.mark.usefixtures("x64")
@given(seed=seeds, eta=steps, order=orders)
def test_two_steps_on_one_batch_are_one_step_of_the_penalty(seed, eta, order):
    params, (batch, _) = problem(seed)
    found = deviation(params, (batch, batch), eta, momentum=0.0, sign=ORDERS[order])
    assert found["drift"] > 0
    assert found["largest"] < 1e-14  # rounding of parameters and gradients of order ten: some 1e-15


@pytest.mark.usefixtures("x64")
@given(seed=seeds, eta=st.floats(1e-3, 0.03))
def test_one_level_between_the_two_losses_makes_flooding_ascend_and_descend(seed, eta):
    params, (batch, _) = problem(seed)
    value, gradient = value_and_grad(params, batch)
    higher = jax.tree.map(lambda p, g: p + eta * g, params, gradient)
    above, ahead = value_and_grad(higher, batch)
    level = (value + above) / 2
    moved = traced_steps(params, (batch, batch), jnp.array([level, level]), eta, 0.0)
    by_hand = jax.tree.map(lambda p, h, g: h - eta * g - p, params, higher, ahead)
    for found, expected in zip(jax.tree.leaves(moved), jax.tree.leaves(by_hand), strict=True):
        # the same operations in another order
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
@given(seed=seeds, eta=steps, momentum=st.floats(0.1, 0.99), order=orders)
def test_momentum_leaves_a_remainder_of_eta_times_momentum_times_the_gradient(
    seed, eta, momentum, order
):
    params, (batch, _) = problem(seed)
    sign = ORDERS[order]
    levels = BEYOND * jnp.array([sign, -sign])
    moved = traced_steps(params, (batch, batch), levels, eta, momentum)
    predicted = traced_penalty(params, batch, eta, sign)
    _, gradient = value_and_grad(params, batch)
    for found, drift, g in zip(*map(jax.tree.leaves, (moved, predicted, gradient)), strict=True):
        np.testing.assert_allclose(found - drift, sign * eta * momentum * g, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", ORDERS)
def test_different_batches_leave_a_remainder_that_exceeds_the_penalty_by_one_over_eta(order):
    params, batches = problem(0)
    found = partial(deviation, params, tuple(batches), momentum=0.0, sign=ORDERS[order])
    relative = [float(found(eta)["relative"]) for eta in (1e-4, 1e-3)]
    assert relative[1] > 100
    # up to the next order in eta
    np.testing.assert_allclose(relative[0] / relative[1], 10, rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"), [({"records": 999}, "at most 240"), ({"batch_size": 60}, "at most 32")]
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(CommandError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.fixture(scope="module", params=["committed", pytest.param("trained", marks=slow)])
def found(request, tmp_path_factory):
    """The committed results, and those of a small run, as they come back from disk."""
    if request.param == "committed":
        return results.load(COMMITTED)
    config = dataclasses.replace(SMALL, output=tmp_path_factory.mktemp("flooding"))
    return results.load(results.save(config.output, "flooding", config, flooding.run(config)))


@pytest.fixture(scope="module")
def curves(found):
    return flooding.curves(found)


def test_plain_descent_falls_below_the_level_and_flooding_stays_at_it(found, curves):
    training, level = curves, found["level"]
    assert np.all(training["plain descent"]["sign"] == 1)
    assert training["plain descent"]["loss"][:, -1].max() < level / 2
    for name in ("flooding", "flooding, small steps", "flooding, momentum"):
        # one step changes the loss by about learning_rate * |gradient|^2 = a few hundredths
        np.testing.assert_allclose(training[name]["loss"][:, -1], level, atol=0.05, err_msg=name)
        assert np.abs(training[name]["sign"][:, -1]).max() < 0.2, name


def test_only_flooding_without_momentum_and_with_one_batch_alternates(curves):
    late = {name: part["alternation"][:, -1] for name, part in curves.items()}
    assert late["flooding, small steps"].min() > 0.9
    assert late["flooding, momentum"].max() < 0.7
    assert late["flooding, different batches"].max() < 0.9


def test_every_variant_has_the_same_time_and_eigenvalues_with_small_residuals(curves):
    for part in curves.values():
        np.testing.assert_allclose(part["time"], curves["flooding"]["time"])
        assert part["eigenvalue"].shape == (len(part["seed"]), len(part["time"]))
        assert np.all(part["residual"] < 0.1 * part["eigenvalue"])
