"""Large batches in little memory: a loss that goes through its batch in pieces."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gradreg_optax._batch import interleaved_parts
from gradreg_optax._loss import with_aux
from gradreg_optax._typing import LossFn, PyTree


def microbatched(loss_fn: LossFn, count: int, *, has_aux: bool = False) -> LossFn:
    r"""The same loss, evaluated and differentiated in ``count`` micro-batches at the memory of one.

    For a loss that is a mean over the batch, :math:`L = \tfrac1k \sum_j L_j` with :math:`L_j` the loss of the j-th micro-batch. Its
    gradient is accumulated in the same pass over the micro-batches, so nothing of one micro-batch is kept for the next. Every gradient
    is that of the whole batch: the difference and the exact product of all of :math:`L` come out, not an average of products of
    parts, which is what accumulation *around* a regularizer would give. Works with every transformation, gradient function and train
    step of this package, and with ``jax.grad`` itself.

    The micro-batches interleave, as the parts 0::k, 1::k, ... of the batch, so that a batch sharded over devices stays where it is.
    What is not a mean over samples, BatchNorm in training mode above all, sees micro-batches instead of the batch; a dropout key
    passed as a further argument draws the same mask in each of them, keys passed in the batch, one a sample, do not.

    Cost: that of ``loss_fn`` in gradients; ``dbp`` evaluates :math:`g` a second time instead of keeping what it needs of all
    micro-batches. Temporary memory: that of one micro-batch and of the gradients that are summed, one for the difference.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs)``, a mean over the leading axis of ``batch``; the other arguments are seen by every
        micro-batch alike.
      count: number of micro-batches, a divisor of the batch size.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``; aux comes back with a leading axis of length ``count``.

    Returns:
      A loss function with the signature ``(params, batch, *args, **kwargs)``, to be differentiated with respect to ``params`` only.

    Raises:
      ValueError: ``count`` < 1, or no divisor of the batch size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import microbatched
      >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
      >>> params, batch = jnp.ones(2), jnp.arange(8.0).reshape(4, 2)
      >>> print(jax.grad(microbatched(loss_fn, 2))(params, batch), jax.grad(loss_fn)(params, batch))
      [62. 76.] [62. 76.]
    """
    loss = with_aux("microbatched", loss_fn, has_aux)

    def accumulated(params: PyTree, batch: PyTree, *args: Any, **kwargs: Any) -> Any:
        piece = interleaved_parts("microbatched", "count", batch, count)

        @jax.custom_vjp
        def mean_loss(params: PyTree) -> tuple[jax.Array, Any]:
            values, aux = jax.lax.map(lambda j: loss(params, piece(j), *args, **kwargs), jnp.arange(count))
            return jnp.mean(values), aux

        def forward(params: PyTree) -> tuple[tuple[jax.Array, Any], PyTree]:
            # What differentiates this gradient once more evaluates a micro-batch again rather than keep all of them.
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def accumulate(total: PyTree, j: jax.Array) -> tuple[PyTree, tuple[jax.Array, Any]]:
                output, gradient = jax.value_and_grad(loss, has_aux=True)(params, piece(j), *args, **kwargs)
                return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / count, total, gradient), output

            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params)
            total, (values, aux) = jax.lax.scan(accumulate, zeros, jnp.arange(count))
            return (jnp.mean(values), aux), jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)

        def backward(gradient: PyTree, cotangent: tuple[jax.Array, Any]) -> tuple[PyTree]:
            return (jax.tree.map(lambda g: cotangent[0].astype(g.dtype) * g, gradient),)

        mean_loss.defvjp(forward, backward)
        value, aux = mean_loss(params)
        return (value, aux) if has_aux else value

    return accumulated
