"""Every regularizer on digits with wrong labels: what it does to test accuracy, training loss and
curvature, and what it costs.
"""

import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from gradreg_optax.experiments import common, data, plots, runs, statistics, tables
from gradreg_optax.experiments.trainer import METHODS, Recipe

# The settings of each method, chosen on other seeds.
SETTINGS: dict[str, dict[str, float]] = {
    "SGD": {},
    "DB": {"gamma": 6.0},
    "B-GR": {"gamma": 6.0, "epsilon": 0.1},
    "C-GR": {"gamma": 5.0, "epsilon": 0.3},
    "F-GR": {"gamma": 5.0, "epsilon": 10.0},
    "SAM": {"rho": 1.5},
    "flooding": {"level": 1.2},
}
# At one gamma, the signed ascent step: B-GR is negative, DB zero, F-GR positive.
COMMON_GAMMA = 3.0
SIGNED_EPSILON = (-1.0, -0.3, 0.0, 0.3, 1.0, 3.0)
PAIRS = (("F-GR", "DB"), ("F-GR", "SAM"))
_SYMBOLS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b"}


@dataclasses.dataclass(frozen=True)
class Config(common.Training):
    """Settings of ``gradreg compare``."""

    output: Path = Path("results/compare")
    seeds: int = 10
    """Number of seeds; the methods are paired by seed."""

    def __post_init__(self) -> None:
        """Checks the number of seeds."""
        super().__post_init__()
        common.at_least(self, 1, "seeds")


def run(config: Config) -> dict[str, Any]:
    """Trains every method on every seed, each method in one compiled program.

    Args:
      config: the settings.

    Returns:
      "recipe", what the methods have in common; "methods", how each is made; "costs", its FLOPs per
      step relative to SGD; and "runs", one row a run: its "role" is "best" for the settings of each
      method, and "signed" for those at one gamma, which have the signed "step".

    Raises:
      CommandError: settings that do not fit the data.
    """
    recipe, dataset = Recipe(**config.sizes("digits")), data.load("digits")
    seeds = range(config.seed, config.seed + config.seeds)
    store = runs.Store(config.output)
    wanted = []
    for label, setting in SETTINGS.items():
        values = {name: (value,) for name, value in setting.items()}
        wanted += runs.grid(METHODS[label], recipe, values, seeds, role="best")
    for step in SIGNED_EPSILON:
        method = METHODS["DB" if step == 0 else "F-GR" if step > 0 else "B-GR"]
        values = {"gamma": (COMMON_GAMMA,), "epsilon": (abs(step),)}
        if method.label in SETTINGS:
            wanted += runs.grid(method, recipe, values, seeds, role="signed", step=step)
    found = runs.train(dataset, wanted, store, what="compare")
    costs = [runs.flops(dataset, METHODS[label], recipe, store) for label in SETTINGS]
    return {
        "recipe": recipe.describe(),
        "methods": {label: METHODS[label].call(given) for label, given in SETTINGS.items()},
        "costs": {"method": list(SETTINGS), "flops": costs},
        "runs": found,
    }


def table(results: dict[str, Any]) -> str:
    """The comparison as text: accuracies with standard errors over seeds, paired differences to SGD
    with p-values, curvature and cost.
    """
    best, signed = (runs.select(results["runs"], role=role) for role in ("best", "signed"))
    head = ["method", "setting", "test accuracy %", "minus SGD", "p", "train loss"]
    head += ["top eigenvalue", "gradients", "FLOPs"]
    costs = dict(zip(*results["costs"].values(), strict=True))
    rows = [_row(rows, best, costs[label]) for (label,), rows in runs.groups(best, "method")]
    lines = [tables.aligned(head, rows, left=2), ""]
    lines += statistics.pairs(dict(accuracies(best)), PAIRS)
    lines += [
        "",
        f"test accuracy % at gamma = {COMMON_GAMMA:g} against the signed ascent step (B-GR < 0,"
        " DB = 0, F-GR > 0):",
        tables.aligned(
            ["method", "epsilon", "test accuracy %"],
            [
                [label, f"{step:g}", statistics.percent(rows["accuracy"])]
                for (label, step), rows in runs.groups(signed, "method", "step")
            ],
        ),
        f"\nmeans over {len(set(best['seed']))} seeds ± standard error; p: paired t-test; cost per"
        " step relative to SGD.",
    ]
    return "\n".join(lines)


def accuracies(rows: runs.Columns) -> list[tuple[str, Any]]:
    """The accuracies of each method, over the seeds."""
    return [(label, found["accuracy"]) for (label,), found in runs.groups(rows, "method")]


def plot(results: dict[str, Any], output: Path) -> list[Path]:
    """Draws compare.png: accuracy of each method, accuracy against curvature, and accuracy against
    the signed ascent step.
    """
    made, (left, middle, right) = plots.figure(3, width=4.4, height=3.8)
    best = runs.select(results["runs"], role="best")
    plots.seeds(left, *zip(*accuracies(best), strict=True))
    left.set(title="each method at its own setting")
    for (label,), rows in runs.groups(best, "method"):
        sharpness, height = (
            statistics.estimate(x) for x in (rows["eigenvalue"], 100 * rows["accuracy"])
        )
        point = (sharpness.mean, height.mean, height.error, sharpness.error)
        middle.errorbar(*point, fmt="o", color=plots.color(label), label=label)
    middle.set(
        xscale="log",
        xlabel="top Hessian eigenvalue of the training loss",
        title="flatter minima test better",
    )
    middle.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    middle.xaxis.set_major_formatter("{x:g}")
    middle.xaxis.set_minor_formatter(NullFormatter())
    middle.legend(frameon=False)
    _draw_signed(right, runs.select(results["runs"], role="signed"), best)
    return plots.save(made, output, "compare")


def _draw_signed(axis: Any, signed: runs.Columns, best: runs.Columns) -> None:
    steps = []
    for place, ((label, step), rows) in enumerate(runs.groups(signed, "method", "step")):
        mean, error, _ = statistics.estimate(100 * rows["accuracy"])
        look: Any = {"color": plots.color(label)}
        axis.errorbar(place, mean, error, fmt="o", **look)
        axis.annotate(
            label, (place, mean), (6, -11), textcoords="offset points", fontsize=9, **look
        )
        steps.append(f"{step:g}")
    plain = statistics.estimate(100 * runs.select(best, method="SGD")["accuracy"]).mean
    look = {"color": plots.color("SGD")}
    axis.axhline(plain, ls="--", lw=1, **look)
    axis.annotate("SGD", (0, plain), (0, 3), textcoords="offset points", fontsize=9, **look)
    axis.set_xticks(range(len(steps)), steps)
    axis.set_xlim(-0.4, len(steps) - 0.3)
    axis.set(
        xlabel="signed ascent step $\\epsilon$",
        ylabel="test accuracy %",
        title=f"at one $\\gamma$ = {COMMON_GAMMA:g}",
    )


def _row(rows: runs.Columns, best: runs.Columns, flops: float) -> list[str]:
    label = rows["method"][0]
    values = {name: rows[name][0] for name in _SYMBOLS if name in rows}
    setting = [f"{_SYMBOLS[name]}={value:g}" for name, value in values.items() if value == value]
    cells = [label, " ".join(setting), statistics.percent(rows["accuracy"])]
    gain = statistics.paired(
        100 * rows["accuracy"], 100 * runs.select(best, method="SGD")["accuracy"]
    )
    cells += ["", ""] if label == "SGD" else [f"{gain:+.1f}", gain.chance]
    cells.append(f"{statistics.estimate(rows['train_loss']).mean:.3f}")
    cells.append(f"{statistics.estimate(rows['eigenvalue']):.2f}")
    return [*cells, f"{rows['gradients'][0]:g}", f"{flops:.2f}"]
