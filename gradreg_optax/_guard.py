"""A debugging context that compares the incoming updates with the gradient of the loss."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax._numerics import global_norm
from gradreg_optax._types import GradFn, PyTree

_WATCHES: list[list[str]] = []  # the findings of every open context, innermost last


class GradientMismatch(UserWarning):
    """The incoming updates are not the gradient of the loss."""


@contextlib.contextmanager
def checking() -> Iterator[list[str]]:
    r"""Check that the incoming updates of every transformation are the gradient of its loss.

    By default a transformation uses the incoming updates as :math:`\nabla L(\theta)` of its loss,
    which saves a gradient. The result is wrong if they are something else: the transformation is
    not the first in its chain, its loss sees another batch or dropout key, ``optax.MultiSteps``
    wraps it, a regularizer is applied twice, or replicas average their gradients but not their
    losses. In this context, as in ``jax.debug_nans``, a transformation also evaluates the gradient.
    On a mismatch it warns with the relative difference and the likely cause, once per traced
    transformation. Only updates that apply the penalty are compared.

    Create the train step inside the context: only functions that are traced inside are checked.
    They keep the check after the context has ended, without reporting. Contexts nest, and a finding
    goes to the innermost open one.

    Cost:
      One gradient per penalised update while the context is open. No cost otherwise.

    Yields:
      The findings so far, a list with one sentence each.

    Warns:
      GradientMismatch: the incoming updates differ from the gradient.

    Example:
      >>> import jax, jax.numpy as jnp, optax, warnings
      >>> from gradreg_optax import checking, fd_gradreg
      >>> loss, params = lambda p: jnp.sum(p**4), jnp.ones(2)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), fd_gradreg(gamma=0.1, epsilon=0.1))
      >>> with checking() as findings, warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(findings[0][:75])
      fd_gradreg: the incoming updates are not the gradient of the loss: they dif
    """
    jax.effects_barrier()  # earlier steps report to the outer context
    findings: list[str] = []
    _WATCHES.append(findings)
    try:
        yield findings
        jax.effects_barrier()
    finally:
        _WATCHES[:] = [watch for watch in _WATCHES if watch is not findings]


def compare(
    caller: str, grad_fn: GradFn, params: PyTree, updates: PyTree, due: jax.Array | bool
) -> None:
    """Report a mismatch of ``updates`` and the gradient, if a context is open and ``due``."""
    if not _WATCHES:
        return
    reported: list[str] = []

    def report(due: Any, *numbers: Any) -> None:
        sentence = _sentence(caller, *map(float, numbers))
        if due and sentence and _WATCHES and not reported:
            reported.append(sentence)
            _WATCHES[-1].append(sentence)
            warnings.warn(sentence, GradientMismatch, stacklevel=2)

    def evaluate() -> None:
        jax.debug.callback(report, due, *_compared(grad_fn(params)[0], updates))

    if due is True:
        evaluate()
    else:
        jax.lax.cond(due, evaluate, lambda: None)


def _compared(gradient: PyTree, updates: PyTree) -> tuple[Any, ...]:
    """Return the norms of both and of their difference, their cosine, and a rounding tolerance."""
    own, incoming = (
        [jnp.asarray(x).astype(jnp.complex64) for x in jax.tree.leaves(tree)]
        for tree in (gradient, updates)
    )
    lengths = global_norm(own), global_norm(incoming)
    apart = global_norm([a - b for a, b in zip(own, incoming, strict=True)])
    inside = sum(jnp.vdot(a, b).real for a, b in zip(own, incoming, strict=True))
    cosine = inside / jnp.maximum(lengths[0] * lengths[1], np.finfo(np.float32).tiny)
    leaves = jax.tree.leaves((gradient, updates))
    rounding = max((float(jnp.finfo(jax.typeof(x).dtype).eps) for x in leaves), default=0.0)
    return *lengths, apart, cosine, jnp.asarray(max(rounding, 1e-7) ** 0.5, jnp.float32)


def _sentence(caller: str, own: float, incoming: float, *others: float) -> str | None:
    """Describe the mismatch and its likely cause; return None if the two agree."""
    apart, cosine, tolerance = others
    if np.isfinite(apart) and apart <= tolerance * max(own, incoming):
        return None
    size = max(own, 1e-30)
    if not np.isfinite(apart):
        cause = "one of the two is not finite"
    elif cosine > 1 - tolerance:
        cause = (
            f"they are {incoming / size:.3g} times as long and point the same way: clipping"
            " or a loss scale before the transformation, or a sum instead of a mean"
        )
    else:
        cause = (
            "another batch, dropout key or loss than that of the gradient, a transformation or a"
            " regularizer before it in the chain, optax.MultiSteps around it, or gradients averaged"
            " over replicas whose losses are not"
        )
    return (
        f"{caller}: the incoming updates are not the gradient of the loss: they differ by"
        f" {apart / size:.3g} of its norm. Likely cause: {cause}. Put the transformation first in"
        " its chain, give it the same loss, or pass reuse_updates=False."
    )
