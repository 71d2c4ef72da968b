"""The arguments of a loss: by position, by name, as its signature says."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from gradreg_optax._leaves import identical
from gradreg_optax._types import Argnums, Args, Kwargs, LossFn, PyTree, ValueFn

Offer: TypeAlias = tuple[Kwargs, Args]  # arguments with and without a name

# Names that Optax's update and its line searches reserve: a loss cannot receive them by name.
RESERVED = frozenset(
    {"updates", "state", "params", "value", "grad", "value_fn", "reuse_updates", "held_out_fn"}
)


@dataclasses.dataclass(frozen=True)
class BoundLoss:
    """The loss of a step as a function of the parameters, its gradient and its arguments.

    Attributes:
      value_fn: the function.
      known: parameters, and the gradient there, or a pair of None.
      by_name: the arguments with a name, from which another loss can pick its own.
      unnamed: the others, such as those that ``*args`` received.
    """

    value_fn: ValueFn
    known: tuple[PyTree, PyTree]
    by_name: Kwargs
    unnamed: Args

    def __call__(self, params: PyTree) -> jax.Array:
        """Return the loss at ``params``."""
        return self.value_fn(params)


def known_gradient(extra_args: Mapping[str, Any], params: PyTree, updates: PyTree) -> PyTree:
    """Return the gradient of a step's loss if it is known, and not these updates; else None."""
    step = extra_args.get("value_fn")
    known = step.known if isinstance(step, BoundLoss) else (None, None)
    there, gradient, here, incoming = map(jax.tree.leaves, (*known, params, updates))
    if identical(gradient, incoming) or not identical(there, here):
        return None
    return jax.tree.unflatten(jax.tree.structure(updates), gradient)


def pick_arguments(caller: str, loss_fn: LossFn, available: Mapping[str, Any]) -> Kwargs:
    """Return the arguments of ``loss_fn`` after its first, picked from ``available`` by name."""
    step: Any = available.get("value_fn")
    complete = isinstance(step, BoundLoss)
    offered, unnamed = (step.by_name, step.unnamed) if complete else (unreserved(available), ())
    wanted = _parameters_after_first(loss_fn)
    clash = [p for p in wanted if not complete and p.name in RESERVED & available.keys()]
    greedy = any(p.kind is p.VAR_KEYWORD for p in wanted)
    nameable = {p.name for p in wanted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    picked = {name: value for name, value in offered.items() if greedy or name in nameable}

    def is_missing(p: inspect.Parameter) -> bool:
        """Whether the loss needs this argument, or would lose a value that the call has."""
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) and p.name in offered:
            return True
        if p.kind is p.VAR_POSITIONAL and complete and offered and not picked:
            return True  # a wrapper with *args alone; a chain may offer arguments for others
        required = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        return (required or bool(unnamed)) and p.name not in picked

    refused = clash[:1] or list(filter(is_missing, wanted))
    if refused:
        names = ", ".join(repr(p.name) for p in refused)
        raise TypeError(f"{caller}: the loss needs {names}, {_remedy(refused, unnamed)}.")
    return picked


def unreserved(arguments: Mapping[str, Any]) -> Kwargs:
    """Return the arguments that can be passed to ``update`` by name."""
    return {name: value for name, value in arguments.items() if name not in RESERVED}


def named_arguments(loss_fn: LossFn, args: Args, kwargs: Kwargs, argnums: Argnums = 0) -> Offer:
    """Return a call's arguments by name and those without one, except the parameters."""
    signature, named, unnamed = signature_of(loss_fn), dict[str, Any](), ()
    bound = signature.bind(*args, **kwargs).arguments
    numbers = [n % len(args) for n in _numbers("", argnums)]
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            unnamed = tuple(x for i, x in enumerate(args) if i >= position and i not in numbers)
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(bound.get(parameter.name, {}))
        elif position not in numbers and parameter.name in bound:
            named[parameter.name] = bound[parameter.name]
    return named, unnamed


def arguments_at(
    caller: str, argnums: Argnums, args: Args
) -> tuple[PyTree, Callable[[PyTree], Args]]:
    """Return the argument or tuple of arguments at ``argnums``, and a function to replace them."""
    numbers, single = _numbers(caller, argnums), hasattr(argnums, "__index__")
    if not all(-len(args) <= n < len(args) for n in numbers):
        raise ValueError(
            f"{caller}: argnums must be positions of arguments, got {argnums} in a call with"
            f" {len(args)} positional arguments. Pass the parameters by position."
        )
    if len({n % len(args) for n in numbers}) < len(numbers):
        raise ValueError(
            f"{caller}: argnums must be different positions, got {argnums}. Name each only once."
        )

    def put(params: PyTree) -> Args:
        full = list(args)
        for number, value in zip(numbers, [params] if single else params, strict=True):
            full[number] = value
        return tuple(full)

    chosen = tuple(args[n] for n in numbers)
    return (chosen[0] if single else chosen), put


def _numbers(caller: str, argnums: Argnums) -> list[int]:
    """Convert ``argnums`` to a list of integers."""
    try:
        numbers = list(map(operator.index, [argnums] if hasattr(argnums, "__index__") else argnums))
    except TypeError:
        numbers = []
    if not numbers:
        raise TypeError(
            f"{caller}: argnums must be an integer or several, got {argnums!r}. The first is 0."
        )
    return numbers


def positional(caller: str, loss_fn: LossFn, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Bind a call of ``loss_fn``: arguments by position where possible, at least params and batch.

    Keyword arguments use the parameter names of the loss.
    """
    bound = signature_of(loss_fn).bind(*args, **kwargs)
    if len(bound.args) < 2:
        raise TypeError(
            f"{caller}: the loss must have a batch as its second positional argument, got"
            f" {len(bound.args)} positional arguments. Call loss(params, batch, ...)."
        )
    return bound.args, bound.kwargs


def keeps_signature(function: Any, loss_fn: LossFn) -> Any:
    """Copy name, docstring and signature of a loss to ``function``."""
    return functools.update_wrapper(function, loss_fn, updated=())


def signature_of(loss_fn: LossFn) -> inspect.Signature:
    """Return the signature of a loss; a builtin without one takes any arguments."""
    try:
        return inspect.signature(loss_fn)
    except ValueError:
        return inspect.signature(lambda *args, **kwargs: None)


def accepts(loss_fn: LossFn, name: str) -> bool:
    """Whether a loss takes an argument of this name."""
    parameters = signature_of(loss_fn).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _remedy(missing: list[inspect.Parameter], unnamed: Args) -> str:
    if unnamed:
        return (
            "which this call does not pass by name. Close over it, or leave out the loss of the"
            " regularizer"
        )
    if any(p.name in RESERVED for p in missing):
        return (
            "a name that Optax's update reserves. Rename the argument, or pass value_fn= with it"
            " closed over"
        )
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in missing):
        return (
            "which is positional-only and cannot be picked by name. Give it a name, or pass"
            " value_fn= with it closed over"
        )
    call = ", ".join(f"{p.name}=..." for p in missing)
    return f"which update did not receive. Call update(grads, state, params, {call})"


def _parameters_after_first(loss_fn: LossFn) -> list[inspect.Parameter]:
    parameters = list(signature_of(loss_fn).parameters.values())
    first_is_variadic = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return parameters if first_is_variadic else parameters[1:]
