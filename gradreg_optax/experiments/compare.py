"""Every regularizer on digits with wrong labels and on clean MNIST-1D: what it does to test
accuracy, training loss and curvature, and what it costs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Recipe

# Two rows that the sweep does not have: one needs a part of the batch, one held-out samples.
LAZY = dataclasses.replace(METHODS["F-GR"], label="lazy F-GR")
ROWS = METHODS | {row.label: row for row in (LAZY, SELF_TUNED)}
_LAZY_PART, _HELD_OUT = 1 / 4, 1 / 10  # of the batch, and of the training samples


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, and how every row trains on it.

    Attributes:
      title: what it is.
      network: what differs from the usual recipe.
      settings: the values of each row's settings, chosen on other seeds.
      dear: a run takes so long that half of the seeds have to do.
    """

    title: str
    network: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, float]]
    dear: bool = False


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
        dear=True,
    ),
}
# At one gamma, the signed ascent step: B-GR is negative, DB zero, F-GR positive.
SIGNED_ON, COMMON_GAMMA = "digits", 3.0
SIGNED_EPSILON = (-1.0, -0.3, 0.0, 0.3, 1.0, 3.0)
PAIRS = (
    ("F-GR", "DB"),
    ("F-GR", "SAM"),
    ("lazy F-GR", "F-GR"),
    ("relative", "SAM"),
    ("self-tuned", "SGD"),
)


@dataclasses.dataclass(frozen=True)
class Config(common.Training):
    """Settings of ``gradreg compare``."""

    output: Path = Path("results/compare")
    datasets: tuple[str, ...] = tuple(TASKS)
    """Data sets: digits, with 30% wrong labels by default, and mnist1d, clean by default."""
    seeds: int = 10
    """Number of seeds, of mnist1d half as many; the methods are paired by seed."""

    def __post_init__(self) -> None:
        """Checks the names as well."""
        super().__post_init__()
        common.some_of("datasets", self.datasets, TASKS, ": gradreg sweep takes any")


def run(config: Config) -> dict[str, Any]:
    """Trains every method on every seed, each method in one compiled program.

    Args:
      config: the settings.

    Returns:
      "recipes", what the methods have in common on each data set; "methods", how each is made;
      "costs", its FLOPs per step relative to SGD; and "runs", one row a run: its "role" is "best"
      for the settings of each method, and "signed" for those at one gamma, which have the signed
      "step".

    Raises:
      CommandError: settings that do not fit the data.
    """
    store = runs.Store(config.output)
    recipes, methods, costs, found = {}, {}, [], []
    for name in config.datasets:
        dataset, settings, seeds = data.load(name), TASKS[name].settings, seeds_of(config, name)
        chosen = {label: recipe(config, name, label) for label in settings}
        wanted = [one for label in settings for one in wanted_runs(config, name, label, seeds)]
        if name == SIGNED_ON:
            wanted += _signed(chosen["SGD"], seeds)
        found.append(runs.train(dataset, wanted, store, what=f"compare {name}"))
        for label, given in settings.items():
            flops = runs.flops(dataset, ROWS[label], chosen[label], store)
            flops = 1 + (flops - 1) / given.get("interval", 1)
            costs.append({"dataset": name, "method": label, "flops": flops})
        recipes[name] = chosen["SGD"].describe()
        methods[name] = {label: ROWS[label].call(given) for label, given in settings.items()}
    table = {"costs": runs.columns(costs), "runs": runs.stack(*found)}
    return {"recipes": recipes, "methods": methods} | table


def seeds_of(config: Any, name: str) -> range:
    """The seeds of a data set."""
    size = -(-config.seeds // 2) if TASKS[name].dear else config.seeds
    return range(config.seed, config.seed + size)


def recipe(config: common.Training, name: str, label: str = "SGD") -> Recipe:
    """How a row trains on a data set."""
    chosen = Recipe(**config.sizes(name), **TASKS[name].network)
    if label == LAZY.label:
        return dataclasses.replace(chosen, penalty_fraction=_LAZY_PART)
    if label == SELF_TUNED.label:  # it has the samples of the others, and trains on fewer
        size = chosen.train_size or len(data.load(name).train_x)
        return dataclasses.replace(chosen, held_out=max(1, round(_HELD_OUT * size)))
    return chosen


def wanted_runs(config: common.Training, name: str, label: str, seeds: Any) -> list[runs.Run]:
    """A row's runs on a data set."""
    chosen, settings = recipe(config, name, label), TASKS[name].settings[label]
    tags: dict[str, Any] = {"role": "best", "dataset": name}
    if chosen.penalty_fraction < 1:
        tags["fraction"] = chosen.penalty_fraction
    if chosen.held_out:
        tags["held_out"] = chosen.held_out
    return runs.grid(ROWS[label], chosen, settings, seeds, **tags)


def _signed(chosen: Recipe, seeds: Any) -> list[runs.Run]:
    """The runs at one gamma."""
    wanted = []
    for step in SIGNED_EPSILON:
        method = METHODS["DB" if step == 0 else "F-GR" if step > 0 else "B-GR"]
        values = {"gamma": COMMON_GAMMA, "epsilon": abs(step)}
        tags = {"role": "signed", "dataset": SIGNED_ON, "step": step}
        wanted += runs.grid(method, chosen, values, seeds, **tags)
    return wanted


def table(results: dict[str, Any]) -> Report:
    """Return for each data set accuracies, paired differences to SGD with p-values, curvature and
    cost, and the accuracies along the signed ascent step.
    """
    best, signed = (runs.select(results["runs"], role=role) for role in ("best", "signed"))
    parts: list[Table | str] = []
    for name, rows in runs.by(best, "dataset").items():
        found = runs.by(rows, "method")
        title = f"{described(name, results['recipes'][name])}, {len(set(rows['seed']))} seeds"
        flops = {label: cost(results, name, label) for label in found}
        columns = _columns(found["SGD"], flops)
        parts += [report.table(title, found, columns, left=2), "", report.pairs(found, PAIRS), ""]
    if len(signed["seed"]):
        cells = [
            [label, report.Number(step), report.percent()(found)]
            for (label, step), found in runs.groups(signed, "method", "step")
        ]
        title = f"digits at γ = {COMMON_GAMMA:g}, by signed ascent step: B-GR < 0, DB = 0, F-GR > 0"
        parts += [Table(title, ["method", "ε", "test accuracy %"], cells), ""]
    return Report(*parts, _NOTE)


_NOTE = (
    "Means ± standard errors over seeds; p: paired t-test. Gradients and FLOPs per step, relative"
    " to SGD. Lazy: on the fraction f of the batch in every k-th step. Self-tuned: holds out a"
    " tenth of the training samples, on which all other methods train."
)


def _columns(plain: runs.Columns, flops: Mapping[str, float]) -> dict[str, report.Column]:
    gain, chance = report.minus(plain)
    return {
        "setting": report.settings(),
        "gradients": report.first("gradients", ".4g"),
        "FLOPs": lambda rows: report.Number(flops[rows["method"][0]], ".2f"),
        "test accuracy %": report.percent(),
        "minus SGD": gain,
        "p": chance,
        "training loss": report.mean("train_loss", ".3f"),
        "top eigenvalue": report.mean("eigenvalue", ".2f"),
    }


def described(name: str, recipe: Mapping[str, Any]) -> str:
    """What is trained on, as a title."""
    size, noise = recipe["train_size"], recipe["label_noise"]
    samples = f", {size} training samples" if size is not None and size == size else ""
    return f"{TASKS[name].title}{samples}, " + (
        f"{100 * noise:g} % label noise" if noise else "clean"
    )


def methods(rows: runs.Columns) -> list[tuple[str, runs.Columns]]:
    """The rows of each method."""
    return list(runs.by(rows, "method").items())


def cost(results: dict[str, Any], name: str, label: str) -> float:
    """FLOPs per step relative to SGD."""
    return float(runs.select(results["costs"], dataset=name, method=label)["flops"][0])


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws compare.png: accuracy against the cost of a step on each data set, and accuracy against
    the signed ascent step.
    """
    best, signed = (runs.select(results["runs"], role=role) for role in ("best", "signed"))
    found = list(runs.groups(best, "dataset"))
    shown = len(found) + (len(signed["seed"]) > 0)
    made, axes = plots.figure(shown, width=4.6, height=4.0)
    for axis, ((name,), rows) in zip(axes, found, strict=False):
        _draw_costs(axis, rows)
        axis.set_title(described(name, results["recipes"][name]), fontsize=11)
    axes[0].set_ylabel("test accuracy %")
    if len(signed["seed"]):
        plain = runs.select(best, dataset=SIGNED_ON, method="SGD")
        _draw_signed(axes[-1], signed, plain)
    return plots.save(made, output / "compare", formats)


def _draw_costs(axis: Any, rows: runs.Columns) -> None:
    marks, found = [], runs.by(rows, "method")
    for label, of_method in found.items():
        place, lost = of_method["gradients"][0], int(np.sum(of_method["diverged"]))
        look: Any = {"ms": 6, "fillstyle": "none" if lost else "full"}
        mean = plots.mean(axis, place, 100 * of_method["accuracy"], label, **look)
        name = f"{label} ({lost} of {len(of_method['seed'])} diverged)" if lost else label
        marks.append((place, mean, name))
    if "SGD" in found:
        plain = statistics.estimate(100 * found["SGD"]["accuracy"]).mean
        axis.axhline(plain, ls="--", lw=1, color=plots.color("SGD"), zorder=0)
    axis.set(xlabel="cost of a step (gradient evaluations)", xlim=(0.8, 4.2), xticks=(1, 2, 3))
    axis.margins(y=0.1)
    plots.label(axis, [mark for mark in marks if np.isfinite(mark[1])])


def _draw_signed(axis: Any, signed: runs.Columns, plain: runs.Columns) -> None:
    steps = []
    for place, ((label, step), rows) in enumerate(runs.groups(signed, "method", "step")):
        mean = plots.mean(axis, place, 100 * rows["accuracy"], label)
        plots.note(axis, label, (place, mean), (6, -11), color=plots.color(label))
        steps.append(f"{step:g}")
    height = statistics.estimate(100 * plain["accuracy"]).mean
    color = plots.color("SGD")
    axis.axhline(height, ls="--", lw=1, color=color)
    plots.note(axis, "SGD", (0, height), (0, 3), color=color)
    axis.set_xticks(range(len(steps)), steps)
    axis.set_xlim(-0.4, len(steps) - 0.3)
    axis.set_xlabel("signed ascent step $\\epsilon$")
    axis.set_title(f"the same digits at one $\\gamma$ = {COMMON_GAMMA:g}")
