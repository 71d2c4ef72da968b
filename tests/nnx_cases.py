"""Losses of Flax NNX modules and of further NNX objects, each with its step written by hand.

The reference builds all objects anew for every evaluation, so that both gradients of the penalty
see the state from before the call. The state after it is that of one evaluation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradreg_optax as gr
from problems import relative_error

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8
GAMMA, EPSILON, RATE = 0.5, 0.1, 0.25
FD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 16)
FIRST = nnx.All(nnx.Param, nnx.PathContains("first"))


class Small(nnx.Module):
    """A layer with dropout; its keys come from the call, or from ``rngs``."""

    def __init__(self, seed=0, rngs=None):
        self.first = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.dropout(jnp.tanh(self.first(x)), rngs=rngs)


class Net(nnx.Module):
    """BatchNorm, dropout and LoRA."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        factor = self.last.lora.lora_b  # zero at the start, where the other has no gradient
        factor[...] = jnp.linspace(-1.0, 1.0, factor[...].size).reshape(factor[...].shape)

    def __call__(self, x):
        return self.last(self.dropout(nnx.gelu(self.norm(self.first(x)))))


class Counted(nnx.Module):
    """A module whose state is an array without a variable around it."""

    def __init__(self):
        self.calls = jnp.zeros([])

    def __call__(self, x):
        self.calls = self.calls + jnp.sum(x)
        return x


def square(x):
    return jnp.mean(x**2)


def mean_square(model, x):
    return square(model(x))


def linear():
    return nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))


def cross_entropy(model, pair):
    x, y = pair
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def with_keys(model, rngs, x):
    return square(model(x, rngs) - model(x, rngs))  # two masks


def with_objects(model, batch, counted, rngs, average, teacher, cache, metrics):
    """Keys also in the batch, an average that follows the model, and a teacher with BatchNorm."""
    x = counted(batch["x"])
    for mean, new in zip(variables(average), variables(model), strict=True):
        mean[...] = 0.75 * mean[...] + 0.25 * jax.lax.stop_gradient(new[...])
    cache["sum"] = cache["sum"] + jnp.mean(x, axis=0)
    targets = average.first(x) + teacher(x) + cache["sum"]
    value = square(model(x, rngs) - model(x, batch["more"][0]) - targets)
    metrics.update(loss=value, values=x)
    return value


def variables(model):
    def is_variable(x):
        return isinstance(x, nnx.Variable)

    return jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_variable)


def objects():
    return (Small(), {"x": X, "more": [nnx.Rngs(1), None]}, Counted()), {
        "rngs": nnx.Rngs(dropout=2),
        "average": Small(5),
        "teacher": nnx.BatchNorm(3, rngs=nnx.Rngs(3)),
        "cache": nnx.Cache({"sum": jnp.zeros(3)}),
        "metrics": nnx.MultiMetric(loss=nnx.metrics.Average("loss"), x=nnx.metrics.Welford()),
    }


def with_own_keys(model, rngs, x):
    return square(model(x) - jax.random.normal(rngs(), x.shape))


def own_keys():
    rngs = nnx.Rngs(7)
    return (Small(rngs=rngs), rngs, X), {}


def with_shared_layer(model, tied, x):
    return square(tied(model.first(x)))


def shared_layer():
    model = Small()
    return (model, model.first, X), {}


def of_pair(models, rngs, x):
    first, second = models["first"], models["second"][0]
    output = second(first(x, rngs), rngs)
    return square(output), output


class Case(NamedTuple):
    """A loss, and its arguments and keywords made anew."""

    loss_fn: Callable[..., Any]
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    has_aux: bool = False


CASES = {
    "BatchNorm, dropout and LoRA": Case(cross_entropy, lambda: ((Net(), (X, Y)), {})),
    "keys": Case(with_keys, lambda: ((Small(), nnx.Rngs(1), X), {})),
    "objects": Case(with_objects, objects),
    "keys shared with the model": Case(with_own_keys, own_keys),
    "layer shared with the model": Case(with_shared_layer, shared_layer),
    "models in a tree, and aux": Case(
        of_pair,
        lambda: (({"first": Small(), "second": (Small(2), None)}, nnx.Rngs(1), X), {}),
        True,
    ),
}


def numbers(tree):
    """All arrays of NNX objects and trees, keys as numbers."""
    leaves = jax.tree.leaves(pure(nnx.state(tree)))
    keys = jax.dtypes.prng_key
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for x in leaves]


class ByHand(NamedTuple):
    """What a step should give: arrays of (value, aux), the norm of the gradient, the regularized
    gradient, and the arrays of all arguments after one evaluation."""

    output: list[Any]
    norm: Any
    gradient: list[Any]
    state: list[Any]


@functools.cache
def by_hand(name, wrt=nnx.Param):
    """Differentiate with ``jax.grad`` with respect to the selected parameters."""
    loss_fn, make, has_aux = CASES[name]

    def evaluate(params):
        args, kwargs = make()
        nnx.update(args[0], params)
        output = loss_fn(*args, **kwargs)
        return output[0] if has_aux else output

    @jax.jit
    def gradients(params):
        g = jax.grad(evaluate)(params)
        steep = jax.grad(evaluate)(jax.tree.map(lambda p, d: p + EPSILON * d, params, g))
        both = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, steep)
        return optax.tree.norm(g), jax.tree.leaves(both)

    args, kwargs = make()
    norm, gradient = gradients(pure(nnx.state(args[0], wrt)))
    output = nnx.jit(loss_fn)(*args, **kwargs)
    return ByHand(jax.tree.leaves(output), norm, gradient, numbers((args, kwargs)))


def assert_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def assert_as_by_hand(expected, output, gradient, arguments):
    assert_close(jax.tree.leaves(output), expected.output)
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5
    assert relative_error(gradient, expected.gradient) < 1e-5
    assert_close(numbers(arguments), expected.state)
