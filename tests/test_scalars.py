"""Numbers, arrays, tracers and schedules are all scalars."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax
import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import (
    asam,
    dbp_gradreg,
    fd_gradreg,
    gradient_norm_penalty,
    relative_gradreg,
    sam,
)
from problems import SCHEMES, batch_of, correction, flat, loss_fn, params_of, regularized, update_of

SCALARS = {
    "float": float,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy array": np.asarray,
    "jax float32": lambda x: jnp.asarray(x, jnp.float32),
    "jax bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "constant schedule": lambda x: lambda step: x,
    "array schedule": lambda x: optax.constant_schedule(jnp.asarray(x)),
}


@pytest.mark.parametrize("kind", SCALARS)
@pytest.mark.parametrize("wide", [False, True])
def test_every_kind_of_scalar_gives_the_same_update_and_dtype(kind, wide):
    with jax.enable_x64(wide):  # float32 trees stay float32 under x64, for any width of gamma
        params, batch = (
            params_of(dtype=jnp.float32),
            jax.tree.map(lambda x: x.astype(jnp.float32), batch_of()),
        )
        gradient = jax.grad(loss_fn)(params, batch)
        convert = SCALARS[kind]
        for interval in (1, 2):
            # exact in bfloat16
            tx = fd_gradreg(loss_fn, gamma=convert(0.5), epsilon=convert(0.25), interval=interval)
            updates = jax.jit(lambda tx=tx: update_of(tx, gradient, params, batch=batch))()
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        doubled = flat(updates) - flat(gradient)
        expected = flat(correction(params, batch, 0.5, 0.25))
        # eps(float32) gamma / epsilon times interval
        np.testing.assert_allclose(doubled, 2 * expected, atol=1e-5)


def test_integers_are_numbers():
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    updates = [
        flat(update_of(fd_gradreg(loss_fn, gamma=g, epsilon=e), gradient, params, batch=batch))
        for g, e in [(1, 2), (1.0, 2.0)]
    ]
    np.testing.assert_array_equal(*updates)


def test_gamma_and_epsilon_can_be_vmapped_jitted_and_differentiated(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)

    @jax.jit
    def update(gamma, epsilon):
        return update_of(
            fd_gradreg(loss_fn, gamma=gamma, epsilon=epsilon), gradient, params, batch=batch
        )

    gammas, epsilons = np.asarray([0.0, 0.5, 1.0]), np.asarray([0.1, 0.3])
    table = jax.vmap(lambda g: jax.vmap(lambda e: update(g, e))(epsilons))(gammas)
    for i, gamma in enumerate(gammas):
        for j, epsilon in enumerate(epsilons):
            cell = jax.tree.map(lambda x, i=i, j=j: x[i, j], table)
            np.testing.assert_allclose(
                flat(cell),
                flat(regularized(params, batch, gamma, epsilon)),
                rtol=1e-11,
                atol=1e-13,
            )
    # the update is linear in gamma, and its derivative is the correction at gamma = 1
    slope = jax.jacobian(update)(0.5, 0.3)
    np.testing.assert_allclose(
        flat(slope),
        flat(correction(params, batch, 1.0, 0.3)),
        rtol=1e-11,
        atol=1e-13,
    )
    for name in ("dbp", "sam"):  # traced through the other families as well
        make = {
            "dbp": lambda s: dbp_gradreg(loss_fn, gamma=s),
            "sam": lambda s: sam(loss_fn, rho=s),
        }[name]
        rows = jax.jit(
            jax.vmap(lambda s, make=make: update_of(make(s), gradient, params, batch=batch))
        )(jnp.asarray([0.1, 0.2]))
        alone = update_of(make(0.2), gradient, params, batch=batch)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x: x[1], rows)), flat(alone), rtol=1e-11, atol=1e-13
        )


def test_a_traced_negative_epsilon_is_the_backward_difference(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    traced = jax.jit(
        lambda e: update_of(
            fd_gradreg(loss_fn, gamma=0.3, epsilon=e), gradient, params, batch=batch
        )
    )(-0.2)
    backward = update_of(
        fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2, scheme="backward"),
        gradient,
        params,
        batch=batch,
    )
    # rounding of the difference
    np.testing.assert_allclose(flat(traced), flat(backward), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_traced_or_scheduled_zero_epsilon_gives_no_correction(scheme):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)

    @jax.jit
    def traced(epsilon):
        tx = fd_gradreg(loss_fn, gamma=0.3, epsilon=epsilon, scheme=scheme)
        return update_of(tx, gradient, params, batch=batch), update_of(
            sam(loss_fn, rho=epsilon), gradient, params, batch=batch
        )

    for epsilon in (0.0, 1e-40):  # 1 / 1e-40 overflows in float32
        penalised, climbed = traced(epsilon)
        np.testing.assert_array_equal(flat(penalised), flat(gradient))
        # SAM's is the gradient evaluated once more
        np.testing.assert_allclose(flat(climbed), flat(gradient), rtol=1e-5, atol=1e-7)
    ramp = fd_gradreg(loss_fn, gamma=0.3, epsilon=optax.linear_schedule(0.0, 0.2, 2), scheme=scheme)
    for wrap in (jax.jit, lambda update: update):  # traced and concrete
        update, state = (
            wrap(lambda s: ramp.update(gradient, s, params, batch=batch)),
            ramp.init(params),
        )
        first, state = update(state)
        np.testing.assert_array_equal(flat(first), flat(gradient))
        second, _ = update(state)
        assert np.abs(flat(second) - flat(gradient)).max() > 1e-3


def test_a_scheduled_negative_epsilon_is_the_backward_difference_without_jit_too(x64):
    params = jnp.asarray(1.0)
    for tx in (
        fd_gradreg(lambda p: p**3 / 3, gamma=1.0, epsilon=lambda step: -0.5),
        sam(lambda p: p**3 / 3, rho=lambda step: -0.5),
    ):
        update = float(tx.update(jnp.asarray(1.0), tx.init(params), params)[0])
        assert update in (2.5, 0.25)  # 1 + 2 - 0.5, and the gradient at 0.5


def test_a_warm_up_of_epsilon_may_start_at_a_zero_of_jax_but_not_at_a_number_zero():
    tx = fd_gradreg(gamma=1.0, epsilon=jnp.zeros([]))
    params = jnp.ones(2)
    updates = update_of(tx, params, params, value_fn=lambda p: jnp.sum(p**2) / 2)
    np.testing.assert_array_equal(updates, params)
    with pytest.raises(ValueError, match=r"must be finite and > 0, got 0\.0"):
        fd_gradreg(gamma=1.0, epsilon=0.0)


ZERO = {
    "fd gamma": lambda x, **k: fd_gradreg(gamma=x, epsilon=0.1, **k),
    "dbp gamma": lambda x, **k: dbp_gradreg(gamma=x, **k),
    "gnp gamma": lambda x, **k: gradient_norm_penalty(gamma=x, epsilon=0.1, **k),
    "relative strength": lambda x, **k: relative_gradreg(strength=x, **k),
    "sam rho": lambda x, **k: sam(rho=x, **k),
    "asam rho": lambda x, **k: asam(rho=x, **k),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_coefficient_of_zero_is_the_plain_gradient(x64, name):
    params, batch = params_of(), batch_of()

    @jax.jit
    def updates():
        gradient = jax.grad(loss_fn)(params, batch)
        transformations = [
            ZERO[name](zero, **options)
            for zero in (0, 0.0, np.float32(0), jnp.zeros([]))
            for options in ({}, {"interval": 2}, {"reuse_updates": False})
        ]
        value_fn = functools.partial(loss_fn, batch=batch)
        return gradient, [
            update_of(tx, gradient, params, value_fn=value_fn) for tx in transformations
        ]

    gradient, found = updates()
    for tree in found:
        np.testing.assert_allclose(flat(tree), flat(gradient), rtol=1e-14)


@pytest.mark.parametrize(
    "function",
    [f for f in map(vars(gradreg_optax).get, gradreg_optax.__all__) if inspect.isfunction(f)],
)
def test_help_prints_a_signature_that_can_be_read_and_its_types_resolve(function):
    assert len(str(inspect.signature(function))) < 400
    assert "return" in typing.get_type_hints(function)


def test_an_update_may_not_be_complex_where_its_parameter_is_real():
    params = {"x": jnp.ones(2)}
    tx = fd_gradreg(lambda p: jnp.sum(p["x"] ** 2), gamma=0.1, epsilon=0.1)
    with pytest.raises(TypeError, match=r"updates\['x'\] must be real, like its parameter"):
        tx.update({"x": jnp.ones(2) + 1j}, tx.init(params), params)


def test_epsilon_and_gamma_at_the_ends_of_float32_are_refused():
    for epsilon in (float("inf"), 1e-40, 1e39):
        for make in (gr.fd_gradreg, gr.gradient_norm_penalty):
            with two.says(
                ValueError, f"{make.__name__}: epsilon must be finite and > 0, got {epsilon}"
            ):
                make(gamma=0.1, epsilon=epsilon)
    with two.says(ValueError, "fd_gradreg: gamma must be finite and >= 0, got inf"):
        gr.fd_gradreg(gamma=1e39, epsilon=0.1)
    with jax.enable_x64(True):
        gr.fd_gradreg(gamma=1e39, epsilon=1e-40)


@pytest.mark.parametrize(
    "value", [np.longdouble(1), np.timedelta64(1), np.datetime64("2020"), b"1", [1, [2]], object()]
)
def test_scalars_that_jax_does_not_know_are_refused(value):
    with two.says(TypeError, "fd_gradreg: gamma must be a real number or a schedule"):
        gr.fd_gradreg(gamma=value, epsilon=0.1)
    with two.says(TypeError, "ascent_groups must be a whole number"):
        gr.make_train_step(two.mean_square, optax.sgd(0.1), two.FD, ascent_groups=value)


def test_whole_numbers_and_fractions_refuse_what_is_none():
    for bad in ("2", None, 2.5, float("nan"), float("inf"), [2], True):
        with two.says(
            (TypeError, ValueError), "make_train_step: ascent_groups must be a whole number"
        ):
            two.one_step(ascent_groups=bad)
        with two.says((TypeError, ValueError), "microbatched: count must be a whole number"):
            gr.microbatched(two.mean_square, bad)
    for bad in ("0.5", None, float("nan"), float("inf"), [0.5], True):
        with two.says((TypeError, ValueError), "make_train_step: penalty_fraction must"):
            two.one_step(penalty_fraction=bad)


@pytest.mark.parametrize("value", ["no", None, 0, 1.0, [True]])
def test_flags_are_bools(value):
    with two.says(TypeError, "fd_gradreg: reuse_updates must be True or False"):
        gr.fd_gradreg(**two.PENALTY, reuse_updates=value)
    with two.says(TypeError, "fd_gradreg: reuse_updates must be True or False"):
        two.updated(two.FD, reuse_updates=value)
    with two.says(TypeError, "make_train_step: donate must be True or False"):
        gr.make_train_step(two.mean_square, optax.sgd(0.1), donate=value)
    for name, make in {
        "fd_gradreg": lambda: gr.fd_gradreg(**two.PENALTY, has_aux=value),
        "flooding": lambda: gr.flooding(level=0.1, has_aux=value),
        "fd_value_and_grad": lambda: gr.fd_value_and_grad(
            two.quartic, **two.PENALTY, has_aux=value
        ),
        "make_train_step": lambda: gr.make_train_step(
            two.mean_square, optax.sgd(0.1), has_aux=value
        ),
        "microbatched": lambda: gr.microbatched(two.mean_square, 2, has_aux=value),
        "regularized_loss": lambda: gr.regularized_loss(two.quartic, two.FD, has_aux=value),
    }.items():
        with two.says(TypeError, f"{name}: has_aux must be True or False, got {value!r}"):
            make()


def test_flags_are_known_before_the_program_runs():
    with two.says(TypeError, "fd_gradreg: reuse_updates must be", "known before the program runs"):
        jax.jit(lambda flag: two.updated(two.FD, reuse_updates=flag))(True)
    flags = (np.bool_(False), jnp.asarray(False))
    for flag in flags:
        np.testing.assert_array_equal(
            two.updated(gr.fd_gradreg(**two.PENALTY, reuse_updates=flag)), two.updated(two.FD)
        )
