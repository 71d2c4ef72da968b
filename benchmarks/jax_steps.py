"""JAX train steps to compare: plain SGD, this package by three entry points, a loop written by
hand, and Optax's SAM.
"""

import functools
import timeit
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.networks import Problem
from gradreg_optax import (
    dbp_gradreg,
    fd_gradreg,
    fd_value_and_grad,
    make_train_step,
    relative_gradreg,
    sam,
)
from gradreg_optax.experiments import timing
from gradreg_optax.experiments.timing import Floats, Program

RATE, GAMMA, EPSILON, RHO = 0.01, 0.01, 0.1, 0.05
# Optimizer steps in the period of a lazy penalty: its time and FLOPs are averages over as many.
INTERVAL, FRACTION = 4, 0.25

Step = tuple[
    Callable[..., Any], Any
]  # a jitted step(state, batch) -> (state, loss), and its first state


def steps(problem: Problem) -> dict[str, Callable[[], Step]]:
    """What is compared, in the order of the table; each entry builds its jitted step and its first
    state.
    """
    function = fd_value_and_grad(problem.loss_fn, gamma=GAMMA, epsilon=EPSILON)
    penalty = fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
    lazy = fd_gradreg(gamma=GAMMA, epsilon=EPSILON, interval=INTERVAL)
    return {
        "SGD": lambda: _loop(problem, jax.value_and_grad(problem.loss_fn), optax.sgd(RATE)),
        "SGD, make_train_step": lambda: _train_step(problem, None),
        "F-GR by hand": lambda: _loop(problem, _by_hand(problem), optax.sgd(RATE)),
        "F-GR, fd_value_and_grad": lambda: _loop(problem, function, optax.sgd(RATE)),
        "F-GR, optax.chain": lambda: _chain(problem, penalty),
        "F-GR, make_train_step": lambda: _train_step(problem, penalty),
        "F-GR, lazy penalty, make_train_step": lambda: _train_step(problem, lazy, FRACTION),
        "relative, make_train_step": lambda: _train_step(problem, relative_gradreg()),
        "SAM, make_train_step": lambda: _train_step(problem, sam(rho=RHO)),
        "SAM, optax.chain": lambda: _chain(problem, sam(rho=RHO)),
        "SAM, optax.contrib.sam": lambda: _optax_sam(problem),
        "DB, make_train_step": lambda: _train_step(problem, dbp_gradreg(gamma=GAMMA)),
    }


def _by_hand(problem: Problem) -> Callable[..., Any]:
    """The regularized gradient as one writes it without a library, with the difference taken before
    it is scaled.
    """

    def value_and_grad(params: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(problem.loss_fn)(params, batch)
        ahead = jax.grad(problem.loss_fn)(
            jax.tree.map(lambda p, g: p + EPSILON * g, params, gradient), batch
        )
        return value, jax.tree.map(lambda g, a: g + GAMMA / EPSILON * (a - g), gradient, ahead)

    return value_and_grad


def _loop(
    problem: Problem, value_and_grad: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Step:
    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        value, gradient = value_and_grad(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return _jitted(problem, step, optimizer)


def _chain(problem: Problem, regularizer: optax.GradientTransformation) -> Step:
    optimizer = optax.chain(regularizer, optax.sgd(RATE))

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        value, gradient = jax.value_and_grad(problem.loss_fn)(params, batch)
        updates, opt_state = optimizer.update(
            gradient, opt_state, params, value_fn=lambda p: problem.loss_fn(p, batch)
        )
        return (optax.apply_updates(params, updates), opt_state), value

    return _jitted(problem, step, optimizer)


def _optax_sam(problem: Problem) -> Step:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    optimizer = optax.contrib.sam(optax.sgd(RATE), ascent, opaque_mode=True)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        value, gradient = jax.value_and_grad(problem.loss_fn)(params, batch)
        grad_fn = jax.grad(lambda p, _: problem.loss_fn(p, batch))
        updates, opt_state = optimizer.update(gradient, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), value

    return _jitted(problem, step, optimizer)


def _train_step(
    problem: Problem, regularizer: optax.GradientTransformation | None, fraction: float = 1.0
) -> Step:
    init, step = make_train_step(
        problem.loss_fn, optax.sgd(RATE), regularizer, penalty_fraction=fraction
    )
    return step, init(problem.params)


def _jitted(
    problem: Problem, step: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Step:
    state = problem.params, optimizer.init(problem.params)
    return jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, state)


def interleave(programs: Mapping[str, Program], rounds: Iterable[int]) -> dict[str, Floats]:
    """Return the seconds per step of each round; a lazy step is averaged over its interval."""
    runs = {label: program.run for label, program in programs.items()}
    lazy = [label for label in runs if "lazy" in label]
    runs |= {
        label: functools.partial(timeit.timeit, runs[label], number=INTERVAL) for label in lazy
    }
    seconds = timing.interleave(runs, rounds)
    return seconds | {label: seconds[label] / INTERVAL for label in lazy}
