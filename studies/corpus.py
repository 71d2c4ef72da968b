"""Source code as text, and a causal transformer for it."""

import math
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax.experiments import models
from gradreg_optax.experiments.data import Array, Dataset
from gradreg_optax.experiments.models import Model, PyTree

# Directories below the standard library that are not part of it, or not on every machine.
_EXCLUDED = frozenset(("site-packages", "dist-packages", "test", "tests"))


def source_code(length: int, *, packages: bool = False) -> Dataset:
    """Return Python's standard library as a byte-level language-modelling data set.

    Every machine has this corpus, but its content depends on the version of Python.

    Args:
      length: bytes in a sample; the labels are the bytes that follow each of them.
      packages: also read the files of all packages except tests, ten times as much, and split by
        module or package.

    Returns:
      The data set, with 128 classes; the last one stands for all non-ASCII bytes. Every second file
      is for training and the others for testing; with ``packages`` every eighth module or package
      is for testing, with all its files.
    """
    train, test = (_windows(files, length + 1) for files in source_files(packages=packages))
    parts = (*_shifted(train), *_shifted(test))
    return Dataset("source code", *parts, classes=128, scale=1.0, tokens=True)


def source_files(*, packages: bool = False) -> tuple[list[Path], list[Path]]:
    """Return the files that :func:`source_code` trains on, and those that it tests on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not packages:
        files = sorted(root.glob("*.py"))
        return files[::2], files[1::2]
    groups: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _EXCLUDED & set(parts):
            groups.setdefault(parts[0].removesuffix(".py"), []).append(path)
    names = sorted(groups)
    sides = ([name for name in names if name not in names[::8]], names[::8])
    train, test = ([path for name in side for path in groups[name]] for side in sides)
    return train, test


def _shifted(windows: Array) -> tuple[Array, Array]:
    return windows[:, :-1], windows[:, 1:]


def _windows(files: list[Path], length: int) -> Array:
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    whole = len(text) // length * length
    return np.minimum(text[:whole], 127).astype(np.int32).reshape(-1, length)


def transformer(
    tokens: int, length: int, *, width: int = 32, depth: int = 2, heads: int = 4
) -> Model:
    """Return a causal transformer: logits of the next token at every position.

    Args:
      tokens: size of the vocabulary.
      length: length of a sequence.
      width: size of the embedding.
      depth: number of blocks with attention and a hidden layer of four times the width, each after
        a root-mean-square normalization.
      heads: number of attention heads; a divisor of the width.

    Returns:
      The network, from token ids of shape (batch, length) to logits of shape (batch, length,
      tokens).
    """
    visible = jnp.tril(jnp.ones((length, length), bool))

    def init(key: jax.Array) -> PyTree:
        embedding, place, head, *keys = jax.random.split(key, 3 + depth)
        return {
            "embedding": 0.1 * jax.random.normal(embedding, (tokens, width)),
            "place": 0.1 * jax.random.normal(place, (length, width)),
            "blocks": [_block(k, width) for k in keys],
            "scale": jnp.ones(width),
            "head": models.dense(head, width, tokens),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        h = params["embedding"][x] + params["place"][None]
        for block in params["blocks"]:
            attended = _attention(block, models.normalized(block["scales"][0], h), heads, visible)
            h = h + models.affine(block["out"], attended)
            hidden = jax.nn.gelu(
                models.affine(block["up"], models.normalized(block["scales"][1], h))
            )
            h = h + models.affine(block["down"], hidden)
        return models.affine(params["head"], models.normalized(params["scale"], h))

    return Model(init, apply)


def _block(key: jax.Array, width: int) -> PyTree:
    sizes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    keys = jax.random.split(key, len(sizes))
    made = {
        name: models.dense(k, width * size, width * out)
        for k, (name, (size, out)) in zip(keys, sizes.items(), strict=True)
    }
    return made | {"scales": jnp.ones((2, width))}


def _attention(block: PyTree, x: jax.Array, heads: int, visible: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = models.affine(block["qkv"], x).reshape(batch, length, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    score = jnp.einsum("bqhd,bkhd->bhqk", q, k) * math.sqrt(heads / width)
    weight = jax.nn.softmax(jnp.where(visible[None, None], score, -jnp.inf), axis=-1)
    mixed: jax.Array = jnp.einsum("bhqk,bkhd->bqhd", weight, v).reshape(batch, length, width)
    return mixed
