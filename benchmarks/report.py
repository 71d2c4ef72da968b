"""The tables of the README, drawn from the committed results: ``python -m benchmarks.report
[results.json]``.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jax_steps import INTERVAL
from gradreg_optax.experiments.timing import ratio

RESULTS = Path(__file__).parent / "results"
PLAIN = "SGD"
# Who is compared with whom beyond plain SGD.
DUELS = [
    ("F-GR, make_train_step", "F-GR by hand"),
    ("F-GR, optax.chain", "F-GR by hand"),
    ("F-GR, fd_value_and_grad", "F-GR by hand"),
    ("SAM, make_train_step", "SAM, optax.contrib.sam"),
    ("SAM, optax.chain", "SAM, optax.contrib.sam"),
]


def table(document: dict[str, Any]) -> str:
    """Three Markdown tables: time, and what XLA counts, as multiples of plain SGD in the same
    framework; and ours against peers.

    Args:
      document: the contents of a results file.

    Returns:
      Markdown.
    """
    networks = list(document["jax"])
    machine, versions = document["machine"], document["versions"]
    lines = [
        f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), JAX"
        f" {versions['jax']}, Optax {versions['optax']}"
        + (
            f", PyTorch {document['torch']['version']} on {document['torch']['threads']} threads"
            if document["torch"]
            else ""
        )
        + f"; medians of {document['rounds']} interleaved rounds with their quartiles.",
        "",
        "Time per step, as a multiple of the same framework's SGD:",
        "",
        *_markdown(
            ["step", *networks],
            [*_jax_times(document, networks), *_torch_times(document, networks)],
        ),
        "",
        "FLOPs, temporary memory, tracing with lowering, and compilation, as multiples of SGD:",
        "",
        *_markdown(["step", *networks], _counts(document, networks)),
        "",
        (
            "Time relative to the loop written by hand and to Optax's SAM (± half the 95 %"
            " confidence interval of the median):"
        ),
        "",
        *_markdown(["ratio", *networks], _duels(document, networks)),
    ]
    return "\n".join(lines)


def _jax_times(document: dict[str, Any], networks: list[str]) -> list[list[str]]:
    rows = []
    for label in document["jax"][networks[0]]:
        cells = [document["jax"][name] for name in networks]
        rows.append(
            [
                label,
                *(
                    _time(cell[label]["seconds"], cell[PLAIN]["seconds"], label == PLAIN)
                    for cell in cells
                ),
            ]
        )
    return rows


def _torch_times(document: dict[str, Any], networks: list[str]) -> list[list[str]]:
    if not document["torch"]:
        return []
    cells = [document["torch"]["networks"][name]["seconds"] for name in networks]
    return [
        [
            f"{label}, PyTorch eager",
            *(_time(cell[label], cell[PLAIN], label == PLAIN) for cell in cells),
        ]
        for label in cells[0]
    ]


def _time(seconds: list[float], plain: list[float], absolute: bool) -> str:
    return (
        f"1 ({1e3 * np.median(seconds):.3g} ms)"
        if absolute
        else str(ratio(np.array(seconds), np.array(plain)))
    )


def _counts(document: dict[str, Any], networks: list[str]) -> list[list[str]]:
    rows = []
    for label in document["jax"][networks[0]]:
        if label != PLAIN:
            rows.append(
                [
                    label,
                    *(
                        _count(document["jax"][name][label], document["jax"][name][PLAIN], label)
                        for name in networks
                    ),
                ]
            )
    return rows


def _count(found: dict[str, Any], plain: dict[str, Any], label: str) -> str:
    flops = found["flops"] / plain["flops"]
    if "lazy" in label:  # XLA counts the more expensive branch, which runs every INTERVAL-th step
        flops = (flops + INTERVAL - 1) / INTERVAL
    memory = found["memory"] / plain["memory"]
    trace, compilation = (
        np.median(found[key]) / np.median(plain[key]) for key in ("trace", "compile")
    )
    return f"{flops:.2f} / {memory:.2f} / {trace:.2f} / {compilation:.2f}"


def _duels(document: dict[str, Any], networks: list[str]) -> list[list[str]]:
    def cell(name: str, ours: str, peer: str) -> str:
        found = document["jax"][name]
        ratios = np.array(found[ours]["seconds"]) / np.array(found[peer]["seconds"])
        return f"{np.median(ratios):.3f} ± {noise(ratios):.3f}"

    return [
        [f"{ours} / {peer}", *(cell(name, ours, peer) for name in networks)] for ours, peer in DUELS
    ]


def noise(ratios: Any) -> float:
    """Return half the width of the 95 % confidence interval of the median, by order statistics."""
    values = np.sort(ratios)
    # 1.96 standard deviations of a binomial count around n / 2
    low = max(math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values))), 0)
    return float(values[-1 - low] - values[low]) / 2


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


if __name__ == "__main__":
    print(
        table(
            json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS / "cpu.json").read_text())
        )
    )
