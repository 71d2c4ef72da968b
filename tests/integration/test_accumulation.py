"""Micro-batches: k of them are one batch, at the memory of one, and what MultiSteps makes of a
regularizer that stands inside it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr

GAMMA, EPSILON = 0.5, 0.05
WIDE = {"fd": gr.fd_value_and_grad, "dbp": gr.dbp_value_and_grad}


def loss_fn(params, batch):
    x, y = batch
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def problem(dtype, samples=32, inputs=8, width=16, depth=2):
    rng = np.random.default_rng(0)
    sizes = [inputs] + [width] * depth + [2]
    params = [
        jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)
        for shape in itertools.pairwise(sizes)
    ]
    return params, (
        jnp.asarray(rng.normal(size=(samples, inputs)), dtype),
        jnp.asarray(rng.normal(size=(samples, 2)), dtype),
    )


def relative(found, expected):
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def value_and_grad(method, loss):
    options = {"epsilon": EPSILON} if method == "fd" else {}
    return jax.jit(WIDE[method](loss, gamma=GAMMA, **options))


@pytest.mark.parametrize("method", ["fd", "dbp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_four_micro_batches_are_one_batch(method, dtype, tolerance):
    # The tolerances are those of the precision, times gamma / epsilon = 10: only the order of
    # summation differs.
    with jax.enable_x64(dtype is np.float64):
        params, batch = problem(dtype)
        value, grad = value_and_grad(method, loss_fn)(params, batch)
        parts_value, parts_grad = value_and_grad(method, gr.microbatched(loss_fn, 4))(params, batch)
        assert relative(parts_grad, grad) < tolerance
        assert relative(parts_value, value) < tolerance
        # The penalty is there: without it the gradient is another one.
        assert relative(jax.grad(loss_fn)(params, batch), grad) > 1e-2


@pytest.mark.parametrize("method", ["fd", "dbp"])
def test_a_train_step_on_micro_batches_is_the_step_on_the_batch(method):
    params, batch = problem(np.float32)
    regularizer = (
        gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
        if method == "fd"
        else gr.dbp_gradreg(gamma=GAMMA)
    )
    states = []
    for loss in (loss_fn, gr.microbatched(loss_fn, 4)):
        init, step = gr.make_train_step(loss, optax.adam(1e-2), regularizer)
        state = init(params)
        for _ in range(3):
            state, _ = step(state, batch)
        states.append(state.params)
    assert relative(*states) < 1e-5  # float32, as above


def temporary_memory(method, loss, params, batch):
    return (
        value_and_grad(method, loss)
        .lower(params, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


@pytest.mark.parametrize("method", ["fd", "dbp"])
def test_four_micro_batches_take_the_memory_of_one_and_of_the_accumulators(method):
    """Where activations dominate: 1024 samples of 32 inputs through eight layers of 32 units."""
    params, batch = problem(np.float32, samples=1024, inputs=32, width=32, depth=8)
    piece = jax.tree.map(lambda x: x[:256], batch)
    one, whole = (temporary_memory(method, loss_fn, params, b) for b in (piece, batch))
    parts = temporary_memory(method, gr.microbatched(loss_fn, 4), params, batch)
    accumulator = sum(p.nbytes for p in params)
    assert whole > 2.5 * one  # activations dominate, so there is something to save
    # One accumulator for each of the two quantities that are summed over the micro-batches: g, and
    # g ahead or the product.
    assert parts <= 1.15 * one + 2 * accumulator


@pytest.mark.skipif(not hasattr(optax, "microbatching"), reason="it came with optax 0.2.7")
def test_optax_microbatching_does_the_same_for_a_gradient_function():
    """optax.microbatching accumulates a gradient, which serves the difference: it needs nothing but
    gradients."""
    params, (x, y) = problem(np.float32)
    microbatch = optax.microbatching.microbatch
    mean = optax.microbatching.AccumulationType.MEAN
    grad_fn = microbatch(
        jax.grad(lambda p, x, y: loss_fn(p, (x, y))),
        argnums=(),
        argnames=("x", "y"),
        microbatch_size=8,
        accumulator=mean,
    )

    @jax.jit
    def by_hand(params):
        g = grad_fn(params, x=x, y=y)
        ahead = grad_fn(jax.tree.map(lambda p, d: p + EPSILON * d, params, g), x=x, y=y)
        return jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, ahead)

    _, ours = value_and_grad("fd", gr.microbatched(loss_fn, 4))(params, (x, y))
    assert relative(ours, by_hand(params)) < 1e-5


def part(batch, j):
    return jax.tree.map(lambda a: a[j::4], batch)


def accumulate(tx, params, batch):
    """Four updates on four micro-batches; the sum of what comes out."""
    state, total = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(
        lambda g, s, x, y: tx.update(g, s, params, value_fn=lambda p: loss_fn(p, (x, y)))
    )
    for j in range(4):
        piece = part(batch, j)
        updates, state = update(jax.grad(loss_fn)(params, piece), state, *piece)
        total = jax.tree.map(jnp.add, total, updates)
    return total


@pytest.fixture(scope="module")
def accumulation_case():
    params, batch = problem(np.float32)
    pieces = [part(batch, j) for j in range(4)]
    fd = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
    _, whole = value_and_grad("fd", loss_fn)(params, batch)
    each = [value_and_grad("fd", loss_fn)(params, piece)[1] for piece in pieces]
    mean_of_parts = jax.tree.map(lambda *g: sum(g) / 4, *each)
    return params, batch, pieces, fd, whole, mean_of_parts


def test_a_regularizer_inside_multisteps_differences_gradients_of_two_losses(accumulation_case):
    """Silently wrong: the mean gradient comes in, but the loss is that of the last micro-batch.

    g + c (g'_last - g) with c = gamma / epsilon contains c (g_last - g), which has nothing to do
    with curvature.
    """
    params, batch, pieces, fd, whole, _ = accumulation_case
    found = accumulate(optax.MultiSteps(fd, 4).gradient_transformation(), params, batch)
    assert relative(found, whole) > 0.5
    g = jax.grad(loss_fn)(params, batch)
    last_ahead = jax.grad(loss_fn)(
        jax.tree.map(lambda p, d: p + EPSILON * d, params, g), pieces[-1]
    )
    explained = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, last_ahead)
    assert relative(found, explained) < 1e-5


def test_a_regularizer_in_front_of_multisteps_penalizes_each_micro_batch(accumulation_case):
    """Well defined: the mean of the regularized gradients, which penalizes the mean of the
    micro-batches' squared norms."""
    params, batch, _, fd, _, mean_of_parts = accumulation_case
    behind = optax.MultiSteps(optax.identity(), 4).gradient_transformation()
    assert relative(accumulate(optax.chain(fd, behind), params, batch), mean_of_parts) < 1e-5


def test_micro_batches_inside_the_loss_are_the_right_way_to_accumulate(accumulation_case):
    params, batch, _, fd, whole, mean_of_parts = accumulation_case
    loss = gr.microbatched(loss_fn, 4)
    found, _ = fd.update(
        jax.grad(loss)(params, batch), fd.init(params), params, value_fn=lambda p: loss(p, batch)
    )
    assert relative(found, whole) < 1e-5
    assert relative(mean_of_parts, whole) > 1e-2
