"""Every regularizer on digits with wrong labels: what it does to test accuracy, training loss and
curvature, and what it costs.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from gradreg_optax.experiments import data, plots, statistics
from gradreg_optax.experiments.training import METHODS, Recipe, Trainer

# The settings of each method, chosen on other seeds.
SETTINGS: dict[str, dict[str, float]] = {
    "SGD": {},
    "DB": {"gamma": 6.0},
    "B-GR": {"gamma": 6.0, "epsilon": 0.1},
    "C-GR": {"gamma": 5.0, "epsilon": 0.3},
    "F-GR": {"gamma": 5.0, "epsilon": 10.0},
    "SAM": {"rho": 1.5},
    "flooding": {"level": 1.2},
}
# At one gamma, the signed ascent step: B-GR is negative, DB zero, F-GR positive.
COMMON_GAMMA = 3.0
SIGNED_EPSILON = (-1.0, -0.3, 0.0, 0.3, 1.0, 3.0)
METRICS = ("accuracy", "train_loss", "grad_norm", "eigenvalue", "eigenvalue_residual", "diverged")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of ``gradreg compare``."""

    output: Path = Path("results/compare")
    """Folder for results.json and the figure."""
    seed: int = 0
    """The first seed."""
    seeds: int = 10
    """Number of seeds; the methods are paired by seed."""
    steps: int = 3000
    """Training steps."""
    train_size: int = 300
    """Number of training samples."""
    test_size: int = 1000
    """Number of test samples, whose labels are right."""
    label_noise: float = 0.3
    """Share of the training samples that get a wrong label."""
    redraw: bool = False
    """Draw the figure from the results on disk, without training."""


def run(config: Config) -> dict[str, Any]:
    """Trains every method on every seed, each method in one compiled program.

    Args:
      config: the settings.

    Returns:
      "seeds"; "methods", a list of dicts with label, settings, gradients and FLOPs per step
      (relative to SGD), and arrays of the metrics over the seeds; "signed_epsilon", the same
      metrics at one gamma against the signed ascent step, shape (epsilons, seeds).

    Raises:
      ValueError: settings that do not fit the data.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}.")
    recipe = Recipe(
        train_size=config.train_size,
        test_size=config.test_size,
        label_noise=config.label_noise,
        steps=config.steps,
    )
    dataset, seeds = data.load("digits"), config.seed + np.arange(config.seeds)
    methods: list[dict[str, Any]] = []
    signed: dict[float, dict[str, Any]] = {}
    plain_flops = None
    for label, settings in SETTINGS.items():
        trainer = Trainer(dataset, METHODS[label], recipe)
        extra = [step for step in SIGNED_EPSILON if _label(step) == label]
        best, *rest = _train(trainer, [settings, *(_common(step) for step in extra)], seeds)
        signed |= dict(zip(extra, rest, strict=True))
        flops = trainer.flops()
        plain_flops = plain_flops or flops
        cost = {"gradients": METHODS[label].gradients, "flops": flops / plain_flops}
        methods.append({"label": label, "settings": settings, **cost, **best})
    common = {name: np.stack([signed[step][name] for step in SIGNED_EPSILON]) for name in METRICS}
    return {
        "seeds": seeds,
        "methods": methods,
        "signed_epsilon": {"gamma": COMMON_GAMMA, "epsilon": np.array(SIGNED_EPSILON), **common},
    }


def table(results: dict[str, Any]) -> str:
    """The comparison as text: accuracies with standard errors over seeds, paired differences to SGD
    with p-values, curvature and cost.
    """
    plain = _method(results, "SGD")["accuracy"]
    head = (
        f"{'method':<9} {'setting':<13} {'test accuracy %':>15} {'minus SGD':>14} {'p':>8}"
        f" {'train loss':>10} {'top eigenvalue':>14} "
    )
    lines = [head + f"{'gradients':>9} {'FLOPs':>6}"]
    for method in results["methods"]:
        lines.append(_row(method, plain))
    gain = statistics.paired(
        100 * _method(results, "F-GR")["accuracy"], 100 * _method(results, "DB")["accuracy"]
    )
    lines += ["", f"F-GR minus DB: {gain:+.1f} (p = {gain.p:.1g})"]
    common = results["signed_epsilon"]
    lines += [
        "",
        (
            f"test accuracy % at gamma = {common['gamma']:g} against the signed ascent step (B-GR <"
            " 0, DB = 0, F-GR > 0):"
        ),
    ]
    for step, accuracy in zip(common["epsilon"], common["accuracy"], strict=True):
        lines.append(f"{_label(step):<9} epsilon {step:<5g} {_percent(accuracy):>15}")
    lines.append(
        f"\nmeans over {len(results['seeds'])} seeds ± standard error; p: paired t-test; cost per"
        " step relative to SGD."
    )
    return "\n".join(lines)


def plot(results: dict[str, Any], output: Path) -> list[Path]:
    """Draws compare.png: accuracy of each method, accuracy against curvature, and accuracy against
    the signed ascent step.
    """
    made, (left, middle, right) = plots.figure(3, width=4.4, height=3.8)
    labels = [method["label"] for method in results["methods"]]
    for position, method in enumerate(results["methods"]):
        color, accuracy = plots.COLORS[method["label"]], 100 * method["accuracy"]
        mean, error, _ = statistics.estimate(accuracy)
        left.plot(np.full(len(accuracy), position), accuracy, ".", color=color, alpha=0.35)
        left.errorbar(position, mean, error, fmt="_", ms=22, mew=2.5, color=color)
        sharpness = statistics.estimate(method["eigenvalue"])
        middle.errorbar(
            sharpness.mean,
            mean,
            error,
            sharpness.error,
            fmt="o",
            color=color,
            label=method["label"],
        )
    left.set_xticks(range(len(labels)), labels, rotation=35)
    left.set(ylabel="test accuracy %", title="each method at its own setting")
    middle.set(
        xscale="log",
        xlabel="top Hessian eigenvalue of the training loss",
        title="flatter minima test better",
    )
    middle.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    middle.xaxis.set_major_formatter("{x:g}")
    middle.xaxis.set_minor_formatter(NullFormatter())
    middle.legend(frameon=False)
    _draw_signed(right, results)
    return [plots.save(made, output, "compare")]


def _draw_signed(axis: Any, results: dict[str, Any]) -> None:
    common = results["signed_epsilon"]
    for position, (step, values) in enumerate(
        zip(common["epsilon"], common["accuracy"], strict=True)
    ):
        mean, error, _ = statistics.estimate(100 * values)
        axis.errorbar(position, mean, error, fmt="o", color=plots.COLORS[_label(step)])
        axis.annotate(
            _label(step),
            (position, mean),
            (6, -11),
            textcoords="offset points",
            color=plots.COLORS[_label(step)],
            fontsize=9,
        )
    plain = statistics.estimate(100 * _method(results, "SGD")["accuracy"]).mean
    axis.axhline(plain, color=plots.COLORS["SGD"], ls="--", lw=1)
    axis.annotate(
        "SGD", (0, plain), (0, 3), textcoords="offset points", color=plots.COLORS["SGD"], fontsize=9
    )
    axis.set_xticks(range(len(common["epsilon"])), [f"{step:g}" for step in common["epsilon"]])
    axis.set_xlim(-0.4, len(common["epsilon"]) - 0.3)
    axis.set(
        xlabel="signed ascent step $\\epsilon$",
        ylabel="test accuracy %",
        title=f"at one $\\gamma$ = {common['gamma']:g}",
    )


def _train(
    trainer: Trainer, settings: list[Mapping[str, float]], seeds: Any
) -> list[dict[str, Any]]:
    """All settings of a method side by side; the metrics of each over the seeds."""
    lanes = {
        name: np.repeat([setting[name] for setting in settings], len(seeds)) for name in settings[0]
    }
    found = trainer(lanes, np.tile(seeds, len(settings)), progress=True)
    shaped = {name: found[name].reshape(len(settings), len(seeds)) for name in METRICS}
    return [{name: values[i] for name, values in shaped.items()} for i in range(len(settings))]


def _label(step: float) -> str:
    return "DB" if step == 0 else "F-GR" if step > 0 else "B-GR"


def _common(step: float) -> dict[str, float]:
    return {"gamma": COMMON_GAMMA} if step == 0 else {"gamma": COMMON_GAMMA, "epsilon": abs(step)}


def _method(results: dict[str, Any], label: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        method for method in results["methods"] if method["label"] == label
    )
    return found


def _percent(values: Any) -> str:
    found = statistics.estimate(100 * np.asarray(values))
    lost = len(values) - found.size
    return f"{found:.1f}" + (f" ({lost} of {len(values)} diverged)" if lost else "")


def _row(method: dict[str, Any], plain: Any) -> str:
    setting = " ".join(f"{_SYMBOLS[name]}={value:g}" for name, value in method["settings"].items())
    gain = statistics.paired(100 * method["accuracy"], 100 * plain)
    minus = ("", "") if method["label"] == "SGD" else (f"{gain:+.1f}", f"{gain.p:.1g}")
    loss, sharpness = (
        statistics.estimate(method["train_loss"]),
        statistics.estimate(method["eigenvalue"]),
    )
    start = (
        f"{method['label']:<9} {setting:<13} {_percent(method['accuracy']):>15} {minus[0]:>14}"
        f" {minus[1]:>8}"
    )
    return (
        f"{start} {loss.mean:>10.3f} {f'{sharpness:.2f}':>14} {method['gradients']:>9g}"
        f" {method['flops']:>6.2f}"
    )


_SYMBOLS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b"}
