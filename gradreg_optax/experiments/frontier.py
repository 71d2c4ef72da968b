r"""The penalty at the price of SGD: accuracy against the cost of a step, with lazy and sub-batch
penalties.

F-GR costs two gradients a step. Applied on every k-th step with gamma times k, and on a fraction f
of the batch with that part's own gradient, it costs 1 + 2f/k (1 + 1/k for f = 1). Gamma is chosen
on one set of seeds and reported on another, for each cell (f, k) by search, and once more by rule:
the gamma of the full penalty times :func:`gradreg_optax.curvature.penalty_scale`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gradreg_optax import curvature, fd_gradreg
from gradreg_optax._typing import PyTree
from gradreg_optax.experiments import data, plots, statistics
from gradreg_optax.experiments.parts import Parts
from gradreg_optax.experiments.statistics import Array
from gradreg_optax.experiments.training import (
    METHODS,
    Method,
    OptimizerName,
    Problem,
    Recipe,
    Settings,
    Trainer,
    problem,
)

LEARNING_RATES: dict[str, float] = {"sgd": 0.2, "momentum": 0.02, "adam": 0.002}
_METRICS = ("accuracy", "train_loss", "eigenvalue", "diverged")
_PROBES = 16  # batches that a gradient norm or an eigenvalue is averaged over
_PROBE_SEEDS = 4
_PROBE_TIMES = 6  # how often along the training


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of ``gradreg frontier``."""

    output: Path = Path("results/frontier")
    """Folder for results.json and the figure; finished parts are kept in it, and a second start
    continues there."""
    dataset: str = "digits"
    """digits, fashion-mnist, mnist, cifar10, or the path of an .npz file."""
    data_dir: Path | None = None
    """Folder of the data set's files."""
    train_size: int | None = None
    """Number of training samples; by default 300 of digits, 1000 of the others."""
    test_size: int | None = None
    """Number of test samples; by default 1000 of digits, all of the others."""
    label_noise: float | None = None
    """Share of wrong training labels; by default 0.3 for digits, none for the others."""
    steps: int = 3000
    """Training steps."""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "momentum", "adam")
    """Optimizers, each of which is compared with itself."""
    gammas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    """Values of gamma to choose from, in every cell and for DB."""
    epsilon: float = 3.0
    """The ascent step."""
    fractions: tuple[float, ...] = (1.0, 0.25)
    """Fractions f of the batch that the penalty is taken on, each one over a whole number."""
    intervals: tuple[int, ...] = (1, 4, 8)
    """Intervals k: the penalty is applied on every k-th step."""
    seed: int = 0
    """The first seed of the report; the seeds that choose gamma follow after those of the
    report."""
    report_seeds: int = 10
    """Seeds that the accuracies are reported on."""
    choose_seeds: int = 10
    """Other seeds, that gamma is chosen on."""
    warmup: bool = True
    """With Adam among the optimizers: compare ways to start the penalty while the learning rate
    warms up."""
    redraw: bool = False
    """Draw the figure from the results on disk, without training."""

    def __post_init__(self) -> None:
        """Checks what the cells need."""
        if self.fractions[:1] != (1.0,) or self.intervals[:1] != (1,):
            raise ValueError(
                "fractions and intervals must begin with 1: the full penalty is what the others are"
                " compared with."
            )
        if min(self.report_seeds, self.choose_seeds) < 2:
            raise ValueError(
                "report_seeds and choose_seeds must be at least 2: a standard error needs two"
                " values."
            )


def run(config: Config) -> dict[str, Any]:
    """Trains every cell for every gamma on the choosing seeds, and the chosen ones on the reporting
    seeds.

    Args:
      config: the settings.

    Returns:
      "seeds", "dataset", "epsilon", "gammas", and "optimizers": for each a dict with "cells", a
      list of dicts (label, fraction, interval, choice, gamma, gradients and FLOPs per step relative
      to SGD, and the metrics, shape (report_seeds,)), "search", the mean accuracies on the choosing
      seeds, shape (fractions, intervals, gammas), and "probes", what the rule is made of; "warmup",
      likewise a list of cells.

    Raises:
      ValueError: settings that do not fit the data.
    """
    dataset = data.load(config.dataset, config.data_dir)
    seeds = config.seed + np.arange(config.report_seeds + config.choose_seeds)
    report, choose = seeds[: config.report_seeds], seeds[config.report_seeds :]
    with tqdm(total=_count(config), unit="part", desc="frontier") as bar:
        parts = Parts(config.output, dataset, bar.update)
        optimizers = {
            name: _Race(config, dataset, parts, name, report, choose).run()
            for name in config.optimizers
        }
        warmup = []
        if config.warmup and "adam" in config.optimizers:
            gamma = _cell(optimizers["adam"]["cells"], 1.0, 1)["gamma"]
            warmup = _warmups(config, dataset, parts, gamma, report)
    return {
        "dataset": config.dataset,
        "steps": config.steps,
        "seeds": {"choose": choose, "report": report},
        "epsilon": config.epsilon,
        "gammas": np.array(config.gammas),
        "fractions": np.array(config.fractions),
        "intervals": np.array(config.intervals),
        "optimizers": optimizers,
        "warmup": warmup,
    }


def gradients(fraction: float, interval: int) -> float:
    """Gradient evaluations per step of a forward difference on a fraction of the batch and on every
    ``interval``-th step.
    """
    return 1 + (2 * fraction if fraction < 1 else 1) / interval


def _train(
    parts: Parts, trainer: Trainer, recipe: Recipe, settings: Settings, seeds: Array
) -> dict[str, Array]:
    """The metrics of one call of a trainer."""
    what = {"recipe": dataclasses.asdict(recipe), "settings": dict(settings), "seeds": seeds}

    def make() -> dict[str, Array]:
        found = trainer(settings, seeds, progress=True)
        return {key: found[key].astype(float) for key in _METRICS}

    return parts.keep(trainer.method.label, what, make)


class _Race:
    """All cells of one optimizer."""

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        parts: Parts,
        optimizer: OptimizerName,
        report: Array,
        choose: Array,
    ) -> None:
        self.config, self.dataset, self.parts, self.report, self.choose = (
            config,
            dataset,
            parts,
            report,
            choose,
        )
        self.recipe = _recipe(config, optimizer)
        self.plain = self._trainer("SGD")
        self.plain_flops = self.plain.flops()

    def run(self) -> dict[str, Any]:
        config, label = self.config, self.recipe.optimizer
        cells = [_row("plain", self._train(self.plain, self.recipe, {}), gradients=1.0, flops=1.0)]
        longer = dataclasses.replace(self.recipe, steps=2 * config.steps)
        trained = self._train(Trainer(self.dataset, METHODS["SGD"], longer), longer, {})
        cells.append(_row("plain, twice the steps", trained, gradients=2.0, flops=2.0))
        cells.append(self._double_backpropagation())
        trainers = {
            fraction: self._trainer("F-GR", penalty_fraction=fraction)
            for fraction in config.fractions
        }
        search = np.stack(
            [self._search(trainer, fraction) for fraction, trainer in trainers.items()]
        )
        best = np.array(config.gammas)[np.argmax(search, axis=-1)]
        full = float(best[0, 0])
        probes = self._probes(trainers[1.0], full)
        scales = dict(zip(config.fractions, _scales(probes), strict=True))
        for row, (fraction, trainer) in enumerate(trainers.items()):
            cells += self._cells(trainer, fraction, "search", best[row])
            cells += self._cells(
                trainer,
                fraction,
                "rule",
                np.full(len(config.intervals), float(f"{full * scales[fraction]:.2g}")),
            )
        return {
            "optimizer": label,
            "learning_rate": self.recipe.learning_rate,
            "cells": cells,
            "search": search,
            "probes": probes,
        }

    def _trainer(self, label: str, **changes: Any) -> Trainer:
        return Trainer(self.dataset, METHODS[label], dataclasses.replace(self.recipe, **changes))

    def _train(
        self, trainer: Trainer, recipe: Recipe, settings: Settings, seeds: Array | None = None
    ) -> dict[str, Array]:
        """One run per setting and seed; the metrics have shape (settings, seeds), or (seeds,)
        without settings.
        """
        seeds = self.report if seeds is None else seeds
        count = len(next(iter(settings.values()))) if settings else 1
        lanes = {key: np.repeat(value, len(seeds)) for key, value in settings.items()}
        found = _train(self.parts, trainer, recipe, lanes, np.tile(seeds, count))
        return {
            key: value.reshape(count, len(seeds)) if settings else value
            for key, value in found.items()
        }

    def _double_backpropagation(self) -> dict[str, Any]:
        trainer = self._trainer("DB")
        accuracy = [
            self._train(trainer, self.recipe, {"gamma": [gamma]}, self.choose)["accuracy"][0]
            for gamma in self.config.gammas
        ]
        gamma = self.config.gammas[int(np.argmax(_score(np.stack(accuracy))))]
        found = self._train(trainer, self.recipe, {"gamma": [gamma]})
        metrics = {key: value[0] for key, value in found.items()}
        return _row(
            "DB",
            metrics,
            gradients=3.0,
            flops=trainer.flops() / self.plain_flops,
            choice="search",
            gamma=gamma,
        )

    def _search(self, trainer: Trainer, fraction: float) -> Array:
        """Mean accuracies on the choosing seeds, shape (intervals, gammas)."""
        found = [
            self._lazy(trainer, fraction, [gamma] * len(self.config.intervals), self.choose)
            for gamma in self.config.gammas
        ]
        return np.stack([_score(metrics["accuracy"]) for metrics in found], axis=-1)

    def _probes(self, trainer: Trainer, gamma: float) -> dict[str, Array]:
        """What the rule is made of, measured along the training with the full penalty."""
        seeds, recipe = self.choose[:_PROBE_SEEDS], dataclasses.asdict(self.recipe)
        what = {
            "recipe": recipe,
            "gamma": gamma,
            "epsilon": self.config.epsilon,
            "fractions": self.config.fractions,
        }
        return self.parts.keep(
            "probes",
            what | {"seeds": seeds},
            lambda: _probe(problem(self.dataset, self.recipe), trainer, gamma, self.config, seeds),
        )

    def _cells(
        self, trainer: Trainer, fraction: float, choice: str, gammas: Array
    ) -> list[dict[str, Any]]:
        """The cells of one fraction on the reporting seeds."""
        found, penalized = self._lazy(trainer, fraction, gammas, self.report), trainer.flops()
        cells = []
        for i, (interval, gamma) in enumerate(zip(self.config.intervals, gammas, strict=True)):
            flops = (penalized + (interval - 1) * self.plain_flops) / (interval * self.plain_flops)
            cost = {"gradients": gradients(fraction, interval), "flops": flops}
            metrics = {key: value[i] for key, value in found.items()}
            cells.append(
                _row(
                    "F-GR",
                    metrics,
                    **cost,
                    fraction=fraction,
                    interval=interval,
                    choice=choice,
                    gamma=float(gamma),
                )
            )
        return cells

    def _lazy(
        self, trainer: Trainer, fraction: float, gammas: Sequence[float] | Array, seeds: Array
    ) -> dict[str, Array]:
        intervals = self.config.intervals
        settings = {
            "gamma": gammas,
            "epsilon": [self.config.epsilon] * len(intervals),
            "interval": intervals,
        }
        return self._train(
            trainer, dataclasses.replace(self.recipe, penalty_fraction=fraction), settings, seeds
        )


def _recipe(config: Config, optimizer: OptimizerName) -> Recipe:
    digits = config.dataset == "digits"
    train_size = config.train_size or (300 if digits else 1000)
    test_size = config.test_size or (1000 if digits else None)
    noise = (0.3 if digits else 0.0) if config.label_noise is None else config.label_noise
    rate = LEARNING_RATES[optimizer]
    return Recipe(
        train_size=train_size,
        test_size=test_size,
        label_noise=noise,
        steps=config.steps,
        optimizer=optimizer,
        learning_rate=rate,
    )


def _row(label: str, metrics: dict[str, Array], **what: Any) -> dict[str, Any]:
    return (
        {"label": label, "fraction": 0.0, "interval": 1, "choice": "", "gamma": 0.0}
        | what
        | metrics
    )


def _count(config: Config) -> int:
    """Parts of the whole run, for the progress bar."""
    each = 4 + len(config.gammas) * (1 + len(config.fractions)) + 2 * len(config.fractions)
    return each * len(config.optimizers) + (
        len(_STARTS) if config.warmup and "adam" in config.optimizers else 0
    )


def _score(accuracy: Array) -> Array:
    """Mean accuracy over the last axis, where a diverged run counts as zero."""
    mean: Array = np.mean(np.nan_to_num(accuracy), axis=-1)
    return mean


def _cell(
    cells: list[dict[str, Any]], fraction: float, interval: int, choice: str = "search"
) -> dict[str, Any]:
    wanted = ("F-GR", fraction, interval, choice)
    return next(
        cell
        for cell in cells
        if (cell["label"], cell["fraction"], cell["interval"], cell["choice"]) == wanted
    )


# The rule: squared gradient norms and curvature of batches and their parts along the training.


def _probe(
    task: Problem, trainer: Trainer, gamma: float, config: Config, seeds: Array
) -> dict[str, Array]:
    """Averages over batches and seeds along the training with the full penalty.

    Returns:
      "step", shape (times,); "norm", the mean squared gradient norm of fB samples, and
      "eigenvalue", the mean top Hessian eigenvalue of their loss, shapes (times, fractions).
    """
    stride = max(1, config.steps // _PROBE_TIMES // 100) * 100
    split, times, found = task.draw(seeds), [], []
    probe = jax.jit(lambda params, split: _probe_batches(task, params, split, config.fractions))
    for states in trainer.states({"gamma": gamma, "epsilon": config.epsilon, "interval": 1}, seeds):
        step = int(states.step[0])
        if step % stride == 0:
            lanes = [
                probe(*jax.tree.map(lambda x, i=i: x[i], (states.params, split)))
                for i in range(len(seeds))
            ]
            times.append(step)
            found.append(jax.tree.map(lambda *values: np.mean(values, axis=0), *lanes))
    norms, eigenvalues = (np.stack(values) for values in zip(*found, strict=True))
    return {"step": np.array(times), "norm": norms, "eigenvalue": eigenvalues}


def _probe_batches(
    task: Problem, params: PyTree, split: data.Split, fractions: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    size = task.recipe.batch_size

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.random.choice(key, split.train.shape[0], (size,), replace=False)
        batch = task.take(task.pool, split.train[rows]), split.train_labels[rows]
        norms, eigenvalues = [], []
        for fraction in fractions:
            value_fn = functools.partial(
                _value, task, tuple(x[: round(fraction * size)] for x in batch)
            )
            norms.append(
                curvature.penalty_scale(task.loss, params, batch, penalty_fraction=fraction).part
            )
            eigenvalues.append(
                curvature.top_hessian_eigenvalue(value_fn, params, key, num_matvecs=12).value
            )
        return jnp.stack(norms), jnp.stack(eigenvalues)

    norms, eigenvalues = jax.lax.map(one, jax.random.split(jax.random.key(0), _PROBES))
    return jnp.mean(norms, axis=0), jnp.mean(eigenvalues, axis=0)


def _value(task: Problem, batch: Any, params: PyTree) -> jax.Array:
    return task.loss(params, batch)


def _scales(probes: dict[str, Array]) -> Array:
    """The factor on gamma for each fraction: the ratio of the squared norms, averaged over the
    training.
    """
    norm = np.mean(probes["norm"], axis=0)
    return np.asarray(norm[0] / norm)


# Warm-up.

_STARTS = (
    "no penalty",
    "gamma from the start",
    "gamma rises",
    "gamma switched on",
    "epsilon rises",
)


def _warmups(
    config: Config, dataset: data.Dataset, parts: Parts, gamma: float, report: Array
) -> list[dict[str, Any]]:
    """Adam with a learning rate that warms up over a tenth of the steps, and a penalty that starts
    in several ways.
    """
    steps = config.steps // 10
    recipe = dataclasses.replace(_recipe(config, "adam"), warmup_steps=steps)
    cells = []
    for start in _STARTS:
        settings = {} if start == "no penalty" else {"gamma": gamma, "epsilon": config.epsilon}
        trainer = Trainer(
            dataset, METHODS["SGD"] if start == "no penalty" else _starting(start, steps), recipe
        )
        cells.append(
            {
                "start": start,
                "steps": steps,
                "gamma": gamma,
                **_train(parts, trainer, recipe, settings, report),
            }
        )
    return cells


def _starting(start: str, steps: int) -> Method:
    """F-GR whose gamma or epsilon comes to its value in the first ``steps`` steps."""

    def regularizer(settings: Settings) -> Any:
        def rises(value: Any) -> Any:
            return lambda step: value * jnp.minimum((step + 1) / steps, 1)

        gamma, epsilon = settings["gamma"], settings["epsilon"]
        schedules = {
            "gamma from the start": (gamma, epsilon),
            "gamma rises": (rises(gamma), epsilon),
            "gamma switched on": (lambda step: jnp.where(step < steps, 0.0, gamma), epsilon),
            "epsilon rises": (gamma, rises(epsilon)),
        }
        chosen = schedules[start]
        return fd_gradreg(gamma=chosen[0], epsilon=chosen[1])

    return Method(start, ("gamma", "epsilon"), regularizer, 2)


# Table and figure.


def table(results: dict[str, Any]) -> str:
    """The cells of each optimizer as text: cost, accuracy, paired difference to the full penalty,
    and the share of its gain over SGD.
    """
    lines: list[str] = []
    for name, found in results["optimizers"].items():
        lines += [f"{name}, learning rate {found['learning_rate']:g}", _HEAD]
        full, plain = _cell(found["cells"], 1.0, 1), found["cells"][0]
        lines += [
            _line(cell, full, plain)
            for cell in found["cells"]
            if cell is not _cell(found["cells"], 1.0, 1, "rule")
        ]
        lines += ["", *_rule_lines(results, found), "", *_search_lines(results, found), ""]
    if results["warmup"]:
        lines += _warmup_lines(results["warmup"])
    report, choose = (len(results["seeds"][name]) for name in ("report", "choose"))
    lines += [
        (
            f"{results['dataset']}: means over {report} seeds ± standard error; gamma chosen on"
            f" {choose} others."
        ),
        (
            "p: paired t-test against the full penalty (f = 1, k = 1, by search); below: worse than"
            " it by more than one standard error."
        ),
        "Costs are per step, relative to the plain optimizer; twice the steps is twice the budget.",
    ]
    return "\n".join(lines)


_HEAD = (
    f"{'method':<22} {'f':>5} {'k':>3} {'gamma':>6} {'by':<6} {'gradients':>9} {'FLOPs':>6}"
    f" {'test accuracy %':>15} {'minus full F-GR':>15} {'p':>8} {'':<5} {'share of its gain':>17}"
)


def _line(cell: dict[str, Any], full: dict[str, Any], plain: dict[str, Any]) -> str:
    lazy = cell["label"] == "F-GR"
    fraction, interval = (f"{cell['fraction']:g}", f"{cell['interval']:g}") if lazy else ("", "")
    gamma = f"{cell['gamma']:g}" if cell["choice"] else ""
    found = statistics.estimate(100 * cell["accuracy"])
    lost = len(cell["accuracy"]) - found.size
    accuracy = f"{found:.2f}" + (f" ({lost} diverged)" if lost else "")
    left = (
        f"{cell['label']:<22} {fraction:>5} {interval:>3} {gamma:>6} {cell['choice']:<6}"
        f" {cell['gradients']:>9.3f} {cell['flops']:>6.3f}"
    )
    minus, p, mark, share = "", "", "", ""
    if cell is not full:
        difference = statistics.paired(100 * cell["accuracy"], 100 * full["accuracy"])
        minus, p = f"{difference:+.2f}", f"{difference.p:.1g}"
        mark, share = (
            ("" if keeps_up(cell, full) else "below"),
            f"{gain_share(cell, full, plain):.0%}",
        )
    return f"{left} {accuracy:>15} {minus:>15} {p:>8} {mark:<5} {share:>17}"


def keeps_up(cell: dict[str, Any], full: dict[str, Any]) -> bool:
    """Whether a cell's accuracy is not below the full penalty's by more than one standard error of
    their paired difference.

    A cell where a run diverged does not keep up.
    """
    difference = statistics.paired(cell["accuracy"], full["accuracy"])
    return bool(np.all(np.isfinite(cell["accuracy"]))) and difference.mean >= -difference.error


def gain_share(cell: dict[str, Any], full: dict[str, Any], plain: dict[str, Any]) -> float:
    """A cell's gain in accuracy over the plain optimizer, divided by the full penalty's gain; NaN
    where that is zero.
    """
    accuracy, most, least = (float(_score(one["accuracy"])) for one in (cell, full, plain))
    return (accuracy - least) / (most - least) if most != least else float("nan")


def _rule_lines(results: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What the rule says: the factor on gamma at the start and over the training, and the kick of a
    lazy step.
    """
    probes, lines = found["probes"], []
    for i, fraction in enumerate(results["fractions"]):
        if fraction < 1:
            early, late = probes["norm"][0, 0] / probes["norm"][0, i], _scales(probes)[i]
            best = (
                _cell(found["cells"], fraction, 1)["gamma"] / _cell(found["cells"], 1.0, 1)["gamma"]
            )
            lines.append(
                f"factor on gamma for f = {fraction:g}: {early:.2f} at the start, {late:.2f} over"
                f" the training; by search {best:.2f}"
            )
    return lines


def _search_lines(results: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The mean accuracies on the choosing seeds; with SGD also the kick of the step that takes the
    penalty.
    """
    kick, title = (
        kicks(results, found["optimizer"]),
        "test accuracy % on the seeds that choose gamma",
    )
    known = found["optimizer"] == "sgd"
    lines = [title + (", and the kick eta lambda (1 + k gamma lambda)" if known else "")]
    lines.append(
        f"{'f':>6} {'k':>3}" + "".join(f"{f'gamma {gamma:g}':>13}" for gamma in results["gammas"])
    )
    for i, fraction in enumerate(results["fractions"]):
        for j, interval in enumerate(results["intervals"]):
            shown = [
                f"{100 * a:.1f}" + (f" ({b:.1f})" if known else "")
                for a, b in zip(found["search"][i, j], kick[i, j], strict=True)
            ]
            lines.append(
                f"{fraction:>6g} {interval:>3g}" + "".join(f"{text:>13}" for text in shown)
            )
    return lines


def _searched(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (cell for cell in cells if cell["label"] == "F-GR" and cell["choice"] == "search")


def kicks(results: dict[str, Any], optimizer: str = "sgd") -> Array:
    r"""How far the steps that take the penalty go in the sharpest direction of their samples:
    :math:`\eta\lambda(1 + k\gamma\lambda)`.

    Args:
      results: of :func:`run`.
      optimizer: which of them; what it says is plain descent's.

    Returns:
      One minus the factor on the distance to the minimum in that direction, shape (fractions,
      intervals, gammas), as "search" has it; beyond 2 the step overshoots.
    """
    found = results["optimizers"][optimizer]
    top = np.mean(found["probes"]["eigenvalue"], axis=0)[:, None, None]
    kick: Array = (
        found["learning_rate"] * top * (1 + results["intervals"][:, None] * results["gammas"] * top)
    )
    return kick


def _warmup_lines(cells: list[dict[str, Any]]) -> list[str]:
    reference = next(cell for cell in cells if cell["start"] == "gamma from the start")
    lines = [
        f"adam, learning rate warmed up over {cells[0]['steps']:g} steps, F-GR with gamma"
        f" {cells[0]['gamma']:g}"
    ]
    for cell in cells:
        minus = statistics.paired(100 * cell["accuracy"], 100 * reference["accuracy"])
        compared = (
            ""
            if cell is reference
            else f"{minus:+.2f} against gamma from the start, p = {minus.p:.1g}"
        )
        lines.append(
            f"{cell['start']:<22} {statistics.estimate(100 * cell['accuracy']):.2f}   {compared}"
        )
    return [*lines, ""]


def plot(results: dict[str, Any], output: Path) -> list[Path]:
    """Draws frontier.png: accuracy against the cost of a step; diamonds are cells whose gamma comes
    from the rule.
    """
    made, axes = plots.figure(len(results["optimizers"]), width=4.4, height=3.9)
    for axis, (name, found) in zip(axes, results["optimizers"].items(), strict=True):
        for cell in found["cells"]:
            _draw(axis, cell)
        for fraction in results["fractions"]:
            cells = [cell for cell in _searched(found["cells"]) if cell["fraction"] == fraction]
            means = [100 * statistics.estimate(cell["accuracy"]).mean for cell in cells]
            color, text = _COLORS[bool(fraction < 1)], f"F-GR, f = {fraction:g}"
            axis.plot(
                [cell["gradients"] for cell in cells],
                means,
                "-",
                lw=1,
                color=color,
                zorder=0,
                label=text,
            )
        axis.set(xlabel="cost of a step (gradient evaluations)", title=name, xlim=(0.8, 3.3))
        axis.margins(y=0.15)
        axis.legend(loc="center right", frameon=False, fontsize=8)
    axes[0].set_ylabel("test accuracy %")
    return [plots.save(made, output, "frontier")]


_COLORS = {False: plots.COLORS["F-GR"], True: "#e377c2"}  # whether on a part of the batch


def _draw(axis: Any, cell: dict[str, Any]) -> None:
    lazy = cell["label"] == "F-GR"
    if lazy and cell["choice"] == "rule" and cell["fraction"] == 1:
        return
    color = (
        _COLORS[bool(cell["fraction"] < 1)]
        if lazy
        else plots.COLORS["DB" if cell["label"] == "DB" else "SGD"]
    )
    mean, error, _ = statistics.estimate(100 * cell["accuracy"])
    hollow = {"markerfacecolor": "white"} if cell["choice"] == "rule" else {}
    cost = cell["gradients"]
    axis.errorbar(
        cost,
        mean,
        error,
        fmt="D" if hollow else "o",
        ms=5,
        color=color,
        alpha=0.6 if hollow else 1,
        **hollow,
    )
    if not hollow:
        text, place = (
            (f"k={cell['interval']:g}", (-4, -22 if cell["fraction"] < 1 else 16))
            if lazy
            else (cell["label"], (6, -11))
        )
        axis.annotate(
            text,
            (cost, mean),
            place,
            textcoords="offset points",
            fontsize=7,
            color=color,
            rotation=60 if lazy else 0,
        )
