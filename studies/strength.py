"""Relative strength, fixed or self-tuned, compared with a searched coefficient on eight tasks.

Every task trains without a penalty, with each strength of ``relative_gradreg``, with a self-tuned
strength, and with the coefficient that was best on tuning seeds. The penalty is on the whole batch
in every step, or lazy (25 % of the batch, every 4th step).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax.experiments import common, data, plots, runs, statistics
from gradreg_optax.experiments.data import Array
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import (
    METHODS,
    SELF_TUNED,
    Method,
    Recipe,
    Trainer,
    problem,
)
from studies import corpus, fashion_mnist
from studies.comparison import tagged, tied
from studies.warmup import warmed_up

PARTS = {"full": (1.0, 1), "lazy": (0.25, 4)}  # fraction of the batch, interval
LEARNING_RATES = {"sgd": 0.2, "momentum": 0.02, "adam": 2e-3, "adamw": 2e-3}
_WINDOW = 32  # bytes of text in a sample
_CELL = ("task", "optimizer", "part")
_HEAD = ["task", "optimizer", "part", "plain"]
_RELEVANT = {"accuracy": 1.0, "test_loss": 0.02}  # smallest gain for the column "kept"


_SEARCHED = Method("searched gamma", tied, ("gamma",), 2)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      dataset: its name; "text" for source code.
      recipe: differences from the default recipe.
      optimizers: the optimizers.
      metric: "accuracy" or "test_loss".
      expensive: use at most three evaluation seeds and one tuning seed.
      warmup: number of steps of a learning-rate warm-up.
    """

    dataset: str
    recipe: Mapping[str, Any]
    optimizers: tuple[str, ...] = ("sgd",)
    metric: str = "accuracy"
    expensive: bool = False
    warmup: int = 0


_DIGITS = {"train_size": 360, "held_out": 60}
_FASHION = {"train_size": 1200, "held_out": 200, "test_size": 4000}
_TEXT: dict[str, Any] = {"batch_size": 8, "label_noise": 0.0}
TASKS = {
    "digits, 30 % label noise": Task("digits", _DIGITS, ("sgd", "momentum", "adam")),
    "digits": Task("digits", _DIGITS | {"label_noise": 0.0}, ("sgd", "momentum", "adam")),
    "digits, 30 % label noise, CNN": Task(
        "digits", _DIGITS | {"model": "cnn", "width": 8, "steps": 1500}, expensive=True
    ),
    "MNIST-1D": Task("mnist1d", {"train_size": 4000, "held_out": 400, "label_noise": 0.0}),
    "Fashion-MNIST, 20 % label noise": Task("fashion-mnist", _FASHION | {"label_noise": 0.2}),
    "Fashion-MNIST": Task("fashion-mnist", _FASHION | {"label_noise": 0.0}),
    "text, memorised": Task(
        "text",
        _TEXT | {"train_size": 360, "held_out": 60, "steps": 1000},
        ("adamw",),
        "test_loss",
        expensive=True,
        warmup=100,
    ),
    "text, underfitting": Task(
        "text",
        _TEXT | {"train_size": 6600, "held_out": 600, "steps": 1200},
        ("adamw",),
        "test_loss",
        expensive=True,
        warmup=100,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies strength``."""

    output: Path = Path("results/strength")
    seeds: int = 5
    """Number of evaluation seeds; at most 3 for expensive networks. Rows are paired by seed."""
    choose_seeds: int = 2
    """Number of tuning seeds for the coefficient; 1 for expensive networks."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Relative strengths."""
    gammas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Candidate coefficients, with epsilon = gamma."""
    steps: int | None = None
    """Number of training steps; by default that of each task."""
    data_dir: Path | None = None
    """Directory with the files of Fashion-MNIST; by default $GRADREG_DATA, the Debian package, the
    cache, or a download."""

    def __post_init__(self) -> None:
        """Check the values and the names as well."""
        common.at_least(self, 2, "seeds")
        super().__post_init__()
        common.above_zero(self, "strengths", "gammas")
        common.some_of("tasks", map(repr, self.tasks), map(repr, TASKS))


def run(config: Config) -> dict[str, Any]:
    """Train every task with every method.

    Returns:
      "metrics", the metric of each task; and "runs", one row per run, with its "task", "optimizer",
      "part" ("full" or "lazy"; "" without a penalty) and "role": "plain"; "plain, all", which also
      trains on the held-out samples; "strength"; "search" and "plain, search" on the tuning seeds;
      "searched"; and "self-tuned".

    Raises:
      CommandError: missing data.
    """
    store, found = runs.Store(config.output), []
    for name in config.tasks:
        task = TASKS[name]
        dataset = _dataset(task, config)
        for optimizer in task.optimizers:
            recipe = _recipe(task, dataset, optimizer, config)
            rows = _Study(config, dataset, store, recipe, task).rows()
            found.append(tagged(rows, task=name, optimizer=optimizer))
    metrics = {name: TASKS[name].metric for name in config.tasks}
    return {"metrics": metrics, "runs": runs.stack(*found)}


def _dataset(task: Task, config: Config) -> data.Dataset:
    if task.dataset == "text":
        return corpus.source_code(_WINDOW)
    if task.dataset == "fashion-mnist":
        return fashion_mnist.load(config.data_dir)
    return data.load(task.dataset)


def _recipe(task: Task, dataset: data.Dataset, optimizer: str, config: Config) -> Recipe:
    rate = LEARNING_RATES[optimizer]
    given: dict[str, Any] = {"learning_rate": rate, "optimizer": optimizer, "eigenvalue": False}
    given |= task.recipe
    if dataset.tokens:
        given["model"] = corpus.transformer(dataset.classes, *dataset.shape)
    if config.steps is not None:
        return Recipe(**given | {"steps": config.steps})
    return warmed_up(Recipe(**given), task.warmup)


@dataclasses.dataclass(frozen=True)
class _Study:
    """Data and settings of the runs of a task with one optimizer."""

    config: Config
    dataset: data.Dataset
    store: runs.Store
    recipe: Recipe
    task: Task

    def rows(self) -> Columns:
        """Train all methods and return their runs."""
        config, most = self.config, (3, 1) if self.task.expensive else (None, None)
        last = config.seed + config.seeds
        report = range(config.seed, last)[: most[0]]
        choose = range(last, last + config.choose_seeds)[: most[1]]
        everything = dataclasses.replace(self.recipe, held_out=0)
        plain, none = METHODS["SGD"], {"part": ""}
        wanted = runs.grid(plain, everything, {}, report, role="plain, all", **none)
        wanted += runs.grid(plain, self.recipe, {}, choose, role="plain, search", **none)
        measured = self._measured(plain, self.recipe, 1, report)
        found = [self._train(wanted), tagged(measured, role="plain", **none)]
        for part, (fraction, interval) in PARTS.items():
            recipe = dataclasses.replace(self.recipe, penalty_fraction=fraction)
            grid = functools.partial(runs.grid, recipe=recipe, part=part)
            values: dict[str, Any] = {"strength": config.strengths, "gamma": config.gammas}
            values["interval"] = interval
            tried = self._train(grid(_SEARCHED, values=values, seeds=choose, role="search"))
            values["gamma"] = _best(tried, self.task.metric)
            wanted = grid(_SEARCHED, values=values, seeds=report, role="searched")
            wanted += grid(METHODS["relative"], values=values, seeds=report, role="strength")
            tuned = self._measured(SELF_TUNED, recipe, interval, report)
            found += [tried, self._train(wanted), tagged(tuned, role="self-tuned", part=part)]
        return runs.stack(*found)

    def _train(self, wanted: list[runs.Run]) -> Columns:
        return runs.train(self.dataset, wanted, self.store, what="strength")

    def _measured(self, method: Method, recipe: Recipe, interval: int, seeds: Any) -> Columns:
        """Return runs with measurements during the training."""
        what = {"recipe": recipe.describe(), "interval": interval, "seeds": list(seeds)}
        what["data"] = runs.fingerprint(self.dataset)
        make = functools.partial(self._measure, method, recipe, interval, list(seeds))
        made = self.store.keep(f"along-{method.label}", what, make)
        cost = method.cost(recipe.penalty_fraction, interval)
        return tagged(made, method=method.label, gradients=cost)

    def _measure(self, method: Method, recipe: Recipe, interval: int, seeds: list[int]) -> Columns:
        trainer, task = Trainer(self.dataset, method, recipe), problem(self.dataset, recipe)
        split, lanes = task.draw(seeds), jnp.asarray(seeds, jnp.uint32)
        measure = functools.partial(task.measure, seeds=lanes, split=split)
        shares, losses, chunks = [], [], 1 + -(-recipe.steps // 100)
        settings = {} if method.make is None else {"interval": interval}
        along = trainer.states(settings, seeds)
        for states in common.progress("strength", "chunk", along, chunks):
            share = optax.tree.get(states.opt_state, "strength", jnp.nan)
            shares.append(np.broadcast_to(np.asarray(share), len(seeds)))
            if self.task.metric == "test_loss":
                losses.append(measure(states.params)["test_loss"])
        early = np.array(shares[1 : max(2, len(shares) // 6 + 1)])
        found = {"seed": np.array(seeds), "early": early.mean(axis=0), "late": shares[-1]}
        if losses:
            found["best_loss"] = np.nanmin(losses, axis=0)
        return found | measure(states.params)


def _best(tried: Columns, metric: str) -> float:
    """Return the coefficient with the best mean score."""
    found = runs.by(tried, "gamma")
    return float(max(found, key=lambda gamma: np.mean(_score(found[gamma], metric))))


def _score(rows: Columns, metric: str) -> Array:
    """Return accuracies in percent, or negative losses; a diverged run has the worst value."""
    if metric == "accuracy":
        return 100 * np.nan_to_num(rows["accuracy"])
    return -np.nan_to_num(rows["test_loss"], nan=20.0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task with one optimizer, with a full or a lazy penalty.

    Attributes:
      key: task, optimizer, part.
      metric: "accuracy" or "test_loss".
      plain: the plain runs.
      everything: plain runs that also train on the held-out samples.
      constant: the runs of each strength.
      searched: the runs of the searched coefficient.
      tuned: the self-tuned runs.
    """

    key: tuple[str, str, str]
    metric: str
    plain: Columns
    everything: Columns
    constant: dict[float, Columns]
    searched: Columns
    tuned: Columns

    def gain(self, rows: Columns, over: Columns | None = None) -> statistics.Estimate:
        """Return the paired difference to plain training; larger is better."""
        less = self.plain if over is None else over
        return statistics.paired(_score(rows, self.metric), _score(less, self.metric))

    @property
    def best(self) -> float:
        """The fixed strength with the largest gain on the evaluation seeds."""
        return max(self.constant, key=lambda strength: self.gain(self.constant[strength]).mean)

    @property
    def kept(self) -> float:
        """The gain of self-tuning relative to the best fixed strength; NaN if that is small."""
        most = self.gain(self.constant[self.best]).mean
        return self.gain(self.tuned).mean / most if most >= _RELEVANT[self.metric] else np.nan


def cells(results: dict[str, Any]) -> Iterator[Cell]:
    """Yield the cells of the table."""
    table = results["runs"]
    for (task, optimizer, part), rows in runs.groups(table, *_CELL):
        if part:
            plain = select(table, task=task, optimizer=optimizer, part="")
            yield Cell(
                (task, optimizer, part),
                results["metrics"][task],
                plain=select(plain, role="plain"),
                everything=select(plain, role="plain, all"),
                constant=runs.by(select(rows, role="strength"), "strength"),
                searched=select(rows, role="searched"),
                tuned=select(rows, role="self-tuned"),
            )


def table(results: dict[str, Any]) -> Report:
    """Return plain training, and paired differences to it, for each task."""
    found, lines = list(cells(results)), list[Table | str]()
    strengths = list(found[0].constant)
    titles = {
        "accuracy": "test accuracy (%), and differences to plain training in percentage points",
        "test_loss": "test loss in nats, and its decrease compared with plain training",
    }
    for metric, title in titles.items():
        of_kind = [cell for cell in found if cell.metric == metric]
        if of_kind:
            head = [*_HEAD, "gamma", "searched", *(f"r = {r:g}" for r in strengths)]
            head += ["self-tuned", "p", "kept", "r early, late", "minus plain on all"]
            lines += [title, Table("", head, [_row(cell) for cell in of_kind], left=3), ""]
    lines += [*_stopping(found), *_verdicts(found)]
    seeds = []
    for role in ("plain", "search"):
        tasks = runs.by(select(results["runs"], role=role), "task").values()
        seeds.append(" or ".join(map(str, sorted({len(set(rows["seed"])) for rows in tasks}))))
    cost = {cell.key[2]: cell.tuned["gradients"][0] for cell in found}
    lines.append(
        f"Means ± standard errors over {seeds[0]} evaluation seeds; gamma (= epsilon) searched on"
        f" {seeds[1]} other seeds; p: paired t-test of self-tuned against plain; kept: gain of"
        " self-tuned relative to the best constant r, if that gains at least 1 point (0.02 nats);"
        " plain on all: plain training that includes the held-out samples. Gradients per step of"
        " self-tuned: " + ", ".join(f"{part} {value:.2f}" for part, value in cost.items()) + "."
    )
    return Report(*lines)


def _row(cell: Cell) -> list[Any]:
    spec, sign = (".1f", 1) if cell.metric == "accuracy" else (".3f", -1)
    level = statistics.estimate(sign * _score(cell.plain, cell.metric))
    tuned = cell.gain(cell.tuned)
    cells: list[Any] = [*cell.key, f"{level:{spec}}", f"{cell.searched['gamma'][0]:g}"]
    constant = [cell.gain(rows) for rows in (cell.searched, *cell.constant.values())]
    cells += [f"{gain:+{spec}}" for gain in (*constant, tuned)]
    cells += [Number(tuned.p, ".1g"), "" if np.isnan(cell.kept) else f"{100 * cell.kept:.0f}%"]
    cells.append(", ".join(f"{np.mean(cell.tuned[name]):.2f}" for name in ("early", "late")))
    return [*cells, f"{cell.gain(cell.tuned, cell.everything):+{spec}}"]


def _stopping(found: list[Cell]) -> list[str]:
    """Compare with plain training that stops at the lowest test loss."""
    lines = []
    for cell in found:
        if "best_loss" in cell.plain and cell.metric == "test_loss":
            gain = statistics.paired(cell.plain["best_loss"], cell.tuned["test_loss"])
            name = ", ".join((cell.key[0], cell.key[2]))
            lines.append(
                f"{name}: final loss of self-tuned {gain:+.3f} nats below the lowest loss of plain"
            )
    return [*lines, ""] if lines else []


def _verdicts(found: list[Cell]) -> list[str]:
    """Return the cells in which a claim does not hold."""

    def below(cell: Cell, rows: Columns | None) -> bool:
        gain = None if rows is None else cell.gain(rows)
        return gain is not None and gain.mean < -gain.error

    below_plain = "below plain by more than a standard error"
    claims: dict[str, Callable[[Cell], bool]] = {
        f"self-tuned {below_plain}": lambda cell: below(cell, cell.tuned),
        f"r = 0.5 {below_plain}": lambda cell: below(cell, cell.constant.get(0.5)),
        "self-tuned keeps less than 80% of the best r's gain": lambda cell: cell.kept < 0.8,
    }
    lines = []
    for claim, holds in claims.items():
        names = [", ".join(cell.key) for cell in found if holds(cell)]
        lines.append(f"{claim}: {len(names)} of {len(found)} cells")
        lines += [f"  {name}" for name in names]
    return [*lines, ""]


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw the gain in accuracy of every cell against the strength and against the coefficient."""
    made, (left, right) = plots.figure(2, width=6.0, height=4.6, sharey=True)
    table, names = results["runs"], list(results["metrics"])
    drawn: set[str] = set()
    for cell in cells(results):
        task, optimizer, part = cell.key
        style: Any = {"color": f"C{names.index(task)}", "ls": "-" if part == "full" else ":"}
        gains = [_points(cell.plain, rows) for rows in cell.constant.values()]
        label = None if task in drawn else task
        left.plot([0, *cell.constant], [0, *gains], marker=".", label=label, **style)
        place = float(np.mean(cell.tuned["late"])), _points(cell.plain, cell.tuned)
        left.plot(*place, "*", ms=11, mec="k", mew=0.6, color=style["color"])
        drawn.add(task)
        where = {"task": task, "optimizer": optimizer}
        plain = select(table, role="plain, search", **where)
        tried = runs.by(select(table, role="search", part=part, **where), "gamma")
        gains = [_points(plain, rows) for rows in tried.values()]
        right.plot(list(tried), gains, marker=".", **style)
    for axis in (left, right):
        axis.axhline(0, color="k", lw=0.6)
    left.set(xlabel="strength $r$ of relative_gradreg", ylabel="gain in test accuracy (points)")
    left.set(ylim=(-12, None), title="relative strength (stars: self-tuned)")
    right.set(xscale="log", xlabel="coefficient $\\gamma$ of fd_gradreg ($\\epsilon = \\gamma$)")
    right.set(title="coefficient: the best value depends on the task")
    left.legend(frameon=False, fontsize=8)
    return plots.save(made, output / "strength", formats)


def _points(plain: Columns, rows: Columns) -> float:
    return statistics.paired(_score(rows, "accuracy"), _score(plain, "accuracy")).mean
