"""The type aliases that the package shares."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jax.typing import ArrayLike

PyTree: TypeAlias = Any
Scalar: TypeAlias = ArrayLike
ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
LossFn: TypeAlias = Callable[..., Any]
ValueFn: TypeAlias = Callable[[PyTree], jax.Array]
GradFn: TypeAlias = Callable[[PyTree], PyTree]
AscentFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
Scheme: TypeAlias = Literal["forward", "backward", "central"]
Mode: TypeAlias = Literal["forward_over_reverse", "reverse_over_reverse"]
