"""Means with their errors, paired tests, and how they are written."""

import numpy as np
import pytest
from scipy import stats

from gradreg_optax.experiments import statistics


def test_the_paired_test_is_the_one_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12))
    expected = stats.ttest_rel(a, b)
    found = statistics.paired(a, b)
    assert (found.mean, found.p) == pytest.approx((np.mean(a - b), expected.pvalue))
    lost = statistics.paired(np.append(a, np.nan), np.append(b, 1.0))
    assert lost == found
    assert statistics.paired([1.0, 1.0], [1.0, 1.0]).p == 1
    with pytest.raises(ValueError, match="one shape"):
        statistics.paired(a, b[1:])


def test_an_estimate_is_written_with_its_error_if_it_has_one():
    assert f"{statistics.estimate([1.0, 2.0, 3.0, np.nan]):.2f}" == "2.00 ± 0.58"
    assert f"{statistics.estimate([1.0]):.1f}" == "1.0"
    assert f"{statistics.estimate([np.nan]):.1f}" == ""
    assert f"{statistics.paired([3.0, 5.0], [1.0, 1.0]):+.1f}" == "+3.0 ± 1.0"


def test_one_seed_has_no_p():
    assert np.isnan(statistics.paired([3.0], [1.0]).p)
    assert f"{statistics.paired([3.0, 5.0, 4.0], [1.0, 1.0, 1.0]).p:.1g}" == "0.04"
