"""One row a run: what is to be trained, the training side by side, and the results as columns.

A :class:`Run` is a method, a recipe, the values of the method's settings and a seed. ``train``
returns one row for each, as a dict of columns (arrays of one length); ``select``, ``groups`` and
``stack`` are all that tables and figures need. Finished parts are kept on disk, so that a second
start goes on where the first one ended.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gradreg_optax.experiments import common, results
from gradreg_optax.experiments.data import Dataset
from gradreg_optax.experiments.trainer import METHODS, Array, Method, Metrics, Recipe, Told, Trainer

Columns: TypeAlias = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      method: how it is regularized.
      recipe: what it has in common with others.
      settings: the values of the method's hyperparameters, and of "interval" if there is one.
      seed: decides on data split, wrong labels, initial parameters and batches.
      tags: further columns of its row.
    """

    method: Method
    recipe: Recipe
    settings: Mapping[str, float]
    seed: int
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def grid(
    method: Method,
    recipe: Recipe,
    values: Mapping[str, float | Sequence[float]],
    seeds: Sequence[int],
    **tags: Any,
) -> list[Run]:
    """Return all combinations of values, each on all seeds.

    Args:
      method: the method.
      recipe: the recipe.
      values: one value or several for each of the method's settings, for "interval", and for any
        field of the recipe, such as "learning_rate"; other names are ignored.
      seeds: the seeds.
      **tags: further columns of their rows.
    """
    fields = {field.name for field in dataclasses.fields(recipe)}
    names = [name for name in values if name in fields | {*method.settings, "interval"}]
    combined = itertools.product(*(np.atleast_1d(values[name]).tolist() for name in names))
    wanted = []
    for chosen in combined:
        given = dict(zip(names, chosen, strict=True))
        changes = {name: given.pop(name) for name in names if name in fields}
        how = dataclasses.replace(recipe, **changes) if changes else recipe
        wanted += [Run(method, how, given, int(seed), tags | changes) for seed in seeds]
    return wanted


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of a comparison: a method, its recipe, and the values to choose from.

    Attributes:
      method: the method.
      recipe: the recipe.
      values: see :func:`grid`.
      tags: further columns of its runs, which with the method's label identify it.
    """

    method: Method
    recipe: Recipe
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def runs(self, seeds: Sequence[int], role: str, values: Any = None) -> list[Run]:
        """Return the runs of all values; ``values`` replaces some of them."""
        chosen = {**self.values, **(values or {})}
        return grid(self.method, self.recipe, chosen, seeds, role=role, **self.tags)

    @property
    def names(self) -> list[str]:
        """The columns that its values fill."""
        runs = self.runs([0], "")
        return [name for name in self.values if any(name in {**r.settings, **r.tags} for r in runs)]


def select_then_report(
    dataset: Dataset,
    candidates: Sequence[Candidate],
    tuning: Sequence[int],
    evaluation: Sequence[int],
    store: "Store | None" = None,
    *,
    score: Callable[[Columns], float] | None = None,
    required: bool = True,
    **options: Any,
) -> Columns:
    """Tune every candidate on some seeds and evaluate its best setting on others.

    All candidates with one seed share data, initial parameters and batches, so that differences
    between them are paired.

    Args:
      dataset: the data.
      candidates: what is compared.
      tuning: seeds of the tuning runs, which try all values; if empty, every candidate must have
        one setting.
      evaluation: other seeds.
      store: see :func:`train`.
      score: the number that the best setting maximizes, given its runs; by default their mean
        accuracy.
      required: raise an error where all settings of a candidate diverged, instead of leaving out
        its evaluation.
      **options: further arguments of :func:`train`.

    Returns:
      One row a run, as from :func:`train`, with a "role": "choose" or "report".

    Raises:
      CommandError: seeds that are used twice, or a candidate whose settings all diverged.
    """
    if set(tuning) & set(evaluation):
        raise common.CommandError("tuning and evaluation seeds must differ.")
    tried = [one.runs(tuning, "choose") for one in candidates]
    found = train(dataset, [run for runs in tried for run in runs], store, **options)
    chosen, start = list[Run](), 0
    for candidate, runs in zip(candidates, tried, strict=True):
        rows = {name: values[start : start + len(runs)] for name, values in found.items()}
        start += len(runs)
        setting = best(rows, *candidate.names, score=score) if runs else {}
        if setting is not None:
            chosen += candidate.runs(evaluation, "report", setting)
        elif required:
            raise common.CommandError(
                f"{candidate.method.label} diverged with every setting: choose smaller values."
            )
    again = train(dataset, chosen, store, **options)
    return stack(*(part for part in (found, again) if part))


class Store:
    """Finished parts on disk, each under a digest of everything that its numbers depend on: the
    package's sources, versions and machine, and what the caller names.
    """

    def __init__(self, output: Path | None, **depends: Any) -> None:
        """Looks at nothing yet.

        Args:
          output: the folder of the run; None keeps nothing.
          **depends: what every part depends on.
        """
        self.folder = None if output is None else output / "parts"
        versions = {name: v for name, v in results.versions().items() if name != "python"}
        self._common = {"sources": results.sources(), "versions": versions}
        self._common |= {"machine": results.machine()} | depends

    def keep(self, label: str, what: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` makes, from the disk if it is there and whole.

        Args:
          label: what kind of part it is; begins the name of its file.
          what: everything else that the numbers depend on.
          make: returns a dict of arrays.

        Returns:
          The dict, with numbers to nine significant digits.
        """
        if self.folder is None:
            return make()
        depends = json.dumps(results.plain(self._common | {"part": what}), sort_keys=True)
        digest = hashlib.sha256(depends.encode()).hexdigest()[:20]
        path = self.folder / f"{label.replace(' ', '-')}-{digest}.json"
        try:
            return results.read(path)
        except (OSError, ValueError):  # not there, or cut short
            results.write(path, make())
        return results.read(path)

    def clear(self) -> None:
        """Removes all parts."""
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
    """Trains runs side by side, those of one method and recipe in one compiled program.

    Two programs run at a time, in threads: ``jax.config.update`` reaches them, a context such as
    ``jax.default_matmul_precision`` does not.

    Args:
      dataset: the data.
      runs: what to train, in any order.
      store: keeps what is finished; None keeps nothing.
      lanes: how many runs train side by side; memory grows with it.
      what: the name of the progress bar, which shows on a terminal alone.
      metrics: what is measured at the end of each, ``(problem, params, seed, split, pool) ->
        metrics``, in place of what every run is measured by.

    Returns:
      One row a run, in their order: "method", "seed", a column for each setting (NaN where a method
      has none), "gradients" (evaluations per step) and the metrics of
      :class:`~gradreg_optax.experiments.trainer.Trainer`.

    Raises:
      CommandError: runs that do not fit the data.
    """
    store, found = store or Store(None), [dict[str, Any]()] * len(runs)
    parts = list(_parts(runs, lanes))
    total = sum(len(places) * runs[places[0]].recipe.steps for places in parts)
    with common.progress(total, what, "step") as bar:

        def make(places: list[int], advanced: Told) -> Columns:
            return _part(dataset, [runs[place] for place in places], store, advanced, metrics)

        for places, part in zip(parts, _together(make, parts, bar.update), strict=True):
            for i, place in enumerate(places):
                found[place] = {name: values[i] for name, values in part.items()}
    return columns([_row(run) | metrics for run, metrics in zip(runs, found, strict=True)])


def flops(dataset: Dataset, method: Method, recipe: Recipe, store: Store | None = None) -> float:
    """Floating-point operations of a step, every penalty taken, over those of the plain one."""
    store = store or Store(None)

    def count(method: Method, recipe: Recipe) -> float:
        trainer = _trainer(dataset, method, recipe)
        what = {"recipe": recipe.describe(), "program": trainer.digest(method.settings)}
        made = store.keep(f"flops-{method.label}", what, lambda: {"flops": trainer.flops()})
        return float(made["flops"])

    plain = dataclasses.replace(recipe, penalty_fraction=1.0, held_out=0)
    return count(method, recipe) / count(METHODS["SGD"], plain)


@functools.lru_cache(maxsize=4)
def fingerprint(dataset: Dataset) -> str:
    """A digest of all inputs, all labels, and how they are read."""
    kind = f"{dataset.shape} {dataset.classes} {dataset.scale} {dataset.resplit}"
    digest = hashlib.sha256(kind.encode())
    for array in (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def select(columns: Mapping[str, Any], **where: Any) -> Columns:
    """The rows whose columns have the given values; NaN is found by NaN."""
    table = {name: np.asarray(values) for name, values in columns.items()}
    keep = np.ones(_size(table), bool)
    for name, value in where.items():
        keep &= _equal(table[name], value)
    return {name: values[keep] for name, values in table.items()}


def groups(columns: Mapping[str, Any], *names: str) -> Iterator[tuple[tuple[Any, ...], Columns]]:
    """The different values of some columns, in the order of their first rows, with their rows."""
    rows = _size(columns)
    lists = [np.asarray(columns[name]).tolist() for name in names]
    keys = zip(*lists, strict=True) if names else [()] * rows
    seen = {repr(values): values for values in keys}  # NaN equals NaN here
    for values in seen.values():
        yield values, select(columns, **dict(zip(names, values, strict=True)))


def by(columns: Mapping[str, Any], name: str) -> dict[Any, Columns]:
    """The rows of each value of a column, in the order of their first rows."""
    return {value: rows for (value,), rows in groups(columns, name)}


def columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows as columns; what one of them lacks is NaN there, or empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column([row.get(name) for row in rows]) for name in names}


def tagged(columns: Mapping[str, Any], **tags: Any) -> Columns:
    """The rows, with further columns of one value each in front."""
    rows = _size(columns)
    return {name: np.full(rows, value) for name, value in tags.items()} | dict(columns)


def stack(*tables: Mapping[str, Any]) -> Columns:
    """Tables one below the other; a column that one of them lacks is NaN there, or empty."""
    rows: list[dict[str, Any]] = []
    for table in tables:
        lists = {name: np.asarray(values).tolist() for name, values in table.items()}
        rows += [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return columns(rows)


def tidy(axes: Mapping[str, Any], **blocks: Any) -> Columns:
    """Arrays over some axes as columns, one row an entry.

    Args:
      axes: the values along each axis, by name.
      **blocks: arrays over all of them.
    """
    grid = np.meshgrid(*map(np.asarray, axes.values()), indexing="ij")
    columns = dict(zip(axes, (axis.ravel() for axis in grid), strict=True))
    return columns | {name: np.asarray(block).ravel() for name, block in blocks.items()}


def blocks(columns: Mapping[str, Any], *axes: str) -> dict[str, Array]:
    """Columns as arrays over the different values of some of them, and these values, each in the
    order of its first row: the inverse of :func:`tidy`.
    """
    found, places = dict[str, Array](), []
    for axis in axes:
        values = np.asarray(columns[axis]).tolist()
        order = {value: place for place, value in enumerate(dict.fromkeys(values))}
        places.append([order[value] for value in values])
        found[axis] = np.array(list(order))
    shape = [len(values) for values in found.values()]
    for name in set(columns) - set(axes):
        found[name] = np.empty(shape, np.asarray(columns[name]).dtype)
        found[name][tuple(places)] = columns[name]
    return found


def best(
    columns: Mapping[str, Any], *names: str, score: Callable[[Columns], float] | None = None
) -> dict[str, float] | None:
    """Return the setting with the best score among those where no run diverged.

    Args:
      columns: the runs of one method.
      names: the columns that make a setting.
      score: see :func:`select_then_report`.

    Returns:
      Its values, of equals the first; None if every setting diverged.
    """
    score = score or (lambda rows: float(np.mean(rows["accuracy"])))
    sound = [
        (score(rows), dict(zip(names, values, strict=True)))
        for values, rows in groups(columns, *names)
        if not np.any(rows["diverged"])
    ]
    return max(sound, key=lambda one: one[0])[1] if sound else None


def _parts(runs: Sequence[Run], lanes: int) -> Iterator[list[int]]:
    """The places of the runs of each part; the last one is repeated to the width of the others, so
    that all parts of a method and a recipe share a program.
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


def _together(
    make: Callable[[list[int], Told], Columns], parts: Sequence[list[int]], advanced: Told
) -> Iterator[Columns]:
    """What ``make`` makes of each part, in their order; two are under way at once, so that one is
    compiled while another trains.
    """
    given_up = threading.Event()

    def advance(steps: int) -> None:
        if given_up.is_set():
            raise _GivenUpError
        advanced(steps)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            yield from pool.map(lambda part: make(part, advance), parts)
        finally:  # an interrupt, or an error in one part, ends the others at their next report
            given_up.set()


class _GivenUpError(Exception):
    """Another part failed, or the user interrupted."""


def _part(
    dataset: Dataset, runs: list[Run], store: Store, advanced: Told, metrics: Metrics | None
) -> Columns:
    """The metrics of runs of one method and recipe that train side by side."""
    method, recipe, names = runs[0].method, runs[0].recipe, sorted(runs[0].settings)
    trainer, seeds = _trainer(dataset, method, recipe), np.array([run.seed for run in runs])
    settings = {name: np.array([run.settings[name] for run in runs]) for name in names}
    how: dict[str, Any] = {} if metrics is None else {"metrics": metrics}
    what = {"recipe": recipe.describe(), "program": trainer.digest(tuple(names), **how)}
    what |= {"settings": settings, "seeds": seeds, "data": fingerprint(dataset)}
    taken: list[int] = []

    def tell(steps: int) -> None:
        taken.append(steps)
        advanced(steps)

    found = store.keep(method.label, what, lambda: trainer(settings, seeds, tell, **how))
    if not taken:  # from the disk
        advanced(len(runs) * recipe.steps)
    return found


@functools.lru_cache(maxsize=16)
def _trainer(dataset: Dataset, method: Method, recipe: Recipe) -> Trainer:
    return Trainer(dataset, method, recipe)


def _size(columns: Mapping[str, Any]) -> int:
    """The number of rows."""
    return len(next(iter(columns.values())))


def _row(run: Run) -> dict[str, Any]:
    interval = run.settings.get("interval", 1)
    gradients = run.method.cost(run.recipe.penalty_fraction, interval)
    made = {"method": run.method.label, **run.settings, "seed": run.seed, "gradients": gradients}
    return {**made, **run.tags}


def _column(values: list[Any]) -> Array:
    given = [value for value in values if value is not None]
    missing = "" if isinstance(given[0], str) else np.nan
    return np.array([missing if value is None else value for value in values])


def _equal(column: Array, value: Any) -> Array:
    return np.isnan(column) if isinstance(value, float) and np.isnan(value) else column == value
