r"""Cost: what a regularized step takes beside a plain one, in time, FLOPs, memory and compilation.

For a network of :math:`L` layers a gradient takes about :math:`3L` matrix products (forward, and
backward to inputs and to weights), F-GR with its two gradients about :math:`6L`, double
backpropagation about :math:`9L`. FLOPs are XLA's own count; times are measured in turn within one
process, and given as ratios to plain SGD. Source: Karakida et al., ICML 2023.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from gradreg_optax._typing import PyTree
from gradreg_optax.experiments.models import Model, build
from gradreg_optax.experiments.timing import Floats, Program, interleave, ratio
from gradreg_optax.experiments.timing import build as compile_step
from gradreg_optax.training import make_train_step
from gradreg_optax.transforms import dbp_gradreg, fd_gradreg, flooding, sam

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
class Config:
    """Two families of networks, and how often to time a step."""

    output: Path = Path("results/cost")
    """Folder for results.json and the figure."""
    seed: int = 0
    """Seed of weights and data, neither of which matters for the cost."""
    redraw: bool = False
    """Draw the figure from the results on disk, without a run."""
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
      For "mlp" and "resnet" a dict of ``sizes``, ``products`` (FLOPs of one matrix product,
      averaged over the layers; NaN for the residual network), and arrays over (size, method):
      ``flops``, ``memory``, ``trace``, ``compile``, ``seconds`` (with a last axis over rounds).
      ``methods`` names them.
    """
    inputs = {"mlp": (config.hidden,), "resnet": (config.image, config.image, 3)}
    networks = {
        "mlp": {
            depth: build("mlp", inputs["mlp"], CLASSES, width=config.hidden, depth=depth - 1)
            for depth in config.depths
        },
        "resnet": {width: residual_network(width) for width in config.widths},
    }
    with tqdm(
        total=len(METHODS) * (len(config.depths) + len(config.widths)), unit="program", disable=None
    ) as progress:
        found: dict[str, Any] = {"methods": list(METHODS)}
        for family, members in networks.items():
            found[family] = _measure(config, family, members, inputs[family], progress)
    return found


def _measure(
    config: Config,
    family: str,
    networks: Mapping[int, Model],
    shape: tuple[int, ...],
    progress: Any,
) -> dict[str, Any]:
    rows = []
    for size, network in networks.items():
        progress.set_description(f"{family}, size {size}")
        batch = made_up_batch(config.seed, config.batch, shape)
        params = jax.jit(network.init)(jax.random.key(config.seed))
        products = _matrix_product(params, config.batch) if family == "mlp" else math.nan
        rows.append(
            {"products": products}
            | _measure_one(cross_entropy(network), params, batch, config.rounds, progress)
        )
    return {"sizes": list(networks)} | {
        key: np.array([row[key] for row in rows]) for key in rows[0]
    }


def _measure_one(
    loss_fn: Callable[..., jax.Array], params: PyTree, batch: Batch, rounds: int, progress: Any
) -> dict[str, Any]:
    programs: dict[str, Program] = {}
    for name, regularizer in METHODS.items():
        init, step = make_train_step(loss_fn, optax.sgd(0.01), regularizer)
        programs[name] = compile_step(step, init(params), batch)
        progress.update()
    seconds = interleave({name: program.run for name, program in programs.items()}, range(rounds))
    columns: Any = {
        key: [getattr(p, key) for p in programs.values()]
        for key in ("flops", "memory", "trace", "compile")
    }
    return {**columns, "seconds": list(seconds.values())}


def made_up_batch(seed: int, size: int, shape: Sequence[int]) -> Batch:
    """Normal inputs and random labels, on the device."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32), jnp.asarray(
        rng.integers(CLASSES, size=size)
    )


def cross_entropy(network: Model) -> Callable[[PyTree, Batch], jax.Array]:
    """The mean cross entropy of a network, as a function of parameters and batch."""

    def loss_fn(params: PyTree, batch: Batch) -> jax.Array:
        logits = network.apply(params, batch[0])
        loss: jax.Array = jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        )
        return loss

    return loss_fn


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
            x = _convolve(x, block["skip"], stride) + _convolve(
                jax.nn.gelu(hidden), block["second"], 1
            )
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


def table(results: dict[str, Any]) -> str:
    """The costs as ratios to plain SGD, for the largest network of each family, and the ratios that
    the paper speaks of for all.

    Args:
      results: what :func:`run` returned.

    Returns:
      Lines of text. Times come with their quartiles over rounds, ``[lower, upper]``.
    """
    lines = []
    for family, axis in AXES.items():
        found = results[family]
        lines += [
            f"{family}, {axis} = {found['sizes'][-1]:g}; as multiples of {PLAIN}:",
            _row("", "FLOPs", "time", "memory", "compile"),
        ]
        for i, name in enumerate(results["methods"]):
            numbers = [
                f"{float(found[key][-1][i] / found[key][-1][0]):.2f}"
                for key in ("flops", "memory", "compile")
            ]
            lines.append(
                _row(
                    name,
                    numbers[0],
                    str(ratio(found["seconds"][-1][i], found["seconds"][-1][0])),
                    *numbers[1:],
                )
            )
        lines.append("")
    return "\n".join([*lines, *_headlines(results)])


def _row(name: str, flops: str, seconds: str, memory: str, compilation: str) -> str:
    return f"  {name:<24}{flops:>7}  {seconds:>20}{memory:>8}{compilation:>9}"


def _headlines(results: dict[str, Any]) -> list[str]:
    names = list(results["methods"])
    pairs = [
        ("F-GR", PLAIN),
        ("DB forward-over-reverse", "F-GR"),
        ("DB reverse-over-reverse", "F-GR"),
    ]
    lines = []
    for above, below in pairs:
        for family in AXES:
            found = zip(results[family]["sizes"], results[family]["seconds"], strict=True)
            spread = "; ".join(
                f"{size:g}: {ratio(rows[names.index(above)], rows[names.index(below)])}"
                for size, rows in found
            )
            lines.append(f"time {above} / {below}, {family}: {spread}")
    return lines


def plot(results: dict[str, Any], output: Path) -> list[Path]:
    """Draws the paper's cost figure.

    Args:
      results: what :func:`run` returned, or the same read from disk.
      output: the folder for ``cost.png``.

    Returns:
      The path of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    _plot_products(axes[0], results)
    _plot_times(axes[1], results, "mlp")
    _plot_times(axes[2], results, "resnet")
    axes[2].set_yscale("log")
    axes[2].set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        fontsize="small",
    )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "cost.png"
    figure.savefig(path, dpi=150)
    return [path]


def _plot_products(axes: Any, results: dict[str, Any]) -> None:
    found = results["mlp"]
    depths = np.asarray(found["sizes"])
    for i in range(len(results["methods"])):
        axes.plot(
            depths, np.asarray(found["flops"])[:, i] / found["products"], _marker(i), color=f"C{i}"
        )
    for count in THEORY.values():
        axes.plot(depths, count * depths, ":", color="black", linewidth=1)
        axes.annotate(
            f"{count}L",
            (depths[-1], count * depths[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set(
        title="MLP: XLA's FLOPs",
        xlabel=AXES["mlp"],
        ylabel="FLOPs, in matrix products",
        xticks=depths,
    )


def _plot_times(axes: Any, results: dict[str, Any], family: str) -> None:
    found = results[family]
    sizes: Floats = np.arange(len(found["sizes"]), dtype=float)
    for i, name in enumerate(results["methods"]):
        ratios = [ratio(rows[i], rows[0]) for rows in found["seconds"]]
        middle = [r.median for r in ratios]
        spread = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        place = sizes + 0.04 * (i - len(results["methods"]) / 2)
        axes.errorbar(
            place,
            middle,
            spread,
            fmt=f"{_marker(i)}-",
            color=f"C{i}",
            label=name,
            linewidth=1,
            markersize=5,
        )
    for count in THEORY.values():
        axes.axhline(count / THEORY[PLAIN], color="black", linestyle=":", linewidth=1)
    title = {"mlp": "MLP", "resnet": "residual network"}[family]
    axes.set(title=f"{title}: time per step", xlabel=AXES[family], ylabel=f"times {PLAIN}")
    axes.set_xticks(sizes, [f"{size:g}" for size in found["sizes"]])


def _marker(position: int) -> str:
    return "os^vDPXd"[position]
