"""Time, FLOPs and memory of jitted steps, measured side by side so that their ratios mean
something.

A processor is never quite the same from one second to the next. So the steps that are compared run
in turn, round after round, and what counts is the median over rounds of the ratio *within* a round,
with its quartiles.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

# JAX leaves these two without annotations.
_wait: Any = jax.block_until_ready
_forget: Any = jax.clear_caches


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      run: takes one step and waits for its end.
      trace: seconds to trace the step and lower it for XLA.
      compile: seconds that XLA takes to compile it.
      flops: XLA's count of floating-point operations; of a conditional it counts the dearer branch.
      memory: bytes of temporary memory, beyond arguments and results.
    """

    run: Callable[[], None]
    trace: float
    compile: float
    flops: float
    memory: int


def build(step: Any, state: Any, *args: Any) -> Program:
    """Traces and compiles a jitted ``step(state, *args) -> (state, ...)``, with JAX's caches
    emptied first.

    Args:
      step: a jitted function, which may donate the state.
      state: what it starts from; not usable afterwards.
      *args: its further arguments, the same at every step.

    Returns:
      The compiled step.
    """
    _forget()
    start = time.perf_counter()
    lowered = step.lower(state, *args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()

    def run() -> None:
        nonlocal state
        state = _wait(step(state, *args)[0])

    # The step itself is called, not its compiled form: it is what users call, and it dispatches
    # faster.
    run()
    flops = float(compiled.cost_analysis()["flops"])
    memory = int(compiled.memory_analysis().temp_size_in_bytes)
    return Program(run, traced - start, done - traced, flops, memory)


def interleave(
    runs: Mapping[str, Callable[[], None]],
    rounds: Iterable[int],
    repeats: Mapping[str, int] | None = None,
) -> dict[str, Floats]:
    """Runs everything in turn.

    Args:
      runs: what to time, each of which waits for its own end.
      rounds: ``range(n)``, or a progress bar around it. Every round starts with another one, so
        that none has a better place.
      repeats: how many times in succession to run some of them within a round (one is the default).

    Returns:
      Seconds per run, one for each round.
    """
    repeats = repeats or {}
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for turn in rounds:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            count = repeats.get(name, 1)
            start = time.perf_counter()
            for _ in range(count):
                runs[name]()
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: np.array(values) for name, values in seconds.items()}


class Ratio(NamedTuple):
    """A ratio of times over the rounds of one run.

    Attributes:
      median: its median.
      lower: its first quartile.
      upper: its third quartile.
      noise: half the width of the 95% confidence interval of the median, from order statistics.
    """

    median: float
    lower: float
    upper: float
    noise: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


def ratio(seconds: Floats, reference: Floats) -> Ratio:
    """The ratio of two rows of times that were measured in the same rounds."""
    values = np.sort(np.asarray(seconds) / np.asarray(reference))
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    # 1.96 standard deviations of a binomial count around n / 2
    half = 0.98 * math.sqrt(len(values))
    low = max(math.floor(len(values) / 2 - half), 0)
    noise = (values[-1 - low] - values[low]) / 2
    return Ratio(*map(float, (median, lower, upper, noise)))
