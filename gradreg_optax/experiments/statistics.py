"""Means, standard errors and paired t-tests. Non-finite values (diverged runs) are ignored."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean over seeds; ``f"{estimate:.1f}"`` prints it with its standard error.

    Attributes:
      mean: the mean; NaN without a value.
      error: its standard error; NaN with fewer than two values.
      size: number of values.
      p: for a paired difference, the two-sided p-value of the t-test that the mean is zero.
    """

    mean: float
    error: float
    size: int
    p: float = math.nan

    def __format__(self, spec: str) -> str:
        """Return ``mean ± error``, the mean alone without an error, nothing without a value."""
        if math.isnan(self.mean):
            return ""
        error = "" if math.isnan(self.error) else f" ± {self.error:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{error}"


def points(rows: Mapping[str, Any], other: Mapping[str, Any]) -> Estimate:
    """Return the paired difference of the accuracies of two methods, in percentage points."""
    return paired(100 * rows["accuracy"], 100 * other["accuracy"])


def estimate(values: Any) -> Estimate:
    """Return the mean of the finite values and its standard error."""
    finite = np.asarray(values, float)[np.isfinite(np.asarray(values, float))]
    mean = float(np.mean(finite)) if len(finite) else math.nan
    error = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else math.nan
    return Estimate(mean, error, len(finite))


def paired(first: Any, second: Any) -> Estimate:
    """Return the mean of ``first - second`` over the pairs in which both are finite.

    Raises:
      ValueError: the two have different shapes.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape:
        raise ValueError(f"paired: values must have one shape, got {a.shape} and {b.shape}.")
    found = estimate(a - b)
    if found.size < 2:
        return found
    if found.error == 0:  # all differences are equal
        return found._replace(p=1.0 if found.mean == 0 else 0.0)
    t = abs(found.mean / found.error)
    return found._replace(p=float(2 * stats.t.sf(t, found.size - 1)))
