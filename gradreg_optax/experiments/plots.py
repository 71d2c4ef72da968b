"""What the figures have in common. They are drawn without a display, from results on disk."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradreg_optax.experiments import statistics

COLORS = {
    "SGD": "#7f7f7f",
    "DB": "#1f77b4",
    "B-GR": "#9467bd",
    "C-GR": "#17becf",
    "F-GR": "#d62728",
    "SAM": "#ff7f0e",
    "ASAM": "#8c564b",
    "GNP": "#bcbd22",
    "relative": "#e377c2",
    "flooding": "#2ca02c",
    "lazy F-GR": "#a50f15",
    "self-tuned": "#c51b8a",
}


def color(label: str) -> str:
    """The color of a method; black for one that is not in the table."""
    return COLORS.get(label, "#000000")


def figure(
    columns: int, *, rows: int = 1, width: float = 4.2, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its array of axes, without the upper and right spine."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes[0] if rows == 1 else axes


def mean(axis: Any, place: float, values: Any, method: str, **look: Any) -> float:
    """Draws the mean of some values with its standard error, in the color of a method."""
    found = statistics.estimate(values)
    errors(axis, [place], [found], **{"color": color(method)} | look)
    return found.mean


def errors(axis: Any, places: Any, found: Iterable[Any], **look: Any) -> None:
    """Draws means, or mean differences, with their standard errors."""
    means, spread = zip(*((one.mean, one.error) for one in found), strict=True)
    axis.errorbar(places, means, spread, **{"fmt": "o"} | look)


def seeds(axis: Any, methods: Mapping[str, Any]) -> None:
    """A column of dots, one a run, with mean and standard error, for each of some methods."""
    for place, (label, rows) in enumerate(methods.items()):
        accuracy = 100 * rows["accuracy"]
        axis.plot(np.full(len(accuracy), place), accuracy, ".", color=color(label), alpha=0.35)
        mean(axis, place, accuracy, label, fmt="_", ms=22, mew=2.5)
    axis.set_xticks(range(len(methods)), list(methods), rotation=35)
    axis.set(ylabel="test accuracy %")


def note(axis: Any, text: str, place: tuple[float, float], away: Any, **look: Any) -> None:
    """Writes a text some points away from a place."""
    axis.annotate(text, place, away, textcoords="offset points", **{"fontsize": 9} | look)


def label(axis: Any, marks: Sequence[tuple[float, float, str]], apart: float = 0.055) -> None:
    """Writes the name of each mark to its right, names at one place below each other.

    Args:
      axis: the axis, with its limits as they will be.
      marks: place, height and name of each.
      apart: the least distance of two names, as a share of the axis' height.
    """
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    free: dict[float, float] = {}  # where the last name at a place stands
    for place, height, name in sorted(marks, key=lambda mark: (mark[0], -mark[1])):
        wanted = min(height, free.get(place, high + height) - apart * (high - low))
        free[place] = wanted
        text: Any = {"fontsize": 9, "va": "center", "color": color(name)}
        text["bbox"] = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
        axis.annotate(name, (place, height), (place + 0.04 * (right - left), wanted), **text)


def save(made: Figure, output: Path, name: str) -> list[Path]:
    """Writes a PNG under ``output`` and returns its path, in a list."""
    output.mkdir(parents=True, exist_ok=True)
    made.savefig(output / f"{name}.png", dpi=140)
    return [output / f"{name}.png"]
