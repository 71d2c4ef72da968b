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


def label(axis: Any, marks: Sequence[tuple[float, float, str]], apart: float = 0.06) -> None:
    """Write the name of each mark to its right, with a line from the mark to its name.

    Names of marks at one place keep the order of their heights and do not overlap.

    Args:
      axis: the axis, with its final limits.
      marks: place, height and name of each; the first word of a name is its method.
      apart: smallest distance of two names, relative to the height of the axis.
    """
    (low, high), (left, right) = axis.get_ylim(), axis.get_xlim()
    for place in {place for place, _, _ in marks}:
        here = sorted(mark for mark in marks if mark[0] == place)
        heights = spread([height for _, height, _ in here], apart * (high - low))
        for (_, height, name), wanted in zip(here, heights, strict=True):
            chosen = color(name.split(" (")[0])
            line: Any = {"arrowstyle": "-", "color": chosen, "lw": 0.8, "shrinkA": 0, "shrinkB": 2}
            text: Any = {"fontsize": 9, "va": "center", "color": chosen, "arrowprops": line}
            text["bbox"] = {"fc": "white", "ec": "none", "pad": 0.5}
            axis.annotate(name, (place, height), (place + 0.07 * (right - left), wanted), **text)


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Move increasing numbers as little as possible until neighbours are ``apart``."""
    groups: list[list[float]] = []  # each is centred on the mean of its numbers
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _start(groups[-1], apart) < _end(groups[-2], apart) + apart:
            last = groups.pop()
            groups[-1] += last
    return [_start(group, apart) + i * apart for group in groups for i in range(len(group))]


def _start(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * apart / 2


def _end(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) + (len(group) - 1) * apart / 2


def save(made: Figure, path: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Write a figure under a path without suffix, once in each format, and return the paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for one in paths:
        made.savefig(one, dpi=140)
    return paths
