import json

import numpy as np
import pytest

from gradreg_optax.experiments import compare, results, statistics

CONFIG = compare.Config(seeds=3)
LABELS = ("SGD", "DB", "B-GR", "F-GR")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The comparison as the command makes it, on three seeds and without the methods that no claim
    speaks of."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SETTINGS", {label: compare.SETTINGS[label] for label in LABELS})
        return results.load(results.save(folder, "compare", CONFIG, compare.run(CONFIG)))


def accuracy(found, label):
    return next(method for method in found["methods"] if method["label"] == label)["accuracy"]


def test_forward_differences_beat_double_backpropagation_which_beats_plain_descent(found):
    # chance alone moves a mean over three paired seeds by about two points; the gains are 18 and
    # 2.5
    assert statistics.paired(accuracy(found, "F-GR"), accuracy(found, "SGD")).mean > 0.12
    assert (
        accuracy(found, "SGD").mean()
        < accuracy(found, "DB").mean()
        < accuracy(found, "F-GR").mean()
    )


def test_at_one_gamma_accuracy_rises_with_the_signed_ascent_step(found):
    signed = found["signed_epsilon"]
    assert list(signed["epsilon"]) == sorted(signed["epsilon"])
    assert (np.diff(signed["accuracy"].mean(axis=1)) > 0).all()


def test_regularization_finds_flatter_minima(found):
    sharpness = {method["label"]: method["eigenvalue"] for method in found["methods"]}
    assert (sharpness["F-GR"] < sharpness["DB"]).all()
    assert (sharpness["DB"] < sharpness["SGD"] / 2).all()
    for method in found["methods"]:  # the eigenvalues are eigenvalues
        assert (method["eigenvalue_residual"] < 0.01 * method["eigenvalue"]).all()


def test_the_table_names_method_difference_cost_and_number_of_seeds(found):
    text = compare.table(found)
    row = next(line for line in text.splitlines() if line.startswith("F-GR  "))
    difference = statistics.paired(100 * accuracy(found, "F-GR"), 100 * accuracy(found, "SGD"))
    assert "γ=5 ε=10" in row
    assert f"{difference.mean:+.1f} ± {difference.error:.1f}" in row
    assert "means over 3 seeds" in text


def test_a_diverged_run_is_named_and_not_averaged(found):
    broken = {**found, "methods": [dict(method) for method in found["methods"]]}
    values = np.array([0.5, 0.7, np.nan])
    broken["methods"][3] |= {"accuracy": values}
    row = next(line for line in compare.table(broken).splitlines() if line.startswith("F-GR  "))
    assert "60.0 ± 10.0 (1 of 3 diverged)" in row


def test_the_figure_is_drawn_from_the_file_alone(found, tmp_path):
    again = json.loads(json.dumps(results.plain(found)))
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": again}))
    (figure,) = compare.plot(results.load(path), tmp_path)
    assert figure.name == "compare.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        compare.run(compare.Config(seeds=0))
