"""Study late: every schedule costs the same, is tuned on other seeds, and penalises the updates
that its name says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax.experiments import compare, runs
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.trainer import Recipe
from studies import late
from study import Study

SIZES = {"train_size": 64, "test_size": 50, "steps": 16, "seeds": 2, "choose_seeds": 1}
CONFIG = late.Config(datasets=("digits",), shares=(4,), strengths=(0.5, 1.0), **SIZES)


def test_every_way_costs_its_share_and_is_paired(found):
    table = runs.select(found["runs"], role="report")
    schedules = dict(runs.groups(table, "method", "share"))
    for share in CONFIG.shares:
        for label in (late.LONGER, *late.SCHEDULES):
            rows = schedules[label, share]
            np.testing.assert_allclose(rows["cost"], 1 + 1 / share)
            assert rows["seed"].tolist() == [0, 1]
    cost = {label: runs.select(table, method=label)["cost"][0] for label in ("SGD", late.ALWAYS)}
    assert cost == {"SGD": 1, late.ALWAYS: 2}
    assert len(schedules) == 2 + 6


def test_the_strength_is_the_best_on_seeds_of_its_own(found):
    choose = runs.select(found["runs"], role="choose")
    for (label, share), tried in runs.groups(choose, "method", "share"):
        assert set(tried["seed"]) == {2}
        rows = runs.select(found["runs"], role="report", method=label, share=share)
        (strength,) = set(rows["strength"])
        assert strength == runs.best(tried, "strength")["strength"]


def schedule(label, share):
    recipe = Recipe(steps=16, batch_size=16)
    found = {one.method.label: one for one in late._schedules(recipe, (share,))}
    return found[label], recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "due"),
    [
        ("early", range(4)),
        ("late", range(12, 16)),
        ("lazy", range(0, 16, 4)),
        ("part", range(16)),
        ("lazy on a part", range(0, 16, 2)),
        (late.ALWAYS, range(16)),
    ],
)
def test_a_schedule_penalises_the_updates_of_its_name(label, due):
    chosen, _ = schedule(label, 4)
    tx = chosen.method.make(strength=jnp.float32(0.5), interval=chosen.interval)

    def loss(params):
        return jnp.sum(jnp.cosh(params))

    params = jnp.arange(1.0, 4.0)
    state, changed = tx.init(params), []
    for step in range(16):
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value_fn=loss)
        if optax.tree.norm(updates - gradient) > 1e-3:
            changed.append(step)
    assert changed == list(due)


def test_the_parts_are_those_that_are_paid_for():
    for label, kept in {"part": 1 / 8, "lazy on a part": 1 / 4, "lazy": 1, "late": 1}.items():
        assert schedule(label, 4)[0].recipe.penalty_fraction == kept
    longer, recipe = schedule(late.LONGER, 4)
    assert longer.recipe == dataclasses.replace(recipe, steps=20)


class TestStudy(Study):
    study = late
    rows = (late.PLAIN, late.ALWAYS, late.LONGER, *late.SCHEDULES)


def test_odd_shares_and_unknown_data_are_refused():
    with pytest.raises(CommandError, match="even, got 3"):
        late.Config(shares=(3,))
    with pytest.raises(CommandError, match="datasets must be some of"):
        late.Config(datasets=("cifar",))
    assert set(late.Config().datasets) == set(compare.TASKS)
