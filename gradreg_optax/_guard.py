"""A guard that compares the incoming updates with the gradient of the loss."""

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

_WATCHES: list[list[str]] = []  # the findings of every guard that is on, innermost last


class GradientMismatch(UserWarning):
    """The incoming updates are not the gradient of the loss."""


@contextlib.contextmanager
def checking() -> Iterator[list[str]]:
    r"""Makes every transformation compare the incoming updates with its own gradient.

    By default a transformation takes the incoming updates for :math:`\nabla L(\theta)` of its loss,
    which saves a gradient. The result is wrong if they are not: the transformation is not the first
    in its chain, its loss sees another batch or dropout key, ``optax.MultiSteps`` is around it, a
    regularizer is applied twice, or replicas average their gradients but not their losses. Under
    this guard, as under ``jax.debug_nans``, it also evaluates its own gradient. It warns, once for
    each transformation traced, with the relative difference and the likely cause. Only updates that
    take the penalty are compared.

    The guard applies to what is traced while it is open: build the train step inside of it. A step
    compiled before is not checked; one compiled inside keeps its checks, without findings
    afterwards. Guards nest: a finding goes to the innermost open one. A closed guard costs nothing,
    an open one a gradient for each penalised update.

    Yields:
      The findings so far, one sentence each.

    Example:
      >>> import jax, jax.numpy as jnp, optax, warnings
      >>> from gradreg_optax import checking, fd_gradreg
      >>> loss, params = lambda p: jnp.sum(p**4), jnp.ones(2)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), fd_gradreg(gamma=0.1, epsilon=0.1))
      >>> with checking() as findings, warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(findings[0][:75])
      fd_gradreg: the updates that came in are not the gradient of the loss: they
    """
    jax.effects_barrier()  # what ran before belongs to the guard outside
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
    """Reports, if a guard is on and the penalty is due, that ``updates`` are not the gradient."""
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
    """The norms of both and of their difference, their cosine, and its tolerance for rounding."""
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
    """The mismatch and its likely cause; None where the two agree."""
    apart, cosine, tolerance = others
    if np.isfinite(apart) and apart <= tolerance * max(own, incoming):
        return None
    size = max(own, 1e-30)
    if not np.isfinite(apart):
        cause = "one of the two is not finite"
    elif cosine > 1 - tolerance:
        cause = (
            f"they are {incoming / size:.3g} times as long and point the same way: clipping"
            " or a loss scale before it, or a sum where the loss is a mean"
        )
    else:
        cause = (
            "another batch, dropout key or loss than that of the gradient, a transformation or a"
            " regularizer before it in the chain, optax.MultiSteps around it, or gradients averaged"
            " over replicas whose losses are not"
        )
    return (
        f"{caller}: the updates that came in are not the gradient of the loss: they differ by"
        f" {apart / size:.3g} of its norm. Likely cause: {cause}. Put it first, hand it"
        " the same loss, or pass reuse_updates=False."
    )
