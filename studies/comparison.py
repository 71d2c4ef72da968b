"""Rows of a comparison that trains outside of the experiments' trainer, and how they are tuned."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from gradreg_optax import fd_gradreg
from gradreg_optax.experiments import common, report, runs
from gradreg_optax.experiments.trainer import Method


def tied(gamma: Any, interval: Any) -> optax.GradientTransformation:
    """Return F-GR with an ascent step of the length gamma."""
    return fd_gradreg(gamma=gamma, epsilon=gamma, interval=interval)


F_GR = Method("F-GR", tied, ("gamma",), 2)


class Way(NamedTuple):
    """A row of a comparison.

    Attributes:
      method: the method.
      values: candidates for its coefficient; without a coefficient, zero.
      fraction: fraction of the batch that the penalty is evaluated on.
      interval: number of steps from one penalty to the next.
      longer: factor on the number of steps.
    """

    method: Method
    values: tuple[float, ...] = (0.0,)
    fraction: float = 1.0
    interval: int = 1
    longer: int = 1

    @property
    def cost(self) -> float:
        """Gradients per step of the comparison."""
        return self.longer * self.method.cost(self.fraction, self.interval)

    def regularizer(self, value: Any) -> optax.GradientTransformation | None:
        """Return its transformation with a coefficient; None without a penalty."""
        if self.method.make is None:
            return None
        settings = dict.fromkeys(self.method.settings, value)
        return self.method.make(**settings, interval=self.interval)


def best(rows: Sequence[dict[str, Any]], *names: str) -> tuple[float, ...]:
    """Return the setting with the best mean accuracy.

    Raises:
      CommandError: every setting diverged.
    """
    found = runs.best(runs.columns(rows), *names)
    if found is None:
        raise common.CommandError(f"{rows[0]['method']} diverged with every setting.")
    return tuple(found.values())


def tagged(columns: Mapping[str, Any], **tags: Any) -> runs.Columns:
    """Return the rows with further columns in front, of one value each."""
    size = len(next(iter(columns.values())))
    return {name: np.full(size, tag) for name, tag in tags.items()} | dict(columns)


def shared(name: str, spec: str = "g") -> report.Column:
    """Return a column of a table for a value that all runs of a row share."""
    return lambda rows: report.Number(rows[name][0], spec)
