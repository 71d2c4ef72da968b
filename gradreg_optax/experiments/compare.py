"""Comparison of all regularizers on digits with label noise and on clean MNIST-1D.

Reports test accuracy, training loss, curvature and cost.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Recipe

LAZY = METHODS["F-GR"]._replace(label="lazy F-GR")
ROWS = METHODS | {row.label: row for row in (LAZY, SELF_TUNED)}
_LAZY_FRACTION, _HELD_OUT = 1 / 4, 1 / 10  # of the batch, and of the training samples


class Task(NamedTuple):
    """A data set and how every row trains on it.

    Attributes:
      title: its name in tables and figures.
      network: differences from the default recipe.
      settings: hyperparameters of each row, tuned on other seeds.
      half_seeds: a run is expensive, so use half of the seeds.
    """

    title: str
    network: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, float]]
    half_seeds: bool = False


TASKS = {
    "digits": Task(
        "digits",
        {},
        {
            "SGD": {},
            "DB": {"gamma": 5.0},
            "B-GR": {"gamma": 5.0, "epsilon": 0.1},
            "C-GR": {"gamma": 5.0, "epsilon": 0.1},
            "F-GR": {"gamma": 4.0, "epsilon": 10.0},
            "lazy F-GR": {"gamma": 1.0, "epsilon": 3.0, "interval": 4},
            "SAM": {"rho": 1.5},
            "relative": {"strength": 1.0},
            "self-tuned": {},
            "flooding": {"level": 1.2},
        },
    ),
    "mnist1d": Task(
        "MNIST-1D",
        {"width": 128, "depth": 2, "batch_size": 64, "learning_rate": 0.5},
        {
            "SGD": {},
            "DB": {"gamma": 1.0},
            "F-GR": {"gamma": 1.0, "epsilon": 3.0},
            "lazy F-GR": {"gamma": 0.125, "epsilon": 3.0, "interval": 4},
            "SAM": {"rho": 0.4},
            "relative": {"strength": 0.75},
            "self-tuned": {},
            "flooding": {"level": 0.01},
        },
        half_seeds=True,
    ),
}
# A scan of the signed ascent step at one gamma: B-GR is negative, DB zero, F-GR positive.
SIGNED_ON, COMMON_GAMMA = "digits", 3.0
SIGNED_EPSILON = (-1.0, -0.3, 0.0, 0.3, 1.0, 3.0)
PAIRS = {"F-GR": ["DB", "SAM"], "lazy F-GR": ["F-GR"], "relative": ["SAM"], "self-tuned": ["SGD"]}


@dataclasses.dataclass(frozen=True)
class Config(common.Training):
    """Settings of ``gradreg compare``."""

    output: Path = Path("results/compare")
    datasets: tuple[str, ...] = tuple(TASKS)
    """Data sets: digits (30 % label noise by default) and mnist1d (clean by default)."""
    seeds: int = 10
    """Number of seeds; mnist1d uses half as many. Methods are paired by seed."""

    def __post_init__(self) -> None:
        """Check the names as well."""
        super().__post_init__()
        remedy = " gradreg sweep accepts any data set."
        common.some_of("datasets", self.datasets, TASKS, remedy)


def run(config: Config) -> dict[str, Any]:
    """Train every method on every seed, each method in one compiled program.

    Returns:
      "recipes", the shared settings for each data set; "costs", FLOPs per step relative to SGD; and
      "runs", one row per run. The "role" of a row is "best" for the settings of each method and
      "signed" for the scan of the signed "step".

    Raises:
      CommandError: settings that do not fit the data.
    """
    store = runs.Store(config.output)
    recipes, costs, found = {}, [], []
    for name in config.datasets:
        dataset, seeds = data.load(name), seeds_of(config, name)
        rows = [wanted_runs(config, name, label, seeds) for label in TASKS[name].settings]
        wanted = [run for row in rows for run in row]
        if name == SIGNED_ON:
            wanted += _signed(recipe(config, name), seeds)
        found.append(runs.train(dataset, wanted, store, what=f"compare {name}"))
        for run, *_ in rows:
            flops = runs.flops(dataset, run, store)
            costs.append({"dataset": name, "method": run.method.label, "flops": flops})
        recipes[name] = recipe(config, name).describe()
    return {"recipes": recipes, "costs": runs.columns(costs), "runs": runs.stack(*found)}


def seeds_of(config: Any, name: str) -> range:
    """Return the seeds for a data set."""
    size = -(-config.seeds // 2) if TASKS[name].half_seeds else config.seeds
    return range(config.seed, config.seed + size)


def recipe(config: common.Training, name: str, label: str = "SGD") -> Recipe:
    """Return the recipe of a row for a data set."""
    chosen = Recipe(**config.sizes(name), **TASKS[name].network)
    if label == LAZY.label:
        return dataclasses.replace(chosen, penalty_fraction=_LAZY_FRACTION)
    if label == SELF_TUNED.label:  # the held-out samples are a part of the others' training set
        size = chosen.train_size or len(data.load(name).train_x)
        return dataclasses.replace(chosen, held_out=max(1, round(_HELD_OUT * size)))
    return chosen


def wanted_runs(config: common.Training, name: str, label: str, seeds: Any) -> list[runs.Run]:
    """Return the runs of a row for a data set."""
    chosen, settings = recipe(config, name, label), TASKS[name].settings[label]
    tags: dict[str, Any] = {"role": "best", "dataset": name}
    tags |= {"fraction": chosen.penalty_fraction} if chosen.penalty_fraction < 1 else {}
    tags |= {"held_out": chosen.held_out} if chosen.held_out else {}
    return runs.grid(ROWS[label], chosen, settings, seeds, **tags)


def _signed(chosen: Recipe, seeds: Any) -> list[runs.Run]:
    wanted = []
    tags = {"role": "signed", "dataset": SIGNED_ON}
    for step in SIGNED_EPSILON:
        method = METHODS["DB" if step == 0 else "F-GR" if step > 0 else "B-GR"]
        values = {"gamma": COMMON_GAMMA, "epsilon": abs(step)}
        wanted += runs.grid(method, chosen, values, seeds, **tags, step=step)
    return wanted


def table(results: dict[str, Any]) -> Report:
    """Return accuracies, paired differences, curvature and cost, and the signed scan."""
    best, signed = (runs.select(results["runs"], role=role) for role in ("best", "signed"))
    parts: list[Table | str] = []
    for name, rows in runs.by(best, "dataset").items():
        found = runs.by(rows, "method")
        title = f"{described(name, results['recipes'][name])}, {len(set(rows['seed']))} seeds"
        shown = report.table(title, found, _columns(results, name, found["SGD"]))
        parts += [shown._replace(left=2), "", report.pairs(found, PAIRS), ""]
    if len(signed["seed"]):
        cells = [
            [label, Number(step), report.percent()(rows)]
            for (label, step), rows in runs.groups(signed, "method", "step")
        ]
        title = f"digits at γ = {COMMON_GAMMA:g}, by signed ascent step: B-GR < 0, DB = 0, F-GR > 0"
        parts += [Table(title, ["method", "ε", "test accuracy (%)"], cells), ""]
    return Report(*parts, _NOTE)


_NOTE = (
    "Means ± standard errors over seeds; differences in percentage points, paired by seed; p:"
    " paired t-test. Gradients and FLOPs per step, relative to SGD. Lazy: penalty on the fraction f"
    " of the batch, every k-th step. Self-tuned: holds out a tenth of the training samples, which"
    " the other methods train on."
)


def _columns(results: dict[str, Any], name: str, plain: runs.Columns) -> dict[str, report.Column]:
    gain, p = report.minus(plain)
    return {
        "setting": report.settings(),
        "gradients": report.gradients,
        "FLOPs": lambda rows: Number(cost(results, name, rows["method"][0]), ".2f"),
        "test accuracy (%)": report.percent(),
        "minus SGD": gain,
        "p": p,
        "training loss": report.mean("train_loss", ".3f"),
        "top eigenvalue": report.mean("eigenvalue", ".2f"),
    }


def described(name: str, recipe: Mapping[str, Any]) -> str:
    """Return a title with the number of training samples and the label noise."""
    size, noise = recipe["train_size"], recipe["label_noise"]
    samples = f", {size} training samples" if size is not None and size == size else ""
    labels = f"{100 * noise:g} % label noise" if noise else "clean"
    return f"{TASKS[name].title}{samples}, {labels}"


def cost(results: dict[str, Any], name: str, label: str) -> float:
    """Return the FLOPs per step relative to SGD."""
    return float(runs.select(results["costs"], dataset=name, method=label)["flops"][0])


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw accuracy against cost for each data set, and against the signed ascent step."""
    best, signed = (runs.select(results["runs"], role=role) for role in ("best", "signed"))
    found = runs.by(best, "dataset")
    made, axes = plots.figure(len(found) + (len(signed["seed"]) > 0), width=4.6, height=4.0)
    for axis, (name, rows) in zip(axes, found.items(), strict=False):
        _draw_costs(axis, rows)
        axis.set_title(described(name, results["recipes"][name]), fontsize=11)
    axes[0].set_ylabel("test accuracy (%)")
    if len(signed["seed"]):
        _draw_signed(axes[-1], signed, runs.select(best, dataset=SIGNED_ON, method="SGD"))
    return plots.save(made, output / "compare", formats)


def _draw_costs(axis: Any, rows: runs.Columns) -> None:
    places: dict[float, float] = {}  # dots of equal cost stand side by side
    for label, found in runs.by(rows, "method").items():
        diverged, seeds = int(np.sum(found["diverged"])), len(found["seed"])
        cost = float(found["gradients"][0])
        places[cost] = places.get(cost, cost - 0.08) + 0.08
        style: Any = {"ms": 6, "fillstyle": "none" if diverged else "full"}
        style["label"] = label + f" ({diverged} of {seeds} diverged)" * bool(diverged)
        mean = plots.mean(axis, places[cost], 100 * found["accuracy"], label, **style)
        if label == "SGD":
            axis.axhline(mean, ls="--", lw=1, color=plots.color(label), zorder=0)
    axis.set(xlabel="cost per step (gradient evaluations)", xlim=(0.8, 4.2), xticks=(1, 2, 3))
    axis.legend(frameon=False, fontsize=9, loc="center right")


def _draw_signed(axis: Any, signed: runs.Columns, plain: runs.Columns) -> None:
    found = list(runs.groups(signed, "method", "step"))
    for place, ((label, _), rows) in enumerate(found):
        mean = plots.mean(axis, place, 100 * rows["accuracy"], label)
        plots.note(axis, label, (place, mean), (6, -11), color=plots.color(label))
    height, color = statistics.estimate(100 * plain["accuracy"]).mean, plots.color("SGD")
    axis.axhline(height, ls="--", lw=1, color=color)
    plots.note(axis, "SGD", (0, height), (0, 3), color=color)
    axis.set_xticks(range(len(found)), [f"{step:g}" for (_, step), _ in found])
    axis.set_xlim(-0.4, len(found) - 0.3)
    axis.set_xlabel("signed ascent step $\\epsilon$")
    axis.set_title(f"digits at $\\gamma$ = {COMMON_GAMMA:g}", fontsize=11)
