"""Study frontier: the cost of a cell, the choice of gamma, and resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax import fd_gradreg
from gradreg_optax.experiments import runs
from studies import frontier
from study import Study

SIZES = {"train_size": 64, "test_size": 100, "steps": 6, "report_seeds": 2, "choose_seeds": 2}
GRID = {"optimizers": ("sgd",), "gammas": (0.5, 1.0), "intervals": (1, 4)}
CONFIG = frontier.Config(**SIZES, **GRID, warmup=False)


def cell(found, fraction, interval, choice="search"):
    where = {"method": "F-GR", "fraction": fraction, "interval": interval, "choice": choice}
    return runs.select(found["cells"], optimizer="sgd", **where)


def one(found, name, *where):
    """The value of a column in a cell."""
    (value,) = set(cell(found, *where)[name].tolist())
    return value


def test_the_flops_of_a_cell_are_its_gradients_and_those_of_skipped_steps_are_the_plain_ones(found):
    for fraction in CONFIG.fractions:
        every, fourth = (one(found, "flops", fraction, interval) for interval in (1, 4))
        assert fourth == pytest.approx(1 + (every - 1) / 4, rel=1e-7)  # saved to nine digits
        # the optimizer and the sum of two trees add a few operations per parameter
        assert every == pytest.approx(one(found, "gradients", fraction, 1), rel=0.02)
        assert fourth == pytest.approx(one(found, "gradients", fraction, 4), rel=0.02)


def test_gamma_is_the_best_of_the_choosing_seeds_and_reported_on_others(found):
    assert not set(found["seeds"]["choose"]) & set(found["seeds"]["report"])
    axes, search = frontier.searched(found, "sgd")
    for i, fraction in enumerate(axes["fraction"]):
        for j, interval in enumerate(axes["interval"]):
            best = CONFIG.gammas[int(np.argmax(search[i, j]))]
            assert one(found, "gamma", fraction, interval) == best


def test_the_rule_scales_the_gamma_of_the_full_penalty_by_the_ratio_of_the_squared_norms(found):
    probes = runs.select(found["probes"], optimizer="sgd")
    full, part = (runs.select(probes, fraction=f)["norm"].mean() for f in CONFIG.fractions)
    gamma = one(found, "gamma", 1.0, 1)
    for interval in CONFIG.intervals:
        assert one(found, "gamma", 1.0, interval, "rule") == gamma
        # gamma is rounded to two digits
        ruled = one(found, "gamma", 0.25, interval, "rule")
        assert ruled == pytest.approx(gamma * full / part, rel=0.05)
    # between f and 1 in expectation; a tenth for the noise of 16 batches
    assert 0.25 * 0.9 < full / part < 1
    # one setting trains to one result, chosen by the search or by the rule
    searched, ruled = cell(found, 1.0, 1), cell(found, 1.0, 1, "rule")
    np.testing.assert_array_equal(searched["accuracy"], ruled["accuracy"])


class TestStudy(Study):
    study = frontier
    rows = ("F-GR",)


def test_kappa_is_one_minus_the_factor_of_a_penalised_step_on_a_quadratic():
    curvature, gammas, intervals, rate = np.array([0.5, 2.0]), (0.5, 3.0), (1, 4), 0.2
    axes = {"optimizer": ["sgd"], "fraction": [1.0, 0.5], "interval": intervals, "gamma": gammas}
    probed = {"optimizer": ["sgd"], "step": [0, 1], "fraction": [1.0, 0.5]}
    eigenvalues = np.stack([0.5 * curvature, 1.5 * curvature])  # the mean over the training counts
    made = {
        "search": runs.tidy(axes, accuracy=np.zeros((1, 2, 2, 2))),
        "learning_rates": {"sgd": rate},
        "probes": runs.tidy(probed, eigenvalue=eigenvalues),
    }
    kappas = frontier.kappa(made)
    assert kappas.shape == (2, 2, 2)

    @functools.partial(jax.jit, static_argnames="interval")
    def update(h, gamma, interval):
        tx = fd_gradreg(lambda p: h * p**2 / 2, gamma=gamma, epsilon=0.1, interval=interval)
        x = jnp.float32(1.0)
        return tx.update(h, tx.init(x), x)[0]

    for (i, j, k), kappa in np.ndenumerate(kappas):
        step = update(np.float32(curvature[i]), gammas[k], interval=intervals[j])
        assert kappa == pytest.approx(rate * float(step), rel=1e-4)


def test_a_cell_keeps_up_until_it_is_one_standard_error_below():
    full = {"accuracy": np.array([0.8, 0.9, 0.85])}
    other = full["accuracy"] + np.array([-0.01, 0.0, 0.01])
    error = 0.01 / np.sqrt(3)
    assert frontier.keeps_up({"accuracy": other - 0.99 * error}, full)
    assert not frontier.keeps_up({"accuracy": other - 1.01 * error}, full)
    diverged = {"accuracy": np.array([0.9, np.nan, 0.9])}
    assert not frontier.keeps_up(diverged, full)


def test_the_share_of_the_gain_is_one_for_the_full_penalty_and_zero_for_the_plain_optimizer():
    values = [(0.7, 0.7), (0.8, 0.9), (0.75, 0.8)]
    plain, full, half = ({"accuracy": np.array(value)} for value in values)
    gains = [frontier.relative_gain(one, full, plain) for one in (plain, full, half)]
    assert gains == pytest.approx([0, 1, 0.5])
