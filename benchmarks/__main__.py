"""``python -m benchmarks``: measures everything, prints the table, and writes
``benchmarks/results/<cpu|gpu>.json``.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.jax_steps import interleave, steps
from benchmarks.networks import SHAPES, problem
from benchmarks.report import table
from gradreg_optax.experiments import results, timing

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    output: Path = HERE / "results"
    """Folder for the results."""
    networks: tuple[str, ...] = tuple(SHAPES)
    """Which networks."""
    rounds: int = 60
    """Rounds in which every step is taken once."""
    compiles: int = 3
    """How often each step is traced and compiled."""
    torch_python: str = sys.executable
    """A Python interpreter with PyTorch; without PyTorch there its rows are left out."""
    torch_threads: int = 0
    """Threads of PyTorch on the CPU, 0 for its default; on a busy machine its threads wait for each
    other, and 1 is faster."""


def main(config: Config) -> None:
    """Measures, writes and prints.

    Args:
      config: what to measure.
    """
    peers = measure_torch(config)  # first, so that neither framework waits for the other's threads
    found = {name: measure_jax(name, config) for name in config.networks}
    machine = results.machine()
    document = {
        "command": "python -m benchmarks",
        "rounds": config.rounds,
        "compiles": config.compiles,
    }
    document |= {"versions": results.versions(), "machine": machine, "jax": found, "torch": peers}
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{machine['backend']}.json"
    path.write_text(json.dumps(results.plain(document), indent=1) + "\n")
    print(table(json.loads(path.read_text())))
    print(f"results: {path}")


def measure_jax(name: str, config: Config) -> dict[str, Any]:
    """Every JAX step on one network.

    Args:
      name: the network.
      config: how often.

    Returns:
      For each step ``seconds`` (one per round), ``trace`` and ``compile`` (one per repetition),
      ``flops`` and ``memory``.
    """
    task = problem(name)
    builders = steps(task)
    programs: dict[str, list[timing.Program]] = {label: [] for label in builders}
    for _ in tqdm(range(config.compiles), desc=f"{name}: compiling", disable=None):
        for label, builder in builders.items():
            step, state = builder()
            programs[label].append(timing.build(step, state, task.batch))
    rounds = tqdm(range(config.rounds), desc=f"{name}: running", disable=None)
    seconds = interleave({label: found[-1] for label, found in programs.items()}, rounds)
    return {label: _row(found, seconds[label]) for label, found in programs.items()}


def _row(programs: list[timing.Program], seconds: Any) -> dict[str, Any]:
    columns = {"trace": [p.trace for p in programs], "compile": [p.compile for p in programs]}
    return columns | {
        "seconds": np.asarray(seconds),
        "flops": programs[-1].flops,
        "memory": programs[-1].memory,
    }


def measure_torch(config: Config) -> dict[str, Any] | None:
    """The PyTorch steps, in a process of their own; None where there is no PyTorch.

    Args:
      config: the networks, the rounds and the interpreter.

    Returns:
      What ``benchmarks/torch_steps.py`` prints.
    """
    if config.torch_python == sys.executable and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed here: its rows are left out.")
        return None
    options = [
        "--rounds",
        str(config.rounds),
        "--threads",
        str(config.torch_threads),
        "--networks",
        *config.networks,
    ]
    command = [config.torch_python, str(HERE / "torch_steps.py"), *options]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
