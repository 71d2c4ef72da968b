"""Learning-rate warm-up."""

import dataclasses
import functools
from collections.abc import Callable

import optax

from gradreg_optax.experiments.trainer import OPTIMIZERS, Recipe


def warmed_up(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with a linear warm-up from zero before its cosine schedule.

    The optimizer then has the learning rate and the number of steps of this recipe.

    Args:
      recipe: a recipe whose optimizer is a name.
      steps: number of steps of the warm-up; zero for none.
    """
    if not steps:
        return recipe
    optimizer = _optimizer(str(recipe.optimizer), recipe.learning_rate, steps, recipe.steps)
    return dataclasses.replace(recipe, optimizer=optimizer)


@functools.cache  # the same object compiles once
def _optimizer(
    name: str, rate: float, warmup: int, steps: int
) -> Callable[[optax.Schedule], optax.GradientTransformation]:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps)
    return lambda _: OPTIMIZERS[name](schedule)
