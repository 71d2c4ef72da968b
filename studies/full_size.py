"""All of Fashion-MNIST with a usual recipe: batch norm, augmentation, weight decay and a cosine.

Coefficients are tuned on a third of the training images with validation images of their own. Every
finished run is kept, so the study resumes after an interrupt; seeds are the outermost loop.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import TrainState, TrainStep, make_train_step
from gradreg_optax.experiments import common, data, plots, report, runs, statistics
from gradreg_optax.experiments.data import Array
from gradreg_optax.experiments.report import Number, Report
from gradreg_optax.experiments.runs import Columns, select
from gradreg_optax.experiments.trainer import METHODS, cross_entropy
from studies import fashion_mnist, networks
from studies.comparison import F_GR, Way, best, shared

RATE, DECAY, SHIFT = 0.1, 5e-4, 2  # learning rate, weight decay, pixels
TUNING_SEED = 1000
_DEPENDS = ("epochs", "tuning_size", "tuning_epochs", "batch_size")
_CHUNK = 156  # steps of a program
_STATISTICS, _MEASURED = 2000, 10000  # images for batch norm, and for the training loss
_MODEL = networks.strided_cnn(10, (24, 48))


WAYS = {
    "SGD": Way(METHODS["SGD"]),
    "F-GR": Way(F_GR, (0.1, 0.2, 0.4)),
    "lazy F-GR": Way(F_GR, (0.025, 0.05, 0.1), 0.25, 4),
    "SAM": Way(METHODS["SAM"], (0.05, 0.1, 0.2)),
    "relative, r = 0.5": Way(METHODS["relative"], (0.5,)),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``python -m studies full-size``."""

    output: Path = Path("results/full_size")
    seeds: int = 3
    """Number of evaluation seeds; everything is paired by seed."""
    noises: tuple[float, ...] = (0.0, 0.2)
    """Fractions of the training labels that are wrong."""
    epochs: int = 15
    """Epochs on all training images."""
    tuning_size: int = 20000
    """Training images of the tuning runs; a quarter as many others validate them."""
    tuning_epochs: int = 6
    """Epochs of the tuning runs."""
    batch_size: int = 128
    """Images in a step."""
    data_dir: Path | None = None
    """Directory with the files of Fashion-MNIST; by default $GRADREG_DATA, the Debian package, the
    cache, or a download."""


class Task(NamedTuple):
    """Images to train on and to evaluate on: positions in the data set, and labels."""

    rows: Array
    labels: Array
    test: Array
    epochs: int


def run(config: Config) -> dict[str, Any]:
    """Tune the coefficients, then train every method on every seed.

    Args:
      config: the settings.

    Returns:
      "runs", one row a run: its "noise", its "role", "choose" or "report", its "method" and
      "value", its "gradients" per step, its "accuracy", "test_loss" and "train_loss", and its
      "seconds" and "processor_seconds" without compilation.

    Raises:
      CommandError: data that are not there.
    """
    dataset, rows = fashion_mnist.load(config.data_dir), []
    one = functools.partial(_kept, config, dataset, runs.Store(config.output))
    chosen = dict[tuple[float, str], float]()
    for noise in config.noises:
        for label, way in WAYS.items():
            tried = [one("choose", noise, TUNING_SEED, label, value) for value in way.values]
            rows += tried if len(tried) > 1 else []
            (chosen[noise, label],) = best(tried, "value")
    for seed in range(config.seed, config.seed + config.seeds):
        for (noise, label), value in chosen.items():
            rows.append(one("report", noise, seed, label, value))
    return {"recipe": dataclasses.asdict(config), "runs": runs.columns(rows)}


def _kept(config: Config, dataset: data.Dataset, store: runs.Store, *what: Any) -> dict[str, Any]:
    """Return the row of a run, from the disk if it is there."""
    role, noise, seed, label, value = what
    way = WAYS[label]
    same = {name: getattr(config, name) for name in _DEPENDS}
    row = {"role": role, "noise": noise, "seed": seed, "method": label, "value": value}
    row["gradients"] = way.cost
    if role == "choose" and len(way.values) == 1:
        return row | {"accuracy": 1.0, "diverged": False}

    def make() -> dict[str, Any]:
        task = split(config, dataset, role, noise, seed)
        return train(way, value, task, dataset, batch=config.batch_size, seed=seed)

    return row | store.keep(f"{role}-{label}", same | {"run": list(what)}, make)


def split(config: Config, dataset: data.Dataset, role: str, noise: float, seed: int) -> Task:
    """Draw the images and the label noise of a seed.

    Tuning runs validate on training images; the test images serve the evaluation only.
    """
    if role == "report":
        drawn = data.draw(dataset, seed, label_noise=noise)
        return Task(drawn.train, drawn.train_labels, drawn.test, config.epochs)
    drawn = data.draw(dataset, seed, config.tuning_size * 5 // 4, label_noise=noise)
    size = config.tuning_size
    return Task(
        drawn.train[:size], drawn.train_labels[:size], drawn.train[size:], config.tuning_epochs
    )


def train(
    way: Way, value: float, task: Task, dataset: data.Dataset, *, batch: int, seed: int
) -> dict[str, Any]:
    """Train one network and return its metrics."""
    rng, size = np.random.default_rng(seed), len(task.rows) // batch * batch
    orders = [rng.permutation(task.rows)[:size] for _ in range(task.epochs)]
    order = np.concatenate(orders).reshape(-1, batch)
    labels = dataset.labels.copy()
    labels[task.rows] = task.labels
    pool = jnp.asarray(dataset.inputs), jnp.asarray(labels)
    total, key = jnp.float32(len(order)), jax.random.key(seed)
    advance = functools.partial(_program(way, batch), pool, value=value, total=total, key=key)
    state = _train_step(way, value, total).init(_MODEL.init(key))
    state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)  # no weak types: one program
    advance(state, np.resize(order, (_CHUNK, batch)), 0)  # compiles
    start, processor = time.perf_counter(), time.process_time()
    for first in range(0, len(order), _CHUNK):
        chunk = order[first : first + _CHUNK]
        padded = np.resize(chunk, (_CHUNK, batch))
        state = advance(state, padded, len(chunk))
    state.step.block_until_ready()
    found = {"seconds": time.perf_counter() - start}
    found["processor_seconds"] = time.process_time() - processor
    images, test = augment(key, pool[0][task.rows[:_STATISTICS]]), task.test
    measure = functools.partial(
        _metrics, state.params, networks.batch_statistics(state.params, networks.scaled(images))
    )
    metrics = measure(pool[0][test], jnp.asarray(dataset.labels[test]))
    seen = task.rows[:_MEASURED]
    metrics["train_loss"] = measure(pool[0][seen], pool[1][seen])["test_loss"]
    found |= {name: float(metric) for name, metric in metrics.items()}
    return found | {"diverged": not np.isfinite(found["test_loss"])}


@functools.lru_cache(maxsize=len(WAYS))
def _program(way: Way, batch: int) -> Callable[..., TrainState]:
    """Return the compiled program of some steps."""

    @jax.jit
    def advance(
        pool: Any, state: TrainState, order: Any, count: Any, *, value: Any, total: Any, key: Any
    ) -> TrainState:
        step = _train_step(way, value, total).step

        def one(place: jax.Array, state: TrainState) -> TrainState:
            images = augment(jax.random.fold_in(key, state.step), pool[0][order[place]])
            return step(state, (networks.scaled(images), pool[1][order[place]]))[0]

        last: TrainState = jax.lax.fori_loop(0, count, one, state)
        return last

    return advance


def _train_step(way: Way, value: Any, total: Any) -> TrainStep:
    def rate(step: jax.Array) -> jax.Array:
        return RATE * (1 + jnp.cos(jnp.pi * step / total)) / 2

    sgd = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, momentum=0.9))
    loss, regularizer = cross_entropy(_MODEL.apply), way.regularizer(value)
    return make_train_step(loss, sgd, regularizer, penalty_fraction=way.fraction, donate=False)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Flip images at random and shift them by up to two pixels along each side."""
    flip, shift = jax.random.split(key)
    flipped = jax.random.bernoulli(flip, 0.5, (len(images), 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    starts = jax.random.randint(shift, (len(images), 2), 0, 2 * SHIFT + 1)

    def cut(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, starts)


@jax.jit
def _metrics(params: Any, given: Any, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    logits = networks.predict(params, networks.scaled(images), given)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = jnp.argmax(logits, axis=-1) == labels
    return {"accuracy": jnp.mean(right), "test_loss": jnp.mean(loss)}


def table(results: dict[str, Any]) -> Report:
    """Return accuracy, paired differences to SGD and to SAM, losses, and cost as text."""
    found, recipe = select(results["runs"], role="report"), results["recipe"]
    tables = []
    for (noise,), rows in runs.groups(found, "noise"):
        of_methods = runs.by(rows, "method")
        plain = of_methods["SGD"]
        over, chance = report.minus(plain, "+.2f")
        columns: dict[str, report.Column] = {
            "value": _value,
            "test accuracy %": report.percent(spec=".2f"),
            "minus SGD": over,
            "p": chance,
            "minus SAM": report.minus(of_methods["SAM"], "+.2f")[0],
            "test loss": report.mean("test_loss", ".3f"),
            "train loss": report.mean("train_loss", ".3f"),
            "gradients": shared("gradients", ".3g"),
            "processor s": report.mean("processor_seconds", ".0f"),
            "relative to SGD": _slower(plain),
        }
        seeds = len(plain["seed"])
        title = f"{100 * noise:.0f} % label noise, {seeds} seeds"
        tables.append(report.table(title, of_methods, columns))
    text = (
        f"{recipe['epochs']} epochs on 60 000 images, batches of {recipe['batch_size']}, momentum"
        " 0.9, weight decay 0.0005, cosine, shifts and flips. Means over seeds ± standard error,"
        " paired differences in points; value: γ = ε, ρ or r, tuned on other images; train loss: on"
        " the noisy labels, without augmentation; processor s: of the training on one core."
    )
    return Report(*(part for one in tables for part in (one, "")), text)


def _value(rows: report.Rows) -> str:
    value = rows["value"][0]
    return f"{value:g}" if value else ""


def _slower(plain: Columns) -> report.Column:
    def cell(rows: report.Rows) -> Number:
        ratio = rows["processor_seconds"] / plain["processor_seconds"]
        return Number(statistics.estimate(ratio), ".2f")

    return cell


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw full_size.png: the gain over SGD against the processor time, for each noise level."""
    groups = list(runs.groups(select(results["runs"], role="report"), "noise"))
    made, axes = plots.figure(len(groups), width=5.0)
    for axis, ((noise,), rows) in zip(axes, groups, strict=True):
        of_methods = runs.by(rows, "method")
        for place, (label, found) in enumerate(of_methods.items()):
            gain = statistics.points(found, of_methods["SGD"])
            time = float(np.mean(found["processor_seconds"]))
            axis.errorbar(time, gain.mean, gain.error, fmt="o", color=f"C{place}", label=label)
        axis.axhline(0, color="k", lw=0.6)
        axis.set(xlabel="processor seconds", title=f"{100 * noise:.0f} % label noise")
    axes[0].set_ylabel("gain in test accuracy, points")
    axes[0].legend(frameon=False)
    return plots.save(made, output / "full_size", formats)
