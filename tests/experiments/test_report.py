"""Tables as text and as CSV."""

import csv
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import report
from gradreg_optax.experiments.report import Number, Report, Table

cells = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9)
ROWS = {
    "SGD": {"method": ["SGD"] * 3, "accuracy": np.array([0.5, 0.7, np.nan]), "seed": [0, 1, 2]},
    "F-GR": {"method": ["F-GR"] * 3, "accuracy": np.array([0.6, 0.9, 0.8]), "seed": [0, 1, 2]},
}


@given(rows=st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5))
def test_columns_are_aligned_for_any_cells(rows):
    lines = str(Table("", ["a", "b", "c"], rows)).splitlines()
    widths = [max(len(row[i]) for row in [*rows, ["a", "b", "c"]]) for i in range(3)]
    for line, row in zip(lines, [["a", "b", "c"], *rows], strict=True):
        assert line.split() == row
        assert line.index(row[0]) == 0
        assert len(line) == sum(widths) + 4


def test_a_setting_shows_the_hyperparameters_of_a_row_and_no_others():
    rows = {"gamma": [0.5], "rho": [float("nan")], "seed": [3]}
    assert report.settings()(rows) == "γ=0.5"


def test_a_diverged_run_is_counted_and_not_averaged():
    assert str(report.percent()(ROWS["SGD"])) == "60.0 ± 10.0 (1 of 3 diverged)"


def test_the_baseline_has_no_difference_to_itself_and_others_are_paired_by_seed():
    gain, p = report.minus(ROWS["SGD"])
    assert (str(gain(ROWS["SGD"])), str(p(ROWS["SGD"]))) == ("", "")
    assert str(gain(ROWS["F-GR"])) == "+15.0 ± 5.0"  # over the two seeds that both finished


def test_gradients_are_rounded_half_up_as_the_documentation_does():
    costs = (1, 1.125, 7 / 3, 3)
    cells = [str(report.gradients({"gradients": [cost]})) for cost in costs]
    assert cells == ["1.00", "1.13", "2.33", "3.00"]


def test_pairs_name_the_number_of_seeds_and_leave_out_methods_that_are_absent():
    text = str(report.pairs(ROWS, {"F-GR": ["SGD"], "SAM": ["SGD"]}))
    assert "F-GR minus SGD     +15.00 ± 5.00  0.2      2" in text
    assert "SAM" not in text


def test_csv_has_the_numbers_their_errors_and_the_notes_of_every_table():
    columns = {"accuracy": report.percent()}
    second = Table("second", ["x"], [[Number(np.float64(0.1))]])
    made = Report(report.table("first", ROWS, columns), "", second)
    found = list(csv.DictReader(io.StringIO(made.csv())))
    assert [row["table"] for row in found] == ["first", "first", "second"]
    assert float(found[0]["accuracy"]) == 60
    np.testing.assert_allclose(float(found[0]["accuracy (standard error)"]), 10)
    assert found[0]["accuracy (note)"] == "(1 of 3 diverged)"
    assert found[2]["x"] == "0.1"
    assert str(made).startswith("first\nmethod")
