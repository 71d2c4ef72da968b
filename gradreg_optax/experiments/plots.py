"""What the figures have in common. They are drawn without a display, from results on disk."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = {
    "SGD": "#7f7f7f",
    "DB": "#1f77b4",
    "B-GR": "#9467bd",
    "C-GR": "#17becf",
    "F-GR": "#d62728",
    "SAM": "#ff7f0e",
    "flooding": "#2ca02c",
}


def figure(
    columns: int, *, rows: int = 1, width: float = 4.2, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its array of axes, without the upper and right spine."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes[0] if rows == 1 else axes


def save(made: Figure, output: Path, name: str) -> Path:
    """Writes a PNG under ``output`` and returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.png"
    made.savefig(path, dpi=140)
    return path
