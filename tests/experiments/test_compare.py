from pathlib import Path

import numpy as np
import pytest

from gradreg_optax.experiments import compare, results, runs, statistics
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
    folder, task = tmp_path_factory.mktemp("compare"), compare.TASKS["digits"]
    config = compare.Config(seeds=3, output=folder, datasets=("digits",))
    task = task._replace(settings={label: task.settings[label] for label in LABELS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.TASKS, "digits", task)
        return results.load(results.save(folder, "gradreg compare", config, compare.run(config)))


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


def test_the_table_names_method_difference_cost_and_number_of_seeds(found):
    text = compare.table(found)
    row = next(line for line in text.splitlines() if line.startswith("F-GR  "))
    difference = statistics.paired(100 * accuracy(found, "F-GR"), 100 * accuracy(found, "SGD"))
    assert "γ=4 ε=10" in row
    assert f"{difference.mean:+.1f} ± {difference.error:.1f}" in row
    assert "digits, 300 training samples, 30 % label noise, 3 seeds" in text


def test_each_data_set_is_compared_with_itself_and_an_expensive_one_uses_half_of_the_seeds():
    found = results.load(COMMITTED)
    best = runs.by(runs.select(found["runs"], role="best"), "dataset")
    seeds = {name: set(rows["seed"]) for name, rows in best.items()}
    assert seeds == {"digits": set(range(10)), "mnist1d": set(range(5))}
    text = compare.table(found)
    assert "digits, 300 training samples, 30 % label noise, 10 seeds" in text
    assert "MNIST-1D, clean, 5 seeds" in text
    for name, rows in best.items():  # a quarter of the batch at every 4th step: 1 + 2 (1/4) / 4
        assert (runs.select(rows, method="lazy F-GR")["gradients"] == 1.125).all()
        # FLOPs are gradients, up to those of the optimizer
        for label, cost in (("lazy F-GR", 1.125), ("F-GR", 2), ("SGD", 1)):
            assert compare.cost(found, name, label) == pytest.approx(cost, rel=0.05)


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
