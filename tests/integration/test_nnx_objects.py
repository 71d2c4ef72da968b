"""Flax NNX objects as arguments of the loss: ``nnx_regularized_loss`` and ``make_nnx_train_step``.

The reference builds all objects anew for every evaluation, so that both gradients of the penalty
see the state from before the call, and calls the plain loss once for the state after it.
"""

import functools

import flax
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
    cache["sum"] = cache["sum"] + jnp.mean(x, axis=0)
    return square(model.layer(counted(x)) + cache["sum"])


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
        lambda: ((Net(), nnx.Cache({"sum": jnp.zeros(3)}), Counted(), X), {}),
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


def ensemble(loss, model, rngs, x):
    """The loss of two equal models with equal keys, in one vmap."""

    @nnx.vmap(in_axes=(0, 0, None))
    def call(model, rngs, x):
        return loss(model, rngs, x)

    graphdef, state = nnx.split((model, rngs))
    models = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.stack([a, a]), state))
    gradient = nnx.grad(lambda models, x: call(*models, x).sum())(models, x)
    nnx.update((model, rngs), jax.tree.map(lambda a: a[1], nnx.state(models)))
    return jax.tree.map(lambda a: a[1], nnx.state(gradient)[0])


def scanned(loss, model, rngs, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def body(objects, x):
        return objects, loss(*objects, x)

    return body((model, rngs), x[None])[1].sum()


def chosen(loss, model, rngs, x):
    return nnx.cond(jnp.sum(x) > -100, loss, lambda *args: 2 * loss(*args), model, rngs, x)


def within(function):
    return lambda loss, *args: nnx.grad(lambda *args: function(loss, *args))(*args)


TRANSFORMED = {
    "grad(jit)": lambda loss, *args: nnx.grad(nnx.jit(loss))(*args),
    "jit(grad(jit))": lambda loss, *args: nnx.jit(lambda *a: nnx.grad(nnx.jit(loss))(*a))(*args),
    "grad(remat)": lambda loss, *args: nnx.grad(nnx.remat(loss))(*args),
    "grad(jit(remat))": lambda loss, *args: nnx.grad(nnx.jit(nnx.remat(loss)))(*args),
    "grad(cond)": within(chosen),
    "grad(scan)": within(scanned),
    "jit(grad(scan))": lambda loss, *args: nnx.jit(lambda *a: within(scanned)(loss, *a))(*args),
    "grad(vmap)": ensemble,
    "tree mode": lambda loss, *args: nnx.grad(loss, graph=False, allow_int=True)(*args),
    "no graph updates": lambda loss, *args: nnx.grad(loss, graph_updates=False, allow_int=True)(
        *args
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_transformations_of_nnx_go_around_a_regularized_loss(name):
    loss_fn, make = CASES["keys"]
    args, kwargs = make()
    gradient = TRANSFORMED[name](gr.nnx_regularized_loss(loss_fn, FD), *args)
    _, expected, state = by_hand("keys")
    assert_close(numbers(pure(nnx.state(gradient, nnx.Param))), numbers(expected))
    assert_close(others((args, kwargs)), state)


def test_other_arguments_have_the_gradient_of_the_loss():
    """Gradients of a teacher, if requested, and of an array; the model's stays regularized."""

    def distance(model, teacher, x):
        return square(model.layer(x) - teacher.layer(x))

    args, argnums = (Net(), Net(5), X), (0, 1, 2)
    plain = nnx.grad(distance, argnums=argnums)(*args)
    found = nnx.grad(gr.nnx_regularized_loss(distance, FD), argnums=argnums)(*args)
    alone = nnx.grad(gr.nnx_regularized_loss(distance, FD))(*args)
    assert_close(numbers(found[1:]), numbers(plain[1:]))
    assert_close(numbers(found[0]), numbers(alone))
    assert np.abs(numbers(found[0])[1] - numbers(plain[0])[1]).max() > 1e-3


def test_an_object_from_outside_is_read_and_its_change_refused_as_by_the_plain_loss():
    loss, model, rngs = gr.nnx_regularized_loss(with_keys, FD), Net(), nnx.Rngs(1)
    for f in (with_keys, loss):
        with pytest.raises(flax.errors.TraceContextError):
            nnx.grad(lambda model, f=f: f(model, rngs, X))(model)
    teacher = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(3))
    loss = gr.nnx_regularized_loss(with_teacher, FD)
    inside = nnx.grad(loss)(model, X, teacher)
    assert_close(numbers(nnx.grad(lambda m: loss(m, X, teacher))(model)), numbers(inside))


def eval_inside(model, x):
    model.eval()
    return square(model(x))


def sown(model, x):
    model.hidden = nnx.Intermediate(model.layer(x))
    return square(model.layer(x))


@pytest.mark.parametrize("loss_fn", [eval_inside, sown])
def test_a_change_of_structure_that_would_be_lost_is_refused(loss_fn):
    with pytest.raises(ValueError, match=r"^nnx_regularized_loss: .*must leave the structure"):
        gr.nnx_regularized_loss(loss_fn, FD)(Net(), X)
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"make_nnx_train_step: .*must leave the structure"):
        gr.make_nnx_train_step(loss_fn, FD)(model, optimizer, X)


def test_an_object_in_a_batch_that_is_split_is_named():
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
    step = gr.make_nnx_train_step(with_nested_keys, FD, penalty_fraction=0.5)
    with pytest.raises(TypeError, match=r"^make_nnx_train_step: .*cannot split a Rngs"):
        step(model, optimizer, {"x": X, "more": [nnx.Rngs(1), None]})


def test_a_model_may_be_a_variable():
    scale = nnx.Param(jnp.asarray([1.0, 2.0, 3.0]))
    gradient = nnx.grad(gr.nnx_regularized_loss(lambda scale, x: square(x * scale), FD))(scale, X)
    curvature = 2 * np.mean(X**2, axis=0) / 3
    expected = (1 + GAMMA * curvature) * curvature * np.asarray([1.0, 2.0, 3.0])
    np.testing.assert_allclose(gradient[...], expected, rtol=1e-5)


def test_a_loss_may_take_values_out_of_its_batch():
    def loss(model, batch):
        return square(model.layer(batch.pop("x")) - batch.pop("target"))

    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
    info = gr.make_nnx_train_step(loss, FD)(model, optimizer, {"x": X, "target": 0.0})
    np.testing.assert_allclose(info.loss, square(Net().layer(X)), rtol=1e-6)
    assert gr.nnx_regularized_loss(loss, FD)(Net(), {"x": X, "target": 0.0}) > 0


class CNN(nnx.Module):
    """The network of Flax's MNIST tutorial, with fewer features and smaller images."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.1)
        self.conv2 = nnx.Conv(4, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(16, 8, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.1)
        self.linear2 = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.dropout1(self.batch_norm1(self.conv1(x)), rngs=rngs)
        x = self.avg_pool(nnx.relu(x))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
        return self.linear2(x)


def tutorial_loss(model, rngs, batch):
    logits = model(batch["image"], rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


def value_and_grad_by_hand(loss_fn):
    """The two gradients on copies of the objects from before the step."""

    def value_and_grad(model, rngs, batch):
        copy, keys = nnx.clone((model, rngs))
        output, g = nnx.value_and_grad(loss_fn, has_aux=True)(model, rngs, batch)
        params = nnx.state(copy, nnx.Param)
        nnx.update(copy, jax.tree.map(lambda p, d: p + EPSILON * d, params, g))
        steep, _ = nnx.grad(loss_fn, has_aux=True)(copy, keys, batch)
        return output, jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, steep)

    return value_and_grad


def trained_as_in_the_tutorial(loss_fn, value_and_grad):
    """Two steps and an evaluation; ``loss_fn`` and the gradient function vary."""
    model, rngs = CNN(rngs=nnx.Rngs(0)), nnx.Rngs(0)
    optimizer = nnx.Optimizer(model, optax.adamw(0.005, 0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        (loss, logits), grads = value_and_grad(loss_fn)(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, rngs, batch):
        loss, logits = loss_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    draws = np.random.default_rng(0)
    history = []
    for _ in range(2):
        images, labels = draws.normal(size=(4, 8, 8, 1)), draws.integers(0, 10, 4)
        batch = {"image": images.astype(np.float32), "label": labels}
        model.train()
        train_step(model, optimizer, metrics, rngs, batch)
        history += metrics.compute().values()
        metrics.reset()
        model.eval()
        eval_step(model, metrics, rngs, batch)
        history += metrics.compute().values()
        metrics.reset()
    return numbers(pure(nnx.state((model, rngs)))), history


def test_the_loop_of_the_tutorial_of_flax_changes_one_line():
    def stock(loss_fn):
        return nnx.value_and_grad(loss_fn, has_aux=True)

    regularized = gr.nnx_regularized_loss(tutorial_loss, FD, has_aux=True)  # the line
    found, history = trained_as_in_the_tutorial(regularized, stock)
    expected, expected_history = trained_as_in_the_tutorial(tutorial_loss, value_and_grad_by_hand)
    for a, b in zip([*found, *history], [*expected, *expected_history], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # adamw divides by small gradients
