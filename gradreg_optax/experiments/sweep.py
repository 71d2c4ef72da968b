"""Accuracy over gamma x epsilon x seeds: settings chosen on one set of seeds and reported on
another, with paired tests.

The runs of a method are cut into units of a few dozen lanes. Every finished unit is on disk at
once, under a name that says what it depends on, so that a second start continues where the first
one ended, and a changed configuration starts afresh.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gradreg_optax.experiments import data, models, plots, statistics
from gradreg_optax.experiments.parts import Parts
from gradreg_optax.experiments.training import METHODS, OptimizerName, Recipe, Trainer

Array: TypeAlias = npt.NDArray[Any]
Setting: TypeAlias = dict[str, float]
Lane: TypeAlias = tuple[Setting, int]  # a setting and a seed

METRICS = ("accuracy", "train_loss", "grad_norm", "diverged")
PAIRS = (("F-GR", "SGD"), ("F-GR", "DB"), ("F-GR", "B-GR"), ("DB", "SGD"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of ``gradreg sweep``."""

    output: Path = Path("results/sweep")
    """Folder for results.json, the figure, and the finished parts of the sweep."""
    seed: int = 0
    """The first seed."""
    seeds: int = 10
    """Number of seeds that settings are chosen on."""
    report_seeds: int = 10
    """Number of further seeds that the chosen settings are reported on."""
    methods: tuple[Literal["SGD", "DB", "B-GR", "C-GR", "F-GR"], ...] = (
        "SGD",
        "DB",
        "B-GR",
        "F-GR",
    )
    """Methods to sweep."""
    gammas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    """Values of the regularization coefficient."""
    epsilons: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Values of the ascent step of the differences."""
    dataset: str = "digits"
    """digits, fashion-mnist, mnist, cifar10, or the path of an .npz file with x_train, y_train,
    x_test, y_test."""
    data_dir: Path | None = None
    """Folder with the data set's files; by default $GRADREG_DATA, the Debian package, the cache,
    the network."""
    model: models.Name = "mlp"
    """Network."""
    width: int = 64
    """Units per hidden layer (mlp), or channels of the first stage (cnn, resnet)."""
    depth: int = 1
    """Hidden layers (mlp), convolutions beyond the first (cnn), residual blocks per stage
    (resnet)."""
    train_size: int | None = 300
    """Number of training samples, None for all of them."""
    test_size: int | None = None
    """Number of test samples, by default 1000 of digits and all of the others."""
    label_noise: float = 0.3
    """Share of the training samples that get a wrong label."""
    batch_size: int = 32
    """Samples per step."""
    steps: int = 3000
    """Training steps."""
    learning_rate: float = 0.2
    """First learning rate; it falls to zero along a cosine."""
    optimizer: OptimizerName = "sgd"
    """Optimizer behind the regularizer."""
    lanes: int = 40
    """Runs that train side by side; memory grows with it."""
    redraw: bool = False
    """Draw the figure from the results on disk, without training."""


def run(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Runs the sweep, or what is missing of it.

    Args:
      config: the settings.
      progress: show a progress bar.

    Returns:
      "seeds" and "report_seeds"; "methods", a list of dicts with label, "settings" (arrays over the
      settings), the metrics of the selection (shape (settings, seeds)), "chosen" (the index of the
      setting with the best mean accuracy among those where no run diverged, or -1), and "report",
      the metrics of that setting on the report seeds.

    Raises:
      ValueError: settings that do not fit together.
      FileNotFoundError: the data are not there.
    """
    for name in ("seeds", "report_seeds", "lanes"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    dataset, recipe = data.load(config.dataset, config.data_dir), _recipe(config)
    seeds, report_seeds = (
        config.seed + np.arange(config.seeds),
        config.seed + config.seeds + np.arange(config.report_seeds),
    )
    methods = []
    with tqdm(total=_units(config), desc="sweep", unit="unit", disable=not progress) as bar:
        parts = Parts(config.output, dataset, bar.update)
        for label in config.methods:
            unit = _Unit(parts, label, dataset, recipe, progress)
            methods.append(
                _sweep(unit, settings_of(config, label), seeds, report_seeds, config.lanes)
            )
    return {
        "dataset": dataset.name,
        "seeds": seeds,
        "report_seeds": report_seeds,
        "methods": methods,
    }


def settings_of(config: Config, label: str) -> list[Setting]:
    """The grid of a method: gamma x epsilon, gamma alone, or the one setting of a method without
    hyperparameters.
    """
    grids = {"gamma": config.gammas, "epsilon": config.epsilons}
    names = METHODS[label].settings
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(grids[name] for name in names))
    ]


def table(found: dict[str, Any]) -> str:
    """The chosen settings with their accuracy on the report seeds, and the paired differences
    between methods.
    """
    sizes = (
        f"chosen on {len(found['seeds'])} seeds, reported on {len(found['report_seeds'])} others"
    )
    lines = [
        f"{found['dataset']}: settings {sizes}",
        f"{'method':<7} {'gamma':>7} {'epsilon':>8} {'test accuracy %':>16} {'diverged':>9}",
    ]
    for method in found["methods"]:
        lost = f"{int(np.sum(method['diverged']))}/{np.size(method['accuracy'])}"
        setting = {
            name: f"{values[method['chosen']]:g}"
            for name, values in method["settings"].items()
            if method["chosen"] >= 0
        }
        accuracy = _accuracy(found, method["label"])
        shown = (
            "every setting diverged"
            if accuracy is None
            else f"{statistics.estimate(100 * accuracy):.2f}"
        )
        lines.append(
            f"{method['label']:<7} {setting.get('gamma', ''):>7} {setting.get('epsilon', ''):>8}"
            f" {shown:>16} {lost:>9}"
        )
    lines.append("")
    for first, second in PAIRS:
        a, b = _accuracy(found, first), _accuracy(found, second)
        if a is not None and b is not None:
            gain = statistics.paired(100 * a, 100 * b)
            lines.append(
                f"{f'{first} minus {second}':<16} {gain:+.2f}   p = {gain.p:.2g} (paired t-test,"
                f" {gain.size} seeds)"
            )
    return "\n".join(lines)


def plot(found: dict[str, Any], output: Path) -> list[Path]:
    """Draws sweep.png: mean accuracy over gamma and the signed ascent step, and the chosen settings
    on the report seeds.
    """
    made, (left, right) = plots.figure(2, width=6.0, height=4.2)
    _draw_grid(made, left, found)
    _draw_report(right, found)
    return [plots.save(made, output, "sweep")]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Trains some lanes of one method, or reads them from disk; the trainer is made when the first
    lane is missing.
    """

    parts: Parts
    label: str
    dataset: data.Dataset
    recipe: Recipe
    progress: bool
    made: list[Trainer] = dataclasses.field(default_factory=list)

    def __call__(self, lanes: list[Lane], width: int) -> dict[str, Array]:
        what = {"lanes": lanes, "width": width, "recipe": dataclasses.asdict(self.recipe)}
        return self.parts.keep(self.label, what, lambda: self._train(lanes, width))

    def _train(self, lanes: list[Lane], width: int) -> dict[str, Array]:
        if not self.made:
            self.made.append(Trainer(self.dataset, METHODS[self.label], self.recipe))
        full = lanes + [lanes[-1]] * (width - len(lanes))  # one width, one compilation
        settings = {
            name: np.array([setting[name] for setting, _ in full])
            for name in METHODS[self.label].settings
        }
        found = self.made[0](settings, np.array([seed for _, seed in full]), progress=self.progress)
        return {name: found[name][: len(lanes)].astype(float) for name in METRICS}


def _sweep(
    unit: _Unit, settings: list[Setting], seeds: Array, report_seeds: Array, most: int
) -> dict[str, Any]:
    """Selection and report of one method."""
    width = min(most, len(settings) * len(seeds))
    lanes = [(setting, int(seed)) for setting in settings for seed in seeds]
    found = _all(unit, lanes, width, (len(settings), len(seeds)))
    chosen = choose(found["accuracy"], found["diverged"])
    grid = {name: np.array([setting[name] for setting in settings]) for name in settings[0]}
    report = (
        _all(
            unit,
            [(settings[chosen], int(seed)) for seed in report_seeds],
            width,
            (len(report_seeds),),
        )
        if chosen >= 0
        else {}
    )
    return {"label": unit.label, "settings": grid, **found, "chosen": chosen, "report": report}


def choose(accuracy: Array, diverged: Array) -> int:
    """The setting with the best mean accuracy among those where no run diverged; -1 if there is
    none.

    Args:
      accuracy: shape (settings, seeds).
      diverged: likewise, nonzero where the run diverged.

    Returns:
      The index of the setting, the first one of equals.
    """
    sound = ~np.any(np.asarray(diverged) > 0, axis=1)
    means = np.where(sound, np.mean(np.where(sound[:, None], accuracy, 0), axis=1), -np.inf)
    return int(np.argmax(means)) if sound.any() else -1


def _all(unit: _Unit, lanes: list[Lane], width: int, shape: tuple[int, ...]) -> dict[str, Array]:
    parts = [unit(part, width) for part in _batched(lanes, width)]
    return {name: np.concatenate([part[name] for part in parts]).reshape(shape) for name in METRICS}


def _batched(lanes: list[Lane], width: int) -> Iterator[list[Lane]]:
    for start in range(0, len(lanes), width):
        yield lanes[start : start + width]


def _units(config: Config) -> int:
    """Number of units of the whole sweep, if no method diverges throughout."""
    total = 0
    for label in config.methods:
        runs = len(settings_of(config, label)) * config.seeds
        width = min(config.lanes, runs)
        total += -(-runs // width) - (-config.report_seeds // width)
    return total


def _recipe(config: Config) -> Recipe:
    shared = {field.name for field in dataclasses.fields(Recipe)} & {
        field.name for field in dataclasses.fields(Config)
    }
    test_size = (
        1000 if config.dataset == "digits" and config.test_size is None else config.test_size
    )
    chosen = {name: getattr(config, name) for name in shared} | {"test_size": test_size}
    return Recipe(**chosen, eigenvalue=False)


def _accuracy(found: dict[str, Any], label: str) -> Array | None:
    """Accuracy on the report seeds, None where a method is not there or has no setting."""
    for method in found["methods"]:
        if method["label"] == label and method["chosen"] >= 0:
            return np.asarray(method["report"]["accuracy"])
    return None


def _columns(found: dict[str, Any]) -> tuple[list[float], list[tuple[str, dict[float, float]]]]:
    """The gammas, and a column of mean accuracies by gamma for each method and ascent step, in the
    order of the signed step.
    """
    columns: dict[tuple[float, str], dict[float, float]] = {}
    for method in found["methods"]:
        side = {"B-GR": -1.0, "DB": 0.0, "F-GR": 1.0}.get(method["label"])
        if side is None:
            continue
        gammas = method["settings"]["gamma"]
        steps = method["settings"].get("epsilon", np.zeros(len(gammas)))
        for gamma, step, accuracy, diverged in zip(
            gammas, steps, method["accuracy"], method["diverged"], strict=True
        ):
            mean = np.nan if np.any(np.asarray(diverged) > 0) else float(np.mean(accuracy))
            columns.setdefault((side * step, method["label"]), {})[float(gamma)] = mean
    names = [
        (f"{label} {abs(step):g}" if step else label, columns[step, label])
        for step, label in sorted(columns)
    ]
    return sorted({gamma for _, column in names for gamma in column}), names


def _draw_grid(made: Any, axis: Any, found: dict[str, Any]) -> None:
    gammas, columns = _columns(found)
    if not columns:  # no method with a gamma
        axis.set_axis_off()
        return
    values = np.array(
        [[100 * column.get(gamma, np.nan) for _, column in columns] for gamma in gammas]
    )
    plain = [
        100 * float(np.mean(method["accuracy"]))
        for method in found["methods"]
        if method["label"] == "SGD" and method["chosen"] >= 0
    ]
    image = axis.imshow(
        np.ma.masked_invalid(values),
        origin="lower",
        aspect="auto",
        cmap="viridis",
        vmin=plain[0] if plain else None,
    )
    axis.set_facecolor("0.85")
    axis.set_xticks(range(len(columns)), [name for name, _ in columns], rotation=45, ha="right")
    axis.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axis.set(
        xlabel="method and ascent step $\\epsilon$",
        ylabel="$\\gamma$",
        title=f"{found['dataset']}: test accuracy %",
    )
    made.colorbar(
        image, ax=axis, extend="min", label="darkest: not above SGD; grey: a run diverged"
    )


def _draw_report(axis: Any, found: dict[str, Any]) -> None:
    labels = [method["label"] for method in found["methods"]]
    for position, label in enumerate(labels):
        accuracy = _accuracy(found, label)
        if accuracy is not None:
            mean, error, _ = statistics.estimate(100 * accuracy)
            axis.plot(
                np.full(len(accuracy), position),
                100 * accuracy,
                ".",
                color=plots.COLORS[label],
                alpha=0.35,
            )
            axis.errorbar(position, mean, error, fmt="_", ms=24, mew=2.5, color=plots.COLORS[label])
    axis.set_xticks(range(len(labels)), labels)
    axis.set(
        ylabel="test accuracy %",
        title=f"chosen setting on {len(found['report_seeds'])} other seeds",
    )
