"""No search: the penalty's share of the step instead of its coefficient, chosen once or found on
held-out samples, on many tasks beside a coefficient that was searched on each.

Every task trains plainly, with each strength of ``relative_gradreg``, with a strength that tunes
itself, and with the coefficient that was best on other seeds; on the whole batch in every step, and
on a quarter of it in every fourth.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import fd_gradreg
from gradreg_optax.experiments import common, data, plots, runs, statistics
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import (
    METHODS,
    SELF_TUNED,
    Array,
    Method,
    Recipe,
    Trainer,
    problem,
)
from studies import corpus

PARTS = {"full": (1.0, 1), "lazy": (0.25, 4)}  # share of the batch, interval
LEARNING_RATES = {"sgd": 0.2, "momentum": 0.02, "adam": 2e-3, "adamw": 2e-3}
_WINDOW = 32  # bytes of text in a sample
_CELL = ("task", "optimizer", "part")
_HEAD = ["task", "optimizer", "part", "plain"]
_WORTH = {"accuracy": 1.0, "test_loss": 0.02}  # from here on a gain is one to be kept


def _tied(gamma: Any, interval: Any) -> optax.GradientTransformation:
    return fd_gradreg(gamma=gamma, epsilon=gamma, interval=interval)


_SEARCHED = Method("searched gamma", _tied, ("gamma",), 2)


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
      dataset: its name; "text" for source code.
      recipe: what differs from the usual recipe.
      optimizers: the optimizers to train with.
      metric: what counts, "accuracy" or "test_loss".
      dear: a run takes so long that three seeds, and one to search on, have to do.
    """

    dataset: str
    recipe: Mapping[str, Any]
    optimizers: tuple[str, ...] = ("sgd",)
    metric: str = "accuracy"
    dear: bool = False


_DIGITS = {"train_size": 360, "held_out": 60}
_FASHION = {"train_size": 1200, "held_out": 200, "test_size": 4000}
_TEXT: dict[str, Any] = {"warmup_steps": 100, "batch_size": 8, "label_noise": 0.0}
TASKS = {
    "digits, 30% wrong": Task("digits", _DIGITS, ("sgd", "momentum", "adam")),
    "digits": Task("digits", _DIGITS | {"label_noise": 0.0}, ("sgd", "momentum", "adam")),
    "digits, 30% wrong, CNN": Task(
        "digits", _DIGITS | {"model": "cnn", "width": 8, "steps": 1500}, dear=True
    ),
    "MNIST-1D": Task("mnist1d", {"train_size": 4000, "held_out": 400, "label_noise": 0.0}),
    "Fashion-MNIST, 20% wrong": Task("fashion-mnist", _FASHION | {"label_noise": 0.2}),
    "Fashion-MNIST": Task("fashion-mnist", _FASHION | {"label_noise": 0.0}),
    "text, learnt by heart": Task(
        "text",
        _TEXT | {"train_size": 360, "held_out": 60, "steps": 1000},
        ("adamw",),
        "test_loss",
        dear=True,
    ),
    "text, still learning": Task(
        "text",
        _TEXT | {"train_size": 6600, "held_out": 600, "steps": 1200},
        ("adamw",),
        "test_loss",
        dear=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies strength``."""

    output: Path = Path("results/strength")
    seeds: int = 5
    """Number of seeds that are reported, of networks that take long at most 3; everything is paired
    by seed."""
    choose_seeds: int = 2
    """Number of further seeds that the coefficient is searched on; of networks that take long 1."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the step."""
    gammas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Coefficients to search, each with the ascent step of the same length."""
    steps: int | None = None
    """Training steps; by default those of each task."""
    data_dir: Path | None = None
    """Folder with the files of fashion-mnist; see gradreg sweep."""

    def __post_init__(self) -> None:
        """Checks the numbers and the names."""
        common.at_least(self, 2, "seeds")
        super().__post_init__()
        common.above_zero(self, "strengths", "gammas")
        common.some_of("tasks", map(repr, self.tasks), map(repr, TASKS))


def run(config: Config) -> dict[str, Any]:
    """Trains every task in every way.

    Args:
      config: the settings.

    Returns:
      "metrics", what counts in each task; "runs", one row a run: its "task", "optimizer", "part"
      ("full" or "lazy"; "" without a penalty) and "role": "plain"; "plain, all" where it trains on
      the held-out samples as well; "strength"; "search", on seeds of their own, with the plain runs
      of these as "plain, search"; "searched"; and "self-tuned".

    Raises:
      CommandError: data that are not there.
    """
    store, found = runs.Store(config.output), []
    for name in config.tasks:
        task = TASKS[name]
        dataset = _dataset(task, config)
        for optimizer in task.optimizers:
            lab = _Lab(config, dataset, store, _recipe(task, dataset, optimizer, config), task)
            found.append(runs.tagged(lab.race(), task=name, optimizer=optimizer))
    metrics = {name: TASKS[name].metric for name in config.tasks}
    return {"metrics": metrics, "runs": runs.stack(*found)}


def _dataset(task: Task, config: Config) -> data.Dataset:
    if task.dataset == "text":
        return corpus.source_code(_WINDOW)
    return data.load(task.dataset, config.data_dir)


def _recipe(task: Task, dataset: data.Dataset, optimizer: str, config: Config) -> Recipe:
    rate = LEARNING_RATES[optimizer]
    given: dict[str, Any] = {"learning_rate": rate, "optimizer": optimizer, "eigenvalue": False}
    given |= task.recipe
    if dataset.tokens:
        given["model"] = corpus.transformer(dataset.classes, *dataset.shape)
    if config.steps is not None:
        given |= {"steps": config.steps, "warmup_steps": 0}
    return Recipe(**given)


@dataclasses.dataclass(frozen=True)
class _Lab:
    """What the runs of a task with one optimizer share."""

    config: Config
    dataset: data.Dataset
    store: runs.Store
    recipe: Recipe
    task: Task

    def race(self) -> Columns:
        """All runs."""
        config, most = self.config, (3, 1) if self.task.dear else (None, None)
        last = config.seed + config.seeds
        report = range(config.seed, last)[: most[0]]
        choose = range(last, last + config.choose_seeds)[: most[1]]
        everything = dataclasses.replace(self.recipe, held_out=0)
        plain, none = METHODS["SGD"], {"part": ""}
        wanted = runs.grid(plain, everything, {}, report, role="plain, all", **none)
        wanted += runs.grid(plain, self.recipe, {}, choose, role="plain, search", **none)
        watched = self._watched(plain, self.recipe, 1, report)
        found = [self._train(wanted), runs.tagged(watched, role="plain", **none)]
        for part, (fraction, interval) in PARTS.items():
            recipe = dataclasses.replace(self.recipe, penalty_fraction=fraction)
            grid = functools.partial(runs.grid, recipe=recipe, part=part)
            values: dict[str, Any] = {"strength": config.strengths, "gamma": config.gammas}
            values["interval"] = interval
            tried = self._train(grid(_SEARCHED, values=values, seeds=choose, role="search"))
            values["gamma"] = _best(tried, self.task.metric)
            wanted = grid(_SEARCHED, values=values, seeds=report, role="searched")
            wanted += grid(METHODS["relative"], values=values, seeds=report, role="strength")
            tuned = self._watched(SELF_TUNED, recipe, interval, report)
            found += [tried, self._train(wanted), runs.tagged(tuned, role="self-tuned", part=part)]
        return runs.stack(*found)

    def _train(self, wanted: list[runs.Run]) -> Columns:
        return runs.train(self.dataset, wanted, self.store, what="strength")

    def _watched(self, method: Method, recipe: Recipe, interval: int, seeds: Any) -> Columns:
        """Runs that are looked at along the training as well."""
        what = {"recipe": recipe.describe(), "interval": interval, "seeds": list(seeds)}
        what["data"] = runs.fingerprint(self.dataset)
        make = functools.partial(self._watch, method, recipe, interval, list(seeds))
        made = self.store.keep(f"along-{method.label}", what, make)
        cost = method.cost(recipe.penalty_fraction, interval)
        return runs.tagged(made, method=method.label, gradients=cost)

    def _watch(self, method: Method, recipe: Recipe, interval: int, seeds: list[int]) -> Columns:
        trainer, task = Trainer(self.dataset, method, recipe), problem(self.dataset, recipe)
        split, lanes = task.draw(seeds), jnp.asarray(seeds, jnp.uint32)
        measure = functools.partial(task.measure, seeds=lanes, split=split)
        shares, losses, steps = [], [], recipe.steps
        settings = {} if method.make is None else {"interval": interval}
        with common.progress(len(seeds) * steps, "strength", "step") as bar:
            for states in trainer.states(settings, seeds, bar.update):
                share = optax.tree.get(states.opt_state, "strength", jnp.nan)
                shares.append(np.broadcast_to(np.asarray(share), len(seeds)))
                if self.task.metric == "test_loss":
                    losses.append(measure(states.params)["test_loss"])
        along = np.array(shares)
        early = along[1 : max(2, len(along) // 6 + 1)]
        found = {"seed": np.array(seeds), "early": early.mean(axis=0), "late": along[-1]}
        if losses:
            found["best_loss"] = np.nanmin(losses, axis=0)
        return found | measure(states.params)


def _best(tried: Columns, metric: str) -> float:
    """The coefficient with the best mean; a diverged run is the worst of all."""
    found = runs.by(tried, "gamma")
    return float(max(found, key=lambda gamma: np.mean(_score(found[gamma], metric))))


def _score(rows: Columns, metric: str) -> Array:
    """What counts, larger is better: accuracy in percent, or minus the loss."""
    if metric == "accuracy":
        return 100 * np.nan_to_num(rows["accuracy"])
    return -np.nan_to_num(rows["test_loss"], nan=20.0)


# Table and figure.


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task with one optimizer, with the penalty on the whole batch or lazy.

    Attributes:
      key: task, optimizer, part.
      metric: what counts.
      plain: the plain runs.
      everything: plain runs on the held-out samples as well.
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

    def gain(self, rows: Columns, over: Columns | None = None) -> statistics.Difference:
        """The paired difference to plain training; larger is better."""
        less = self.plain if over is None else over
        return statistics.paired(_score(rows, self.metric), _score(less, self.metric))

    @property
    def best(self) -> float:
        """The best strength, in hindsight."""
        return max(self.constant, key=lambda strength: self.gain(self.constant[strength]).mean)

    @property
    def kept(self) -> float:
        """How much of the best strength's gain self-tuning keeps; NaN where there is none."""
        most = self.gain(self.constant[self.best]).mean
        return self.gain(self.tuned).mean / most if most >= _WORTH[self.metric] else np.nan


def cells(results: dict[str, Any]) -> Iterator[Cell]:
    """The cells of the table."""
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
    """The tasks as text: plain training, and paired differences to it with standard errors."""
    found, lines = list(cells(results)), list[Table | str]()
    strengths = list(found[0].constant)
    titles = {
        "accuracy": "test accuracy in %, and differences to plain training in points",
        "test_loss": "test loss in nats, and by how much it is lower than in plain training",
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
        f"means over {seeds[0]} seeds ± standard error; gamma (= epsilon) searched on {seeds[1]}"
        f" others; p: paired t-test of self-tuned against plain; kept: of"
        " the gain of the best r in hindsight, where that gains a point (.02 nats); plain on all:"
        " plain training that has the held-out samples as well. Gradients per step of self-tuned: "
        + ", ".join(f"{part} {value:.2f}" for part, value in cost.items())
        + "."
    )
    return Report(*lines)


def _row(cell: Cell) -> list[str]:
    spec, sign = (".1f", 1) if cell.metric == "accuracy" else (".3f", -1)
    level = statistics.estimate(sign * _score(cell.plain, cell.metric))
    tuned = cell.gain(cell.tuned)
    cells = [*cell.key, f"{level:{spec}}", f"{cell.searched['gamma'][0]:g}"]
    constant = [cell.gain(rows) for rows in (cell.searched, *cell.constant.values())]
    cells += [f"{gain:+{spec}}" for gain in (*constant, tuned)]
    cells += [tuned.p_text, "" if np.isnan(cell.kept) else f"{100 * cell.kept:.0f}%"]
    cells.append(", ".join(f"{np.mean(cell.tuned[name]):.2f}" for name in ("early", "late")))
    return [*cells, f"{cell.gain(cell.tuned, cell.everything):+{spec}}"]


def _stopping(found: list[Cell]) -> list[str]:
    """Against plain training that stops where the test loss is lowest."""
    lines = []
    for cell in found:
        if "best_loss" in cell.plain and cell.metric == "test_loss":
            gain = statistics.paired(cell.plain["best_loss"], cell.tuned["test_loss"])
            name = ", ".join((cell.key[0], cell.key[2]))
            lines.append(f"{name}: self-tuned ends {gain:+.3f} nats better than plain at its best")
    return [*lines, ""] if lines else []


def _verdicts(found: list[Cell]) -> list[str]:
    """Where the claims do not hold."""

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
    """Draws strength.png: the gain in accuracy of every cell against the strength, and against the
    coefficient.
    """
    made, (left, right) = plots.figure(2, width=6.0, height=4.6, sharey=True)
    table, names = results["runs"], list(results["metrics"])
    drawn: set[str] = set()
    for cell in cells(results):
        task, optimizer, part = cell.key
        look: Any = {"color": f"C{names.index(task)}", "ls": "-" if part == "full" else ":"}
        gains = [_points(cell.plain, rows) for rows in cell.constant.values()]
        label = None if task in drawn else task
        left.plot([0, *cell.constant], [0, *gains], marker=".", label=label, **look)
        place = float(np.mean(cell.tuned["late"])), _points(cell.plain, cell.tuned)
        left.plot(*place, "*", ms=11, mec="k", mew=0.6, color=look["color"])
        drawn.add(task)
        where = {"task": task, "optimizer": optimizer}
        plain = select(table, role="plain, search", **where)
        tried = runs.by(select(table, role="search", part=part, **where), "gamma")
        gains = [_points(plain, rows) for rows in tried.values()]
        right.plot(list(tried), gains, marker=".", **look)
    for axis in (left, right):
        axis.axhline(0, color="k", lw=0.6)
    left.set(xlabel="strength $r$ of relative_gradreg", ylabel="gain in test accuracy, points")
    left.set(ylim=(-12, None), title="the strength has no unit (stars: tuned by itself)")
    right.set(xscale="log", xlabel="coefficient $\\gamma$ of fd_gradreg ($\\epsilon = \\gamma$)")
    right.set(title="the coefficient has: another for every task, and a cliff")
    left.legend(frameon=False, fontsize=8)
    return plots.save(made, output / "strength", formats)


def _points(plain: Columns, rows: Columns) -> float:
    return statistics.paired(_score(rows, "accuracy"), _score(plain, "accuracy")).mean
