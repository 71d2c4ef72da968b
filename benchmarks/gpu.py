"""Step times and a sweep on a GPU, in one call: ``python -m benchmarks.gpu --output FOLDER``.

It times a transformer and a wide residual network in float32 and in bfloat16 (parameters in
float32, computation in bfloat16), then runs ``gradreg sweep --model resnet`` on digits. The results
are written to ``gpu.json`` after every network, so that a run that is cut off keeps what it has.

Tested at toy size on a CPU only (``--size toy``); the sizes for a GPU are estimates.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.jax_steps import EPSILON, FRACTION, GAMMA, INTERVAL, RATE, RHO, interleave
from benchmarks.networks import Problem, residual, transformer
from gradreg_optax import dbp_gradreg, fd_gradreg, make_train_step, relative_gradreg, sam
from gradreg_optax.experiments import results, sweep, timing

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "full": {
        "transformer": {"width": 768, "layers": 12, "batch": 16, "length": 512},
        "wide residual network": {"width": 64, "batch": 256, "side": 32},
    },
    "toy": {
        "transformer": {"width": 16, "layers": 1, "batch": 4, "length": 8},
        "wide residual network": {"width": 4, "batch": 4, "side": 8},
    },
}
SWEEP: dict[str, dict[str, Any]] = {
    "full": {"steps": 1500, "width": 16, "depth": 2, "seeds": 2, "report_seeds": 5, "lanes": 20},
    "toy": {"steps": 4, "width": 2, "seeds": 1, "report_seeds": 1, "test_size": 40},
}
GRID: dict[str, Any] = {
    "methods": ("SGD", "DB", "F-GR", "SAM", "relative"),
    "gammas": (0.1, 0.3, 1.0),
    "epsilons": (1.0,),
    "rhos": (0.1, 0.3, 1.0),
    "strengths": (0.25, 0.5, 1.0),
}
BUILDERS: dict[str, Callable[[str, Mapping[str, int]], Problem]] = {
    "transformer": lambda dtype, size: transformer(**size, dtype=dtype),
    "wide residual network": lambda dtype, size: residual(**size, dtype=dtype),
}
METHODS: dict[str, tuple[optax.GradientTransformation | None, float]] = {
    "SGD": (None, 1.0),
    "F-GR": (fd_gradreg(gamma=GAMMA, epsilon=EPSILON), 1.0),
    "SAM": (sam(rho=RHO), 1.0),
    "lazy F-GR": (fd_gradreg(gamma=GAMMA, epsilon=EPSILON, interval=INTERVAL), FRACTION),
    "relative": (relative_gradreg(), 1.0),
    "DB": (dbp_gradreg(gamma=GAMMA), 1.0),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run, and where to write it."""

    output: Path = Path("results/gpu")
    """Output directory."""
    size: Literal["full", "toy"] = "full"
    """Sizes of the networks and of the sweep."""
    rounds: int = 30
    """Rounds in which every step is taken once, the lazy one as often as its period is long."""
    sweep: bool = True
    """Run the sweep after the step times."""


def main(config: Config) -> None:
    """Measure, and write ``gpu.json`` after each network.

    Args:
      config: what to run.
    """
    document: dict[str, Any] = {"command": "python -m benchmarks.gpu", "size": config.size}
    document |= {"versions": results.versions(), "machine": results.machine(), "steps": {}}
    for name, size in SIZES[config.size].items():
        for dtype in ("float32", "bfloat16"):
            document["steps"][f"{name}, {dtype}"] = dict(size) | measure(name, dtype, config)
            results.write(config.output / "gpu.json", document)
            print(_line(f"{name}, {dtype}", document["steps"][f"{name}, {dtype}"]), flush=True)
    if config.sweep:
        start, folder = time.perf_counter(), config.output / "sweep"
        how = sweep.Config(output=folder, model="resnet", **GRID, **SWEEP[config.size])
        found = sweep.run(how)
        document["sweep"] = found | {"total_seconds": time.perf_counter() - start}
        results.write(config.output / "gpu.json", document)
        print(sweep.table(results.load(results.save(folder, "gradreg sweep", how, found))))
    print(f"results: {config.output / 'gpu.json'}")


def measure(name: str, dtype: str, config: Config) -> dict[str, Any]:
    """Seconds per step, FLOPs, memory and compile time of every method on one network.

    Args:
      name: the network.
      dtype: type of the computation.
      config: sizes and rounds.
    """
    problem = BUILDERS[name](dtype, SIZES[config.size][name])
    programs, failed = dict[str, timing.Program](), dict[str, str]()
    for label, (regularizer, fraction) in METHODS.items():
        init, step = make_train_step(
            problem.loss_fn, optax.sgd(RATE), regularizer, penalty_fraction=fraction
        )
        state = init(jax.tree.map(jnp.copy, problem.params))
        try:
            programs[label] = timing.build(step, state, problem.batch)
        except jax.errors.JaxRuntimeError as error:  # out of memory: the other methods still count
            failed[label] = str(error)[:300]
    seconds = interleave(programs, range(config.rounds))
    rows = {label: _row(program, seconds[label]) for label, program in programs.items()}
    return {"methods": rows, "failed": failed}


def _row(program: timing.Program, seconds: Any) -> dict[str, Any]:
    found = {"seconds": seconds, "median": float(np.median(seconds)), "trace": program.trace}
    found |= {"compile": program.compile, "flops": program.flops, "memory": program.memory}
    return found


def _line(name: str, found: Mapping[str, Any]) -> str:
    plain = found["methods"]["SGD"]["seconds"]
    ratios = {
        label: timing.ratio(row["seconds"], plain).median for label, row in found["methods"].items()
    }
    shown = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    return f"{name}: SGD {1e3 * np.median(plain):.2f} ms; relative to it: {shown}"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
