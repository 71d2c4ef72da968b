"""The strict environment of the tests: nothing broadcasts by accident, nothing depends on chance,
nothing opens a window."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import matplotlib
import pytest

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_x64", False)
# Most programs here run once, so that LLVM's optimizations and XLA's fusion emitters take longer
# than they save; children and notebooks inherit it.
unoptimized = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", unoptimized == "1")
if unoptimized == "1":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Traces make many objects and few cycles: with Python's thresholds a tenth of the time is the
# garbage collector's.
gc.set_threshold(50_000, 20, 20)
hypothesis.settings.register_profile(
    "strict", derandomize=True, deadline=None, database=None, max_examples=10
)
hypothesis.settings.register_profile(
    "nightly", hypothesis.settings.get_profile("strict"), max_examples=100
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "strict"))


def pytest_collection_finish() -> None:
    """Keep what the imports made out of later collections."""
    gc.freeze()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 by default, for tests of the mathematics."""
    with jax.enable_x64(True):
        yield


class Counter:
    """Counts at run time how often a loss and its gradient are evaluated, also if they are shared
    by the compiler."""

    def __init__(self) -> None:
        self.values = self.gradients = 0

    def wrap(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_fn`` with a callback in its evaluation and one in its gradient."""

        @jax.custom_vjp
        def tick(params: Any) -> Any:
            return params

        def pull_back(_: None, cotangent: Any) -> tuple[Any]:
            jax.debug.callback(self._gradient)
            return (cotangent,)

        tick.defvjp(lambda params: (params, None), pull_back)

        def loss(params: Any, *args: Any, **kwargs: Any) -> Any:
            jax.debug.callback(self._value)
            return loss_fn(tick(params), *args, **kwargs)

        return loss

    def _value(self) -> None:
        self.values += 1

    def _gradient(self) -> None:
        self.gradients += 1

    def read(self) -> tuple[int, int]:
        """(evaluations, gradients) since the last reading."""
        jax.effects_barrier()
        counts = self.values, self.gradients
        self.values = self.gradients = 0
        return counts


@pytest.fixture
def counter() -> Counter:
    return Counter()
