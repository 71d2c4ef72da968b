"""Late or lazy: how to spend a share of the penalty's cost, all ways at one counted price.

The penalty in every step costs a second gradient. A k-th of that buys it in the first or the last
k-th of the steps, in every k-th step, on a 2k-th of the batch, or on a quarter of the batch in
every k/2-th step; or a k-th more of plain steps.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from gradreg_optax import relative_gradreg
from gradreg_optax.experiments import common, compare, data, plots, report, runs, statistics
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.trainer import METHODS, Method, Recipe

PLAIN, ALWAYS, LONGER = "SGD", "every step", "SGD for longer"
WAYS = ("early", "late", "lazy", "part", "lazy on a part")


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Settings of ``python -m studies late``."""

    output: Path = Path("results/late")
    seeds: int = 10
    """Number of seeds that are reported, of mnist1d half as many; everything is paired by seed."""
    choose_seeds: int = 4
    """Number of further seeds that the strength is chosen on, for each way."""
    shares: tuple[int, ...] = (4, 8)
    """Even numbers k: the penalty may cost a k-th of a gradient per step."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Strengths of relative_gradreg to choose from."""
    constant: bool = False
    """Keep the learning rate; otherwise it falls to zero along a cosine."""

    def __post_init__(self) -> None:
        """Checks the numbers and the names."""
        common.at_least(self, 2, "seeds", "shares")
        super().__post_init__()
        common.above_zero(self, "strengths")
        for share in self.shares:
            if share % 2:
                raise CommandError(f"shares must be even, got {share}: every k/2-th step is a way.")


def run(config: Config) -> dict[str, Any]:
    """Trains every way on every data set.

    Args:
      config: the settings.

    Returns:
      "recipes", what the ways have in common on each data set; and "runs", one row a run: its
      "role" is "choose" or "report", its "share" k is NaN for plain steps and a penalty in every
      one of them, and its "cost" is that of the training, relative to the plain one.

    Raises:
      CommandError: settings that do not fit the data.
    """
    store, recipes, found = runs.Store(config.output), {}, []
    for name in config.datasets:
        dataset, recipe = data.load(name), compare.recipe(config, name)
        if config.constant:
            recipe = dataclasses.replace(recipe, optimizer=sgd_at_one_rate)
        report = compare.seeds_of(config, name)
        choose = range(report.stop, report.stop + config.choose_seeds)
        train = functools.partial(runs.train, dataset, store=store, what=f"late {name}")
        for way in _ways(recipe, config.shares):
            tags = way.tags(recipe) | {"dataset": name}
            values: dict[str, Any] = {"strength": config.strengths, "interval": way.interval}
            grid = functools.partial(runs.grid, way.method, way.recipe)
            if way.method.settings:
                tried = train(grid(values, choose, role="choose", **tags))
                best = runs.best(tried, "strength")
                if best is None:
                    raise CommandError(f"{way.method.label} diverged on {name}: lower --strengths.")
                values |= best
                found.append(tried)
            found.append(train(grid(values, report, role="report", **tags)))
        recipes[name] = recipe.describe()
    return {"recipes": recipes, "runs": runs.stack(*found)}


@dataclasses.dataclass(frozen=True)
class _Way:
    """A way to spend a share; none for plain steps and for the penalty in every step."""

    method: Method
    recipe: Recipe
    interval: int = 1
    share: float = float("nan")

    def tags(self, plain: Recipe) -> dict[str, Any]:
        """Columns of its rows."""
        step = self.method.cost(self.recipe.penalty_fraction, self.interval)
        return {"share": self.share, "cost": step * self.recipe.steps / plain.steps}


def _ways(recipe: Recipe, shares: tuple[int, ...]) -> Iterator[_Way]:
    """All ways that are compared."""
    steps, change = recipe.steps, functools.partial(dataclasses.replace, recipe)
    penalized = functools.partial(Method, make=relative_gradreg, settings=("strength",))
    yield _Way(METHODS[PLAIN], recipe)
    yield _Way(penalized(ALWAYS, gradients=2), recipe)
    for share in shares:
        some, eighth = round(steps / share), {"penalty_fraction": 1 / (2 * share)}
        late = functools.partial(relative_gradreg, start=steps - some)
        early = functools.partial(_early, until=some)
        spent = 1 + some / steps  # gradients per step, on average over all
        yield _Way(Method(LONGER, None), change(steps=steps + some), share=share)
        yield _Way(penalized("early", make=early, gradients=spent), recipe, share=share)
        yield _Way(penalized("late", make=late, gradients=spent), recipe, share=share)
        yield _Way(penalized("lazy", gradients=2), recipe, share, share)
        yield _Way(penalized("part", gradients=2), change(**eighth), share=share)
        quarter = change(penalty_fraction=1 / 4)
        yield _Way(penalized("lazy on a part", gradients=2), quarter, share // 2, share)


def sgd_at_one_rate(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Plain SGD at the rate that a schedule begins with."""
    return optax.sgd(schedule(0))


def _early(strength: Any, interval: Any, until: int) -> optax.GradientTransformation:
    """The relative penalty before an update, and none from there on."""
    return relative_gradreg(
        strength=lambda step: jnp.where(step < until, strength, 0.0), interval=interval
    )


def table(results: dict[str, Any]) -> Report:
    """The ways as text: cost, the chosen strength, accuracy, and paired differences."""
    lines: list[Table | str] = []
    head = ["penalty", "k", "cost", "r", "test accuracy %", "minus SGD", "p", "minus every step"]
    for name, found in _reported(results).items():
        ways = runs.groups(found, "method", "share")
        rows = [_row(label, share, rows, found) for (label, share), rows in ways]
        title = f"{_title(results, name)}, {len(set(found['seed']))} seeds"
        lines += [title, Table("", head, rows), ""]
    lines.append(
        "means over seeds ± standard error, paired differences in points; p: paired t-test against"
        " SGD. cost: of the training, relative to SGD's. k: the penalty costs a k-th of what it"
        " costs in every step. r: strength of relative_gradreg, chosen on other seeds."
    )
    return Report(*lines)


def _title(results: dict[str, Any], name: str) -> str:
    recipe = results["recipes"][name]
    constant = recipe["optimizer"] == sgd_at_one_rate.__name__
    return compare.described(name, recipe) + ", one learning rate" * constant


def _reported(results: dict[str, Any]) -> dict[str, runs.Columns]:
    return runs.by(runs.select(results["runs"], role="report"), "dataset")


def gain(rows: runs.Columns, found: runs.Columns, over: str = PLAIN) -> statistics.Difference:
    """The paired difference of a way's accuracy to another's, in points."""
    return statistics.points(rows, runs.select(found, method=over))


def _row(label: str, share: float, rows: runs.Columns, found: runs.Columns) -> list[str]:
    numbers = [f"{share:g}", f"{rows['cost'][0]:.4g}", f"{rows['strength'][0]:g}"]
    cells = [label, *(number.replace("nan", "") for number in numbers)]
    cells.append(report.percent()(rows))
    over = gain(rows, found)
    cells += ["", ""] if label == PLAIN else [f"{over:+.1f}", over.p_text]
    return [*cells, "" if label == ALWAYS else f"{gain(rows, found, ALWAYS):+.1f}"]


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws late.png: what each way gains over plain steps, at each price."""
    tasks = _reported(results)
    made, axes = plots.figure(len(tasks), width=5.0)
    labels = [LONGER, *WAYS]
    for axis, (name, found) in zip(axes, tasks.items(), strict=True):
        always = gain(runs.select(found, method=ALWAYS), found)
        axis.axhline(0, color=plots.color(PLAIN), ls="--", lw=1)
        axis.axhline(always.mean, color="k", lw=1)
        plots.note(axis, "the penalty in every step, cost 2", (0, always.mean), (0, 3))
        shares = [share for share in runs.by(found, "share") if share == share]
        for i, share in enumerate(shares):
            rows = [runs.select(found, method=label, share=share) for label in labels]
            places = [place + 0.16 * (i - (len(shares) - 1) / 2) for place in range(len(labels))]
            price = f"cost {1 + 1 / share:.4g}"
            plots.errors(axis, places, [gain(one, found) for one in rows], label=price)
        axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
        axis.set_title(_title(results, name), fontsize=11)
    axes[0].set_ylabel("gain in test accuracy, points")
    axes[0].legend(frameon=False, loc="lower right")
    return plots.save(made, output / "late", formats)
