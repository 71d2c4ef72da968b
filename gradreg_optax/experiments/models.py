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


def transformer(
    tokens: int, length: int, *, width: int = 32, depth: int = 2, heads: int = 4
) -> Model:
    """A causal transformer: the logits of the next token at every place of a sequence.

    Args:
      tokens: number of different tokens.
      length: length of a sequence.
      width: numbers that stand for a token.
      depth: blocks of attention and of a hidden layer of four times the width, with learnt
        root-mean-square normalization in front of each.
      heads: of the attention; a divisor of the width.

    Returns:
      The network; its inputs are whole numbers of shape (batch, length), its outputs have shape
      (batch, length, tokens).
    """
    visible = jnp.tril(jnp.ones((length, length), bool))

    def init(key: jax.Array) -> PyTree:
        embedding, place, head, *keys = jax.random.split(key, 3 + depth)
        return {
            "embedding": 0.1 * jax.random.normal(embedding, (tokens, width)),
            "place": 0.1 * jax.random.normal(place, (length, width)),
            "blocks": [_block(k, width) for k in keys],
            "scale": jnp.ones(width),
            "head": _dense(head, width, tokens),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        h = params["embedding"][x] + params["place"][None]
        for block in params["blocks"]:
            attended = _attention(block, _normalized(block["scales"][0], h), heads, visible)
            h = h + _affine(block["out"], attended)
            hidden = jax.nn.gelu(_affine(block["up"], _normalized(block["scales"][1], h)))
            h = h + _affine(block["down"], hidden)
        return _affine(params["head"], _normalized(params["scale"], h))

    return Model(init, apply)


def _block(key: jax.Array, width: int) -> PyTree:
    sizes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    keys = jax.random.split(key, len(sizes))
    made = {
        name: _dense(k, width * size, width * out)
        for k, (name, (size, out)) in zip(keys, sizes.items(), strict=True)
    }
    return made | {"scales": jnp.ones((2, width))}


def _normalized(scale: jax.Array, x: jax.Array) -> jax.Array:
    size = jnp.mean(x**2, axis=-1, keepdims=True)
    return jnp.expand_dims(scale, range(x.ndim - 1)) * x * jax.lax.rsqrt(size + 1e-5)


def _attention(block: PyTree, x: jax.Array, heads: int, visible: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = _affine(block["qkv"], x).reshape(batch, length, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    score = jnp.einsum("bqhd,bkhd->bhqk", q, k) * math.sqrt(heads / width)
    weight = jax.nn.softmax(jnp.where(visible[None, None], score, -jnp.inf), axis=-1)
    mixed: jax.Array = jnp.einsum("bhqk,bkhd->bqhd", weight, v).reshape(batch, length, width)
    return mixed


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
