"""Tables of the commands, as aligned text and as CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gradreg_optax.experiments import statistics

Rows: TypeAlias = Mapping[str, Any]  # runs as columns, see :mod:`gradreg_optax.experiments.runs`
Column: TypeAlias = Callable[[Rows], Any]
HYPERPARAMETERS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b", "strength": "r"}
HYPERPARAMETERS |= {"fraction": "f", "interval": "k"}  # of a lazy penalty


class Number(NamedTuple):
    """A cell with a number, or with a mean and its standard error.

    Attributes:
      value: a number or an estimate; NaN gives an empty cell.
      spec: format specification.
      note: text after the number.
    """

    value: Any
    spec: str = "g"
    note: str = ""

    def __str__(self) -> str:
        """Return the formatted cell."""
        missing = isinstance(self.value, float) and math.isnan(self.value)
        return ("" if missing else f"{self.value:{self.spec}}") + self.note

    def record(self, name: str) -> dict[str, Any]:
        """Return the number, its error and its note as columns of a CSV file."""
        columns = {name: self.value}
        if isinstance(self.value, statistics.Estimate):
            columns = {name: self.value.mean, f"{name} (standard error)": self.value.error}
        return columns | ({f"{name} (note)": self.note.strip()} if self.note else {})


class Table(NamedTuple):
    """A table.

    Attributes:
      title: the line above it.
      head: headings of the columns.
      rows: cells, one for each heading.
      left: number of columns that are aligned left; the others are aligned right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: int = 1

    def __str__(self) -> str:
        """Return the title and the aligned columns."""
        lines = [list(self.head), *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = ["<" if place < self.left else ">" for place in range(len(widths))]
        padded = [map("{:{}{}}".format, line, sides, widths) for line in lines]
        text = ["  ".join(cells).rstrip() for cells in padded]
        return "\n".join([self.title, *text] if self.title else text)

    def records(self) -> Iterable[dict[str, Any]]:
        """Return the rows as dicts."""
        for row in self.rows:
            record: dict[str, Any] = {"table": self.title}
            for name, cell in zip(self.head, row, strict=True):
                record |= cell.record(name) if isinstance(cell, Number) else {name: cell}
            yield record


class Report(str):
    """Text of a command: tables and lines between them.

    Attributes:
      tables: the tables.
    """

    tables: tuple[Table, ...]

    def __new__(cls, *parts: Table | str) -> "Report":
        """Join the parts with line breaks."""
        report = super().__new__(cls, "\n".join(map(str, parts)))
        report.tables = tuple(part for part in parts if isinstance(part, Table))
        return report

    def csv(self) -> str:
        """Return all tables as CSV, with the union of their columns."""
        records = [record for table in self.tables for record in table.records()]
        file = io.StringIO()
        writer = csv.DictWriter(file, dict.fromkeys(name for one in records for name in one))
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()


def table(
    title: str, groups: Mapping[str, Rows], columns: Mapping[str, Column], of: str = "method"
) -> Table:
    """Make a table with one row for each group of runs.

    Args:
      title: the line above the table.
      groups: runs by the label of their row.
      columns: functions from the runs of a row to a cell, by heading.
      of: heading of the labels.
    """
    rows = [[label, *(cell(runs) for cell in columns.values())] for label, runs in groups.items()]
    return Table(title, [of, *columns], rows)


def gradients(rows: Rows) -> Number:
    """Return the gradient evaluations per step, with 1.125 rounded up to 1.13."""
    return Number(float(rows["gradients"][0]) + 1e-9, ".2f")


def mean(name: str, spec: str) -> Column:
    """Return a column with a mean over runs and its standard error."""
    return lambda rows: Number(statistics.estimate(rows[name]), spec)


def percent(name: str = "accuracy", spec: str = ".1f") -> Column:
    """Return a column with a mean in percent and the number of diverged runs."""

    def cell(rows: Rows) -> Number:
        estimate, total = statistics.estimate(100 * rows[name]), np.size(rows[name])
        diverged = total - estimate.size
        return Number(estimate, spec, f" ({diverged} of {total} diverged)" if diverged else "")

    return cell


def minus(other: Rows, spec: str = "+.1f", name: str = "accuracy") -> tuple[Column, Column]:
    """Return columns with the paired difference to other runs, in points, and its p-value.

    Both are empty in the row of these other runs themselves, the same object.
    """

    def difference(rows: Rows) -> statistics.Estimate:
        baseline = np.full_like(other[name], np.nan) if rows is other else other[name]
        return statistics.paired(100 * rows[name], 100 * baseline)

    return (
        lambda rows: Number(difference(rows), spec),
        lambda rows: Number(difference(rows).p, ".1g"),
    )


def settings(symbols: Mapping[str, str] = HYPERPARAMETERS) -> Column:
    """Return a column with the hyperparameters that have a symbol."""

    def cell(rows: Rows) -> str:
        values = {symbol: rows[name][0] for name, symbol in symbols.items() if name in rows}
        return " ".join(f"{symbol}={value:g}" for symbol, value in values.items() if value == value)

    return cell


def pairs(groups: Mapping[str, Rows], others: Mapping[str, Sequence[str]]) -> Table:
    """Return a table of paired differences between methods and others, in percentage points."""
    rows = []
    for one in (label for label in others if label in groups):
        for other in (label for label in others[one] if label in groups):
            gain = statistics.points(groups[one], groups[other])
            cells = Number(gain, "+.2f"), Number(gain.p, ".1g"), gain.size
            rows.append([f"{one} minus {other}", *cells])
    return Table("", ("paired difference", "points", "p", "seeds"), rows)
