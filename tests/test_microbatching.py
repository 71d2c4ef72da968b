"""A loss that goes through its batch in pieces is the same loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import Weighted, fd_gradreg, make_train_step, microbatched, regularized_loss
from problems import batch_of, loss_fn, params_of

SGD = optax.sgd(0.1)
FUNCTIONS = {
    "difference": lambda loss: gr.fd_value_and_grad(loss, gamma=0.3, epsilon=0.2, scheme="central"),
    "product, reverse": lambda loss: gr.dbp_value_and_grad(
        loss, gamma=0.3, mode="reverse_over_reverse"
    ),
}


def test_aux_comes_back_stacked_and_values_without_a_gradient_agree(x64):
    def with_aux(params, batch):
        return loss_fn(params, batch), jnp.mean(batch["y"])

    @jax.jit
    def ways(params, batch):
        loss = microbatched(with_aux, 4, has_aux=True)
        with_gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)[0]
        return loss(params, batch), with_gradient, with_aux(params, batch)

    *found, (expected, _) = ways(params_of(), batch_of())
    for value, aux in found:
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        # every fourth sample
        np.testing.assert_allclose(aux, batch_of()["y"].reshape(2, 4).mean(axis=0), rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_gradients_keep_the_dtype_and_accumulate_in_float32(dtype):
    # in bfloat16 the sum 257, 258, ... would stay at 256
    batch = jnp.ones(256, jnp.float32).at[0].set(256.0)

    def loss(params, batch):
        return jnp.mean(batch) * jnp.sum(jnp.real(params)).astype(jnp.float32)

    gradient = jax.jit(jax.grad(microbatched(loss, 256)))(jnp.ones(2, dtype), batch)
    assert gradient.dtype == dtype
    # one rounding to bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.complex64), 511 / 256, rtol=2**-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_temporary_memory_is_that_of_one_micro_batch(name):
    def wide(params, batch):
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ params) @ params) ** 2)

    params, batch, count = jnp.ones((16, 16)), jnp.ones((4096, 16)), 16

    def temporary(loss, batch):
        compiled = jax.jit(FUNCTIONS[name](loss)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # and copies of the samples of a micro-batch: one, or two in jaxlib 0.10.0 and before
    accumulators = 4 * params.nbytes + 2 * batch.nbytes // count
    piece = temporary(wide, batch[: len(batch) // count])
    assert temporary(microbatched(wide, count), batch) <= 1.15 * piece + accumulators
    assert temporary(wide, batch) > 8 * piece  # so that the bound above says something


# --- a weighted loss inside of others: (1 + 1 + 81) / 3 of three samples that count among four


def masked_squares(scale, batch):
    counted = batch["mask"] * (batch["x"] * scale) ** 2
    return Weighted(jnp.sum(counted), jnp.sum(batch["mask"]))


def unequal():
    return {"x": np.asarray([1.0, 1, 9, 9]), "mask": np.asarray([1.0, 1, 1, 0])}


MEAN = 83 / 3
ONLY_A_FACTOR = fd_gradreg(gamma=0.0, epsilon=0.1)
WEIGHTED = {
    "alone": lambda f: f,
    "micro-batches": lambda f: microbatched(f, 2),
    "jit of micro-batches": lambda f: jax.jit(microbatched(f, 2)),
    "jit of regularized": lambda f: jax.jit(regularized_loss(f, ONLY_A_FACTOR)),
    "regularized micro-batches": lambda f: regularized_loss(microbatched(f, 2), ONLY_A_FACTOR),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_pass_through_losses_around_losses(x64, name):
    loss = WEIGHTED[name](masked_squares)
    in_the_step = {"regularizer": ONLY_A_FACTOR, "ascent_groups": 2}
    init, step = make_train_step(loss, SGD, **({} if "regularized" in name else in_the_step))
    state, info = step(init(np.ones([])), unequal())
    np.testing.assert_allclose(info.loss, MEAN, rtol=1e-12)
    np.testing.assert_allclose(state.params, 1 - 0.2 * MEAN, rtol=1e-12)
    around = microbatched(loss, 2)

    @jax.jit
    def values(scale, batch):
        return around(scale, batch), jax.value_and_grad(around)(scale, batch)

    again, found = values(1.0, unequal())
    np.testing.assert_allclose([again, *found], [MEAN, MEAN, 2 * MEAN], rtol=1e-12)


def test_a_weight_that_a_wrapper_loses_is_an_error():
    for wrap in (jax.checkpoint, functools.partial, lambda f: lambda *args: f(*args)):
        loss = wrap(microbatched(masked_squares, 2))
        init, step = make_train_step(loss, SGD, ONLY_A_FACTOR, ascent_groups=2)
        with pytest.raises(TypeError, match=r"make_train_step: .*weight"):
            step(init(1.0), unequal())
    np.testing.assert_allclose(loss(1.0, unequal()), MEAN, rtol=1e-6)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), np.float32(-2)])
def test_a_weight_that_is_known_and_impossible_is_refused(weight):
    def loss(scale, batch):
        return Weighted(jnp.sum(scale * batch["x"]), weight)

    init, step = make_train_step(loss, SGD)
    with pytest.raises(ValueError, match=r"microbatched: Weighted.weight must be finite"):
        microbatched(loss, 2)(1.0, unequal())
    with pytest.raises(ValueError, match=r"make_train_step: Weighted.weight must be finite"):
        step(init(1.0), unequal())


def test_a_batch_of_which_no_sample_counts_has_the_sum_for_its_mean():
    batch = {"x": np.ones(4), "mask": np.zeros(4)}
    for loss in (masked_squares, microbatched(masked_squares, 2)):
        found = gr.fd_value_and_grad(loss, gamma=0.1, epsilon=0.1)(1.0, batch)
        np.testing.assert_array_equal(found, 0.0)
    regularizer = gr.fd_gradreg(gamma=0.1, epsilon=0.1)
    init, step = gr.make_train_step(masked_squares, optax.sgd(0.5), regularizer, ascent_groups=2)
    assert step(init(1.0), batch)[0].params == 1


def test_a_sparse_batch_is_refused_and_not_halved():
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    batch, params = sparse.BCOO.fromdense(x), jnp.ones(3)

    def loss(params, x):
        return jnp.mean((x @ params) ** 2)

    with pytest.raises(TypeError, match=r"microbatched: .*BCOO"):
        microbatched(loss, 2)(params, batch)
    for option in ({"penalty_fraction": 0.5}, {"ascent_groups": 2}):
        init, step = make_train_step(loss, SGD, ONLY_A_FACTOR, **option)
        with pytest.raises(TypeError, match=r"make_train_step: .*BCOO"):
            step(init(params), batch)
    init, step = make_train_step(loss, SGD, ONLY_A_FACTOR)  # in one piece
    np.testing.assert_allclose(step(init(params), batch)[1].loss, loss(params, x), rtol=1e-6)


def test_micro_batches_differentiate_aux_with_its_own_cotangent():
    def loss(params, x):
        return jnp.mean(x * params), params**2

    def total(params, weight):
        value, aux = microbatched(loss, 2, has_aux=True)(params, jnp.ones(4))
        return 3.0 * value + weight * jnp.mean(aux)

    for weight in (0.0, 1.0, -2.0):  # 3 + weight * 2 p
        found = jax.jit(jax.grad(total))(3.0, weight)
        np.testing.assert_allclose(found, 3.0 + 6.0 * weight, rtol=1e-6)


def test_a_weighted_mean_in_float16_whose_sums_overflow_is_the_mean():
    batch = jnp.full(400, 300.0, jnp.float16)  # 400 * 300 is beyond 65504

    def loss(params, batch):
        return Weighted(jnp.sum(params * batch), jnp.asarray(len(batch), jnp.float32))

    params = jnp.asarray(1.0, jnp.float16)
    value, gradient = jax.jit(jax.value_and_grad(microbatched(loss, 8)))(params, batch)
    assert value.dtype == gradient.dtype == jnp.float16
    np.testing.assert_allclose([value, gradient], 300.0, rtol=2e-3)
    plain = microbatched(lambda p, b: jnp.mean(p * b) * 200, 4)  # four times 60000
    np.testing.assert_allclose(jax.jit(plain)(params, batch), 60000.0, rtol=2e-3)


def test_extra_arguments_meant_for_others_stop_at_a_loss_in_micro_batches():
    for loss in (microbatched(two.mean_square, 2), regularized_loss(two.mean_square, two.FD)):
        tx = fd_gradreg(loss, **two.PENALTY)
        arguments = tx.init(two.P), two.P
        tx.update(two.P, *arguments, batch=two.BATCH, meant_for_others=7)
        with two.says(TypeError, "fd_gradreg: the loss needs 'batch'"):
            tx.update(two.P, *arguments, meant_for_others=7)
