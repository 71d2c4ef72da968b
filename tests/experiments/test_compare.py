import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gradreg_optax.experiments import compare, plots, results, runs, statistics
from gradreg_optax.experiments.common import CommandError

COMMITTED = Path(__file__).parents[2] / "notebooks/results/compare"
slow = pytest.mark.slow
LABELS = ("SGD", "DB", "B-GR", "F-GR", "SAM")


@pytest.fixture(scope="module", params=["committed", pytest.param("trained", marks=slow)])
def found(request, tmp_path_factory):
    """The comparison on digits with three seeds: the committed run, or a new one."""
    if request.param == "committed":
        made = results.load(COMMITTED)
        rows = runs.select(made["runs"], dataset="digits")
        keep = (rows["seed"] < 3) & np.isin(rows["method"], LABELS)
        return made | {"runs": {name: values[keep] for name, values in rows.items()}}
    folder = tmp_path_factory.mktemp("compare")
    return run(LABELS, compare.Config(seeds=3, output=folder, datasets=("digits",)))


def run(labels, config):
    """The results of some rows of each task."""
    tasks = {}
    for name, task in compare.TASKS.items():
        kept = {label: task.settings[label] for label in labels if label in task.settings}
        tasks[name] = dataclasses.replace(task, settings=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TASKS", tasks)
        made = compare.run(config)
    return results.load(results.save(config.output, "gradreg compare", config, made))


def rows(found, label):
    return runs.select(found["runs"], role="best", method=label)


def accuracy(found, label):
    return rows(found, label)["accuracy"]


def test_forward_differences_beat_double_backpropagation_which_beats_plain_descent(found):
    # chance moves a mean over three paired seeds by about two points; the gains are 18 and 2.5
    plain, double, forward = (accuracy(found, label).mean() for label in ("SGD", "DB", "F-GR"))
    assert forward - plain > 0.12
    assert plain < double < forward


def test_at_one_gamma_accuracy_rises_with_the_signed_ascent_step(found):
    signed = runs.groups(runs.select(found["runs"], role="signed"), "step")
    steps, means = zip(*((step, part["accuracy"].mean()) for (step,), part in signed), strict=True)
    assert steps == tuple(sorted(steps))
    assert (np.diff(means) > 0).all()


def test_regularization_finds_flatter_minima(found):
    sharpness = {label: rows(found, label)["eigenvalue"] for label in LABELS}
    assert (sharpness["F-GR"] < sharpness["DB"]).all()
    assert (sharpness["DB"] < sharpness["SGD"] / 2).all()
    best = runs.select(found["runs"], role="best")  # the eigenvalues are eigenvalues
    assert (best["eigenvalue_residual"] < 0.01 * best["eigenvalue"]).all()


def test_a_figure_separates_dots_of_equal_cost_and_marks_a_diverged_run():
    lost = {"method": "DB", "gradients": 3.0, "accuracy": np.nan, "diverged": True, "seed": 0}
    sound = lost | {"accuracy": 0.5, "diverged": False, "seed": 1}
    _, (axis,) = plots.figure(1)
    compare._draw_costs(axis, runs.columns([lost, sound, sound | {"method": "C-GR"}]))
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["DB (1 of 2 diverged)", "C-GR"]
    first, second = (line for line in axis.lines if line.get_marker() == "o")
    assert first.get_xdata() != second.get_xdata()
    assert (first.get_fillstyle(), second.get_fillstyle()) == ("none", "full")


def test_the_table_names_method_difference_cost_and_number_of_seeds(found):
    text = compare.table(found)
    row = next(line for line in text.splitlines() if line.startswith("F-GR  "))
    difference = statistics.paired(100 * accuracy(found, "F-GR"), 100 * accuracy(found, "SGD"))
    assert "γ=4 ε=10" in row
    assert f"{difference.mean:+.1f} ± {difference.error:.1f}" in row
    assert "digits, 300 training samples, 30 % label noise, 3 seeds" in text


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Both data sets and the rows with their own recipes, for a few steps."""
    config = compare.Config(seeds=4, steps=20, output=tmp_path_factory.mktemp("both"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SIGNED_ON", "no data set")
        return run(("SGD", "F-GR", "lazy F-GR", "self-tuned"), config)


@pytest.mark.slow
def test_each_data_set_is_compared_with_itself_and_an_expensive_one_uses_half_of_the_seeds(
    both, tmp_path
):
    seeds = {name: set(part["seed"]) for (name,), part in runs.groups(both["runs"], "dataset")}
    assert seeds == {"digits": {0, 1, 2, 3}, "mnist1d": {0, 1}}
    text = compare.table(both)
    assert "digits, 300 training samples, 30 % label noise, 4 seeds" in text
    assert "MNIST-1D, clean, 2 seeds" in text
    assert compare.plot(both, tmp_path)
    assert "nan" not in str(compare.table({**both, "runs": runs.select(both["runs"], seed=0)}))


@pytest.mark.slow
def test_the_cost_of_a_lazy_penalty_is_counted_over_its_steps(both):
    """A quarter of the batch every 4th step costs 1 + 2 (1/4) / 4 gradients, and as many FLOPs up
    to those of the optimizer."""
    for name in compare.TASKS:
        lazy = runs.select(both["runs"], dataset=name, method="lazy F-GR")
        assert (lazy["gradients"] == 1.125).all()
        assert compare.cost(both, name, "lazy F-GR") == pytest.approx(1.125, abs=0.01)
        assert compare.cost(both, name, "F-GR") == pytest.approx(2, abs=0.02)
        assert compare.cost(both, name, "SGD") == 1


def test_a_self_tuned_run_has_no_samples_that_the_others_lack():
    """Its held-out samples are taken from its training set."""
    config = compare.Config()
    for name, held_out in (("digits", 30), ("mnist1d", 400)):
        tuned, plain = (compare.recipe(config, name, label) for label in ("self-tuned", "SGD"))
        assert (tuned.held_out, plain.held_out) == (held_out, 0)
        assert tuned.train_size == plain.train_size


@pytest.mark.parametrize("datasets", [(), ("mnist",)])
def test_data_sets_without_tuned_settings_are_refused(datasets):
    with pytest.raises(CommandError, match="datasets must be some of digits, mnist1d, got"):
        compare.Config(datasets=datasets)
