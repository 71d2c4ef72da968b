"""Study language: what is tested on was in no file of the training, no window is seen twice, and
equal compute is equal."""

import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import models, runs
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.trainer import Problem
from studies import corpus, language
from study import Study, patched

SEARCH = {"learning_rates": (0.01, 0.1), "gammas": (0.1, 3.0), "rhos": (0.1,), "strengths": (0.5,)}
SIZES = {"seeds": 2, "choose_seeds": 1, "steps": 20, "batch_size": 4, "length": 8, "test_size": 40}
CONFIG = language.Config(**SIZES, **SEARCH)


def pairs_of_bytes(tokens, length, *, width, depth):
    """Compiles in no time, where the command's own network takes most of a minute."""
    init = jax.random.normal
    return models.Model(lambda key: init(key, (tokens, tokens)) / width, lambda p, x: p[x])


FILES = corpus.source_files(packages=True)


tiny = patched(
    (language.corpus, "transformer", pairs_of_bytes),
    (corpus, "source_files", lambda packages: tuple(side[:9] for side in FILES)),
)


def test_no_file_of_a_package_that_is_tested_on_is_trained_on():
    names = [{_top(path) for path in side} for side in FILES]
    assert len(set().union(*names)) == sum(map(len, names))
    assert len(names[1]) == -(-sum(map(len, names)) // 8)
    assert not {path.parts[-2] for side in FILES for path in side} & {"site-packages", "test"}


def _top(path):
    return path.relative_to(sysconfig.get_paths()["stdlib"]).parts[0].removesuffix(".py")


def test_the_sizes_of_the_text_are_those_of_the_windows(found):
    text = corpus.source_code(8, packages=True)
    assert found["text"]["training"]["bytes"] // 9 == len(text.train_x)
    assert found["text"]["held out"]["bytes"] // 9 == len(text.test_x)


@pytest.mark.parametrize("row", ["F-GR", "SAM", "relative, r = 0.5", "relative, r = 0.25, lazy"])
def test_equal_compute_is_equal_within_a_step(found, row):
    rows = language.reported(found)
    assert len(rows) == 9
    other = language.equal(rows[row], rows)
    assert other["method"][0] == "SGD"
    assert abs(language.compute(rows[row]) - language.compute(other)) <= 1
    assert other["steps"][0] > rows[row]["steps"][0]


def test_a_late_penalty_costs_the_share_of_its_steps(found):
    rows = language.reported(found)
    lazy, late = rows["relative, r = 0.25, lazy"], rows["relative, r = 0.25, lazy and late"]
    share = (1 - language.LATE) * (lazy["gradients"][0] - 1)
    assert late["gradients"][0] - 1 == pytest.approx(share)
    assert (late["test_loss"] != lazy["test_loss"]).all()
    assert (late["test_loss"] != rows["AdamW"]["test_loss"]).all()


def test_no_row_sees_a_window_twice_or_one_that_is_held_out():
    recipe = language._recipe(CONFIG, corpus.source_code(CONFIG.length, packages=True))
    wanted = language.rows_of(CONFIG, recipe, {"F-GR": 0.1, "SAM": 0.1}, [0])
    most = max(run.recipe.steps for run in wanted)
    assert len({run.recipe.train_size for run in wanted}) == 1
    assert most * CONFIG.batch_size <= recipe.train_size - recipe.held_out


def test_what_is_chosen_is_the_best_on_seeds_of_its_own(found):
    table = found["runs"]
    assert set(runs.select(table, role="search")["seed"]) == {0}
    assert set(runs.select(table, role="report")["seed"]) == {1, 2}
    for row, name in (("AdamW", "learning_rate"), ("F-GR", "gamma"), ("SAM", "rho")):
        tried = runs.select(table, role="search", row=row)
        (value,) = set(runs.select(table, role="report", row=row)[name])
        assert value == tried[name][np.argmin(tried["test_loss"])]
    rates = {"test_loss": np.array([np.nan, 2.0]), "learning_rate": np.array([0.1, 0.2])}
    assert language.best(rates, "learning_rate") == 0.2  # nan: diverged


class TestStudy(Study):
    study = language
    rows = ("AdamW", "F-GR", "SAM", "relative, r = 0.5", "relative, r = 0.25, lazy and late")


def test_more_steps_than_the_text_lasts_for_are_refused():
    with pytest.raises(CommandError, match=r"steps .* \d+, the length of an epoch, got 1000000"):
        language.run(language.Config(steps=10**6))


@pytest.mark.slow
def test_the_training_loss_is_that_of_as_many_samples_as_are_wanted(monkeypatch):
    monkeypatch.setattr(language, "MEASURED", 3)
    dataset, seeds = corpus.source_code(8, packages=True), jnp.arange(1, dtype=jnp.uint32)
    task = Problem(dataset, language._recipe(CONFIG, dataset))
    params, split = task.init(seeds), task.draw([0])
    batch = task.batch(task.pool, jax.tree.map(lambda x: x[0], split), jnp.arange(3))
    expected = task.loss(params[0], batch)
    measured = task.measure(params, seeds, split, language.measure)["train_loss"][0]
    np.testing.assert_allclose(measured, expected, rtol=1e-6)
