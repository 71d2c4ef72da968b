"""A byte-level language model that sees its text once: what every penalty does to the loss on other
files, beside plain AdamW for as many steps and for as much compute.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gradreg_optax import relative_gradreg
from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Method, Recipe
from studies import corpus

PLAIN = METHODS["SGD"]  # the plain gradient, here in the hands of AdamW
PART, INTERVAL = 1 / 4, 4  # of the lazy rows
LATE = 3 / 4  # of the steps, before a late penalty begins
_LAZY_STRENGTH = 0.25
_WARM_UP = 1 / 10  # of the steps
_SEARCHED = {"F-GR": "gamma", "SAM": "rho"}  # the values are those of the option in plural
_SYMBOLS = {"gamma": "γ=ε", "rho": "ρ", "strength": "r"}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies language``."""

    output: Path = Path("results/language")
    seeds: int = 3
    """Number of seeds that are reported; everything is paired by seed."""
    choose_seeds: int = 3
    """Number of seeds before these that learning rate, gamma and rho are searched on."""
    steps: int = 1000
    """Training steps; more, at equal compute, of the longer plain rows."""
    batch_size: int = 16
    """Windows of text in a step."""
    length: int = 64
    """Bytes in a window."""
    width: int = 64
    """Numbers that stand for a byte in the network; a multiple of its four heads."""
    depth: int = 2
    """Blocks of the network."""
    learning_rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """Learning rates to search with plain AdamW; all rows take the best."""
    gammas: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Coefficients of F-GR to search, each with the ascent step of the same length."""
    rhos: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    """Radii of SAM to search."""
    strengths: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of the step; all of them are reported."""
    test_size: int = 1000
    """Windows of the held-out files."""

    def __post_init__(self) -> None:
        """Checks the numbers."""
        common.at_least(self, 2, "seeds", "steps", "length")
        super().__post_init__()
        common.above_zero(self, "learning_rates", "gammas", "rhos", "strengths")
        if self.width % 4:
            raise CommandError(f"width must be a multiple of 4, got {self.width}.")


def run(config: Config) -> dict[str, Any]:
    """Searches on seeds of its own, then trains every row on every other seed, one by one.

    Args:
      config: the settings.

    Returns:
      "text", what was read, with a digest; "recipe", what all rows have in common; and "runs", one
      row a run: its "role" is "search" or "report", "row" the name in the table, "steps" how many
      it takes and "gradients" what each of these costs.

    Raises:
      CommandError: more steps than the text lasts for.
    """
    dataset, store = corpus.source_code(config.length, packages=True), runs.Store(config.output)
    first = config.seed + config.choose_seeds
    choose, report = range(config.seed, first), range(first, first + config.seeds)
    train = functools.partial(runs.train, dataset, store=store, lanes=1, what="language")
    base = _recipe(config, dataset)
    search = functools.partial(_runs, seeds=choose, role="search")
    rates = [dataclasses.replace(base, learning_rate=rate) for rate in config.learning_rates]
    found = [train([one for recipe in rates for one in search("AdamW", PLAIN, recipe, {})])]
    recipe = dataclasses.replace(base, learning_rate=best(found[0], "learning_rate"))
    chosen = {}
    for label, name in _SEARCHED.items():
        values = [_settings(label, value) for value in getattr(config, f"{name}s")]
        of = functools.partial(search, label, METHODS[label], recipe)
        found.append(train([one for setting in values for one in of(setting)]))
        chosen[label] = best(found[-1], name)
    for seed in report:  # seed by seed, so that an early end has whole ones
        found.append(train(rows_of(config, recipe, chosen, [seed])))
    sides = [[path.read_bytes() for path in side] for side in corpus.source_files(packages=True)]
    text: dict[str, Any] = {"digest": runs.fingerprint(dataset)[:20]}
    for side, files in zip(("training", "held out"), sides, strict=True):
        text[side] = {"files": len(files), "bytes": sum(map(len, files))}
    return {"text": text, "recipe": recipe.describe(), "runs": runs.stack(*found)}


def _recipe(config: Config, dataset: data.Dataset) -> Recipe:
    """What all rows have in common: also the samples, of which the longest row sees each once."""
    held_out = max(1, config.steps * config.batch_size // 10)
    size = 2 * config.steps * config.batch_size + held_out
    if size > len(dataset.train_x):
        most = len(dataset.train_x) * config.steps // size
        raise CommandError(
            f"steps must be at most {most}, got {config.steps}: the text is seen only once."
        )
    network = {"width": config.width, "depth": config.depth}
    sizes = {name: getattr(config, name) for name in ("test_size", "batch_size", "steps")}
    return Recipe(
        model=corpus.transformer(dataset.classes, *dataset.shape, **network),
        **network,
        **sizes,
        train_size=size,
        label_noise=0.0,
        warmup_steps=int(_WARM_UP * config.steps),
        optimizer="adamw",
        held_out=held_out,
        eigenvalue=False,
        measured=500,
    )


def rows_of(config: Config, recipe: Recipe, chosen: dict[str, float], seeds: Any) -> list[runs.Run]:
    """The reported runs of some seeds."""
    relative, lazy = METHODS["relative"], dataclasses.replace(recipe, penalty_fraction=PART)
    report = functools.partial(_runs, seeds=seeds, role="report")
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
    return dataclasses.replace(METHODS["relative"], label="late relative", make=make)


def _settings(label: str, value: float) -> dict[str, float]:
    return {"gamma": value, "epsilon": value} if label == "F-GR" else {"rho": value}


def _runs(
    row: str, method: Method, recipe: Recipe, settings: Any, *, share: float = 1.0, **how: Any
) -> list[runs.Run]:
    """A row's runs on "seeds" with a "role"; ``share`` of the steps can take the penalty."""
    cost = method.cost(recipe.penalty_fraction, settings.get("interval", 1))
    how |= {"row": row, "steps": recipe.steps, "gradients": 1 + share * (cost - 1)}
    return runs.grid(method, recipe, settings, **how, learning_rate=recipe.learning_rate)


def best(tried: Columns, name: str) -> float:
    """The value with the lowest mean loss on the held-out files; a diverged run is the worst."""
    losses = {value: rows["test_loss"] for value, rows in runs.by(tried, name).items()}
    return float(min(losses, key=lambda value: np.mean(np.nan_to_num(losses[value], nan=np.inf))))


# Table and figure.

_HEAD = ["row", "setting", "gradients", "steps", "compute", "nats a byte", "bits", "in training"]
_HEAD += ["minus AdamW", "p", "minus AdamW at equal compute", "p"]


def compute(rows: Columns) -> float:
    """Gradient evaluations of a run."""
    return float(rows["gradients"][0] * rows["steps"][0])


def reported(results: dict[str, Any]) -> dict[str, Columns]:
    """The reported runs of each row of the table."""
    return runs.by(select(results["runs"], role="report"), "row")


def equal(rows: Columns, found: dict[str, Columns]) -> Columns:
    """The plain runs of as much compute as some others, or else the next less."""
    plain = [other for other in found.values() if other["method"][0] == PLAIN.label]
    return max((one for one in plain if compute(one) < compute(rows) + 1), key=compute)


def gain(rows: Columns, over: Columns) -> statistics.Difference:
    """The paired difference of the losses on the held-out files; below zero ``rows`` are better."""
    return statistics.paired(rows["test_loss"], over["test_loss"])


def table(results: dict[str, Any]) -> Report:
    """The rows as text: losses, and paired differences to plain AdamW, which are better the lower
    they are.
    """
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
        lines.append(f"searched {row}, {_SYMBOLS.get(name, 'learning rate')}  {', '.join(values)}")
    lines.append(
        f"\nmeans over {len(set(found['AdamW']['seed']))} seeds ± standard error, settings searched"
        f" on other seeds ({len(set(search['seed']))}); p: paired t-test. compute: gradient"
        " evaluations, in those of AdamW; equal compute: plain AdamW of as much, or the next less;"
        " lazy: on a quarter of the batch in every 4th step; late: in the last quarter of steps."
    )
    return Report(*lines)


def _row(name: str, rows: Columns, found: dict[str, Columns]) -> list[str]:
    plain, loss = found["AdamW"], statistics.estimate(rows["test_loss"])
    cells = [name, report.settings(_SYMBOLS)(rows), f"{rows['gradients'][0]:.3g}"]
    cells += [f"{rows['steps'][0]}", f"{compute(rows) / compute(plain):.3g}"]
    cells += [f"{loss:.3f}", f"{loss.mean / np.log(2):.3f}"]
    cells.append(f"{statistics.estimate(rows['train_loss']).mean:.3f}")
    for other in (plain, equal(rows, found)):
        alone = other["row"][0] == name
        less = gain(rows, other)
        cells += ["", ""] if alone else [f"{less:+.4f}", less.p_text]
    return cells


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws language.png: the loss on held-out files against the compute, and its difference to
    plain AdamW, with the single seeds.
    """
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
        look: Any = {"color": plots.color(label)}
        plots.mean(left, compute(rows) / compute(plain), rows["test_loss"], label)
        single = rows["test_loss"] - plain["test_loss"]
        right.plot(single, np.full(len(single), place), ".", alpha=0.35, **look)
        right.errorbar(less.mean, place, xerr=less.error, fmt="|", ms=14, mew=2.5, **look)
    left.set(xlabel="gradients, in those of AdamW", ylabel="nats a byte on held-out files")
    left.set_title("cost and loss (line: plain AdamW)", fontsize=11)
    right.axvline(0, color="k", lw=0.6)
    right.set_yticks(range(len(found)), list(found), fontsize=9)
    right.invert_yaxis()
    right.set(xlabel="nats a byte more than AdamW (left is better)")
    return plots.save(made, output / "language", formats)
