"""One regularized evaluation of a loss, which all entry points other than a chain share."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from gradreg_optax import _validation as validation
from gradreg_optax._arguments import BoundLoss, Offer, unreserved
from gradreg_optax._batching import first_fraction
from gradreg_optax._loss import TransformedLoss, mean_of
from gradreg_optax._relative import RelativeState
from gradreg_optax._tracing import traced_once
from gradreg_optax._transforms import GradregState
from gradreg_optax._types import Args, Kwargs, LossFn, PyTree, Transformation, Weighted

REGULARIZER_STATES = GradregState, RelativeState


@dataclasses.dataclass(frozen=True)
class Call:
    """A loss and its arguments, without the parameters.

    Attributes:
      loss: ``loss(params, *args, **kwargs) -> (Weighted, aux)``.
      args: the positional arguments, the batch first.
      kwargs: the keyword arguments.
      offer: ``(args, kwargs) ->`` arguments by name, and without a name, for a regularizer with its
        own loss.
    """

    loss: Callable[..., tuple[Weighted, Any]]
    args: Args
    kwargs: Kwargs
    offer: Callable[[Args, Kwargs], Offer] = lambda args, kwargs: (kwargs, args)

    def on(self, batch: PyTree) -> "Call":
        """Return the call with this batch."""
        same = batch is self.args[0]
        return self if same else dataclasses.replace(self, args=(batch, *self.args[1:]))

    @functools.cached_property
    def _evaluate(self) -> Callable[[PyTree], tuple[Weighted, Any]]:
        def loss(params: PyTree) -> tuple[Weighted, Any]:
            return self.loss(params, *self.args, **self.kwargs)

        return traced_once(loss)

    def value_fn(self, params: PyTree) -> jax.Array:
        """Return the loss at ``params``."""
        return mean_of(self._evaluate(params)[0])

    def bound(self, params: PyTree = None, gradient: PyTree = None) -> BoundLoss:
        """Return the loss for transformations, and its gradient if it is known."""
        return BoundLoss(self.value_fn, (params, gradient), *self.offer(self.args, self.kwargs))

    def value_and_more(self, params: PyTree) -> tuple[jax.Array, tuple[Any, Any]]:
        """Return the loss at ``params``, and (its weight, aux)."""
        mean, aux = self._evaluate(params)
        return mean_of(mean), (mean.weight, aux)


class Pass(NamedTuple):
    """The results of a loss and a regularizer on a batch.

    Attributes:
      value: the loss.
      aux: aux of the loss.
      gradient: the gradient of the loss.
      updates: the regularized gradient.
      state: the new state of the regularizer.
      weight: the weight of the batch, or None.
    """

    value: jax.Array
    aux: Any
    gradient: PyTree
    updates: PyTree
    state: optax.OptState
    weight: jax.Array | None = None


class RegularizedPass:
    """A gradient evaluation followed by a regularizer, as in train steps and regularized losses."""

    def __init__(
        self, caller: str, regularizer: Transformation | None, kept: float = 1.0, groups: int = 1
    ) -> None:
        """Check the regularizer, which penalises the fraction ``kept`` of the batch."""
        self._caller, self._kept = caller, kept
        if regularizer is not None:
            validation.check_transformation(caller, "regularizer", regularizer)
        elif kept < 1 or groups > 1:
            raise ValueError(
                f"{caller}: penalty_fraction and ascent_groups need a regularizer, got None. Pass"
                " regularizer=."
            )
        self._tx = optax.with_extra_args_support(regularizer or optax.identity())

    def init(self, params: PyTree) -> optax.OptState:
        """Return the state of the regularizer."""
        state = self._tx.init(params)
        if self._kept < 1 and not is_penalized(state):
            raise TypeError(
                f"{self._caller}: penalty_fraction needs a transformation of this package, got"
                " another one, which would discard the gradient of the whole batch. Use"
                " fd_gradreg, dbp_gradreg, sam, ..., or penalty_fraction=1."
            )
        return state

    def run(
        self, call: Call, params: PyTree, state: optax.OptState, held_out: PyTree = None
    ) -> Pass:
        """Evaluate the loss and its gradient, and regularize it."""
        clean = jax.value_and_grad(call.value_and_more, has_aux=True)
        (value, (weight, aux)), gradient = clean(params)
        loss = call.bound(params, gradient)
        with penalty_arguments(self._caller, call, loss, self._kept, held_out) as extra:
            updates, state = self._tx.update(gradient, state, params, value=value, **extra)
        return Pass(value, aux, gradient, updates, state, weight)


@contextlib.contextmanager
def penalty_arguments(
    caller: str, call: Call, loss: BoundLoss, kept: float, held_out: PyTree = None
) -> Iterator[dict[str, Any]]:
    """Provide the extra arguments of a regularizer: the loss on the samples that it penalises.

    Held-out samples that the regularizer has not evaluated are an error.
    """
    extra, evaluated = dict[str, Any](), False
    if kept < 1:
        part = first_fraction(caller, "penalty_fraction", call.args[0], kept)
        loss, extra = call.on(part).bound(), {"reuse_updates": False}

    def held_out_fn(params: PyTree) -> jax.Array:
        nonlocal evaluated
        evaluated = True
        try:
            return call.on(held_out).value_fn(params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"held_out=: {error}") from error

    if held_out is not None:
        extra["held_out_fn"] = held_out_fn
    yield unreserved(loss.by_name) | {"value_fn": loss} | extra
    if held_out is not None and not evaluated:
        raise TypeError(
            f"{caller}: held_out= needs a regularizer with a self-tuned strength, got none. Use"
            " relative_gradreg(strength=None), or remove held_out=."
        )


def is_penalized(state: optax.OptState) -> bool:
    """Whether a chain with this state contains a transformation of this package."""
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, REGULARIZER_STATES))
    return any(isinstance(leaf, REGULARIZER_STATES) for leaf in leaves)


def check_once(caller: str, loss_fn: LossFn, params: PyTree, *states: optax.OptState) -> None:
    """Check that only one transformation, or the loss, contains a regularizer."""
    of_loss = regularizer_of(loss_fn)
    if of_loss is not None:
        states = *states, of_loss.init(params)
    if sum(map(is_penalized, states)) > 1:
        raise ValueError(
            f"{caller}: regularizers in two of the loss, the optimizer's chain and {caller}"
            " penalise twice. Remove one, or chain them: regularizer=optax.chain(...)."
        )


def regularizer_of(loss_fn: Any) -> optax.GradientTransformation | None:
    """Return the regularizer inside a loss, under any wrapper (``jax.jit``, a method)."""
    while loss_fn is not None:
        if isinstance(loss_fn, TransformedLoss) and loss_fn.regularizer is not None:
            return loss_fn.regularizer
        inner = (getattr(loss_fn, name, None) for name in ("__func__", "__wrapped__", "func"))
        loss_fn = next(filter(None, inner), None)
    return None


def counting(caller: str, state: optax.OptState, step: Any) -> optax.OptState:
    """Return a regularizer's state at ``step``; raise an error if it is more than counters."""

    def counter(leaf: Any) -> GradregState:
        if not isinstance(leaf, GradregState) or jax.tree.leaves(leaf.ascent):
            raise ValueError(
                f"{caller}: the regularizer keeps more state than a step counter, which cannot be"
                " stored here. Put it in front of the optimizer, optax.chain(regularizer, tx), and"
                " train with make_train_step or make_nnx_train_step."
            )
        return leaf._replace(step=step)

    return jax.tree.map(counter, state, is_leaf=lambda s: isinstance(s, GradregState))
