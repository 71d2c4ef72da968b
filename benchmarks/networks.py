"""The networks of the benchmark in JAX: an MLP, a residual convolutional network, a small
transformer, and a tiny MLP for overhead.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax.experiments.cost import residual_network
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
    """One of the networks of ``SHAPES``, with its loss on made-up data."""
    shape, rng = SHAPES[name], np.random.default_rng(seed)
    if name == "transformer":
        network, loss_fn = _transformer(width=64, layers=2), _next_token_loss
        batch: Any = jnp.asarray(rng.integers(VOCABULARY, size=(shape[0], shape[1] + 1)))
        return Problem(
            lambda params, tokens: loss_fn(network, params, tokens),
            network.init(jax.random.key(seed)),
            batch,
        )
    network = {
        "mlp": lambda: build("mlp", shape[1:], 10, width=256, depth=3),
        "resnet": lambda: residual_network(8),
        "tiny": lambda: build("mlp", shape[1:], 10, width=8, depth=1),
    }[name]()
    batch = (
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(rng.integers(10, size=shape[0])),
    )
    return Problem(cross_entropy(network.apply), network.init(jax.random.key(seed)), batch)


def _transformer(width: int, layers: int, heads: int = 4) -> Model:
    """A causal transformer with layer normalization in front of attention and MLP, and a learnt
    position.
    """

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
        x = params["embed"][tokens] + params["position"][:length]
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
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)


def _layer_norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(shape[0])


def _next_token_loss(network: Model, params: Any, tokens: jax.Array) -> jax.Array:
    logits = network.apply(params, tokens[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))
