"""Figures, drawn without a display from results on disk."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradreg_optax.experiments import statistics

_CYCLE = ("DB", "SAM", "flooding", "F-GR", "B-GR", "ASAM", "relative", "SGD", "GNP", "C-GR")
COLORS = {label: f"C{place}" for place, label in enumerate(_CYCLE)}  # Matplotlib's own colors
COLORS |= {"lazy F-GR": "#a50f15", "self-tuned": "#c51b8a"}


def color(label: str) -> str:
    """Return the color of a method; black for an unknown one."""
    return COLORS.get(label, "#000000")


def figure(
    columns: int, *, rows: int = 1, width: float = 4.2, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its array of axes, without top and right spines."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes[0] if rows == 1 else axes


def mean(axis: Any, x: float, values: Any, method: str, **style: Any) -> float:
    """Draw the mean of values and its standard error in a method's color; return the mean."""
    found = statistics.estimate(values)
    errors(axis, [x], [found], **{"color": color(method)} | style)
    return found.mean


def errors(axis: Any, xs: Any, estimates: Iterable[Any], **style: Any) -> None:
    """Draw means with their standard errors."""
    means, spread = zip(*((one.mean, one.error) for one in estimates), strict=True)
    axis.errorbar(xs, means, spread, **{"fmt": "o"} | style)


def seeds(axis: Any, methods: Mapping[str, Any]) -> None:
    """Draw a column of dots for each method, one dot for each run, with mean and error."""
    for place, (label, rows) in enumerate(methods.items()):
        accuracy = 100 * rows["accuracy"]
        axis.plot(np.full(len(accuracy), place), accuracy, ".", color=color(label), alpha=0.35)
        mean(axis, place, accuracy, label, fmt="_", ms=22, mew=2.5)
    axis.set_xticks(range(len(methods)), list(methods), rotation=35)
    axis.set(ylabel="test accuracy (%)")


def note(axis: Any, text: str, point: tuple[float, float], offset: Any, **style: Any) -> None:
    """Write a text at an offset from a point, in typographic points."""
    axis.annotate(text, point, offset, textcoords="offset points", **{"fontsize": 9} | style)


def save(made: Figure, path: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Write a figure in each format to a path without suffix; return the paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for one in paths:
        made.savefig(one, dpi=140)
    return paths
