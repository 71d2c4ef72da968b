"""Faults that were there once, each with its whole kind."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from gradreg_optax import curvature
from gradreg_optax._batching import first_fraction
from gradreg_optax._estimators import difference
from gradreg_optax._sharding import leading_devices
from gradreg_optax._validation import fraction

P = jnp.asarray([1.0, 2.0])
BATCH = jnp.asarray([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]])
PENALTY = {"gamma": 0.1, "epsilon": 0.1}
FD = gr.fd_gradreg(**PENALTY)


def mean_square(params, batch):
    return jnp.mean((batch @ params) ** 2)


def quartic(params):
    return jnp.sum(params**4)


def updated(tx, params=P, loss=quartic, **extra):
    gradient = jax.grad(loss)(params)
    return tx.update(gradient, tx.init(params), params, value_fn=loss, **extra)[0]


def says(error, *parts):
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def one_step(loss=mean_square, optimizer=None, regularizer=FD, batch=BATCH, **options):
    init, step = gr.make_train_step(loss, optimizer or optax.sgd(0.1), regularizer, **options)
    return step(init(P), batch)


# --- micro-batches and weighted means


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_differentiate_aux_with_its_own_cotangent(count):
    def loss(params, x):
        return jnp.mean(x * params), params**2

    def total(params, weight):
        value, aux = gr.microbatched(loss, count, has_aux=True)(params, jnp.ones(4))
        return 3.0 * value + weight * jnp.mean(aux)

    for weight in (0.0, 1.0, -2.0):  # 3 + weight * 2 p
        np.testing.assert_allclose(jax.grad(total)(3.0, weight), 3.0 + 6.0 * weight, rtol=1e-6)


def masked_mean(params, batch):
    losses = jnp.tanh(batch["x"] * params) ** 2 * batch["mask"]
    return gr.Weighted(jnp.sum(losses), jnp.sum(batch["mask"]))


def tokens():
    mask = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], jnp.float32)
    return {"x": jnp.sin(jnp.arange(16.0)).reshape(4, 4) + 1, "mask": mask}


def test_a_mean_over_tokens_is_the_same_in_micro_batches_and_groups():
    batch, params = tokens(), jnp.asarray(0.7)

    def whole(params):
        weighted = masked_mean(params, batch)
        return weighted.total / weighted.weight

    for count in (1, 2, 4):
        found = jax.value_and_grad(gr.microbatched(masked_mean, count))(params, batch)
        np.testing.assert_allclose(found, jax.value_and_grad(whole)(params), rtol=1e-6)
        init, step = gr.make_train_step(
            masked_mean, optax.sgd(1.0), gr.fd_gradreg(gamma=0.0, epsilon=0.1), ascent_groups=count
        )
        state, info = step(init(params), batch)
        np.testing.assert_allclose(info.loss, whole(params), rtol=1e-6)
        np.testing.assert_allclose(params - state.params, jax.grad(whole)(params), rtol=1e-5)


def test_a_weighted_mean_in_float16_whose_sums_overflow_is_the_mean():
    batch = jnp.full(400, 300.0, jnp.float16)  # 400 * 300 is beyond 65504

    def loss(params, batch):
        return gr.Weighted(jnp.sum(params * batch), jnp.asarray(len(batch), jnp.float32))

    params = jnp.asarray(1.0, jnp.float16)
    for micro in (8, 40):
        value, gradient = jax.value_and_grad(gr.microbatched(loss, micro))(params, batch)
        assert value.dtype == gradient.dtype == jnp.float16
        np.testing.assert_allclose([value, gradient], 300.0, rtol=2e-3)
    plain = gr.microbatched(lambda p, b: jnp.mean(p * b) * 200, 4)  # four times 60000
    np.testing.assert_allclose(plain(params, batch), 60000.0, rtol=2e-3)


def test_a_count_in_float16_does_not_end_at_65504():
    def loss(params):
        return gr.Weighted(params * jnp.asarray(60000.0, jnp.float16), 120000)

    value, _ = gr.fd_value_and_grad(loss, **PENALTY)(jnp.asarray(1.0, jnp.float16))
    np.testing.assert_allclose(value, 0.5, rtol=2e-3)


def test_micro_batches_work_in_the_recipe_for_shard_map():
    auto = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=auto), jax.sharding.PartitionSpec

    def gradient(params, batch):
        loss = gr.microbatched(mean_square, 2)
        return jax.grad(lambda p: jax.lax.pmean(loss(p, batch), "data"))(params)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    found = jax.jit(sharded)(P, BATCH)
    np.testing.assert_allclose(found, jax.grad(mean_square)(P, BATCH), rtol=1e-6)


def test_in_shard_map_the_gradient_in_replicated_parameters_is_the_sum_over_the_devices():
    auto = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=auto), jax.sharding.PartitionSpec
    loss = gr.regularized_loss(mean_square, FD)

    def gradient(params, batch):
        return jax.grad(loss)(params, batch)  # of a loss that varies from device to device

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    np.testing.assert_allclose(jax.jit(sharded)(P, BATCH), jax.grad(loss)(P, BATCH), rtol=1e-6)


def test_extra_arguments_meant_for_others_stop_at_a_loss_in_micro_batches():
    for loss in (gr.microbatched(mean_square, 2), gr.regularized_loss(mean_square, FD)):
        tx = gr.fd_gradreg(loss, **PENALTY)
        arguments = tx.init(P), P
        tx.update(P, *arguments, batch=BATCH, meant_for_others=7)
        with says(TypeError, "fd_gradreg: the loss needs 'batch'"):
            tx.update(P, *arguments, meant_for_others=7)


def test_the_name_in_a_sentence_is_that_of_the_function_that_was_called():
    with says(TypeError, "microbatched: the loss must return a real scalar, got shape (2,)"):
        gr.microbatched(lambda p, b: b @ p, 2)(P, BATCH)
    for batch in (jnp.float32(1), {"x": jnp.float32(1), "y": jnp.float32(2)}, {}):
        with says(ValueError, "microbatched: count needs a batch whose leaves share"):
            gr.microbatched(mean_square, 2)(P, batch)
    with says(ValueError, "microbatched: count needs a batch with samples"):
        gr.microbatched(mean_square, 2)(P, BATCH[:0])


# --- parts of a batch


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.float32])
def test_a_fraction_is_the_decimal_that_was_written(dtype):
    """Of n samples the first percent * n / 100 are kept, rounded up, in whole numbers."""
    for size in (1, 3, 7, 10, 64, 100, 999, 1000):
        batch = np.arange(size)
        for percent in range(1, 101):
            kept = fraction("f", "penalty_fraction", dtype(percent / 100))
            part = first_fraction("f", "penalty_fraction", batch, kept)
            assert len(part) == -(-percent * size // 100), (size, percent)


# --- numbers


def test_a_difference_of_narrow_gradients_is_not_rounded_before_it_is_divided():
    """Gradients 258 and 0.25 differ by 257.75, which in bfloat16 is 258."""
    ahead, here = jnp.asarray(258.0, jnp.bfloat16), jnp.asarray(0.25, jnp.bfloat16)
    loss = jax.custom_vjp(lambda p: p)
    loss.defvjp(lambda p: (p, p), lambda p, c: (jnp.where(p > 1, ahead, here) * c,))
    params = jnp.asarray(1.0, jnp.bfloat16)
    estimate = difference(
        lambda p: (jax.grad(loss)(p), None),
        params,
        lambda gradient: (gradient, ()),
        epsilon=jnp.float32(0.3),
        scheme="forward",
    )
    product = estimate.product
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, 257.75 / 0.3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_an_ascent_is_handed_the_steepest_direction_in_float32_or_wider(dtype):
    seen = []

    def ascent(gradient, params):
        seen.append((gradient.dtype, params.dtype))
        return gradient

    updated(
        gr.fd_gradreg(**PENALTY, ascent=ascent),
        jnp.ones(2, dtype),
        lambda p: jnp.sum(jnp.abs(p.astype(jnp.result_type(dtype, jnp.float32))) ** 2),
    )
    wide = jnp.dtype(jnp.promote_types(dtype, jnp.float32))
    assert set(seen) == {(wide, jnp.dtype(dtype))}


def test_epsilon_and_gamma_at_the_ends_of_float32_are_refused():
    for epsilon in (float("inf"), 1e-40, 1e39):
        for make in (gr.fd_gradreg, gr.gradient_norm_penalty):
            with says(
                ValueError, f"{make.__name__}: epsilon must be finite and > 0, got {epsilon}"
            ):
                make(gamma=0.1, epsilon=epsilon)
    with says(ValueError, "fd_gradreg: gamma must be finite and >= 0, got inf"):
        gr.fd_gradreg(gamma=1e39, epsilon=0.1)
    with jax.enable_x64(True):
        gr.fd_gradreg(gamma=1e39, epsilon=1e-40)


def test_sharpness_climbs_along_the_conjugate_of_the_gradient():
    z, target = jnp.asarray([0.5 + 1j, -0.3 + 0.2j]), jnp.asarray([1j, 2.0])

    def loss(z):  # conj(gradient) = z - target
        return jnp.sum(jnp.abs(z - target) ** 2) / 2

    # (|d| + rho)^2 / 2 - |d|^2 / 2
    distance = float(jnp.linalg.norm(z - target))
    expected = ((distance + 0.1) ** 2 - distance**2) / 2
    np.testing.assert_allclose(curvature.perturbed_sharpness(loss, z, 0.1), expected, rtol=1e-4)


def test_the_standard_error_is_that_of_the_samples():
    """Of [[0, 1], [1, 0]] a sample is 2 or -2: of n with mean m the variance is
    (4 - m^2) n / (n - 1)."""
    count = 9
    mean, error = curvature.hessian_trace(
        lambda p: p[0] * p[1], P, jax.random.key(0), num_samples=count
    )
    expected = np.sqrt((4 - float(mean) ** 2) / (count - 1))
    assert expected > 0
    np.testing.assert_allclose(error, expected, rtol=1e-5)


# --- sentences


@pytest.mark.parametrize("leaf", [1, True, jnp.asarray(1), np.bool_(True), jax.random.key(0)])
def test_leaves_without_a_gradient_are_named_by_every_curvature(leaf):
    params, key = {"w": P, "n": leaf}, jax.random.key(0)

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    for name, call in {
        "hessian_vector_product": lambda: curvature.hessian_vector_product(loss, params, params),
        "gradient_norm": lambda: curvature.gradient_norm(loss, params),
        "top_hessian_eigenvalue": lambda: curvature.top_hessian_eigenvalue(loss, params, key),
        "hessian_trace": lambda: curvature.hessian_trace(loss, params, key),
        "perturbed_sharpness": lambda: curvature.perturbed_sharpness(loss, params, 0.1),
        "difference_error": lambda: curvature.difference_error(loss, params, 0.1),
        "fd_value_and_grad": lambda: gr.fd_value_and_grad(loss, **PENALTY)(params),
        "fd_gradreg": lambda: FD.init(params),
        "make_train_step": lambda: gr.make_train_step(loss, optax.sgd(0.1)).init(params),
    }.items():
        with says(TypeError, f"{name}: the parameters['n'] has dtype", "have a gradient"):
            call()


@pytest.mark.parametrize("rho", [[0.1, 0.2], True, 1j, float("nan"), float("inf"), None, "0.1"])
def test_a_radius_of_sharpness_is_a_finite_real_scalar(rho):
    with says((TypeError, ValueError), "perturbed_sharpness: rho must be"):
        curvature.perturbed_sharpness(quartic, P, rho)


@pytest.mark.parametrize(
    "value", [np.longdouble(1), np.timedelta64(1), np.datetime64("2020"), b"1", [1, [2]], object()]
)
def test_scalars_that_jax_does_not_know_are_refused(value):
    with says(TypeError, "fd_gradreg: gamma must be a real number or a schedule"):
        gr.fd_gradreg(gamma=value, epsilon=0.1)
    with says(TypeError, "make_train_step: ascent_groups must be a whole number"):
        gr.make_train_step(mean_square, optax.sgd(0.1), FD, ascent_groups=value)


def test_a_longdouble_leaf_is_named():
    with says(TypeError, "fd_value_and_grad: the parameters has dtype"):
        gr.fd_value_and_grad(quartic, **PENALTY)(np.ones(2, np.longdouble))


def test_whole_numbers_and_fractions_refuse_what_is_none():
    for bad in ("2", None, 2.5, float("nan"), float("inf"), [2], True):
        with says((TypeError, ValueError), "make_train_step: ascent_groups must be a whole number"):
            one_step(ascent_groups=bad)
        with says((TypeError, ValueError), "microbatched: count must be a whole number"):
            gr.microbatched(mean_square, bad)
    for bad in ("0.5", None, float("nan"), float("inf"), [0.5], True):
        with says((TypeError, ValueError), "make_train_step: penalty_fraction must"):
            one_step(penalty_fraction=bad)


def test_integer_updates_are_refused_and_not_truncated():
    for tx in (FD, gr.sam(rho=0.1), gr.flooding(level=0.1), gr.dbp_gradreg(gamma=0.1)):
        for dtype in (jnp.int32, jnp.uint8, jnp.bool_):
            updates = jnp.ones(2, dtype)
            with says(TypeError, "updates has dtype", "have a gradient"):
                tx.update(updates, tx.init(P), P, value=0.0, value_fn=quartic)


def test_what_should_be_a_transformation_or_a_loss_is_named():
    with says(TypeError, "make_train_step: the loss must be a function", "NoneType"):
        gr.make_train_step(None, optax.sgd(0.1))
    with says(TypeError, "regularizer must be an Optax transformation, made by calling it, got"):
        gr.make_train_step(mean_square, optax.sgd(0.1), gr.fd_gradreg)
    with says(TypeError, "optimizer must be an Optax transformation", "optimizer=optax.adam("):
        gr.make_train_step(mean_square, optax.sgd)
    with says(ValueError, "flooding: level must be a number, got nan"):
        gr.flooding(level=float("nan"))
    with says(
        ValueError, "direction returned by ascent must have the shape (2,) of its parameter, got ()"
    ):
        updated(gr.fd_gradreg(**PENALTY, ascent=lambda gradient, params: 1.0))
    with says(
        ValueError,
        "hessian_vector_product: vector must have the shape (2,) of its parameter, got (3,)",
    ):
        curvature.hessian_vector_product(quartic, P, jnp.ones(3))


def test_without_parameters_there_is_no_hessian_and_nothing_to_penalise():
    key = jax.random.key(0)
    for call in (
        lambda: curvature.top_hessian_eigenvalue(lambda p: 1.0, {}, key),
        lambda: curvature.hessian_trace(lambda p: 1.0, {}, key),
    ):
        with says(ValueError, "the parameters must not be empty"):
            call()
    nothing = curvature.penalty_scale(lambda p, b: jnp.mean(b), {}, BATCH, penalty_fraction=0.5)
    assert nothing == (1, 0, 0)


STATES = {
    "dict": lambda state: state._asdict(),
    "tuple": lambda state: tuple(state),
    "list": lambda state: list(state),
    "None": lambda state: None,
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_came_back_as_something_else_is_named(kind):
    for name, tx in {
        "fd_gradreg": FD,
        "dbp_gradreg": gr.dbp_gradreg(gamma=0.1),
        "sam": gr.sam(rho=0.1, interval=2),
        "flooding": gr.flooding(level=0.1),
        "relative_gradreg": gr.relative_gradreg(),
    }.items():
        state = STATES[kind](tx.init(P))
        with says(TypeError, f"{name}: the state must be the", "that init made"):
            tx.update(P, state, P, value=1.0, value_fn=quartic)
    init, step = gr.make_train_step(mean_square, optax.sgd(0.1), FD)
    with says(TypeError, "make_train_step: the state must be the TrainState that init made"):
        step(STATES[kind](init(P)), BATCH)


def test_what_groups_cannot_share_is_named():
    def update(updates, state, params=None):
        return updates, jnp.any(updates > 0).astype(jnp.int32)

    other = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    with says(ValueError, "with ascent_groups, counters and keys in the regularizer's state must"):
        one_step(regularizer=optax.chain(FD, other), ascent_groups=2)


def test_a_part_of_the_batch_needs_a_transformation_of_ours():
    own = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params, **_: (updates, state)
    )
    with says(TypeError, "penalty_fraction needs a transformation of this package"):
        one_step(regularizer=own, penalty_fraction=0.5)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)])
def test_a_penalty_in_the_optimizer_and_in_the_step_is_refused(wrap):
    for ours in (FD, gr.sam(rho=0.1), gr.relative_gradreg()):
        with says(ValueError, "make_train_step: ", "penalise twice", "optax.chain"):
            one_step(optimizer=optax.chain(wrap(ours), optax.sgd(0.1)))
    one_step(optimizer=optax.chain(FD, optax.sgd(0.1)), regularizer=None)


def test_a_penalty_in_the_loss_and_in_the_step_is_refused():
    loss = gr.regularized_loss(mean_square, FD)
    for places in (
        {"regularizer": gr.sam(rho=0.1)},
        {"optimizer": optax.chain(FD, optax.sgd(1.0))},
    ):
        with says(ValueError, "make_train_step: ", "penalise twice", "Remove one"):
            one_step(loss, **{"regularizer": None} | places)
    in_the_loss, _ = one_step(loss, regularizer=None)
    in_the_step, _ = one_step(mean_square)
    np.testing.assert_allclose(in_the_loss.params, in_the_step.params, rtol=1e-6)
    one_step(gr.regularized_loss(mean_square, optax.clip(0.1)))  # no penalty in the loss


def test_an_argument_of_the_loss_that_a_step_keeps_for_itself_is_refused():
    def loss(params, batch, held_out=0.0):
        return mean_square(params, batch) + held_out

    for make in (
        functools.partial(gr.make_train_step, optimizer=optax.sgd(0.1)),
        gr.make_nnx_train_step,
    ):
        with says(TypeError, "train_step: the loss has an argument 'held_out'", "Rename"):
            make(loss)


def test_a_float_that_a_loss_calls_step_is_its_own():
    def loss(params, step):
        return step * quartic(params)

    for wrap in (lambda f: f, jax.jit):
        gradient = wrap(jax.grad(gr.regularized_loss(loss, FD)))
        _, expected = gr.fd_value_and_grad(loss, **PENALTY)(P, 0.5)
        np.testing.assert_allclose(gradient(P, 0.5), expected, rtol=1e-5)
        np.testing.assert_allclose(gradient(P, step=jnp.asarray(0.5)), expected, rtol=1e-5)
        with says(TypeError, "needs the step", "a whole number"):
            late = gr.regularized_loss(loss, gr.fd_gradreg(**PENALTY, interval=2))
            wrap(jax.grad(late))(P, 0.5)


@pytest.mark.parametrize("value", ["no", None, 0, 1.0, [True]])
def test_flags_are_bools(value):
    with says(TypeError, "fd_gradreg: reuse_updates must be True or False"):
        gr.fd_gradreg(**PENALTY, reuse_updates=value)
    with says(TypeError, "fd_gradreg: reuse_updates must be True or False"):
        updated(FD, reuse_updates=value)
    with says(TypeError, "make_train_step: donate must be True or False"):
        gr.make_train_step(mean_square, optax.sgd(0.1), donate=value)
    for name, make in {
        "fd_gradreg": lambda: gr.fd_gradreg(**PENALTY, has_aux=value),
        "flooding": lambda: gr.flooding(level=0.1, has_aux=value),
        "fd_value_and_grad": lambda: gr.fd_value_and_grad(quartic, **PENALTY, has_aux=value),
        "make_train_step": lambda: gr.make_train_step(mean_square, optax.sgd(0.1), has_aux=value),
        "microbatched": lambda: gr.microbatched(mean_square, 2, has_aux=value),
        "regularized_loss": lambda: gr.regularized_loss(quartic, FD, has_aux=value),
    }.items():
        with says(TypeError, f"{name}: has_aux must be True or False, got {value!r}"):
            make()


def test_flags_are_known_before_the_program_runs():
    with says(TypeError, "fd_gradreg: reuse_updates must be", "known before the program runs"):
        jax.jit(lambda flag: updated(FD, reuse_updates=flag))(True)
    flags = (np.bool_(False), jnp.asarray(False))
    for flag in flags:
        np.testing.assert_array_equal(
            updated(gr.fd_gradreg(**PENALTY, reuse_updates=flag)), updated(FD)
        )


def test_aux_that_cannot_leave_a_program_is_named():
    def loss(params, batch):
        return mean_square(params, batch), {"logits": batch @ params, "name": "text"}

    for call in (
        lambda: gr.microbatched(loss, 2, has_aux=True)(P, BATCH),
        lambda: jax.grad(gr.microbatched(loss, 2, has_aux=True), has_aux=True)(P, BATCH),
        lambda: one_step(loss, has_aux=True),
        lambda: one_step(loss, has_aux=True, ascent_groups=2),
    ):
        with says(TypeError, "aux['name'] must be an array, got str", "arrays only"):
            call()


def test_directions_of_integers_are_refused():
    whole = jnp.asarray([3, 4])
    for call in (
        lambda: gr.normalized(whole, P),
        lambda: gr.normalized([3, 4], P),
        lambda: gr.adaptive(whole, P),
        lambda: gr.adaptive(P, whole),
    ):
        with says(TypeError, "dtype int", "have a gradient"):
            call()
    with says(ValueError, "adaptive: the gradient must have the structure of the parameters"):
        gr.adaptive(P, None)


@pytest.mark.parametrize("key", [0, None, 1.5, jax.random.split(jax.random.key(0), 3), P])
def test_a_key_is_a_single_random_key(key):
    for name in ("top_hessian_eigenvalue", "hessian_trace"):
        with says(TypeError, f"{name}: key must be a single random key", "jax.random.key(0)"):
            getattr(curvature, name)(quartic, P, key)


def test_a_batch_without_samples_is_refused_where_it_is_split():
    for split in ({"ascent_groups": 2}, {"penalty_fraction": 0.5}):
        with says(ValueError, f"{next(iter(split))} needs a batch with samples"):
            one_step(batch=BATCH[:0], **split)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_a_mistake_in_the_loss_is_not_taken_for_a_missing_second_derivative(mode):
    def loss(params):
        raise ValueError("the mistake of the loss itself")

    with pytest.raises(ValueError, match=r"^the mistake of the loss itself"):
        gr.dbp_value_and_grad(loss, gamma=0.1, mode=mode)(P)


def test_an_ascent_that_is_no_function_is_refused_by_both_gradient_functions():
    for name, make in {
        "fd_value_and_grad": functools.partial(gr.fd_value_and_grad, epsilon=0.1),
        "dbp_value_and_grad": gr.dbp_value_and_grad,
    }.items():
        for bad in ({"w": True}, 0.1, "normalized"):
            with says(TypeError, f"{name}: ascent must be a function (gradient, params)"):
                make(quartic, gamma=0.1, ascent=bad)


def test_a_batch_split_over_two_axes_at_once_is_split_over_their_product():
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    spec = jax.sharding.PartitionSpec
    for one in (spec(("data", "model"), None), spec("data", "model"), spec(None, "model"), spec()):
        with jax.set_mesh(mesh):
            batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, one))
            assert leading_devices(batch) == 1
