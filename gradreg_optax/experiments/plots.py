"""What the figures have in common. They are drawn without a display, from results on disk."""

from collections.abc import Sequence
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


def seeds(axis: Any, labels: Sequence[str], accuracies: Sequence[Any]) -> None:
    """A column of dots, one a seed, with mean and standard error, for each of some methods."""
    for place, (label, accuracy) in enumerate(zip(labels, accuracies, strict=True)):
        mean, error, _ = statistics.estimate(100 * accuracy)
        spread = np.full(len(accuracy), place)
        axis.plot(spread, 100 * accuracy, ".", color=color(label), alpha=0.35)
        axis.errorbar(place, mean, error, fmt="_", ms=22, mew=2.5, color=color(label))
    axis.set_xticks(range(len(labels)), labels, rotation=35)
    axis.set(ylabel="test accuracy %")


def save(made: Figure, output: Path, name: str) -> list[Path]:
    """Writes a PNG under ``output`` and returns its path, in a list."""
    output.mkdir(parents=True, exist_ok=True)
    made.savefig(output / f"{name}.png", dpi=140)
    return [output / f"{name}.png"]
