r"""Cost: what a regularized step takes beside a plain one, in time, FLOPs, memory and compilation.

For a network of :math:`L` layers a gradient takes about :math:`3L` matrix products (forward, and
backward to inputs and to weights), F-GR with its two gradients about :math:`6L`, double
backpropagation about :math:`9L`. FLOPs are XLA's own count; times are measured in turn within one
process, and given as ratios to plain SGD. Source: Karakida et al., ICML 2023.
"""

import dataclasses
import itertools
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
from gradreg_optax.experiments import common, plots, runs
from gradreg_optax.experiments.models import Model, PyTree, build
from gradreg_optax.experiments.report import Number, Report, Table
from gradreg_optax.experiments.timing import Floats, Program, interleave, ratio
from gradreg_optax.experiments.timing import build as compile_step
from gradreg_optax.experiments.trainer import cross_entropy

Batch = tuple[jax.Array, jax.Array]
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
# Matrix products per layer, from the paper.
THEORY = {PLAIN: 3, "F-GR": 6, "DB forward-over-reverse": 9}
AXES = {"mlp": "depth: layers", "resnet": "width: channels of the first stage"}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Two families of networks, and how often to time a step."""

    output: Path = Path("results/cost")
    depths: tuple[int, ...] = (3, 6, 12)
    """Layers of the MLP."""
    hidden: int = 256
    """Units of each hidden layer of the MLP, and features of its input."""
    widths: tuple[int, ...] = (4, 8, 16)
    """Channels of the first of three stages of the residual convolutional network."""
    image: int = 12
    """Height and width of its images."""
    batch: int = 32
    """Samples in a batch."""
    rounds: int = 20
    """Rounds in which every method takes one step."""


def run(config: Config) -> dict[str, Any]:
    """Measures every method on every network.

    Args:
      config: the networks and the number of rounds.

    Returns:
      One row a "family" ("mlp" or "resnet"), a "size" and a "method": "programs", with "products"
      (FLOPs of one matrix product, averaged over the layers; NaN for the residual network),
      "flops", "memory", "trace" and "compile"; and "times", the "seconds" of each "round".
    """
    store = runs.Store(config.output, config=common.settings(config))
    networks = [("mlp", depth) for depth in config.depths]
    networks += [("resnet", width) for width in config.widths]
    programs, times = [], []
    with common.progress(len(METHODS) * len(networks), "cost", "program") as progress:
        for family, size in networks:
            make = partial(_measure, config, family, size, progress)
            found = store.keep(f"{family}-{size}", [family, size], make)
            axes = {"family": [family], "size": [size], "method": list(METHODS)}
            seconds = found.pop("seconds")
            programs.append(runs.tidy(axes, **found))
            rounds = axes | {"round": np.arange(config.rounds)}
            times.append(runs.tidy(rounds, seconds=seconds))
    store.clear()  # the next run measures anew
    return {"programs": runs.stack(*programs), "times": runs.stack(*times)}


def family_costs(results: dict[str, Any], family: str) -> dict[str, Any]:
    """The costs of a family as arrays over (sizes, methods), and "seconds" with a last axis over
    rounds; "sizes" and "methods" name them.
    """
    programs, times = (runs.select(results[name], family=family) for name in ("programs", "times"))
    found = runs.blocks(programs, "size", "method")
    found |= runs.blocks(times, "size", "method", "round")
    return found | {"sizes": found["size"], "methods": found["method"].tolist()}


def _measure(config: Config, family: str, size: int, progress: Any) -> dict[str, Any]:
    shape = (config.hidden,) if family == "mlp" else (config.image, config.image, 3)
    network = residual_network(size)
    if family == "mlp":
        network = build("mlp", shape, CLASSES, width=config.hidden, depth=size - 1)
    batch = made_up_batch(config.seed, config.batch, shape)
    params = jax.jit(network.init)(jax.random.key(config.seed))
    products = _matrix_product(params, config.batch) if family == "mlp" else math.nan
    programs: dict[str, Program] = {}
    for name, regularizer in METHODS.items():
        init, step = make_train_step(cross_entropy(network.apply), optax.sgd(0.01), regularizer)
        programs[name] = compile_step(step, init(params), batch)
        progress.update()
    steps = {name: program.run for name, program in programs.items()}
    found: dict[str, Any] = {"products": [products] * len(METHODS)}
    for name in ("flops", "memory", "trace", "compile"):
        found[name] = [getattr(program, name) for program in programs.values()]
    return found | {"seconds": list(interleave(steps, range(config.rounds)).values())}


def made_up_batch(seed: int, size: int, shape: Sequence[int]) -> Batch:
    """Normal inputs and random labels, on the device."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    return x, jnp.asarray(rng.integers(CLASSES, size=size))


def residual_network(width: int, channels: int = 3) -> Model:
    """A residual network of one block in each of three stages, with GELU and XLA's convolution.

    The convolution itself is the point here: differentiated twice it may have no fast kernel.
    """
    stages = [width, 2 * width, 4 * width]

    def init(key: jax.Array) -> PyTree:
        stem, head, *keys = jax.random.split(key, 2 + 3 * len(stages))
        blocks = [
            {
                "first": _normal(keys[3 * i], 3, 3, size, out),
                "second": _normal(keys[3 * i + 1], 3, 3, out, out),
                "skip": _normal(keys[3 * i + 2], 1, 1, size, out),
            }
            for i, (size, out) in enumerate(zip([width, *stages[:-1]], stages, strict=True))
        ]
        return {
            "stem": _normal(stem, 3, 3, channels, width),
            "blocks": blocks,
            "head": _normal(head, stages[-1], CLASSES),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = _convolve(x, params["stem"], 1)
        for i, block in enumerate(params["blocks"]):
            stride = 1 if i == 0 else 2
            hidden = _convolve(jax.nn.gelu(x), block["first"], stride)
            hidden = _convolve(jax.nn.gelu(hidden), block["second"], 1)
            x = _convolve(x, block["skip"], stride) + hidden
        logits: jax.Array = jnp.mean(jax.nn.gelu(x), axis=(1, 2)) @ params["head"]
        return logits

    return Model(init, apply)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _matrix_product(params: PyTree, batch: int) -> float:
    """FLOPs of one matrix product of the forward pass, averaged over the layers."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    return float(2 * batch * sum(kernel.size for kernel in kernels) / len(kernels))


def table(results: dict[str, Any]) -> Report:
    """Return the costs relative to plain SGD for the largest network of each family, and the time
    ratios of the paper for all sizes.
    """
    families = {family: family_costs(results, family) for family in AXES}
    parts: list[Table | str] = []
    for family, found in families.items():
        shares = {key: found[key][-1] / found[key][-1][0] for key in ("flops", "memory", "compile")}
        times = [ratio(row, found["seconds"][-1][0]) for row in found["seconds"][-1]]
        rows = [
            [name, Number(flops, ".2f"), time, Number(memory, ".2f"), Number(compiling, ".2f")]
            for name, time, flops, memory, compiling in zip(
                found["methods"], times, *shares.values(), strict=True
            )
        ]
        title = f"{family}, {AXES[family]} = {found['sizes'][-1]:g}; relative to {PLAIN}"
        parts += [Table(title, ["method", "FLOPs", "time", "memory", "compile time"], rows), ""]
    ratios = Table("", ["ratio of times", "network", "size", "ratio"], _ratios(families))
    return Report(*parts, ratios, "Times are medians over rounds, with quartiles in brackets.")


def _ratios(families: dict[str, Any]) -> list[list[Any]]:
    pairs = [("F-GR", PLAIN)]
    pairs += [(f"DB {mode}", "F-GR") for mode in ("forward-over-reverse", "reverse-over-reverse")]
    rows = []
    for (above, below), (family, found) in itertools.product(pairs, families.items()):
        a, b = (found["methods"].index(name) for name in (above, below))
        for size, seconds in zip(found["sizes"], found["seconds"], strict=True):
            rows.append([f"{above} / {below}", family, Number(size), ratio(seconds[a], seconds[b])])
    return rows


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draws FLOPs in matrix products against depth, and times relative to plain SGD.

    Args:
      results: what :func:`run` returned, or the same read from disk.
      output: the folder for ``cost.png``.
      formats: file formats.

    Returns:
      The path of the figure.
    """
    made, axes = plots.figure(3, width=4.4, height=4.0)
    _plot_products(axes[0], family_costs(results, "mlp"))
    _plot_times(axes[1], family_costs(results, "mlp"), "mlp", "MLP")
    _plot_times(axes[2], family_costs(results, "resnet"), "resnet", "residual network")
    axes[2].set_yscale("log")
    axes[2].set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    look: Any = {"loc": "outside lower center", "frameon": False, "fontsize": "small"}
    made.legend(*axes[1].get_legend_handles_labels(), ncols=len(METHODS), **look)
    return plots.save(made, output / "cost", formats)


def _plot_products(axes: Any, found: dict[str, Any]) -> None:
    depths, products = found["sizes"], found["flops"] / found["products"]
    for i in range(len(found["methods"])):
        axes.plot(depths, products[:, i], _marker(i), color=f"C{i}")
    for count in THEORY.values():
        end = (depths[-1], count * depths[-1])
        axes.plot(depths, count * depths, ":", color="black", linewidth=1)
        axes.annotate(f"{count}L", end, (4, 0), textcoords="offset points", va="center")
    axes.set(title="MLP: XLA's FLOPs", xlabel=AXES["mlp"], ylabel="FLOPs, in matrix products")
    axes.set_xticks(depths)


def _plot_times(axes: Any, found: dict[str, Any], family: str, title: str) -> None:
    sizes: Floats = np.arange(len(found["sizes"]), dtype=float)
    for i, name in enumerate(found["methods"]):
        ratios = [ratio(rows[i], rows[0]) for rows in found["seconds"]]
        middle = [r.median for r in ratios]
        spread = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        place = sizes + 0.04 * (i - len(found["methods"]) / 2)
        look: Any = {"color": f"C{i}", "label": name, "linewidth": 1, "markersize": 5}
        axes.errorbar(place, middle, spread, fmt=f"{_marker(i)}-", **look)
    for count in THEORY.values():
        axes.axhline(count / THEORY[PLAIN], color="black", linestyle=":", linewidth=1)
    axes.set(title=f"{title}: time per step", xlabel=AXES[family], ylabel=f"times {PLAIN}")
    axes.set_xticks(sizes, [f"{size:g}" for size in found["sizes"]])


def _marker(position: int) -> str:
    return "os^vDPXd"[position]
