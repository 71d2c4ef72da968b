"""Networks of the studies that the package does not have."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gradreg_optax.experiments import models
from gradreg_optax.experiments.models import Model, PyTree

Statistics: TypeAlias = list[tuple[jax.Array, jax.Array]]  # mean and variance, for each layer
_BLOCK = 4  # pixels along each side of the blocks that the first layer sees


def strided_cnn(classes: int, channels: Sequence[int] = (32, 64), *, norm: bool = True) -> Model:
    """Return a small convolutional network for grey images with sides that are multiples of 4.

    Blocks of 4 by 4 pixels become channels. Convolutions of size 3 and stride 2 follow, with batch
    norm and GELU, then the mean over all places and a linear layer.

    Args:
      classes: number of classes.
      channels: channels of each convolution.
      norm: use batch norm. ``apply`` normalises with the statistics of the batch that it is given,
        :func:`predict` with those of :func:`batch_statistics`.
    """

    def init(key: jax.Array) -> PyTree:
        head, *keys = jax.random.split(key, len(channels) + 1)
        sizes = zip(keys, (_BLOCK**2, *channels[:-1]), channels, strict=True)
        layers = [models.dense(k, 9 * size, out) for k, size, out in sizes]
        if norm:
            layers = [layer | {"scale": jnp.ones_like(layer["bias"])} for layer in layers]
        return {"layers": layers, "head": models.dense(head, channels[-1], classes)}

    return Model(init, predict)


def scaled(images: jax.Array) -> jax.Array:
    """Return images as the networks see them."""
    return images.astype(jnp.float32) / 255 - 0.286


def predict(params: PyTree, x: jax.Array, statistics: Statistics | None = None) -> jax.Array:
    """Return the logits of :func:`strided_cnn`; batch norm may have given statistics."""
    return models.affine(params["head"], features(params, x, statistics)[0])


def batch_statistics(params: PyTree, x: jax.Array) -> Statistics:
    """Return the means and variances that batch norm computes on a batch."""
    return features(params, x, None)[1]


def features(
    params: PyTree, x: jax.Array, given: Statistics | None
) -> tuple[jax.Array, Statistics]:
    """Return what the linear layer sees, and the statistics that batch norm used."""
    x, used = _blocks(x), []
    for place, layer in enumerate(params["layers"]):
        x = models.affine(layer, _patches(x))
        if "scale" in layer:
            moments = _moments(x) if given is None else given[place]
            used.append(moments)
            x = (x - moments[0]) * jax.lax.rsqrt(moments[1] + 1e-5)
            x = x * jnp.expand_dims(layer["scale"], range(x.ndim - 1))
        x = jax.nn.gelu(x)
    return jnp.mean(x, axis=(1, 2)), used


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    return jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)


def _blocks(x: jax.Array) -> jax.Array:
    n, height, width, _ = x.shape
    x = x.reshape(n, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return x.transpose(0, 1, 3, 2, 4).reshape(n, height // _BLOCK, width // _BLOCK, -1)


def _patches(x: jax.Array) -> jax.Array:
    """Neighbourhoods of 3 by 3 at every second place, along the channels."""
    sides = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i : i + sides[0] : 2, j : j + sides[1] : 2] for i in range(3) for j in range(3)],
        axis=-1,
    )


def text_classifier(tokens: int, classes: int, *, width: int = 16) -> Model:
    """Return a classifier of short texts: an embedding, a convolution over three places, the
    maximum over all places, and a linear layer.
    """

    def init(key: jax.Array) -> PyTree:
        embedding, hidden, head = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(embedding, (tokens, width)),
            "hidden": models.dense(hidden, 3 * width, 4 * width),
            "head": models.dense(head, 4 * width, classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        h = params["embedding"][x]
        near = jnp.concatenate([h[:, :-2], h[:, 1:-1], h[:, 2:]], axis=-1)
        hidden = jax.nn.gelu(models.affine(params["hidden"], near))
        return models.affine(params["head"], jnp.max(hidden, axis=1))

    return Model(init, apply)


def regression(model: Model, grid: Any) -> Model:
    """Return a network for regression, as a classifier of the points of a grid.

    The logits of an output f are -(f - grid)² / 2. On a fine grid that is wide enough, their
    cross-entropy is the squared error (f - target)² / 2 plus a constant.

    Args:
      model: a network with a single output.
      grid: the possible targets, in equal distances below 1.
    """
    points = jnp.asarray(grid, jnp.float32)

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        return -((model.apply(params, x) - points[None]) ** 2) / 2

    return Model(model.init, apply)
