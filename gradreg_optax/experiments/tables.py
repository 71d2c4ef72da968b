"""The one writer of the tables that the commands print."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, two blanks apart.

    Args:
      head: the titles.
      rows: the cells, as many in each row as there are titles.
      left: how many columns are flush left; the others, mostly numbers, are flush right.

    Returns:
      The lines, without blanks at their ends.

    >>> print(aligned(["method", "accuracy %"], [["SGD", "69.0"], ["F-GR", "87.2"]]))
    method  accuracy %
    SGD           69.0
    F-GR          87.2
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def setting(rows: Mapping[str, Any], symbols: Mapping[str, str]) -> str:
    """The hyperparameters of runs that share them, of those that have a symbol."""
    values = {symbol: rows[name][0] for name, symbol in symbols.items() if name in rows}
    return " ".join(f"{symbol}={value:g}" for symbol, value in values.items() if value == value)
