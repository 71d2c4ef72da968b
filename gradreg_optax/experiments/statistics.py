"""Means with their errors and paired tests; a run that diverged is NaN and enters none of them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: the mean; NaN without a value.
      error: its standard error; NaN with fewer than two values.
      size: number of values.
    """

    mean: float
    error: float
    size: int

    def __format__(self, spec: str) -> str:
        """The mean with its error, each in the format ``spec``."""
        return _with_error(self.mean, self.error, spec)


class Difference(NamedTuple):
    """A mean paired difference.

    Attributes:
      mean: the mean.
      error: its standard error.
      p: two-sided p-value of the paired t-test that the mean is zero.
      size: number of pairs.
    """

    mean: float
    error: float
    p: float
    size: int

    def __format__(self, spec: str) -> str:
        """The mean with its error, each in the format ``spec``; with none as :meth:`__str__`."""
        return _with_error(self.mean, self.error, spec) if spec else str(self)

    @property
    def chance(self) -> str:
        """``p`` with one digit; nothing where a single pair has none."""
        return "" if math.isnan(self.p) else f"{self.p:.1g}"

    def __str__(self) -> str:
        """The mean with its error, and p if there is one."""
        return f"{self:+.2f}" + (f" (p = {self.chance})" if self.chance else "")


def points(rows: Mapping[str, Any], over: Mapping[str, Any]) -> Difference:
    """The paired difference of the accuracies of two methods' runs, in points."""
    return paired(100 * rows["accuracy"], 100 * over["accuracy"])


def estimate(values: Any) -> Estimate:
    """The mean of the finite values with its standard error."""
    finite = np.asarray(values, float)[np.isfinite(np.asarray(values, float))]
    mean = float(np.mean(finite)) if len(finite) else math.nan
    error = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else math.nan
    return Estimate(mean, error, len(finite))


def paired(first: Any, second: Any) -> Difference:
    """The mean of ``first - second`` over the pairs that are both finite, with its standard error
    and p-value.

    Raises:
      ValueError: the two have different shapes, so that they are no pairs.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, got {a.shape} and {b.shape}.")
    difference = (a - b)[np.isfinite(a - b)]
    mean, error, size = estimate(difference)
    if size < 2:
        return Difference(mean, error, math.nan, size)
    if error == 0:  # all differences are equal
        return Difference(mean, error, 1.0 if mean == 0 else 0.0, size)
    return Difference(mean, error, float(2 * stats.t.sf(abs(mean / error), size - 1)), size)


def _with_error(mean: float, error: float, spec: str) -> str:
    """``mean ± error``; the mean alone where one value has no error, and nothing where there is no
    value.
    """
    if math.isnan(mean):
        return ""
    return f"{mean:{spec}}" + ("" if math.isnan(error) else f" ± {error:{spec.lstrip('+')}}")
