"""Flax NNX objects as arguments of the loss: ``nnx_regularized_loss`` and ``make_nnx_train_step``.

The reference builds all objects anew for every evaluation, so that both gradients of the penalty
see the state from before the call, and calls the plain loss once for the state after it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradreg_optax as gr

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8
GAMMA, EPSILON, RATE = 0.5, 0.1, 0.25
FD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
X = jnp.sin(jnp.arange(12.0)).reshape(4, 3)


class Net(nnx.Module):
    """A layer with dropout; its keys come from the call, or from ``rngs`` if it has some."""

    def __init__(self, seed=0, rngs=None):
        self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.dropout(jnp.tanh(self.layer(x)), rngs=rngs)


class Counted(nnx.Module):
    """A module whose state is an array without a variable around it."""

    def __init__(self):
        self.calls = jnp.zeros([])

    def __call__(self, x):
        self.calls = self.calls + jnp.sum(x)
        return x


def square(x):
    return jnp.mean(x**2)


def with_keys(model, rngs, x):
    return square(model(x, rngs) - model(x, rngs))  # two masks


def with_nested_keys(model, batch):
    return square(model(batch["x"], batch["more"][0]))


def with_metrics(model, x, metrics):
    value = square(model.layer(x))
    metrics.update(loss=value, values=x)
    return value


def with_teacher(model, x, teacher):
    return square(model.layer(x) - teacher(x))


def with_average(model, average, x):
    """An average of the parameters that follows the model."""
    for mean, new in zip(
        jax.tree.leaves(nnx.state(average, nnx.Param), is_leaf=is_variable),
        jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_variable),
        strict=True,
    ):
        mean[...] = 0.75 * mean[...] + 0.25 * jax.lax.stop_gradient(new[...])
    return square(model.layer(x) - average.layer(x))


def with_cache(model, cache, counted, x):
    cache[...] = cache[...] + jnp.mean(x, axis=0)
    return square(model.layer(counted(x)) + cache[...])


def with_own_keys(model, rngs, x):
    return square(model(x) - jax.random.normal(rngs(), x.shape))


def with_shared_layer(model, tied, x):
    return square(tied(model.layer(x)))


def of_pair(models, rngs, x):
    first, second = models["first"], models["second"][0]
    return square(second(first(x, rngs), rngs))


def is_variable(x):
    return isinstance(x, nnx.Variable)


def metrics():
    return nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford())


def own_keys():
    rngs = nnx.Rngs(7)
    return (Net(rngs=rngs), rngs, X), {}


def shared_layer():
    model = Net()
    return (model, model.layer, X), {}


CASES = {
    "keys": (with_keys, lambda: ((Net(), nnx.Rngs(1), X), {})),
    "keys by keyword": (with_keys, lambda: ((Net(),), {"x": X, "rngs": nnx.Rngs(dropout=1)})),
    "keys in the batch": (
        with_nested_keys,
        lambda: ((Net(),), {"batch": {"x": X, "more": [nnx.Rngs(1), None]}}),
    ),
    "metrics": (with_metrics, lambda: ((Net(), X), {"metrics": metrics()})),
    "teacher": (with_teacher, lambda: ((Net(), X, nnx.BatchNorm(3, rngs=nnx.Rngs(3))), {})),
    "average": (with_average, lambda: ((Net(), Net(5), X), {})),
    "cache": (
        with_cache,
        lambda: ((Net(), nnx.Cache(jnp.zeros(3)), Counted(), X), {}),
    ),
    "keys shared with the model": (with_own_keys, own_keys),
    "layer shared with the model": (with_shared_layer, shared_layer),
    "models in a tree": (
        of_pair,
        lambda: (({"first": Net(), "second": (Net(2), None)}, nnx.Rngs(1), X), {}),
    ),
}


SHARED = "layer shared with the model"  # nnx.grad itself refuses it, the train step does not


def numbers(tree):
    """All arrays of NNX objects and trees, keys as numbers."""
    leaves = jax.tree.leaves(tree)
    keys = jax.dtypes.prng_key
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for x in leaves]


def others(arguments):
    return numbers(pure(nnx.state(arguments, nnx.Not(nnx.Param)))) + numbers(
        pure(nnx.state(arguments[0][1:], nnx.Param))
    )


@functools.cache
def by_hand(name):
    """(value, regularized gradient, state of the objects after one call of the plain loss)."""
    loss_fn, make = CASES[name]

    @jax.jit
    def gradients(params):
        def of_params(params):
            args, kwargs = make()
            nnx.update(args[0], params)
            return loss_fn(*args, **kwargs)

        value, g = jax.value_and_grad(of_params)(params)
        ahead = jax.tree.map(lambda p, d: p + EPSILON * d, params, g)
        steep = jax.grad(of_params)(ahead)
        return value, jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, steep)

    arguments = args, kwargs = make()
    value, gradient = gradients(pure(nnx.state(args[0], nnx.Param)))
    loss_fn(*args, **kwargs)
    return value, gradient, others(arguments)


def assert_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("name", [name for name in CASES if name != SHARED])
def test_every_object_ends_as_after_one_call_of_the_plain_loss(name, compiled):
    """And both gradients of the penalty are taken at the state from before the call."""
    loss_fn, make = CASES[name]
    args, kwargs = make()
    loss = gr.nnx_regularized_loss(loss_fn, FD)
    call = nnx.value_and_grad(loss)
    if compiled:
        call = nnx.jit(lambda *args, **kwargs: nnx.value_and_grad(loss)(*args, **kwargs))
    value, gradient = call(*args, **kwargs)
    expected_value, expected, state = by_hand(name)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_close(numbers(pure(nnx.state(gradient))), numbers(expected))
    assert_close(others((args, kwargs)), state)


@pytest.mark.parametrize("place", ["in the step", "in the chain"])
@pytest.mark.parametrize("name", CASES)
def test_a_train_step_moves_every_object_once(name, place):
    loss_fn, make = CASES[name]
    args, kwargs = make()
    tx = optax.sgd(RATE) if place == "in the step" else optax.chain(FD, optax.sgd(RATE))
    before = numbers(pure(nnx.state(args[0], nnx.Param)))
    optimizer = nnx.Optimizer(args[0], tx, wrt=nnx.Param)
    step = gr.make_nnx_train_step(loss_fn, FD if place == "in the step" else None)
    step(args[0], optimizer, *args[1:], **kwargs)
    moved = numbers(pure(nnx.state(args[0], nnx.Param)))
    _, expected, state = by_hand(name)
    gradient = [(a - b) / RATE for a, b in zip(before, moved, strict=True)]
    assert_close(gradient, numbers(expected))
    if name != SHARED:  # which the optimizer moves
        assert_close(others((args, kwargs)), state)
