import dataclasses

import numpy as np
import pytest

from gradreg_optax.experiments import results, runs, sweep, trainer
from gradreg_optax.experiments.common import CommandError

SIZES = {"train_size": 40, "test_size": 40, "steps": 20, "width": 4, "batch_size": 16, "lanes": 4}
GRID = {"seeds": 3, "report_seeds": 2, "gammas": (1.0, 2.0), "epsilons": (0.1, 1.0), "rhos": (0.5,)}
TINY = sweep.Config(**SIZES, **GRID)


class Pretended:
    """A trainer whose accuracy is a known function of setting and seed; it counts its calls."""

    calls = 0

    def __init__(self, dataset, method, recipe):
        self.method = method

    def digest(self, settings, metrics):
        return self.method.label

    def __call__(self, settings, seeds, metrics):
        Pretended.calls += 1
        nothing = np.zeros(len(seeds))
        gamma, epsilon = (settings.get(name, nothing) for name in ("gamma", "epsilon"))
        best = {"F-GR": 0.2, "SGD": 0.0}.get(self.method.label, 0.1)
        accuracy = 0.5 + best * gamma / 2 + 0.01 * (seeds % 7) - 0.01 * epsilon
        diverged = (self.method.label == "B-GR") & (epsilon == 1) & (seeds == 1)
        return {"accuracy": np.where(diverged, np.nan, accuracy), "diverged": diverged}


@pytest.fixture
def pretended(monkeypatch):
    Pretended.calls = 0
    monkeypatch.setattr(runs, "_trainer", Pretended)
    return Pretended


def run(folder, **changes):
    return results.plain(sweep.run(dataclasses.replace(TINY, output=folder, **changes)))


def loaded(folder, **changes):
    config = dataclasses.replace(TINY, output=folder, **changes)
    return results.load(results.save(folder, "sweep", config, sweep.run(config)))


def test_the_best_sound_setting_is_chosen_on_some_seeds_and_reported_on_others(tmp_path, pretended):
    found = loaded(tmp_path, methods=("SGD", "DB", "B-GR", "F-GR", "SAM"))
    choose, report = (runs.select(found["runs"], role=role) for role in ("choose", "report"))
    assert not set(choose["seed"]) & set(report["seed"])
    names = ("method", "gamma", "epsilon", "rho")
    assert results.plain([list(key) for key, _ in runs.groups(report, *names)]) == [
        ["SGD", None, None, None],
        ["DB", 2, None, None],
        ["B-GR", 2, 0.1, None],
        ["F-GR", 2, 0.1, None],
        ["SAM", None, None, 0.5],
    ]
    expected = [0.5 + 0.2 + 0.03 - 0.001, 0.5 + 0.2 + 0.04 - 0.001]
    np.testing.assert_allclose(runs.select(report, method="F-GR")["accuracy"], expected)
    assert len(runs.select(choose, method="F-GR")["seed"]) == 4 * 3
    text = sweep.table(found)
    assert "F-GR minus SGD     +19.90 ± 0.00" in text
    assert "F-GR minus SAM     +19.90 ± 0.00" in text
    assert [path.name for path in sweep.plot(found, tmp_path)] == ["sweep.png"]


def test_every_method_can_be_swept_with_a_lazy_penalty_on_a_part_of_the_batch(tmp_path, pretended):
    lazy = {"penalty_fraction": 0.25, "interval": 4}
    found = loaded(tmp_path, methods=tuple(trainer.METHODS), **lazy)
    text = sweep.table(found)
    assert all(f"\n{label} " in text for label in trainer.METHODS)
    assert sweep.plot(found, tmp_path)
    assert found["recipe"]["penalty_fraction"] == 0.25
    rows = runs.select(found["runs"], method="F-GR")
    assert (rows["interval"] == 4).all()
    assert (rows["gradients"] == 1.125).all()


@pytest.mark.parametrize("methods", [("SAM",), ("flooding", "SGD"), ("DB",)])
def test_methods_without_a_gamma_or_an_epsilon_are_drawn_too(tmp_path, pretended, methods):
    assert sweep.plot(loaded(tmp_path, methods=methods), tmp_path)


def test_a_method_that_always_diverges_is_named(tmp_path, monkeypatch):
    def diverge(self, settings, seeds, metrics):
        lost = np.full(len(seeds), np.nan)
        return {"accuracy": lost, "diverged": np.ones(len(seeds), bool)}

    monkeypatch.setattr(runs, "_trainer", type("Diverging", (Pretended,), {"__call__": diverge}))
    found = loaded(tmp_path, methods=("SGD", "DB"))
    assert "every setting diverged" in sweep.table(found)
    assert sweep.plot(found, tmp_path)


def test_finished_parts_are_not_computed_again_and_missing_ones_are(tmp_path, pretended):
    first = run(tmp_path)
    units = pretended.calls
    # three seeds of one setting, of two and of four (twice) by at most four lanes, and the reports
    assert units == (1 + 2 + 3 + 3) + 4 == len(list((tmp_path / "parts").iterdir()))
    assert run(tmp_path) == first
    assert pretended.calls == units
    next((tmp_path / "parts").glob("F-GR*")).unlink()
    assert run(tmp_path) == first
    assert pretended.calls == units + 1


def test_another_process_has_the_same_runs_in_the_same_order():
    assert list(sweep._grids(TINY)) == ["gamma", "epsilon", "rho", "strength", "level"]


def test_a_changed_file_uses_no_stale_part(tmp_path, pretended):
    x, y, path = np.ones((50, 3)), np.arange(50) % 2, str(tmp_path / "mine.npz")
    calls = []
    for x_test, y_test in ((x, y), (x, y), (0 * x, y), (x, 1 - y)):
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        run(tmp_path, methods=("SGD",), dataset=path)
        calls.append(pretended.calls)
    assert calls == [2, 2, 4, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gammas": (-1.0,)}, "gammas must be at least 0, got -1"),
        ({"gammas": (1.0, float("nan"))}, "gammas must be at least 0, got nan"),
        ({"gammas": ()}, "gammas must hold at least one value"),
        ({"epsilons": (0.0,)}, "epsilons must be above 0"),
        ({"rhos": (-0.1,)}, "rhos must be above 0, got -0.1"),
        ({"penalty_fraction": 0.0}, "penalty_fraction must be above 0"),
        ({"penalty_fraction": 1.5}, "penalty_fraction must be at most 1, got 1.5"),
        ({"methods": ()}, "methods must be some of SGD, .*, got none"),
        ({"methods": ("GR",)}, "methods must be some of SGD, .*, got GR"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(CommandError, match=message):
        dataclasses.replace(TINY, **change)
