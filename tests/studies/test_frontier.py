"""Study frontier: the cost of a cell, the choice of gamma, and resuming."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax import fd_gradreg
from gradreg_optax.experiments import results, runs, trainer
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.trainer import METHODS, Recipe, Trainer
from studies import frontier

CONFIG = frontier.Config(
    train_size=64,
    test_size=100,
    steps=6,
    optimizers=("sgd",),
    gammas=(0.5, 1.0),
    intervals=(1, 4),
    report_seeds=2,
    choose_seeds=2,
    warmup=False,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = dataclasses.replace(CONFIG, output=tmp_path_factory.mktemp("frontier"))
    return config, results.plain(frontier.run(config))


@pytest.fixture(scope="module")
def found(made):
    config, document = made
    return results.load(results.save(config.output, "frontier", config, document))


def cell(found, fraction, interval, choice="search"):
    where = {"method": "F-GR", "fraction": fraction, "interval": interval, "choice": choice}
    return runs.select(found["cells"], optimizer="sgd", **where)


def one(found, name, *where):
    """The value of a column in a cell."""
    (value,) = set(cell(found, *where)[name].tolist())
    return value


@pytest.mark.parametrize(
    ("fraction", "interval", "count"),
    [
        (1.0, 1, 2.0),
        (1.0, 4, 1.25),
        (0.25, 1, 1.5),
        (0.25, 4, 1.125),
        (0.25, 8, 1.0625),
        (0.5, 1, 2.0),
    ],
)
def test_a_cell_costs_one_gradient_and_those_of_its_penalty(fraction, interval, count):
    assert METHODS["F-GR"].cost(fraction, interval) == count


def test_the_flops_of_a_cell_are_its_gradients(found):
    for fraction in CONFIG.fractions:
        for interval in CONFIG.intervals:
            flops, gradients = (
                one(found, name, fraction, interval) for name in ("flops", "gradients")
            )
            # the optimizer and the sum of two trees add a few operations per parameter
            assert flops == pytest.approx(gradients, rel=0.02)


def test_the_cost_of_skipped_steps_is_that_of_the_plain_step(found):
    for fraction in CONFIG.fractions:
        every, fourth = (one(found, "flops", fraction, interval) for interval in (1, 4))
        assert fourth == pytest.approx(1 + (every - 1) / 4, rel=1e-7)  # saved to nine digits


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


def test_one_setting_trains_to_one_result_whatever_chose_it(found):
    searched, ruled = cell(found, 1.0, 1), cell(found, 1.0, 1, "rule")
    np.testing.assert_array_equal(searched["accuracy"], ruled["accuracy"])


def test_a_second_start_trains_nothing_and_gives_the_same(made, monkeypatch):
    config, document = made

    def refuse(*_, **__):
        raise AssertionError("a finished part was trained again")

    monkeypatch.setattr(Trainer, "states", refuse)  # a call goes through it as well
    assert results.plain(frontier.run(config)) == document


def test_table_and_figure_show_every_cell(found, tmp_path):
    text = frontier.table(found)
    assert (
        text.count("\nF-GR ") == 7
    )  # four cells by search, four by rule, and the full penalty only once
    assert "twice the steps" in text
    assert "factor on gamma for f = 0.25" in text
    (path,) = frontier.plot(found, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_kappa_is_one_minus_the_factor_of_a_penalised_step_on_a_quadratic():
    curvature, rate, gammas, intervals = (
        np.array([0.5, 2.0]),
        0.2,
        np.array([0.5, 1.0, 3.0]),
        np.array([1, 4]),
    )
    probes = {
        "eigenvalue": np.stack([0.5 * curvature, 1.5 * curvature])
    }  # the mean over the training counts
    search = runs.tidy(
        {"optimizer": ["sgd"], "fraction": [1.0, 0.5], "interval": intervals, "gamma": gammas},
        accuracy=np.zeros((1, 2, 2, 3)),
    )
    axes = {"optimizer": ["sgd"], "step": [0, 1], "fraction": [1.0, 0.5]}
    made = {
        "search": search,
        "learning_rates": {"sgd": rate},
        "probes": runs.tidy(axes, **probes),
    }
    kappas = frontier.kappa(made)
    assert kappas.shape == (2, 2, 3)
    for i, value in enumerate(curvature):
        for j, interval in enumerate(intervals):
            for k, gamma in enumerate(gammas):
                tx = fd_gradreg(
                    lambda p, h=value: h * p**2 / 2,
                    gamma=gamma,
                    epsilon=0.1,
                    interval=int(interval),
                )
                update, _ = tx.update(
                    jnp.float32(value), tx.init(jnp.float32(1.0)), jnp.float32(1.0)
                )
                assert kappas[i, j, k] == pytest.approx(rate * float(update), rel=1e-4)


def test_the_search_is_shown_with_every_accuracy(found):
    text = frontier.table(found)
    rows = text[text.index("seeds that choose gamma") :].splitlines()[2:6]
    assert [row.split()[:2] for row in rows] == [
        ["1", "1"],
        ["1", "4"],
        ["0.25", "1"],
        ["0.25", "4"],
    ]
    shown = [[float(value) for value in row.split()[2::2]] for row in rows]
    np.testing.assert_allclose(
        shown, 100 * frontier.searched(found, "sgd")[1].reshape(4, -1), atol=0.05 + 1e-9
    )


def test_a_cell_keeps_up_until_it_is_one_standard_error_below():
    full = {"accuracy": np.array([0.8, 0.9, 0.85])}
    spread = np.array([-0.01, 0.0, 0.01])
    error = 0.01 / np.sqrt(3)
    assert frontier.keeps_up({"accuracy": full["accuracy"] + spread - 0.99 * error}, full)
    assert not frontier.keeps_up({"accuracy": full["accuracy"] + spread - 1.01 * error}, full)
    assert not frontier.keeps_up(
        {"accuracy": np.array([0.9, np.nan, 0.9])}, full
    )  # a run has diverged


def test_the_share_of_the_gain_is_one_for_the_full_penalty_and_zero_for_the_plain_optimizer():
    plain, full = {"accuracy": np.array([0.7, 0.7])}, {"accuracy": np.array([0.8, 0.9])}
    assert frontier.relative_gain(full, full, plain) == 1
    assert frontier.relative_gain(plain, full, plain) == 0
    assert frontier.relative_gain(
        {"accuracy": np.array([0.75, 0.8])}, full, plain
    ) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("start", "first", "middle", "last"),
    [
        ("gamma from the start", 3, 3, 3),
        ("gamma rises", 0.3, 1.5, 3),
        ("gamma switched on", 0, 0, 3),
        ("epsilon rises", 3, 3, 3),
    ],
)
def test_each_start_reaches_the_full_penalty_after_the_warm_up(start, first, middle, last):
    # On a quadratic the difference is exact for every epsilon, so that the update shows gamma.
    (way,) = (way for way in frontier.starts(10) if way.label == start)
    tx = way.make(gamma=3.0, epsilon=2.0)
    params = jnp.array([1.0, 2.0])
    state, seen = tx.init(params), []
    for _ in range(12):
        updates, state = tx.update(params, state, params, value_fn=lambda p: jnp.sum(p**2) / 2)
        seen.append(float((updates[0] - params[0]) / params[0]))
    np.testing.assert_allclose(
        [seen[0], seen[4], seen[10]], [first, middle, last], rtol=1e-5
    )  # float32 rounding of a difference


def test_the_learning_rate_warms_up_along_a_line_and_falls_along_a_cosine():
    optimizer = trainer._optimizer(Recipe(steps=30, warmup_steps=10, learning_rate=0.5))
    params = jnp.float32(0.0)
    state, rates = optimizer.init(params), []
    for _ in range(31):
        update, state = optimizer.update(jnp.float32(-1.0), state, params)
        rates.append(float(update))
    np.testing.assert_allclose(
        [rates[i] for i in (0, 5, 10, 20, 30)], [0, 0.25, 0.5, 0.25, 0], atol=1e-6
    )


def test_a_warm_up_beyond_the_training_is_named():
    with pytest.raises(
        ValueError, match="warmup_steps must be at least 0 and below the 10 steps, got 10"
    ):
        Recipe(steps=10, warmup_steps=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (0.25,)}, "must begin with 1"),
        ({"intervals": (4, 1)}, "must begin with 1"),
        ({"fractions": (1.0, 2.0)}, "must be at most 1"),
        ({"fractions": (1.0, -0.5)}, "fractions must be at least 0, got -0.5"),
        ({"gammas": ()}, "gammas must hold at least one value"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"optimizers": ()}, "optimizers must not be empty"),
    ],
)
def test_invalid_cells_are_refused(change, message):
    with pytest.raises(CommandError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_single_seed_is_refused():
    with pytest.raises(CommandError, match="at least 2"):
        dataclasses.replace(CONFIG, report_seeds=1)
