"""Study late: every schedule costs the same, is tuned on other seeds, and penalises the updates
that its name says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax.experiments import runs
from gradreg_optax.experiments.trainer import Recipe
from studies import late
from study import TunedStudy

SIZES = {"train_size": 64, "test_size": 50, "steps": 16, "seeds": 2, "choose_seeds": 1}
CONFIG = late.Config(datasets=("digits",), shares=(4,), strengths=(0.5, 1.0), **SIZES)


def test_every_way_costs_its_share(found):
    table = runs.select(found["runs"], role="report")
    schedules = dict(runs.groups(table, "method", "share"))
    for share in CONFIG.shares:
        for label in (late.LONGER, *late.SCHEDULES):
            rows = schedules[label, share]
            np.testing.assert_allclose(rows["cost"], 1 + 1 / share)
    cost = {label: runs.select(table, method=label)["cost"][0] for label in ("SGD", late.ALWAYS)}
    assert cost == {"SGD": 1, late.ALWAYS: 2}
    assert len(schedules) == 2 + 6


SCHEDULES = {  # label, updates with a penalty, fraction of the batch
    "early": (range(4), 1),
    "late": (range(12, 16), 1),
    "lazy": (range(0, 16, 4), 1),
    "part": (range(16), 1 / 8),
    "lazy on a part": (range(0, 16, 2), 1 / 4),
    late.ALWAYS: (range(16), 1),
}


@pytest.mark.slow
def test_a_schedule_penalises_the_updates_of_its_name_on_the_part_that_is_paid_for():
    def loss(params):
        return jnp.sum(jnp.cosh(params))

    recipe, params = Recipe(steps=16, batch_size=16), jnp.arange(1.0, 4.0)
    found = {one.method.label: one for one in late._schedules(recipe, (4,))}
    for label, (due, fraction) in SCHEDULES.items():
        chosen = found[label]
        tx = chosen.method.make(strength=jnp.float32(0.5), interval=chosen.interval)
        state, changed = tx.init(params), []
        for step in range(16):
            gradient = jax.grad(loss)(params)
            updates, state = tx.update(gradient, state, params, value_fn=loss)
            if optax.tree.norm(updates - gradient) > 1e-3:
                changed.append(step)
        assert (changed, chosen.recipe.penalty_fraction) == (list(due), fraction), label
    assert found[late.LONGER].recipe == dataclasses.replace(recipe, steps=20)


class TestStudy(TunedStudy):
    study = late
    rows = (late.PLAIN, late.ALWAYS, late.LONGER, *late.SCHEDULES)
    among, setting = ("method", "share"), "strength"
