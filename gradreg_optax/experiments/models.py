"""Small networks as pairs of pure functions, with smooth activations and without state.

A convolution is written as the sum of nine shifted matrix products. Under a ``vmap`` over the
weights a convolution primitive becomes a grouped convolution, and inside a loop or differentiated
twice it has no fast kernel on the CPU; matrix products have one in all of these.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradreg_optax.experiments.common import CommandError

PyTree: TypeAlias = Any
Name: TypeAlias = Literal["mlp", "cnn"]


class Model(NamedTuple):
    """A network.

    Attributes:
      init: ``init(key) -> params``.
      apply: ``apply(params, x) -> logits`` for a batch ``x``.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]


def build(
    name: str, shape: tuple[int, ...], classes: int, *, width: int = 64, depth: int = 1
) -> Model:
    """A network for inputs of a shape.

    Args:
      name: "mlp" (``depth`` hidden layers of ``width`` units) or "cnn" (``depth`` + 1 convolutions,
        each followed by 2x2 mean pooling, the first with ``width`` channels and each further one
        with twice as many).
      shape: shape of one input; (height, width, channels) for "cnn".
      classes: number of classes.
      width: see ``name``.
      depth: see ``name``.

    Returns:
      The network, with GELU activations.

    Raises:
      CommandError: an unknown name, or inputs that are no images for a convolutional network.
    """
    if name == "mlp":
        return _mlp(shape, classes, width, depth)
    if name != "cnn":
        raise CommandError(f"unknown model {name!r}: choose one of 'mlp', 'cnn'.")
    if len(shape) != 3:
        raise CommandError(
            f"cnn needs images of shape (height, width, channels), got inputs of shape {shape}:"
            " use --model mlp."
        )
    return _cnn(shape, classes, width, depth)


def _mlp(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Model:
    sizes = [math.prod(shape), *[width] * depth, classes]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            _dense(k, size, out) for k, size, out in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in params[:-1]:
            x = jax.nn.gelu(_affine(layer, x))
        return _affine(params[-1], x)

    return Model(init, apply)


def _cnn(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Model:
    channels = [shape[-1], *[width * 2**i for i in range(depth + 1)]]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(channels))
        convolutions = [
            _dense(k, 9 * size, out)
            for k, size, out in zip(keys[1:], channels[:-1], channels[1:], strict=True)
        ]
        return {"convolutions": convolutions, "head": _dense(keys[0], channels[-1], classes)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params["convolutions"]:
            x = _pool(jax.nn.gelu(_convolution(layer, x)))
        return _affine(params["head"], jnp.mean(x, axis=(1, 2)))

    return Model(init, apply)


def _dense(key: jax.Array, size: int, out: int) -> PyTree:
    """Weights with variance 1 / fan-in, and zero biases."""
    return {
        "kernel": jax.random.normal(key, (size, out)) * math.sqrt(1 / size),
        "bias": jnp.zeros(out),
    }


def _affine(layer: PyTree, x: jax.Array) -> jax.Array:
    y: jax.Array = x @ layer["kernel"]
    return y + jnp.expand_dims(layer["bias"], range(y.ndim - 1))


def _convolution(layer: PyTree, x: jax.Array) -> jax.Array:
    """A 3x3 convolution that keeps the size; its kernel has shape (9 * channels, out)."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return _affine(layer, jnp.concatenate(shifted, axis=-1))


def _pool(x: jax.Array) -> jax.Array:
    """Means over 2x2 patches; an odd last row or column is left away, and a side of one stays."""
    n, height, width, channels = x.shape
    high, wide = (2 if height > 1 else 1), (2 if width > 1 else 1)
    x = x[:, : height // high * high, : width // wide * wide]
    return jnp.mean(x.reshape(n, height // high, high, width // wide, wide, channels), axis=(2, 4))
