r"""Flooding is finite-difference gradient regularization in disguise, and where it is not.

Flooding at level :math:`b` descends where the loss is above :math:`b` and ascends where it is
below. With plain SGD of step :math:`\eta`, and the same batch in both steps,

.. math::

    \text{ascent, then descent:}\quad \theta \to \theta - \eta^2 \Delta R_F(\eta), \qquad
    \text{descent, then ascent:}\quad \theta \to \theta - \eta^2 \Delta R_B(\eta),

where :math:`\Delta R_F(\epsilon) = (\nabla L(\theta + \epsilon g) - g)/\epsilon` and
:math:`\Delta R_B(\epsilon) = (g - \nabla L(\theta - \epsilon g))/\epsilon` are the corrections of
F-GR and B-GR. So a network that floats at the flood level drifts to where the gradient is small, at
a speed of :math:`\eta/2` per unit of time. With momentum, or with different batches, the two steps
leave a rest of order :math:`\eta`, which swamps the correction; with small steps the drift is slow.

On a quadratic with eigenvalue :math:`\lambda` the two steps multiply the parameter by
:math:`1 - \eta^2\lambda^2`. So flooding is stable for :math:`\eta\lambda < \sqrt 2`, where plain
descent needs :math:`\eta\lambda < 2`: with large steps it leaves sharper regions.

Source: Karakida et al., ICML 2023; flooding: Ishida et al., ICML 2020.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import curvature, fd_value_and_grad, flooding, make_train_step
from gradreg_optax.experiments import common, data, models, plots, runs
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.models import PyTree
from gradreg_optax.experiments.report import Number, Report, Table, mean
from gradreg_optax.experiments.trainer import Array, cross_entropy

Order: TypeAlias = Literal["ascent, descent", "descent, ascent"]

BEYOND = 1e30  # a level that no loss reaches
# The signs of the two steps as flood levels that force them, and the difference that they amount to
# (in units of the step).
ORDERS: dict[Order, tuple[tuple[float, float], int]] = {
    "ascent, descent": ((BEYOND, -BEYOND), 1),
    "descent, ascent": ((-BEYOND, BEYOND), -1),
}
_APPLY = models.build("mlp", (8, 8, 1), classes=10).apply  # whatever the width of the weights
loss_fn = cross_entropy(_APPLY)


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """A small network on scikit-learn's digits with some wrong labels, trained to a flood level and
    kept there.
    """

    output: Path = Path("results/flooding")
    seeds: int = 5
    """Number of runs of each kind; each has its own data, wrong labels and initial weights."""
    train_size: int = 300
    """Number of training samples."""
    label_noise: float = 0.3
    """Share of the training samples with a wrong label."""
    width: int = 32
    """Hidden units of the network (one hidden layer, GELU)."""
    level: float = 0.6
    """The flood level b."""
    learning_rate: float = 1.0
    """The step of SGD on the whole training set."""
    smaller: int = 4
    """The run with small steps divides the step by this, and takes as many more of them."""
    momentum: float = 0.9
    """Momentum of the run with momentum, whose step is multiplied by 1 - momentum."""
    batch_size: int = 32
    """Batch size of the run with different batches."""
    steps: int = 1000
    """Number of steps (of the full size)."""
    records: int = 25
    """Number of times at which the curvature is measured."""

    def __post_init__(self) -> None:
        """Checks that the records and the batches fit."""
        super().__post_init__()
        if self.records > self.steps:
            raise CommandError(
                f"records must be at most steps = {self.steps}, got {self.records}: take more"
                " steps."
            )
        if 2 * self.batch_size > self.train_size:
            raise CommandError(
                f"two batches of {self.batch_size} do not fit into {self.train_size} samples: take"
                " smaller ones."
            )


class Variant(NamedTuple):
    """A way to train.

    Attributes:
      level: the flood level.
      learning_rate: the step.
      momentum: zero for none.
      batch_size: samples per step.
      repeat: steps in the time of one step of the full size.
    """

    level: float
    learning_rate: float
    momentum: float
    batch_size: int
    repeat: int


class Problem(NamedTuple):
    """Samples of one seed to train and to test on, inputs and labels, and the initial weights."""

    train: Any
    test: Any
    params: PyTree


def variants(config: Config) -> dict[str, Variant]:
    """The ways to train, by name."""
    step, momentum = config.learning_rate, config.momentum
    flood = Variant(config.level, step, 0.0, config.train_size, 1)
    small: dict[str, Any] = {"learning_rate": step / config.smaller, "repeat": config.smaller}
    inert: dict[str, Any] = {"learning_rate": step * (1 - momentum), "momentum": momentum}
    return {
        "plain descent": flood._replace(level=-BEYOND),
        "flooding": flood,
        "flooding, small steps": flood._replace(**small),
        "flooding, momentum": flood._replace(**inert),
        "flooding, different batches": flood._replace(batch_size=config.batch_size),
    }


def problem(config: Config, seed: int) -> Problem:
    """Digits, some of them with wrong labels, and the weights to start from."""
    digits = data.load("digits")
    split = data.draw(digits, seed, config.train_size, label_noise=config.label_noise)
    inputs = digits.inputs / np.float32(digits.scale) - np.float32(digits.mean)
    network = models.build("mlp", digits.shape, digits.classes, width=config.width)
    train = inputs[split.train], split.train_labels
    test = inputs[split.test], digits.labels[split.test]
    return Problem(train, test, network.init(jax.random.key(seed)))


class Deviation(NamedTuple):
    """How far two steps of flooding are from the prediction.

    Attributes:
      largest: the largest deviation of a parameter.
      relative: the norm of the deviation over that of the prediction.
      drift: the norm of the prediction.
    """

    largest: Any
    relative: Any
    drift: Any


def wide(problem: Problem) -> Problem:
    """The problem in float64."""
    made: Problem = jax.tree.map(
        lambda a: np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a, problem
    )
    return made


def run(config: Config) -> dict[str, Any]:
    """Measures the two-step identities, and trains every variant.

    Returns:
      "level" and "learning_rate"; "identity", see :func:`measure_identity`; and "training", one row
      a variant, seed and time, see :func:`train`.
    """
    store = runs.Store(config.output, config=common.settings(config))
    problems = [problem(config, config.seed + i) for i in range(config.seeds)]
    with jax.enable_x64(True):
        identity = measure_identity(wide(problems[0]), config.batch_size, config.momentum)
    stacked: Problem = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    ways, training = variants(config), []
    with common.progress(len(ways), "training", "variant") as progress:
        for name, variant in ways.items():
            make = partial(train, config, variant, stacked)
            found = store.keep(name.replace(",", ""), {"variant": name}, make)
            axes = {"variant": [name], "seed": config.seed + np.arange(config.seeds)}
            training.append(runs.tidy(axes | {"time": found.pop("time")}, **found))
            progress.update()
    chosen = {"level": config.level, "learning_rate": config.learning_rate}
    return chosen | {"identity": identity, "training": runs.stack(*training)}


def curves(results: dict[str, Any]) -> dict[str, dict[str, Array]]:
    """The training by variant: what :func:`train` returned for each."""
    variants = runs.by(results["training"], "variant")
    return {name: runs.blocks(rows, "seed", "time") for name, rows in variants.items()}


def two_steps(
    params: PyTree, batches: Any, levels: Any, learning_rate: Any, momentum: Any
) -> PyTree:
    """How far two steps of flooding with SGD move the parameters: one with each batch and flood
    level.
    """
    tx = optax.chain(
        flooding(level=lambda step: levels[step]), optax.sgd(learning_rate, momentum=momentum)
    )
    state, point = tx.init(params), params
    for batch in batches:
        value, gradient = jax.value_and_grad(loss_fn)(point, batch)
        updates, state = tx.update(gradient, state, point, value=value)
        point = optax.apply_updates(point, updates)
    return jax.tree.map(jnp.subtract, point, params)


def regularization(params: PyTree, batch: Any, learning_rate: Any, sign: Any) -> PyTree:
    r"""The prediction :math:`-\eta^2 \Delta R(\eta)`, with F-GR's difference for sign 1 and B-GR's
    for -1.
    """
    gradient, epsilon = jax.grad(loss_fn)(params, batch), sign * learning_rate
    _, regularized = fd_value_and_grad(loss_fn, gamma=1.0, epsilon=epsilon)(params, batch)
    return jax.tree.map(lambda r, g: -(learning_rate**2) * (r - g), regularized, gradient)


@jax.jit
def deviation(
    params: PyTree, batches: Any, levels: Any, learning_rate: Any, *, momentum: Any, sign: Any
) -> Deviation:
    """How far two steps are from the prediction."""
    moved = two_steps(params, batches, levels, learning_rate, momentum)
    predicted = regularization(params, batches[0], learning_rate, sign)
    rest = jax.tree.map(jnp.subtract, moved, predicted)
    drift = optax.tree.norm(predicted)
    return Deviation(optax.tree.norm(rest, ord=jnp.inf), optax.tree.norm(rest) / drift, drift)


def measure_identity(problem: Problem, batch_size: int, momentum: float) -> runs.Columns:
    """How far two steps of flooding are from one step of the penalty alone, in float64.

    Returns:
      One row a case ("same batch", "momentum", "different batches"), an order of the steps and a
      step "eta", with the fields of :class:`Deviation`.
    """
    whole = (problem.train, problem.train)
    starts = (0, batch_size)
    halves = [tuple(a[start : start + batch_size] for a in problem.train) for start in starts]
    cases = {
        "same batch": (whole, 0.0),
        "momentum": (whole, momentum),
        "different batches": (halves, 0.0),
    }
    found = []
    for case, (batches, inertia) in cases.items():
        for order, (levels, sign) in ORDERS.items():
            how = {"momentum": inertia, "sign": sign}
            for eta in np.logspace(-3, 0, 7):
                measured = deviation(problem.params, batches, jnp.array(levels), eta, **how)
                row = {"case": case, "order": order, "eta": eta}
                found.append(row | measured._asdict())
    return runs.columns(found)


def train(config: Config, variant: Variant, problems: Problem) -> dict[str, Any]:
    """Trains one variant on all seeds at once.

    Returns:
      Arrays of shape (seeds, records): ``loss`` and ``grad_norm`` (mean over the steps since the
      last record, on their batches), ``sign`` (mean of the sign of L - b), ``alternation`` (share
      of steps whose sign differs from that of the step before), ``eigenvalue`` and its
      ``residual``, and ``accuracy`` on the test samples; ``time``, learning rate times steps, of
      shape (records,).
    """
    state = jax.vmap(_trainer(*variant[:3]).init)(problems.params)
    carry = state, jax.random.split(jax.random.key(config.seed), config.seeds)
    steps = config.steps // config.records
    records = []
    for _ in range(config.records):
        pieces = []
        for _ in range(variant.repeat):
            carry, piece = advance(carry, problems, variant[:3], variant.batch_size, steps)
            pieces.append(piece)
        loss, norm = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
        sign = np.sign(loss - variant.level)
        seen = {"loss": loss, "grad_norm": norm, "sign": sign}
        seen["alternation"] = sign[:, 1:] != sign[:, :-1]
        means = {name: values.mean(axis=1) for name, values in seen.items()}
        state, keys = carry
        records.append(means | measure(state.params, problems, keys))
    found = {key: np.stack([record[key] for record in records], axis=1) for key in records[0]}
    speed = variant.learning_rate / (1 - variant.momentum)
    return found | {"time": speed * variant.repeat * steps * np.arange(1, config.records + 1)}


@partial(jax.jit, static_argnames=("batch_size", "steps"))
def advance(carry: Any, problems: Problem, settings: Any, batch_size: int, steps: int) -> Any:
    """Takes some steps on every seed.

    Args:
      carry: states and keys, stacked over seeds.
      problems: the problems, stacked over seeds.
      settings: level, learning rate and momentum.
      batch_size: samples per step.
      steps: number of steps.

    Returns:
      The states and keys, and the loss and the gradient norm of every step, shape (seeds, steps).
    """
    trainer = _trainer(*settings)

    def step(problem: Problem, carry: Any, _: None) -> Any:
        state, key = carry
        key, draw = jax.random.split(key)
        chosen, size = jnp.arange(batch_size), len(problem.train[1])
        if batch_size < size:
            chosen = jax.random.choice(draw, size, (batch_size,), replace=False)
        state, info = trainer.step(state, tuple(a[chosen] for a in problem.train))
        return (state, key), (info.loss, info.grad_norm)

    def one(carry: Any, problem: Problem) -> Any:
        return jax.lax.scan(partial(step, problem), carry, length=steps)

    return jax.vmap(one)(carry, problems)


@jax.jit
def measure(params: PyTree, problems: Problem, keys: jax.Array) -> dict[str, jax.Array]:
    """The top Hessian eigenvalue of the training loss with its residual, and the test accuracy, of
    every seed.
    """

    def one(params: PyTree, problem: Problem, key: jax.Array) -> dict[str, jax.Array]:
        eigenvalue, residual = curvature.top_hessian_eigenvalue(
            lambda params: loss_fn(params, problem.train), params, key, num_matvecs=15
        )
        x, labels = problem.test
        correct = jnp.argmax(_APPLY(params, x), axis=-1) == labels
        return {"eigenvalue": eigenvalue, "residual": residual, "accuracy": jnp.mean(correct)}

    found: dict[str, jax.Array] = jax.vmap(one)(params, problems, keys)
    return found


def _trainer(level: Any, learning_rate: Any, momentum: Any) -> Any:
    return make_train_step(
        loss_fn, optax.sgd(learning_rate, momentum=momentum), flooding(level=level), donate=False
    )


def table(results: dict[str, Any]) -> Report:
    """Return the deviations from the identities, and the last quarter of every training run."""
    note = "Means over the last quarter of the training ± standard errors over seeds."
    return Report(*_identity_parts(results["identity"]), "", _training_table(results), note)


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
            drifts.append(f"{order}: the penalty itself moves the parameters {moved}")
    title = "two steps of flooding compared with one step of the penalty (F-GR or B-GR), float64"
    return [Table(title, head, rows, left=2), *drifts]


def _training_table(results: dict[str, Any]) -> Table:
    columns = {
        "loss": "batch loss",
        "alternation": "sign changes",
        "grad_norm": "gradient norm",
        "eigenvalue": "top eigenvalue",
        "accuracy": "test accuracy",
    }
    rows = [
        [name, *(mean(column, ".4f")({column: late(part[column])}) for column in columns)]
        for name, part in curves(results).items()
    ]
    title = (
        f"training at flood level {results['level']:g}, learning rate {results['learning_rate']:g}"
    )
    return Table(title, ["variant", *columns.values()], rows)


def late(values: Array) -> Array:
    """The mean over the last quarter of the records; shape (seeds,)."""
    return np.asarray(values[:, -max(1, values.shape[1] // 4) :].mean(axis=1))


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws the deviations from the identities against the step, and loss, sign, gradient norm and
    eigenvalue over time.

    Returns:
      The path of the figure, ``flooding.png``.
    """
    made, panels = plots.figure(3, rows=2, width=5.0, height=3.75)
    _draw_identity(panels[0, 0], results["identity"])
    columns = {
        "loss": "loss on the batches",
        "sign": "mean sign of L - b",
        "grad_norm": "gradient norm on the batches",
        "eigenvalue": "top Hessian eigenvalue",
        "accuracy": "test accuracy",
    }
    for panel, (column, label) in zip(panels.flat[1:], columns.items(), strict=True):
        for name, part in curves(results).items():
            panel.plot(part["time"], part[column].mean(axis=0), label=name)
        panel.set(xlabel="time (effective learning rate x steps)", ylabel=label)
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
    panel.set(xlabel=r"step $\eta$", ylabel="relative deviation of two steps from GR")
    panel.legend(fontsize=7)
