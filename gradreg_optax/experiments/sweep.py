"""Grid search: settings are tuned on some seeds and evaluated on others, with paired tests."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gradreg_optax.experiments import common, data, models, plots, report, runs, statistics
from gradreg_optax.experiments.report import HYPERPARAMETERS, Number, Report, Table
from gradreg_optax.experiments.trainer import METHODS, OptimizerName, Recipe

PAIRS = {"F-GR": ["SGD", "DB", "B-GR", "SAM"], "DB": ["SGD"], "SAM": ["SGD"]}
PAIRS |= {"relative": ["SGD", "F-GR"]}


@dataclasses.dataclass(frozen=True)
class Config(common.Training):
    """Settings of ``gradreg sweep``."""

    output: Path = Path("results/sweep")
    dataset: str = "digits"
    """digits, mnist1d, or the path of an .npz file with x_train, y_train, x_test, y_test."""
    seeds: int = 10
    """Number of tuning seeds."""
    report_seeds: int = 10
    """Number of evaluation seeds; they follow the tuning seeds."""
    methods: tuple[str, ...] = ("SGD", "DB", "B-GR", "F-GR")
    """Methods to sweep: SGD, DB, B-GR, C-GR, F-GR, SAM, ASAM, GNP, relative, flooding."""
    gammas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    """Values of the coefficient γ."""
    epsilons: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Values of the ascent step ε."""
    rhos: tuple[float, ...] = (0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0)
    """Values of the radius ρ of SAM and ASAM."""
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Values of the relative strength r."""
    levels: tuple[float, ...] = (0.3, 0.6, 0.9, 1.2, 1.5)
    """Values of the flood level."""
    model: models.Name = "mlp"
    """Network."""
    width: int = 64
    """Units per hidden layer (mlp), or channels of the first convolution (cnn, resnet)."""
    depth: int = 1
    """Hidden layers (mlp), convolutions after the first (cnn), or residual blocks in each of three
    stages (resnet)."""
    batch_size: int = 32
    """Samples per step."""
    learning_rate: float = 0.2
    """Initial learning rate of a cosine schedule that ends at zero."""
    optimizer: OptimizerName = "sgd"
    """Optimizer after the regularizer."""
    penalty_fraction: float = 1.0
    """Fraction of the batch for the penalty."""
    interval: int = 1
    """Apply the penalty every k-th step."""
    lanes: int = 40
    """Number of runs in one program; memory grows with it."""

    def __post_init__(self) -> None:
        """Check the grids as well."""
        super().__post_init__()
        common.at_least(self, 0, "gammas", "levels", "strengths")
        common.above_zero(self, "epsilons", "rhos", "penalty_fraction")
        common.at_most(self, 1, "penalty_fraction")
        common.some_of("methods", self.methods, METHODS)


def run(config: Config) -> dict[str, Any]:
    """Run the sweep; finished parts on disk are not computed again.

    Returns:
      "dataset"; "recipe", the settings that all methods share; and "runs", one row per run. The
      "role" of a row is "choose" on the tuning seeds, with all settings, and "report" on the
      evaluation seeds, with the setting of the best mean accuracy among those without a diverged
      run.

    Raises:
      CommandError: inconsistent settings, or missing data.
    """
    dataset, recipe = data.load(config.dataset), _recipe(config)
    first = config.seed + config.seeds
    tuning = range(config.seed, first)
    table = runs.select_then_report(
        dataset,
        [runs.grid(METHODS[label], recipe, _grids(config), tuning) for label in config.methods],
        range(first, first + config.report_seeds),
        runs.Store(config.output),
        lanes=config.lanes,
        what="sweep",
    )
    return {"dataset": dataset.name, "recipe": recipe.describe(), "runs": table}


def table(results: dict[str, Any]) -> Report:
    """Return the chosen settings with their accuracies, and paired differences."""
    tuning, evaluation = (runs.select(results["runs"], role=role) for role in ("choose", "report"))
    found, rows = runs.by(evaluation, "method"), []
    names = [name for name in HYPERPARAMETERS if name in tuning and name != "interval"]
    for label, tried in runs.by(tuning, "method").items():
        values: list[Any] = [""] * len(names)
        accuracy: Any = "every setting diverged"
        if label in found:
            values = [Number(float(found[label][name][0])) for name in names]
            accuracy = report.percent(spec=".2f")(found[label])
        diverged = f"{np.sum(tried['diverged']):g}/{len(tried['seed'])}"
        rows.append([label, *values, report.gradients(tried), accuracy, diverged])
    numbers = [len(set(part["seed"])) for part in (tuning, evaluation)]
    title = f"{results['dataset']}: {numbers[0]} tuning seeds, {numbers[1]} evaluation seeds"
    head = ["method", *names, "gradients", "test accuracy (%)", "diverged"]
    note = (
        "Means ± standard errors over the evaluation seeds; p: paired t-test. Gradients per step."
        " Diverged: of all runs on the tuning seeds."
    )
    return Report(Table(title, head, rows), "", report.pairs(found, PAIRS), "", note)


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw mean accuracy over gamma and the signed ascent step, and the chosen settings."""
    made, (left, right) = plots.figure(2, width=6.0, height=4.2)
    tuning, evaluation = (runs.select(results["runs"], role=role) for role in ("choose", "report"))
    _draw_grid(made, left, tuning)
    left.set_title(f"{results['dataset']}: test accuracy (%)")
    if len(evaluation["seed"]):
        plots.seeds(right, runs.by(evaluation, "method"))
    right.set(title=f"chosen setting on {len(set(evaluation['seed']))} evaluation seeds")
    return plots.save(made, output / "sweep", formats)


def _grids(config: Config) -> dict[str, Any]:
    """Return the values of each hyperparameter, from the option with its name in the plural."""
    # in one order, because the names of the stored parts depend on the order of the runs
    names = dict.fromkeys(name for method in METHODS.values() for name in method.settings)
    values = {name: getattr(config, f"{name}s") for name in names}
    return values | ({"interval": config.interval} if config.interval > 1 else {})


def _recipe(config: Config) -> Recipe:
    shared = {name: value for name, value in vars(config).items() if hasattr(Recipe, name)}
    return Recipe(**shared | config.sizes(config.dataset), eigenvalue=False)


def _by_signed_step(tuning: runs.Columns) -> dict[str, runs.Columns]:
    """Return the runs of each method with a gamma and of each ascent step, in signed order."""
    if not {"gamma", "epsilon"} <= set(tuning):
        return {}
    found, sign = {}, {"B-GR": -1.0, "DB": 0.0, "F-GR": 1.0}
    for (label, step), rows in runs.groups(tuning, "method", "epsilon"):
        if label in sign:
            found[sign[label] * np.nan_to_num(step), label] = rows
    ordered = sorted(found.items(), key=lambda one: one[0])
    return {f"{label} {abs(step):g}" if step else label: rows for (step, label), rows in ordered}


def _draw_grid(made: Any, axis: Any, tuning: runs.Columns) -> None:
    columns = _by_signed_step(tuning)
    if not columns:
        axis.set_axis_off()
        return
    gammas = np.unique(np.concatenate([rows["gamma"] for rows in columns.values()]))
    cells = [[runs.select(rows, gamma=gamma) for rows in columns.values()] for gamma in gammas]
    values = np.array([[100 * np.mean(rows["accuracy"]) for rows in line] for line in cells])
    plain = 100 * statistics.estimate(runs.select(tuning, method="SGD")["accuracy"]).mean
    style: Any = {"origin": "lower", "aspect": "auto", "cmap": "viridis"}
    image = axis.imshow(values, vmin=None if np.isnan(plain) else plain, **style)
    axis.set_facecolor("0.85")
    axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")
    axis.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axis.set(xlabel="method and ascent step $\\epsilon$", ylabel="$\\gamma$")
    label = "darkest: at most SGD; grey: a run diverged"
    made.colorbar(image, ax=axis, extend="min", label=label)
