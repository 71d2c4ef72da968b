"""Time, FLOPs and memory of jitted steps, measured in turn.

The speed of a processor changes from one second to the next. So the steps run in turn, round after
round, and the result is the median over rounds of the ratio within a round, with its quartiles.
"""

import time
import timeit
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      run: takes one step and blocks until it is done.
      trace: seconds to trace and lower the step.
      compile: seconds to compile it.
      flops: XLA's count of floating-point operations; for a conditional, of its larger branch.
      memory: bytes of temporary memory, without arguments and results.
    """

    run: Callable[[], None]
    trace: float
    compile: float
    flops: float
    memory: int


def build(step: Any, state: Any, *args: Any) -> Program:
    """Trace and compile a jitted ``step(state, *args) -> (state, ...)``, with JAX's caches cleared.

    Args:
      step: a jitted function, which may donate the state.
      state: the initial state; not usable afterwards.
      *args: further arguments, the same for every step.
    """
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(state, *args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()

    def run() -> None:
        nonlocal state
        # Users call the step itself, and it dispatches faster than its compiled form.
        state = jax.block_until_ready(step(state, *args)[0])

    run()
    flops = float(compiled.cost_analysis()["flops"])
    memory = int(compiled.memory_analysis().temp_size_in_bytes)
    return Program(run, traced - start, done - traced, flops, memory)


def interleave(runs: Mapping[str, Callable[[], None]], rounds: Iterable[int]) -> dict[str, Floats]:
    """Time functions in turn.

    Args:
      runs: blocking functions by name.
      rounds: ``range(n)``, or a progress bar around it. Each round starts with another function.

    Returns:
      Seconds per call, one value for each round.
    """
    names, seconds = list(runs), {name: list[float]() for name in runs}
    for run in runs.values():
        run()
    for turn in rounds:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timeit.timeit(runs[name], number=1))
    return {name: np.array(values) for name, values in seconds.items()}


class Ratio(NamedTuple):
    """A ratio of times over rounds.

    Attributes:
      median: the median.
      lower: the first quartile.
      upper: the third quartile.
    """

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


def ratio(seconds: Floats, reference: Floats) -> Ratio:
    """Return the ratio of two arrays of times from the same rounds."""
    values = np.asarray(seconds) / np.asarray(reference)
    return Ratio(*np.quantile(values, [0.5, 0.25, 0.75]).tolist())
