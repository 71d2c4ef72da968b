"""Accuracy over settings x seeds: settings chosen on one set of seeds and reported on another, with
paired tests.

Runs train side by side, a few dozen at a time. Every finished part is on disk at once, under a name
that says what it depends on, so that a second start goes on where the first one ended, and a
changed configuration starts afresh.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gradreg_optax.experiments import common, data, models, plots, runs, statistics
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.report import (
    HYPERPARAMETERS,
    Number,
    Report,
    Table,
    pairs,
    percent,
)
from gradreg_optax.experiments.trainer import METHODS, OptimizerName, Recipe

PAIRS = (
    ("F-GR", "SGD"),
    ("F-GR", "DB"),
    ("F-GR", "B-GR"),
    ("F-GR", "SAM"),
    ("DB", "SGD"),
    ("SAM", "SGD"),
    ("relative", "SGD"),
    ("relative", "F-GR"),
)


@dataclasses.dataclass(frozen=True)
class Config(common.OnData):
    """Settings of ``gradreg sweep``."""

    output: Path = Path("results/sweep")
    seeds: int = 10
    """Number of seeds that settings are chosen on."""
    report_seeds: int = 10
    """Number of further seeds that the chosen settings are reported on."""
    methods: tuple[str, ...] = ("SGD", "DB", "B-GR", "F-GR")
    """Methods to sweep: SGD, DB, B-GR, C-GR, F-GR, SAM, ASAM, GNP, relative,
    flooding."""
    gammas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    """Values of the regularization coefficient."""
    epsilons: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Values of the ascent step of the differences."""
    rhos: tuple[float, ...] = (0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0)
    """Values of the radius of SAM and ASAM."""
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Values of the strength of the relative penalty, its share of the step."""
    levels: tuple[float, ...] = (0.3, 0.6, 0.9, 1.2, 1.5)
    """Values of the flood level."""
    model: models.Name = "mlp"
    """Network."""
    width: int = 64
    """Units per hidden layer (mlp), or channels of the first convolution (cnn, resnet)."""
    depth: int = 1
    """Hidden layers (mlp), convolutions beyond the first (cnn), or residual blocks in each of three
    stages (resnet)."""
    batch_size: int = 32
    """Samples per step."""
    learning_rate: float = 0.2
    """First learning rate; it falls to zero along a cosine."""
    optimizer: OptimizerName = "sgd"
    """Optimizer behind the regularizer."""
    penalty_fraction: float = 1.0
    """Share of the batch that the penalty is taken on."""
    interval: int = 1
    """The penalty is taken in every so many-th step."""
    lanes: int = 40
    """Runs that train side by side; memory grows with it."""

    def __post_init__(self) -> None:
        """Checks the numbers of runs and every value of the grids."""
        super().__post_init__()
        common.at_least(self, 0, "gammas", "levels", "strengths")
        common.above_zero(self, "epsilons", "rhos", "penalty_fraction")
        if self.penalty_fraction > 1:
            raise CommandError(
                f"penalty_fraction must not exceed 1, got {self.penalty_fraction:g}."
            )
        common.some_of("methods", self.methods, METHODS)


def run(config: Config) -> dict[str, Any]:
    """Runs the sweep, or what is missing of it.

    Args:
      config: the settings.

    Returns:
      "dataset"; "recipe", what the methods have in common; and "runs", one row a run: its "role" is
      "choose" for all settings on the first seeds, and "report" for the setting of each method with
      the best mean accuracy among those where no run diverged, on the others.

    Raises:
      CommandError: settings that do not fit together, or data that are not there.
    """
    dataset, recipe = data.load(config.dataset, config.data_dir), _recipe(config)
    first = config.seed + config.seeds
    table = runs.select_then_report(
        dataset,
        [runs.Candidate(METHODS[label], recipe, _grids(config)) for label in config.methods],
        range(config.seed, first),
        range(first, first + config.report_seeds),
        runs.Store(config.output),
        required=False,
        lanes=config.lanes,
        what="sweep",
    )
    return {"dataset": dataset.name, "recipe": recipe.describe(), "runs": table}


def reported(results: dict[str, Any], label: str) -> Any:
    """The accuracies of a method's chosen setting on the report seeds; None if there are none."""
    rows = runs.select(results["runs"], role="report", method=label)
    return rows["accuracy"] if len(rows["seed"]) else None


def table(results: dict[str, Any]) -> Report:
    """Return the chosen settings with their accuracy on the evaluation seeds, and paired
    differences between methods.
    """
    choose, report = (runs.select(results["runs"], role=role) for role in ("choose", "report"))
    reports, rows = runs.by(report, "method"), []
    names = [name for name in HYPERPARAMETERS if name in choose and name != "interval"]
    for label, tried in runs.by(choose, "method").items():
        cells = [label, *[""] * len(names), Number(tried["gradients"][0]), "every setting diverged"]
        if label in reports:
            found = reports[label]
            cells[1:] = [Number(float(found[name][0])) for name in names]
            cells += [Number(found["gradients"][0]), percent(spec=".2f")(found)]
        lost = f"{np.sum(tried['diverged']):g}/{len(tried['seed'])}"
        rows.append([*cells, lost])
    numbers = [len(set(part["seed"])) for part in (choose, report)]
    title = f"{results['dataset']}: tuned on {numbers[0]} seeds, evaluated on {numbers[1]} others"
    head = ["method", *names, "gradients", "test accuracy %", "diverged"]
    note = "Means ± standard errors over the evaluation seeds; p: paired t-test."
    return Report(Table(title, head, rows), "", pairs(reports, PAIRS), "", note)


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws sweep.png: mean accuracy over gamma and the signed ascent step, and the chosen settings
    on the report seeds.
    """
    made, (left, right) = plots.figure(2, width=6.0, height=4.2)
    _draw_grid(made, left, results)
    report = runs.select(results["runs"], role="report")
    if len(report["seed"]):
        plots.seeds(right, runs.by(report, "method"))
    right.set(title=f"chosen setting on {len(set(report['seed']))} other seeds")
    return plots.save(made, output / "sweep", formats)


def _grids(config: Config) -> dict[str, Any]:
    """The values of each setting, from the option of its name in plural."""
    names = {name for method in METHODS.values() for name in method.settings}
    values = {name: getattr(config, f"{name}s") for name in names}
    return values | ({"interval": config.interval} if config.interval > 1 else {})


def _recipe(config: Config) -> Recipe:
    names = ("model", "width", "depth", "batch_size", "learning_rate", "optimizer")
    chosen = {name: getattr(config, name) for name in (*names, "penalty_fraction")}
    return Recipe(**chosen, **config.sizes(config.dataset), eigenvalue=False)


def _columns(choose: runs.Columns) -> dict[str, runs.Columns]:
    """The runs of each method with a gamma and of each ascent step, in the order of the signed
    step.
    """
    found, side = {}, {"B-GR": -1.0, "DB": 0.0, "F-GR": 1.0}
    for (label, step), rows in runs.groups(choose, "method", "epsilon"):
        if label in side:
            found[side[label] * np.nan_to_num(step), label] = rows
    ordered = sorted(found.items(), key=lambda one: one[0])
    return {f"{label} {abs(step):g}" if step else label: rows for (step, label), rows in ordered}


def _draw_grid(made: Any, axis: Any, results: dict[str, Any]) -> None:
    choose = runs.select(results["runs"], role="choose")
    columns = _columns(choose) if {"gamma", "epsilon"} <= set(choose) else {}
    if not columns:  # no method with a gamma
        axis.set_axis_off()
        return
    gammas = np.unique(np.concatenate([rows["gamma"] for rows in columns.values()]))
    cells = [[runs.select(rows, gamma=gamma) for rows in columns.values()] for gamma in gammas]
    values = np.array([[100 * np.mean(rows["accuracy"]) for rows in line] for line in cells])
    plain = 100 * statistics.estimate(runs.select(choose, method="SGD")["accuracy"]).mean
    look: Any = {"origin": "lower", "aspect": "auto", "cmap": "viridis"}
    shown = np.ma.masked_invalid(values)
    image = axis.imshow(shown, vmin=None if np.isnan(plain) else plain, **look)
    axis.set_facecolor("0.85")
    axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")
    axis.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axis.set(xlabel="method and ascent step $\\epsilon$", ylabel="$\\gamma$")
    axis.set_title(f"{results['dataset']}: test accuracy %")
    label = "darkest: not above SGD; grey: a run diverged"
    made.colorbar(image, ax=axis, extend="min", label=label)
