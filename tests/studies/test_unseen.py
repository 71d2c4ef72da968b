"""Study unseen: the registered tasks are what their names say, and the verdict is the criterion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import data, runs
from gradreg_optax.experiments.trainer import Recipe, cross_entropy
from studies import networks, registered_tasks, unseen
from study import Study

ROLES = "choose", "report"
SMALL = ("moons, 30 % label noise", "diabetes")
CONFIG = unseen.Config(tasks=SMALL, steps=4, seeds=2, choose_seeds=2, strengths=(0.5, 1.0))


def made_up(tuned, constant=(2.0, 1.0)):
    """Results of one task with two seeds, of which plain training scores 50 and 52."""
    ways = [("", "SGD", None, 0.0), ("all", "SGD", None, 0.0)]
    for part in unseen.PARTS:
        ways.append((part, "self-tuned", None, tuned))
        ways += [(part, "relative", r, gain) for r, gain in enumerate(constant, 1)]
    rows = []
    for role, (part, label, strength, gain), seed in itertools.product(ROLES, ways, (0, 1)):
        row = {"task": "made up", "role": role, "part": part, "method": label}
        row |= {"strength": strength, "seed": seed, "score": 50.0 + 2.0 * seed + gain}
        rows.append(row | {"diverged": False, "gradients": 2.0})
    return {"runs": runs.columns(rows)}


@pytest.mark.parametrize("name", ["breast cancer, 20 % label noise", *SMALL])
def test_a_registered_task_has_the_samples_that_its_recipe_draws(name):
    task = registered_tasks.TASKS[name]
    recipe = Recipe(**task.recipe)
    split = data.draw(task.make(None), 0, recipe.train_size, recipe.test_size, recipe.label_noise)
    assert len(split.train) == recipe.train_size


def test_regression_trains_on_the_squared_error():
    grid = registered_tasks.GRID
    model = networks.Model(lambda key: jnp.float32(0.3), lambda w, x: w * x)
    loss = cross_entropy(networks.regression(model, grid).apply)
    x, y = jnp.array([[1.0], [-2.0], [0.5]]), jnp.array([20, 40, 32])
    targets = jnp.asarray(grid, jnp.float32)[y]

    @jax.jit
    def gradients(w):
        squared = jax.grad(lambda w: jnp.mean((w * x[:, 0] - targets) ** 2) / 2)
        return jax.grad(loss)(w, (x, y)), squared(w)

    for w in (0.3, -1.0):
        np.testing.assert_allclose(*gradients(w), rtol=1e-4)


def test_the_score_of_a_regression_is_the_explained_variance():
    task = registered_tasks.TASKS["diabetes"]
    labels = jnp.array([20, 30, 40])
    grid = jnp.asarray(registered_tasks.GRID, jnp.float32)

    def logits(prediction):
        return -((prediction[:, None] - grid[None]) ** 2) / 2

    exact = registered_tasks.score(task, logits(grid[labels]), labels)
    mean = registered_tasks.score(task, logits(jnp.full(3, grid[labels].mean())), labels)
    np.testing.assert_allclose([exact, mean], [100.0, 0.0], atol=0.01)


def test_batch_norm_with_given_statistics_does_not_depend_on_the_other_samples():
    model = networks.strided_cnn(10, (4,))
    params = jax.jit(model.init)(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(6, 28, 28, 1)).astype(np.float32)

    @jax.jit
    def logits(x):
        statistics = networks.batch_statistics(params, x)
        part = x[:2]
        alone = model.apply(params, part)
        return model.apply(params, x), alone, networks.predict(params, part, statistics)

    whole, alone, fixed = logits(x)
    np.testing.assert_allclose(fixed, whole[:2], atol=1e-5)
    assert np.max(np.abs(alone - whole[:2])) > 1e-2


@pytest.mark.parametrize(
    ("tuned", "constant", "met"),
    [
        (1.6, (2.0, 1.0), True),
        (1.5, (2.0, 1.0), False),
        (-0.1, (2.0, 1.0), False),
        # without a gain of any strength, the rule must only do no harm
        (0.0, (0.5, 0.2), True),
        (-0.1, (0.5, 0.2), False),
    ],
)
def test_the_verdict_is_the_registered_criterion(tuned, constant, met):
    lines = unseen.verdict(list(unseen.cells(made_up(tuned, constant))))
    assert [line.endswith("Criterion met.") for line in lines] == [met, met]


def test_every_way_is_trained_on_the_same_evaluation_seeds(found):
    for cell in unseen.cells(found):
        ways = [cell.plain, cell.everything, cell.tuned, *cell.constant.values()]
        assert [rows["seed"].tolist() for rows in ways] == [[0, 1]] * 5
        assert set(cell.constant) == set(CONFIG.strengths)
    assert set(runs.select(found["runs"], role="choose")["seed"]) == {2, 3}


class TestStudy(Study):
    study = unseen
    rows = SMALL
