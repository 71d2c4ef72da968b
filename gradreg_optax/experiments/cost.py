r"""Cost of a regularized step relative to a plain one: time, FLOPs, memory and compile time.

For a network with :math:`L` layers a gradient takes about :math:`3L` matrix products (forward, and
backward to inputs and to weights), F-GR with its two gradients about :math:`6L`, and double
backpropagation about :math:`9L`. FLOPs are XLA's count. Times are measured in turn in one process.
Source: Karakida et al., ICML 2023.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import dbp_gradreg, fd_gradreg, flooding, make_train_step, sam
from gradreg_optax.experiments import common, models, plots, runs, timing
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.timing import ratio
from gradreg_optax.experiments.trainer import cross_entropy

CLASSES = 10
PLAIN = "SGD"
METHODS: dict[str, optax.GradientTransformation | None] = {
    PLAIN: None,
    "F-GR": fd_gradreg(gamma=0.01, epsilon=0.1),
    "B-GR": fd_gradreg(gamma=0.01, epsilon=0.1, scheme="backward"),
    "C-GR": fd_gradreg(gamma=0.01, epsilon=0.1, scheme="central"),
    "SAM": sam(rho=0.05),
    "DB forward-over-reverse": dbp_gradreg(gamma=0.01),
    "DB reverse-over-reverse": dbp_gradreg(gamma=0.01, mode="reverse_over_reverse"),
    "flooding": flooding(level=0.1),
}
RATIOS = {"F-GR": PLAIN, "DB forward-over-reverse": "F-GR", "DB reverse-over-reverse": "F-GR"}
THEORY = {PLAIN: 3, "F-GR": 6, "DB forward-over-reverse": 9}  # matrix products per layer
AXES = {"mlp": "depth (layers)", "resnet": "width (channels of the first stage)"}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``gradreg cost``."""

    output: Path = Path("results/cost")
    depths: tuple[int, ...] = (3, 6, 12)
    """Numbers of layers of the MLP."""
    hidden: int = 256
    """Units of each hidden layer of the MLP, and features of its input."""
    widths: tuple[int, ...] = (4, 8, 16)
    """Channels in the first of three stages of the residual network."""
    image: int = 12
    """Height and width of the images."""
    batch: int = 32
    """Samples in a batch."""
    rounds: int = 20
    """Timed rounds; each method takes one step per round."""


def run(config: Config) -> dict[str, Any]:
    """Measure every method on every network.

    Returns:
      One row for each "family" ("mlp" or "resnet"), "size" and "method": "programs", with
      "products" (FLOPs of one matrix product, averaged over the layers; NaN for the residual
      network), "flops", "memory", "trace" and "compile"; and "times", the "seconds" of each
      "round".
    """
    store = runs.Store(config.output, config=common.settings(config))
    networks = [("mlp", depth) for depth in config.depths]
    networks += [("resnet", width) for width in config.widths]
    programs, times = [], []
    for family, size in common.progress("cost", "network", networks):
        make = partial(_measure, config, family, size)
        found = store.keep(f"{family}-{size}", [family, size], make)
        axes = {"family": [family], "size": [size], "method": list(METHODS)}
        rounds = axes | {"round": np.arange(config.rounds)}
        times.append(runs.tidy(rounds, seconds=found.pop("seconds")))
        programs.append(runs.tidy(axes, **found))
    store.clear()  # the next run measures again
    return {"programs": runs.stack(*programs), "times": runs.stack(*times)}


def family_costs(results: dict[str, Any], family: str) -> dict[str, Any]:
    """Return the costs of a family as arrays of shape (sizes, methods).

    "seconds" has a last axis for the rounds; "sizes" and "methods" are the axes.
    """
    programs, times = (runs.select(results[name], family=family) for name in ("programs", "times"))
    found = runs.blocks(programs, "size", "method") | runs.blocks(times, "size", "method", "round")
    return found | {"sizes": found["size"], "methods": found["method"].tolist()}


def _measure(config: Config, family: str, size: int) -> dict[str, Any]:
    if family == "mlp":
        shape: tuple[int, ...] = (config.hidden,)
        network = models.build("mlp", shape, CLASSES, width=config.hidden, depth=size - 1)
    else:  # with XLA's convolution, which has no fast kernel if it is differentiated twice
        shape = (config.image, config.image, 3)
        network = models.build("resnet", shape, CLASSES, width=size, xla=True)
    batch = random_batch(config.seed, config.batch, shape)
    params = jax.jit(network.init)(jax.random.key(config.seed))
    programs = {}
    for name, regularizer in METHODS.items():
        init, step = make_train_step(cross_entropy(network.apply), optax.sgd(0.01), regularizer)
        programs[name] = timing.build(step, init(params), batch)
    columns = dict(zip(timing.Program._fields, zip(*programs.values(), strict=True), strict=True))
    steps = dict(zip(programs, columns.pop("run"), strict=True))
    products = _matrix_product(params, config.batch) if family == "mlp" else math.nan
    seconds = list(timing.interleave(steps, range(config.rounds)).values())
    return columns | {"products": [products] * len(METHODS), "seconds": seconds}


def random_batch(seed: int, size: int, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Return normal inputs and random labels."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    return x, jnp.asarray(rng.integers(CLASSES, size=size))


def _matrix_product(params: models.PyTree, batch: int) -> float:
    """Return the FLOPs of one matrix product of the forward pass, averaged over the layers."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    return float(2 * batch * sum(kernel.size for kernel in kernels) / len(kernels))


def table(results: dict[str, Any]) -> Report:
    """Return the costs for the largest network of each family, and the ratios of times."""
    parts: list[Table | str] = []
    for family in AXES:
        found, rows = family_costs(results, family), []
        last = {name: found[name][-1] for name in ("flops", "memory", "compile", "seconds")}
        for i, method in enumerate(found["methods"]):
            counts = [last[name][i] / last[name][0] for name in ("flops", "memory", "compile")]
            flops, memory, compiling = (Number(count, ".2f") for count in counts)
            time = ratio(last["seconds"][i], last["seconds"][0])
            rows.append([method, flops, time, memory, compiling])
        title = f"{family}, {AXES[family]} = {found['sizes'][-1]:g}; relative to {PLAIN}"
        parts += [Table(title, ["method", "FLOPs", "time", "memory", "compile time"], rows), ""]
    rows = []
    for above, below in RATIOS.items():
        for (family, size), found in runs.groups(results["times"], "family", "size"):
            a, b = (runs.select(found, method=name)["seconds"] for name in (above, below))
            rows.append([f"{above} / {below}", family, Number(size), ratio(a, b)])
    ratios = Table("", ["ratio of times", "network", "size", "ratio"], rows)
    return Report(*parts, ratios, "Times are medians over rounds, with quartiles in brackets.")


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw FLOPs in matrix products against depth, and times relative to plain SGD.

    Args:
      results: the value of :func:`run`, or the same read from disk.
      output: the directory for ``cost.png``.
      formats: file formats.

    Returns:
      The paths of the figure.
    """
    made, axes = plots.figure(3, width=4.4, height=4.0)
    mlp = family_costs(results, "mlp")
    _plot_products(axes[0], mlp)
    _plot_times(axes[1], mlp, "mlp", "MLP")
    _plot_times(axes[2], family_costs(results, "resnet"), "resnet", "residual network")
    axes[2].set_yscale("log")
    axes[2].set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    style: Any = {"loc": "outside lower center", "frameon": False, "fontsize": "small"}
    made.legend(*axes[1].get_legend_handles_labels(), ncols=len(METHODS), **style)
    return plots.save(made, output / "cost", formats)


def _plot_products(axis: Any, found: dict[str, Any]) -> None:
    depths, products = found["sizes"], found["flops"] / found["products"]
    for i in range(len(found["methods"])):
        axis.plot(depths, products[:, i], _MARKERS[i], color=f"C{i}")
    for count in THEORY.values():
        end = (depths[-1], count * depths[-1])
        axis.plot(depths, count * depths, ":", color="black", linewidth=1)
        axis.annotate(f"{count}L", end, (4, 0), textcoords="offset points", va="center")
    axis.set(title="MLP: XLA's FLOPs", xlabel=AXES["mlp"], ylabel="FLOPs (matrix products)")
    axis.set_xticks(depths)


def _plot_times(axis: Any, found: dict[str, Any], family: str, title: str) -> None:
    sizes: timing.Floats = np.arange(len(found["sizes"]), dtype=float)
    for i, name in enumerate(found["methods"]):
        ratios = [ratio(rows[i], rows[0]) for rows in found["seconds"]]
        middle = [r.median for r in ratios]
        spread = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        place = sizes + 0.04 * (i - len(found["methods"]) / 2)
        style: Any = {"color": f"C{i}", "label": name, "linewidth": 1, "markersize": 5}
        axis.errorbar(place, middle, spread, fmt=f"{_MARKERS[i]}-", **style)
    for count in THEORY.values():
        axis.axhline(count / THEORY[PLAIN], color="black", linestyle=":", linewidth=1)
    axis.set(title=f"{title}: time per step", xlabel=AXES[family], ylabel=f"relative to {PLAIN}")
    axis.set_xticks(sizes, [f"{size:g}" for size in found["sizes"]])


_MARKERS = "os^vDPXd"
