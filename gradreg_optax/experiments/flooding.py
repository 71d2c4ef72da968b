r"""Flooding as finite-difference gradient regularization, and where the two differ.

Flooding at level :math:`b` descends where the loss is above :math:`b` and ascends where it is
below. With plain SGD of learning rate :math:`\eta`, and the same batch in both steps,

.. math::

    \text{ascent, then descent:}\quad \theta \to \theta - \eta^2 \Delta R_F(\eta), \qquad
    \text{descent, then ascent:}\quad \theta \to \theta - \eta^2 \Delta R_B(\eta),

where :math:`\Delta R_F(\epsilon) = (\nabla L(\theta + \epsilon g) - g)/\epsilon` and
:math:`\Delta R_B(\epsilon) = (g - \nabla L(\theta - \epsilon g))/\epsilon` are the corrections of
F-GR and B-GR. So at the flood level the parameters drift to regions with small gradients, at a
speed of :math:`\eta/2` per unit of time. With momentum, or with different batches, the two steps
leave a remainder of order :math:`\eta`, which is larger than the correction. With small steps the
drift is slow.

On a quadratic with eigenvalue :math:`\lambda` the two steps multiply the parameter by
:math:`1 - \eta^2\lambda^2`. So flooding is stable for :math:`\eta\lambda < \sqrt 2`, plain descent
for :math:`\eta\lambda < 2`: with large steps flooding leaves sharper regions.

Sources: Karakida et al., ICML 2023; flooding: Ishida et al., ICML 2020.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import curvature, fd_value_and_grad, flooding, make_train_step
from gradreg_optax.experiments import common, data, models, plots, report, runs, statistics, trainer
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Number, Report, Table

BEYOND = 1e30  # above every loss; a flood level there forces the sign of a step
ORDERS = {"ascent, descent": 1, "descent, ascent": -1}  # with the sign of the equivalent epsilon
LABELS = {
    "loss": "batch loss",
    "sign": "mean sign of L - b",
    "alternation": "sign changes",
    "grad_norm": "gradient norm",
    "eigenvalue": "top eigenvalue",
    "accuracy": "test accuracy",
}
_APPLY = models.build("mlp", (8, 8, 1), classes=10).apply  # for any width
loss_fn = trainer.cross_entropy(_APPLY)


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``gradreg flooding``."""

    output: Path = Path("results/flooding")
    seeds: int = 5
    """Number of seeds; a seed determines data, label noise and initial weights."""
    train_size: int = 300
    """Number of training samples."""
    label_noise: float = 0.3
    """Fraction of training samples with label noise."""
    width: int = 32
    """Hidden units of the network (one hidden layer, GELU)."""
    level: float = 0.6
    """Flood level b."""
    learning_rate: float = 1.0
    """Learning rate of full-batch SGD."""
    smaller: int = 4
    """Factor of the variant with small steps: divides the learning rate, multiplies the steps."""
    momentum: float = 0.9
    """Momentum of the variant with momentum, whose learning rate is multiplied by 1 - momentum."""
    batch_size: int = 32
    """Batch size of the variant with different batches."""
    steps: int = 1000
    """Number of steps."""
    records: int = 25
    """Number of measurements of the curvature."""

    def __post_init__(self) -> None:
        """Check the number of records and the batch size."""
        super().__post_init__()
        common.at_most(self, self.steps, "records")
        common.at_most(self, self.train_size // 2, "batch_size")


class Variant(NamedTuple):
    """Settings of one training variant.

    Attributes:
      level: the flood level.
      learning_rate: the learning rate.
      momentum: zero for none.
      batch_size: samples per step.
      repeat: number of steps that take the time of one step of the other variants.
    """

    level: float
    learning_rate: float
    momentum: float
    batch_size: int
    repeat: int


class Problem(NamedTuple):
    """Training and test samples (inputs and labels) of one seed, and the initial weights."""

    train: Any
    test: Any
    params: PyTree


def variants(config: Config) -> dict[str, Variant]:
    """Return the training variants by name."""
    step, times, momentum = config.learning_rate, config.smaller, config.momentum
    flood = Variant(config.level, step, 0.0, config.train_size, 1)
    inert = flood._replace(learning_rate=step * (1 - momentum), momentum=momentum)
    return {
        "plain descent": flood._replace(level=-BEYOND),
        "flooding": flood,
        "flooding, small steps": flood._replace(learning_rate=step / times, repeat=times),
        "flooding, momentum": inert,
        "flooding, different batches": flood._replace(batch_size=config.batch_size),
    }


def problem(config: Config, seed: int) -> Problem:
    """Return digits with label noise and the initial weights."""
    digits = data.load("digits")
    split = data.draw(digits, seed, config.train_size, label_noise=config.label_noise)
    inputs = digits.inputs / np.float32(digits.scale) - np.float32(digits.mean)
    network = models.build("mlp", digits.shape, digits.classes, width=config.width)
    train = inputs[split.train], split.train_labels
    test = inputs[split.test], digits.labels[split.test]
    return Problem(train, test, network.init(jax.random.key(seed)))


def run(config: Config) -> dict[str, Any]:
    """Measure the two-step identities, and train every variant.

    Returns:
      "level" and "learning_rate"; "identity", see :func:`measure_identity`; and "training", one row
      for each variant, seed and time, see :func:`train`.
    """
    store = runs.Store(config.output, config=common.settings(config))
    seeds = config.seed + np.arange(config.seeds)
    problems = [problem(config, seed) for seed in seeds.tolist()]
    identity = measure_identity(problems[0], config.batch_size, config.momentum)
    stacked: Problem = trainer.stacked(problems)
    training = []
    for name, variant in common.progress("training", "variant", variants(config).items()):
        make = partial(train, config, variant, stacked)
        found = store.keep(name.replace(",", ""), name, make)
        axes = {"variant": [name], "seed": seeds, "time": found.pop("time")}
        training.append(runs.tidy(axes, **found))
    chosen = {"level": config.level, "learning_rate": config.learning_rate}
    return chosen | {"identity": identity, "training": runs.stack(*training)}


def curves(results: dict[str, Any]) -> dict[str, dict[str, data.Array]]:
    """Return the value of :func:`train` for each variant."""
    variants = runs.by(results["training"], "variant")
    return {name: runs.blocks(rows, "seed", "time") for name, rows in variants.items()}


def two_steps(params: PyTree, batches: Any, levels: Any, rate: Any, momentum: Any) -> PyTree:
    """Return the change of the parameters in two steps, with given batches and flood levels."""
    tx = optax.chain(flooding(level=lambda step: levels[step]), optax.sgd(rate, momentum=momentum))
    state, point = tx.init(params), params
    for batch in batches:
        value, gradient = jax.value_and_grad(loss_fn)(point, batch)
        updates, state = tx.update(gradient, state, point, value=value)
        point = optax.apply_updates(point, updates)
    return jax.tree.map(jnp.subtract, point, params)


def regularization(params: PyTree, batch: Any, learning_rate: Any, sign: Any) -> PyTree:
    r"""Return the prediction :math:`-\eta^2 \Delta R(\eta)` of F-GR (sign 1) or B-GR (sign -1)."""
    gradient, epsilon = jax.grad(loss_fn)(params, batch), sign * learning_rate
    _, regularized = fd_value_and_grad(loss_fn, gamma=1.0, epsilon=epsilon)(params, batch)
    return jax.tree.map(lambda r, g: -(learning_rate**2) * (r - g), regularized, gradient)


@jax.jit
def deviation(
    params: PyTree, batches: Any, learning_rate: Any, *, momentum: Any, sign: Any
) -> dict[str, jax.Array]:
    """Return the deviation of two steps from the prediction.

    Returns:
      "largest", the largest deviation of a parameter; "relative", the norm of the deviation,
      relative to that of the prediction; and "drift", the norm of the prediction.
    """
    levels = BEYOND * jnp.array([sign, -sign])
    moved = two_steps(params, batches, levels, learning_rate, momentum)
    predicted = regularization(params, batches[0], learning_rate, sign)
    remainder = jax.tree.map(jnp.subtract, moved, predicted)
    largest, drift = optax.tree.norm(remainder, ord=jnp.inf), optax.tree.norm(predicted)
    return {"largest": largest, "relative": optax.tree.norm(remainder) / drift, "drift": drift}


def measure_identity(problem: Problem, batch_size: int, momentum: float) -> runs.Columns:
    """Compare two steps of flooding with one step of the penalty alone, in float64.

    Returns:
      One row for each case ("same batch", "momentum", "different batches"), order of the steps and
      learning rate "eta", with the values of :func:`deviation`.
    """
    (x, labels), params = problem.train, jax.tree.map(np.float64, problem.params)
    train = np.asarray(x, np.float64), labels
    different = [tuple(a[first:][:batch_size] for a in train) for first in (0, batch_size)]
    cases: dict[str, Any] = {"same batch": ([train] * 2, 0.0), "momentum": ([train] * 2, momentum)}
    cases["different batches"] = different, 0.0
    etas, found = np.logspace(-3, 0, 7), []
    for case, order, eta in itertools.product(cases, ORDERS, etas):
        batches, inertia = cases[case]
        with jax.enable_x64(True):
            measured = deviation(params, batches, eta, momentum=inertia, sign=ORDERS[order])
        found.append({"case": case, "order": order, "eta": eta} | measured)
    return runs.columns(found)


def train(config: Config, variant: Variant, problems: Problem) -> dict[str, Any]:
    """Train one variant on all seeds.

    Returns:
      Arrays of shape (seeds, records): ``loss`` and ``grad_norm`` (mean over the steps since the
      last record, on their batches), ``sign`` (mean of the sign of L - b), ``alternation``
      (fraction of steps whose sign differs from that of the previous step), ``eigenvalue`` and its
      ``residual``, and ``accuracy`` on the test samples; and ``time``, learning rate times steps,
      of shape (records,).
    """
    state = jax.vmap(_train_step(*variant[:3]).init)(problems.params)
    carry = state, jax.random.split(jax.random.key(config.seed), config.seeds)
    steps, records = variant.repeat * (config.steps // config.records), []
    for _ in range(config.records):
        carry, seen = advance(carry, problems, variant[:3], variant.batch_size, steps)
        seen = {name: np.asarray(values) for name, values in seen.items()}
        seen["sign"] = np.sign(seen["loss"] - variant.level)
        seen["alternation"] = np.diff(seen["sign"]) != 0
        means = {name: values.mean(axis=1) for name, values in seen.items()}
        state, keys = carry
        records.append(means | measure(state.params, problems, keys))
    found = {key: np.stack([record[key] for record in records], axis=1) for key in records[0]}
    speed = variant.learning_rate / (1 - variant.momentum)
    return found | {"time": speed * steps * np.arange(1, config.records + 1)}


@partial(jax.jit, static_argnames=("batch_size", "steps"))
def advance(carry: Any, problems: Problem, settings: Any, batch_size: int, steps: int) -> Any:
    """Take some steps on every seed.

    Args:
      carry: states and keys, stacked over seeds.
      problems: the problems, stacked over seeds.
      settings: level, learning rate and momentum.
      batch_size: samples per step.
      steps: number of steps.

    Returns:
      The states and keys; and "loss" and "grad_norm" of every step, shape (seeds, steps).
    """
    train_step = _train_step(*settings).step

    def step(problem: Problem, carry: Any, _: None) -> Any:
        state, key = carry
        key, draw = jax.random.split(key)
        chosen, size = jnp.arange(batch_size), len(problem.train[1])
        if batch_size < size:
            chosen = jax.random.choice(draw, size, (batch_size,), replace=False)
        state, info = train_step(state, tuple(a[chosen] for a in problem.train))
        return (state, key), {"loss": info.loss, "grad_norm": info.grad_norm}

    def one(carry: Any, problem: Problem) -> Any:
        return jax.lax.scan(partial(step, problem), carry, length=steps)

    return jax.vmap(one)(carry, problems)


@jax.jit
def measure(params: PyTree, problems: Problem, keys: jax.Array) -> dict[str, jax.Array]:
    """Return the top Hessian eigenvalue of the training loss and the test accuracy."""

    def one(params: PyTree, problem: Problem, key: jax.Array) -> dict[str, jax.Array]:
        top = curvature.top_hessian_eigenvalue(
            lambda params: loss_fn(params, problem.train), params, key, num_matvecs=15
        )
        x, labels = problem.test
        correct = jnp.argmax(_APPLY(params, x), axis=-1) == labels
        return {"eigenvalue": top.value, "residual": top.residual, "accuracy": jnp.mean(correct)}

    return jax.vmap(one)(params, problems, keys)


def _train_step(level: Any, learning_rate: Any, momentum: Any) -> Any:
    optimizer = optax.sgd(learning_rate, momentum=momentum)
    return make_train_step(loss_fn, optimizer, flooding(level=level), donate=False)


def table(results: dict[str, Any]) -> Report:
    """Return the deviations from the identities, and the last quarter of each training run."""
    level, rate = results["level"], results["learning_rate"]
    title = f"training at flood level {level:g}, learning rate {rate:g}"
    columns = {label: _late(name) for name, label in LABELS.items() if name != "sign"}
    training = report.table(title, curves(results), columns, of="variant")
    seeds = len(set(results["training"]["seed"]))
    note = f"Means over the last quarter of the training ± standard errors over {seeds} seeds."
    return Report(*_identity_parts(results["identity"]), "", training, note)


def _identity_parts(identity: runs.Columns) -> list[Table | str]:
    ends = [f"η = {end:g}" for end in (min(identity["eta"]), max(identity["eta"]))]
    head = ["two steps", "case", "largest deviation", *(f"relative, {end}" for end in ends)]
    rows, drifts = [], []
    for (case, order), found in runs.groups(identity, "case", "order"):
        numbers = max(found["largest"]), found["relative"][0], found["relative"][-1]
        rows.append([order, case, *(Number(number, ".1e") for number in numbers)])
        if case == "same batch":
            ends_of = zip(found["drift"][[0, -1]], ends, strict=True)
            moved = " and ".join(f"by {drift:.1e} at {end}" for drift, end in ends_of)
            drifts.append(f"{order}: the penalty alone moves the parameters {moved}")
    title = "two steps of flooding compared with one step of the penalty (F-GR or B-GR), float64"
    return [Table(title, head, rows, left=2), *drifts]


def _late(name: str) -> report.Column:
    """Return a column with the mean over seeds and over the last quarter of the records."""

    def cell(curves: report.Rows) -> Number:
        last = -max(1, len(curves["time"]) // 4)
        return Number(statistics.estimate(curves[name][:, last:].mean(axis=1)), ".4f")

    return cell


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw the deviations from the identities against the learning rate, and training curves."""
    made, panels = plots.figure(3, rows=2, width=5.0, height=3.75)
    _draw_identity(panels[0, 0], results["identity"])
    found, shown = curves(results), [one for one in LABELS.items() if one[0] != "alternation"]
    for panel, (column, label) in zip(panels.flat[1:], shown, strict=True):
        for name, part in found.items():
            panel.plot(part["time"], part[column].mean(axis=0), label=name)
        panel.set(xlabel="time (effective learning rate × steps)", ylabel=label)
    edge = np.sqrt(2) / results["learning_rate"]
    for panel, level in ((panels[0, 1], results["level"]), (panels[1, 1], edge)):
        panel.axhline(level, color="0.7", linestyle="--", zorder=0)
    panels[1, 1].annotate(r"$\sqrt{2}/\eta$", (0, edge))
    panels[1, 1].legend(fontsize=8)
    return plots.save(made, output / "flooding", formats)


def _draw_identity(panel: Any, identity: runs.Columns) -> None:
    colors = dict(zip(dict.fromkeys(identity["case"]), ("C0", "C1", "C2"), strict=True))
    for (case, order), rows in runs.groups(identity, "case", "order"):
        style = "o-" if order == "ascent, descent" else "x--"
        label = f"{case}: {order}"
        panel.loglog(rows["eta"], rows["relative"], style, color=colors[case], label=label)
    panel.axhline(1, color="0.7", zorder=0)
    panel.set(xlabel=r"learning rate $\eta$", ylabel="relative deviation of two steps from GR")
    panel.legend(fontsize=7)
