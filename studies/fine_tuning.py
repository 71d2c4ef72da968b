"""Fine-tuning on few labels: a network that is pretrained on one half of the classes of
Fashion-MNIST learns the other half, with all layers or with low-rank updates (LoRA).

The learning rate and the weight decay of AdamW are tuned without a penalty; every penalty then
tunes its own coefficient with them. All tuning is on seeds and validation images of its own.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import make_train_step
from gradreg_optax.experiments import common, data, models, plots, report, runs, statistics
from gradreg_optax.experiments.data import Array
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import METHODS, SELF_TUNED, Method, cross_entropy
from studies import fashion_mnist, flatness, networks
from studies.comparison import F_GR, Way, best, shared, tagged

CLASSES, RANK = 5, 4  # of each half, and of the low-rank updates
LAYERS = ("all layers", "LoRA")
RATES, DECAYS = (3e-4, 1e-3, 3e-3), (0.01, 0.1)  # of AdamW
HELD_OUT = 0.2  # the fraction of the labels that the self-tuned strength does not train on
BATCH, _PRETRAINING_RATE = 32, 1e-3
_MODEL = networks.strided_cnn(CLASSES, norm=False)


PLAIN = "AdamW"
WAYS = {
    PLAIN: Way(Method(PLAIN, None)),
    "AdamW, twice the steps": Way(Method(PLAIN, None), longer=2),
    "F-GR": Way(F_GR, (0.03, 0.1, 0.3)),
    "lazy F-GR": Way(F_GR, (0.01, 0.03, 0.1), 0.25, 4),
    "SAM": Way(METHODS["SAM"], (0.03, 0.1, 0.3)),
    "relative, r = 0.5": Way(METHODS["relative"], (0.5,)),
    "self-tuned": Way(SELF_TUNED),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies fine-tuning``."""

    output: Path = Path("results/fine_tuning")
    seeds: int = 5
    """Number of evaluation seeds; everything is paired by seed."""
    choose_seeds: int = 3
    """Number of tuning seeds."""
    labels: tuple[int, ...] = (10, 50, 200)
    """Labels of each class."""
    steps: int = 300
    """Steps of fine-tuning."""
    pretraining_steps: int = 3000
    """Steps of AdamW on the first half of the classes."""
    validation_size: int = 2000
    """Images of the second half that the tuning runs are scored on."""
    data_dir: Path | None = None
    """Directory with the files of Fashion-MNIST; by default $GRADREG_DATA, the Debian package, the
    cache, or a download."""


class Halves(NamedTuple):
    """Images and labels: of the classes for pretraining, and of the others to train and test on."""

    first: tuple[Array, Array]
    second: tuple[Array, Array]
    test: tuple[Array, Array]


def halves(dataset: data.Dataset) -> Halves:
    """Return the two halves of the classes; both count from 0."""

    def of(x: Array, y: Array, least: int) -> tuple[Array, Array]:
        rows = (y >= least) & (y < least + CLASSES)
        return x[rows], (y[rows] - least).astype(np.int32)

    train, test = (dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)
    return Halves(of(*train, 0), of(*train, CLASSES), of(*test, CLASSES))


def run(config: Config) -> dict[str, Any]:
    """Pretrain once, then tune and evaluate every method in every setting.

    Args:
      config: the settings.

    Returns:
      "runs", one row a run: its "layers", its "labels" of each class, its "role", "choose" or
      "report", its "method", "learning_rate", "weight_decay" and "value", the "gradients" per step
      of plain AdamW, "accuracy", "ece", "test_loss" and "processor_seconds".

    Raises:
      CommandError: data that are not there.
    """
    lab = Lab(config, halves(fashion_mnist.load(config.data_dir)))
    store, found = runs.Store(config.output), []
    for layers, labels in itertools.product(LAYERS, config.labels):
        what = common.settings(dataclasses.replace(config, labels=(labels,), data_dir=None))
        make = functools.partial(lab.race, layers, labels)
        rows = store.keep("race", what | {"layers": layers}, make)
        found.append(tagged(rows, layers=layers, labels=labels))
    return {"runs": runs.stack(*found)}


class Lab:
    """The data and the pretrained network, with one compiled program for each way to train."""

    def __init__(self, config: Config, data: Halves) -> None:
        """Keep the data on the device.

        Args:
          config: the settings.
          data: the halves.
        """
        self.config, self.data = config, data
        self.base = functools.cache(self._pretrained)
        self.program = functools.cache(self._program)
        self.pool = tuple(map(jnp.asarray, data.second))

    def race(self, layers: str, labels: int) -> Columns:
        """Tune, then evaluate, with so many labels of each class."""
        config, last = self.config, self.config.seed + self.config.seeds
        evaluation = range(config.seed, last)
        tuning = range(last, last + config.choose_seeds)
        one = functools.partial(self.rows, layers, labels)
        grid = [(rate, decay, 0.0) for rate in RATES for decay in DECAYS]
        found = list(one("choose", PLAIN, grid, tuning))
        optimizer = best(found, "learning_rate", "weight_decay")
        for label, way in WAYS.items():
            tried = [(*optimizer, value) for value in way.values]
            if len(tried) > 1:
                rows = list(one("choose", label, tried, tuning))
                found, tried = found + rows, [(*optimizer, *best(rows, "value"))]
            found += one("report", label, tried, evaluation)
        return runs.columns(found)

    def rows(
        self, layers: str, labels: int, role: str, label: str, tried: Any, seeds: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Train all settings on all seeds."""
        way = WAYS[label]
        for setting, seed in itertools.product(tried, seeds):
            row = {"role": role, "method": label, "seed": seed, "gradients": way.cost}
            row |= dict(zip(("learning_rate", "weight_decay", "value"), setting, strict=True))
            yield row | self.train(layers, label, setting, self.split(role, labels, seed), seed)

    def split(self, role: str, labels: int, seed: int) -> tuple[Array, Any]:
        """Return the positions of the labelled images, and what a run of a role is scored on."""
        rng = np.random.default_rng([seed, 21])
        images, y = self.data.second
        order = rng.permutation(len(y))
        of_class = [order[y[order] == one][:labels] for one in range(CLASSES)]
        drawn = rng.permutation(np.concatenate(of_class))
        if role == "report":
            return drawn, self.data.test
        others = np.setdiff1d(order, drawn)[: self.config.validation_size]
        return drawn, (images[others], y[others])

    def train(
        self, layers: str, label: str, setting: Any, split: tuple[Array, Any], seed: int
    ) -> dict[str, Any]:
        """Fine-tune once and return the metrics."""
        (drawn, (images, y)), key = split, jax.random.key(seed)
        steps = self.config.steps * WAYS[label].longer
        run = functools.partial(
            self.program(layers, WAYS[label]._replace(longer=1)), key, jnp.asarray(setting)
        )
        rows = jnp.asarray(np.resize(drawn, CLASSES * max(self.config.labels)))
        run(rows, len(drawn), 0)  # compiles
        start = time.process_time()
        params = jax.block_until_ready(run(rows, len(drawn), steps))
        spent = time.process_time() - start
        found = _metrics(adapted(params, self.base()), jnp.asarray(images), jnp.asarray(y))
        metrics = {name: float(value) for name, value in found.items()}
        diverged = not np.isfinite(metrics["test_loss"])
        return metrics | {"diverged": diverged, "processor_seconds": spent}

    def _program(self, layers: str, way: Way) -> Callable[..., PyTree]:
        """Return ``(key, setting, rows, labelled, steps) -> params``, compiled."""
        base = self.base()
        loss = cross_entropy(lambda params, x: _MODEL.apply(adapted(params, base), x))

        @jax.jit
        def run(key: Any, setting: Any, rows: Any, labelled: Any, steps: Any) -> PyTree:
            kept = jnp.int32(labelled * (1 - HELD_OUT)) if way.method.evaluations else labelled
            init, step = make_train_step(
                loss,
                _optimizer(setting, steps),
                way.regularizer(setting[2]),
                penalty_fraction=way.fraction,
                donate=False,
            )

            def batch(key: Any, least: Any, most: Any) -> Any:
                chosen = rows[jax.random.randint(key, (BATCH,), least, most)]
                return networks.scaled(self.pool[0][chosen]), self.pool[1][chosen]

            def one(place: jax.Array, state: Any) -> Any:
                a, b = jax.random.split(jax.random.fold_in(key, place))
                more = {"held_out": batch(b, kept, labelled)} if way.method.evaluations else {}
                return step(state, batch(a, 0, kept), **more)[0]

            first, key = jax.random.split(key)
            state = init(start_of(layers, base, first))
            return jax.lax.fori_loop(0, steps, one, state).params

        return run

    def _pretrained(self) -> PyTree:
        """Train the network on the first half of the classes."""
        steps = self.config.pretraining_steps
        images, y = map(jnp.asarray, self.data.first)
        optimizer = optax.adamw(optax.cosine_decay_schedule(_PRETRAINING_RATE, steps))
        init, step = make_train_step(cross_entropy(_MODEL.apply), optimizer, donate=False)

        @jax.jit
        def train(key: jax.Array) -> PyTree:
            def one(place: jax.Array, state: Any) -> Any:
                drawn = jax.random.randint(jax.random.fold_in(key, place), (128,), 0, len(y))
                return step(state, (networks.scaled(images[drawn]), y[drawn]))[0]

            return jax.lax.fori_loop(0, steps, one, init(_MODEL.init(key))).params

        return train(jax.random.key(2023))


def start_of(layers: str, base: PyTree, key: jax.Array) -> PyTree:
    """Return the parameters that fine-tuning starts from; the last layer is new."""
    keys = jax.random.split(key, len(base["layers"]) + 1)
    head = models.dense(keys[-1], *base["head"]["kernel"].shape)
    if layers == LAYERS[0]:
        return {"layers": base["layers"], "head": head}
    low_rank = [
        {
            "down": models.dense(k, layer["kernel"].shape[0], RANK)["kernel"],
            "up": jnp.zeros((RANK, layer["kernel"].shape[1])),
        }
        for k, layer in zip(keys[:-1], base["layers"], strict=True)
    ]
    return {"low_rank": low_rank, "head": head}


def adapted(params: PyTree, base: PyTree) -> PyTree:
    """Return the parameters of the network: those given, or the base with low-rank updates."""
    if "layers" in params:
        return params
    layers = [
        layer | {"kernel": layer["kernel"] + update["down"] @ update["up"]}
        for layer, update in zip(base["layers"], params["low_rank"], strict=True)
    ]
    return {"layers": layers, "head": params["head"]}


def _optimizer(setting: Any, steps: Any) -> optax.GradientTransformation:
    def rate(step: jax.Array) -> jax.Array:
        return setting[0] * (1 + jnp.cos(jnp.pi * step / jnp.maximum(steps, 1))) / 2

    return optax.adamw(rate, weight_decay=setting[1])


@jax.jit
def _metrics(params: PyTree, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    logits = _MODEL.apply(params, networks.scaled(images))
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    found = {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels), "test_loss": loss}
    return found | {"ece": flatness.calibration_error(jax.nn.softmax(logits), labels)}


def table(results: dict[str, Any]) -> Report:
    """Return accuracy, calibration, paired differences and cost for each setting as text."""
    found, parts = select(results["runs"], role="report"), list[Table | str]()
    for (layers, labels), rows in runs.groups(found, "layers", "labels"):
        of_methods = runs.by(rows, "method")
        plain = of_methods[PLAIN]
        over, chance = report.minus(plain, "+.2f")
        calibration, calibration_chance = report.minus(plain, "+.2f", "ece")
        columns: dict[str, report.Column] = {
            "value": _value,
            "test accuracy %": report.percent(),
            "minus AdamW": over,
            "p": chance,
            "minus SAM": report.minus(of_methods["SAM"], "+.2f")[0],
            "ECE": report.percent("ece"),
            "ECE minus AdamW": calibration,
            "p of ECE": calibration_chance,
            "gradients": shared("gradients", ".3g"),
            "processor s": report.mean("processor_seconds", ".2f"),
        }
        title = f"{layers}, {labels} labels a class, {len(plain['seed'])} seeds; AdamW with"
        title += f" learning rate {plain['learning_rate'][0]:g}"
        title += f" and weight decay {plain['weight_decay'][0]:g}"
        parts += [report.table(title, of_methods, columns), ""]
    return Report(
        *parts,
        "means over evaluation seeds ± standard error; paired differences in points; ECE: expected"
        " calibration error in points; value: γ = ε, ρ or r, tuned on other seeds; gradients: cost"
        " relative to a step of AdamW. The self-tuned strength trains on four fifths of the labels"
        " and watches the others.",
    )


def _value(rows: report.Rows) -> str:
    value = rows["value"][0]
    return f"{value:g}" if value else ""


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw fine_tuning.png: the gain over AdamW against the number of labels."""
    found = select(results["runs"], role="report")
    made, axes = plots.figure(len(LAYERS), width=5.0, sharey=True)
    for axis, (layers, rows) in zip(axes, runs.by(found, "layers").items(), strict=True):
        of_labels = runs.by(rows, "labels")
        for label in [label for label in runs.by(rows, "method") if label != PLAIN]:
            gains = [
                statistics.points(select(one, method=label), select(one, method=PLAIN))
                for one in of_labels.values()
            ]
            plots.errors(axis, list(of_labels), gains, fmt="o-", label=label)
        axis.axhline(0, color="k", lw=0.6)
        axis.set(xscale="log", xlabel="labels of each class", title=layers)
    axes[0].set_ylabel("gain in test accuracy, points")
    axes[0].legend(frameon=False, fontsize=8)
    return plots.save(made, output / "fine_tuning", formats)
