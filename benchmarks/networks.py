"""JAX networks of the benchmark: an MLP, a residual network, a transformer, and a tiny MLP."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax.experiments.models import Model, build
from gradreg_optax.experiments.trainer import cross_entropy

VOCABULARY = 64
SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (128, 256),
    "resnet": (32, 16, 16, 3),
    "transformer": (16, 32),
    "tiny": (16, 8),
}


class Problem(NamedTuple):
    """A loss ``loss_fn(params, batch)`` with parameters and a batch to evaluate it at."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: Any


def problem(name: str, seed: int = 0) -> Problem:
    """Return one of the networks of ``SHAPES``, with its loss on random data."""
    shape = SHAPES[name]
    if name == "transformer":
        return transformer(batch=shape[0], length=shape[1], width=64, layers=2, seed=seed)
    if name == "resnet":
        return residual(batch=shape[0], side=shape[1], width=8, seed=seed)
    width, depth = {"mlp": (256, 3), "tiny": (8, 1)}[name]
    return _classification(build("mlp", shape[1:], 10, width=width, depth=depth), shape, seed)


def transformer(
    *, batch: int, length: int, width: int, layers: int, seed: int = 0, dtype: str = "float32"
) -> Problem:
    """Return a causal transformer with its next-token loss; it computes in ``dtype``."""
    network = _transformer(width, layers, heads=max(4, width // 64))
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(batch, length + 1))

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return _next_token_loss(network, _cast(params, dtype), tokens)

    return Problem(loss_fn, network.init(jax.random.key(seed)), jnp.asarray(tokens))


def residual(
    *, batch: int, side: int, width: int, seed: int = 0, dtype: str = "float32"
) -> Problem:
    """Return a residual network for square images; it computes in ``dtype``."""
    return _classification(residual_network(width), (batch, side, side, 3), seed, dtype)


def _classification(
    network: Model, shape: tuple[int, ...], seed: int, dtype: str = "float32"
) -> Problem:
    rng, loss_fn = np.random.default_rng(seed), cross_entropy(network.apply)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch = x, jnp.asarray(rng.integers(10, size=shape[0]))
    params = network.init(jax.random.key(seed))
    return Problem(lambda params, batch: loss_fn(*_cast((params, batch), dtype)), params, batch)


def _cast(tree: Any, dtype: str) -> Any:
    """Cast the floating-point leaves."""

    def one(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def _transformer(width: int, layers: int, heads: int = 4) -> Model:
    """A causal transformer with pre-layer normalization and learned positions."""

    def init(key: jax.Array) -> Any:
        embed, position, *keys = jax.random.split(key, 2 + layers)
        blocks = [
            {
                "qkv": _normal(a, width, 3 * width),
                "out": _normal(b, width, width),
                "up": _normal(c, width, 4 * width),
                "down": _normal(d, 4 * width, width),
            }
            for a, b, c, d in (jax.random.split(k, 4) for k in keys)
        ]
        return {
            "embed": _normal(embed, VOCABULARY, width),
            "position": _normal(position, 512, width),
            "blocks": blocks,
        }

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        x = params["embed"][tokens] + params["position"][None, :length]
        for block in params["blocks"]:
            x = x + _attention(_layer_norm(x) @ block["qkv"], heads) @ block["out"]
            x = x + jax.nn.gelu(_layer_norm(x) @ block["up"]) @ block["down"]
        return _layer_norm(x) @ params["embed"].T

    return Model(init, apply)


def _attention(qkv: jax.Array, heads: int) -> jax.Array:
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    query, key, value = (
        part.reshape(batch, length, heads, -1) for part in jnp.split(qkv, 3, axis=-1)
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // heads)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)


def _layer_norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def residual_network(width: int, channels: int = 3) -> Model:
    """A residual network with one block in each of three stages, GELU and XLA's convolution."""
    stages = [width, 2 * width, 4 * width]

    def init(key: jax.Array) -> Any:
        stem, head, *keys = jax.random.split(key, 2 + 3 * len(stages))
        blocks = [
            {
                "first": _normal(keys[3 * i], 3, 3, size, out),
                "second": _normal(keys[3 * i + 1], 3, 3, out, out),
                "skip": _normal(keys[3 * i + 2], 1, 1, size, out),
            }
            for i, (size, out) in enumerate(zip([width, *stages[:-1]], stages, strict=True))
        ]
        return {
            "stem": _normal(stem, 3, 3, channels, width),
            "blocks": blocks,
            "head": _normal(head, stages[-1], 10),
        }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = _convolve(x, params["stem"], 1)
        for i, block in enumerate(params["blocks"]):
            stride = 1 if i == 0 else 2
            hidden = _convolve(jax.nn.gelu(x), block["first"], stride)
            hidden = _convolve(jax.nn.gelu(hidden), block["second"], 1)
            x = _convolve(x, block["skip"], stride) + hidden
        logits: jax.Array = jnp.mean(jax.nn.gelu(x), axis=(1, 2)) @ params["head"]
        return logits

    return Model(init, apply)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _next_token_loss(network: Model, params: Any, tokens: jax.Array) -> jax.Array:
    logits = network.apply(params, tokens[:, :-1]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))
