"""The type aliases that the package shares."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import optax
from jax.typing import ArrayLike

PyTree: TypeAlias = Any
Scalar: TypeAlias = ArrayLike
ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
LossFn: TypeAlias = Callable[..., Any]
Loss = TypeVar("Loss", bound=LossFn)  # a loss whose signature is kept
ValueFn: TypeAlias = Callable[[PyTree], jax.Array]
GradFn: TypeAlias = Callable[[PyTree], tuple[PyTree, Any]]  # params -> (gradient, aux)
AscentFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
Ascent: TypeAlias = AscentFn | optax.GradientTransformation
AtStep: TypeAlias = Callable[[Any], jax.Array]  # a hyperparameter as a function of the step
LateLoss: TypeAlias = Callable[[PyTree, Mapping[str, Any]], ValueFn]  # (params, extra_args) -> loss
Scheme: TypeAlias = Literal["forward", "backward", "central"]
Mode: TypeAlias = Literal["forward_over_reverse", "reverse_over_reverse"]


class Weighted(NamedTuple):
    r"""A mean as a loss may return it: a sum, and what to divide it by.

    The loss is ``total / weight``; where the weight is 0 it is the total, of nothing. Of samples
    that count differently, such as the tokens of padded sentences, a mean over parts of the batch
    is not the mean of the parts' means; returned as ``Weighted``,
    :func:`gradreg_optax.microbatched` and the train step's ``ascent_groups`` weigh the parts, so
    that :math:`L = \sum_j s_j / \sum_j w_j` comes out whatever the parts. Every function of this
    package takes it in place of a scalar. The weight is taken for a constant of the parameters.

    Attributes:
      total: the sum of the losses; shape ().
      weight: the sum of the weights, not negative; shape (). None is one.

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
