"""Page "When it helps": its table is the one that the committed results give."""

import math

import pytest

from gradreg_optax.experiments import results, statistics
from studies import when_it_helps

GAINS = {"tuned": statistics.Estimate(mean=-1.25, error=0.5, p=0.1, size=5)}
ROW = when_it_helps.Row("digits, MLP", 300, 0.3, 320.0, "", GAINS, "compare")


def test_the_page_has_the_table_of_the_committed_results():
    text = when_it_helps.PAGE.read_text()
    assert text == when_it_helps.page(text), "run python -m studies.when_it_helps"


def test_a_row_prints_missing_gains_as_empty_cells():
    link = "[digits, MLP](../reports/compare.md)"
    assert ROW.cells() == [link, "300", "30 %", "320", "", "−1.2 ± 0.5", "", "", "5"]


def test_a_gain_is_that_of_the_runs_themselves():
    folder = when_it_helps.ROOT / "notebooks/results/compare"
    found = results.load(folder)
    (first, *_) = when_it_helps.of_compare(found)
    runs = found["runs"]
    keep = (runs["dataset"] == "digits") & (runs["role"] == "best")
    of = {label: runs["accuracy"][keep & (runs["method"] == label)] for label in ("F-GR", "SGD")}
    gain = 100 * (of["F-GR"] - of["SGD"])
    assert math.isclose(first.gains["tuned"].mean, gain.mean())
    assert math.isclose(first.gains["tuned"].error, gain.std(ddof=1) / math.sqrt(len(gain)))


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="no lines"):
        when_it_helps.page("# When it helps\n")
