"""Networks as pairs of pure functions, with smooth activations and without state.

Convolutions are matrix products of shifted inputs by default. Under a ``vmap`` over the weights a
convolution primitive becomes a grouped convolution; inside a loop or differentiated twice it has no
fast kernel on the CPU. Matrix products are fast in all of these cases.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradreg_optax.experiments import common

PyTree: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Name: TypeAlias = Literal["mlp", "cnn", "resnet"]
Layer: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]


class Model(NamedTuple):
    """A network.

    Attributes:
      init: ``init(key) -> params``.
      apply: ``apply(params, x) -> logits`` for a batch ``x``.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Layer


def build(
    name: str, shape: Shape, classes: int, *, width: int = 64, depth: int = 1, xla: bool = False
) -> Model:
    """Build a network with GELU activations.

    Args:
      name: "mlp" (``depth`` hidden layers of ``width`` units), "cnn" (``depth`` + 1 convolutions,
        each followed by mean pooling that halves every spatial axis; the first has ``width``
        channels and each further one twice as many), or "resnet" (a wide residual network with
        three stages of ``depth`` blocks; the first stage has ``width`` channels and each further
        one twice as many on axes of half the length; root-mean-square normalization of each sample
        replaces batch normalization).
      shape: shape of one input. For "cnn" and "resnet" (height, width, channels), or with another
        number of spatial axes, or (length,) for a signal with one channel.
      classes: number of classes.
      width: see ``name``.
      depth: see ``name``.
      xla: use XLA's convolution instead of matrix products.

    Raises:
      CommandError: an unknown name.
    """
    if name == "mlp":
        return _mlp(shape, classes, width, depth)
    common.some_of("model", [name], ["mlp", *_CONVOLUTIONAL])
    shape = shape if len(shape) > 1 else (*shape, 1)
    convolve = _primitive if xla else _convolution
    return _CONVOLUTIONAL[name](shape, classes, width, depth, convolve)


def _mlp(shape: Shape, classes: int, width: int, depth: int) -> Model:
    sizes = list(itertools.pairwise([math.prod(shape), *[width] * depth, classes]))

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(sizes))
        return [dense(k, *size) for k, size in zip(keys, sizes, strict=True)]

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in params[:-1]:
            x = jax.nn.gelu(affine(layer, x))
        return affine(params[-1], x)

    return Model(init, apply)


def _cnn(shape: Shape, classes: int, width: int, depth: int, convolve: Layer) -> Model:
    axes, channels = len(shape) - 1, [shape[-1], *[width * 2**i for i in range(depth + 1)]]

    def init(key: jax.Array) -> PyTree:
        head, *keys = jax.random.split(key, len(channels))
        sizes = zip(keys, itertools.pairwise(channels), strict=True)
        convolutions = [dense(k, 3**axes * size, out) for k, (size, out) in sizes]
        return {"convolutions": convolutions, "head": dense(head, channels[-1], classes)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), *shape)
        for layer in params["convolutions"]:
            x = _pool(jax.nn.gelu(convolve(layer, x)))
        return affine(params["head"], _spatial_mean(x))

    return Model(init, apply)


def _resnet(shape: Shape, classes: int, width: int, depth: int, convolve: Layer) -> Model:
    axes, stages = len(shape) - 1, [width, width, 2 * width, 4 * width]

    def init(key: jax.Array) -> PyTree:
        stem, head, *keys = jax.random.split(key, 5)
        sizes = zip(keys, itertools.pairwise(stages), strict=True)
        return {
            "stem": dense(stem, 3**axes * shape[-1], width),
            "stages": [_stage(k, size, out, depth, axes) for k, (size, out) in sizes],
            "scale": jnp.ones(stages[-1]),
            "head": dense(head, stages[-1], classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = convolve(params["stem"], x.reshape(len(x), *shape))
        for place, stage in enumerate(params["stages"]):
            x = _pool(x) if place else x
            for block in stage:
                x = _residual(convolve, block, x)
        active = jax.nn.gelu(normalized(params["scale"], x, axes))
        return affine(params["head"], _spatial_mean(active))

    return Model(init, apply)


_CONVOLUTIONAL = {"cnn": _cnn, "resnet": _resnet}


def normalized(scale: jax.Array, x: jax.Array, axes: int = 0) -> jax.Array:
    """Divide by the root mean square over the channels and over that many axes before them."""
    square = jnp.mean(x**2, axis=tuple(range(-1 - axes, 0)), keepdims=True)
    return jnp.expand_dims(scale, range(x.ndim - 1)) * x * jax.lax.rsqrt(square + 1e-5)


def _stage(key: jax.Array, size: int, out: int, depth: int, axes: int) -> list[PyTree]:
    """Return the weights of some blocks; the first may have more channels out than in."""
    blocks = []
    for k, inputs in zip(jax.random.split(key, depth), [size] + [out] * (depth - 1), strict=True):
        first, second, skip = jax.random.split(k, 3)
        block = {
            "first": dense(first, 3**axes * inputs, out),
            "second": dense(second, 3**axes * out, out),
            "scales": [jnp.ones(inputs), jnp.ones(out)],
        }
        blocks.append(block | ({"skip": dense(skip, inputs, out)} if inputs != out else {}))
    return blocks


def _residual(convolve: Layer, block: PyTree, x: jax.Array) -> jax.Array:
    """Apply a block that normalizes first, with a matrix product as skip where channels grow."""
    hidden = x
    for name, scale in zip(("first", "second"), block["scales"], strict=True):
        hidden = convolve(block[name], jax.nn.gelu(normalized(scale, hidden, x.ndim - 2)))
    return hidden + (affine(block["skip"], x) if "skip" in block else x)


def dense(key: jax.Array, size: int, out: int) -> PyTree:
    """Return weights with variance 1 / fan-in, and zero biases."""
    kernel = jax.random.normal(key, (size, out)) * math.sqrt(1 / size)
    return {"kernel": kernel, "bias": jnp.zeros(out)}


def affine(layer: PyTree, x: jax.Array) -> jax.Array:
    """Apply a dense layer to the last axis."""
    return _biased(layer, x @ layer["kernel"])


def _biased(layer: PyTree, y: jax.Array) -> jax.Array:
    return y + jnp.expand_dims(layer["bias"], range(y.ndim - 1))


def _convolution(layer: PyTree, x: jax.Array) -> jax.Array:
    """Convolve along every spatial axis with kernels of length 3 and zero padding.

    The kernel has shape (3**axes * channels, out).
    """
    sides = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *[(1, 1)] * len(sides), (0, 0)))
    shifted = [
        padded[:, *(slice(i, i + side) for i, side in zip(start, sides, strict=True))]
        for start in itertools.product(range(3), repeat=len(sides))
    ]
    return affine(layer, jnp.concatenate(shifted, axis=-1))


def _primitive(layer: PyTree, x: jax.Array) -> jax.Array:
    """Compute the same as :func:`_convolution` with XLA's convolution, for images."""
    kernel = layer["kernel"].reshape(3, 3, x.shape[-1], -1)
    names = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)
    return _biased(layer, y)


def _pool(x: jax.Array) -> jax.Array:
    """Average pairs of neighbours along every spatial axis; the last of an odd number is dropped.

    An axis of length 1 stays.
    """
    n, *sides, channels = x.shape
    by = [min(2, side) for side in sides]
    whole = [side // of for side, of in zip(sides, by, strict=True)]
    x = x[:, *(slice(side * of) for side, of in zip(whole, by, strict=True))]
    x = x.reshape(n, *itertools.chain(*zip(whole, by, strict=True)), channels)
    return jnp.mean(x, axis=tuple(range(2, 2 * len(sides) + 1, 2)))


def _spatial_mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
