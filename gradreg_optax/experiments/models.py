"""Networks as pairs of pure functions, with smooth activations and without state.

A convolution is written as the sum of shifted matrix products, nine of them for images and three
for signals. Under a ``vmap`` over the weights a convolution primitive becomes a grouped
convolution, and inside a loop or differentiated twice it has no fast kernel on the CPU; matrix
products have one in all of these.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradreg_optax.experiments.common import CommandError

PyTree: TypeAlias = Any
Name: TypeAlias = Literal["mlp", "cnn", "resnet"]


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
      name: "mlp" (``depth`` hidden layers of ``width`` units); "cnn" (``depth`` + 1 convolutions,
        each followed by mean pooling that halves every side, the first with ``width`` channels and
        each further one with twice as many); or "resnet" (a wide residual network of three stages
        of ``depth`` blocks each, the first stage of ``width`` channels and each further one of
        twice as many on sides of half the length; with root-mean-square normalization of each
        sample in place of batch normalization).
      shape: shape of one input. For "cnn" and "resnet" (height, width, channels), the same with
        more or fewer sides, or (length,) for a signal of one channel.
      classes: number of classes.
      width: see ``name``.
      depth: see ``name``.

    Returns:
      The network, with GELU activations.

    Raises:
      CommandError: an unknown name.
    """
    if name == "mlp":
        return _mlp(shape, classes, width, depth)
    if name not in _CONVOLUTIONAL:
        names = ", ".join(map(repr, ("mlp", *_CONVOLUTIONAL)))
        raise CommandError(f"unknown model {name!r}: choose one of {names}.")
    shape = shape if len(shape) > 1 else (*shape, 1)
    made = _CONVOLUTIONAL[name](shape, classes, width, depth)
    return Model(made.init, lambda params, x: made.apply(params, x.reshape(len(x), *shape)))


def _mlp(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Model:
    sizes = [math.prod(shape), *[width] * depth, classes]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            dense(k, size, out) for k, size, out in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in params[:-1]:
            x = jax.nn.gelu(affine(layer, x))
        return affine(params[-1], x)

    return Model(init, apply)


def _cnn(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Model:
    sides, channels = len(shape) - 1, [shape[-1], *[width * 2**i for i in range(depth + 1)]]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(channels))
        convolutions = [
            dense(k, 3**sides * size, out)
            for k, size, out in zip(keys[1:], channels[:-1], channels[1:], strict=True)
        ]
        return {"convolutions": convolutions, "head": dense(keys[0], channels[-1], classes)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params["convolutions"]:
            x = _pool(jax.nn.gelu(_convolution(layer, x)))
        return affine(params["head"], _over_sides(x))

    return Model(init, apply)


def _resnet(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Model:
    """Blocks of the kind that normalizes first; where the channels grow, the skipped path is a
    matrix product, and the sides are halved by mean pooling.
    """
    sides, stages = len(shape) - 1, [width * 2**i for i in range(3)]
    grown = list(itertools.pairwise([width, *stages]))

    def init(key: jax.Array) -> PyTree:
        stem, head, *keys = jax.random.split(key, 2 + len(stages))
        stage_keys = zip(keys, grown, strict=True)
        return {
            "stem": dense(stem, 3**sides * shape[-1], width),
            "stages": [_stage(k, size, out, depth, sides) for k, (size, out) in stage_keys],
            "scale": jnp.ones(stages[-1]),
            "head": dense(head, stages[-1], classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = _convolution(params["stem"], x)
        for place, stage in enumerate(params["stages"]):
            for block in stage:
                x = _residual(block, x)
            x = x if place == len(stages) - 1 else _pool(x)
        active = jax.nn.gelu(normalized(params["scale"], x, sides))
        return affine(params["head"], _over_sides(active))

    return Model(init, apply)


_CONVOLUTIONAL = {"cnn": _cnn, "resnet": _resnet}


def normalized(scale: jax.Array, x: jax.Array, sides: int = 0) -> jax.Array:
    """By the root mean square over the channels, and over that many axes before them."""
    size = jnp.mean(x**2, axis=tuple(range(-1 - sides, 0)), keepdims=True)
    return jnp.expand_dims(scale, range(x.ndim - 1)) * x * jax.lax.rsqrt(size + 1e-5)


def _stage(key: jax.Array, size: int, out: int, depth: int, sides: int) -> list[PyTree]:
    """The weights of some blocks, of which the first may have more channels out than in."""
    blocks = []
    for k, inputs in zip(jax.random.split(key, depth), [size] + [out] * (depth - 1), strict=True):
        first, second, skip = jax.random.split(k, 3)
        made = {
            "first": dense(first, 3**sides * inputs, out),
            "second": dense(second, 3**sides * out, out),
            "scales": [jnp.ones(inputs), jnp.ones(out)],
        }
        blocks.append(made | ({"skip": dense(skip, inputs, out)} if inputs != out else {}))
    return blocks


def _residual(block: PyTree, x: jax.Array) -> jax.Array:
    sides, h = x.ndim - 2, x
    for name, scale in zip(("first", "second"), block["scales"], strict=True):
        h = _convolution(block[name], jax.nn.gelu(normalized(scale, h, sides)))
    return h + (affine(block["skip"], x) if "skip" in block else x)


def dense(key: jax.Array, size: int, out: int) -> PyTree:
    """Weights with variance 1 / fan-in, and zero biases."""
    return {
        "kernel": jax.random.normal(key, (size, out)) * math.sqrt(1 / size),
        "bias": jnp.zeros(out),
    }


def affine(layer: PyTree, x: jax.Array) -> jax.Array:
    """Apply a dense layer to the last axis."""
    y: jax.Array = x @ layer["kernel"]
    return y + jnp.expand_dims(layer["bias"], range(y.ndim - 1))


def _convolution(layer: PyTree, x: jax.Array) -> jax.Array:
    """A convolution of length 3 along every side, which stay as long; its kernel has shape
    (3**sides * channels, out).
    """
    sides = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *[(1, 1)] * len(sides), (0, 0)))
    shifted = [
        padded[:, *(slice(i, i + side) for i, side in zip(start, sides, strict=True))]
        for start in itertools.product(range(3), repeat=len(sides))
    ]
    return affine(layer, jnp.concatenate(shifted, axis=-1))


def _pool(x: jax.Array) -> jax.Array:
    """Means over two neighbours along every side; an odd last one is left away, and a side of one
    stays.
    """
    n, *sides, channels = x.shape
    by = [min(2, side) for side in sides]
    whole = [side // of for side, of in zip(sides, by, strict=True)]
    x = x[:, *(slice(side * of) for side, of in zip(whole, by, strict=True))]
    x = x.reshape(n, *itertools.chain(*zip(whole, by, strict=True)), channels)
    return jnp.mean(x, axis=tuple(range(2, 2 * len(sides) + 1, 2)))


def _over_sides(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
