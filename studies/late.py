"""Early, late, lazy and partial penalties at equal cost.

The penalty costs a second gradient per step. For 1/k of that cost it can be applied in the first or
the last 1/k of the steps, every k-th step, on 1/(2k) of the batch, or on a quarter of the batch
every k/2-th step. Plain training can take 1/k more steps instead.
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
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.trainer import METHODS, Method, Recipe

PLAIN, ALWAYS, LONGER = "SGD", "every step", "SGD for longer"
SCHEDULES = ("early", "late", "lazy", "part", "lazy on a part")


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Settings of ``python -m studies late``."""

    output: Path = Path("results/late")
    seeds: int = 10
    """Number of evaluation seeds; mnist1d uses half as many. Rows are paired by seed."""
    choose_seeds: int = 4
    """Number of tuning seeds for the strength of each schedule."""
    shares: tuple[int, ...] = (4, 8)
    """Even numbers k: the penalty costs 1/k gradients per step."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Candidate strengths of relative_gradreg."""
    constant: bool = False
    """Use a constant learning rate instead of a cosine schedule."""

    def __post_init__(self) -> None:
        """Check the strengths and the costs as well."""
        common.at_least(self, 2, "seeds", "shares")
        super().__post_init__()
        common.above_zero(self, "strengths")
        for share in self.shares:
            if share % 2:
                raise CommandError(f"shares must be even, got {share}: k/2 is an interval.")


def run(config: Config) -> dict[str, Any]:
    """Train every schedule on every data set.

    Returns:
      "recipes", the shared settings for each data set; and "runs", one row per run. Its "role" is
      "choose" (tuning) or "report", its "share" is k (NaN for plain steps and for a penalty in
      every step), and its "cost" is that of the training, relative to plain training.

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
        for schedule in _schedules(recipe, config.shares):
            tags = schedule.tags(recipe) | {"dataset": name}
            values: dict[str, Any] = {"strength": config.strengths, "interval": schedule.interval}
            grid = functools.partial(runs.grid, schedule.method, schedule.recipe)
            if schedule.method.settings:
                tried = train(grid(values, choose, role="choose", **tags))
                best = runs.best(tried, "strength")
                if best is None:
                    raise CommandError(
                        f"{schedule.method.label} diverged on {name}. Use smaller --strengths."
                    )
                values |= best
                found.append(tried)
            found.append(train(grid(values, report, role="report", **tags)))
        recipes[name] = recipe.describe()
    return {"recipes": recipes, "runs": runs.stack(*found)}


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """A schedule of the penalty; the share is NaN for no penalty and for one in every step."""

    method: Method
    recipe: Recipe
    interval: int = 1
    share: float = float("nan")

    def tags(self, plain: Recipe) -> dict[str, Any]:
        """Return the columns of its rows."""
        step = self.method.cost(self.recipe.penalty_fraction, self.interval)
        return {"share": self.share, "cost": step * self.recipe.steps / plain.steps}


def _schedules(recipe: Recipe, shares: tuple[int, ...]) -> Iterator[_Schedule]:
    """Yield all schedules."""
    steps, change = recipe.steps, functools.partial(dataclasses.replace, recipe)
    penalized = functools.partial(Method, make=relative_gradreg, settings=("strength",))
    yield _Schedule(METHODS[PLAIN], recipe)
    yield _Schedule(penalized(ALWAYS, gradients=2), recipe)
    for share in shares:
        some, eighth = round(steps / share), {"penalty_fraction": 1 / (2 * share)}
        late = functools.partial(relative_gradreg, start=steps - some)
        early = functools.partial(_early, until=some)
        spent = 1 + some / steps  # gradients per step, on average over all
        yield _Schedule(Method(LONGER, None), change(steps=steps + some), share=share)
        yield _Schedule(penalized("early", make=early, gradients=spent), recipe, share=share)
        yield _Schedule(penalized("late", make=late, gradients=spent), recipe, share=share)
        yield _Schedule(penalized("lazy", gradients=2), recipe, share, share)
        yield _Schedule(penalized("part", gradients=2), change(**eighth), share=share)
        quarter = change(penalty_fraction=1 / 4)
        yield _Schedule(penalized("lazy on a part", gradients=2), quarter, share // 2, share)


def sgd_at_one_rate(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return plain SGD with the initial rate of a schedule."""
    return optax.sgd(schedule(0))


def _early(strength: Any, interval: Any, until: int) -> optax.GradientTransformation:
    """Return the relative penalty for the first ``until`` updates."""
    return relative_gradreg(
        strength=lambda step: jnp.where(step < until, strength, 0.0), interval=interval
    )


def table(results: dict[str, Any]) -> Report:
    """Return cost, tuned strength, accuracy and paired differences of each schedule."""
    lines: list[Table | str] = []
    head = ["penalty", "k", "cost", "r", "test accuracy (%)", "minus SGD", "p", "minus every step"]
    for name, found in _reported(results).items():
        schedules = runs.groups(found, "method", "share")
        rows = [_row(label, share, rows, found) for (label, share), rows in schedules]
        title = f"{_title(results, name)}, {len(set(found['seed']))} seeds"
        lines += [title, Table("", head, rows), ""]
    lines.append(
        "Means ± standard errors over seeds, paired differences in percentage points; p: paired"
        " t-test against SGD. Cost: of the training, relative to SGD. k: the penalty costs 1/k of a"
        " penalty in every step. r: strength of relative_gradreg, tuned on other seeds."
    )
    return Report(*lines)


def _title(results: dict[str, Any], name: str) -> str:
    recipe = results["recipes"][name]
    constant = recipe["optimizer"] == sgd_at_one_rate.__name__
    return compare.described(name, recipe) + ", constant learning rate" * constant


def _reported(results: dict[str, Any]) -> dict[str, runs.Columns]:
    return runs.by(runs.select(results["runs"], role="report"), "dataset")


def gain(rows: runs.Columns, found: runs.Columns, over: str = PLAIN) -> statistics.Estimate:
    """Return the paired difference of accuracies to another row, in percentage points."""
    return statistics.points(rows, runs.select(found, method=over))


def _row(label: str, share: float, rows: runs.Columns, found: runs.Columns) -> list[Any]:
    numbers = [f"{share:g}", f"{rows['cost'][0]:.4g}", f"{rows['strength'][0]:g}"]
    cells: list[Any] = [label, *(number.replace("nan", "") for number in numbers)]
    cells.append(report.percent()(rows))
    over = gain(rows, found)
    cells += ["", ""] if label == PLAIN else [f"{over:+.1f}", Number(over.p, ".1g")]
    return [*cells, "" if label == ALWAYS else f"{gain(rows, found, ALWAYS):+.1f}"]


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw the gain of each schedule over plain training, at each cost."""
    tasks = _reported(results)
    made, axes = plots.figure(len(tasks), width=5.0)
    labels = [LONGER, *SCHEDULES]
    for axis, (name, found) in zip(axes, tasks.items(), strict=True):
        always = gain(runs.select(found, method=ALWAYS), found)
        axis.axhline(0, color=plots.color(PLAIN), ls="--", lw=1)
        axis.axhline(always.mean, color="k", lw=1)
        plots.note(axis, "penalty in every step, cost 2", (0, always.mean), (0, 3))
        shares = [share for share in runs.by(found, "share") if share == share]
        for i, share in enumerate(shares):
            rows = [runs.select(found, method=label, share=share) for label in labels]
            places = [place + 0.16 * (i - (len(shares) - 1) / 2) for place in range(len(labels))]
            cost = f"cost {1 + 1 / share:.4g}"
            plots.errors(axis, places, [gain(one, found) for one in rows], label=cost)
        axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
        axis.set_title(_title(results, name), fontsize=11)
    axes[0].set_ylabel("gain in test accuracy (points)")
    axes[0].legend(frameon=False, loc="lower right")
    return plots.save(made, output / "late", formats)
