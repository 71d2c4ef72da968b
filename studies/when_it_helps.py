"""Table of the page "When it helps", from the committed results.

``python -m studies.when_it_helps`` rewrites the table in ``docs/explanation/when_it_helps.md``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradreg_optax.experiments import results, runs, statistics
from gradreg_optax.experiments.runs import Columns, select
from studies import fine_tuning, language, registered_tasks, strength, unseen

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/explanation/when_it_helps.md"
_MARKS = "<!-- table: python -m studies.when_it_helps -->\n", "<!-- end of table -->\n"
_TUNED, _FIXED, _SELF = "tuned", "r = 0.5", "self-tuned"
_HEAD = ("setting", "samples", "label noise", "epochs", "with", _TUNED, _FIXED, _SELF, "seeds")
_PREFIX = "gain of "


class Row(NamedTuple):
    """A setting and the gains over plain training, in points unless ``nats``.

    Attributes:
      setting: data and network.
      samples: number of training samples.
      noise: label noise, as a fraction.
      epochs: number of epochs.
      extras: batch norm, pretraining, augmentation.
      gains: paired differences of a tuned penalty, of r = 0.5 and of the self-tuned strength.
      report: page with the settings.
      nats: gains are decreases of the test loss.
    """

    setting: str
    samples: int
    noise: float
    epochs: float
    extras: str
    gains: Mapping[str, statistics.Estimate]
    report: str
    nats: bool = False

    def cells(self) -> list[str]:
        """Return the cells of the row as text."""
        spec, unit = ("+.3f", " nats") if self.nats else ("+.1f", "")
        gains = [self.gains.get(name) for name in (_TUNED, _FIXED, _SELF)]
        seeds = next(gain.size for gain in gains if gain is not None)
        shown = [f"{gain:{spec}}{unit}".replace("-", "−") if gain else "" for gain in gains]
        epochs = f"{self.epochs:.0f}" if self.epochs >= 1.5 else f"{self.epochs:.1g}"
        setting = f"[{self.setting}](../reports/{self.report}.md)"
        cells = [setting, f"{self.samples}", f"{100 * self.noise:.0f} %", epochs, self.extras]
        return [*cells, *shown, f"{seeds}"]


def of_compare(found: dict[str, Any]) -> Iterator[Row]:
    """Return the rows of ``gradreg compare``."""
    for name, rows in runs.by(select(found["runs"], role="best"), "dataset").items():
        recipe, of = found["recipes"][name], runs.by(rows, "method")
        over = functools.partial(statistics.points, other=of["SGD"])
        size = int(recipe["train_size"] if recipe["train_size"] == recipe["train_size"] else 4000)
        epochs = recipe["steps"] * recipe["batch_size"] / size
        gains = {_TUNED: over(of["F-GR"]), _SELF: over(of["self-tuned"])}
        title = {"digits": "digits, MLP", "mnist1d": "MNIST-1D, MLP"}[name]
        yield Row(title, size, recipe["label_noise"], epochs, "", gains, "compare")


def of_strength(found: dict[str, Any]) -> Iterator[Row]:
    """Return the rows of ``studies strength`` with SGD or AdamW that the comparison lacks."""
    for cell in strength.cells(found):
        (name, optimizer, part), task = cell.key, strength.TASKS[cell.key[0]]
        recipe = {"label_noise": 0.3, "steps": 3000, "batch_size": 32} | dict(task.recipe)
        known = task.dataset in ("digits", "mnist1d") and recipe["label_noise"] > 0
        if part == "full" and optimizer in ("sgd", "adamw") and name != "MNIST-1D":
            if known and "model" not in recipe:
                continue
            size = recipe["train_size"] - recipe["held_out"]
            epochs = recipe["steps"] * recipe["batch_size"] / size
            gains = {_TUNED: cell.gain(cell.searched), _FIXED: cell.gain(cell.constant[0.5])}
            gains[_SELF] = cell.gain(cell.tuned)
            title = _title(name, task.dataset, str(recipe.get("model", "mlp")))
            noise, nats = recipe["label_noise"], cell.metric == "test_loss"
            yield Row(title, size, noise, epochs, "", gains, "strength", nats)


def _title(name: str, dataset: str, model: str) -> str:
    if dataset == "text":
        return "source code, transformer"
    return f"{name.split(',')[0]}, {model.upper()}"


def of_language(found: dict[str, Any]) -> Iterator[Row]:
    """Return the row of ``studies language``."""
    of, recipe = language.reported(found), found["recipe"]
    names = {_TUNED: "F-GR", _FIXED: "relative, r = 0.5", _SELF: "self-tuned"}
    gains = {name: language.gain(of["AdamW"], of[label]) for name, label in names.items()}
    size = recipe["train_size"] - recipe["held_out"]
    epochs = recipe["steps"] * recipe["batch_size"] / size
    yield Row("source code, transformer", size, 0.0, epochs, "", gains, "language", nats=True)


def of_unseen(found: dict[str, Any]) -> Iterator[Row]:
    """Return the rows of ``studies unseen``."""
    for cell in unseen.cells(found):
        if cell.part == "full":
            recipe = registered_tasks.TASKS[cell.task].recipe
            size = recipe["train_size"] - recipe["held_out"]
            epochs = recipe["steps"] * recipe.get("batch_size", 32) / size
            gains = {_TUNED: cell.gain(cell.constant[cell.best]), _SELF: cell.gain(cell.tuned)}
            if 0.5 in cell.constant:
                gains[_FIXED] = cell.gain(cell.constant[0.5])
            title = cell.task.split(" % label noise")[0]
            title = title.rsplit(", ", 1)[0] if recipe["label_noise"] else title
            title, extras = title.replace(" with batch norm", ""), "batch norm" in cell.task
            yield Row(
                title, size, recipe["label_noise"], epochs, "batch norm" * extras, gains, "unseen"
            )


def of_full_size(found: dict[str, Any]) -> Iterator[Row]:
    """Return the rows of ``studies full-size``."""
    for noise, rows in runs.by(select(found["runs"], role="report"), "noise").items():
        gains = _points(rows, "SGD", {_TUNED: "F-GR", _FIXED: "relative, r = 0.5"})
        extras = "batch norm, augmentation, weight decay"
        epochs = found["recipe"]["epochs"]
        yield Row("Fashion-MNIST, CNN", 60000, noise, epochs, extras, gains, "full_size")


def of_fine_tuning(found: dict[str, Any]) -> Iterator[Row]:
    """Return the rows of ``studies fine-tuning``."""
    table, config = select(found["runs"], role="report"), fine_tuning.Config()
    for (layers, labels), rows in runs.groups(table, "layers", "labels"):
        names = {_TUNED: "F-GR", _FIXED: "relative, r = 0.5", _SELF: "self-tuned"}
        gains = _points(rows, fine_tuning.PLAIN, names)
        size = labels * fine_tuning.CLASSES
        epochs = config.steps * fine_tuning.BATCH / size
        extras = f"pretraining, weight decay, {layers}"
        yield Row("Fashion-MNIST, CNN", size, 0.0, epochs, extras, gains, "fine_tuning")


def _points(rows: Columns, plain: str, names: Mapping[str, str]) -> dict[str, statistics.Estimate]:
    of = runs.by(rows, "method")
    return {name: statistics.points(of[label], of[plain]) for name, label in names.items()}


SOURCES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "notebooks/results/compare": of_compare,
    "studies/results/strength": of_strength,
    "studies/results/language": of_language,
    "studies/results/unseen": of_unseen,
    "studies/results/full_size": of_full_size,
    "studies/results/fine_tuning": of_fine_tuning,
}


def table() -> str:
    """Return the table as Markdown, from the results that are committed."""
    head = [_PREFIX + name if name in (_TUNED, _FIXED, _SELF) else name for name in _HEAD]
    lines = [head, ["---"] * len(head)]
    for folder, rows_of in SOURCES.items():
        if (ROOT / folder / results.FILE).exists():
            lines += [row.cells() for row in rows_of(results.load(ROOT / folder))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(text: str) -> str:
    """Return the page with its table replaced.

    Args:
      text: the page as it is.

    Raises:
      ValueError: the page has no marks around its table.
    """
    before, mark, rest = text.partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if not (mark and end):
        raise ValueError(f"page: no lines {_MARKS} around the table. Restore them.")
    return f"{before}{mark}\n{table()}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
