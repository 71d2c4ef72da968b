"""Flax NNX: ``nnx_regularized_loss`` in ``nnx.grad``, with BatchNorm, dropout and LoRA.

The reference is written by hand on the pure function, with both gradients at the statistics and
counters from before the step.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradreg_optax as gr
from gradreg_optax import nnx_regularized_loss

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8
GAMMA, EPSILON = 0.5, 0.1
FD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.LoRALinear(16, 3, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.gelu(self.norm(self.first(x)))))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def loss_with_logits(model, x, y):
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits


def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(32, 8)), jnp.float32), jnp.asarray(rng.integers(0, 3, 32))


def network():
    """A network whose LoRA has moved: at its start one of the two factors is zero."""
    model = Net(nnx.Rngs(0))
    lora = model.last.lora
    lora.lora_b[...] = jnp.linspace(-1.0, 1.0, lora.lora_b[...].size).reshape(lora.lora_b.shape)
    return model


@functools.cache
def by_hand(wrt=nnx.Param):
    """(value, regularized gradient, the rest after one clean pass), as dictionaries."""
    graphdef, params, rest = nnx.split(network(), wrt, ...)

    @jax.jit
    def gradients(params, rest):
        def of_params(params):
            model = nnx.merge(graphdef, params, rest)
            return loss_fn(model, *batch()), nnx.state(model, nnx.Not(wrt))

        (value, after), g = jax.value_and_grad(of_params, has_aux=True)(params)
        ahead = jax.tree.map(lambda p, d: p + EPSILON * d, params, g)
        steep = jax.grad(of_params, has_aux=True)(ahead)[0]
        both = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, steep)
        return value, both, after

    value, gradient, after = gradients(pure(params), pure(rest))
    return value, *map(nnx.to_pure_dict, (gradient, after))


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def numbers(tree):
    """Keys as numbers, so that they can be compared."""
    keys = jax.dtypes.prng_key
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x, tree
    )


def assert_as_by_hand(value, gradient, model, wrt=nnx.Param):
    expected_value, expected, after = by_hand(wrt)
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5
    assert relative(nnx.to_pure_dict(gradient), expected) < 1e-5
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    found = nnx.to_pure_dict(nnx.state(model, nnx.Not(wrt)))
    assert int(found["dropout"]["rngs"]["count"]) == 1  # one clean pass, not two
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        *map(numbers, (found, after)),
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nnx.jit"])
def test_gradient_statistics_and_counters_are_those_by_hand(compiled):
    model, loss = network(), nnx_regularized_loss(loss_fn, FD)
    wrap = nnx.jit if compiled else lambda f: f
    value, gradient = wrap(lambda model, *xy: nnx.value_and_grad(loss)(model, *xy))(model, *batch())
    assert_as_by_hand(value, gradient, model)


FIRST = nnx.All(nnx.Param, nnx.PathContains("first"))


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, FIRST], ids=["LoRA", "a layer"])
def test_a_part_of_the_parameters_is_perturbed_and_penalised_alone(wrt):
    model, loss = network(), nnx_regularized_loss(loss_fn, FD, wrt=wrt)
    value_and_grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))
    value, gradient = nnx.jit(lambda model, *xy: value_and_grad(model, *xy))(model, *batch())
    assert_as_by_hand(value, gradient, model, wrt)


def test_aux_is_that_of_the_clean_pass():
    model, other = network(), network()
    loss = nnx_regularized_loss(loss_with_logits, FD, has_aux=True)
    grad = nnx.jit(lambda model, *xy: nnx.value_and_grad(loss, has_aux=True)(model, *xy))
    (value, logits), gradient = grad(model, *batch())
    assert_as_by_hand(value, gradient, model)
    _, plain = nnx.jit(loss_with_logits)(other, *batch())
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_evaluation_is_that_of_the_loss_and_moves_the_model_as_the_loss_does(counter):
    (graphdef, params, rest), other = nnx.split(network(), nnx.Param, ...), network()

    def counted(model, x, y):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        value = counter.wrap(lambda p: loss_fn(nnx.merge(graphdef, p, rest), x, y))(pure(params))
        model.dropout.rngs.count[...] += 1
        return value

    model = nnx.merge(graphdef, params, rest)
    loss = nnx_regularized_loss(counted, FD)
    assert loss(model, *batch()) == counted(other, *batch())
    assert counter.read() == (2, 0)
    assert int(model.dropout.rngs.count[...]) == int(other.dropout.rngs.count[...])
    nnx.jit(lambda model, *xy: nnx.grad(loss)(model, *xy))(model, *batch())
    assert counter.read() == (2, 2)


@pytest.mark.slow
def test_micro_batches_of_a_module_average_statistics_and_gradients():
    def linear(model, batch):
        return jnp.mean((model(batch) - 1) ** 2)

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            self.norm(x[:, :4])  # statistics of the input, which its output does not use
            return jnp.tanh(self.linear(x))

    x, _ = batch()
    models = [Small(nnx.Rngs(0)) for _ in range(2)]
    losses = linear, gr.microbatched(linear, 4)
    grads = [
        nnx.grad(nnx_regularized_loss(f, FD))(m, x) for f, m in zip(losses, models, strict=True)
    ]
    dicts = [nnx.to_pure_dict(g)["linear"] for g in grads]
    assert relative(*dicts) < 1e-5
    means = [m.norm.mean[...] for m in models]
    np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_schedules_take_the_step_and_stateful_ascents_are_refused():
    late = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, start=3)
    loss = nnx_regularized_loss(loss_fn, late)
    plain = nnx.to_pure_dict(nnx.grad(loss_fn)(network(), *batch()))
    early = nnx.to_pure_dict(nnx.grad(lambda m: loss(m, *batch(), step=2))(network()))
    assert relative(early, plain) < 1e-6
    due = nnx.to_pure_dict(nnx.grad(lambda m: loss(m, *batch(), step=3))(network()))
    assert relative(due, by_hand()[1]) < 1e-5
    by_name = nnx.grad(loss)(network(), *batch(), step=3)
    assert relative(nnx.to_pure_dict(by_name), by_hand()[1]) < 1e-5


@pytest.mark.parametrize("late", [{"start": 2}, {"interval": 2}, {"gamma": lambda step: 0.5}])
def test_a_regularizer_that_counts_asks_for_the_step(late):
    regularizer = gr.fd_gradreg(**({"gamma": GAMMA, "epsilon": EPSILON} | late))
    loss = nnx_regularized_loss(lambda model, x: jnp.sum(model(x)), regularizer)
    with pytest.raises(TypeError, match=r"^nnx_regularized_loss: .*Call loss\(\.\.\., step=step\)"):
        nnx.grad(loss)(linear(), jnp.ones((2, 3)))


MOMENTUM = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, ascent=optax.trace(0.9))


@pytest.mark.parametrize("regularizer", [MOMENTUM, gr.relative_gradreg()])
def test_a_regularizer_with_state_is_sent_to_the_train_step(regularizer):
    loss = nnx_regularized_loss(lambda model, x: jnp.sum(model(x)), regularizer)
    with pytest.raises(ValueError, match=r"^nnx_regularized_loss: .*make_nnx_train_step"):
        nnx.grad(loss)(linear(), jnp.ones((2, 3)))


def test_the_signature_is_that_of_the_loss_and_a_step():
    """Positional, because nnx.grad takes no keyword-only arguments."""

    def with_step(model, x, step=0):
        return 0.0

    def with_keyword(model, x, *, mode):
        return 0.0

    def with_more(model, *batches):
        return 0.0

    found = [
        str(inspect.signature(nnx_regularized_loss(f, FD)))
        for f in (loss_fn, with_step, with_keyword, with_more)
    ]
    assert found == [
        "(model, x, y, step=None)",
        "(model, x, step=0)",
        "(model, x, step=None, *, mode)",
        "(model, *batches, step=None)",
    ]


class Weights(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


def test_a_step_of_the_loss_reaches_the_loss_and_the_schedule():
    """Both kinds: a counter, by which the regularizer counts as well, and one that is none."""

    def loss(model, x, step=0):
        return jnp.mean((x @ model.w[...]) ** 2) * (1 + jnp.mean(jnp.asarray(step)))

    plain = nnx_regularized_loss(loss, gr.fd_gradreg(gamma=0.0, epsilon=0.1))
    x = jnp.eye(2)
    assert plain(Weights(), x, step=3) == 4.0
    np.testing.assert_allclose(nnx.grad(plain)(Weights(), x, step=3).w[...], [4.0, 4.0])
    assert plain(Weights(), x, step=jnp.asarray([1, 5])) == 4.0
    assert plain(Weights(), x) == 1.0
    late = nnx_regularized_loss(loss, gr.fd_gradreg(gamma=0.5, epsilon=0.1, start=3))
    for step, factor in ((2, 3.0), (3, 4.0 * (1 + 0.5 * 4.0))):  # the Hessian is 1 + step
        found = nnx.grad(late)(Weights(), x, step=step).w[...]
        np.testing.assert_allclose(found, [factor, factor], rtol=1e-5)
    with pytest.raises(TypeError, match=r"nnx_regularized_loss: .*step"):
        nnx.grad(late)(Weights(), x, step=jnp.asarray([1, 5]))


def test_a_loss_with_any_keywords_receives_the_step():
    def loss(model, x, **more):
        return jnp.mean((x @ model.w[...]) ** 2) * (1 + more.get("step", 0))

    assert nnx_regularized_loss(loss, FD)(Weights(), jnp.eye(2), step=3) == 4.0


def linear():
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("count", [None, 2])
def test_a_weighted_mean_keeps_its_weight(count):
    """Of micro-batches as of the whole, where the halves weigh differently."""
    mask = jnp.asarray([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    x = jnp.sin(jnp.arange(24.0)).reshape(8, 3)

    def weighted(model, pair):
        return gr.Weighted(jnp.sum(model(pair[0])[:, 0] ** 2 * pair[1]), jnp.sum(pair[1]))

    def mean(model, pair):
        return jnp.sum(model(pair[0])[:, 0] ** 2 * pair[1]) / jnp.sum(pair[1])

    loss = weighted if count is None else gr.microbatched(weighted, count)
    found, expected = (
        nnx.value_and_grad(nnx_regularized_loss(f, FD))(linear(), (x, mask)) for f in (loss, mean)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert relative(*(nnx.to_pure_dict(g) for _, g in (found, expected))) < 1e-5


def test_a_function_around_a_loss_in_micro_batches_is_another_loss():
    inner = gr.microbatched(lambda model, x: jnp.mean(model(x) ** 2), 2)

    @functools.wraps(inner)
    def doubled(model, x):
        return 2 * inner(model, x)

    x = jnp.sin(jnp.arange(24.0)).reshape(8, 3)
    one, two = (nnx_regularized_loss(f, FD)(linear(), x) for f in (inner, doubled))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_vmap_over_models_counts_the_added_step_as_an_argument():
    make = nnx.vmap(lambda key: nnx.Linear(2, 1, rngs=nnx.Rngs(key)))
    models, x = make(jax.random.split(jax.random.key(0), 3)), jnp.eye(2)

    def plain(model, x):
        return jnp.mean(model(x) ** 2)

    values = nnx.vmap(nnx_regularized_loss(plain, FD), in_axes=(0, None, None))(models, x, None)
    np.testing.assert_array_equal(values, nnx.vmap(plain, in_axes=(0, None))(models, x))
