"""One row a run: what is trained, what is kept, and how the rows are read."""

import dataclasses
import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import fd_gradreg
from gradreg_optax.experiments import data, results, runs, trainer
from gradreg_optax.experiments.trainer import METHODS, Method, Recipe

DIGITS = data.load("digits")
RECIPE = Recipe(train_size=40, test_size=40, steps=3, width=4, batch_size=16, eigenvalue=False)


def linear_init(key, scale=0.1):
    return scale * jax.random.normal(key, (64, 10))


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


def twice(weights, x):
    return 2 * linear(weights, x)


LINEAR = dataclasses.replace(RECIPE, model=(linear_init, linear))  # compiles fast


@pytest.fixture
def counted(monkeypatch):
    """The methods that have been trained, one entry for each call of a trainer."""
    calls, train = [], trainer.Trainer.__call__

    def watched(self, settings, seeds, *rest):
        calls.append((self.method.label, len(seeds)))
        return train(self, settings, seeds, *rest)

    monkeypatch.setattr(trainer.Trainer, "__call__", watched)
    return calls


def keep(folder, what="it", made=1.0, **depends):
    return runs.Store(folder, **depends).keep("F-GR", what, lambda: {"x": np.array([made])})["x"]


def test_a_part_is_made_once_comes_back_with_its_nans_and_anew_if_it_is_cut(tmp_path):
    for made in (1.0, 2.0):
        assert keep(tmp_path, made=made) == 1.0
    (part,) = (tmp_path / "parts").iterdir()
    assert part.name.startswith("F-GR-")
    for made, content in enumerate(["", "{", "[]", '{"x": [1.0']):
        part.write_text(content)
        assert keep(tmp_path, made=float(made)) == keep(tmp_path, made=9.0) == made
    assert np.isnan(keep(tmp_path, what="lost", made=np.nan))


def test_an_error_in_one_part_begins_no_other_and_keeps_what_is_finished(tmp_path, monkeypatch):
    begun = []

    def fail_or_continue(self, settings, seeds, metrics):
        begun.append(self.method.label)
        if self.method.label == "B-GR":
            raise ValueError("the first error")
        time.sleep(0.0 if self.method.label == "SGD" else 0.5)
        return {"accuracy": np.zeros(len(seeds))}

    monkeypatch.setattr(trainer.Trainer, "__call__", fail_or_continue)
    settings, wanted = {"gamma": (1.0,), "epsilon": (1.0,)}, []
    for label in ("SGD", "B-GR", "F-GR", "C-GR", "GNP"):
        wanted += runs.grid(METHODS[label], RECIPE, settings, [0])
    with pytest.raises(ValueError, match="the first error"):
        runs.train(DIGITS, wanted, runs.Store(tmp_path))
    assert "GNP" not in begun
    kept = {path.name.rsplit("-", 1)[0] for path in tmp_path.glob("parts/*.json")}
    assert kept == set(begun) - {"B-GR"}  # those under way are finished


def test_what_the_numbers_depend_on_makes_another_part(tmp_path, monkeypatch):
    keep(tmp_path)
    for change in ({"what": "another"}, {"data": "another"}):
        assert keep(tmp_path, made=2.0, **change) == 2.0

    package = tmp_path / "package"
    package.mkdir()
    (package / "study.py").write_text("x = 1\n")
    monkeypatch.setattr(results, "PACKAGES", [*results.PACKAGES, package])
    assert keep(tmp_path, made=3.0) == keep(tmp_path) == 3.0
    (package / "study.py").write_text("x = 2\n")
    assert keep(tmp_path, made=4.0) == 4.0


PART = """
recipe = trainer.Recipe(train_size=40, batch_size=16, steps=3, width=4)
method = trainer.Trainer(data.load("digits"), trainer.METHODS["F-GR"], recipe)
part = runs.Store(folder).keep("F-GR", method.digest(("gamma", "epsilon")), lambda: {"x": made})
"""


@pytest.mark.slow
def test_a_part_of_another_process_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "PACKAGES", results.PACKAGES[:1])  # as in the other process
    names = f"from pathlib import Path; folder, made = Path({str(tmp_path)!r}), [1.0]"
    imports = "from gradreg_optax.experiments import data, runs, trainer"
    command = [sys.executable, "-c", f"{names}\n{imports}\n{PART}"]
    subprocess.run(command, check=True, timeout=300)
    found = {"data": data, "runs": runs, "trainer": trainer, "folder": tmp_path, "made": [2.0]}
    exec(PART, found)
    assert found["part"]["x"] == [1.0]


def test_a_row_does_not_depend_on_the_other_runs(tmp_path, counted):
    wanted = runs.grid(METHODS["F-GR"], LINEAR, {"gamma": (1.0, 2.0), "epsilon": 0.5}, [0, 1])
    wanted += runs.grid(METHODS["SGD"], LINEAR, {"gamma": (1.0,)}, [1], role="plain")
    store = runs.Store(tmp_path)
    found = runs.train(DIGITS, wanted, store, lanes=3)
    assert counted == [("F-GR", 2), ("F-GR", 2), ("SGD", 1)]
    assert found["method"].tolist() == ["F-GR"] * 4 + ["SGD"]
    assert found["seed"].tolist() == [0, 1, 0, 1, 1]
    np.testing.assert_array_equal(found["gamma"], [1, 1, 2, 2, np.nan])
    assert found["role"].tolist() == ["", "", "", "", "plain"]
    assert found["gradients"].tolist() == [2, 2, 2, 2, 1]
    again = runs.train(DIGITS, wanted, store, lanes=3)
    assert len(counted) == 3
    assert results.plain(again) == results.plain(found)
    alone = runs.train(DIGITS, wanted[2:3])
    # the same numbers in another order of additions, on a program of another width
    np.testing.assert_allclose(alone["train_loss"], found["train_loss"][2:3], rtol=1e-4)


def test_a_function_of_the_users_own_that_changes_uses_no_stale_part(tmp_path, monkeypatch):
    counted = []

    def pretended(self, settings, seeds, metrics):
        counted.append(self)
        return {"accuracy": np.ones(len(seeds))}

    monkeypatch.setattr(trainer.Trainer, "__call__", pretended)
    first = {"optimizer": lambda rate: optax.adamw(rate)}

    def largest(problem, params, seed, split, pool, of=1.0):
        return {"largest": of * jnp.max(jnp.abs(params)), "diverged": jnp.bool_(False)}

    def train(recipe=(), make=fd_gradreg, seed=0, gamma=1.0, metrics=None):
        method = Method("own", make, ("gamma", "epsilon"), 2)
        chosen = dataclasses.replace(LINEAR, **first | dict(recipe))
        values = {"gamma": (gamma,), "epsilon": (0.1,)}
        wanted = runs.grid(method, chosen, values, [seed])
        runs.train(DIGITS, wanted, runs.Store(tmp_path), metrics=metrics)
        return len(counted)

    changes = [
        {"recipe": {"model": (linear_init, twice)}},
        {"recipe": {"model": (functools.partial(linear_init, scale=0.2), linear)}},
        {"recipe": {"optimizer": lambda rate: optax.adamw(rate, weight_decay=0.1)}},
        {"recipe": {"steps": 4}},
        {"recipe": {"label_noise": 0.0}},
        {"make": functools.partial(fd_gradreg, scheme="central")},
        {"seed": 5},
        {"gamma": 2.0},
        {"metrics": largest},
        {"metrics": functools.partial(largest, of=2.0)},
    ]
    assert [train(), train()] == [1, 1]
    assert [train(**change) for change in changes] == list(range(2, 12))


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 4)))
def test_columns_and_arrays_are_two_ways_to_write_one_table(shape):
    values = np.arange(np.prod(shape)).reshape(shape)
    axes = {"kind": list("zab")[: shape[0]], "step": np.arange(shape[1])[::-1]}
    columns = runs.tidy(axes, value=values)
    blocks = runs.blocks(columns, "kind", "step")
    np.testing.assert_array_equal(blocks["value"], values)
    for name, along in axes.items():
        assert blocks[name].tolist() == list(along)
    for i, (kind, rows) in enumerate(runs.groups(columns, "kind")):
        assert kind == (axes["kind"][i],)
        np.testing.assert_array_equal(rows["value"], values[i])


def test_stacked_tables_have_the_columns_of_both_and_nan_is_found_by_nan():
    table = runs.stack({"method": ["SGD"], "seed": [1]}, {"seed": [2, 3], "gamma": [0.5, 0.7]})
    assert table["method"].tolist() == ["SGD", "", ""]
    np.testing.assert_array_equal(table["gamma"], [np.nan, 0.5, 0.7])
    assert runs.select(table, gamma=float("nan"))["seed"].tolist() == [1]
    assert [len(rows["seed"]) for _, rows in runs.groups(table, "gamma")] == [1, 1, 1]


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_setting_with_a_diverged_run_is_never_the_best(values, data):
    accuracy = np.array(values)
    booleans = st.lists(st.booleans(), min_size=accuracy.size, max_size=accuracy.size)
    diverged = np.array(data.draw(booleans)).reshape(accuracy.shape)
    axes = {"gamma": np.arange(len(values)), "seed": np.arange(3)}
    seen = np.where(diverged, np.nan, accuracy)
    best = runs.best(runs.tidy(axes, accuracy=seen, diverged=diverged), "gamma")
    sound = ~diverged.any(axis=1)
    if best is None:
        assert not sound.any()
    else:
        assert sound[best["gamma"]]
        most = accuracy[sound].mean(axis=1).max()
        assert accuracy[best["gamma"]].mean() == pytest.approx(most)


def test_flops_are_those_of_the_plain_step_times_the_gradients(tmp_path):
    store = runs.Store(tmp_path)
    values = {"gamma": 1.0, "epsilon": 0.1, "interval": (1, 2)}
    wanted = runs.grid(METHODS["F-GR"], LINEAR, values, [0])
    found, again = ([runs.flops(DIGITS, run, store) for run in wanted] for _ in range(2))
    assert found == again == pytest.approx([2, 1.5], abs=0.1)  # loss and optimizer come once


@pytest.mark.parametrize("label", sorted(METHODS))
def test_every_method_has_a_step_with_its_settings_and_an_interval_and_a_cost(label):
    method = METHODS[label]
    lazy = dataclasses.replace(LINEAR, penalty_fraction=0.25)
    assert trainer.Trainer(DIGITS, method, lazy).digest((*method.settings, "interval"))
    assert jnp.isfinite(method.cost(0.25, 4))
