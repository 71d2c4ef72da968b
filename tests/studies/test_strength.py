"""Study strength: what is compared is paired, what is searched is reported on other seeds, and
what is held out is not trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import data, runs, trainer
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Recipe, Trainer
from studies import corpus, strength
from study import TunedStudy, patched

TINY = {"train_size": 40, "held_out": 8, "test_size": 50, "width": 4, "steps": 30}
TASKS = strength.TASKS | {"tiny": strength.Task("digits", TINY)}
SEARCH = {"seeds": 2, "choose_seeds": 1, "strengths": (0.5, 1.0), "gammas": (0.1, 3.0)}

tiny = patched((strength, "TASKS", TASKS))


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("strength")
    return strength.Config(output=folder, tasks=("tiny",), **SEARCH)


def test_everything_is_paired(found):
    for role in ("plain", "plain, all", "strength", "self-tuned"):
        assert set(runs.select(found["runs"], role=role)["seed"]) == {0, 1}
    assert set(runs.select(found["runs"], role="plain, search")["seed"]) == {2}


class TestStudy(TunedStudy):
    study = strength
    rows = ("tiny",)
    roles, among, setting = ("search", "searched"), ("part",), "gamma"

    def test_the_table_has_every_cell(self, found):
        text = strength.table(found)
        assert [text.count(f"tiny  sgd        {part}") for part in strength.PARTS] == [1, 1]
        assert "of 2 cells" in text


def columns(*accuracy):
    return {"accuracy": np.array(accuracy), "seed": np.arange(len(accuracy))}


def test_what_is_kept_is_the_share_of_the_best_gain():
    rows = {
        "plain": columns(0.5, 0.6),
        "everything": columns(0.55, 0.65),
        "constant": {0.5: columns(0.6, 0.7), 1.0: columns(0.4, 0.5)},
        "searched": columns(0.6, 0.7),
        "tuned": columns(0.58, 0.68),
    }
    cell = strength.Cell(("task", "sgd", "full"), "accuracy", **rows)
    assert (cell.best, cell.kept) == (0.5, pytest.approx(0.8))
    assert cell.gain(cell.tuned, cell.everything).mean == pytest.approx(3)
    nothing = dataclasses.replace(cell, constant={0.5: columns(0.505, 0.605)})
    assert np.isnan(nothing.kept)  # half a point is no gain to be kept
    assert cell.gain(columns(np.nan, 0.7)).mean == pytest.approx((-50 + 10) / 2)  # nan: diverged


@pytest.mark.slow
def test_the_price_of_self_tuning_is_an_evaluation_of_held_out_samples(tmp_path):
    """A third of a gradient, on penalised updates, for any fraction of the batch."""
    store, digits = runs.Store(tmp_path), data.load("digits")
    for fraction, lazy in ((1.0, 1 + 4 / 3 / 4), (0.25, 1 + (1 / 2 + 1 / 3) / 4)):
        assert SELF_TUNED.cost(fraction, 4) == pytest.approx(lazy)
        sizes = TINY | {"width": 64, "depth": 4, "penalty_fraction": fraction, "eigenvalue": False}
        recipe, seeds = Recipe(**sizes), [0]
        both = [runs.grid(METHODS["relative"], recipe, {"strength": 1.0}, seeds)]
        both += [runs.grid(SELF_TUNED, recipe, {}, seeds)]
        plain, tuned = (runs.flops(digits, run, store) for (run,) in both)
        # the first layer needs no gradient of its input: there an evaluation is half of a gradient
        assert tuned - plain == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.slow
def test_what_is_held_out_is_not_trained_on():
    recipe = Recipe(train_size=40, held_out=8, batch_size=8, width=4, steps=9, eigenvalue=False)
    dataset = data.load("digits")
    drawn = data.draw(dataset, 0, 40, 1000, 0.3)
    others = (drawn.train_labels + 1) % 10
    other = drawn._replace(train_labels=np.where(np.arange(40) < 32, drawn.train_labels, others))
    losses = []
    for one in (drawn, other):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.data, "draw", lambda *_, d=one: d)
            method = Trainer(dataset, METHODS["SGD"], recipe)
            losses.append(method({}, [0])["train_loss"])
        trainer._problem.cache_clear()
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
def test_the_transformer_does_not_look_ahead():
    network = corpus.transformer(11, 8, width=8)
    tokens = jnp.arange(8)[None] % 11
    later = tokens.at[0, 5].set(9)
    params = network.init(jax.random.key(0))
    one, other = (network.apply(params, x) for x in (tokens, later))
    assert one.shape == (1, 8, 11)
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] != other[:, 5:]).any(axis=-1).all()
