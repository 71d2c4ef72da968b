"""Flatness and its expected benefits, for the networks of ``gradreg compare``.

Measures calibration, and the loss of accuracy with quantized weights, noisy inputs and a second
task.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax.experiments import compare, data, plots, runs, statistics
from gradreg_optax.experiments.data import Array
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Report, Table
from gradreg_optax.experiments.trainer import Pool, Problem

LABELS = ("SGD", "DB", "F-GR", "lazy F-GR", "SAM", "relative")
BITS, NOISES = (8, 4), (0.25, 0.5, 1.0)
RATE = 0.1  # of the fine-tuning
_BINS = 15


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Settings of ``python -m studies flatness``."""

    output: Path = Path("results/flatness")
    second_steps: int = 300
    """Steps of plain SGD on the second task, which permutes the entries of the inputs."""
    from_zero = (*compare.Config.from_zero, "second_steps")


def run(config: Config) -> dict[str, Any]:
    """Train the methods on every seed, and measure.

    Returns:
      "recipes", the shared settings for each data set; and "runs", one row per run. Additional
      metrics are "confidence"; "calibration_error", and "calibration_error_noisy" on labels with
      the noise of the training labels; "accuracy_B_bits" and "train_loss_B_bits" with weights
      rounded to B bits; "accuracy_noise_S" with Gaussian noise of S standard deviations on the
      inputs; "accuracy_after" fine-tuning on a second task, and "accuracy_second" on that task.

    Raises:
      CommandError: settings that do not fit the data.
    """
    store, recipes, found = runs.Store(config.output), {}, []
    metrics = functools.partial(measure, steps=config.second_steps)
    train = functools.partial(runs.train, store=store, metrics=metrics)
    for name in config.datasets:
        of = functools.partial(compare.wanted_runs, config, name)
        wanted = [one for label in LABELS for one in of(label, compare.seeds_of(config, name))]
        found.append(train(data.load(name), wanted, what=f"flatness {name}"))
        recipes[name] = compare.recipe(config, name).describe()
    return {"recipes": recipes, "runs": runs.stack(*found)}


def measure(
    problem: Problem, params: PyTree, seed: jax.Array, split: data.Split, pool: Pool, *, steps: int
) -> dict[str, jax.Array]:
    """Return the metrics of one run; the seed alone determines noise, second task and batches."""
    noise, order, batches = jax.random.split(jax.random.fold_in(jax.random.key(seed), 4), 3)
    x, y = problem.take(pool, split.test), pool[1][split.test]
    train_x, train_y = problem.take(pool, split.train), pool[1][split.train]
    logits = problem.model.apply(params, x)
    errors = functools.partial(calibration_error, jax.nn.softmax(logits), y)

    def accuracy(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(problem.model.apply(params, x), axis=-1) == y)

    found = problem.metrics(params, seed, split, pool)
    found["confidence"] = jnp.mean(jnp.max(jax.nn.softmax(logits), axis=-1))
    found["calibration_error"] = errors()
    found["calibration_error_noisy"] = errors(problem.recipe.label_noise)
    for bits in BITS:
        coarse = rounded(params, bits)
        found[f"accuracy_{bits}_bits"] = accuracy(coarse, x)
        found[f"train_loss_{bits}_bits"] = problem.loss(coarse, (train_x, split.train_labels))
    deviation = jnp.std(train_x) * jax.random.normal(noise, x.shape)
    for size in NOISES:
        found[f"accuracy_noise_{size:g}"] = accuracy(params, x + size * deviation)
    permuted = functools.partial(_permuted, jax.random.permutation(order, x[0].size))
    tuned = fine_tuned(problem, params, (permuted(train_x), train_y), batches, steps)
    after = {"accuracy_after": accuracy(tuned, x), "accuracy_second": accuracy(tuned, permuted(x))}
    return found | after


def calibration_error(probabilities: jax.Array, labels: jax.Array, noise: float = 0.0) -> jax.Array:
    """Return the expected calibration error of Guo et al. (2017), with 15 bins of equal width.

    It is the gap between the largest probability and the accuracy, averaged over the samples.

    Args:
      probabilities: probabilities of the classes, for each sample.
      labels: the true classes.
      noise: fraction of labels to treat as replaced by other classes.
    """
    confidence = jnp.max(probabilities, axis=-1)
    others = noise / (probabilities.shape[-1] - 1)
    right = jnp.where(jnp.argmax(probabilities, axis=-1) == labels, 1 - noise, others)
    place = jnp.clip(jnp.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = jax.ops.segment_sum(right - confidence, place, _BINS)
    return jnp.sum(jnp.abs(gaps)) / len(labels)


def rounded(params: PyTree, bits: int) -> PyTree:
    """Round every tensor to a symmetric grid of ``2**bits - 1`` values up to its largest entry."""
    levels = 2 ** (bits - 1) - 1
    grid = np.arange(-levels, levels + 1, dtype=np.float32) / np.float32(levels)

    def one(w: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(w))
        part = w / jnp.where(largest > 0, largest, 1)
        return jnp.asarray(grid)[jnp.round(part * levels).astype(int) + levels] * largest

    return jax.tree.map(one, params)


def fine_tuned(
    problem: Problem, params: PyTree, samples: Pool, key: jax.Array, steps: int
) -> PyTree:
    """Return the parameters after some steps of plain SGD on random samples."""
    x, y = samples

    def step(i: jax.Array, params: PyTree) -> PyTree:
        drawn = (problem.recipe.batch_size,)
        rows = jax.random.randint(jax.random.fold_in(key, i), drawn, 0, len(y))
        gradient = jax.grad(problem.loss)(params, (x[rows], y[rows]))
        return optax.tree.add_scale(params, -RATE, gradient)

    return jax.lax.fori_loop(0, steps, step, params)


def _permuted(order: jax.Array, x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)[:, order].reshape(x.shape)


def quantities(rows: runs.Columns) -> dict[str, Array]:
    """Return accuracies and calibration in points, losses in nats, and changes of the accuracy."""

    def change(name: str) -> Array:
        return 100 * (rows[f"accuracy_{name}"] - rows["accuracy"])

    found = {"accuracy": 100 * rows["accuracy"], "confidence": 100 * rows["confidence"]}
    found["ECE"] = 100 * rows["calibration_error"]
    found["ECE, noisy"] = 100 * rows["calibration_error_noisy"]
    found["NLL"] = rows["test_loss"]
    for bits in BITS:
        found[f"{bits} bits"] = change(f"{bits}_bits")
        found[f"{bits} bits, loss"] = rows[f"train_loss_{bits}_bits"] - rows["train_loss"]
    found |= {f"noise {size:g}": change(f"noise_{size:g}") for size in NOISES}
    return found | {"forgetting": change("after"), "2nd task": 100 * rows["accuracy_second"]}


_TABLES = (
    ("accuracy", "confidence", "ECE", "ECE, noisy", "NLL"),
    tuple(f"{bits} bits{what}" for bits in BITS for what in ("", ", loss")),
    (*(f"noise {size:g}" for size in NOISES), "forgetting", "2nd task"),
)


def table(results: dict[str, Any]) -> Report:
    """Return the quantities of SGD, and paired differences with p-values."""
    lines: list[Table | str] = []
    for (name,), found in runs.groups(results["runs"], "dataset"):
        of_methods = {label: quantities(rows) for label, rows in runs.by(found, "method").items()}
        recipe = results["recipes"][name]
        lines.append(f"{compare.described(name, recipe)}, {len(set(found['seed']))} seeds")
        for names in _TABLES:
            shown = [one for one in names if recipe["label_noise"] or one != "ECE, noisy"]
            lines += [Table("", ["", *shown], list(_rows(of_methods, shown))), ""]
    lines.append(
        "Means ± standard errors over seeds, p of the paired t-test in brackets. Accuracies and ECE"
        " (expected calibration error) in percentage points, NLL and loss in nats. ECE, noisy: on"
        " labels with the noise of the training labels. B bits, noise, forgetting: change of the"
        " test accuracy, and of the training loss, with all weights rounded to B bits, with noise"
        " on the inputs (in their standard deviations), and after fine-tuning on a second task."
    )
    return Report(*lines)


def _rows(of_methods: Mapping[str, Mapping[str, Array]], names: Sequence[str]) -> Iterator[Any]:
    plain = of_methods["SGD"]
    yield ["SGD", *(f"{statistics.estimate(plain[name]):{_spec(name)}}" for name in names)]
    pairs = [(label, "SGD") for label in of_methods if label != "SGD"]
    for first, second in [*pairs, ("F-GR", "SAM")]:
        both = of_methods[first], of_methods[second]
        gaps = {name: statistics.paired(*(one[name] for one in both)) for name in names}
        size = gaps[names[0]].size
        fewer = f", {size} seeds" if size < len(plain["accuracy"]) else ""
        cells = [f"{gap:+{_spec(name)}}" for name, gap in gaps.items()]
        chances = ["" if np.isnan(gap.p) else f" ({gap.p:.1g})" for gap in gaps.values()]
        yield [f"{first} minus {second}{fewer}", *map("".join, zip(cells, chances, strict=True))]


def _spec(name: str) -> str:
    return ".3f" if name == "NLL" or "loss" in name else ".1f"


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw calibration, accuracy against bits and against noise, and forgetting."""
    tasks = list(runs.groups(results["runs"], "dataset"))
    made, axes = plots.figure(4, rows=len(tasks), width=3.8, height=3.4)
    for line, ((name,), found) in zip(np.atleast_2d(axes), tasks, strict=True):
        for place, (label, rows) in enumerate(runs.by(found, "method").items()):
            _draw(line, label, rows, place)
        line[0].set_xticks(range(len(LABELS)), LABELS, rotation=35)
        line[0].set(ylabel="calibration error (points)\n(hollow: on noisy labels)", ylim=(0, None))
        title = compare.described(name, results["recipes"][name])
        line[0].set_title(title, loc="left", fontsize=11)
        line[1].set_xticks(range(1 + len(BITS)), ["32", *map(str, BITS)])
        line[1].set(xlabel="bits per weight", ylabel="test accuracy (%)")
        line[2].set(xlabel="input noise (standard deviations)", ylabel="test accuracy (%)")
        line[3].set(xlabel="accuracy on the second task (%)", ylabel="then on the first (%)")
    np.atleast_2d(axes)[0, 2].legend(frameon=False, fontsize=8, loc="lower left")
    return plots.save(made, output / "flatness", formats)


def _draw(axes: Any, label: str, rows: runs.Columns, place: int) -> None:
    style: Any = {"color": plots.color(label), "label": label}

    def points(*names: str) -> list[statistics.Estimate]:
        return [statistics.estimate(100 * rows[name]) for name in names]

    for name, filled in (("calibration_error_noisy", "none"), ("calibration_error", "full")):
        plots.errors(axes[0], [place], points(name), fillstyle=filled, **style)
    bits = points("accuracy", *(f"accuracy_{bits}_bits" for bits in BITS))
    plots.errors(axes[1], range(len(bits)), bits, fmt="o-", **style)
    noises = points("accuracy", *(f"accuracy_noise_{size:g}" for size in NOISES))
    plots.errors(axes[2], (0, *NOISES), noises, fmt="o-", **style)
    x, y = points("accuracy_second", "accuracy_after")
    axes[3].errorbar(x.mean, y.mean, y.error, x.error, fmt="o", **style)
