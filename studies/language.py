"""Penalties in single-epoch training of a byte-level language model.

Compares the loss on held-out files with plain AdamW at equal steps and at equal compute.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradreg_optax import relative_gradreg
from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import (
    METHODS,
    SELF_TUNED,
    Method,
    Pool,
    Problem,
    Recipe,
)
from studies import corpus
from studies.warmup import warmed_up

PLAIN = METHODS["SGD"]  # the plain gradient, here followed by AdamW
PART, INTERVAL = 1 / 4, 4  # fraction and interval of the lazy penalty
LATE = 3 / 4  # fraction of the steps before a late penalty starts
_LAZY_STRENGTH = 0.25
_WARM_UP = 1 / 10  # fraction of the steps
MEASURED = 500  # windows for the training loss
_SEARCHED = {"F-GR": "gamma", "SAM": "rho"}  # values from the option with this name in the plural
_SYMBOLS = {"gamma": "γ=ε", "rho": "ρ", "strength": "r"}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies language``."""

    output: Path = Path("results/language")
    seeds: int = 3
    """Number of evaluation seeds; rows are paired by seed."""
    choose_seeds: int = 3
    """Number of tuning seeds for learning rate, gamma and rho."""
    steps: int = 1000
    """Number of training steps; plain rows at equal compute take more."""
    batch_size: int = 16
    """Windows of text per step."""
    length: int = 64
    """Bytes in a window."""
    width: int = 64
    """Size of the embedding; a multiple of the number of heads, 4."""
    depth: int = 2
    """Number of transformer blocks."""
    learning_rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """Candidate learning rates for plain AdamW; all rows use the best one."""
    gammas: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Candidate coefficients of F-GR, with epsilon = gamma."""
    rhos: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    """Candidate radii of SAM."""
    strengths: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Relative strengths; all of them are evaluated."""
    test_size: int = 1000
    """Number of windows of the held-out files."""

    def __post_init__(self) -> None:
        """Check the values as well."""
        common.at_least(self, 2, "seeds", "steps", "length")
        super().__post_init__()
        common.above_zero(self, "learning_rates", "gammas", "rhos", "strengths")
        if self.width % 4:
            raise CommandError(f"width must be a multiple of 4, got {self.width}.")


def run(config: Config) -> dict[str, Any]:
    """Search on the tuning seeds, then train every row on every evaluation seed.

    Returns:
      "text", the sizes and a digest of the corpus; "recipe", the shared settings; and "runs", one
      row per run, with its "role" ("search" or "report"), the "row" of the table, the number of
      "steps" and the "gradients" per step.

    Raises:
      CommandError: more steps than one epoch has.
    """
    dataset, store = corpus.source_code(config.length, packages=True), runs.Store(config.output)
    first = config.seed + config.choose_seeds
    choose, report = range(config.seed, first), range(first, first + config.seeds)
    train = functools.partial(
        runs.train, dataset, store=store, lanes=1, what="language", metrics=measure
    )
    base = _recipe(config, dataset)
    search = functools.partial(_runs, config, seeds=choose, role="search")
    rates = [dataclasses.replace(base, learning_rate=rate) for rate in config.learning_rates]
    found = [train([one for recipe in rates for one in search("AdamW", PLAIN, recipe, {})])]
    recipe = dataclasses.replace(base, learning_rate=best(found[0], "learning_rate"))
    chosen = {}
    for label, name in _SEARCHED.items():
        values = [_settings(label, value) for value in getattr(config, f"{name}s")]
        of = functools.partial(search, label, METHODS[label], recipe)
        found.append(train([one for setting in values for one in of(setting)]))
        chosen[label] = best(found[-1], name)
    for seed in report:  # one seed after another, so that an interrupted run has complete seeds
        found.append(train(rows_of(config, recipe, chosen, [seed])))
    sides = [[path.read_bytes() for path in side] for side in corpus.source_files(packages=True)]
    text: dict[str, Any] = {"digest": runs.fingerprint(dataset)[:20]}
    for side, files in zip(("training", "held out"), sides, strict=True):
        text[side] = {"files": len(files), "bytes": sum(map(len, files))}
    return {"text": text, "recipe": recipe.describe(), "runs": runs.stack(*found)}


def _recipe(config: Config, dataset: data.Dataset) -> Recipe:
    """Return the shared recipe; its samples are one epoch of the longest row."""
    held_out = max(1, config.steps * config.batch_size // 10)
    size = 2 * config.steps * config.batch_size + held_out
    if size > len(dataset.train_x):
        most = len(dataset.train_x) * config.steps // size
        raise CommandError(
            f"steps must be at most {most}, the length of an epoch, got {config.steps}."
        )
    network = {"width": config.width, "depth": config.depth}
    sizes = {name: getattr(config, name) for name in ("test_size", "batch_size", "steps")}
    return Recipe(
        model=corpus.transformer(dataset.classes, *dataset.shape, **network),
        **network,
        **sizes,
        train_size=size,
        label_noise=0.0,
        optimizer="adamw",
        held_out=held_out,
        eigenvalue=False,
    )


def measure(
    problem: Problem, params: PyTree, seed: jax.Array, split: data.Split, pool: Pool
) -> dict[str, jax.Array]:
    """Return the metrics of a network, with the training loss of few windows."""
    few = split._replace(train=split.train[:MEASURED], train_labels=split.train_labels[:MEASURED])
    return problem.metrics(params, seed, few, pool)


def rows_of(config: Config, recipe: Recipe, chosen: dict[str, float], seeds: Any) -> list[runs.Run]:
    """Return the evaluation runs of some seeds."""
    relative, lazy = METHODS["relative"], dataclasses.replace(recipe, penalty_fraction=PART)
    report = functools.partial(_runs, config, seeds=seeds, role="report")
    wanted = []
    for cost in (1.0, METHODS["F-GR"].cost(PART, INTERVAL), METHODS["F-GR"].cost()):
        longer = dataclasses.replace(recipe, steps=round(cost * config.steps))
        row = "AdamW" if cost == 1 else f"AdamW, {cost:g} times the steps"
        wanted += report(row, PLAIN, longer, {})
    for label, value in chosen.items():
        wanted += report(label, METHODS[label], recipe, _settings(label, value))
    for strength in config.strengths:
        row = f"relative, r = {strength:g}"
        wanted += report(row, relative, recipe, {"strength": strength})
    given = {"strength": _LAZY_STRENGTH, "interval": INTERVAL}
    name = f"relative, r = {_LAZY_STRENGTH:g}, lazy"
    wanted += report(name, relative, lazy, given)
    start = int(LATE * config.steps)
    share = 1 - start / config.steps
    wanted += report(f"{name} and late", _late(start), lazy, given, share=share)
    return wanted + report("self-tuned", SELF_TUNED, recipe, {})


@functools.cache  # the same object compiles once
def _late(start: int) -> Method:
    make = functools.partial(relative_gradreg, start=start)
    return METHODS["relative"]._replace(label="late relative", make=make)


def _settings(label: str, value: float) -> dict[str, float]:
    return {"gamma": value, "epsilon": value} if label == "F-GR" else {"rho": value}


def _runs(
    config: Config, row: str, method: Method, recipe: Recipe, settings: Any, **how: Any
) -> list[runs.Run]:
    """Return the runs of a row; a fraction ``share`` of the steps can apply the penalty."""
    share, warmup = how.pop("share", 1.0), int(_WARM_UP * config.steps)
    cost = method.cost(recipe.penalty_fraction, settings.get("interval", 1))
    how |= {"row": row, "steps": recipe.steps, "gradients": 1 + share * (cost - 1)}
    how["learning_rate"] = recipe.learning_rate
    return runs.grid(method, warmed_up(recipe, warmup), settings, **how)


def best(tried: Columns, name: str) -> float:
    """Return the value with the lowest mean held-out loss; a diverged run has an infinite loss."""
    losses = {value: rows["test_loss"] for value, rows in runs.by(tried, name).items()}
    return float(min(losses, key=lambda value: np.mean(np.nan_to_num(losses[value], nan=np.inf))))


_HEAD = ["row", "setting", "gradients", "steps", "compute", "nats per byte", "bits", "training"]
_HEAD += ["minus AdamW", "p", "minus AdamW at equal compute", "p"]


def compute(rows: Columns) -> float:
    """Return the number of gradient evaluations of a run."""
    return float(rows["gradients"][0] * rows["steps"][0])


def reported(results: dict[str, Any]) -> dict[str, Columns]:
    """Return the evaluation runs of each row."""
    return runs.by(select(results["runs"], role="report"), "row")


def equal(rows: Columns, found: dict[str, Columns]) -> Columns:
    """Return the plain runs with equal compute, or with the next smaller one."""
    plain = [other for other in found.values() if other["method"][0] == PLAIN.label]
    return max((one for one in plain if compute(one) < compute(rows) + 1), key=compute)


def gain(rows: Columns, over: Columns) -> statistics.Estimate:
    """Return the paired difference of the held-out losses; negative if ``rows`` are better."""
    return statistics.paired(rows["test_loss"], over["test_loss"])


def table(results: dict[str, Any]) -> Report:
    """Return the losses, and paired differences to plain AdamW (lower is better)."""
    found, search = reported(results), select(results["runs"], role="search")
    text, held_out = results["text"]["training"], results["text"]["held out"]
    lines: list[Table | str] = [
        f"{text['bytes'] / 1e6:.1f} MB of source code in {text['files']} files, tested on"
        f" {held_out['files']} others (digest {results['text']['digest']})",
        Table("", _HEAD, [_row(*row, found) for row in found.items()], left=2),
        "",
    ]
    for row, tried in runs.by(search, "row").items():
        name = _SEARCHED.get(row, "learning_rate")
        losses = {value: np.mean(some["test_loss"]) for value, some in runs.by(tried, name).items()}
        values = [f"{value:g}: {loss:.3f}" for value, loss in losses.items()]
        lines.append(f"search of {row}, {_SYMBOLS.get(name, 'learning rate')}  {', '.join(values)}")
    lines.append(
        f"\nMeans ± standard errors over {len(set(found['AdamW']['seed']))} evaluation seeds;"
        f" settings searched on {len(set(search['seed']))} other seeds; p: paired t-test. Losses in"
        " nats per byte. Compute: gradient evaluations, relative to AdamW. Equal compute: plain"
        " AdamW with equal compute, or with the next smaller one. Lazy: on a quarter of the batch,"
        " every 4th step. Late: in the last quarter of the steps."
    )
    return Report(*lines)


def _row(name: str, rows: Columns, found: dict[str, Columns]) -> list[Any]:
    plain, loss = found["AdamW"], statistics.estimate(rows["test_loss"])
    cells = [name, report.settings(_SYMBOLS)(rows), f"{rows['gradients'][0]:.3g}"]
    cells += [f"{rows['steps'][0]}", f"{compute(rows) / compute(plain):.3g}"]
    cells += [f"{loss:.3f}", f"{loss.mean / np.log(2):.3f}"]
    cells.append(f"{statistics.estimate(rows['train_loss']).mean:.3f}")
    for other in (plain, equal(rows, found)):
        alone = other["row"][0] == name
        less = gain(rows, other)
        cells += ["", ""] if alone else [f"{less:+.4f}", Number(less.p, ".1g")]
    return cells


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw the held-out loss against compute, and its difference to plain AdamW for each seed."""
    found = reported(results)
    plain = found["AdamW"]
    made, (left, right) = plots.figure(2, width=5.4, height=4.4)
    line = sorted(
        (compute(rows) / compute(plain), np.mean(rows["test_loss"]))
        for rows in found.values()
        if rows["method"][0] == PLAIN.label
    )
    left.plot(*zip(*line, strict=True), color=plots.color("SGD"), lw=1, label="AdamW")
    for place, rows in enumerate(found.values()):
        label, less = rows["method"][0].removeprefix("late "), gain(rows, plain)
        style: Any = {"color": plots.color(label)}
        plots.mean(left, compute(rows) / compute(plain), rows["test_loss"], label)
        single = rows["test_loss"] - plain["test_loss"]
        right.plot(single, np.full(len(single), place), ".", alpha=0.35, **style)
        right.errorbar(less.mean, place, xerr=less.error, fmt="|", ms=14, mew=2.5, **style)
    left.set(
        xlabel="gradient evaluations, relative to AdamW", ylabel="held-out loss (nats per byte)"
    )
    left.set_title("cost and loss (line: plain AdamW)", fontsize=11)
    right.axvline(0, color="k", lw=0.6)
    right.set_yticks(range(len(found)), list(found), fontsize=9)
    right.invert_yaxis()
    right.set(xlabel="held-out loss minus AdamW (nats per byte)")
    return plots.save(made, output / "language", formats)
