import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import results, sweep, training

TINY = sweep.Config(
    seeds=3,
    report_seeds=2,
    gammas=(1.0, 2.0),
    epsilons=(0.1, 1.0),
    train_size=40,
    test_size=40,
    steps=20,
    width=4,
    batch_size=16,
    lanes=4,
)


class Pretended:
    """A trainer whose accuracy is a known function of setting and seed; it counts its calls."""

    calls = 0

    def __init__(self, dataset, method, recipe):
        self.method = method

    def __call__(self, settings, seeds, *, progress=False):
        Pretended.calls += 1
        gamma, epsilon = (
            settings.get("gamma", np.zeros(len(seeds))),
            settings.get("epsilon", np.zeros(len(seeds))),
        )
        best = {"SGD": 0.0, "DB": 0.1, "B-GR": 0.1, "F-GR": 0.2}[self.method.label]
        accuracy = 0.5 + best * gamma / 2 + 0.01 * (seeds % 7) - 0.01 * epsilon
        diverged = (self.method.label == "B-GR") & (epsilon == 1) & (seeds == 1)
        return {
            "accuracy": np.where(diverged, np.nan, accuracy),
            "train_loss": accuracy,
            "grad_norm": accuracy,
            "diverged": diverged,
        }


@pytest.fixture
def pretended(monkeypatch):
    Pretended.calls = 0
    monkeypatch.setattr(sweep, "Trainer", Pretended)
    return Pretended


def run(folder, **changes):
    return results.plain(
        sweep.run(dataclasses.replace(TINY, output=folder, **changes), progress=False)
    )


def loaded(folder, **changes):
    config = dataclasses.replace(TINY, output=folder, **changes)
    return results.load(results.save(folder, "sweep", config, sweep.run(config, progress=False)))


def test_the_best_sound_setting_is_chosen_on_some_seeds_and_reported_on_others(tmp_path, pretended):
    found = loaded(tmp_path)
    assert not set(found["seeds"]) & set(found["report_seeds"])
    chosen = {
        m["label"]: {name: values[m["chosen"]] for name, values in m["settings"].items()}
        for m in found["methods"]
    }
    assert chosen == {
        "SGD": {},
        "DB": {"gamma": 2},
        "B-GR": {"gamma": 2, "epsilon": 0.1},
        "F-GR": {"gamma": 2, "epsilon": 0.1},
    }
    forward = found["methods"][3]
    np.testing.assert_allclose(
        forward["report"]["accuracy"], [0.5 + 0.2 + 0.03 - 0.001, 0.5 + 0.2 + 0.04 - 0.001]
    )
    assert forward["accuracy"].shape == (4, 3)
    assert "F-GR minus SGD   +19.90 ± 0.00" in sweep.table(found)
    assert [path.name for path in sweep.plot(found, tmp_path)] == ["sweep.png"]


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_setting_with_a_diverged_run_is_never_chosen(values, data):
    accuracy = np.array(values)
    diverged = np.array(
        data.draw(st.lists(st.booleans(), min_size=accuracy.size, max_size=accuracy.size))
    ).reshape(accuracy.shape)
    index = sweep.choose(np.where(diverged, np.nan, accuracy), diverged)
    sound = ~diverged.any(axis=1)
    if index < 0:
        assert not sound.any()
    else:
        assert sound[index]
        assert accuracy[index].mean() == pytest.approx(accuracy[sound].mean(axis=1).max())


def test_a_method_that_always_diverges_is_named(tmp_path, monkeypatch):
    def diverge(self, settings, seeds, *, progress=False):
        nothing = np.full(len(seeds), np.nan)
        return {
            "accuracy": nothing,
            "train_loss": nothing,
            "grad_norm": nothing,
            "diverged": np.ones(len(seeds)),
        }

    monkeypatch.setattr(sweep, "Trainer", type("Diverging", (Pretended,), {"__call__": diverge}))
    found = loaded(tmp_path, methods=("SGD", "DB"))
    assert "every setting diverged" in sweep.table(found)
    assert sweep.plot(found, tmp_path)


def test_what_is_finished_is_not_computed_again_and_what_is_missing_is(tmp_path, pretended):
    first = run(tmp_path)
    units = pretended.calls
    assert units == len(list((tmp_path / "parts").iterdir())) == sweep._units(TINY)
    assert run(tmp_path) == first
    assert pretended.calls == units
    next((tmp_path / "parts").glob("F-GR*")).unlink()
    assert run(tmp_path) == first
    assert pretended.calls == units + 1


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 21},
        {"label_noise": 0.0},
        {"seed": 100},
        {"learning_rate": 0.1},
        {"model": "cnn"},
        {"gammas": (1.5, 2.5)},
        {"lanes": 5},
    ],
)
def test_a_changed_configuration_uses_no_stale_part(tmp_path, pretended, change):
    run(tmp_path, methods=("DB",))
    before = pretended.calls
    run(tmp_path, methods=("DB",), **change)
    assert pretended.calls == before + sweep._units(
        dataclasses.replace(TINY, methods=("DB",), **change)
    )


def test_a_changed_file_uses_no_stale_part(tmp_path, pretended):
    arrays = {
        "x_train": np.ones((50, 3)),
        "y_train": np.arange(50) % 2,
        "x_test": np.ones((50, 3)),
        "y_test": np.arange(50) % 2,
    }
    np.savez(tmp_path / "mine.npz", **arrays)
    run(tmp_path, methods=("SGD",), dataset=str(tmp_path / "mine.npz"))
    before = pretended.calls
    np.savez(tmp_path / "mine.npz", **arrays | {"x_test": np.zeros((50, 3))})
    run(tmp_path, methods=("SGD",), dataset=str(tmp_path / "mine.npz"))
    assert pretended.calls == 2 * before


def test_forty_settings_on_ten_seeds_are_cut_into_units_without_a_rest():
    config = sweep.Config()
    assert len(sweep.settings_of(config, "F-GR")) == 40
    assert len(sweep.settings_of(config, "DB")) == 8
    assert sweep.settings_of(config, "SGD") == [{}]
    assert sweep._units(config) == (1 + 1) + (2 + 1) + (10 + 1) + (10 + 1)


@pytest.mark.parametrize("name", ["seeds", "report_seeds", "lanes"])
def test_nothing_to_do_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        run(tmp_path, **{name: 0})


COMMAND = (
    "--output parts_here --seeds 3 --report-seeds 2 --methods F-GR --gammas 1 2 --epsilons 0.1 1"
    " --train-size 40 --test-size 40"
)
COMMAND += " --steps 20 --width 4 --batch-size 16 --lanes 1"


def test_a_killed_sweep_continues_where_it_ended_and_compiles_once(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, output=tmp_path / "parts_here", methods=("F-GR",), lanes=1)
    parts = config.output / "parts"
    process = subprocess.Popen(
        [sys.executable, "-m", "gradreg_optax", "sweep", *COMMAND.split()],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and len(list(parts.glob("*.json"))) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {
        path: (path.stat().st_mtime_ns, json.loads(path.read_text()))
        for path in parts.glob("*.json")
    }
    assert 2 <= len(finished) < sweep._units(config)
    assert not (config.output / "results.json").exists()

    trainers, calls = [], []

    class Watched(training.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

        def __call__(self, settings, seeds, **options):
            calls.append(1)
            return super().__call__(settings, seeds, **options)

    monkeypatch.setattr(sweep, "Trainer", Watched)
    continued = loaded(config.output, methods=("F-GR",), lanes=1)
    assert len(calls) == sweep._units(config) - len(finished)
    assert {
        path: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in finished
    } == finished
    uninterrupted = loaded(tmp_path / "other", methods=("F-GR",), lanes=1)
    assert sweep.table(continued) == sweep.table(uninterrupted)
    assert len(calls) == 2 * sweep._units(config) - len(finished)
    assert [trainer.traces for trainer in trainers] == [1, 1]
