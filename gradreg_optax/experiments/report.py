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
HYPERPARAMETERS = {
    "gamma": "γ",
    "epsilon": "ε",
    "rho": "ρ",
    "level": "b",
    "strength": "r",
    "fraction": "f",
    "interval": "k",
}


class Number(NamedTuple):
    """A cell: a number, or a mean with its error, and how it is printed.

    Attributes:
      value: a number, or anything with "mean" and "error"; NaN is printed as an empty cell.
      spec: its format.
      note: text after it.
    """

    value: Any
    spec: str = "g"
    note: str = ""

    def __str__(self) -> str:
        """The cell as text."""
        missing = isinstance(self.value, float) and math.isnan(self.value)
        return ("" if missing else f"{self.value:{self.spec}}") + self.note


class Table(NamedTuple):
    """A table.

    Attributes:
      title: the line above it.
      head: headings of the columns.
      rows: cells, as many in each row as there are headings.
      left: how many columns are aligned left; the others are aligned right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: int = 1

    def __str__(self) -> str:
        """Title and columns, two spaces apart."""
        cells = [list(self.head), *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place < self.left else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines] if self.title else lines)

    def records(self) -> Iterable[dict[str, Any]]:
        """Rows as dicts; the error and the note of a number are columns of their own."""
        for row in self.rows:
            record: dict[str, Any] = {"table": self.title}
            for name, cell in zip(self.head, row, strict=True):
                value = cell.value if isinstance(cell, Number) else cell
                estimated = isinstance(value, (statistics.Estimate, statistics.Difference))
                record[name] = value.mean if estimated else value
                if estimated:
                    record[f"{name} (standard error)"] = value.error
                if isinstance(cell, Number) and cell.note:
                    record[f"{name} (note)"] = cell.note.strip()
            yield record


class Report(str):
    """Tables and lines of text; as a string it is what a command prints.

    Attributes:
      tables: the tables.
    """

    tables: tuple[Table, ...]

    def __new__(cls, *parts: Table | str) -> "Report":
        """Join the parts with line breaks."""
        made = super().__new__(cls, "\n".join(map(str, parts)))
        made.tables = tuple(part for part in parts if isinstance(part, Table))
        return made

    def csv(self) -> str:
        """All tables, one below the other, with the union of their columns."""
        records = [record for table in self.tables for record in table.records()]
        file = io.StringIO()
        writer = csv.DictWriter(file, dict.fromkeys(name for one in records for name in one))
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()


def table(
    title: str, groups: Mapping[str, Rows], columns: Mapping[str, Column], left: int = 1
) -> Table:
    """Make a table with a row for each group of runs.

    Args:
      title: the line above it.
      groups: runs by the label of their row.
      columns: how the cell of each column is made from the runs of a row, by heading.
      left: how many columns are aligned left, the labels included.
    """
    rows = [[label, *(make(rows) for make in columns.values())] for label, rows in groups.items()]
    return Table(title, ["method", *columns], rows, left)


def first(name: str, spec: str = "g") -> Column:
    """Column that all runs of a row share."""
    return lambda rows: Number(rows[name][0], spec) if name in rows else ""


def mean(name: str, spec: str, scale: float = 1.0) -> Column:
    """Mean over the runs, with its standard error."""
    return lambda rows: Number(statistics.estimate(scale * np.asarray(rows[name])), spec)


def percent(name: str = "accuracy", spec: str = ".1f") -> Column:
    """Mean of shares in percent, and how many runs diverged."""

    def cell(rows: Rows) -> Number:
        found, total = statistics.estimate(100 * rows[name]), np.size(rows[name])
        lost = total - found.size
        return Number(found, spec, f" ({lost} of {total} diverged)" if lost else "")

    return cell


def minus(
    other: Rows, spec: str = "+.1f", name: str = "accuracy", scale: float = 100.0
) -> tuple[Column, Column]:
    """Paired difference to other runs, and its p-value; empty for these runs themselves."""

    def difference(rows: Rows) -> statistics.Difference | None:
        same = rows["method"][0] == other["method"][0] and np.array_equal(
            rows[name], other[name], equal_nan=True
        )
        return None if same else statistics.paired(scale * rows[name], scale * other[name])

    def gap(rows: Rows) -> Any:
        found = difference(rows)
        return "" if found is None else Number(found, spec)

    def chance(rows: Rows) -> Any:
        found = difference(rows)
        return "" if found is None else Number(found.p, ".1g")

    return gap, chance


def settings(symbols: Mapping[str, str] = HYPERPARAMETERS) -> Column:
    """Hyperparameters of the runs of a row, those that have a symbol."""

    def cell(rows: Rows) -> str:
        values = {symbol: rows[name][0] for name, symbol in symbols.items() if name in rows}
        return " ".join(f"{symbol}={value:g}" for symbol, value in values.items() if value == value)

    return cell


def pairs(groups: Mapping[str, Rows], wanted: Iterable[tuple[str, str]]) -> Table:
    """Paired differences in points between the runs of two methods, where both are there."""
    rows = []
    for one, other in wanted:
        if one in groups and other in groups:
            gain = statistics.points(groups[one], groups[other])
            gap = Number(gain, "+.2f")
            rows.append([f"{one} minus {other}", gap, Number(gain.p, ".1g"), gain.size])
    return Table("", ("paired difference", "points", "p", "seeds"), rows)
