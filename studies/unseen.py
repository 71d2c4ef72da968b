"""The self-tuned strength on tasks that had no part in its choice.

Every task of :mod:`studies.registered_tasks` trains plainly, with each constant strength of
``relative_gradreg`` and with the self-tuned one, with the full and with the lazy penalty.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.runs import Columns, Run, select
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Pool, Problem, Recipe
from studies.comparison import tagged
from studies.registered_tasks import TASKS, Task, score

PARTS = {"full": (1.0, 1), "lazy": (0.25, 4)}  # fraction of the batch, interval
WORTH, KEPT, SHARE = 1.0, 0.8, 0.75  # points of a gain, what to keep of it, and in how many tasks
_MEASURED = 2000  # training samples at most
_CHANCE = 10  # a run has diverged at so many times the loss of a uniform guess


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies unseen``."""

    output: Path = Path("results/unseen")
    seeds: int = 5
    """Number of evaluation seeds; everything is paired by seed."""
    choose_seeds: int = 5
    """Number of tuning seeds, on which the best constant strength is chosen."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Constant strengths."""
    steps: int | None = None
    """Training steps; by default those of each task."""
    data_dir: Path | None = None
    """Directory with the files of Fashion-MNIST; by default $GRADREG_DATA, the Debian package, the
    cache, or a download."""

    def __post_init__(self) -> None:
        """Check the numbers and the names."""
        common.at_least(self, 2, "seeds")
        super().__post_init__()
        common.above_zero(self, "strengths")
        common.some_of("tasks", map(repr, self.tasks), map(repr, TASKS))


def run(config: Config) -> dict[str, Any]:
    """Train every task in every way.

    Args:
      config: the settings.

    Returns:
      "runs", one row a run: its "task"; its "role", "choose" on tuning seeds and "report" on
      evaluation seeds; its "part", "full" or "lazy", "" for plain training, and "all" for plain
      training on the held-out samples as well; its "strength", NaN for plain and self-tuned; and
      its "score", see :mod:`studies.registered_tasks`.

    Raises:
      CommandError: data that are not there.
    """
    store, found = runs.Store(config.output), []
    last = config.seed + config.seeds
    evaluation, tuning = range(config.seed, last), range(last, last + config.choose_seeds)
    for name in config.tasks:
        task = TASKS[name]
        rows = runs.select_then_report(
            task.make(config.data_dir),
            candidates(task, config, tuning),
            evaluation,
            store,
            score="score",
            metrics=functools.partial(measure, task),
            what=name,
        )
        found.append(tagged(rows, task=name, kind=task.kind))
    return {"runs": runs.stack(*found)}


def candidates(task: Task, config: Config, tuning: Sequence[int]) -> list[list[Run]]:
    """Return the tuning runs of all ways to train.

    Each way has one setting, so that all of them are evaluated.
    """
    recipe = Recipe(**task.recipe)
    if config.steps is not None:
        recipe = dataclasses.replace(recipe, steps=config.steps)
    everything, plain = dataclasses.replace(recipe, held_out=0), METHODS["SGD"]
    made = [runs.grid(plain, recipe, {}, tuning, part="")]
    made.append(runs.grid(plain, everything, {}, tuning, part="all"))
    for part, (fraction, interval) in PARTS.items():
        lazy, values = (
            dataclasses.replace(recipe, penalty_fraction=fraction),
            {"interval": interval},
        )
        made.append(runs.grid(SELF_TUNED, lazy, values, tuning, part=part))
        for strength in config.strengths:
            one = values | {"strength": strength}
            made.append(runs.grid(METHODS["relative"], lazy, one, tuning, part=part))
    return made


def measure(
    task: Task, problem: Problem, params: PyTree, seed: jax.Array, split: data.Split, pool: Pool
) -> dict[str, jax.Array]:
    """Return the score; batch norm has the statistics of all test samples together."""
    logits = problem.model.apply(params, problem.take(pool, split.test))
    rows = jnp.arange(min(problem.size, _MEASURED))
    loss = problem.loss(params, problem.batch(pool, split, rows))
    limit = _CHANCE * jnp.log(problem.dataset.classes)
    found = {"score": score(task, logits, pool[1][split.test]), "train_loss": loss}
    return found | {"diverged": ~(loss < limit)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task with the full or the lazy penalty, on the evaluation seeds.

    Attributes:
      task: the task.
      part: "full" or "lazy".
      plain: the plain runs.
      everything: the plain runs that train on the held-out samples as well.
      constant: the runs of each constant strength.
      tuned: the self-tuned runs.
      best: the best constant strength on the tuning seeds.
    """

    task: str
    part: str
    plain: Columns
    everything: Columns
    constant: dict[float, Columns]
    tuned: Columns
    best: float

    def gain(self, rows: Columns) -> statistics.Estimate:
        """Return the paired difference from plain training, in points."""
        return statistics.paired(rows["score"], self.plain["score"])

    @property
    def best_reported(self) -> float:
        """The best constant strength on the evaluation seeds."""
        return max(self.constant, key=lambda strength: self.gain(self.constant[strength]).mean)

    def kept(self, strength: float) -> float:
        """Return which share of the gain of a constant strength the rule keeps; NaN without one."""
        most = self.gain(self.constant[strength]).mean
        return self.gain(self.tuned).mean / most if most >= WORTH else np.nan

    @property
    def harmed(self) -> bool:
        """Whether the rule ends below plain training by more than a standard error."""
        gain = self.gain(self.tuned)
        return not gain.mean >= -gain.error


def cells(results: dict[str, Any]) -> Iterator[Cell]:
    """Return the cells of the table."""
    for (task, part), _ in runs.groups(results["runs"], "task", "part"):
        if part in PARTS:
            of_task = select(results["runs"], task=task)
            choose, rows = (select(of_task, role=role) for role in ("choose", "report"))
            plain, everything = (select(rows, part=part) for part in ("", "all"))
            rows, tried = (select(one, part=part) for one in (rows, choose))
            best = runs.best(select(tried, method="relative"), "strength", score="score")
            constant = runs.by(select(rows, method="relative"), "strength")
            tuned = select(rows, method=SELF_TUNED.label)
            strength = (best or {"strength": next(iter(constant))})["strength"]
            yield Cell(task, part, plain, everything, constant, tuned, strength)


def table(results: dict[str, Any]) -> Report:
    """Return plain scores, gains, the kept share of the gain, and the verdict as text."""
    found = list(cells(results))
    strengths = list(found[0].constant)
    head = ["task", "penalty", "plain", *(f"r = {r:g}" for r in strengths), "tuned r"]
    head += ["self-tuned", "p", "kept %", "kept % of best r", "minus plain on all"]
    rows = [_row(cell) for cell in found]
    seeds = {
        role: len(set(select(results["runs"], role=role)["seed"].tolist()))
        for role in ("report", "choose")
    }
    return Report(
        Table("score in %, and differences from plain training in points", head, rows, left=2),
        "",
        *verdict(found),
        "",
        f"means over {seeds['report']} evaluation seeds ± standard error, differences are paired;"
        " score: test accuracy, or 100 R² for regression; tuned r: the best constant strength on"
        f" {seeds['choose']} tuning seeds; p: paired t-test of self-tuned against plain; kept:"
        " share of the gain of the tuned r, or of the r that is best on the evaluation seeds, where"
        " that is at least one point; plain on all: plain training on the held-out samples as well."
        " Gradients per step: " + _costs(results["runs"]) + ".",
    )


def _row(cell: Cell) -> list[Any]:
    tuned = cell.gain(cell.tuned)
    cells = [cell.task, cell.part, report.mean("score", ".1f")(cell.plain)]
    cells += [Number(cell.gain(rows), "+.1f") for rows in cell.constant.values()]
    cells += [f"{cell.best:g}", Number(tuned, "+.1f"), Number(tuned.p, ".1g")]
    cells += [Number(100 * cell.kept(r), ".0f") for r in (cell.best, cell.best_reported)]
    over = statistics.paired(cell.tuned["score"], cell.everything["score"])
    return [*cells, Number(over, "+.1f")]


def verdict(found: Iterable[Cell]) -> list[str]:
    """Return whether the rule meets the registered criterion, for each part."""
    lines = []
    for part in PARTS:
        here = [cell for cell in found if cell.part == part]
        kept = {cell.task: cell.kept(cell.best) for cell in here}
        gains = {task: share for task, share in kept.items() if share == share}
        enough = [task for task, share in gains.items() if share >= KEPT]
        harmed = [cell.task for cell in here if cell.harmed]
        passed = len(enough) >= SHARE * len(gains) and not harmed
        lines.append(
            f"{part}: keeps at least {100 * KEPT:.0f} % of the gain in {len(enough)} of"
            f" {len(gains)} tasks with a gain; below plain training by more than a standard error"
            f" in {len(harmed)} of {len(here)} ({'; '.join(harmed) or 'none'}). Criterion"
            f" {'met' if passed else 'not met'}."
        )
    return lines


def _costs(table: Columns) -> str:
    methods = [SELF_TUNED.label, "relative"]
    of_part = {part: select(table, part=part) for part in PARTS}
    return ", ".join(
        f"{method} {part} {select(rows, method=method)['gradients'][0]:.2f}"
        for part, rows in of_part.items()
        for method in methods
    )


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw unseen.png: the gain of the self-tuned strength and of the tuned constant, by task."""
    found = [cell for cell in cells(results) if cell.part == "full"]
    made, (axes,) = plots.figure(1, width=8.0, height=0.45 * len(found) + 1.5)
    for shift, (label, color) in zip(
        (-0.15, 0.15), {"tuned constant r": "C0", "self-tuned": "C1"}.items(), strict=True
    ):
        rows = [cell.constant[cell.best] if color == "C0" else cell.tuned for cell in found]
        gains = [cell.gain(one) for cell, one in zip(found, rows, strict=True)]
        places = np.arange(len(found)) + shift
        mean, error = ([getattr(gain, name) for gain in gains] for name in ("mean", "error"))
        axes.errorbar(mean, places, xerr=error, fmt="o", color=color, label=label)
    axes.axvline(0, color="k", lw=0.6)
    axes.set_yticks(range(len(found)), [cell.task for cell in found])
    axes.invert_yaxis()
    axes.set_xlabel("gain over plain training, points")
    axes.legend(frameon=False)
    return plots.save(made, output / "unseen", formats)
