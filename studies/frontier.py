r"""Lazy penalties: accuracy against the cost of a step.

F-GR costs two gradients per step. On a fraction f of the batch, every k-th step with k times gamma,
it costs 1 + 2f/k gradients (1 + 1/k for f = 1). For each cell (f, k), gamma is searched on tuning
seeds, and also computed by a rule: the gamma of the full penalty times
:func:`gradreg_optax.curvature.penalty_scale`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax import curvature, fd_gradreg
from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.data import Array
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import (
    METHODS,
    Method,
    OptimizerName,
    Problem,
    Recipe,
    Trainer,
    problem,
)
from studies.comparison import tagged
from studies.warmup import warmed_up

LEARNING_RATES: dict[str, float] = {"sgd": 0.2, "momentum": 0.02, "adam": 0.002}
_PROBES = 16  # number of batches for a mean gradient norm or eigenvalue
_PROBE_SEEDS = 4
_PROBE_TIMES = 6  # number of measurements during training
_PLAIN, _TWICE = Method("plain", None), Method("plain, twice the steps", None)
_CELL = ("method", "fraction", "interval", "choice", "gamma")
_SEARCHED = ("fraction", "interval", "gamma")
_FULL: dict[str, Any] = {"method": "F-GR", "fraction": 1.0, "interval": 1, "choice": "search"}


@dataclasses.dataclass(frozen=True)
class Config(common.Training):
    """Settings of ``python -m studies frontier``."""

    output: Path = Path("results/frontier")
    dataset: str = "digits"
    """digits, mnist1d, or the path of an .npz file, see gradreg sweep."""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "momentum", "adam")
    """Optimizers; each is compared with itself."""
    gammas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    """Candidate values of gamma, for every cell and for DB."""
    epsilon: float = 3.0
    """Ascent step."""
    fractions: tuple[float, ...] = (1.0, 0.25)
    """Fractions f of the batch for the penalty; each is 1 divided by an integer."""
    intervals: tuple[int, ...] = (1, 4, 8)
    """Intervals k: the penalty is applied every k-th step."""
    report_seeds: int = 10
    """Number of evaluation seeds; the tuning seeds follow them."""
    choose_seeds: int = 10
    """Number of tuning seeds, for gamma."""
    warmup: bool = True
    """Compare schedules of the penalty during a learning-rate warm-up, with Adam."""

    def __post_init__(self) -> None:
        """Check the cells as well."""
        common.at_least(self, 2, "report_seeds", "choose_seeds")  # a standard error needs two
        super().__post_init__()
        common.at_least(self, 0, "gammas")
        common.above_zero(self, "epsilon", "fractions")
        if not self.optimizers or max(self.fractions) > 1:
            raise CommandError("optimizers must not be empty, and fractions must be at most 1.")
        if self.fractions[:1] != (1.0,) or self.intervals[:1] != (1,):
            raise CommandError(
                "fractions and intervals must begin with 1: all cells are compared with the full"
                " penalty."
            )


def run(config: Config) -> dict[str, Any]:
    """Train every cell with every gamma on the tuning seeds, and with the best on the others.

    Returns:
      The settings, and tables with one row per entry: "cells", runs on the evaluation seeds;
      "search", the mean accuracy on the tuning seeds for each fraction, interval and gamma;
      "probes", measurements for the rule; and "warmup", runs with Adam and a schedule of the
      penalty.

    Raises:
      CommandError: settings that do not fit the data.
    """
    dataset = data.load(config.dataset)
    seeds = config.seed + np.arange(config.report_seeds + config.choose_seeds)
    report, choose = seeds[: config.report_seeds], seeds[config.report_seeds :]
    study = _Study(config, dataset, runs.Store(config.output), report.tolist(), choose.tolist())
    found = [study.cells(optimizer) for optimizer in config.optimizers]
    made = {name: runs.stack(*(one[name] for one in found)) for name in found[0]}
    if config.warmup and "adam" in config.optimizers:
        gamma = select(made["cells"], optimizer="adam", **_FULL)["gamma"][0]
        made["warmup"] = study.warmups(float(gamma))
    rates = {name: LEARNING_RATES[name] for name in config.optimizers}
    chosen = {"dataset": config.dataset, "epsilon": config.epsilon, "learning_rates": rates}
    return chosen | {"seeds": {"choose": choose, "report": report}} | made


@dataclasses.dataclass(frozen=True)
class _Study:
    """Data and seeds of the cells of all optimizers."""

    config: Config
    dataset: data.Dataset
    store: runs.Store
    report: list[int]
    choose: list[int]

    def cells(self, optimizer: OptimizerName) -> dict[str, Columns]:
        """Return the tables of one optimizer."""
        config, recipe = self.config, _recipe(self.config, optimizer)
        parts = {f: dataclasses.replace(recipe, penalty_fraction=f) for f in config.fractions}
        lazy: dict[str, Any] = {"gamma": config.gammas, "epsilon": config.epsilon}
        lazy["interval"] = config.intervals
        grid = functools.partial(runs.grid, METHODS["F-GR"])
        wanted = [one for f in parts for one in grid(parts[f], lazy, self.choose, fraction=f)]
        search = _search(self._train(wanted, "search"))
        full = _best(search, 1.0, 1)
        probes = self._probes(recipe, full)
        scales = dict(zip(config.fractions, _scales(probes, config.fractions), strict=True))
        exact = self._train(runs.grid(METHODS["DB"], recipe, lazy, self.choose), "search")
        gammas = runs.by(exact, "gamma")
        gamma = max(gammas, key=lambda gamma: _score(gammas[gamma]))
        twice = dataclasses.replace(recipe, steps=2 * config.steps)
        wanted = runs.grid(_PLAIN, recipe, {}, self.report, flops=1.0)
        wanted += runs.grid(_TWICE, twice, {}, self.report, flops=2.0, gradients=2.0)
        values = {"gamma": gamma}
        full_product = runs.grid(METHODS["DB"], recipe, values, self.report, choice="search")
        wanted += self._with_flops(full_product)
        for fraction, choice in itertools.product(config.fractions, ("search", "rule")):
            for interval in config.intervals:
                by_rule = float(f"{full * scales[fraction]:.2g}")
                gamma = by_rule if choice == "rule" else _best(search, fraction, interval)
                one = lazy | {"gamma": gamma, "interval": interval}
                tags = {"fraction": fraction, "choice": choice}
                wanted += self._with_flops(grid(parts[fraction], one, self.report, **tags))
        found = {"cells": self._train(wanted, "cells"), "search": search, "probes": probes}
        return {name: tagged(table, optimizer=optimizer) for name, table in found.items()}

    def _train(self, wanted: list[runs.Run], what: str) -> Columns:
        return runs.train(self.dataset, wanted, self.store, what=what)

    def _with_flops(self, wanted: list[runs.Run]) -> list[runs.Run]:
        """Return runs of one setting with the FLOPs of a step as a column."""
        flops = runs.flops(self.dataset, wanted[0], self.store)
        return [run._replace(tags={**run.tags, "flops": flops}) for run in wanted]

    def _probes(self, recipe: Recipe, gamma: float) -> Columns:
        """Return the measurements for the rule, along the training with the full penalty."""
        config, seeds = self.config, self.choose[:_PROBE_SEEDS]
        what = {"recipe": recipe.describe(), "gamma": gamma, "epsilon": config.epsilon}
        what |= {"seeds": seeds, "fractions": config.fractions}
        what["data"] = runs.fingerprint(self.dataset)
        return self.store.keep("probes", what, lambda: _probe(self, recipe, gamma, seeds))

    def warmups(self, gamma: float) -> Columns:
        """Train with Adam, a warm-up over a tenth of the steps, and schedules of the penalty."""
        steps = self.config.steps // 10
        recipe = warmed_up(_recipe(self.config, "adam"), steps)
        values = {"gamma": gamma, "epsilon": self.config.epsilon}
        tags, wanted = {"warmup_steps": steps, "penalty": gamma}, []
        for method in starts(steps):
            wanted += runs.grid(method, recipe, values, self.report, **tags)
        return self._train(wanted, "warmup")


def _recipe(config: Config, optimizer: OptimizerName) -> Recipe:
    rate = LEARNING_RATES[optimizer]
    return Recipe(**config.sizes(config.dataset), optimizer=optimizer, learning_rate=rate)


def _search(tried: Columns) -> Columns:
    """Return the mean accuracies over seeds; a diverged run counts as zero."""
    found = [
        dict(zip(_SEARCHED, key, strict=True)) | {"accuracy": _score(rows)}
        for key, rows in runs.groups(tried, *_SEARCHED)
    ]
    found.sort(key=lambda row: (-row["fraction"], row["interval"], row["gamma"]))
    return runs.columns(found)


def _score(rows: Columns) -> float:
    return float(np.mean(np.nan_to_num(rows["accuracy"])))


def _best(search: Columns, fraction: float, interval: int) -> float:
    rows = select(search, fraction=fraction, interval=interval)
    return float(rows["gamma"][np.argmax(rows["accuracy"])])


def _probe(study: _Study, recipe: Recipe, gamma: float, seeds: list[int]) -> Columns:
    """Average over batches and seeds, along the training with the full penalty.

    Returns:
      "step" and "fraction"; "norm", the mean squared gradient norm of fB samples; and "eigenvalue",
      the mean top Hessian eigenvalue of their loss.
    """
    config, task = study.config, problem(study.dataset, recipe)
    trainer = Trainer(study.dataset, METHODS["F-GR"], recipe)
    stride = max(1, config.steps // _PROBE_TIMES // 100) * 100
    split, rows = task.draw(seeds), []
    probe = jax.jit(
        lambda lanes: jax.lax.map(functools.partial(_probe_batches, task, config), lanes)
    )
    settings = {"gamma": gamma, "epsilon": config.epsilon, "interval": 1}
    for states in trainer.states(settings, seeds):
        step = int(states.step[0])
        if step % stride == 0:
            norms, tops = (np.mean(found, axis=0) for found in probe((states.params, split)))
            rows += [
                {"step": step, "fraction": fraction, "norm": norm, "eigenvalue": top}
                for fraction, norm, top in zip(config.fractions, norms, tops, strict=True)
            ]
    return runs.columns(rows)


def _probe_batches(
    task: Problem, config: Config, lane: tuple[PyTree, data.Split]
) -> tuple[jax.Array, jax.Array]:
    size, (params, split) = task.recipe.batch_size, lane

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.random.choice(key, split.train.shape[0], (size,), replace=False)
        batch = task.batch(task.pool, split, rows)
        norms, eigenvalues = [], []
        for fraction in config.fractions:
            part = tuple(x[: round(fraction * size)] for x in batch)
            value_fn = functools.partial(_value, task, part)
            scale = curvature.penalty_scale(task.loss, params, batch, penalty_fraction=fraction)
            top = curvature.top_hessian_eigenvalue(value_fn, params, key, num_matvecs=12)
            norms.append(scale.part)
            eigenvalues.append(top.value)
        return jnp.stack(norms), jnp.stack(eigenvalues)

    norms, eigenvalues = jax.lax.map(one, jax.random.split(jax.random.key(0), _PROBES))
    return jnp.mean(norms, axis=0), jnp.mean(eigenvalues, axis=0)


def _value(task: Problem, batch: Any, params: PyTree) -> jax.Array:
    return task.loss(params, batch)


def _over_training(probes: Columns, name: str, fractions: Any) -> Array:
    """Return the mean of a measurement over the training, for each fraction."""
    return np.array([np.mean(select(probes, fraction=f)[name]) for f in fractions])


def _scales(probes: Columns, fractions: Any) -> Array:
    """Return the factor on gamma for each fraction: the ratio of the mean squared norms."""
    norm = _over_training(probes, "norm", fractions)
    return np.asarray(norm[0] / norm)


def starts(steps: int) -> list[Method]:
    """Return F-GR with schedules of gamma or epsilon over the ``steps`` of the warm-up."""

    def rises(value: Any) -> Any:
        return lambda step: value * jnp.minimum((step + 1) / steps, 1)

    def switched_on(value: Any) -> Any:
        return lambda step: jnp.where(step < steps, 0.0, value)

    schedules: dict[str, Callable[..., Any]] = {
        "gamma from the start": fd_gradreg,
        "gamma rises": lambda gamma, epsilon: fd_gradreg(gamma=rises(gamma), epsilon=epsilon),
        "gamma switched on": lambda gamma, epsilon: fd_gradreg(
            gamma=switched_on(gamma), epsilon=epsilon
        ),
        "epsilon rises": lambda gamma, epsilon: fd_gradreg(gamma=gamma, epsilon=rises(epsilon)),
    }
    made = [Method(name, make, ("gamma", "epsilon"), 2) for name, make in schedules.items()]
    return [Method("no penalty", None), *made]


def table(results: dict[str, Any]) -> Report:
    """Return the cells of each optimizer: cost, accuracy, and gain relative to the full penalty."""
    lines: list[Table | str] = []
    for (name,), cells in runs.groups(results["cells"], "optimizer"):
        full, plain = select(cells, **_FULL), select(cells, method="plain")
        shown = [rows for key, rows in runs.groups(cells, *_CELL) if key[1:4] != (1.0, 1, "rule")]
        lines.append(f"{name}, learning rate {results['learning_rates'][name]:g}")
        lines.append(Table("", _HEAD, [_row(rows, full, plain) for rows in shown]))
        lines += ["", *_rule_lines(results, name), "", *_search_lines(results, name), ""]
    if "warmup" in results:
        lines += _warmup_lines(results["warmup"])
    report, choose = (len(results["seeds"][name]) for name in ("report", "choose"))
    lines += [
        f"{results['dataset']}: means ± standard errors over {report} evaluation seeds; gamma tuned"
        f" on {choose} other seeds.",
        "p: paired t-test against the full penalty (f = 1, k = 1, by search); below: worse by more"
        " than one standard error.",
        "Gradients and FLOPs per step, relative to the plain optimizer.",
    ]
    return Report(*lines)


_HEAD = ["method", "f", "k", "gamma", "by", "gradients", "FLOPs", "test accuracy (%)"]
_HEAD += ["minus full F-GR", "p", "", "relative gain"]


def _row(cell: Columns, full: Columns, plain: Columns) -> list[Any]:
    method, fraction, interval, choice, gamma = (cell[name][0] for name in _CELL)
    found: list[Any] = [method]
    found += [f"{fraction:g}", f"{interval:g}"] if method == "F-GR" else ["", ""]
    found += [f"{gamma:g}" if choice else "", choice]
    found += [report.gradients(cell), f"{cell['flops'][0]:.2f}"]
    found.append(report.percent(spec=".2f")(cell))
    if (method, fraction, interval, choice) == tuple(_FULL.values()):
        return [*found, "", "", "", ""]
    difference = statistics.points(cell, full)
    mark, kept = "" if keeps_up(cell, full) else "below", relative_gain(cell, full, plain)
    found += [f"{difference:+.2f}", Number(difference.p, ".1g"), mark]
    return [*found, "" if np.isnan(kept) else f"{kept:.0%}"]


def keeps_up(cell: Columns, full: Columns) -> bool:
    """Return whether a cell is at most one standard error below the full penalty.

    The error is that of the paired difference. The value is False if a run diverged.
    """
    difference = statistics.paired(cell["accuracy"], full["accuracy"])
    return bool(np.all(np.isfinite(cell["accuracy"]))) and difference.mean >= -difference.error


def relative_gain(cell: Columns, full: Columns, plain: Columns) -> float:
    """Return the gain in accuracy of a cell, relative to that of the full penalty.

    The value is NaN if the full penalty has no gain.
    """
    accuracy, most, least = map(_score, (cell, full, plain))
    return (accuracy - least) / (most - least) if most != least else float("nan")


def searched(results: dict[str, Any], optimizer: str) -> tuple[dict[str, Array], Array]:
    """Return the axes "fraction", "interval" and "gamma" of a search, and its mean accuracies."""
    found = runs.blocks(select(results["search"], optimizer=optimizer), *_SEARCHED)
    return {name: found[name] for name in _SEARCHED}, found["accuracy"]


def kappa(results: dict[str, Any], optimizer: str = "sgd") -> Array:
    r"""Return :math:`\kappa = \eta\lambda(1 + k\gamma\lambda)` of penalised SGD steps.

    Such a step multiplies the distance to the minimum in the sharpest direction by
    :math:`1 - \kappa`; beyond 2 it overshoots.

    Args:
      results: of :func:`run`.
      optimizer: an optimizer of the results; the formula is that of SGD.

    Returns:
      An array of the shape of :func:`searched`.
    """
    axes, _ = searched(results, optimizer)
    probes = select(results["probes"], optimizer=optimizer)
    top = _over_training(probes, "eigenvalue", axes["fraction"])[:, None, None]
    rate = results["learning_rates"][optimizer]
    product: Array = rate * top * (1 + axes["interval"][:, None] * axes["gamma"] * top)
    return product


def _rule_lines(results: dict[str, Any], optimizer: str) -> list[str]:
    """Return the factor on gamma by the rule, at the start and over the training."""
    probes, search = (select(results[name], optimizer=optimizer) for name in ("probes", "search"))
    fractions, start = searched(results, optimizer)[0]["fraction"], select(probes, step=0)
    late, early = _scales(probes, fractions), _scales(start, fractions)
    return [
        f"factor on gamma for f = {f:g}: {early[i]:.2f} at the start, {late[i]:.2f} over the"
        f" training; by search {_best(search, f, 1) / _best(search, 1.0, 1):.2f}"
        for i, f in enumerate(fractions)
        if f < 1
    ]


def _search_lines(results: dict[str, Any], optimizer: str) -> list[Table | str]:
    """Return the mean accuracies on the tuning seeds; with SGD also kappa."""
    (axes, accuracy), kappas = searched(results, optimizer), kappa(results, optimizer)
    known, rows = optimizer == "sgd", []
    for i, j in np.ndindex(accuracy.shape[:2]):
        pairs = zip(accuracy[i, j], kappas[i, j], strict=True)
        cells = [f"{100 * a:.1f}" + (f" ({b:.1f})" if known else "") for a, b in pairs]
        rows.append([f"{axes['fraction'][i]:g}", f"{axes['interval'][j]:g}", *cells])
    title = "test accuracy (%) on the tuning seeds"
    head = ["f", "k", *(f"gamma {gamma:g}" for gamma in axes["gamma"])]
    end = ", and κ = ηλ(1 + kγλ) in brackets" if known else ""
    return [title + end, Table("", head, rows, left=0)]


def _warmup_lines(warmup: Columns) -> list[Table | str]:
    found, rows = runs.by(warmup, "method"), []
    for start, of_start in found.items():
        minus = statistics.points(of_start, found["gamma from the start"])
        compared: list[Any] = [f"{minus:+.2f}", Number(minus.p, ".1g")]
        compared = ["", ""] if start == "gamma from the start" else compared
        rows.append([start, report.percent(spec=".2f")(of_start), *compared])
    title = f"adam, learning rate warmed up over {warmup['warmup_steps'][0]:g} steps"
    head = ["schedule", "test accuracy (%)", "minus gamma from the start", "p"]
    return [f"{title}, F-GR with gamma {warmup['penalty'][0]:g}", Table("", head, rows), ""]


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw accuracy against the cost of a step; diamonds are cells with gamma by the rule."""
    found = list(runs.groups(results["cells"], "optimizer"))
    made, axes = plots.figure(len(found), width=4.4, height=3.9)
    for axis, ((name,), cells) in zip(axes, found, strict=True):
        for _, cell in runs.groups(cells, *_CELL):
            _draw(axis, cell)
        searched = select(cells, method="F-GR", choice="search")
        for fraction, line in runs.by(searched, "fraction").items():
            costs = runs.by(line, "gradients")
            means = [100 * statistics.estimate(rows["accuracy"]).mean for rows in costs.values()]
            style: Any = {"color": _color("F-GR", fraction), "label": f"F-GR, f = {fraction:g}"}
            axis.plot(list(costs), means, "-", lw=1, zorder=0, **style)
        axis.set(xlabel="cost per step (gradient evaluations)", title=name, xlim=(0.8, 3.3))
        axis.margins(y=0.15)
        rule: Any = {"mec": "0.4", "mfc": "white", "label": "γ by the rule instead of a search"}
        axis.plot([], [], "D", ms=5, **rule)
        axis.legend(loc="center right", frameon=False, fontsize=8)
    axes[0].set_ylabel("test accuracy (%)")
    return plots.save(made, output / "frontier", formats)


def _color(method: str, fraction: float) -> str:
    return "#e377c2" if fraction < 1 else plots.COLORS.get(method, plots.COLORS["SGD"])


def _draw(axis: Any, cell: Columns) -> None:
    method, fraction, interval, choice, _ = (cell[name][0] for name in _CELL)
    lazy, by_rule, cost = method == "F-GR", choice == "rule", cell["gradients"][0]
    if by_rule and fraction == 1:
        return
    color = _color(method, fraction)
    style: Any = {"fmt": "D", "alpha": 0.6, "markerfacecolor": "white"} if by_rule else {}
    mean = plots.mean(axis, cost, 100 * cell["accuracy"], method, ms=5, color=color, **style)
    if not by_rule:
        place = ((-4, -22) if fraction < 1 else (-4, 16)) if lazy else (6, -11)
        text: Any = {"fontsize": 7, "color": color, "rotation": 60 if lazy else 0}
        plots.note(axis, f"k={interval:g}" if lazy else method, (cost, mean), place, **text)
