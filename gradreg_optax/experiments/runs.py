"""Training runs, and their results as columns.

A :class:`Run` is a method, a recipe, the values of the method's hyperparameters and a seed.
``train`` returns one row per run, as a dict of columns (arrays of equal length); ``select``,
``groups`` and ``stack`` read them. Finished parts are stored on disk, so that an interrupted run
resumes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gradreg_optax.experiments import common, results
from gradreg_optax.experiments.data import Array, Dataset
from gradreg_optax.experiments.trainer import METHODS, Method, Metrics, Recipe, Trainer

Columns: TypeAlias = dict[str, Array]


class Run(NamedTuple):
    """One training run.

    Attributes:
      method: the method.
      recipe: the settings that it shares with others.
      settings: the values of the method's hyperparameters, and optionally of "interval".
      seed: determines data split, label noise, initial parameters and batches.
      tags: further columns of its row.
    """

    method: Method
    recipe: Recipe
    settings: Mapping[str, float]
    seed: int
    tags: Mapping[str, Any]


def grid(
    method: Method, recipe: Recipe, values: Mapping[str, Any], seeds: Sequence[int], **tags: Any
) -> list[Run]:
    """Return all combinations of values, each on all seeds.

    Args:
      method: the method.
      recipe: the recipe.
      values: one or several values for each hyperparameter of the method, and for "interval"; other
        names are ignored.
      seeds: the seeds.
      **tags: further columns of the rows.
    """
    names = [name for name in values if name in (*method.settings, "interval")]
    tried = itertools.product(*(np.atleast_1d(values[name]).tolist() for name in names))
    settings = [dict(zip(names, combination, strict=True)) for combination in tried]
    return [Run(method, recipe, given, int(seed), tags) for given in settings for seed in seeds]


def select_then_report(
    dataset: Dataset,
    candidates: Iterable[Sequence[Run]],
    evaluation: Sequence[int],
    store: "Store | None" = None,
    *,
    score: str = "accuracy",
    **options: Any,
) -> Columns:
    """Tune every candidate on some seeds and evaluate its best setting on others.

    All candidates with one seed share data, initial parameters and batches, so that differences
    between them are paired.

    Args:
      dataset: the data.
      candidates: the methods to compare, each as its runs with all settings on the tuning seeds,
        see :func:`grid`.
      evaluation: other seeds, for the best setting of each candidate, unless all of them diverged.
      store: see :func:`train`.
      score: the column whose mean the best setting maximizes.
      **options: further arguments of :func:`train`.

    Returns:
      One row per run, as from :func:`train`, with a "role": "choose" (tuning) or "report".

    Raises:
      CommandError: a seed in both sets.
    """
    tried = [[_with_role(run, "choose") for run in runs] for runs in candidates]
    tuning = [run for runs in tried for run in runs]
    if {run.seed for run in tuning} & set(evaluation):
        raise common.CommandError("tuning and evaluation seeds must differ.")
    found, chosen, last = train(dataset, tuning, store, **options), list[Run](), 0
    for runs in tried:
        first, last = last, last + len(runs)
        rows = {name: values[first:last] for name, values in found.items()}
        setting = best(rows, *runs[0].settings, score=score)
        if setting is not None:
            run = _with_role(runs[0], "report")._replace(settings=setting)
            chosen += [run._replace(seed=seed) for seed in evaluation]
    return stack(found, train(dataset, chosen, store, **options))


class Store:
    """Finished parts on disk.

    The name of a part contains a digest of everything that its numbers depend on: sources, versions
    and machine, and the values given by the caller.
    """

    def __init__(self, output: Path | None, **depends: Any) -> None:
        """Set the directory.

        Args:
          output: the output directory; None stores nothing.
          **depends: values that all parts depend on.
        """
        self.folder = None if output is None else output / "parts"
        self._common = {"sources": results.sources(), "versions": results.versions()}
        self._common |= {"machine": results.machine()} | depends

    def keep(self, label: str, what: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the value of ``make``, from disk if it is stored.

        Args:
          label: the kind of part; the file name starts with it.
          what: all other values that the numbers depend on.
          make: returns a dict of arrays.

        Returns:
          The dict, with numbers rounded to nine significant digits.
        """
        if self.folder is None:
            return make()
        depends = json.dumps(results.plain(self._common | {"part": what}), sort_keys=True)
        digest = hashlib.sha256(depends.encode()).hexdigest()[:20]
        path = self.folder / f"{label.replace(' ', '-')}-{digest}.json"
        try:
            return results.read(path)
        except (OSError, ValueError):  # missing or truncated
            results.write(path, make())
        return results.read(path)

    def clear(self) -> None:
        """Remove all parts."""
        for path in self.folder.glob("*.json") if self.folder else ():
            path.unlink()


def train(
    dataset: Dataset,
    runs: Sequence[Run],
    store: Store | None = None,
    *,
    lanes: int = 40,
    what: str = "training",
    metrics: Metrics | None = None,
) -> Columns:
    """Train runs, those of one method and recipe in one compiled program.

    Two programs run at a time, in threads. ``jax.config.update`` applies to them, a context manager
    such as ``jax.default_matmul_precision`` does not.

    Args:
      dataset: the data.
      runs: the runs, in any order.
      store: stores finished parts; None stores nothing.
      lanes: number of runs in one program; memory grows with it.
      what: label of the progress bar, which is shown only on a terminal.
      metrics: replacement for the default metrics of the final network, ``(problem, params, seed,
        split, pool) -> metrics``.

    Returns:
      One row per run, in their order: "method", "seed", a column for each hyperparameter (NaN for
      methods without it), "gradients" (evaluations per step) and the metrics of
      :class:`~gradreg_optax.experiments.trainer.Trainer`.

    Raises:
      CommandError: runs that do not fit the data.
    """
    store, found = store or Store(None), [dict[str, Any]()] * len(runs)
    parts = list(_parts(runs, lanes))

    def make(places: list[int]) -> Columns:
        return _part(dataset, [runs[place] for place in places], store, metrics)

    with ThreadPoolExecutor(2) as pool:  # one part compiles while another one trains
        made = common.progress(what, "part", pool.map(make, parts), len(parts))
        for places, part in zip(parts, made, strict=True):
            for i, place in enumerate(places):
                found[place] = {name: values[i] for name, values in part.items()}
    return columns([_row(run) | metrics for run, metrics in zip(runs, found, strict=True)])


def flops(dataset: Dataset, run: Run, store: Store) -> float:
    """Return the floating-point operations per step of a run, relative to plain steps."""

    def count(method: Method) -> float:
        trainer = _trainer(dataset, method, run.recipe)
        program = trainer.digest(method.settings)
        made = store.keep(f"flops-{method.label}", program, lambda: {"flops": trainer.flops()})
        return float(made["flops"])

    penalised = count(run.method) / count(METHODS["SGD"])
    return 1 + (penalised - 1) / run.settings.get("interval", 1)


@functools.lru_cache(maxsize=4)
def fingerprint(dataset: Dataset) -> str:
    """Return a digest of all inputs and labels and of their interpretation."""
    return hashlib.sha256(pickle.dumps(dataclasses.astuple(dataset))).hexdigest()


def select(columns: Mapping[str, Any], **where: Any) -> Columns:
    """Return the rows whose columns have the given values; NaN matches NaN."""
    table = {name: np.asarray(values) for name, values in columns.items()}
    keep = np.ones(_size(table), bool)
    for name, value in where.items():
        missing = isinstance(value, float) and np.isnan(value)
        keep &= np.isnan(table[name]) if missing else table[name] == value
    return {name: values[keep] for name, values in table.items()}


def groups(columns: Mapping[str, Any], *names: str) -> Iterator[tuple[tuple[Any, ...], Columns]]:
    """Yield the distinct values of some columns, in order of appearance, with their rows."""
    lists = [np.asarray(columns[name]).tolist() for name in names]
    keys = zip(*lists, strict=True) if names else [()] * _size(columns)
    distinct = {repr(values): values for values in keys}  # with repr, NaN equals NaN
    for values in distinct.values():
        yield values, select(columns, **dict(zip(names, values, strict=True)))


def by(columns: Mapping[str, Any], name: str) -> dict[Any, Columns]:
    """Return the rows of each value of a column, in order of appearance."""
    return {value: rows for (value,), rows in groups(columns, name)}


def columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Convert rows to columns; a missing value is NaN, or an empty string."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column([row.get(name) for row in rows]) for name in names}


def stack(*tables: Mapping[str, Any]) -> Columns:
    """Concatenate the rows of tables; a missing value is NaN, or an empty string."""
    rows: list[dict[str, Any]] = []
    for table in tables:
        lists = {name: np.asarray(values).tolist() for name, values in table.items()}
        rows += [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return columns(rows)


def tidy(axes: Mapping[str, Any], **blocks: Any) -> Columns:
    """Convert arrays to columns, one row per entry.

    Args:
      axes: the values along each axis, by name.
      **blocks: arrays with these axes.
    """
    grid = np.meshgrid(*map(np.asarray, axes.values()), indexing="ij")
    columns = dict(zip(axes, (axis.ravel() for axis in grid), strict=True))
    return columns | {name: np.asarray(block).ravel() for name, block in blocks.items()}


def blocks(columns: Mapping[str, Any], *axes: str) -> dict[str, Array]:
    """Convert columns to arrays with one axis per given column: the inverse of :func:`tidy`.

    The rows must be in the order of :func:`tidy`. The values along each axis are returned under its
    name.
    """
    along = {axis: list(dict.fromkeys(np.asarray(columns[axis]).tolist())) for axis in axes}
    shape = [len(values) for values in along.values()]
    found = {name: np.reshape(columns[name], shape) for name in columns if name not in axes}
    return found | {axis: np.array(values) for axis, values in along.items()}


def best(columns: Columns, *names: str, score: str = "accuracy") -> dict[str, float] | None:
    """Return the setting with the best mean score among those without a diverged run.

    Args:
      columns: the runs of one method.
      names: the columns that define a setting.
      score: the column to maximize.

    Returns:
      Its values, the first of equals; None if every setting diverged.
    """
    settings = groups(columns, *names)
    sound = {values: rows[score] for values, rows in settings if not np.any(rows["diverged"])}
    best = max(sound, key=lambda values: np.mean(sound[values]), default=None)
    return None if best is None else dict(zip(names, best, strict=True))


def _parts(runs: Sequence[Run], lanes: int) -> Iterator[list[int]]:
    """Yield the indices of the runs of each part.

    The last part of a method and recipe is padded with its last run, so that all of them share a
    program.
    """
    alike: dict[Any, list[int]] = {}
    for place, run in enumerate(runs):
        key = (run.method, run.recipe, tuple(sorted(run.settings)))
        alike.setdefault(key, []).append(place)
    for places in alike.values():
        width = -(-len(places) // -(-len(places) // lanes))
        for first in range(0, len(places), width):
            part = places[first : first + width]
            yield part + part[-1:] * (width - len(part))


def _part(dataset: Dataset, runs: list[Run], store: Store, metrics: Metrics | None) -> Columns:
    """Return the metrics of runs of one method and recipe."""
    method, recipe, names = runs[0].method, runs[0].recipe, sorted(runs[0].settings)
    trainer, seeds = _trainer(dataset, method, recipe), np.array([run.seed for run in runs])
    settings = {name: np.array([run.settings[name] for run in runs]) for name in names}
    what = {"recipe": recipe.describe(), "program": trainer.digest(tuple(names), metrics)}
    what |= {"settings": settings, "seeds": seeds, "data": fingerprint(dataset)}
    return store.keep(method.label, what, lambda: trainer(settings, seeds, metrics))


@functools.lru_cache(maxsize=16)
def _trainer(dataset: Dataset, method: Method, recipe: Recipe) -> Trainer:
    return Trainer(dataset, method, recipe)


def _size(columns: Mapping[str, Any]) -> int:
    """Return the number of rows."""
    return len(next(iter(columns.values())))


def _with_role(run: Run, role: str) -> Run:
    return run._replace(tags={**run.tags, "role": role})


def _row(run: Run) -> dict[str, Any]:
    interval = run.settings.get("interval", 1)
    gradients = run.method.cost(run.recipe.penalty_fraction, interval)
    made = {"method": run.method.label, **run.settings, "seed": run.seed, "gradients": gradients}
    return {**made, **run.tags}


def _column(values: list[Any]) -> Array:
    missing = "" if any(isinstance(value, str) for value in values) else np.nan
    return np.array([missing if value is None else value for value in values])
