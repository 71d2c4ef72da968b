"""Shared type aliases, and ``Weighted``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import optax
from jax.typing import ArrayLike

PyTree: TypeAlias = Any
Scalar: TypeAlias = ArrayLike
ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
LossFn: TypeAlias = Callable[..., Any]
Loss = TypeVar("Loss", bound=LossFn)  # a loss in, a loss with the same signature out
ValueFn: TypeAlias = Callable[[PyTree], jax.Array]
GradFn: TypeAlias = Callable[[PyTree], tuple[PyTree, Any]]  # params -> (gradient, aux)
AscentFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
Ascent: TypeAlias = AscentFn | optax.GradientTransformation
AtStep: TypeAlias = Callable[[Any], jax.Array]  # a hyperparameter as a function of the step
LateLoss: TypeAlias = Callable[[PyTree, Mapping[str, Any]], ValueFn]  # (params, extra_args) -> loss
Transformation: TypeAlias = optax.GradientTransformation
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
Argnums: TypeAlias = int | Sequence[int]
Scheme: TypeAlias = Literal["forward", "backward", "central"]
Mode: TypeAlias = Literal["forward_over_reverse", "reverse_over_reverse"]


class Weighted(NamedTuple):
    r"""A weighted mean as the output of a loss: a sum and its divisor.

    The loss is ``total / weight``, or ``total`` if the weight is 0. Every function of this package
    accepts a loss that returns ``Weighted`` in place of a scalar. It is needed if samples have
    different weights, such as the tokens of padded sentences, because the mean over a batch is then
    not the mean of the means of its parts. With ``Weighted``, :func:`gradreg_optax.microbatched`
    and the train step's ``ascent_groups`` compute :math:`L = \sum_j s_j / \sum_j w_j`, which is
    independent of the split into parts. The weight is a constant: no gradient flows through it.

    Attributes:
      total: the sum :math:`s` of the weighted losses; shape ().
      weight: the sum :math:`w \ge 0` of the weights; shape (). None counts as 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import Weighted, fd_value_and_grad
      >>> def loss_fn(params, batch):
      ...     losses, mask = (params * batch["x"]) ** 2, batch["mask"]
      ...     return Weighted(jnp.sum(losses * mask), jnp.sum(mask))
      >>> batch = {"x": jnp.array([1.0, 2.0, 9.0]), "mask": jnp.array([1.0, 1.0, 0.0])}
      >>> value, _ = fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1)(jnp.array(2.0), batch)
      >>> print(value)  # (4 + 16) / 2
      10.0
    """

    total: jax.Array
    weight: jax.Array | None
